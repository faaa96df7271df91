"""The geometry of every region at a fixed depth, and the DLR at every boundary."""

from __future__ import annotations

import itertools

from torch import Tensor

from haltkit.diagnostics.geometry import BoundaryStatistics, RegionStatistics
from haltkit.diagnostics.results import Geometry, Snapshot
from haltkit.diagnostics.survey.windows import Tick, each_window
from haltkit.subject import Subject

__all__ = ["measure_snapshot", "survey_geometry"]


class _Gathered:
    """The geometry over the windows taken so far."""

    def __init__(self, subject: Subject, loops: int) -> None:
        self.subject, self.loops = subject, loops
        self.regions = {name: RegionStatistics() for name in subject.regions}
        self.boundaries = {pair: BoundaryStatistics() for pair in itertools.pairwise(subject.regions)}

    def add(self, window: Tensor) -> None:
        """Take one window ``(1, T)``."""
        trajectory = self.subject.record(window, self.loops)
        for name, statistics in self.regions.items():
            statistics.add(trajectory[name])
        for (a, b), boundary in self.boundaries.items():
            boundary.add(trajectory[a], trajectory[b])

    @property
    def tokens(self) -> int:
        return min(statistics.tokens for statistics in self.regions.values())

    def whole(self, partial: bool) -> Geometry:
        return Geometry(
            self.loops,
            self.tokens,
            partial,
            {name: statistics.summary() for name, statistics in self.regions.items() if statistics.tokens},
            {f"{a} -> {b}": boundary.summary() for (a, b), boundary in self.boundaries.items()},
        )

    def reduced(self, tokens_seen: int, steps: int | None) -> Snapshot:
        return Snapshot(
            tokens_seen=tokens_seen,
            steps=steps,
            loops=self.loops,
            tokens=self.tokens,
            regions={name: statistics.reduced() for name, statistics in self.regions.items()},
            dlr={f"{a} -> {b}": boundary.reduced() for (a, b), boundary in self.boundaries.items()},
        )


def survey_geometry(subject: Subject, windows: Tensor, loops: int = 32, tick: Tick | None = None) -> Geometry:
    """The geometry of every region at a fixed depth, and the DLR at every boundary.

    Ctrl-C ends it early: what was gathered is kept and marked ``partial``.

    Args:
        windows: inputs ``(N, T)``.
        loops: the depth, at least 2.
        tick: told after each window.
    """
    gathered = _Gathered(subject, loops)
    whole = each_window(windows, gathered.add, tick)
    return gathered.whole(not whole)


def measure_snapshot(
    subject: Subject, windows: Tensor, loops: int = 32, *, tokens_seen: int = 0, steps: int | None = None
) -> Snapshot:
    """The reduced geometry of a model at one time of its training.

    Args:
        windows: inputs ``(N, T)``.
        loops: the depth, at least 2.
        tokens_seen: by the model until now.
        steps: optimizer steps until now.

    Raises:
        KeyboardInterrupt: nothing is kept of a measurement that is cut short.
    """
    gathered = _Gathered(subject, loops)
    for window in windows:
        gathered.add(window[None])
    return gathered.reduced(tokens_seen, steps)
