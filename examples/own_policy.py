"""A policy of your own, used everywhere a built-in one is.

python examples/own_policy.py
haltkit compare --policies examples.own_policy:Cosine,norm    (from the repository's root)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import haltkit
from haltkit import LoopStep, Verdict


@dataclass(frozen=True)
class Cosine:
    """Halt a row when its state stops turning: ``1 - cos(x_k, x_{k-1}) < tau``."""

    tau: float

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: LoopStep) -> tuple[None, Verdict]:
        score = 1 - torch.cosine_similarity(step.x.float(), step.x_prev.float(), dim=-1)
        return None, Verdict(score, score < self.tau)


def main() -> None:
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    x0 = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))

    def body(x: Tensor) -> Tensor:
        return 0.6 * x @ turn + 1.0

    # The spec language knows the class by its place; wrappers work on it as on any other.
    for spec in (f"{Cosine.__module__}:Cosine:tau=1e-4", f"{Cosine.__module__}:Cosine:tau=1e-4,patience=3"):
        result = haltkit.run_loop(body, x0, haltkit.policy(spec))
        print(f"{spec}: steps {result.steps.tolist()}")


if __name__ == "__main__":
    main()
