"""Stages of inference: how a profile over the layers of a loop compares with that of a feed-forward model.

[M] (arXiv 2604.11791) lays curves over each other; a number and a control are added here: the correlation, and what
it comes to when the feed-forward model's layers are shuffled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.numbers import Numbers, numbers, rounded
from haltkit.diagnostics.results import RegionAttention, Stage

__all__ = ["StageMatch", "match_stages", "profile_correlation", "resample", "stage_numbers"]


def resample(profile: Sequence[float], points: int) -> list[float]:
    """A profile over layers as ``points`` values over relative depth, linear in between.

    A layer stands for the middle of its share of the depth, so that profiles of 4 and of 12 layers line up.
    """
    if not profile or points < 1:
        raise DiagnosticError("a profile needs at least one layer and one point")
    at = (np.arange(points) + 0.5) / points
    layers = (np.arange(len(profile)) + 0.5) / len(profile)
    return [float(v) for v in np.interp(at, layers, np.asarray(profile, dtype=float))]


def profile_correlation(profile: Sequence[float], control: Sequence[float]) -> float:
    """Pearson correlation over relative depth, at the finer profile's layers; NaN where one of them is flat."""
    points = max(len(profile), len(control))
    a, b = np.array(resample(profile, points)), np.array(resample(control, points))
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size > 0 else math.nan


@dataclass(frozen=True)
class StageMatch:
    """How well one pass of a loop repeats a feed-forward profile.

    Attributes:
        correlation: with the control's profile.
        shuffled_mean, shuffled_high: mean and 95% quantile of the correlation with its layers in random order.
    """

    correlation: float
    shuffled_mean: float
    shuffled_high: float

    @property
    def beats_chance(self) -> bool:
        return self.correlation > self.shuffled_high


def match_stages(
    profile: Sequence[float], control: Sequence[float], *, permutations: int = 500, seed: int = 0
) -> StageMatch:
    """Correlate a profile over a loop's layers with a control's, and with shuffled controls.

    Raises:
        DiagnosticError: fewer than three layers in either: two points always lie on a line.
    """
    if len(profile) < 3 or len(control) < 3:
        raise DiagnosticError(
            f"profiles of {len(profile)} and {len(control)} layers cannot be correlated: at least three are needed"
        )
    rng = np.random.default_rng(seed)
    shuffled = rng.permuted(np.tile(np.asarray(control, dtype=float), (permutations, 1)), axis=1)
    points = max(len(profile), len(control))
    weights = np.array([resample(row.tolist(), points) for row in np.eye(len(control))])  # resampling is linear
    a = np.array(resample(profile, points))
    a, b = a - a.mean(), shuffled @ weights
    b = b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        found = b @ a / (np.sqrt(a @ a) * np.sqrt((b * b).sum(1)))
    found = found[np.isfinite(found)]
    if not len(found):
        return StageMatch(math.nan, math.nan, math.nan)
    correlation = profile_correlation(profile, control)
    return StageMatch(correlation, float(found.mean()), float(np.quantile(found, 0.95)))


def stage_numbers(
    regions: Mapping[str, RegionAttention], control: Mapping[str, Numbers]
) -> dict[str, dict[str, tuple[Stage, ...]]]:
    """Every pass of every region of three or more layers, matched with the control in every statistic.

    Args:
        control: statistic to the control's profile over its layers.

    Returns:
        region to statistic to one match per pass.
    """
    return {
        name: {
            statistic: tuple(_stage(match_stages(numbers(row), numbers(control[statistic]))) for row in rows)
            for statistic, rows in region.profiles.items()
        }
        for name, region in regions.items()
        if len(region.layers) >= 3
    }


def _stage(match: StageMatch) -> Stage:
    return Stage(rounded(match.correlation), rounded(match.shuffled_mean), rounded(match.shuffled_high))
