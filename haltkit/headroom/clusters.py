"""Means over rows with standard errors that know rows of one sequence to depend on each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ClusteredMean", "sequence_of_rows"]


def sequence_of_rows(shape: torch.Size, sequence: Tensor | None) -> Tensor:
    """The sequence of each row, flat: as given, or else the index in the leading dimension.

    Args:
        shape: of the rows.
        sequence: ``(rows...)``, any whole numbers, or None.

    Raises:
        ValueError: another shape than the rows'.
    """
    if sequence is not None:
        if sequence.shape != shape:
            raise ValueError(f"a sequence index of shape {tuple(sequence.shape)} for rows {tuple(shape)}")
        return sequence.flatten()
    if not shape:
        return torch.zeros(1, dtype=torch.int64)
    return torch.arange(shape[0]).repeat_interleave(math.prod(shape[1:]))


class ClusteredMean:
    """The mean of values over rows and its standard error clustered by sequence, in six numbers per quantity.

    With ``s_c`` the sum and ``n_c`` the count of sequence c, the mean is ``m = sum s_c / sum n_c`` and its variance
    ``C / (C - 1) * sum (s_c - m n_c)^2 / (sum n_c)^2``: the linearized variance of a ratio. Every sequence must come
    whole, in one :meth:`add`.
    """

    def __init__(self) -> None:
        self.clusters = 0
        self._sums = torch.zeros(5, dtype=torch.float64)  # s, n, s^2, s n, n^2

    def add(self, values: Tensor, sequence: Tensor) -> None:
        """Take ``(N,)`` values and the sequence of each."""
        if not len(values):
            return
        _, index = torch.unique(sequence, return_inverse=True)
        size = int(index.max()) + 1
        s = torch.zeros(size, dtype=torch.float64).index_add_(0, index, values.double())
        n = torch.bincount(index, minlength=size).double()
        self.clusters += size
        self._sums += torch.stack([s.sum(), n.sum(), (s * s).sum(), (s * n).sum(), (n * n).sum()])

    @property
    def count(self) -> int:
        """Rows seen."""
        return int(self._sums[1])

    @property
    def mean(self) -> float:
        """NaN without rows."""
        return float(self._sums[0] / self._sums[1]) if self.count else math.nan

    @property
    def error(self) -> float:
        """NaN with fewer than two sequences: then the error is unknown, not zero."""
        if self.clusters < 2:
            return math.nan
        _, n, ss, sn, nn = self._sums.tolist()
        spread = max(0.0, ss - 2 * self.mean * sn + self.mean**2 * nn)
        return math.sqrt(self.clusters / (self.clusters - 1) * spread) / float(n)
