"""``norm-rel``: halt when the step is short beside the state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep, Verdict, check_tau

__all__ = ["NormalizedStepNorm"]


@dataclass(frozen=True)
class NormalizedStepNorm:
    """Halt a row when ``||d_k|| / (||x||+ eps) < tau``: the normalized step norm of arXiv 2509.23314, section 4.

    Args:
        tau: threshold, a ratio without unit.
        denominator: ``previous`` divides by ``||x_{k-1}||``; ``current`` by ``||x_k||``, as Geiping et al.
            (arXiv 2502.05171).
        eps: added to the denominator.
    """

    tau: float
    denominator: Literal["previous", "current"] = "previous"
    eps: float = signals.EPS

    def __post_init__(self) -> None:
        check_tau(self.tau)

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: LoopStep) -> tuple[None, Verdict]:
        reference = step.x_prev if self.denominator == "previous" else step.x
        score = signals.normalized(step.step_norm, signals.norm(reference), self.eps)
        return None, Verdict(score, score < self.tau)
