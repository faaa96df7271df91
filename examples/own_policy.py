"""A policy of your own, used everywhere a built-in one is.

python examples/own_policy.py
haltkit compare --policies examples.own_policy:Cosine,norm    (from the repository's root)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import haltkit
from haltkit import LoopStep, Verdict


@haltkit.register("turning", formula="1 - cos(x_k, x_{k-1})", scale="[0, 2]", examples=("tau=0.001",), cost="tau=1e-30")
@dataclass(frozen=True)
class Cosine:
    """Halt a row when its state stops turning: ``1 - cos(x_k, x_{k-1}) < tau``."""

    tau: float

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: LoopStep) -> tuple[None, Verdict]:
        score = 1 - torch.cosine_similarity(step.x.float(), step.x_prev.float(), dim=-1)
        return None, Verdict(score, score < self.tau)


class Step(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Looped(nn.Module):
    """A model that loops a step 32 times, as one that is not yours would."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.step = Step(function)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(32):
            x = self.step(x)
        return x


def main() -> None:
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    x0 = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))

    def body(x: Tensor) -> Tensor:
        return 0.6 * x @ turn + 1.0

    # The spec language knows the class by its name, once its module is loaded, and by its place; wrappers work on it as
    # on any other.
    for spec in ("turning:tau=1e-4,patience=3", f"{Cosine.__module__}:Cosine:tau=1e-4"):
        result = haltkit.run_loop(body, x0, haltkit.policy(spec))
        print(f"{spec}: steps {result.steps.tolist()}")

    # In somebody else's model, on a recording, and in the comparison with the others:
    model = Looped(body)
    with torch.no_grad(), haltkit.attach(model, Cosine(1e-4), body=["step"]) as session:
        model(x0)
    print(f"attached: steps {session.steps['loop'].tolist()}")
    haltkit.run_loop(body, x0, haltkit.policy("fixed:steps=32"), observer=(recorder := haltkit.Recorder()))
    print(f"replayed: steps {haltkit.replay(Cosine(1e-4), recorder.trajectory['loop']).steps.tolist()}")
    compared = haltkit.compare(
        model,
        lambda x: (model(x) - result.x).norm(dim=-1),
        ["turning:tau=1e-4", Cosine(1e-3), "norm:tau=0.01"],  # by its name, as an object, and beside a built-in one
        samples=[x0, 2 * x0],
        body=["step"],
        repeats=1,
    )
    for row in compared.rows[-3:]:
        print(f"compared: {row.spec}: {row.steps['loop']:.1f} steps, {row.speedup:.1f}x")


if __name__ == "__main__":
    main()
