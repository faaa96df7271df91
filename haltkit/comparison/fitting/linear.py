"""Fit ``probe`` and ``gate``: a logistic regression per region, and thresholds that hold on live runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from haltkit import signals
from haltkit.comparison.fitting.fitted import Fitted, Fitting, Policies
from haltkit.comparison.fitting.hidden import fit_hidden
from haltkit.comparison.oracle import Oracle, gain_cut, taught
from haltkit.headroom import Auc, auc, fit_logistic
from haltkit.headroom.clusters import sequence_of_rows
from haltkit.headroom.oracles import agrees, from_then_on
from haltkit.policies import Gate, Probe
from haltkit.policies.probe import FEATURES, features
from haltkit.protocol import Granularity, HaltingPolicy, LoopStep, Verdict, judge
from haltkit.recording.replay import replay, scores
from haltkit.subject import Subject
from haltkit.weights import Weights
from haltkit.wrappers import Pooled

__all__ = ["fit_gate", "fit_probe"]

# A row is learned from until so many steps after it, and all that halt with it, have settled: a policy has halted it.
AFTER = 3
# Agreement on recordings of the candidates for the thresholds, from safe to eager.
SHARES = (0.9999, 0.9995, 0.998, 0.995, 0.99, 0.97, 0.9)
RIDGE = 1e-5  # against many pairs
BETWEEN = 3  # steps from one of them to the next
FINER = 6  # steps from the last candidate that holds to the next one
MOST_PAIRS = 200_000  # of a row and a step that are learned from in one region, drawn from all


def fit_probe(
    subject: Subject,
    *,
    level: float = 0.99,
    margin: bool = True,
    target: Oracle | None = None,
    lag: int = 0,
    hidden: int = 0,
    seed: int = 0,
) -> Fitted:
    """Fit a probe by region whose target is, unless said otherwise, "the top prediction will not change any more".

    Half of the samples are learned from, a quarter chooses the thresholds, a quarter is reported on; whole samples, so
    that no sequence is in two of them. Learning uses recordings at full depth. Thresholds are chosen and reported on
    live runs, because in a recording rows go on seeing the later states of rows that would have halted. Where sequences
    or batches halt as one, so does the probe, by the largest score of their rows.

    Args:
        subject: with at least four samples, a readout and logits.
        level: the share of positions whose prediction must be full depth's where the thresholds are chosen; where whole
            sequences halt, the share of sequences that must not halt before all of their predictions are final.
            It is reached with one standard error to spare, or else a choice that just reaches it would fall short on
            half of all other sequences. Candidates go from safe to eager, a threshold per region each; the last before
            the first that falls short is chosen. The level means the same whatever the target.
        margin: whether the probe sees the gap between the two most probable classes, which needs the readout at every
            step.
        target: what it is taught; None: ``stable``.
        lag: it is taught that a row has settled so many steps after the target says so. Where rows read each other, 1
            is worth trying: what a row shows the others at the step at which it halts was computed from the state
            before, so that a row halted at the very step at which it settles goes on showing what had not settled.
        hidden: units of a hidden layer beside the logistic regression; 0: none.
        seed: of the split, of the pairs that are drawn where there are more than enough, and of a hidden layer.

    Raises:
        ValueError: a lag or hidden below 0, or a lag of full depth; too few samples, no readout or logits, labels asked
            for that the data lack, a level outside (0, 1), a region in which everything has settled at the first step,
            so that nothing can be learned, or no threshold that reaches the level.
    """
    kind = _Kind("probe", FEATURES if margin else FEATURES[:-1], FEATURES, Probe, lag, hidden)
    return _fit(subject, kind, target or Oracle(), level, seed)


def fit_gate(
    subject: Subject, *, level: float = 0.99, target: Oracle | None = None, lag: int = 0, seed: int = 0
) -> Fitted:
    """Fit a linear exit head by region on the frozen model: a gate's second stage.

    The target is, unless said otherwise, the measured marginal gain: "the loss that further steps would still save is
    small" (:class:`haltkit.comparison.oracle.Oracle`, ``eps-loss``). Ouro's second stage (arXiv 2510.25741) teaches
    its gate by the loss that the next step saves; here it is what all further steps save, because a step may gain
    nothing and the one after it much.

    Args:
        subject, level, target, lag, seed: as for :func:`fit_probe`.

    Raises:
        ValueError: as :func:`fit_probe`.
    """

    def gate(tau: float, weights: Weights) -> Gate:
        return Gate(tau, weights=weights)

    return _fit(subject, _Kind("gate", (), (), gate, lag), target or Oracle("eps-loss"), level, seed)


@dataclass(frozen=True)
class _Kind:
    """What is fitted: the features beside the state, those that its weights name, and the policy at a threshold.

    ``lag`` and ``hidden`` are as :func:`fit_probe` says.
    """

    name: str
    used: tuple[str, ...]
    named: tuple[str, ...]
    policy: Callable[[float, Weights], HaltingPolicy[Any]]
    lag: int = 0
    hidden: int = 0

    def __post_init__(self) -> None:
        for name, count in (("lag", self.lag), ("hidden", self.hidden)):
            if count < 0:
                raise ValueError(f"{name}={count} is below 0")

    def late(self, settled: Tensor) -> Tensor:
        """Which rows had settled ``lag`` steps ago, ``(K, ...)`` bool."""
        never = torch.zeros_like(settled[: self.lag])
        return torch.cat([never, settled[: len(settled) - self.lag]])

    def tensors(self, region: str, features: Tensor, settled: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The weights of one region, fitted to pairs of a row and a step: features ``(N, F)``, settled ``(N,)``."""
        fitted, made = fit_logistic(features, settled, RIDGE), {}
        width = features.shape[1] - len(self.used)
        if self.hidden:
            layered = fit_hidden(features, settled, fitted, self.hidden, generator)
            fitted, known = layered.linear, dict(zip(self.used, layered.hidden[:, width:].unbind(1), strict=True))
            numbers = [known.get(one, torch.zeros(self.hidden)) for one in self.named]
            made["hidden"] = torch.cat([layered.hidden[:, :width], torch.stack(numbers, 1)], 1)
            made |= {"hidden_bias": layered.hidden_bias, "out": layered.out}
        made |= {"state": fitted.weight[:width], "bias": fitted.bias.reshape(1)}
        fitted_on = dict(zip(self.used, fitted.weight[width:], strict=True))
        made |= {one: fitted_on.get(one, torch.zeros(1)).reshape(1) for one in self.named}
        return {f"{region}/{name}": tensor.float() for name, tensor in made.items()}

    def policies(
        self, taus: Mapping[str, float], weights: Weights, granularity: Granularity
    ) -> dict[str, HaltingPolicy[Any]]:
        """Rows that halt together wait for the last of them."""
        made: dict[str, Any] = {name: self.policy(tau, weights) for name, tau in taus.items()}
        return made if granularity == "token" else {name: Pooled(one, granularity, "max") for name, one in made.items()}


@dataclass
class _Rows:
    """What one sample says about one region, ``(K, B, T)``, or ``(K, B)`` of sequences that halt as one."""

    scores: Tensor
    same: Tensor  # whether the prediction is full depth's
    final: Tensor  # the step from which on it is, 0 where there is nothing to halt
    settled: Tensor  # by the target, late by the lag
    depths: Tensor  # by the target, 0 where nothing is asked


@torch.no_grad()
def _fit(subject: Subject, kind: _Kind, target: Oracle, level: float, seed: int) -> Fitted:
    target.labels(subject)
    fitting = Fitting.of(subject, level, seed)
    if kind.lag >= fitting.steps:
        raise ValueError(f"lag={kind.lag} with {fitting.steps} steps at full depth: nothing would ever have settled")
    if target.definition == "eps-loss" and target.epsilon is None:
        target = replace(target, epsilon=_gain_cut(fitting, target))
    tensors, learned = _learn(fitting, kind, target)
    weights = Weights(tensors)
    taus = _chosen(fitting, kind, target, weights)
    policies = kind.policies(taus, weights, fitting.learn.granularity)
    row, headroom = fitting.reported(policies)
    judged = _judge(fitting, fitting.report, kind, target, weights)
    aucs = {name: _auc(rows, min(headroom[name].step + kind.lag, fitting.steps)) for name, rows in judged.items()}
    made = policies, weights, taus, row, headroom, aucs, learned
    return Fitted(kind.name, target, *made, full_depth=fitting.steps, level=level, lag=kind.lag, hidden=kind.hidden)


def _gain_cut(fitting: Fitting, target: Oracle) -> float:
    """The cut of the last region, whose readout is the model's own; the others are measured by it."""
    labels, last = target.labels(fitting.learn), fitting.learn.regions[-1]
    found = (
        read
        for sample in fitting.learn.samples
        for *_, read in fitting.recorded(fitting.learn, sample, labels, regions=[last])
    )
    return gain_cut((read.losses, read.asked) for read in found if read.losses is not None)


@dataclass(frozen=True)
class _Read:
    """A policy on a recording whose margins have been read: its readout does not run again."""

    policy: HaltingPolicy[Any]
    margins: Tensor | None  # (K, B, T)

    def init(self, x0: Tensor) -> Any:
        return self.policy.init(x0)

    def update(self, state: Any, step: LoopStep) -> tuple[Any, Verdict]:
        if self.margins is not None:
            step.margin = self.margins[step.k - 1]
        return judge(self.policy, state, step)


class _Listening:
    """A policy that halts nothing and keeps the state and the features of every step."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.seen: list[Tensor] = []

    def init(self, x0: Tensor) -> Tensor:
        return torch.zeros_like(signals.measured(x0))

    def update(self, state: Tensor, step: LoopStep) -> tuple[Tensor, Verdict]:
        seen = [signals.measured(step.x), *([features(step, state, self.names)] if self.names else [])]
        self.seen.append(torch.cat(seen, -1))
        nothing = torch.zeros_like(step.active)
        return step.d, Verdict(nothing.float(), nothing)


def _learn(fitting: Fitting, kind: _Kind, target: Oracle) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The weights of every region, and how many pairs of a row and a step each was fitted on."""
    subject, labels = fitting.learn, target.labels(fitting.learn)
    most = -(-MOST_PAIRS // len(subject.samples))
    inputs: dict[str, list[Tensor]] = {name: [] for name in subject.regions}
    targets: dict[str, list[Tensor]] = {name: [] for name in subject.regions}
    for sample in subject.samples:
        for name, region, read in fitting.recorded(subject, sample, labels, margins="margin" in kind.used):
            listening = _Listening(kind.used)
            replay(_Read(listening, read.margins), region, readout=fitting.readout)
            seen = torch.stack(listening.seen)
            settled, depths = taught(target, read)
            last = _last(depths, subject.granularity) + kind.lag + AFTER
            k = torch.arange(1, len(seen) + 1).view(-1, *[1] * depths.ndim)
            use = ((k <= last) & (depths > 0) & seen.isfinite().all(-1)).flatten().nonzero()
            drawn = use[torch.randperm(len(use), generator=fitting.generator)[:most]].squeeze(-1)
            inputs[name].append(seen.flatten(0, -2)[drawn])
            targets[name].append(kind.late(settled).flatten()[drawn])
    tensors: dict[str, Tensor] = {}
    for name, parts in inputs.items():
        known = torch.cat(targets[name])
        if not len(known):
            raise ValueError(f"region {name!r}: no row has a depth by {target.definition}, so nothing can be learned")
        if known.all() or not known.any():
            raise ValueError(
                f"region {name!r}: every row has settled at the first step by {target.definition}, so nothing can be "
                "learned"
            )
        tensors |= kind.tensors(name, torch.cat(parts), known, fitting.generator)
    return tensors, {name: sum(map(len, parts)) for name, parts in targets.items()}


def _last(depths: Tensor, granularity: Granularity) -> Tensor:
    """For each row the last depth among those that halt with it."""
    if granularity == "token":
        return depths
    return depths.amax(-1, keepdim=True) if granularity == "sequence" else depths.amax()


def _judge(fitting: Fitting, subject: Subject, kind: _Kind, target: Oracle, weights: Weights) -> dict[str, list[_Rows]]:
    """The policy's scores over whole recordings, by region and sample."""
    found: dict[str, list[_Rows]] = {name: [] for name in subject.regions}
    labels = target.labels(subject)
    for sample in subject.samples:
        for name, region, read in fitting.recorded(subject, sample, labels, margins="margin" in kind.used):
            present = region.present
            same = agrees(read.predictions) | ~present
            measured = scores(_Read(kind.policy(1.0, weights), read.margins), region, readout=fitting.readout)
            settled, depths = target.settled(read, fitting.whole)
            if fitting.whole:
                same, measured = same.all(-1), measured.masked_fill(~present, -torch.inf).amax(-1)
                present = present.any(-1)
            final = from_then_on(same).masked_fill(~present, 0)
            found[name].append(_Rows(measured, same, final, kind.late(settled), depths))
    return found


def _chosen(fitting: Fitting, kind: _Kind, target: Oracle, weights: Weights) -> dict[str, float]:
    """The most eager thresholds that reach the level on live runs, as every safer candidate does.

    Candidates are tried twice: those of :data:`SHARES`, and then finer ones between the last that held and the next.
    """
    judged = _judge(fitting, fitting.choose, kind, target, weights)
    numbers = range(len(fitting.choose.samples))
    oracles = [{name: rows[number].final for name, rows in judged.items()} for number in numbers]

    def holding(candidates: Sequence[dict[str, float]]) -> list[dict[str, float]]:
        """Those before the first that falls short; nothing is run after it."""
        policies: list[Policies] = [kind.policies(taus, weights, fitting.learn.granularity) for taus in candidates]
        held: list[dict[str, float]] = []
        for taus, quality in zip(candidates, fitting.try_live(policies, oracles), strict=True):
            if quality < fitting.level:
                if not held and candidates is coarse:
                    raise fitting.refuse(quality, "safest")
                break
            held.append(taus)
        return held

    found = [{name: _threshold(rows, share) for name, rows in judged.items()} for share in SHARES]
    coarse = _each(_line(found, BETWEEN))
    count = len(holding(coarse))
    finer = _each(_line(coarse[count - 1 : count + 1], FINER))[1:-1]
    return [coarse[count - 1], *holding(finer)][-1]


def _line(taus: Sequence[Mapping[str, float]], parts: int) -> list[dict[str, float]]:
    """Thresholds with so many parts from each to the next, both ends included."""
    return [_between(a, b, part / parts) for a, b in pairwise(taus) for part in range(parts)] + [dict(taus[-1])]


def _each(taus: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Each once."""
    return [one for number, one in enumerate(taus) if one not in taus[:number]]


def _between(safe: Mapping[str, float], eager: Mapping[str, float], part: float) -> dict[str, float]:
    """Thresholds that are a part of the way, on the scale of their logarithms."""
    return {name: float(f"{tau ** (1 - part) * eager[name] ** part:.3g}") for name, tau in safe.items()}


def _threshold(found: Sequence[_Rows], share: float) -> float:
    """The largest of a grid of thresholds at which, as at every smaller one, enough rows agree on the recordings."""
    asked = torch.cat([rows.scores[:, rows.final > 0].flatten() for rows in found])
    ordered = asked[asked.isfinite()].sort().values
    places = torch.linspace(0, len(ordered) - 1, 501).long()
    grid = sorted({float(f"{tau:.3g}") for tau in ordered[places].clamp(1e-6, 1.0).tolist()})
    chosen = grid[0]
    for tau in grid:
        agreed = torch.cat([_agreed(rows, tau)[rows.final > 0] for rows in found])
        if float(agreed.double().mean()) < share:
            break
        chosen = tau
    return chosen


def _agreed(rows: _Rows, tau: float) -> Tensor:
    """Whether the prediction at which each row halts under a threshold is full depth's."""
    below = rows.scores < tau
    steps = torch.where(below.any(0), below.int().argmax(0), len(below) - 1)
    return rows.same.gather(0, steps.unsqueeze(0)).squeeze(0)


def _auc(found: Sequence[_Rows], k: int) -> Auc:
    asked = [(rows.depths > 0).flatten() for rows in found]
    measured = torch.cat([rows.scores[k - 1].flatten()[one] for rows, one in zip(found, asked, strict=True)])
    settled = torch.cat([rows.settled[k - 1].flatten()[one] for rows, one in zip(found, asked, strict=True)])
    sequences, first = [], 0
    for rows, one in zip(found, asked, strict=True):
        sequences.append((first + sequence_of_rows(rows.depths.shape, None))[one])
        first += len(rows.depths)
    return auc(measured, settled, torch.cat(sequences))
