"""What every kind of fit shares: the split, the choice on live runs, and the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from haltkit.comparison.measure import measure
from haltkit.comparison.oracle import Oracle, Readings, readings
from haltkit.comparison.possible import Possible, possible
from haltkit.comparison.rows import Row
from haltkit.headroom import Auc
from haltkit.protocol import HaltingPolicy, Readout, has_logits
from haltkit.recording.replay import readout_of_recordings
from haltkit.recording.trajectory import RegionTrajectory
from haltkit.setting import Setting
from haltkit.subject import Subject
from haltkit.weights import Weights

__all__ = ["Fitted", "Fitting"]

Policies = Mapping[str, HaltingPolicy[Any]]
AT_ONCE = 8  # candidates that are run beside one run at full depth


@dataclass(frozen=True)
class Fitted:
    """A fitted policy for each region, and how it does on samples that it was neither fitted nor chosen on.

    Attributes:
        kind: ``probe``, ``gate`` or ``table``.
        target: what it was taught.
        chosen: the policy of each region.
        weights: of all regions; see :class:`haltkit.policies.Probe`, ``Gate`` and ``Table``.
        taus: the threshold of each region; empty for a table.
        row: what a live run measured: agreement with full depth, steps, regret.
        headroom: of the same samples, by region.
        aucs: how well each region's probe or gate tells rows that have settled (by the target, late by the lag) at the
            step nearest to the oracle's mean, plus the lag, on recordings; empty for a table.
        learned: by region, pairs of a row and a step that it was fitted on; of a table, rows.
        full_depth: steps of the recordings, and the budget.
        level: the agreement with full depth that was asked for.
        lag: steps after the target from which on it was taught that a row has settled.
        hidden: units of a probe's hidden layer, 0 without one.
    """

    kind: str
    target: Oracle
    chosen: dict[str, HaltingPolicy[Any]]
    weights: Weights
    taus: dict[str, float]
    row: Row
    headroom: dict[str, Possible]
    aucs: dict[str, Auc]
    learned: dict[str, int]
    full_depth: int
    level: float
    lag: int = 0
    hidden: int = 0

    def policies(self) -> dict[str, HaltingPolicy[Any]]:
        """The policy of each region."""
        return dict(self.chosen)


@dataclass(frozen=True)
class Fitting:
    """A subject's samples in three parts: half to learn from, a quarter to choose and a quarter to report on.

    Whole samples, so that no sequence is in two of them. Make one with :meth:`of`.
    """

    learn: Subject
    choose: Subject
    report: Subject
    steps: int
    readout: Readout
    generator: torch.Generator
    level: float

    @classmethod
    def of(cls, subject: Subject, level: float, seed: int) -> Fitting:
        """Split the samples.

        Raises:
            ValueError: too few samples, no readout or logits, or a level outside (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level} is outside (0, 1): it is a share")
        if subject.readout is None or not has_logits(subject.readout) or subject.logits is None:
            raise ValueError(f"{subject.name} has no readout or no logits: give the Subject readout= and logits=")
        count = len(subject.samples)
        if count < 4:
            raise ValueError(
                f"{count} samples: fitting needs at least 4, to learn on two, choose on one and report on one. Give "
                "more sequences (--sequences), or make smaller samples of them (--batch)"
            )
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(count, generator=generator).tolist()
        parts = order[: count // 2], order[count // 2 : 3 * count // 4], order[3 * count // 4 :]
        learn, choose, report = (replace(subject, samples=[subject.samples[i] for i in part]) for part in parts)
        steps = subject.full_depth or subject.look().full_depth
        readout = readout_of_recordings(subject.readout, subject.model)
        return cls(learn, choose, report, steps, readout, generator, level)

    @property
    def whole(self) -> bool:
        """Whether whole sequences halt."""
        return self.learn.granularity == "sequence"

    def recorded(
        self,
        subject: Subject,
        sample: Any,
        labels: Callable[[Any], Tensor | None],
        *,
        margins: bool = False,
        regions: Collection[str] | None = None,
    ) -> Iterator[tuple[str, RegionTrajectory, Readings]]:
        """One sample at full depth, region by region, and what the readout says of it in one pass.

        Args:
            subject, sample: what is recorded.
            labels: from the sample to what losses are measured with, or to None.
            margins: whether they are read.
            regions: those that are read; None: all.
        """
        for name, region in subject.record(subject.inputs(sample), self.steps).regions.items():
            if regions is None or name in regions:
                yield name, region, readings(region, self.readout, labels(sample), margins=margins)

    def try_live(self, candidates: Sequence[Policies], oracles: Sequence[Mapping[str, Tensor]]) -> Iterator[float]:
        """The quality of each candidate on the samples that choose, less one standard error, clustered by sequence.

        The quality is agreement with full depth; where whole sequences halt, the share that was not halted before all
        of their predictions were final, in any region. The standard error is there because the candidate that just
        reaches a level on some sequences falls short of it on half of all others. Candidates are run a few at a time,
        as far as the caller asks.

        Args:
            candidates: policies by region.
            oracles: the *stable* oracle's depths, sample by sample.
        """
        regions = self.choose.regions
        full, settings = Setting.of(self.steps, regions), [Setting.of(one, regions) for one in candidates]
        for first in range(0, len(settings), AT_ONCE):
            tried = [full, *settings[first : first + AT_ONCE]]
            rows = measure(self.choose, tried, oracles=oracles, repeats=1).rows[1:]
            yield from (_quality(row, self.whole) for row in rows)

    def refuse(self, quality: float, which: Literal["best", "safest"]) -> ValueError:
        """What is said where no candidate is chosen: the quality of the best, or of the safest where that ended it."""
        if not math.isfinite(quality):
            return ValueError(
                "a single sequence chooses, so that nothing is known of the error: fit on more sequences (--sequences)"
            )
        none = "no" if which == "best" else "not even the safest"
        several = "; an inner region's readout may say little about what later regions need"
        return ValueError(
            f"{none} setting reaches {self.level:g} on live runs with one standard error to spare (the {which} has "
            f"{quality:.4f} less the error): ask for less, or fit on more samples"
            f"{several if len(self.choose.regions) > 1 else ''}"
        )

    def reported(self, policies: Policies) -> tuple[Row, dict[str, Possible]]:
        """What a live run of the chosen policies measures on the samples that report, and their headroom."""
        full, setting = Setting.of(self.steps, self.report.regions), Setting.of(policies, self.report.regions)
        oracles: list[Mapping[str, Tensor]] = []
        headroom = possible(self.report, on_sample=oracles.append)
        every = len(self.report.samples)  # each is run once in any case: timing them all costs nothing
        return measure(self.report, [full, setting], oracles=oracles, timed=every, repeats=1).rows[1], headroom


def _quality(row: Row, whole: bool) -> float:
    """As :meth:`Fitting.try_live` says; minus infinity where a single sequence leaves the error unknown."""
    if whole:
        found = [(1 - missed.early, missed.early_error) for missed in row.regret.values()]
    else:
        found = [(row.agreement or 0.0, math.inf if row.agreement_se is None else row.agreement_se)]
    return min(share - (math.inf if math.isnan(error) else error) for share, error in found)
