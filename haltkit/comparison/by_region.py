"""Thresholds by region from one joint budget of risk: a path through them, found on samples that no test uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from haltkit.calibration.testing import greedy_path
from haltkit.comparison.live import Live, halts_together
from haltkit.comparison.settings import Candidate, Sweeps
from haltkit.policies import Fixed
from haltkit.protocol import HaltingPolicy, granularity_of
from haltkit.setting import Setting

__all__ = ["joint_path"]

STEP = 0.01  # of full depth: what a point of the path saves at least beside the one before it


def joint_path(
    candidate: Candidate, sweeps: Sweeps, live: Live, on_setting: Callable[[Setting], None]
) -> list[Setting]:
    """Settings from all regions at their safest threshold to all at their most eager one.

    Each region is first run by itself at each of its thresholds, all others at full depth: that says what the threshold
    risks and saves there. The path then lowers, point by point, the region in which the most steps are saved per risk
    taken (:func:`haltkit.calibration.testing.greedy_path`). Tested in this order, on other samples, it certifies the
    thresholds of all regions together: epsilon is one budget, spent in the regions where it saves most.

    Args:
        candidate: one policy for all regions, or one for each.
        sweeps: on the subject.
        live: full depth on the samples that choose.
        on_setting: told of every setting before it is run.

    Returns:
        one setting per point, without points that save less than a hundredth of full depth beside the one before.

    Raises:
        ValueError: a bad spec, or a region without a threshold.
    """
    regions, full_depth = sweeps.subject.regions, sweeps.look.full_depth
    full: dict[str, HaltingPolicy[Any]] = {region: Fixed(full_depth) for region in regions}
    grids: list[list[HaltingPolicy[Any]]] = []
    risks: list[list[float]] = []
    costs: list[list[float]] = []
    for region in regions:
        weight = max(1, len(sweeps.subject.layer_paths(region)))  # steps of a region with more layers cost more
        measured = []
        for policy in sweeps.grid(candidate, region):
            setting = _setting({**full, region: policy}, regions, candidate)
            on_setting(setting)
            ran = live.run(setting)
            lost = live.by_unit(ran, halts_together(granularity_of(policy)))
            measured.append((-weight * ran.steps[region], float(lost.mean()), policy))
        measured.sort(key=lambda one: one[:2])  # the most steps first
        grids.append([policy for *_, policy in measured])
        risks.append([risk for _, risk, _ in measured])
        costs.append([-saved for saved, *_ in measured])
    points = [tuple(map(int, point)) for point in greedy_path(risks, costs)]
    kept = _spaced(points, costs, STEP * full_depth * sum(max(1, len(sweeps.subject.layer_paths(r))) for r in regions))
    return [
        _setting({r: grid[at] for r, grid, at in zip(regions, grids, point, strict=True)}, regions, candidate)
        for point in kept
    ]


def _spaced(points: Sequence[tuple[int, ...]], costs: Sequence[Sequence[float]], least: float) -> list[tuple[int, ...]]:
    """Points without those that cost less than ``least`` below the one before; a run of the test is worth that much."""

    def cost(point: tuple[int, ...]) -> float:
        return sum(of[at] for of, at in zip(costs, point, strict=True))

    kept = [points[0]]
    for point in points[1:]:
        if cost(kept[-1]) - cost(point) >= least:
            kept.append(point)
    return kept


def _setting(policies: Mapping[str, HaltingPolicy[Any]], regions: Sequence[str], candidate: Candidate) -> Setting:
    return Setting.of(dict(policies), regions).named(candidate.name)
