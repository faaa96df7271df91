"""Where a loop ends in the long run: a fixed point, an orbit, a slider, or none of these.

After "A Mechanistic Analysis of Looped Reasoning Language Models" (arXiv 2604.11791, [M]), appendix C: each of 128
steps is compared with the last one, with a tolerance of 0.05 and a share of 0.9. The text does not give the
body of its algorithm; what follows is ours, and :data:`TOLERANCE`, :data:`SHARE` and the tail are stated with results.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from haltkit import signals
from haltkit.diagnostics.errors import DiagnosticError

__all__ = ["SHARE", "TOLERANCE", "Limit", "Measure", "classify_limits", "errors_to_last", "limit_counts", "norm_growth"]

TOLERANCE, SHARE = 0.05, 0.9
Measure = Literal["cosine", "distance"]


class Limit(IntEnum):
    """The limit type of one row's loop."""

    UNKNOWN = 0
    FIXED_POINT = 1
    ORBIT = 2
    SLIDER = 3


def errors_to_last(states: Tensor, measure: Measure = "cosine") -> Tensor:
    """How far each state is from the last, ``(K, ..., D)`` to ``(K, ...)``.

    ``cosine`` is ``1 - cos(x_t, x_K)``, [M]'s; ``distance`` is ``||x_t - x_K|| / ||x_K||``, which also sees a state
    that grows along one direction.
    """
    if measure == "cosine":
        return 1 - signals.cosine(states, states[-1].expand_as(states))
    if measure == "distance":
        return signals.norm(signals.difference(states, states[-1])) / signals.norm(states[-1])
    raise ValueError(f"measure={measure!r}: allowed are 'cosine' and 'distance'")


def norm_growth(states: Tensor) -> Tensor:
    """``||x_K|| / ||x_{K/2}||``, states ``(K, ..., D)`` to ``(...)``: one that rests in direction may still grow."""
    return signals.norm(states[-1]) / signals.norm(states[len(states) // 2 - 1])


def classify_limits(
    states: Tensor, *, tolerance: float = TOLERANCE, share: float = SHARE, measure: Measure = "cosine"
) -> tuple[Tensor, Tensor]:
    """The limit type of every row and, for orbits, the period.

    Judged on the second half of the steps, so that the way there does not count. With ``e_t`` the error of
    step t to the last one:

    - fixed point: ``e_t < tolerance`` at ``share`` of them;
    - orbit: otherwise, and ``e_t`` leaves the tolerance and comes back at least twice before the end. The period is
      the least lag at which its correlation with itself, having been low, peaks as high (to 0.1) as anywhere;
    - slider: otherwise, and ``e_t`` falls at ``share`` of the steps, all the way to the end;
    - unknown: the rest.

    Args:
        states: the same place of the cycle at every step, ``(K, ..., D)``.

    Returns:
        :class:`Limit` ``(...)`` int8, and periods ``(...)`` int64, 0 where there is none.

    Raises:
        DiagnosticError: fewer than 16 steps: too few to tell an orbit from an accident.
    """
    if len(states) < 16:
        raise DiagnosticError(f"{len(states)} steps are too few to tell a limit: run at least 16, better 128")
    tail = errors_to_last(states, measure)[len(states) // 2 :]  # (N, ...), the last of them 0
    before = tail[:-1]
    inside = before < tolerance
    fixed = inside.double().mean(0) >= share
    # A return is an entry into the tolerance from outside; the run that ends in x_K itself is not one.
    entered = inside[1:] & ~inside[:-1]
    final_run = inside.flip(0).cumprod(0).flip(0).bool()
    returns = (entered & ~final_run[1:]).sum(0) + (inside[0] & ~final_run[0]).long()
    orbit = ~fixed & (returns >= 2)
    slider = ~fixed & ~orbit & ((tail.diff(dim=0) < 0).double().mean(0) >= share)
    kind = torch.zeros_like(fixed, dtype=torch.int8)
    for limit, found in ((Limit.FIXED_POINT, fixed), (Limit.ORBIT, orbit), (Limit.SLIDER, slider)):
        kind[found] = limit
    # A row whose state stopped being finite has no limit, whatever comparisons with NaN say.
    kind[~tail.isfinite().all(0)] = Limit.UNKNOWN
    return kind, torch.where(kind == Limit.ORBIT, _periods(tail), 0)


def _periods(e: Tensor) -> Tensor:
    """The period of each row's errors ``(N, ...)``, up to N / 2; 0 where there is none to be found.

    The first lag, after the correlation of ``e`` with itself has left its heights, at which it peaks there again: a
    slow orbit correlates with itself a step later, and a plain maximum may be any multiple of the period.
    """
    correlation = torch.stack([_correlation(e[lag:], e[:-lag]) for lag in range(1, len(e) // 2 + 1)])
    outside = torch.full_like(correlation[:1], -torch.inf)
    left, right = torch.cat([outside, correlation[:-1]]), torch.cat([correlation[1:], outside])
    peak = (correlation > left) & (correlation >= right)
    low = correlation.cummin(0).values
    # Heights are what comes within 0.1 of the best peak that follows a lower place.
    best = torch.where(peak & (low < correlation - 0.1), correlation, -torch.inf).amax(0)
    good = peak & (correlation >= best - 0.1) & (low < best - 0.1)
    return torch.where(good.any(0), good.int().argmax(0) + 1, 0)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, over the first dimension; -1 where one of them is constant."""
    a, b = ((v - v.mean(0)).double() for v in (a, b))
    return ((a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt()).nan_to_num(-1.0)


def limit_counts(kind: Tensor) -> dict[str, int]:
    """How many rows have each limit type."""
    return {limit.name.lower().replace("_", " "): int((kind == limit).sum()) for limit in Limit}
