"""What the rules of both papers share: how a claim is written down, and how its quantity is read from a diagnosis."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from haltkit.diagnostics.diagnosis import Diagnosis
from haltkit.diagnostics.judgement import NO, UNKNOWN, YES, Ruling
from haltkit.diagnostics.results import RegionGeometry, Snapshot

__all__ = [
    "ABOVE_FLOOR",
    "Answer",
    "Claim",
    "Measured",
    "by_region",
    "cannot_tell",
    "judged",
    "mean_over",
    "moving",
    "seen_snapshots",
]

# Steps under ten rounding floors are rounding, and have no direction or size of their own.
ABOVE_FLOOR = 10.0


@dataclass(frozen=True)
class Measured:
    """One number while a rule works with it: NaN where it is not defined."""

    value: float
    spread: float | None = None


@dataclass(frozen=True)
class Answer:
    """What a rule says of a diagnosis."""

    ruling: Ruling
    measured: dict[str, Measured] = field(default_factory=dict)
    untrained: dict[str, Measured] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Claim:
    """One claim: where it is made, what tests it, and by which rule."""

    name: str
    paper: str
    text: str
    quantity: str
    rule: str
    test: Callable[[Diagnosis], Answer]


def cannot_tell(reason: str) -> Answer:
    return Answer(UNKNOWN, {}, {}, reason)


def judged(
    good: Callable[[list[float]], bool],
    measured: dict[str, Measured],
    untrained: dict[str, Measured],
    reason: str = "",
) -> Answer:
    """Whether the measured numbers are good, which is asked only if they are all finite."""
    numbers = [v.value for v in measured.values()]
    if not all(math.isfinite(number) for number in numbers):
        return Answer(UNKNOWN, measured, untrained, "states stopped being finite")
    return Answer(YES if good(numbers) else NO, measured, untrained, reason)


def moving(region: RegionGeometry, first: int, last: int) -> list[int]:
    """Steps ``first .. last`` whose mean norm is above the floor, as indices into lists over k."""
    norms, floor = region.mean("step_norm"), region.floor
    if floor is None:  # reduced statistics of a snapshot: from the state's norm, in float32
        floor = region.mean("state_norm")[-1] * 2.0**-24
    return [k - 1 for k in range(first, min(last, len(norms)) + 1) if norms[k - 1] > ABOVE_FLOOR * floor]


def mean_over(region: RegionGeometry, signal: str, steps: Sequence[int]) -> Measured | None:
    """A signal's mean over some steps, with the spread over tokens at a typical one of them."""
    means = np.array(region.mean(signal))[list(steps)]
    spreads = np.array(region.std(signal) or [math.nan] * len(region.mean(signal)))[list(steps)]
    if not len(means) or not np.isfinite(means).all():
        return None
    return Measured(float(means.mean()), float(np.median(spreads)) if np.isfinite(spreads).all() else None)


def by_region(
    regions: Mapping[str, RegionGeometry], number: Callable[[RegionGeometry], Measured | None]
) -> dict[str, Measured]:
    """A number for every region that has one; NaN where states stopped being finite."""
    pairs = ((name, Measured(math.nan) if region.nonfinite else number(region)) for name, region in regions.items())
    return {name: value for name, value in pairs if value is not None}


def seen_snapshots(diagnosis: Diagnosis) -> list[Snapshot]:
    """The snapshots of a model that was trained at all, by tokens seen."""
    return [one for one in diagnosis.snapshots if one.tokens_seen]
