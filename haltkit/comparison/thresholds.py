"""Thresholds picked from what was seen: from a policy's scores, and from the loss of stopping at each step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from haltkit.protocol import Readout
from haltkit.recording.replay import scores
from haltkit.recording.trajectory import RegionTrajectory
from haltkit.registry import record_of
from haltkit.specs import Spec

__all__ = [
    "PAPER_TAUS",
    "TARGET_STEPS",
    "observed_taus",
    "patience_of",
    "scores_of",
    "tau_at_step",
    "tau_within",
    "taus_of",
]

# The thresholds of arXiv 2509.23314, Figure 4.
PAPER_TAUS = (1e-5, 1e-4, 1e-3, 1e-2)
# Steps at which thresholds picked from observed scores should stop a typical row.
TARGET_STEPS = (3, 4, 6, 10)


def _needed(scores: Tensor, patience: int) -> Tensor:
    """The threshold above which each row has halted by each step, ``(K - patience + 1, N)``, from its scores.

    With patience p a row halts at k once its last p scores are below tau: the largest of them is what counts, and the
    smallest such value so far decides whether the row has halted by k.
    """
    needed = scores.unfold(0, patience, 1).amax(-1) if patience > 1 else scores
    return needed.cummin(0).values


def tau_at_step(scores: Tensor, patience: int, target: int, greatest: float = math.inf) -> float | None:
    """The threshold at which a typical row would halt at about a target step, rounded up to two digits.

    Args:
        scores: what the policy measured at full depth, ``(K, N)``: step by sample.
        patience: hits in a row that the policy asks for.
        target: the step.
        greatest: threshold that the policy takes.

    Returns:
        a positive number, at most ``greatest``; None if there is no such threshold, or the target is beyond ``K``.
    """
    if not 0 <= target - patience <= len(scores) - patience:
        return None
    value = float(_needed(scores, patience)[target - patience].nanmedian())
    if not 0 < value < math.inf:
        return None
    digit = 10 ** (math.floor(math.log10(value)) - 1)
    return min(float(f"{math.ceil(value / digit * (1 + 1e-9)) * digit:.1e}"), greatest)


def observed_taus(scores: Tensor, patience: int = 1, targets: Sequence[int] = TARGET_STEPS) -> list[float]:
    """Thresholds for several target steps (see :func:`tau_at_step`), distinct and ascending."""
    return sorted({tau for target in targets if (tau := tau_at_step(scores, patience, target)) is not None})


def tau_within(scores: Tensor, losses: Tensor, level: float, patience: int = 1) -> float | None:
    """The largest threshold whose mean loss is at most ``level`` above that of full depth.

    Args:
        scores: what the policy measured at full depth, ``(K, N)``: step by sample.
        losses: what each sample loses if it stops at each step, ``(K, N)``; the last row is full depth.
        level: in the unit of the losses.
        patience: hits in a row that the policy asks for.

    Returns:
        a threshold in the middle, on a logarithmic scale, of those that halt the same rows at the same steps; None if
        every threshold that halts any row loses more.

    Raises:
        ValueError: scores and losses of different shapes.
    """
    if scores.shape != losses.shape or scores.ndim != 2:
        raise ValueError(f"scores {tuple(scores.shape)} and losses {tuple(losses.shape)}: both must be (K, N)")
    needed, lost = _needed(scores, patience).double(), losses.double()[patience - 1 :]
    # Raising tau past a row's value at a step halts the row there instead of at the next step with a lower value.
    drops = torch.ones_like(needed, dtype=torch.bool)
    drops[1:] = needed[1:] < needed[:-1]  # steps at which a row's value falls: only there can it halt first
    change = torch.zeros_like(lost)
    after = lost[-1].clone()  # the loss of the next step at which the row can halt; full depth to begin with
    for k in range(len(needed) - 1, -1, -1):
        change[k] = torch.where(drops[k], lost[k] - after, 0.0)
        after = torch.where(drops[k], lost[k], after)
    usable = drops & needed.isfinite() & (needed > 0)
    values, order = needed[usable].sort()
    if not len(values):
        return None
    rise = change[usable][order].cumsum(0) / lost.shape[1]
    last = torch.ones_like(values, dtype=torch.bool)
    last[:-1] = values[1:] > values[:-1]  # rows with equal values halt together
    good = (last & (rise <= level)).nonzero().flatten()
    if not len(good):
        return None
    index = int(good[-1])
    above = float(values[index + 1]) if index + 1 < len(values) else float(values[index]) * 1.21
    return math.sqrt(float(values[index]) * above)


def scores_of(spec: Spec, recordings: Sequence[RegionTrajectory], readout: Readout | None) -> tuple[Tensor, int]:
    """What a policy without a threshold measures on recordings, ``(K, N)``, and the patience that it asks for."""
    judge = spec.with_key("tau", "1").build()
    with torch.no_grad():
        seen = [scores(judge, region, readout=readout).flatten(1) for region in recordings]
    return torch.cat(seen, 1), patience_of(spec)


def patience_of(spec: Spec) -> int:
    """Hits in a row that a policy asks for, as its spec or its record says."""
    written = spec.get("patience")
    return int(written) if written is not None else record_of(spec.name).patience


def taus_of(
    spec: Spec, recordings: Sequence[RegionTrajectory], readout: Readout | None, targets: Sequence[int]
) -> dict[int, float]:
    """The threshold of a policy for each target step that has one, picked from its scores on recordings.

    Raises:
        ValueError: a combination, whose parts have scales of their own.
    """
    if spec.parts:
        raise ValueError(
            f"thresholds for the combination {str(spec)!r} cannot be picked from its scores, whose parts have scales "
            "of their own: give each part a tau, or say which taus to try"
        )
    seen, patience = scores_of(spec, recordings, readout)
    greatest = record_of(spec.name).greatest_tau
    found = {target: tau_at_step(seen, patience, target, greatest) for target in targets}
    return {target: tau for target, tau in found.items() if tau is not None}
