"""Baselines that a policy must be held against: fixed depths by kind of row, and the oracle that nobody can pick.

Both are chosen with the answers of these very samples at hand, so each is at least as good as what anybody could have
picked. Both run live, row by row, and are measured like any other setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from haltkit.comparison.settings import in_order
from haltkit.kinds import DepthByRow, per_row
from haltkit.setting import Depth, Setting
from haltkit.subject import Subject

__all__ = ["GOALS", "allocate", "depths_by_kind", "has_few_kinds", "oracle_settings", "refine", "with_baselines"]

# Shares of rows that agree with full depth, for which depths by kind are looked for.
GOALS = (0.95, 0.99, 0.995, 0.999, 1.0)
# Steps that the oracle leaves later than a row has settled: others go on reading the rows that have left.
LAGS = (0, 1, 2, 4, 8)
# Depths are looked for by running them where there are so few of them; otherwise on recordings alone.
FEW = 4
# With more kinds, such as token ids, depths chosen on these very samples would be learned by heart: fit a table.
MOST_KINDS = 256
RAISES = 3  # how much deeper than on its own a kind is tried, for others to be less deep

Point = tuple[int, ...]


def with_baselines(
    subject: Subject,
    settings: Sequence[Setting],
    oracles: Sequence[Mapping[str, Tensor]],
    unknown: str = "",
    on_try: Callable[[], None] = lambda: None,
) -> list[Setting]:
    """Settings with depths by kind among the fixed ones, if the subject has kinds, and with the oracle at the end.

    Where rows cannot be given depths of their own, or nothing is known of some samples, they stay as they are.

    Args:
        subject: with its full depth.
        settings: full depth first, then other depths, then policies.
        oracles: the oracle depth of each row by region, of every sample (see
            :func:`haltkit.comparison.possible.possible`).
        unknown: why there are none.
        on_try: is called before each run of a search for depths by kind.

    Raises:
        ValueError: a subject with kinds of whose rows nothing is known, for instance without logits or a readout; or
            rows of kinds that are none.
    """
    known = bool(oracles) and len(oracles) == len(subject.samples)
    if has_few_kinds(subject) and (subject.logits is None or not known):
        why = "it has no logits=" if subject.logits is None else unknown
        raise ValueError(f"{subject.name} has kinds=, and depths by kind cannot be looked for: {why}")
    if not subject.driver.rows_leave or not known:
        return list(settings)
    by_kind = depths_by_kind(subject, oracles, on_try)
    full, *depths = [one.depth for one in [*settings, *by_kind] if one.depth is not None]
    others = in_order(depth for depth in dict.fromkeys(depths) if depth != full)
    kinds = [one for one in by_kind if one.by_row is not None]
    policies = [one for one in settings if one.depth is None]
    return [settings[0], *map(Setting, others), *kinds, *policies, *oracle_settings(subject, oracles)]


def oracle_settings(subject: Subject, oracles: Sequence[Mapping[str, Tensor]]) -> list[Setting]:
    """Every row leaves when its prediction is final, or some steps later; nobody can pick it, for it takes full depth.

    Args:
        oracles: of every sample; 0: the row has no oracle depth, and takes a single step.
    """
    of = {id(sample): depths for sample, depths in zip(subject.samples, oracles, strict=True)}
    full = subject.full_depth

    def late(lag: int) -> Callable[[Any], Mapping[str, Tensor]]:
        return lambda sample: {region: (d.clamp_min(1) + lag).clamp_max(full) for region, d in of[id(sample)].items()}

    deepest = dict.fromkeys(subject.regions, full)
    said = {lag: f"oracle + {lag}" if lag else "oracle" for lag in LAGS if lag < full}
    return [
        Setting(DepthByRow(late(lag), deepest, label, hindsight=True)).named("oracle") for lag, label in said.items()
    ]


def depths_by_kind(
    subject: Subject, oracles: Sequence[Mapping[str, Tensor]], on_try: Callable[[], None] = lambda: None
) -> list[Setting]:
    """For each of :data:`GOALS` the depths by kind that take the fewest steps; empty without kinds, or of too many.

    A few depths are looked for by running the first sample; many are read off the recordings of all samples, which is
    exact where rows of different kinds do not see each other. Where the same depth for all kinds takes the fewest
    steps, the setting is that fixed depth.
    """
    if subject.kinds is None or not has_few_kinds(subject):
        return []
    kinds = [subject.kinds.of(sample).cpu() for sample in subject.samples]
    count, full = subject.kinds.count(subject.samples), subject.full_depth
    settled = {region: _settled(kinds, [depths[region] for depths in oracles], count, full) for region in oracles[0]}
    rows = next(iter(settled.values())).sum(1)  # of each kind
    few = count * len(subject.regions) <= FEW
    find = _live(subject, rows, on_try) if few else lambda goal: [allocate(table, goal) for table in settled.values()]
    made = []
    for found in dict.fromkeys(tuple(find(goal)) for goal in GOALS):
        steps = dict(zip(subject.regions, found, strict=True))
        same = all(len(set(depths)) == 1 for depths in found)
        made.append(Setting(Depth({r: d[0] for r, d in steps.items()}) if same else subject.kinds.depths(steps)))
    return made


def has_few_kinds(subject: Subject) -> bool:
    """Whether rows are of kinds, and of no more than :data:`MOST_KINDS`, so that a depth for each can be looked for."""
    return subject.kinds is not None and subject.kinds.count(subject.samples) <= MOST_KINDS


def _settled(kinds: Sequence[Tensor], depths: Sequence[Tensor], count: int, full: int) -> Tensor:
    """How many rows of each kind settle at each step, ``(kinds, full)``; rows without an oracle depth do not count."""
    table = torch.zeros(count, full, dtype=torch.int64)
    for kind, depth in zip(kinds, depths, strict=True):
        common = min(kind.ndim, depth.ndim)
        if kind.shape[:common] != depth.shape[:common]:
            raise ValueError(f"kinds {tuple(kind.shape)} for rows {tuple(depth.shape)}: one per row or per sequence")
        shape = max(kind.shape, depth.shape, key=len)
        of, at = per_row(kind, shape).flatten(), per_row(depth.cpu(), shape).flatten()
        table.index_put_((of[at > 0], at[at > 0] - 1), torch.ones((), dtype=torch.int64), accumulate=True)
    return table


def allocate(settled: Tensor, goal: float) -> Point:
    """The depth of each kind, so that at least a share ``goal`` of all rows has settled, in few steps altogether.

    Each depth is a price's best: a row that settles is worth so many steps, the least price that reaches the goal.
    These depths, and one depth for all, are lowered kind by kind as far as the goal still holds; the cheaper ones are
    taken. Kinds without rows get the deepest depth.

    Args:
        settled: how many rows of each kind settle at each step, ``(kinds, full)`` int64.
        goal: from 0 to 1.
    """
    by_then = settled.cumsum(1)  # settled rows of each kind after each step
    rows, least = by_then[:, -1], goal * int(settled.sum())
    at = torch.arange(1, settled.shape[1] + 1)

    def priced(price: float) -> Tensor:
        return (rows[:, None] * at - price * by_then.double()).argmin(1) + 1

    def reached(depths: Tensor) -> int:
        return int(by_then.gather(1, depths[:, None] - 1).sum())

    def lowered(depths: Tensor) -> Tensor:
        for kind in rows.argsort(descending=True).tolist():
            while depths[kind] > 1:
                depths[kind] -= 1
                if reached(depths) < least:
                    depths[kind] += 1
                    break
        return depths

    low, high = 0.0, float(rows.max() * settled.shape[1] + 1)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(priced(middle)) >= least else (middle, high)
    uniform = torch.full_like(rows, 1 + int((by_then.sum(0) < least).sum()))
    depths = min((lowered(priced(high)), lowered(uniform)), key=lambda depths: int((rows * depths).sum()))
    depths[rows == 0] = depths[rows > 0].max() if bool((rows > 0).any()) else settled.shape[1]
    return tuple(depths.tolist())


def _live(subject: Subject, rows: Tensor, on_try: Callable[[], None]) -> Callable[[float], list[Point]]:
    """Looks for depths by running the first sample; points that were run are not run again.

    Where sequences halt as one, those count that agree as a whole.
    """
    assert subject.kinds is not None
    kinds, regions = subject.kinds, subject.regions
    full, whole = _tops(subject, Setting(Depth.uniform(subject.full_depth, regions))), subject.granularity == "sequence"
    tried: dict[Point, float] = {}

    def split(point: Point) -> list[Point]:
        return [tuple(point[start : start + len(rows)]) for start in range(0, len(point), len(rows))]

    def agreement(point: Point) -> float:
        if point not in tried:
            on_try()
            setting = Setting(kinds.depths(dict(zip(regions, split(point), strict=True))))
            same = _tops(subject, setting) == full
            tried[point] = float((same.flatten(1).all(1) if whole else same).double().mean())
        return tried[point]

    weights = rows.repeat(len(regions)).tolist()
    return lambda goal: split(refine(agreement, weights, subject.full_depth, goal))


def _tops(subject: Subject, setting: Setting) -> Tensor:
    """Top predictions on the first sample, ``(B, T)``."""
    assert subject.logits is not None
    return subject.logits(subject.run(subject.samples[0], setting).output).argmax(-1)


def refine(agreement: Callable[[Point], float], weights: Sequence[int], full: int, goal: float) -> Point:
    """The point of the least weighted sum that coordinate search finds, among those that agree enough.

    It starts where all coordinates are the same. Each in turn is lowered as far as it goes; then each is raised a
    little for the others to be lowered again, as long as that helps. Agreement is taken not to fall with depth.

    Args:
        agreement: of a point, from 0 to 1; 1 where all coordinates are ``full``.
        weights: of the coordinates.
        full: the greatest coordinate.
        goal: the least agreement.
    """
    every = range(len(weights))

    def good(point: Point) -> bool:
        return agreement(point) >= goal

    def good_with(point: Point, at: int, depth: int) -> bool:
        return good(_with(point, at, depth))

    def cost(point: Point) -> int:
        return sum(w * d for w, d in zip(weights, point, strict=True))

    def lowered(point: Point, first: int) -> Point:
        for at in sorted(every, key=lambda i: (i != first, -weights[i])):
            point = _with(point, at, _least(point[at], partial(good_with, point, at)))
        return point

    uniform = _least(full, lambda depth: good((depth,) * len(weights)), halving=True)
    best = min((lowered((uniform,) * len(weights), first) for first in every), key=cost)
    improved = True
    while improved:
        improved = False
        for at, other in ((at, other) for at in every for other in every if at != other and best[other] > 1):
            if not good(_with(_with(best, at, full), other, best[other] - 1)):
                continue  # no raise of this one lets the other be lowered
            for depth in range(best[at] + 1, min(best[at] + RAISES, full) + 1):
                # As deep as still pays: if that is not good, nothing below is.
                room = best[other] - weights[at] * (depth - best[at]) // max(1, weights[other]) - 1
                raised = _with(_with(best, at, depth), other, room)
                if room >= 1 and good(raised) and cost(found := lowered(raised, other)) < cost(best):
                    best, improved = found, True
                    break
    return best


def _least(depth: int, good: Callable[[int], bool], *, halving: bool = False) -> int:
    """The least depth that is good, the given one being good, where none above a good one is bad.

    Args:
        halving: look at the middle at once, instead of close to the given depth until one is bad.
    """
    low, stride = 1, 1
    while low < depth:
        tried = (low + depth) // 2 if halving else max(low, depth - stride)
        if good(tried):
            depth, stride = tried, 2 * stride
        else:
            low, halving = tried + 1, True
    return depth


def _with(point: Point, at: int, depth: int) -> Point:
    return (*point[:at], depth, *point[at + 1 :])
