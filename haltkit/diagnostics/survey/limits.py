"""The long run: where each region's loop ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from haltkit import signals
from haltkit.diagnostics.geometry import distances, first_below, nonfinite_rows
from haltkit.diagnostics.layers import LayerStatistics
from haltkit.diagnostics.limits import SHARE, TOLERANCE, Limit, Measure, classify_limits, limit_counts, norm_growth
from haltkit.diagnostics.results import Limits, RegionLimits
from haltkit.diagnostics.streaming import Moments, Series
from haltkit.diagnostics.survey.windows import Tick, each_window
from haltkit.recording.trajectory import RegionTrajectory
from haltkit.subject import Subject

__all__ = ["DEEP_LOOPS", "SMALL_STEP", "survey_limits"]

# [M]: the state after 128 steps stands for the fixed point.
DEEP_LOOPS = 128
# A step of under a hundredth of the state is small; whether the state is near its limit then is another question.
SMALL_STEP = 0.01


class _Limits:
    """The long run of one region, over windows."""

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = layers
        self.distance, self.relative = Series(), Series()
        self.counts: dict[Measure, Counter[str]] = {"cosine": Counter(), "distance": Counter()}
        self.layer_counts: dict[str, Counter[str]] = {path: Counter() for path in layers}
        self.periods: Counter[int] = Counter()
        self.inside = LayerStatistics()
        self.small, self.settled, self.growth = Moments(), Moments(), Moments()
        self.nonfinite = 0

    def add(self, region: RegionTrajectory, layers: Mapping[str, list[Tensor]]) -> None:
        states = region._consecutive_states()[1:]
        found = distances(region)
        sizes = signals.norm(region.last)
        self.nonfinite += nonfinite_rows(region)
        self.distance.add(found)
        self.relative.add(found / sizes)
        self.growth.add(norm_growth(states).reshape(1, -1))
        self.settled.add(first_below(found / sizes, TOLERANCE).reshape(1, -1))
        for measure, counter in self.counts.items():
            kind, periods = classify_limits(states, measure=measure)
            counter.update(limit_counts(kind))
            if measure == "cosine":
                self.periods.update(periods[kind == Limit.ORBIT].tolist())
        for path, kept in layers.items():
            self.layer_counts[path].update(limit_counts(classify_limits(torch.stack(kept))[0]))
        self.small.add(_distance_at_small_step(region, found).reshape(1, -1))
        if layers:
            self.inside.add(layers)

    def summary(self) -> RegionLimits:
        inside = self.inside.summary()
        return RegionLimits(
            curves={"distance": self.distance.summary(), "relative_distance": self.relative.summary()},
            nonfinite=self.nonfinite,
            limits={measure: dict(counter) for measure, counter in self.counts.items()},
            periods={str(period): count for period, count in sorted(self.periods.items())},
            settled_at=self.settled.spread(),
            norm_growth=self.growth.spread(),
            distance_over_small_step=self.small.spread(),
            layer_limits={path: dict(counter) for path, counter in self.layer_counts.items()},
            layers=inside.layers,
            least_cosine=inside.least_cosine,
            distinct=inside.distinct,
        )


def _distance_at_small_step(region: RegionTrajectory, found: Tensor) -> Tensor:
    """``||x_k - x*|| / ||d_k||`` at each row's first small step; NaN where no step is small. ``(...)``."""
    steps, sizes = region.step_norms(), region.state_norms()
    small = steps < SMALL_STEP * sizes
    first = small.int().argmax(0, keepdim=True)
    ratio = (found / steps).gather(0, first)[0]
    return torch.where(small.any(0), ratio, torch.nan)


def survey_limits(subject: Subject, windows: Tensor, loops: int = DEEP_LOOPS, tick: Tick | None = None) -> Limits:
    """Where each region's loop ends: distance to x*, limit types, and the same for each layer inside.

    States of one window are in memory at a time. Ctrl-C ends it early: what was gathered is kept, marked ``partial``.

    Args:
        windows: inputs ``(N, T)``.
        loops: the depth, at least 16; the last state stands for x*.
        tick: told after each window.
    """
    gathered = {name: _Limits(subject.layer_paths(name)) for name in subject.regions}
    tokens = 0

    def use(window: Tensor) -> None:
        nonlocal tokens
        trajectory, layers = subject.with_layers(window, loops)
        for name, one in gathered.items():
            one.add(trajectory[name], {path: layers[path] for path in one.layers})
        tokens += window.numel()

    whole = each_window(windows, use, tick)
    regions = {name: one.summary() for name, one in gathered.items()} if tokens else {}
    return Limits(loops, tokens, not whole, TOLERANCE, SHARE, SMALL_STEP, regions)
