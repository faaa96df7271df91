"""A Universal-Transformer style loop of your own, halted token by token.

python examples/halt_your_own_loop.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import haltkit


class Refiner(nn.Module):
    """One residual layer applied again and again, its input injected at each step."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.norm(x + 0.5 * torch.tanh(self.mix(torch.cat([x, e], dim=-1))))


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    body, e = Refiner(), torch.randn(2, 6, 32)  # two sequences of six tokens
    for spec in ("fixed:steps=32", "norm:tau=1e-1", "accel:tau=1e-2", "accel:tau=1e-2,granularity=sequence"):
        result = haltkit.run_loop(lambda x: body(x, e), torch.zeros_like(e), haltkit.policy(spec), max_steps=32)
        outcomes = sorted({haltkit.Outcome(int(o)).name for o in result.outcome.flatten()})
        print(f"{spec:36} steps {result.steps.tolist()}  {', '.join(outcomes)}")


if __name__ == "__main__":
    main()
