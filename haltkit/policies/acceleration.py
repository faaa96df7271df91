"""``accel``: halt when successive steps are alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep, Verdict, check_tau

__all__ = ["Acceleration"]


@dataclass(frozen=True)
class Acceleration:
    """Halt a row when ``||d_k - d_{k-1}|| < tau``: the acceleration of arXiv 2509.23314, Eq. 5.

    The paper's policy asks for two hits in a row (Algorithm 1): ``haltkit.policy("accel", tau=...)`` wraps this
    class in :class:`~haltkit.wrappers.Patience` with a count of 2.

    A drift at constant speed has no acceleration and is not converged: where that matters, pair it with ``norm``
    (``all(accel:...|norm:...)``). A state that settles into an orbit keeps accelerating and never halts.

    Args:
        tau: threshold in units of the state.
    """

    tau: float

    def __post_init__(self) -> None:
        check_tau(self.tau)

    def init(self, x0: Tensor) -> Tensor:
        # An infinite step before the first makes the first acceleration +inf: not defined yet.
        return torch.full_like(signals.measured(x0), torch.inf)

    def update(self, state: Tensor, step: LoopStep) -> tuple[Tensor, Verdict]:
        score = signals.acceleration(step.d, state)
        return step.d, Verdict(score, score < self.tau)
