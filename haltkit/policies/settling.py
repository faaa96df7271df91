"""``settle``: halt when little of the way to the loop's limit is left, or when the loop goes round in an orbit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep, Verdict, check_tau

__all__ = ["Settling"]


class _State(NamedTuple):
    d: Tensor
    step_norm: Tensor


@dataclass(frozen=True)
class Settling:
    """Halt a row when the distance that its last two steps leave to their limit is below ``tau``.

    The last two steps are read as one turn and one shrinking, ``d_k`` being ``d_{k-1}`` shrunk by ``r`` and turned by
    an angle; if that goes on, :func:`haltkit.signals.remaining_distance` of the way is left. So the four ways in which
    a loop moves are told apart: one that *settles* is halted when it is nearly there, be it fast or slow, where
    ``norm`` halts a slow one far from its end; on an *orbit* (steps of one size that keep turning) nothing is gained by
    waiting, the score is 0; a *slider* (steps of one size in one direction) and a *drift* (growing steps) have no
    limit, the score is ``+inf``, and they run to the budget.

    Args:
        tau: threshold in units of the state.
        slack: an orbit's steps differ in size by at most this share.
        turn: an orbit turns by at least this angle per step, in degrees, above 0.
    """

    tau: float
    slack: float = 0.02
    turn: float = 20.0

    def __post_init__(self) -> None:
        check_tau(self.tau)
        if not 0 <= self.slack < 1:
            raise ValueError(f"slack={self.slack}: the share by which an orbit's steps differ is from 0 to below 1")
        if not 0 < self.turn <= 180:
            raise ValueError(f"turn={self.turn}: the angle of an orbit is above 0 and at most 180 degrees")

    def init(self, x0: Tensor) -> _State:
        x0 = signals.measured(x0)
        return _State(torch.full_like(x0, torch.inf), torch.full_like(x0[..., 0], torch.inf))

    def update(self, state: _State, step: LoopStep) -> tuple[_State, Verdict]:
        cosine = signals.step_angle(step.d, state.d)
        score = signals.remaining_distance(step.step_norm, state.step_norm, cosine)
        ratio = step.step_norm / state.step_norm
        orbits = ((ratio - 1).abs() <= self.slack) & (cosine <= math.cos(math.radians(self.turn)))
        score = score.masked_fill(orbits & (state.step_norm < torch.inf), 0.0)
        return _State(step.d, step.step_norm), Verdict(score, score < self.tau)
