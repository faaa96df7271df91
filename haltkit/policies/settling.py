"""``settle``: halt when little of the way to the loop's limit is left, or when the loop goes round in an orbit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep, Verdict, check_count, check_tau

__all__ = ["Settling"]


ALTERNATES = -0.999  # mean cosine below which steps go to and fro on a line, where they span no area
FLAT = 0.5  # mean sine to the plane of the two steps before, up to which a path is flat


class _State(NamedTuple):
    d: Tensor  # the last step
    d_prev: Tensor  # the one before
    norms: Tensor  # of the last 2 * window steps, (..., 2 * window), inf before the first one
    spans: Tensor  # roots of the areas that each of them spans with the one before
    cosines: Tensor  # of the last window pairs of steps, (..., window)
    slopes: Tensor  # sines to the plane of the two steps before, (..., window)


@dataclass(frozen=True)
class Settling:
    """Halt a row when the distance that its last two steps leave to their limit is below ``tau``.

    The last two steps are read as one turn and one shrinking, ``d_k`` being ``d_{k-1}`` shrunk by ``r`` and turned by
    an angle; if that goes on, :func:`haltkit.signals.remaining_distance` of the way is left. So the four ways in which
    a loop moves are told apart. One that *settles* is halted when it is nearly there, be it fast or slow, where
    ``norm`` halts a slow one far from its end. A *slider* (steps of one size in one direction) and a *drift* (growing
    steps) have no limit: the score is ``+inf``, and they run to the budget. On an *orbit* (steps that keep turning
    and do not shrink) nothing is gained by waiting: the score is 0.

    An orbit is not told from two steps: in a loop that settles in many directions at once, two steps are often of one
    size by accident, and a spiral that shrinks slowly looks the same. The areas that successive steps span are held
    against each other, those of the last ``window`` steps against the ``window`` before: on an ellipse, too, they stay
    the same, and in a spiral they shrink by ``r^2``. So no row is said to be on an orbit before step ``2 * window``.
    Besides, the path has to be flat, each step near the plane of the two before: a loop that follows a chain, one node
    per step, also takes turning steps of one size, and gets somewhere. An orbit that goes round in several planes at
    once is not told from that, and runs to the budget.

    A slow direction that is still hidden by a fast one is not seen: the distance is then underestimated.

    Args:
        tau: threshold in units of the state.
        slack: an orbit's steps grow or shrink by at most this share per step. A spiral that shrinks more slowly counts
            as an orbit: with 0.02 one that takes more than 34 steps to come half as near to its limit.
        turn: an orbit's steps turn by at least this angle, in degrees, above 0: the angle of their mean cosine.
        window: how many steps are held against as many before.
    """

    tau: float
    slack: float = 0.02
    turn: float = 20.0
    window: int = 4

    def __post_init__(self) -> None:
        check_tau(self.tau)
        check_count("window", self.window)
        if not 0 <= self.slack < 1:
            raise ValueError(f"slack={self.slack}: the share by which an orbit's steps differ is from 0 to below 1")
        if not 0 < self.turn <= 180:
            raise ValueError(f"turn={self.turn}: the angle of an orbit is above 0 and at most 180 degrees")

    def init(self, x0: Tensor) -> _State:
        x0 = signals.measured(x0)
        unknown = x0.new_full((*x0.shape[:-1], 2 * self.window), torch.inf)
        shorter, d = unknown[..., : self.window], torch.full_like(x0, torch.inf)
        return _State(d, d, unknown, unknown, shorter, shorter)

    def update(self, state: _State, step: LoopStep) -> tuple[_State, Verdict]:
        size, before = step.step_norm, state.norms[..., -1]
        cosine = signals.step_angle(step.d, state.d, size, before)
        skip = signals.step_angle(step.d, state.d_prev, size, state.norms[..., -2])
        slope = signals.off_plane(cosine, skip, state.cosines[..., -1])
        new = _State(
            step.d,
            state.d,
            _append(state.norms, size),
            _append(state.spans, signals.span(size, before, cosine)),
            _append(state.cosines, cosine),
            _append(state.slopes, slope),
        )
        score = signals.remaining_distance(size, before, cosine).masked_fill(self._orbits(new), 0.0)
        return new, Verdict(score, score < self.tau)

    def _orbits(self, state: _State) -> Tensor:
        """Which rows go round, ``(...)`` bool; none before all that this is told from has been measured."""
        turn = state.cosines.mean(-1)
        rate = signals.rate(torch.where(turn.unsqueeze(-1) < ALTERNATES, state.norms, state.spans))
        turns = turn <= math.cos(math.radians(self.turn))
        return ((rate - 1).abs() <= self.slack) & turns & (state.slopes.mean(-1) <= FLAT)


def _append(history: Tensor, new: Tensor) -> Tensor:
    """The newest values, ``(..., n)``, without the oldest one."""
    return torch.cat([history[..., 1:], new.unsqueeze(-1)], -1)
