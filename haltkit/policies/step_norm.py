"""``norm``: halt when the step is short."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from haltkit.protocol import LoopStep, Verdict, check_tau

__all__ = ["StepNorm"]


@dataclass(frozen=True)
class StepNorm:
    """Halt a row when ``||d_k|| < tau``: the step norm of arXiv 2509.23314, Eq. 3.

    Args:
        tau: threshold in units of the state; its scale is that of the state's norm.
    """

    tau: float

    def __post_init__(self) -> None:
        check_tau(self.tau)

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: LoopStep) -> tuple[None, Verdict]:
        score = step.step_norm
        return None, Verdict(score, score < self.tau)
