"""A model whose rows settle at steps that are known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import haltkit
from haltkit.driving import Pass
from haltkit.kinds import Kinds, per_row
from haltkit.policies import Fixed
from haltkit.subject import Subject

__all__ = ["BY_HOPS", "STEPS", "Count", "Countdown", "countdown", "readout"]

STEPS = 8


class Countdown(nn.Module):
    """A row ``(h, 0)`` counts to h, one per step, and predicts class 1 from step h on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))  # tells two models apart
        self.body = Count()

    def forward(self, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = self.body(x)
        return x * self.scale


class Count(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        hops, count = x.unbind(-1)
        return torch.stack([hops, torch.minimum(count + 1, hops)], -1)


def readout(x: Tensor) -> Tensor:
    settled = x[..., 1] - x[..., 0] + 0.5
    return torch.stack([-settled, settled], -1)


def countdown(*, count: int = 2, kinds: Kinds | None = None, by_row: bool = True, **more: Any) -> Subject:
    """Rows of 1 or 5 hops in turn, right from step 1 or 5 on; what a row needs is its kind's alone."""
    model = Countdown().eval()

    def run(inputs: Tensor, depth: int | Mapping[str, int]) -> Tensor:
        return model(inputs, depth if isinstance(depth, int) else depth["loop"])

    def halted(inputs: Tensor, policy: Any, budget: int, rows: Tensor | None = None) -> Pass:
        result = haltkit.run_loop(model.body, inputs, policy, max_steps=budget, budget=rows, readout=readout)
        return Pass(result.x, {"loop": result.steps}, {"loop": result.outcome})

    def adaptive(inputs: Tensor, policies: Mapping[str, Any], budget: int) -> Pass:
        return halted(inputs, policies["loop"], budget)

    def leaving(inputs: Tensor, steps: Mapping[str, Tensor]) -> Pass:
        return halted(inputs, Fixed(STEPS), STEPS, per_row(steps["loop"], inputs.shape[:-1]))

    hops = torch.tensor([1.0, 5.0]).repeat(count, 3, 4)
    given: dict[str, Any] = {
        "samples": list(torch.stack([hops, torch.zeros_like(hops)], -1)),
        "readout": readout,
        "logits": readout,
        "loss": lambda output, sample: (output[..., 1] < sample[..., 0]).float(),
        "unit": "wrong",
        "full_depth": STEPS,
        "fixed_depths": (2, 5),
        "adaptive": adaptive,
        "by_row": leaving if by_row else None,
        "kinds": kinds,
    }
    return Subject.of_modules(model, run, {"loop": "body"}, **(given | more))


BY_HOPS = Kinds(lambda inputs: (inputs[..., 0] > 1).long(), ("near", "far"), "hops")
