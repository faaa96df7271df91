"""What thresholds on a signal would have taken: a rule that halts where a score falls below one, on recorded scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ThresholdAccount", "Thresholds"]

MOST_TRIED = 64


@dataclass(frozen=True)
class Thresholds:
    """What each threshold on one signal takes and keeps, from the safest to the most eager.

    Attributes:
        taus: a row halts at the first step whose score is below tau, or at full depth.
        steps: the mean over rows at each.
        quality: the share of rows that lose nothing where they halt, at each.
        full_depth: K.
    """

    taus: tuple[float, ...]
    steps: tuple[float, ...]
    quality: tuple[float, ...]
    full_depth: int

    def least_steps(self, level: float) -> float:
        """The fewest mean steps at which a share ``level`` of rows loses nothing; K where no threshold is that good.

        The threshold is picked with hindsight, as the best fixed depth is.
        """
        good = (steps for steps, share in zip(self.steps, self.quality, strict=True) if share >= level)
        return min(good, default=float(self.full_depth))


class ThresholdAccount:
    """Tries thresholds on recorded signals over text that comes in portions; memory does not grow with the text.

    The thresholds of a signal are quantiles, over the rows of the first portion that has any, of the least score so
    far at each step: what decides where a row halts.

    Args:
        signals: their names; small where a row has settled.
        steps: K.
    """

    def __init__(self, signals: Sequence[str], steps: int) -> None:
        self.steps, self._signals = steps, tuple(signals)
        self._taus: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}  # of steps, and of rows that lost nothing, (2, thresholds)
        self._rows = 0

    def add(self, scores: Mapping[str, Tensor], good: Tensor, counts: Tensor) -> None:
        """Add a portion.

        Args:
            scores: of every signal, ``(K, rows...)``; a NaN halts nothing.
            good: whether a row that is halted at a step loses nothing, ``(K, rows...)`` bool.
            counts: rows that count, ``(rows...)`` bool.

        Raises:
            ValueError: shapes that do not fit.
        """
        shape = (self.steps, *counts.shape)
        if good.shape != shape or any(scores[name].shape != shape for name in self._signals):
            raise ValueError(f"scores and qualities of rows {tuple(counts.shape)}: {shape} is expected")
        chosen = counts.flatten().cpu()
        if not bool(chosen.any()):
            return
        kept = good.flatten(1).cpu()[:, chosen]
        self._rows += int(chosen.sum())
        for name in self._signals:
            each = scores[name].detach().flatten(1).cpu().double()[:, chosen]
            least = each.nan_to_num(torch.inf, torch.inf, -torch.inf).cummin(0).values
            if name not in self._taus:
                self._taus[name] = _told_apart(least)
                self._sums[name] = torch.zeros(2, len(self._taus[name]), dtype=torch.int64)
            halts = torch.stack([(least >= tau).sum(0) for tau in self._taus[name]]).clamp_max(self.steps - 1)
            self._sums[name] += torch.stack([(halts + 1).sum(1), kept.gather(0, halts).sum(1)])

    def result(self) -> dict[str, Thresholds]:
        """By signal; empty where no row was added."""
        means = {name: (sums.double() / self._rows).tolist() for name, sums in self._sums.items()}
        return {
            name: Thresholds(tuple(self._taus[name].tolist()), tuple(steps), tuple(quality), self.steps)
            for name, (steps, quality) in means.items()
        }


def _told_apart(scores: Tensor) -> Tensor:
    """At most so many thresholds that tell the scores apart, in order."""
    values = torch.unique(scores[scores.isfinite()])
    if not len(values):
        return torch.zeros(1, dtype=torch.float64)
    places = torch.linspace(0, len(values) - 1, min(MOST_TRIED, len(values))).round().long()
    return torch.cat([values[places], values[-1:] + values[-1:].abs() + 1])
