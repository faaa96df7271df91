"""``accel-rel``: halt when successive steps are alike beside their size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep, Verdict, check_tau

__all__ = ["NormalizedAcceleration"]


class _State(NamedTuple):
    d: Tensor
    step_norm: Tensor


@dataclass(frozen=True)
class NormalizedAcceleration:
    """Halt a row when ``||d_k - d_{k-1}|| / (scale + eps) < tau``: arXiv 2509.23314, Eq. 6.

    With the paper's denominator the score lies in [0, 1], and on a path that turns steadily by an angle of
    cosine ``c`` it stays at ``sqrt(2 - 2c) / 2`` however small the steps become: it is not a drop-in for ``accel``
    at the same threshold. Dividing by the state's norm (``state``) avoids that.

    Args:
        tau: threshold, a ratio without unit.
        denominator: ``steps`` is ``||d_k|| + ||d_{k-1}||`` (Eq. 6); ``state`` is ``||x_k||`` (the paper's closing
            remark, and what the code of Geiping et al., arXiv 2502.05171, uses).
        eps: added to the denominator.
    """

    tau: float
    denominator: Literal["steps", "state"] = "steps"
    eps: float = signals.EPS

    def __post_init__(self) -> None:
        check_tau(self.tau)

    def init(self, x0: Tensor) -> _State:
        x0 = signals.measured(x0)
        return _State(torch.full_like(x0, torch.inf), torch.full_like(x0[..., 0], torch.inf))

    def update(self, state: _State, step: LoopStep) -> tuple[_State, Verdict]:
        value = signals.acceleration(step.d, state.d)
        scale = step.step_norm + state.step_norm if self.denominator == "steps" else signals.norm(step.x)
        score = signals.normalized(value, scale, self.eps)
        return _State(step.d, step.step_norm), Verdict(score, score < self.tau)
