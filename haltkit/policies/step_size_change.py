"""``speed``: halt when the step's size stops changing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep, Verdict, check_tau

__all__ = ["StepSizeChange"]


@dataclass(frozen=True)
class StepSizeChange:
    """Halt a row when ``abs(||d_k|| - ||d_{k-1}||) < tau``.

    What the words "second-order difference in step-size" in the abstract of arXiv 2509.23314 say literally; its
    Eq. 5 is another signal (``accel``). A rotation at constant speed fools this one.

    Args:
        tau: threshold in units of the state.
    """

    tau: float

    def __post_init__(self) -> None:
        check_tau(self.tau)

    def init(self, x0: Tensor) -> Tensor:
        return torch.full_like(signals.measured(x0)[..., 0], torch.inf)

    def update(self, state: Tensor, step: LoopStep) -> tuple[Tensor, Verdict]:
        score = signals.step_size_change(step.step_norm, state)
        return step.step_norm, Verdict(score, score < self.tau)
