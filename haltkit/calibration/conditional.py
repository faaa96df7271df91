"""A threshold per step, so that what halts early is as safe as what halts late (arXiv 2402.00857).

A risk averaged over all units may hide a large one among the few that halt early. Here the risk among the units that
have halted by step t is controlled for every t at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from haltkit.calibration.bounds import checked_losses, units_needed
from haltkit.calibration.calibrate import data_hash, p_values
from haltkit.calibration.certificate import Certificate, Method
from haltkit.calibration.testing import fixed_sequence

__all__ = ["StepThresholds", "calibrate_by_step", "halting_steps"]

Floats = NDArray[np.float64]
NEVER = -math.inf


@dataclass(frozen=True)
class StepThresholds:
    """A threshold per step and what is certified about them.

    Attributes:
        thresholds: ``thresholds[k - 1]`` is compared with the score of step k; None: nothing halts there.
        certificate: ``chosen`` is None where nothing may halt before full depth.
    """

    thresholds: tuple[float | None, ...]
    certificate: Certificate


def halting_steps(scores: Floats, thresholds: Floats) -> NDArray[np.int64]:
    """The first step whose score is below its threshold, ``(units, K)`` and ``(K,)`` to ``(units,)``; K + 1 if none."""
    below = scores < thresholds
    steps: NDArray[np.int64] = np.where(below.any(1), below.argmax(1) + 1, scores.shape[1] + 1)
    return steps


def calibrate_by_step(
    scores: ArrayLike,
    losses: ArrayLike,
    grid: ArrayLike,
    *,
    epsilon: float,
    delta: float = 0.1,
    method: Method = "binomial",
    risk: str = "loss",
    unit: str = "instance",
    loss_bound: float = 1.0,
    screening: float = 0.1,
    seed: int = 0,
) -> StepThresholds:
    """Thresholds per step such that, for every t, the risk among the units that halt by step t is at most epsilon.

    The units are divided at random. The first half proposes a threshold per step, from step 1 on: the most eager one at
    which the risk among what halts by then looks safe. The second half tests the proposal from the last step down:
    the configuration that halts from step t on, for t = K, K - 1, ..., passes if for each s >= t the risk among what
    halts by s has a p-value of at most delta; the first that fails ends the walk. Losses are independent given who
    halts, so a p-value over those who halt by s holds whatever their number.

    Args:
        scores: ``(units, K)``: a policy's scores at steps 1 to K before the last; a unit halts where its score is below
            the step's threshold, and runs to full depth, at loss 0, where none is.
        losses: ``(units, K)``: the loss of halting there.
        grid: thresholds to choose from, any order.
        screening: the first half's tests use ``delta * screening``, so that what it proposes also passes the second
            half more often than not. It does not enter the promise.

    Returns:
        the thresholds with a certificate for ``settings`` "halt from step t on", in the order of the test. Its
        ``empirical_risk`` is over those that halt at all.

    Raises:
        ValueError: shapes that do not fit, fewer than two units, no thresholds, ``conformal`` as method, or what
            :func:`~haltkit.calibration.calibrate.calibrate` refuses.
    """
    seen = np.asarray(scores, dtype=np.float64)
    cost = checked_losses(losses, loss_bound)
    taus = np.sort(np.asarray(grid, dtype=np.float64).reshape(-1))
    if seen.ndim != 2 or seen.shape != cost.shape or not seen.shape[1]:
        raise ValueError(f"scores {seen.shape} and losses {cost.shape}: both are (units, K), with at least one step")
    if len(seen) < 2 or not len(taus):
        raise ValueError(f"{len(seen)} units and {len(taus)} thresholds: at least two and one are needed")
    if not 0 < epsilon < loss_bound or not 0 < delta < 1 or not 0 < screening <= 1:
        raise ValueError(
            f"epsilon={epsilon}, delta={delta}, screening={screening}: in (0, {loss_bound}), (0, 1) and (0, 1]"
        )
    if method == "conformal":
        raise ValueError("conformal gives no p-values: use binomial, hoeffding-bentkus or betting")

    def p_of(values: Floats, level: float) -> float:
        if not len(values):
            return 1.0
        return float(next(iter(p_values(values[:, None], epsilon, level, method, loss_bound))))

    order = np.random.default_rng(seed).permutation(len(seen))
    first, second = order[: len(seen) // 2], order[len(seen) // 2 :]
    strict = delta * screening
    proposed = _propose(seen[first], cost[first], taus, lambda values: p_of(values, strict) <= strict)
    depth = seen.shape[1]

    def worst(start: int) -> float:
        """The largest p-value over s of "the risk among what halts by s", for halting from step ``start`` on."""
        active = np.where(np.arange(1, depth + 1) >= start, proposed, NEVER)
        steps = halting_steps(seen[second], active)
        largest = 0.0
        for s in range(start, depth + 1):
            if (active[:s] > NEVER).any():  # before that nothing can halt, and there is nothing to control
                by = np.flatnonzero(steps <= s)
                largest = max(largest, p_of(cost[second[by], steps[by] - 1], delta))
        return largest

    passed = fixed_sequence((worst(start) for start in range(depth, 0, -1)), delta)
    certified = np.where(np.arange(1, depth + 1) > depth - passed, proposed, NEVER)
    steps = halting_steps(seen[second], certified)
    halted = np.flatnonzero(steps <= depth)
    useful = bool((certified > NEVER).any())
    needed = units_needed(epsilon / loss_bound, delta)
    if useful:
        promise = (
            f"With probability at least {1 - delta:.6g} over the draw of the {len(second)} units of the test, for "
            f"every step t by which some {unit} can halt, the expected {risk} among those of the same distribution "
            f"that halt by step t is at most {epsilon:g}."
        )
        reason = f"{passed} of {depth} configurations are certified"
    else:
        promise = f"Nothing is promised: run every {unit} to full depth."
        reason = (
            f"no threshold is safe among what halts by its step: at least {needed} of the {len(second)} units of the "
            "test have to halt by a step before anything can be said about it"
        )
    certificate = Certificate(
        risk=risk,
        epsilon=epsilon,
        delta=delta,
        method=method,
        correction="by-step",
        promise=promise,
        unit=unit,
        units=len(second),
        units_needed=needed,
        settings=tuple(f"halt from step {start} on" for start in range(depth, 0, -1)),
        chosen=passed - 1 if useful else None,
        empirical_risk=float(cost[second[halted], steps[halted] - 1].mean()) if useful else None,
        p_value=worst(depth - passed + 1) if useful else None,
        bound=None,
        loss_bound=loss_bound,
        data_hash=data_hash(np.stack([seen, cost])),
        seed=seed,
        reason=reason,
    )
    return StepThresholds(tuple(float(tau) if tau > NEVER else None for tau in certified), certificate)


def _propose(scores: Floats, losses: Floats, taus: Floats, safe: Callable[[Floats], bool]) -> Floats:
    """From step 1 on, the largest threshold at which the risk among what halts by that step looks safe."""
    depth = scores.shape[1]
    proposed = np.full(depth, NEVER)
    halted = np.zeros(0)  # losses of what halted at earlier steps
    open_ = np.arange(len(scores))
    for k in range(depth):
        for tau in taus[::-1]:
            now = open_[scores[open_, k] < tau]
            if not len(now):
                break  # a smaller threshold halts nobody either
            by_now = np.concatenate([halted, losses[now, k]])
            if safe(by_now):
                proposed[k], halted = tau, by_now
                open_ = np.setdiff1d(open_, now)
                break
    return proposed
