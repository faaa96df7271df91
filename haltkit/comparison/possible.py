"""What halting could save on a subject at best, and how much of it signals can see: one recorded pass per sample."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from haltkit import signals
from haltkit.comparison.oracle import EPSILON, Oracle, Readings, mean_of_asked, readings
from haltkit.headroom import Auc, AucAccount, Headroom, HeadroomAccount, ProbeAccount, ThresholdAccount, Thresholds
from haltkit.protocol import has_logits
from haltkit.recording.replay import readout_of_recordings
from haltkit.recording.trajectory import RegionTrajectory, TrajectoryError
from haltkit.subject import Subject

__all__ = ["Possible", "possible", "possible_if_known"]

# A rule that compares two steps halts one step after a row has settled; with patience 2 two steps after.
LAG, LATEST = 1, 2
# Below this gain, or this area under the curve, a policy does not pay for its overhead.
LEAST_GAIN, LEAST_AUC = 1.1, 0.75
STABLE = Oracle()
SIGNALS, PROBE = ("step norm", "margin"), "probe on the state"


@dataclass(frozen=True)
class Possible:
    """What was found in one region.

    Attributes:
        headroom: of one definition of the oracle, by the readout of this region's states.
        aucs: per signal, how well it tells at steps 1 to K which rows have settled.
        inner: whether other regions come after it, so that its readout's predictions are not the model's.
        live: agreement with full depth of the whole model, run with every row leaving 0, 1, ... :data:`LATEST` steps
            after its oracle depth in every region; empty: not known.
        thresholds: per signal, what a rule that halts below a threshold on it would have taken; empty where no step
            can be said to lose nothing (the oracle ``best``).
    """

    headroom: Headroom
    aucs: dict[str, tuple[Auc, ...]]
    inner: bool = False
    live: tuple[float, ...] = ()
    thresholds: dict[str, Thresholds] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The step nearest to the oracle's mean depth, at which predictability is judged."""
        return round(self.headroom.mean_depth)

    def best_signal(self) -> tuple[str, Auc] | None:
        """The signal that tells most at :attr:`step`; None where all rows have settled by then, or none has."""
        known = {name: areas[self.step - 1] for name, areas in self.aucs.items()}
        known = {name: area for name, area in known.items() if not math.isnan(area.value)}
        return max(known.items(), key=lambda item: item[1].value) if known else None

    def conclusion(self, level: float) -> str:
        """Whether halting can pay here, in one sentence; ``level`` is the share of rows that must lose nothing.

        Settling must be spread out, some signal must tell it, and a threshold on one must take fewer steps than the
        best fixed depth, both picked with hindsight. A probe that tells it well may do what no threshold can.
        """
        depth, gain, best = self.headroom.fixed_depth(level), self.headroom.ceiling(level, LAG), self.best_signal()
        use = f"its readout needs a fixed depth of {depth}" if self.inner else f"use a fixed depth of {depth}"
        if gain < LEAST_GAIN:
            return f"halting cannot pay here because rows settle too close to step {depth}, or too evenly; {use}"
        if best is not None and best[1].value < LEAST_AUC:
            return f"halting cannot pay here because no signal tells which rows have settled; {use}"
        if self.live and max(self.live) < level:
            return (
                f"halting cannot pay by this readout: where the model is run with it, rows that leave {LATEST} steps "
                f"after the oracle still agree with full depth on {max(self.live):.1%} only; {use}"
            )
        can = f"halting can pay: up to {gain:.2f}x as fast as a fixed depth of {depth}, if every row's settling is seen"
        if not self.thresholds:
            return can
        steps = {name: one.least_steps(level) for name, one in self.thresholds.items()}
        fewest, tried = min(steps.values()), ", ".join(f"{one:.1f} steps on the {name}" for name, one in steps.items())
        learned = self.aucs[PROBE][self.step - 1].value if PROBE in self.aucs else math.nan
        if depth / fewest < LEAST_GAIN and not learned >= LEAST_AUC:
            return (
                "halting cannot pay here because signals tell too late that a row has settled: the best threshold "
                f"takes {tried}; {use}"
            )
        return f"{can}; the best threshold takes {tried}: {depth / fewest:.2f}x, less what deciding costs"

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file; an area that is not defined is null."""
        areas = {
            name: [[_plain(area.value), _plain(area.error)] for area in known] for name, known in self.aucs.items()
        }
        tried = {name: dataclasses.asdict(one) for name, one in self.thresholds.items()}
        beside = {"inner": self.inner, "live": list(self.live), "thresholds": tried}
        return {**dataclasses.asdict(self.headroom), "auc": areas, **beside}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Possible:
        """What :meth:`to_json` gave.

        Raises:
            ValueError: other fields.
        """
        known = {f.name: values[f.name] for f in dataclasses.fields(Headroom) if f.name in values}
        aucs = {name: tuple(Auc(*map(_number, area)) for area in found) for name, found in values["auc"].items()}
        live = tuple(map(float, values.get("live", ())))  # files of before it was measured have none
        tried = {name: _thresholds(one) for name, one in values.get("thresholds", {}).items()}
        return cls(Headroom.from_json(json.dumps(known)), aucs, bool(values.get("inner", False)), live, tried)


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _thresholds(values: Mapping[str, Any]) -> Thresholds:
    taus, steps, quality = (tuple(map(float, values[name])) for name in ("taus", "steps", "quality"))
    return Thresholds(taus, steps, quality, int(values["full_depth"]))


@torch.no_grad()
def possible(
    subject: Subject,
    oracle: Oracle = STABLE,
    *,
    enough: int | None = None,
    probe: bool = False,
    on_sample: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> dict[str, Possible]:
    """Record samples once at full depth and find, by region, what halting could save.

    Where a subject halts whole sequences, a sequence has settled when all of its positions have.

    Args:
        subject: with samples and a readout.
        oracle: its definition; an epsilon that is not given is 0.01 nats. All but ``stable`` need the subject's labels:
            rows without one are left out, losses are cross-entropies of the readout in nats, and a whole sequence's is
            the mean over its rows.
        enough: no further sample is recorded once so many rows of a region were; None: all samples are.
        probe: whether a logistic regression on the state, one per step, is judged beside the signals: fitted on half of
            the first sequences, judged on the others.
        on_sample: told, sample by sample, of the oracle depth of each row by region, ``(rows...)``; 0: it has none.

    Raises:
        TrajectoryError: the first dimension of a described loop's state is not the batch.
        ValueError: the subject has no samples, no looped region, no readout, or no labels where the oracle needs them;
            or no row has an oracle depth.
    """
    if subject.readout is None or not has_logits(subject.readout):
        raise ValueError(f"{subject.name} has no readout from its state: give the Subject a readout=")
    labels = oracle.labels(subject)
    epsilon = EPSILON if oracle.epsilon is None else oracle.epsilon
    readout = readout_of_recordings(subject.readout, subject.model)
    steps = subject.full_depth or subject.look().full_depth
    whole = subject.granularity == "sequence"
    found = {
        name: HeadroomAccount(steps, oracle.definition, region=name, epsilon=epsilon, item_dims=int(whole))
        for name in subject.regions
    }
    seen = {name: AucAccount(SIGNALS, steps) for name in subject.regions}
    tried = {name: ThresholdAccount(SIGNALS, steps) for name in subject.regions}
    probes = {name: ProbeAccount() for name in subject.regions if probe}
    rows = dict.fromkeys(subject.regions, 0)
    for number, sample in enumerate(subject.samples):
        depths: dict[str, Tensor] = {}
        recorded = subject.record(subject.inputs(sample), steps).regions
        if number == 0:
            _check_batch(subject, sample, recorded)
        for name, region in recorded.items():
            read = readings(region, readout, labels(sample), margins=True)
            depths[name], good = _added(found[name], read, whole)
            scores = _scores(region, read, whole)
            seen[name].add(scores, depths[name])
            if oracle.definition != "best":
                tried[name].add(scores, good, depths[name] > 0)
            if probe:
                probes[name].add(_states(region, whole), depths[name])
            rows[name] += int((depths[name] > 0).sum())
        if on_sample is not None:
            on_sample(depths)
        if enough is not None and rows and min(rows.values()) >= enough:
            break
    if not found or not subject.samples:
        raise ValueError(f"{subject.name} has no samples, or no looped region: there is nothing to halt")
    areas = {name: seen[name].result() | ({PROBE: probes[name].result()} if probe else {}) for name in found}
    last = subject.regions[-1]
    return {
        name: Possible(account.result(), areas[name], name != last, thresholds=tried[name].result())
        for name, account in found.items()
    }


def _check_batch(subject: Subject, sample: Any, recorded: Mapping[str, RegionTrajectory]) -> None:
    """Whether rows are counted by sequence: the first dimension of a state that a user described is the batch.

    Logits are ``(B, T, V)``, so they say how many sequences there are.

    Raises:
        TrajectoryError: it is another one, and sequences and errors of them would be counted wrongly.
    """
    if subject.logits is None or not subject.described:
        return
    depth = max(region.max_steps for region in recorded.values())
    batch = len(subject.logits(subject.run(sample, depth).output))
    for name, region in recorded.items():
        rows = tuple(region.present.shape)
        if rows and rows[0] != batch:
            raise TrajectoryError(
                f"the states of region {name!r} have rows {rows}, and the logits a batch of {batch}: the first "
                "dimension of a state must be the batch, so give the Loop select=, put= and initial= that move it there"
            )


def possible_if_known(
    subject: Subject,
    *,
    enough: int | None = None,
    on_sample: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> tuple[dict[str, Possible], str]:
    """What :func:`possible` finds for *stable*; nothing, and why, of a subject for which it cannot be known."""
    if not has_logits(subject.readout):
        return {}, "the subject has no readout from its state"
    try:
        return possible(subject, enough=enough, on_sample=on_sample), ""
    except TrajectoryError as error:  # a model that cannot be told to go to a depth
        return {}, str(error)


def _added(account: HeadroomAccount, read: Readings, whole: bool) -> tuple[Tensor, Tensor]:
    """Add what a recording says.

    Returns:
        the oracle depth of each row, or whole sequence, 0 where it has none; and whether it loses nothing at each step.
    """
    predictions, losses, labels, asked = (
        None if part is None else part.cpu() for part in (read.predictions, read.losses, read.labels, read.asked)
    )
    assert predictions is not None
    assert asked is not None
    if whole:  # what is asked nothing, or is padding, is the same at every step
        predictions = predictions.masked_fill(~asked, 0)
        labels = None if labels is None else labels.masked_fill(~asked, 0)
        losses = None if losses is None else mean_of_asked(losses, asked)
        asked = asked.any(-1)
    depths = account.add(predictions=predictions, losses=losses, labels=labels, present=asked)
    _, good = account.judge(predictions, losses, labels)
    return depths.masked_fill(~asked, 0), good


def _scores(region: RegionTrajectory, read: Readings, whole: bool) -> dict[str, Tensor]:
    """Scores that are small where a row has settled, each ``(K, rows...)``; of a sequence that of its last row."""
    assert read.margins is not None
    sizes = signals.normalized(region.step_norms(), region.state_norms())
    found = {"step norm": sizes.cpu(), "margin": -read.margins.cpu()}
    if not whole:
        return found
    present = region.present.cpu()
    return {key: value.masked_fill(~present, -math.inf).amax(-1) for key, value in found.items()}


def _states(region: RegionTrajectory, whole: bool) -> Tensor:
    """The state after each step, ``(K, rows..., D)``; of a whole sequence the mean over its rows."""
    assert region.states is not None  # Subject.record keeps states
    states = signals.measured(region.states[1:])
    if not whole:
        return states
    present = region.present.unsqueeze(-1)
    return states.masked_fill(~present, 0).sum(-2) / present.sum(-2).clamp_min(1)
