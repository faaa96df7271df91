"""Which settings are certified, when many are tested on the same units: corrections for multiple testing.

A p-value belongs to one setting and one hypothesis, "the risk of this setting is above epsilon". Each function here
keeps the probability that *any* setting whose risk is above epsilon is certified at ``delta`` or below, whatever the
dependence between the p-values (they come from the same units). Learn-then-Test, arXiv 2110.01052.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["bonferroni", "even_path", "fixed_sequence", "greedy_path", "holm"]

Masks = NDArray[np.bool_]
Path = NDArray[np.int64]


def fixed_sequence(p_values: Iterable[float], delta: float) -> int:
    """How many settings are certified, walking from the safest and stopping at the first with ``p > delta``.

    The order must be fixed before the losses are seen; no share of ``delta`` is spent per setting, so a fine grid costs
    nothing. The promise does not need a risk that grows along the order, but the power does: one setting with too
    large a risk hides all that follow. arXiv 2110.01052, Section 2.2 (fixed sequence testing).

    Args:
        p_values: from the safest setting to the most eager. Consumed only as far as the walk goes, so a generator
            computes no more than is needed.

    Returns:
        the number of certified settings: 0 if the first fails, so the last certified one has this index minus 1.
    """
    _check(delta)
    certified = 0
    for p in p_values:
        if not p <= delta:  # NaN certifies nothing
            break
        certified += 1
    return certified


def bonferroni(p_values: ArrayLike, delta: float) -> Masks:
    """Certify each setting with ``p <= delta / settings``, ``(settings,)`` to a mask. Needs no order."""
    _check(delta)
    p = np.asarray(p_values, dtype=np.float64)
    certified: Masks = p <= delta / max(1, p.size)
    return certified


def holm(p_values: ArrayLike, delta: float) -> Masks:
    """Holm's step-down: certifies all that Bonferroni certifies and often more, under the same promise.

    The i-th smallest of m p-values is compared with ``delta / (m - i + 1)``; the first that fails ends it. Holm (1979).
    """
    _check(delta)
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")  # NaN sorts last and fails
    passed = p[order] <= delta / np.arange(p.size, 0, -1)
    certified = np.zeros(p.shape, dtype=bool)
    certified[order[: int(np.logical_and.accumulate(passed).sum())]] = True
    return certified


def even_path(sizes: Sequence[int]) -> Path:
    """A path through the product of the regions' grids from all safest to all most eager, at an even pace.

    Each point differs from the one before in one region, by one threshold. The path uses no data, so every unit can be
    kept for the test.

    Args:
        sizes: how many thresholds each region's grid has, safest first.

    Returns:
        ``(points, regions)``: indices into the grids; ``sum(sizes) - regions + 1`` points.

    Raises:
        ValueError: no regions, or an empty grid.
    """
    _check_sizes(sizes)

    def after(at: list[int], region: int) -> float:
        return (at[region] + 1) / (sizes[region] - 1)

    return _walk(sizes, lambda at, open_regions: min(open_regions, key=lambda region: after(at, region)))


def greedy_path(risks: Sequence[ArrayLike], costs: Sequence[ArrayLike]) -> Path:
    """A path through the product of the regions' grids that buys the most steps saved per risk taken.

    One joint budget for all regions: testing the points of a path in its order (:func:`fixed_sequence`) certifies
    thresholds of all regions together, at no cost for their number. Where the path leads decides what is saved, never
    whether the promise holds; but it must not depend on the units of the test, so estimate risks and costs on others.

    Args:
        risks: per region, ``(thresholds,)``: the estimated risk where only this region halts by a threshold, from the
            safest on. Risks of regions are taken to add up.
        costs: per region, ``(thresholds,)``: the estimated mean steps there, in a common unit such as layer steps.

    Returns:
        ``(points, regions)``, as for :func:`even_path`.

    Raises:
        ValueError: no regions, an empty grid, risks and costs of other sizes, or a number that is not finite.
    """
    risk = [np.asarray(r, dtype=np.float64) for r in risks]
    cost = [np.asarray(c, dtype=np.float64) for c in costs]
    if [r.shape for r in risk] != [c.shape for c in cost] or any(r.ndim != 1 for r in risk):
        raise ValueError("a risk and a cost for each threshold of each region are expected, as two lists of vectors")
    if not all(np.isfinite(values).all() for values in (*risk, *cost)):
        raise ValueError("an estimated risk or cost is not finite")
    sizes = [len(r) for r in risk]
    _check_sizes(sizes)

    def price(at: list[int], region: int) -> float:
        """Risk per step saved on the best way ahead: a costly threshold must not hide a cheap one behind it."""
        here = at[region]
        saved = cost[region][here] - cost[region][here + 1 :]
        taken = np.maximum(risk[region][here + 1 :] - risk[region][here], 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.where(saved > 0, taken / saved, np.inf).min())

    return _walk(sizes, lambda at, open_regions: min(open_regions, key=lambda region: price(at, region)))


def _walk(sizes: Sequence[int], choose: Callable[[list[int], list[int]], int]) -> Path:
    at = [0] * len(sizes)
    points = [list(at)]
    while open_regions := [region for region, size in enumerate(sizes) if at[region] + 1 < size]:
        at[choose(at, open_regions)] += 1
        points.append(list(at))
    return np.array(points, dtype=np.int64)


def _check_sizes(sizes: Sequence[int]) -> None:
    if not sizes or min(sizes) < 1:
        raise ValueError(f"grids of {list(sizes)} thresholds: at least one region, each with at least one threshold")


def _check(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} is outside (0, 1): it is the probability that the promise fails")
