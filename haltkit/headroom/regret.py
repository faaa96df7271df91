"""Regret: by how much a policy misses the oracle, in two numbers that are never added up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from haltkit.headroom.account import Headroom
from haltkit.headroom.clusters import ClusteredMean, sequence_of_rows

__all__ = ["Regret", "RegretAccount", "realised"]


@dataclass(frozen=True)
class Regret:
    """Steps too many cost time, steps too few cost quality: no exchange rate is assumed.

    Attributes:
        rows: how many have an oracle depth.
        steps: the policy's mean steps on these rows.
        wasted: mean over these rows of ``max(0, steps - oracle depth)``.
        early: share of these rows that halted before their oracle depth.
        wasted_error, early_error: standard errors, clustered by sequence; NaN with fewer than two sequences.
    """

    rows: int
    steps: float
    wasted: float
    early: float
    wasted_error: float
    early_error: float


class RegretAccount:
    """Adds up regret over text that comes in portions, each sequence whole."""

    def __init__(self) -> None:
        self._steps, self._wasted, self._early = ClusteredMean(), ClusteredMean(), ClusteredMean()

    def add(self, steps: Tensor, depths: Tensor, sequence: Tensor | None = None) -> None:
        """Take a policy's steps and the oracle's depths, both ``(rows...)``; rows of depth 0 have no oracle.

        Raises:
            ValueError: shapes that differ.
        """
        if steps.shape != depths.shape:
            raise ValueError(f"steps {tuple(steps.shape)} and oracle depths {tuple(depths.shape)} of other rows")
        index = sequence_of_rows(depths.shape, sequence).cpu()
        known = depths.flatten().cpu() > 0
        gap = (steps - depths).flatten().cpu()[known]
        self._steps.add(steps.flatten().cpu()[known], index[known])
        self._wasted.add(gap.clamp_min(0), index[known])
        self._early.add((gap < 0).to(torch.float64), index[known])

    @property
    def rows(self) -> int:
        """Rows with an oracle depth seen so far."""
        return self._wasted.count

    def result(self) -> Regret:
        """What was found so far.

        Raises:
            ValueError: no rows.
        """
        if not self._wasted.count:
            raise ValueError("no row has an oracle depth to measure regret against")
        wasted, early = self._wasted, self._early
        return Regret(wasted.count, self._steps.mean, wasted.mean, early.mean, wasted.error, early.error)


def realised(mean_steps: float, headroom: Headroom, level: float = 0.99) -> float | None:
    """The share of the headroom that a policy realises: ``(fixed - steps) / (fixed - oracle)``; None without headroom.

    1 is the oracle, 0 the best fixed depth, below 0 the policy is worse than a fixed depth. Only meaningful for a
    policy that reaches ``level``.
    """
    fixed = headroom.fixed_depth(level)
    room = fixed - headroom.mean_depth
    return (fixed - mean_steps) / room if room > 0 else None
