"""The geometry of a loop's path: how far it steps, how it turns, and how far from its end it is.

Every function works on one recording; :class:`RegionStatistics` and :class:`BoundaryStatistics` add recordings up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from haltkit import signals
from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.numbers import Numbers, rounded
from haltkit.diagnostics.results import Curve, Ratio, RegionGeometry
from haltkit.diagnostics.streaming import Median, Moments, Series
from haltkit.loop import Outcome
from haltkit.recording.trajectory import RegionTrajectory, delta_loop_ratios

__all__ = [
    "BoundaryStatistics",
    "RegionStatistics",
    "contraction_rates",
    "curvatures",
    "distances",
    "first_below",
    "nonfinite_rows",
    "turning_angles",
]

# What reduced statistics keep, of snapshots across training, and to how many digits.
REDUCED, REDUCED_DIGITS = ("step_norm", "acceleration", "cosine", "state_norm", "distance_to_last"), 4
# A step counts as motion, not rounding, above so many rounding floors.
FLOORS = 10.0


def curvatures(region: RegionTrajectory) -> Tensor:
    """Discrete curvature of the path, ``(K, ...)`` in 1 / length; NaN at k = 1 (see :func:`signals.curvature`)."""
    d = region.differences()
    found = torch.full(d.shape[:-1], torch.nan, dtype=d.dtype)
    found[1:] = signals.curvature(d[1:], d[:-1])
    return found.masked_fill(region.step_norms().isnan(), torch.nan)


def turning_angles(region: RegionTrajectory) -> Tensor:
    """The angle between successive steps in degrees, ``(K, ...)``; NaN at k = 1. Unlike curvature it has no scale."""
    return region.step_angles().arccos().rad2deg()


def distances(region: RegionTrajectory, x_star: Tensor | None = None) -> Tensor:
    """``||x_k - x*||``, ``(K, ...)``: to the state after many loops, or (None) to the recording's own last state."""
    states = region._consecutive_states()[1:]
    found = signals.norm(signals.difference(states, region.last if x_star is None else x_star))
    return found.masked_fill(region.step_norms().isnan(), torch.nan)


def contraction_rates(step_norms: Tensor, floor: Tensor | float = 0.0, first: int = 2) -> Tensor:
    """The factor by which a row's steps shrink, geometric mean over its loop: ``(K, ...)`` to ``(...)``.

    From step ``first`` (the first step out of a random state is another kind of step) to the last one before the
    steps fall under ``floor``, where they are rounding. NaN where that leaves fewer than two steps.
    """
    if len(step_norms) < first + 1:
        return torch.full(step_norms.shape[1:], torch.nan)
    norms = step_norms[first - 1 :]
    above = (norms > floor).cumprod(0).bool()  # up to the first that is not
    count = above.sum(0)
    last = norms.gather(0, (count - 1).clamp_min(0).unsqueeze(0))[0]
    rate = (last / norms[0]) ** (1 / (count - 1).clamp_min(1))
    return torch.where(count > 1, rate, torch.nan)


def first_below(values: Tensor, limit: Tensor | float) -> Tensor:
    """The first step from which a signal stays below a limit, ``(K, ...)`` to ``(...)``; ``K + 1`` if it never does.

    A step not taken (NaN) is neither below nor above: it is no reason to say that the signal rose again, nor that a
    row settled that has no value at all.
    """
    k = torch.arange(1, len(values) + 1).view(-1, *[1] * (values.ndim - 1))
    last_above = torch.where(values >= limit, k, 0).amax(0)
    lasting = (values < limit) & (k > last_above)
    return torch.where(lasting, k, len(values) + 1).amin(0)


def nonfinite_rows(region: RegionTrajectory) -> int:
    """How many rows stopped being finite: in the state handed on, or by the loop's own account."""
    broken = ~signals.finite(region.last)
    if region.outcome is not None:  # such a row hands on its last finite state
        broken |= region.outcome == Outcome.NONFINITE
    return int(broken.sum())


class RegionStatistics:
    """One region's geometry over any number of recordings; memory does not grow with them.

    A recording of statistics gives step norms, state norms, accelerations and angles; one of states gives all.
    """

    def __init__(self) -> None:
        self._series: dict[str, Series] = {}
        self._rates, self._state_norms = Moments(), Moments()
        self._mean_steps: Tensor | None = None
        self.tokens = self.nonfinite = 0
        self._dtype = torch.float32

    def add(self, region: RegionTrajectory, x_star: Tensor | None = None) -> None:
        """Take one recording.

        Args:
            x_star: the state after many more loops, ``(..., D)``, for the distance to it.

        Raises:
            DiagnosticError: a loop of one step, which has no angle; or another depth than before.
        """
        if region.max_steps < 2:
            raise DiagnosticError("a loop of one step has neither angles nor accelerations: run at least two loops")
        step_norms, state_norms = region.step_norms(), region.state_norms()
        found = {"step_norm": step_norms, "state_norm": state_norms}
        found |= {"acceleration": region.accelerations(), "cosine": region.step_angles()}
        found["turn"] = found["cosine"].arccos().rad2deg()
        self._dtype = region.last.dtype
        if region.states is not None:
            d = region.differences()
            previous = torch.cat([signals.norm(region.first)[None], state_norms[:-1]])
            found["relative_step"] = signals.normalized(step_norms, previous)
            found["normalized_acceleration"] = torch.full_like(step_norms, torch.inf)
            sizes = step_norms[1:] + step_norms[:-1]
            found["normalized_acceleration"][1:] = signals.normalized(found["acceleration"][1:], sizes)
            bend = torch.full_like(step_norms, torch.nan)
            bend[1:] = signals.curvature(d[1:], d[:-1])
            found["curvature"] = bend.masked_fill(step_norms.isnan(), torch.nan)
            found["distance_to_last"] = distances(region)
            if x_star is not None:
                found["distance_to_limit"] = distances(region, x_star)
        for name, values in found.items():
            self._series.setdefault(name, Series()).add(values)
        if region.states is not None:
            steps = d.double().nan_to_num(0.0, 0.0, 0.0).flatten(1, -2).sum(1)  # (K, D)
            self._mean_steps = steps if self._mean_steps is None else self._mean_steps + steps
        floor = FLOORS * signals.rounding_floor(state_norms[-1], self._dtype)
        self._rates.add(contraction_rates(step_norms, floor).reshape(1, -1))
        self._state_norms.add(state_norms[-1].reshape(1, -1))
        self.tokens += region.steps.numel()
        self.nonfinite += nonfinite_rows(region)

    def summary(self) -> RegionGeometry:
        """The statistics over all recordings taken so far."""
        norms = self._series["step_norm"].means()
        return RegionGeometry(
            tokens=self.tokens,
            nonfinite=self.nonfinite,
            curves={name: series.summary() for name, series in self._series.items()},
            cosine_of_means=self._cosine_of_means(),
            contraction=self._rates.spread(),
            floor=rounded(signals.rounding_floor(self._state_norms.means()[0], self._dtype)),
            floor_measured=rounded(norms[-max(2, len(norms) // 4) :].nanmedian()),
        )

    def reduced(self) -> RegionGeometry:
        """What figures across training need, in a few kilobytes."""
        curves = {name: series.summary(REDUCED_DIGITS) for name, series in self._series.items() if name in REDUCED}
        return RegionGeometry(
            curves={name: Curve(curve.mean, curve.std) for name, curve in curves.items()},
            cosine_of_means=self._cosine_of_means(REDUCED_DIGITS),
        )

    def _cosine_of_means(self, digits: int = 5) -> Numbers:
        if self._mean_steps is None:
            return ()
        cosines = signals.cosine(self._mean_steps[1:], self._mean_steps[:-1])
        return (None, *(rounded(v, digits) for v in cosines))


class BoundaryStatistics:
    """DLR at one boundary between two regions, in every convention, over any number of recordings."""

    def __init__(self) -> None:
        self._moments: dict[str, Moments] = {}
        self._medians: dict[str, Median] = {}

    def add(self, before: RegionTrajectory, after: RegionTrajectory) -> None:
        """Take the recordings of two adjacent regions in one pass."""
        for convention, ratio in delta_loop_ratios(before, after).items():
            self._moments.setdefault(convention, Moments()).add(ratio.reshape(1, -1))
            self._medians.setdefault(convention, Median()).add(ratio)

    def summary(self) -> dict[str, Ratio]:
        """By convention: mean and standard deviation over tokens, and the median."""
        return {
            name: Ratio(
                rounded(moments.means()[0]), rounded(moments.deviations()[0]), rounded(self._medians[name].value())
            )
            for name, moments in self._moments.items()
        }

    def reduced(self) -> dict[str, Ratio]:
        """By convention: mean and median."""
        return {
            name: Ratio(
                rounded(moments.means()[0], REDUCED_DIGITS),
                median=rounded(self._medians[name].value(), REDUCED_DIGITS),
            )
            for name, moments in self._moments.items()
        }
