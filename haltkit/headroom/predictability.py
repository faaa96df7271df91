"""Predictability: how well a signal tells, at step k, which rows have settled.

The measure is the area under the ROC curve: the probability that a settled row has a smaller score than one that is
not settled, ties counting half. 0.5 says nothing, 1 separates them. A row is settled at step k if its oracle depth is
at most k. A signal of the other direction, such as a probability of being settled, is passed with its sign changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from haltkit.headroom.clusters import sequence_of_rows

__all__ = ["Auc", "AucAccount", "auc"]


class Auc(NamedTuple):
    """An area under the curve and its standard error, clustered by sequence; NaN where not defined."""

    value: float
    error: float


def auc(scores: Tensor, settled: Tensor, sequence: Tensor | None = None) -> Auc:
    """The exact area under the curve of one signal at one step.

    The standard error is that of the mean placements (DeLong et al. 1988) added up by sequence (Obuchowski 1997).

    Args:
        scores: ``(rows...)``; smaller should mean settled. Rows with score NaN are not counted; infinity is a score.
        settled: ``(rows...)`` bool.
        sequence: of each row, ``(rows...)``; the leading dimension's index if not given.

    Returns:
        NaN where all rows are settled, or none; a NaN error where rows of either kind come from one sequence only.

    Raises:
        ValueError: shapes that differ.
    """
    if scores.shape != settled.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and settled {tuple(settled.shape)} of other rows")
    index = sequence_of_rows(scores.shape, sequence).cpu()
    values, labels = scores.detach().cpu().double().flatten(), settled.cpu().flatten()
    known = ~values.isnan()
    values, labels, index = values[known], labels[known], index[known]
    low, high = values[labels], values[~labels]
    if not len(low) or not len(high):
        return Auc(math.nan, math.nan)
    placements = torch.empty_like(values)
    placements[labels] = 1 - _share_below(low, high)  # of rows not settled: how many are above
    placements[~labels] = _share_below(high, low)
    value = placements[labels].mean()
    _, cluster = torch.unique(index, return_inverse=True)
    count = int(cluster.max()) + 1
    weight = torch.where(labels, 1 / len(low), 1 / len(high)).double()
    influence = torch.zeros(count, dtype=torch.float64).index_add_(0, cluster, (placements - value) * weight)
    fewest = min(len(torch.unique(cluster[labels])), len(torch.unique(cluster[~labels])))
    error = math.sqrt(count / (count - 1) * float(influence.square().sum())) if fewest > 1 else math.nan
    return Auc(float(value), error)


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    """For each value, the share of the others that are smaller, ties counting half."""
    ordered = others.sort().values
    below = torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    return below.double() / (2 * len(others))


class AucAccount:
    """Areas by step for several signals over text that comes in portions; memory does not grow with the text.

    Scores are counted in bins of 1/16 of a power of two, which keep their order: a score is told from another if they
    differ by more than 6 percent, from 1e-38 to 1e38 and on both sides of zero. So pass signals that are small where a
    row has settled (``1 - cos``, not ``cos``; a logit, not a probability). Sequences are dealt out to 16 groups in
    turn, and the standard error is the jackknife's over groups.

    Args:
        signals: their names.
        steps: K.
    """

    GROUPS, _BINS, _SHIFT = 16, 2**14, 19

    def __init__(self, signals: Sequence[str], steps: int) -> None:
        if not signals or steps < 1:
            raise ValueError(f"{len(signals)} signals over {steps} steps: at least one of each")
        self.steps = steps
        empty = torch.zeros(0, dtype=torch.int64)
        self._counts = {name: [(empty, empty)] * steps for name in signals}
        self._sequences = 0

    def add(self, scores: Mapping[str, Tensor], depths: Tensor, sequence: Tensor | None = None) -> None:
        """Add a portion that contains only whole sequences.

        Args:
            scores: of every signal, ``(K, rows...)``.
            depths: the oracle's, ``(rows...)``; rows of depth 0 are not counted.
            sequence: of each row, ``(rows...)``; the leading dimension's index if not given.

        Raises:
            ValueError: other signals than announced, or shapes that do not fit.
        """
        if set(scores) != set(self._counts):
            raise ValueError(f"signals {', '.join(scores)}, where {', '.join(self._counts)} were announced")
        shape = (self.steps, *depths.shape)
        for name, values in scores.items():
            if values.shape != shape:
                raise ValueError(f"{name} has shape {tuple(values.shape)}; {shape} is expected")
        _, order = torch.unique(sequence_of_rows(depths.shape, sequence).cpu(), return_inverse=True)
        group = (order + self._sequences) % self.GROUPS
        self._sequences += int(order.max()) + 1 if len(order) else 0
        flat = depths.flatten().cpu()
        for name, values in scores.items():
            for k in range(self.steps):
                row = values[k].detach().flatten().cpu()
                known = (flat > 0) & ~row.isnan()
                settled = (flat[known] <= k + 1).long()
                keys = (group[known] * 2 + settled) * self._BINS + self._bin(row[known])
                self._counts[name][k] = _merge(*self._counts[name][k], keys)

    def _bin(self, scores: Tensor) -> Tensor:
        """A whole number per score that keeps their order: the leading bits of a float are its order already."""
        bits = scores.float().contiguous().view(torch.int32).long()
        ordered = torch.where(bits >= 0, bits, -(bits & 0x7FFFFFFF))
        return (ordered >> self._SHIFT) + self._BINS // 2

    def result(self) -> dict[str, tuple[Auc, ...]]:
        """Per signal, the area at steps 1 to K."""
        return {name: tuple(self._area(keys, counts) for keys, counts in steps) for name, steps in self._counts.items()}

    def _area(self, keys: Tensor, counts: Tensor) -> Auc:
        bins, column = torch.unique((keys % self._BINS), return_inverse=True)
        table = torch.zeros(self.GROUPS * 2, len(bins), dtype=torch.float64)
        table.index_put_((keys // self._BINS, column), counts.double())
        by_group = table.view(self.GROUPS, 2, -1)
        total = by_group.sum(0)
        value = _area_of_counts(total)
        kept = [_area_of_counts(total - part) for part in by_group if part.sum() > 0]
        if len(kept) < 2:
            return Auc(value, math.nan)
        left = torch.tensor(kept, dtype=torch.float64)
        error = ((len(left) - 1) / len(left) * (left - left.mean()).square().sum()).sqrt()
        return Auc(value, float(error))


def _merge(keys: Tensor, counts: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    merged, index = torch.unique(torch.cat([keys, more]), return_inverse=True)
    total = torch.zeros(len(merged), dtype=torch.int64)
    return merged, total.index_add_(0, index, torch.cat([counts, torch.ones(len(more), dtype=torch.int64)]))


def _area_of_counts(counts: Tensor) -> float:
    """Of counts ``(2, bins)``: not settled, settled; bins in order of the score."""
    above, settled = counts
    pairs = float(above.sum() * settled.sum())
    below = above.cumsum(0) - 0.5 * above  # of those not settled: below this bin, half of those in it
    return float((settled * (above.sum() - below)).sum()) / pairs if pairs else math.nan
