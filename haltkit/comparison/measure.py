"""Measuring: every setting on the same samples, what it costs in wall-clock time and what it loses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from haltkit import signals, timing
from haltkit.comparison.rows import Row, decided_by
from haltkit.comparison.table import Comparison
from haltkit.driving import Pass
from haltkit.headroom import RegretAccount
from haltkit.loop import Outcome
from haltkit.setting import Setting
from haltkit.subject import Subject

__all__ = ["measure"]


@dataclass(frozen=True)
class _Seen:
    """The numbers of one pass on one sample: ``B`` sequences of ``T`` positions, or ``B`` numbers."""

    logits: Tensor | None  # (B, T, V)
    losses: Tensor  # (B, T) or (B,)
    steps: Mapping[str, Tensor]
    outcome: Mapping[str, Tensor]


@dataclass
class _Sums:
    """Running sums of one setting; per-sequence means are kept for the standard error."""

    losses: list[float] = field(default_factory=list)
    deltas: list[float] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    steps: dict[str, list[float]] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    regrets: dict[str, RegretAccount] = field(default_factory=dict)

    def miss(self, seen: _Seen, oracle: Mapping[str, Tensor]) -> None:
        """How far the steps of a pass are from the oracle's, where they are of the same rows."""
        for name, depths in oracle.items():
            steps = seen.steps.get(name)
            if steps is None or steps.shape[: depths.ndim] != depths.shape:
                continue
            whole = steps.flatten(depths.ndim).amax(-1) if steps.ndim > depths.ndim else steps
            self.regrets.setdefault(name, RegretAccount()).add(whole.cpu(), depths.cpu())

    def add(self, seen: _Seen, full: _Seen, full_log_p: Tensor | None) -> None:
        self.losses += _by_sequence(seen.losses)
        self.deltas += _by_sequence(seen.losses.double() - full.losses.double())
        if seen.logits is not None and full.logits is not None and full_log_p is not None:
            log_p = signals.log_probabilities(seen.logits)
            self.agreements += _by_sequence(seen.logits.argmax(-1) == full.logits.argmax(-1))
            self.kls += _by_sequence(signals.kl_divergence(full_log_p, log_p))
        for name, steps in seen.steps.items():
            self.steps.setdefault(name, []).extend(_by_sequence(steps))
        for outcome in seen.outcome.values():
            for kind in Outcome:
                if kind is not Outcome.ABSENT:
                    count = int((outcome == kind).sum())
                    self.outcomes[kind.name] = self.outcomes.get(kind.name, 0) + count


def _by_sequence(values: Tensor) -> list[float]:
    """The mean of each sequence, ``(B, ...)`` to ``B`` numbers."""
    means: list[float] = values.double().reshape(len(values), -1).mean(-1).tolist()
    return means


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


class _Measuring:
    """One comparison in progress."""

    def __init__(
        self,
        subject: Subject,
        settings: Sequence[Setting],
        depths: Sequence[Mapping[str, int]],
        oracles: Sequence[Mapping[str, Tensor]],
        tick: Callable[[], None],
    ) -> None:
        self.subject, self.settings, self.depths, self.oracles, self.tick = subject, settings, depths, oracles, tick
        self.sums = [_Sums() for _ in settings]

    def judge(self, number: int) -> tuple[list[float], int, int]:
        """Run every setting on one sample, the first being the reference.

        Returns:
            each setting's time in seconds, and the sample's items and sequences.
        """
        sample, times = self.subject.samples[number], []
        full: _Seen | None = None
        full_log_p: Tensor | None = None
        items = sequences = 0
        for setting, sums in zip(self.settings, self.sums, strict=True):
            with self.subject.using(setting) as run:
                seconds, done = self.clock(run, sample)
                times.append(seconds)
                seen = self.see(setting, done, number, is_full=full is None)
            if full is None:
                full, items, sequences = seen, seen.losses.numel(), len(seen.losses)
                full_log_p = None if seen.logits is None else signals.log_probabilities(seen.logits)
            sums.add(seen, full, full_log_p)
            if number < len(self.oracles):
                sums.miss(seen, self.oracles[number])
        return times, items, sequences

    def see(self, setting: Setting, done: Pass, number: int, is_full: bool) -> _Seen:
        losses = self.subject.losses(done.output, self.subject.samples[number])
        logits = None if self.subject.logits is None else self.subject.logits(done.output).detach()
        if logits is not None and logits.ndim < 3:
            raise ValueError(f"logits must be (B, T, V) or more, got {tuple(logits.shape)}")
        steps = done.steps
        if not steps:  # nothing was counted: the model was told its depth, or ran to its own end
            known = self.depths[number] if is_full and self.depths else setting.depth and setting.depth.steps
            steps = {name: torch.full_like(losses, taken) for name, taken in (known or {}).items()}
        return _Seen(logits, losses, steps, done.outcome)

    def clock(self, run: Callable[[Any], Pass], sample: Any) -> tuple[float, Pass]:
        seconds, done = timing.clock(lambda: run(sample))
        self.tick()
        return seconds, done

    def repeat(self, order: Sequence[int], timed: int) -> None:
        """Time every setting in turn on the first samples."""
        for index in order:
            with self.subject.using(self.settings[index]) as run:
                times = [self.clock(run, sample)[0] for sample in self.subject.samples[:timed]]
            self.sums[index].times.append(sum(times))


@torch.no_grad()
def measure(
    subject: Subject,
    settings: Sequence[Setting],
    *,
    depths: Sequence[Mapping[str, int]] = (),
    oracles: Sequence[Mapping[str, Tensor]] = (),
    timed: int = 1,
    repeats: int = 3,
    on_tick: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Measure every setting on the subject's samples.

    Args:
        subject: what is run.
        settings: the first is full depth, the reference for quality and speed.
        depths: the steps that each sample takes at full depth by region, where the model itself decides.
        oracles: the oracle depth of each row by region, of the first samples (see
            :func:`haltkit.comparison.possible.possible`), for each setting's regret.
        timed: time is measured on this many of the samples, the first ones, all settings in turn, ``repeats`` times;
            the first repeat is the pass that quality is measured on.
        repeats: at least 1.
        on_tick: is called with (runs done, runs in all).

    Raises:
        ValueError: no sample, no setting, or no repeat; or a loss that is not finite.
    """
    count = len(subject.samples)
    if not settings or not count or timed < 1 or repeats < 1:
        raise ValueError("a comparison needs at least one setting, one sample, one timed sample and one repeat")
    timed = min(timed, count)
    total, done = len(settings) * (count + timed * (repeats - 1)), 0

    def tick() -> None:
        nonlocal done
        done += 1
        if on_tick is not None:
            on_tick(done, total)

    measuring = _Measuring(subject, settings, depths, oracles, tick)
    judged = [measuring.judge(number) for number in range(count)]
    for index, sums in enumerate(measuring.sums):
        sums.times.append(sum(times[index] for times, _, _ in judged[:timed]))
    for order in list(timing.turns(len(settings), repeats))[1:]:
        measuring.repeat(order, timed)
    full_time = statistics.median(measuring.sums[0].times)
    timed_items = sum(items for _, items, _ in judged[:timed])
    pairs = zip(settings, measuring.sums, strict=True)
    rows = tuple(_row(setting, sums, subject.unit, full_time, timed_items) for setting, sums in pairs)
    return Comparison(
        rows,
        sum(items for _, items, _ in judged),
        sum(sequences for _, _, sequences in judged),
        timed_items,
        subject.metric,
        subject.item,
        subject.levels or Comparison.levels_for(subject.unit, rows[0].loss),
        about=dict(subject.about),
    )


def _row(setting: Setting, sums: _Sums, unit: str, full_time: float, timed_items: int) -> Row:
    repeats = tuple(1e3 * seconds / timed_items for seconds in sums.times)
    ended, decided = sum(sums.outcomes.values()), decided_by(setting)
    return Row(
        policy="fixed" if decided in ("depth", "kind") else setting.sweep or setting.label,
        spec=setting.text,
        tau=setting.tau if setting.depth is None else None,
        depth=None if setting.depth is None else dict(setting.depth.steps),
        loss=statistics.fmean(sums.losses),
        unit=unit,
        delta=statistics.fmean(sums.deltas),
        delta_se=_standard_error(sums.deltas),
        agreement=statistics.fmean(sums.agreements) if sums.agreements else None,
        agreement_se=_standard_error(sums.agreements) if sums.agreements else None,
        kl_to_full=statistics.fmean(sums.kls) if sums.kls else None,
        steps={name: statistics.fmean(values) for name, values in sums.steps.items()},
        ms=statistics.median(repeats),
        ms_spread=(min(repeats), max(repeats)),
        ms_repeats=repeats,
        speedup=full_time / statistics.median(sums.times),
        outcomes={name: count / ended for name, count in sums.outcomes.items()} if ended else {},
        decided=decided,
        causal=setting.causal,
        label=setting.label,
        regret={name: account.result() for name, account in sums.regrets.items() if account.rows},
        promise=setting.standing.promise,
        without=str(setting.standing) if setting.standing.without else "",
        setting=setting,
    )
