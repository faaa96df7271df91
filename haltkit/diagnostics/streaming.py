"""Statistics that grow with the number of steps, never with the number of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.numbers import rounded
from haltkit.diagnostics.results import Curve, Spread

__all__ = ["LogHistogram", "Median", "Moments", "Series"]


class Moments:
    """Mean and standard deviation of each of ``S`` quantities, over samples that come in portions.

    What is not finite is not counted (a signal that is not defined, a step that a row did not take).
    """

    def __init__(self) -> None:
        self.count = self.mean = self._m2 = torch.zeros(0, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take ``(S, N)``: N samples of each quantity.

        Raises:
            DiagnosticError: another ``S`` than before, as from a recording made at another depth.
        """
        values = values.detach().double()
        values = values.masked_fill(~values.isfinite(), torch.nan)
        if not self.count.numel():
            self.count = self.mean = self._m2 = torch.zeros(len(values), dtype=torch.float64)
        if len(values) != len(self.count):
            raise DiagnosticError(
                f"a recording of {len(values)} steps cannot be added to statistics over {len(self.count)}: record all "
                "at one depth"
            )
        count = values.isfinite().sum(1)
        mean = values.nanmean(1).nan_to_num()
        m2 = (values - mean[:, None]).square().nansum(1)
        total = self.count + count
        share = count / total.clamp_min(1)
        delta = mean - self.mean
        # Chan et al.: merging two samples' moments, without the cancellation of sums of squares.
        self.mean = torch.where(count > 0, self.mean + delta * share, self.mean)
        self._m2 = self._m2 + m2 + delta.square() * self.count * share
        self.count = total

    def means(self) -> Tensor:
        """``(S,)``; NaN where nothing was counted."""
        return torch.where(self.count > 0, self.mean, torch.nan)

    def deviations(self) -> Tensor:
        """Standard deviation of the samples (over N), ``(S,)``."""
        return torch.where(self.count > 0, (self._m2 / self.count.clamp_min(1)).sqrt(), torch.nan)

    def spread(self) -> Spread:
        """Of the first quantity alone, for JSON."""
        return Spread(rounded(self.means()[0]), rounded(self.deviations()[0]), int(self.count[0]))


class Series:
    """A signal over loop steps: mean and spread over tokens, and the standard error of the mean over windows."""

    def __init__(self) -> None:
        self._tokens, self._windows = Moments(), Moments()

    def add(self, values: Tensor) -> None:
        """Take one window's ``(K, ...)``."""
        flat = values.detach().double().flatten(1)
        self._tokens.add(flat)
        flat = flat.masked_fill(~flat.isfinite(), torch.nan)
        self._windows.add(flat.nanmean(1, keepdim=True))

    def means(self) -> Tensor:
        return self._tokens.means()

    def summary(self, digits: int = 5) -> Curve:
        """Mean, spread over tokens, and the standard error of the mean, clustered by window."""
        windows = self._windows.count
        # Below two windows the error is unknown, not zero.
        se = torch.where(windows > 1, self._windows.deviations() / (windows - 1).clamp_min(1).sqrt(), torch.nan)
        found = (self.means(), self._tokens.deviations(), se)
        return Curve(*(tuple(rounded(v, digits) for v in values) for values in found))


class LogHistogram:
    """Quantiles of positive numbers to about one percent, in a fixed number of bins: 100 a decade."""

    LOW, HIGH, BINS = -12, 12, 2400

    def __init__(self) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Take samples of any shape; what is not finite is not counted, zero counts as the smallest."""
        flat = values.detach().double().flatten()
        flat = flat[flat.isfinite()].clamp_min(10.0**self.LOW)
        width = (self.HIGH - self.LOW) / self.BINS
        index = ((flat.log10() - self.LOW) / width).long().clamp(0, self.BINS - 1)
        self.counts += torch.bincount(index, minlength=self.BINS)

    def quantile(self, q: float) -> float:
        """The middle of the bin that contains it; NaN without samples."""
        total = int(self.counts.sum())
        if not total:
            return math.nan
        bin_ = int(torch.searchsorted(self.counts.cumsum(0), max(1, math.ceil(q * total))))
        return float(10 ** (self.LOW + (bin_ + 0.5) * (self.HIGH - self.LOW) / self.BINS))


class Median:
    """The median of positive numbers: exact while there are few, to a percent once there are more than ``KEPT``."""

    KEPT = 2**16

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._histogram = LogHistogram()
        self._count = 0

    def add(self, values: Tensor) -> None:
        """Take samples of any shape; what is not finite is not counted."""
        flat = values.detach().double().flatten()
        flat = flat[flat.isfinite()]
        self._count += len(flat)
        self._histogram.add(flat)
        self._kept = [*self._kept, flat] if self._count <= self.KEPT else []

    def value(self) -> float:
        """The lower of the two where the middle lies between two samples; NaN without samples."""
        if self._kept and self._count:
            return float(torch.cat(self._kept).median())
        return float(f"{self._histogram.quantile(0.5):.3g}")
