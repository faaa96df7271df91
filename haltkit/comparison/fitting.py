"""Fit a probe on a subject: learn on some samples, choose its threshold on others, report on the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor

from haltkit import signals
from haltkit.comparison.measure import measure
from haltkit.comparison.possible import Possible, possible
from haltkit.comparison.rows import Row
from haltkit.headroom import Auc, auc, fit_logistic
from haltkit.headroom.clusters import sequence_of_rows
from haltkit.headroom.oracles import agrees, from_then_on
from haltkit.policies.probe import FEATURES, Probe, features
from haltkit.protocol import HaltingPolicy, LoopStep, Readout, Verdict
from haltkit.recording.replay import readout_of_recordings, replay, scores
from haltkit.recording.trajectory import RegionTrajectory
from haltkit.setting import Setting
from haltkit.subject import Subject
from haltkit.weights import Weights
from haltkit.wrappers import Pooled

__all__ = ["Fitted", "fit_probe"]

# A row is learned from until so many steps after it has settled: a policy has halted it by then.
AFTER = 3
# Agreement on recordings of the candidates for the thresholds, from safe to eager.
SHARES = (0.9999, 0.9995, 0.998, 0.995, 0.99, 0.97, 0.9)
RIDGE = 1e-5  # against many pairs
BETWEEN = 3  # steps from one of them to the next
MOST_PAIRS = 200_000  # of a row and a step that are learned from in one region, drawn from all


@dataclass
class _Rows:
    """What one sample says about one region."""

    scores: Tensor  # (K, B, T) or (K, B): of the rows or instances that halt as one
    same: Tensor  # likewise, whether the prediction is full depth's
    depths: Tensor  # the oracle's, 0 where nothing is asked


@dataclass(frozen=True)
class Fitted:
    """A probe for each region, and how it does on samples that it was neither fitted nor chosen on.

    Attributes:
        weights: of all regions; see :class:`haltkit.policies.Probe`.
        taus: the threshold of each region.
        whole: whether whole sequences halt: the greatest probability of their rows decides.
        row: what a live run measured: agreement with full depth, steps, regret.
        headroom: of the same samples, by region.
        aucs: how well each region's probe tells settled rows at the step nearest to the oracle's mean, on recordings.
        learned: by region, pairs of a row and a step that it was fitted on.
        full_depth: steps of the recordings, and the budget.
    """

    weights: Weights
    taus: dict[str, float]
    whole: bool
    row: Row
    headroom: dict[str, Possible]
    aucs: dict[str, Auc]
    learned: dict[str, int]
    full_depth: int

    def policies(self) -> dict[str, HaltingPolicy[Any]]:
        """The probe of each region at its threshold."""
        return _probes(self.taus, self.weights, self.whole)


@torch.no_grad()
def fit_probe(subject: Subject, *, level: float = 0.99, margin: bool = True, seed: int = 0) -> Fitted:
    """Fit a probe by region whose target is "the top prediction will not change any more".

    Half of the samples are learned from, a quarter chooses the thresholds, a quarter is reported on; whole samples, so
    that no sequence is in two of them. Learning uses recordings at full depth. Thresholds are chosen and reported on
    live runs, because in a recording rows go on seeing the later states of rows that would have halted.

    Args:
        subject: with at least four samples, a readout and logits.
        level: the share of positions whose prediction must be full depth's where the thresholds are chosen; where whole
            sequences halt, the share of sequences that must not halt before all of their predictions are final.
            Candidates go from safe to eager, a threshold per region each; the last before the first that falls short is
            chosen.
        margin: whether the probe sees the gap between the two most probable classes, which needs the readout at every
            step.
        seed: of the split, and of the pairs that are drawn where there are more than enough.

    Raises:
        ValueError: too few samples, no readout or logits, a level outside (0, 1), a region whose predictions are all
            final at the first step, so that nothing can be learned, or no threshold that reaches the level.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} is outside (0, 1): it is a share")
    if subject.readout is None or subject.logits is None:
        raise ValueError(f"{subject.name} has no readout or no logits: give the Subject readout= and logits=")
    count = len(subject.samples)
    if count < 4:
        raise ValueError(
            f"{count} samples: fitting needs at least 4, to learn on two, choose on one and report on one. Give more "
            "sequences (--sequences), or make smaller samples of them (--batch)"
        )
    readout = readout_of_recordings(subject.readout, subject.model)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator).tolist()
    parts = order[: count // 2], order[count // 2 : 3 * count // 4], order[3 * count // 4 :]
    learn, choose, report = (replace(subject, samples=[subject.samples[i] for i in part]) for part in parts)
    steps = subject.full_depth or subject.look().full_depth
    whole = subject.granularity == "sequence"
    tensors, learned = _learn(learn, steps, FEATURES if margin else FEATURES[:-1], readout, generator)
    weights = Weights(tensors)
    taus = _chosen(choose, steps, weights, whole, level, readout)
    full, setting = (Setting.of(how, subject.regions) for how in (steps, _probes(taus, weights, whole)))
    oracles: list[Mapping[str, Tensor]] = []
    headroom = possible(report, on_sample=oracles.append)
    row = measure(report, [full, setting], oracles=oracles, repeats=1).rows[1]
    judged = _judge(report, steps, weights, readout)
    aucs = {name: _auc(rows, headroom[name].step) for name, rows in judged.items()}
    return Fitted(weights, taus, whole, row, headroom, aucs, learned, steps)


def _probes(taus: Mapping[str, float], weights: Weights, whole: bool) -> dict[str, HaltingPolicy[Any]]:
    probes = {name: Probe(tau, weights) for name, tau in taus.items()}
    return {name: Pooled(one, "sequence", "max") if whole else one for name, one in probes.items()}


class _Listening:
    """A policy that halts nothing and keeps the state and the features of every step."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.seen: list[Tensor] = []

    def init(self, x0: Tensor) -> Tensor:
        return torch.zeros_like(signals.measured(x0))

    def update(self, state: Tensor, step: LoopStep) -> tuple[Tensor, Verdict]:
        self.seen.append(torch.cat([signals.measured(step.x), features(step, state, self.names)], -1))
        nothing = torch.zeros_like(step.active)
        return step.d, Verdict(nothing.float(), nothing)


def _learn(
    subject: Subject,
    steps: int,
    names: tuple[str, ...],
    readout: Readout,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The weights of every region's probe, and how many pairs of a row and a step each was fitted on."""
    most = -(-MOST_PAIRS // len(subject.samples))
    inputs: dict[str, list[Tensor]] = {name: [] for name in subject.regions}
    targets: dict[str, list[Tensor]] = {name: [] for name in subject.regions}
    for sample in subject.samples:
        for name, region in subject.record(subject.inputs(sample), steps).regions.items():
            listening = _Listening(names)
            replay(listening, region, readout=readout)
            seen = torch.stack(listening.seen)
            depths = from_then_on(agrees(_predictions(region, readout)))
            k = torch.arange(1, len(seen) + 1).view(-1, *[1] * depths.ndim)
            use = ((k <= depths + AFTER) & region.present & seen.isfinite().all(-1)).flatten().nonzero()
            drawn = use[torch.randperm(len(use), generator=generator)[:most]].squeeze(-1)
            inputs[name].append(seen.flatten(0, -2)[drawn])
            targets[name].append((k >= depths).expand(seen.shape[:-1]).flatten()[drawn])
    tensors: dict[str, Tensor] = {}
    for name, parts in inputs.items():
        settled = torch.cat(targets[name])
        if settled.all() or not settled.any():
            raise ValueError(f"region {name!r}: every prediction is final at the first step, so nothing can be learned")
        fitted = fit_logistic(torch.cat(parts), settled, RIDGE)
        state, others = fitted.weight[: -len(names)], fitted.weight[-len(names) :]
        tensors |= {f"{name}/state": state.float(), f"{name}/bias": fitted.bias.reshape(1).float()}
        fitted_on = dict(zip(names, others, strict=True))
        tensors |= {f"{name}/{one}": fitted_on.get(one, torch.zeros(1)).reshape(1).float() for one in FEATURES}
    return tensors, {name: sum(map(len, parts)) for name, parts in targets.items()}


def _predictions(region: RegionTrajectory, readout: Readout) -> Tensor:
    """Top predictions, ``(K, rows...)``."""
    assert region.states is not None  # Subject.record keeps states
    return torch.stack([signals.top(readout(state)) for state in region.states[1:]])


def _judge(subject: Subject, steps: int, weights: Weights, readout: Readout) -> dict[str, list[_Rows]]:
    """The probe's scores over whole recordings, by region and sample."""
    found: dict[str, list[_Rows]] = {name: [] for name in subject.regions}
    whole = subject.granularity == "sequence"
    for sample in subject.samples:
        for name, region in subject.record(subject.inputs(sample), steps).regions.items():
            predictions = _predictions(region, readout)
            present = region.present
            same = agrees(predictions) | ~present
            measured = scores(Probe(1.0, weights), region, readout=readout)
            if whole:
                same, measured = same.all(-1), measured.masked_fill(~present, -torch.inf).amax(-1)
                present = present.any(-1)
            found[name].append(_Rows(measured, same, from_then_on(same).masked_fill(~present, 0)))
    return found


def _chosen(
    subject: Subject, steps: int, weights: Weights, whole: bool, level: float, readout: Readout
) -> dict[str, float]:
    """The most eager thresholds that reach the level on live runs, as every safer candidate does."""
    judged = _judge(subject, steps, weights, readout)
    found = [{name: _threshold(rows, share) for name, rows in judged.items()} for share in SHARES]
    dense = [_between(a, b, part / BETWEEN) for a, b in pairwise(found) for part in range(BETWEEN)] + found[-1:]
    candidates = [taus for number, taus in enumerate(dense) if taus not in dense[:number]]
    settings = [Setting.of(_probes(taus, weights, whole), subject.regions) for taus in candidates]
    numbers = range(len(subject.samples))
    oracles = [{name: rows[number].depths for name, rows in judged.items()} for number in numbers]
    rows = measure(subject, [Setting.of(steps, subject.regions), *settings], oracles=oracles, repeats=1).rows[1:]
    shares = [_quality(row, whole) for row in rows]
    good = list(takewhile(lambda share: share >= level, shares))
    if not good:
        several = "; an inner region's readout may say little about what later regions need"
        raise ValueError(
            f"no threshold reaches {level:g} on live runs (the safest has {shares[0]:.4f}): ask for less, or fit on "
            f"more samples{several if len(subject.regions) > 1 else ''}"
        )
    return candidates[len(good) - 1]


def _quality(row: Row, whole: bool) -> float:
    """Agreement; of whole sequences, the share that was not halted early in any region."""
    if whole:
        return 1 - max(missed.early for missed in row.regret.values())
    return row.agreement or 0.0


def _between(safe: Mapping[str, float], eager: Mapping[str, float], part: float) -> dict[str, float]:
    """Thresholds that are a part of the way, on the scale of their logarithms."""
    return {name: float(f"{tau ** (1 - part) * eager[name] ** part:.3g}") for name, tau in safe.items()}


def _threshold(found: Sequence[_Rows], share: float) -> float:
    """The largest of a grid of thresholds at which, as at every smaller one, enough rows agree on the recordings."""
    asked = torch.cat([rows.scores[:, rows.depths > 0].flatten() for rows in found])
    ordered = asked[asked.isfinite()].sort().values
    places = torch.linspace(0, len(ordered) - 1, 501).long()
    grid = sorted({float(f"{tau:.3g}") for tau in ordered[places].clamp(1e-6, 1.0).tolist()})
    chosen = grid[0]
    for tau in grid:
        agreed = torch.cat([_agreed(rows, tau)[rows.depths > 0] for rows in found])
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
    settled = torch.cat([(rows.depths <= k).flatten()[one] for rows, one in zip(found, asked, strict=True)])
    sequences, first = [], 0
    for rows, one in zip(found, asked, strict=True):
        sequences.append((first + sequence_of_rows(rows.depths.shape, None))[one])
        first += len(rows.depths)
    return auc(measured, settled, torch.cat(sequences))
