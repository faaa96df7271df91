"""Fit ``table``: how deep each kind of row goes, shrunk to its region where little was seen of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from haltkit.comparison.fitting.fitted import Fitted, Fitting
from haltkit.comparison.oracle import EPSILON, Oracle, taught
from haltkit.headroom.oracles import agrees
from haltkit.kinds import per_row
from haltkit.policies import Table
from haltkit.protocol import HaltingPolicy
from haltkit.subject import Subject
from haltkit.weights import Weights

__all__ = ["fit_table", "shrunk_depths"]

# Rows of its region that are added to each kind's own: what makes a rare kind like its region.
STRENGTHS = (2.0, 20.0, 200.0)
# Of a kind's rows that have settled at its depth.
SHARES = (1.0, 0.9995, 0.999, 0.998, 0.997, 0.995, 0.993, 0.99, 0.985, 0.98, 0.97, 0.95, 0.9, 0.8, 0.65, 0.5)
# Fewest steps of any kind in the regions before the last.
FLOORS = (1, 2, 3, 4, 6)
# Of a row that halts with another prediction than full depth's, in steps.
PRICES = tuple(10 * 1.7**power for power in range(17))


@torch.no_grad()
def fit_table(subject: Subject, *, level: float = 0.99, target: Oracle | None = None, seed: int = 0) -> Fitted:
    """Fit a depth for each kind of row in each region, decided before the loop starts.

    A kind's depth is a quantile of the depths at which its rows settle, on the samples that are learned from. Where few
    rows of a kind were seen it is shrunk to the region's: ``(n q_kind + m q_region) / (n + m)``, rounded, of n rows and
    with the strength of m more. A candidate belongs to a price in steps of one row that halts with another
    prediction than full depth's: every region takes the quantile and the m that cost least at that price, on recordings
    of the samples that choose. What an inner region's readout predicts is not all that later regions need, so
    candidates also differ by the fewest steps that any kind takes in the inner regions. On live runs of the samples
    that choose, from the fewest steps to the most, the first that reaches the level with one standard error to spare is
    taken.

    Args:
        subject: with ``kinds``, at least four samples, a readout and logits, whose rows can be given depths.
        level, target, seed: as for :func:`haltkit.comparison.fitting.fit_probe`.

    Raises:
        ValueError: as there; or a subject that does not say its rows' kinds.
    """
    target = (target or Oracle()).or_epsilon(EPSILON)
    if subject.kinds is None:
        raise ValueError(
            f"a table is looked up by kind of row, and {subject.name} does not say its rows' kinds: give the Subject "
            "kinds=, or fit a probe"
        )
    target.labels(subject)
    fitting = Fitting.of(subject, level, seed)
    seen = _seen(fitting, target)
    for name, rows in seen.items():
        if not len(rows.depths):
            raise ValueError(f"region {name!r}: no row has a depth by {target.definition}, so nothing can be learned")
    judged = _judged(fitting)
    numbers = range(len(fitting.choose.samples))
    oracles = [{name: parts[number].depths for name, parts in judged.items()} for number in numbers]
    candidates = _candidates(seen, judged)  # from the fewest steps to the most
    policies = [dict.fromkeys(subject.regions, Table(weights)) for weights in candidates]
    best, most = None, -math.inf
    for weights, quality in zip(candidates, fitting.try_live(policies, oracles if fitting.whole else []), strict=True):
        most = max(most, quality)
        if quality >= level:
            best = weights
            break
    if best is None:
        raise fitting.refuse(most, "best")
    chosen: dict[str, HaltingPolicy[Any]] = dict.fromkeys(subject.regions, Table(best))
    row, headroom = fitting.reported(chosen)
    learned = {name: len(rows.depths) for name, rows in seen.items()}
    return Fitted("table", target, chosen, best, {}, row, headroom, {}, learned, fitting.steps, level)


@dataclass(frozen=True)
class _Rows:
    """Rows of one region, or whole sequences where they halt as one.

    Those that are learned from are ``(n,)``; those that choose come sample by sample.
    """

    kinds: Tensor
    depths: Tensor  # by the target; 0 where there is nothing to halt
    same: Tensor | None = None  # whether the prediction at each step is full depth's, (K, ...)


def _of_sample(fitting: Fitting, subject: Subject, sample: Any, target: Oracle) -> dict[str, _Rows]:
    assert subject.kinds is not None
    of = subject.kinds.of(sample).cpu()
    if fitting.whole and of.ndim > 1:
        raise ValueError("whole sequences halt, so kinds of sequences (B,) are needed: these are kinds of rows (B, T)")
    found = {}
    for name, _, read in fitting.recorded(subject, sample, target.labels(subject)):
        _, depths = taught(target, read, fitting.whole)
        same = agrees(read.predictions) | ~read.present
        found[name] = _Rows(per_row(of, depths.shape), depths.cpu(), (same.all(-1) if fitting.whole else same).cpu())
    return found


def _seen(fitting: Fitting, target: Oracle) -> dict[str, _Rows]:
    """All rows that are learned from, by region."""
    samples = [_of_sample(fitting, fitting.learn, sample, target) for sample in fitting.learn.samples]
    return {
        name: _Rows(
            torch.cat([one[name].kinds[one[name].depths > 0] for one in samples]),
            torch.cat([one[name].depths[one[name].depths > 0] for one in samples]),
        )
        for name in fitting.learn.regions
    }


def _judged(fitting: Fitting) -> dict[str, list[_Rows]]:
    """The samples that choose, by region; their depths are the *stable* oracle's."""
    samples = [_of_sample(fitting, fitting.choose, sample, Oracle()) for sample in fitting.choose.samples]
    return {name: [one[name] for one in samples] for name in fitting.choose.regions}


def _candidates(seen: Mapping[str, _Rows], judged: Mapping[str, Sequence[_Rows]]) -> list[Weights]:
    """Tables, from the fewest steps to the most on the samples that choose."""
    made: dict[tuple[object, ...], tuple[float, Weights]] = {}
    inner = list(seen)[:-1]
    learned = {
        name: [shrunk_depths(rows.kinds, rows.depths, share, m) for m in STRENGTHS for share in SHARES]
        for name, rows in seen.items()
    }
    for floor in FLOORS if inner else FLOORS[:1]:
        least = {name: floor if name in inner else 1 for name in seen}
        tables = {name: [_at_least(least[name], table) for table in found] for name, found in learned.items()}
        costs = {name: [_cost(table, judged[name]) for table in found] for name, found in tables.items()}
        for price in PRICES:
            best = {name: _least([steps + price * other for steps, other in found]) for name, found in costs.items()}
            chosen = {name: tables[name][number] for name, number in best.items()}
            key = tuple((tuple(depths.tolist()), beyond) for depths, beyond in chosen.values())
            made.setdefault(key, (sum(costs[name][n][0] for name, n in best.items()), _weights(chosen)))
    return [weights for _, weights in sorted(made.values(), key=lambda one: one[0])]


def _least(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


def _at_least(floor: int, table: tuple[Tensor, int]) -> tuple[Tensor, int]:
    return table[0].clamp_min(floor), max(floor, table[1])


def _cost(table: tuple[Tensor, int], judged: Sequence[_Rows]) -> tuple[float, float]:
    """Mean steps, and the share of rows that halt with another prediction than full depth's."""
    steps, other, count = 0, 0, 0
    depths, beyond = table
    both = torch.cat([depths, torch.tensor([beyond])])
    for rows in judged:
        assert rows.same is not None
        known = rows.depths > 0
        taken = both[rows.kinds.clamp_max(len(depths))].clamp_max(len(rows.same))
        same = rows.same.gather(0, taken.unsqueeze(0) - 1).squeeze(0)
        steps += int(taken[known].sum())
        other += int((~same)[known].sum())
        count += int(known.sum())
    return steps / max(1, count), other / max(1, count)


def _weights(tables: Mapping[str, tuple[Tensor, int]]) -> Weights:
    tensors: dict[str, Tensor] = {}
    for region, (depths, other) in tables.items():
        tensors |= {f"{region}/depths": depths, f"{region}/other": torch.tensor([other])}
    return Weights(tensors)


def shrunk_depths(kinds: Tensor, depths: Tensor, share: float, strength: float) -> tuple[Tensor, int]:
    """The depth of each kind from 0 to the greatest one seen, int64, and that of any other.

    Args:
        kinds, depths: of the rows seen, ``(n,)`` int64.
        share: of a kind's rows that have settled at its depth, before it is shrunk.
        strength: rows of the region that are added to each kind's own.
    """
    overall = float(_quantile(depths, share))
    other = _whole(overall)
    count = torch.bincount(kinds)
    own = torch.full((len(count),), overall, dtype=torch.float64)
    order = torch.argsort(kinds, stable=True)
    for kind, rows in zip(count.nonzero().flatten().tolist(), _parts(depths[order], count), strict=True):
        own[kind] = float(_quantile(rows, share))
    shrunk = (count * own + strength * overall) / (count + strength)
    return torch.tensor([_whole(depth) for depth in shrunk.tolist()]), other


def _parts(values: Tensor, count: Tensor) -> Sequence[Tensor]:
    return torch.split(values, count[count > 0].tolist())


def _quantile(depths: Tensor, share: float) -> Tensor:
    """The least depth at which at least this share has settled."""
    ordered = depths.sort().values
    place = -int(-share * len(ordered) // 1) - 1  # ceil(share n), counted from 0
    return ordered[place]


def _whole(depth: float) -> int:
    """The nearest whole number of steps, halves up."""
    return max(1, int(depth + 0.5))
