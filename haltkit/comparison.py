"""Compare halting policies at equal quality: what each setting costs, in wall-clock time, and what it loses.

Signals have different scales, so policies at equal thresholds say nothing about each other. What can be compared
is the frontier: the fastest setting of each policy at a given quality, against the best *fixed* depth of that
quality, which is the baseline to beat.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from torch import Tensor

from haltkit import signals
from haltkit.clock import settled
from haltkit.loop import Outcome

__all__ = [
    "AGREEMENT_LEVELS",
    "CE_LEVELS",
    "PAPER_TAUS",
    "Comparison",
    "Finding",
    "Observation",
    "Row",
    "Setting",
    "compare",
    "depth_label",
    "findings",
    "observed_taus",
    "sweep_spread",
    "within",
]

# The thresholds of arXiv 2509.23314, Figure 4.
PAPER_TAUS = (1e-5, 1e-4, 1e-3, 1e-2)
CE_LEVELS = (0.001, 0.01, 0.05)
AGREEMENT_LEVELS = (0.95, 0.99)
# Steps at which thresholds picked from observed scores should stop a typical row.
TARGET_STEPS = (3, 4, 6, 10)

W = TypeVar("W")
Out = TypeVar("Out")
Judgement = Literal["yes", "no", "cannot tell"]


@dataclass(frozen=True)
class Setting:
    """One line of a comparison: a policy at one threshold, or a fixed depth.

    ``policy`` names the sweep that it belongs to; ``loops`` is the fixed depth, the same in every region or by region;
    ``causal`` says that no row's depth depends on later rows.
    """

    policy: str
    spec: str
    tau: float | None = None
    loops: int | Mapping[str, int] | None = None
    causal: bool = True


class Observation(NamedTuple):
    """What one run on one window came to; ``B`` sequences of ``T`` scored positions.

    ``steps`` and ``outcome`` are by region, ``(B, T)`` each; empty for a fixed depth. Without ``logits`` there is no
    perplexity, agreement or KL. Of another metric than cross-entropy ``losses`` may also be ``(B,)``; less is better.
    """

    logits: Tensor | None  # (B, T, V)
    losses: Tensor  # (B, T), nats
    steps: dict[str, Tensor]
    outcome: dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """What was measured for one setting.

    Attributes:
        ce, ppl: cross-entropy in nats a token, and its exponential; or the mean of another metric, and None.
        delta_ce, delta_ce_se: difference to full depth on the same tokens, and its standard error, paired and
            clustered by sequence.
        agreement, agreement_se: share of positions whose top token equals full depth's.
        kl_to_full: mean ``KL(full || this)`` in nats. None, like agreement, where there are no logits.
        steps: mean body applications by region.
        ms_per_token: median wall-clock time of a forward pass, a token.
        ms_spread: least and greatest of the repeats.
        ms_repeats: every repeat, in order; repeat ``i`` of all settings ran side by side.
        speedup: full depth's median time over this one's.
        outcomes: share of (region, token) loops that ended so; empty for a fixed depth, which nothing ends.
        causal: no row's depth depends on later rows.
    """

    policy: str
    spec: str
    tau: float | None
    ce: float
    ppl: float | None
    delta_ce: float
    delta_ce_se: float
    agreement: float | None
    agreement_se: float | None
    kl_to_full: float | None
    steps: dict[str, float]
    ms_per_token: float
    ms_spread: tuple[float, float]
    ms_repeats: tuple[float, ...]
    speedup: float
    outcomes: dict[str, float]
    causal: bool = True


def depth_label(spec: str) -> str:
    """``8`` for ``fixed:steps=8``; ``3 6 3`` for a spec that gives each region its own fixed depth."""
    return " ".join(re.findall(r"fixed:steps=(\d+)", spec)) or spec


@dataclass(frozen=True)
class Comparison:
    """All rows, full depth first, and what they were measured on: ``metric`` says what ``ce`` is, a mean over items."""

    rows: tuple[Row, ...]
    tokens: int
    sequences: int
    timed_tokens: int
    metric: str = "CE"
    item: str = "token"

    def to_dict(self, **about: Any) -> dict[str, Any]:
        """Plain values for JSON: what ``about`` says, then the rows."""
        counts = {"tokens": self.tokens, "sequences": self.sequences, "timed_tokens": self.timed_tokens}
        return {**about, **counts, "rows": [asdict(row) for row in self.rows]}


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

    def add(self, seen: Observation, full: Observation, full_log_p: Tensor | None) -> None:
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


class _Comparer(Generic[W, Out]):
    """One comparison in progress."""

    def __init__(
        self,
        run: Callable[[Setting, W], Out],
        observe: Callable[[Setting, Out, W], Observation],
        settings: Sequence[Setting],
        prepare: Callable[[Setting], AbstractContextManager[object]],
        tick: Callable[[], None],
    ) -> None:
        self.run, self.observe, self.settings, self.prepare, self.tick = run, observe, settings, prepare, tick
        self.sums = [_Sums() for _ in settings]

    def judge(self, window: W) -> tuple[list[float], int, int]:
        """Run every setting on one window, the first being the reference.

        Returns:
            each setting's time in seconds, and the window's tokens and sequences.
        """
        times = []
        full: Observation | None = None
        full_log_p: Tensor | None = None
        for setting, sums in zip(self.settings, self.sums, strict=True):
            with self.prepare(setting):
                seconds, output = self.clock(setting, window)
                times.append(seconds)
                seen = self.observe(setting, output, window)
            if full is None:
                full = seen
                full_log_p = None if seen.logits is None else signals.log_probabilities(seen.logits)
            sums.add(seen, full, full_log_p)
        assert full is not None
        return times, full.losses.numel(), len(full.losses)

    def clock(self, setting: Setting, window: W) -> tuple[float, Out]:
        started = settled()
        output = self.run(setting, window)
        seconds = settled() - started
        self.tick()
        return seconds, output

    def repeat(self, windows: Sequence[W], number: int) -> None:
        """Time every setting in turn, each repeat beginning at another one."""
        order = range(len(self.settings))
        shift = number * max(1, len(self.settings) // 3) % len(self.settings)
        for index in (*order[shift:], *order[:shift]):
            with self.prepare(self.settings[index]):
                self.sums[index].times.append(sum(self.clock(self.settings[index], window)[0] for window in windows))


def compare(
    run: Callable[[Setting, W], Out],
    observe: Callable[[Setting, Out, W], Observation],
    settings: Sequence[Setting],
    windows: Sequence[W],
    *,
    timed: int = 1,
    repeats: int = 3,
    prepare: Callable[[Setting], AbstractContextManager[object]] = lambda setting: nullcontext(),
    on_tick: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Measure every setting on the same windows.

    Args:
        run: one forward pass of a setting on a window; only this is timed.
        observe: what the pass came to.
        settings: the first is full depth, the reference for quality and speed.
        windows: what quality is measured on.
        timed: time is measured on so many of the windows, the first ones, all settings in turn, ``repeats`` times;
            the first repeat is the pass that quality is measured on.
        repeats: at least 1.
        prepare: what a setting's runs happen inside of, itself not timed.
        on_tick: told of (runs done, runs in all).

    Raises:
        ValueError: no window, no setting, or no repeat.
    """
    if not settings or not windows or timed < 1 or repeats < 1:
        raise ValueError("a comparison needs at least one setting, one window, one timed window and one repeat")
    timed = min(timed, len(windows))
    total, done = len(settings) * (len(windows) + timed * (repeats - 1)), 0

    def tick() -> None:
        nonlocal done
        done += 1
        if on_tick is not None:
            on_tick(done, total)

    comparer = _Comparer(run, observe, settings, prepare, tick)
    judged = [comparer.judge(window) for window in windows]
    for index, sums in enumerate(comparer.sums):
        sums.times.append(sum(times[index] for times, _, _ in judged[:timed]))
    for number in range(1, repeats):
        comparer.repeat(windows[:timed], number)
    full_time = statistics.median(comparer.sums[0].times)
    timed_tokens = sum(tokens for _, tokens, _ in judged[:timed])
    rows = tuple(_row(*pair, full_time, timed_tokens) for pair in zip(settings, comparer.sums, strict=True))
    return Comparison(rows, sum(j[1] for j in judged), sum(j[2] for j in judged), timed_tokens)


def _row(setting: Setting, sums: _Sums, full_time: float, timed_tokens: int) -> Row:
    ce = statistics.fmean(sums.losses)
    repeats = tuple(1e3 * seconds / timed_tokens for seconds in sums.times)
    loops = sum(sums.outcomes.values())
    return Row(
        policy=setting.policy,
        spec=setting.spec,
        tau=setting.tau,
        ce=ce,
        ppl=math.exp(ce) if sums.kls else None,
        delta_ce=statistics.fmean(sums.deltas),
        delta_ce_se=_standard_error(sums.deltas),
        agreement=statistics.fmean(sums.agreements) if sums.agreements else None,
        agreement_se=_standard_error(sums.agreements) if sums.agreements else None,
        kl_to_full=statistics.fmean(sums.kls) if sums.kls else None,
        steps={name: statistics.fmean(values) for name, values in sums.steps.items()},
        ms_per_token=statistics.median(repeats),
        ms_spread=(min(repeats), max(repeats)),
        ms_repeats=repeats,
        speedup=full_time / statistics.median(sums.times),
        outcomes={name: count / loops for name, count in sums.outcomes.items()} if loops else {},
        causal=setting.causal,
    )


def within(row: Row, level: float, kind: Literal["ce", "agreement"] = "ce") -> Judgement:
    """Whether a row is of this quality: only said when two standard errors clear the limit.

    ``ce``: at most ``level`` nats above full depth. ``agreement``: at least ``level``.
    """
    if row.delta_ce == 0 and row.kl_to_full in (0, None) and row.agreement in (1, None):  # identical to full depth
        return "yes"
    if kind == "ce":
        margin, se = level - row.delta_ce, row.delta_ce_se
    elif row.agreement is None or row.agreement_se is None:
        return "cannot tell"
    else:
        margin, se = row.agreement - level, row.agreement_se
    if margin >= 2 * se:
        return "yes"
    return "no" if margin < -2 * se else "cannot tell"


@dataclass(frozen=True)
class Finding:
    """One policy at one quality: its fastest setting, the fastest fixed depth, and which is faster.

    ``verdict`` is "faster" or "slower" only if all of two or more repeats agree; None where one of the two has no
    setting of this quality.
    """

    policy: str
    kind: Literal["ce", "agreement"]
    level: float
    best: Row | None
    fixed: Row | None
    verdict: Literal["faster", "slower", "no clear difference"] | None


def _fastest(rows: Iterable[Row], level: float, kind: Literal["ce", "agreement"]) -> Row | None:
    good = [row for row in rows if within(row, level, kind) == "yes"]
    return min(good, key=lambda row: row.ms_per_token, default=None)


def findings(rows: Sequence[Row], ce_levels: Sequence[float] = CE_LEVELS) -> list[Finding]:
    """For each policy and quality level, its fastest setting against the best fixed depth.

    ``ce_levels`` are in the metric's unit, nats for cross-entropy.
    """
    names = list(dict.fromkeys(row.policy for row in rows if row.policy != "fixed"))
    levels: list[tuple[Literal["ce", "agreement"], float]] = [
        *(("ce", level) for level in ce_levels),
        *(("agreement", level) for level in AGREEMENT_LEVELS if rows[0].agreement is not None),
    ]
    result = []
    for kind, level in levels:
        fixed = _fastest((row for row in rows if row.policy == "fixed"), level, kind)
        for name in names:
            best = _fastest((row for row in rows if row.policy == name), level, kind)
            verdict = None if best is None or fixed is None else _faster(best, fixed)
            result.append(Finding(name, kind, level, best, fixed, verdict))
    return result


def _faster(row: Row, other: Row) -> Literal["faster", "slower", "no clear difference"]:
    ratios = [a / b for a, b in zip(row.ms_repeats, other.ms_repeats, strict=True)]
    if len(ratios) < 2 or min(ratios) <= 1 <= max(ratios):
        return "no clear difference"
    return "faster" if ratios[0] < 1 else "slower"


def sweep_spread(rows: Iterable[Row], policy: str) -> float | None:
    """Greatest minus least cross-entropy over a policy's thresholds: how much tuning it needs."""
    ces = [row.ce for row in rows if row.policy == policy and row.tau is not None]
    return max(ces) - min(ces) if len(ces) > 1 else None


def observed_taus(scores: Tensor, patience: int = 1, targets: Sequence[int] = TARGET_STEPS) -> list[float]:
    """Thresholds at which a typical row would halt at about each target step.

    Args:
        scores: what the policy measured at full depth, ``(K, N)``: step by sample.
        patience: hits in a row that the policy asks for.
        targets: steps; those beyond ``K`` are left out.

    Returns:
        distinct positive thresholds, ascending, rounded up to two digits.
    """
    # With patience p a row halts at k once its last p scores are below tau: the largest of them is what counts,
    # and the smallest such value so far decides whether it has halted by k.
    needed = scores.unfold(0, patience, 1).amax(-1) if patience > 1 else scores
    reached = needed.cummin(0).values.nanmedian(1).values
    found = set()
    for target in targets:
        if 0 <= target - patience < len(reached):
            value = float(reached[target - patience])
            if 0 < value < math.inf:
                digit = 10 ** (math.floor(math.log10(value)) - 1)
                found.add(float(f"{math.ceil(value / digit * (1 + 1e-9)) * digit:.1e}"))
    return sorted(found)
