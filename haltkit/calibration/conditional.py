"""A threshold per step, so that what halts early is as safe as what halts late (arXiv 2402.00857).

A risk averaged over all units may hide a large one among the few that halt early. Here the risk among the rows that
have halted by step t is controlled for every t at once. A unit has one row where it halts as one. Where its rows halt
one by one, as tokens do, the risk among rows is what they lose in all over how many they are, both in expectation over
units; the unit of the test is still the whole sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from haltkit.calibration.bounds import checked_losses
from haltkit.calibration.calibrate import data_hash, least_units, p_values
from haltkit.calibration.certificate import Certificate, Method
from haltkit.calibration.testing import fixed_sequence

__all__ = ["NEVER", "Asked", "StepThresholds", "calibrate_by_step", "evidence", "halting_steps", "propose"]

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]
NEVER = -math.inf
SCREENING = 0.1


@dataclass(frozen=True)
class StepThresholds:
    """A threshold per step and what is certified about them.

    Attributes:
        thresholds: ``thresholds[k - 1]`` is compared with the score of step k; None: nothing halts there.
        certificate: ``chosen`` is None where nothing may halt before full depth.
    """

    thresholds: tuple[float | None, ...]
    certificate: Certificate


@dataclass(frozen=True)
class Asked:
    """What a certificate by step is asked to promise, and how; the fields are those of a certificate.

    Raises:
        ValueError: epsilon or delta outside their range, or ``conformal`` as method, which gives no p-values.
    """

    epsilon: float
    delta: float
    method: Method = "binomial"
    risk: str = "loss"
    unit: str = "instance"
    loss_bound: float = 1.0
    seed: int = 0
    loss: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < self.loss_bound or not 0 < self.delta < 1:
            raise ValueError(f"epsilon={self.epsilon}, delta={self.delta}: in (0, {self.loss_bound}) and (0, 1)")
        if self.method == "conformal":
            raise ValueError("conformal gives no p-values, which thresholds by step need: use another method")

    def p_value(self, steps: Steps, losses: Floats, by: int, share: float = 1.0) -> float:
        """For "the risk among what has halted by step ``by`` is above epsilon", at a share of delta; 1 of nothing."""
        values = evidence(steps, losses, by, self.epsilon, self.loss_bound)
        if not len(values):
            return 1.0
        level = self.delta * share
        return float(next(iter(p_values(values[:, None], self.epsilon, level, self.method, self.loss_bound))))

    def worst(self, steps: Steps, losses: Floats, first: int, last: int) -> float:
        """The largest p-value over the steps from ``first``, at which something can halt, to ``last``."""
        return max(self.p_value(steps, losses, by) for by in range(first, last + 1))

    def certificate(
        self, tested: Sequence[str], passed: int, steps: Steps, losses: Floats, worst: float, last: int
    ) -> Certificate:
        """The certificate of thresholds of which the first ``passed`` configurations passed.

        Args:
            tested: labels of the configurations, in the order of the test.
            passed: how many of them passed.
            steps, losses: ``(units, rows)`` under the last that passed; of the first one where none did.
            worst: its largest p-value.
            last: the last step before full depth.
        """
        units, rows = steps.shape
        needed = least_units(self.epsilon, self.delta, self.method, self.loss_bound)
        early = steps <= last
        if passed:
            among = f"those of the same distribution that halt by step t is at most {self.epsilon:g}."
            if rows > 1:
                among = (
                    f"the rows of a new {self.unit} of the same distribution that halt by step t (what they lose in "
                    f"all, over how many they are, both in expectation) is at most {self.epsilon:g}."
                )
            what = f"some {self.unit}" if rows == 1 else "some row"
            promise = (
                f"With probability at least {1 - self.delta:.6g} over the draw of the {units} units of the test, for "
                f"every step t by which {what} can halt, the expected {self.risk} among {among}"
            )
            reason = f"{passed} of {len(tested)} configurations are certified"
        else:
            promise = f"Nothing is promised: run every {self.unit} to full depth."
            reason = (
                f"no threshold is safe among what halts by its step: at least {needed} of the {units} units of the "
                "test have to halt by a step before anything can be said about it"
            )
        return Certificate(
            risk=self.risk,
            epsilon=self.epsilon,
            delta=self.delta,
            method=self.method,
            correction="by-step",
            promise=promise,
            unit=self.unit,
            units=units,
            units_needed=needed,
            settings=tuple(tested),
            chosen=passed - 1 if passed else None,
            empirical_risk=float(losses[early].mean()) if passed and early.any() else None,
            p_value=worst if passed else None,
            bound=None,
            loss_bound=self.loss_bound,
            data_hash=data_hash(np.stack([steps.astype(np.float64), losses])),
            seed=self.seed,
            reason=reason,
            loss=self.loss,
        )


def evidence(steps: Steps, losses: Floats, by: int, epsilon: float, loss_bound: float = 1.0) -> Floats:
    """One number per unit whose expectation is at most epsilon where the risk among what has halted by a step is.

    Of units with one row, the losses of those that have halted: given who halts, these are independent, so a test of
    them holds whatever their number. Of units with ``R`` rows, ``epsilon + mean over rows of [halted] (loss -
    epsilon)``, in ``[0, B]`` like the losses: it is above epsilon in expectation exactly where the rows that have
    halted lose more than epsilon times their number, in expectation.

    Args:
        steps: at which each row halted, ``(units, R)``.
        losses: of each row there, ``(units, R)``.
        by: the step.
        epsilon: the accepted risk.
        loss_bound: the largest possible loss, ``B``.
    """
    halted = steps <= by
    if steps.shape[1] == 1:
        return losses[halted]
    found: Floats = epsilon + np.where(halted, losses - epsilon, 0.0).mean(1)
    return np.clip(found, 0.0, loss_bound)  # a rounding outside


def halting_steps(scores: Floats, thresholds: Floats) -> Steps:
    """The first step whose score is below its threshold, ``(..., K)`` and ``(K,)`` to ``(...)``; K + 1 if none."""
    below = scores < thresholds
    steps: Steps = np.where(below.any(-1), below.argmax(-1) + 1, scores.shape[-1] + 1)
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
    screening: float = SCREENING,
    seed: int = 0,
) -> StepThresholds:
    """Thresholds per step such that, for every t, the risk among the units that halt by step t is at most epsilon.

    The units are divided at random. The first half proposes a threshold per step (:func:`propose`). The second half
    tests the proposal from the last step down: the configuration that halts from step t on, for t = K, K - 1, ...,
    passes if for each s >= t the risk among what halts by s has a p-value of at most delta; the first that fails ends
    the walk. On a model, :func:`haltkit.comparison.certify.certify` does it with live runs.

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
    asked = Asked(epsilon, delta, method, risk, unit, loss_bound, seed)
    order = np.random.default_rng(seed).permutation(len(seen))
    first, second = order[: len(seen) // 2], order[len(seen) // 2 :]
    proposed = propose(seen[first, None], cost[first, None], taus, asked, screening)
    depth = seen.shape[1]

    starts, found, passed = _walk(seen[second, None], cost[second, None], proposed, asked)
    first_step = starts[passed - 1] if passed else depth + 1
    steps, lost, worst = found[max(passed, 1) - 1]
    certificate = asked.certificate(
        [f"halt from step {start} on" for start in starts] or ["halt nothing"], passed, steps, lost, worst, depth
    )
    certified = np.where(np.arange(1, depth + 1) >= first_step, proposed, NEVER)
    return StepThresholds(tuple(float(tau) if tau > NEVER else None for tau in certified), certificate)


def _walk(
    scores: Floats, losses: Floats, proposed: Floats, asked: Asked
) -> tuple[list[int], list[tuple[Steps, Floats, float]], int]:
    """The test of a proposal: from which step on each configuration halts, what it does, and how many pass.

    What each of them does is steps and losses ``(units, R)`` and its largest p-value; of none, where nothing halts.
    """
    depth = scores.shape[-1]
    found: list[tuple[Steps, Floats, float]] = []

    def tests() -> Iterator[float]:
        for start in starts:
            steps = halting_steps(scores, np.where(np.arange(1, depth + 1) >= start, proposed, NEVER))
            there = np.take_along_axis(losses, np.minimum(steps, depth)[..., None] - 1, -1)[..., 0]
            lost = np.where(steps <= depth, there, 0.0)
            found.append((steps, lost, asked.worst(steps, lost, start, depth)))
            yield found[-1][2]

    starts = [step for step in range(depth, 0, -1) if proposed[step - 1] > NEVER]  # elsewhere nothing new can halt
    passed = fixed_sequence(tests(), asked.delta)
    return starts, found or [(np.full(scores.shape[:-1], depth + 1), np.zeros(scores.shape[:-1]), 1.0)], passed


def propose(scores: Floats, losses: Floats, taus: Floats, asked: Asked, screening: float = SCREENING) -> Floats:
    """A threshold per step: from step 1 on, the most eager at which the risk among what halts by then looks safe.

    Args:
        scores: ``(units, R, K)`` at the steps before the last.
        losses: ``(units, R, K)`` of halting there.
        taus: to choose from, ascending.
        asked: what is to be promised.
        screening: share of delta that the tests use.

    Returns:
        ``(K,)``; :data:`NEVER` where no threshold looks safe.

    Raises:
        ValueError: screening outside (0, 1].
    """
    if not 0 < screening <= 1:
        raise ValueError(f"screening={screening} is outside (0, 1]: it is a share of delta")
    depth = scores.shape[-1]
    proposed = np.full(depth, NEVER)
    steps = np.full(scores.shape[:-1], depth + 1)
    lost = np.zeros(scores.shape[:-1])
    for k in range(depth):
        for tau in taus[::-1]:
            now = (steps > depth) & (scores[..., k] < tau)
            if not now.any():
                break  # a smaller threshold halts nobody either
            tried = np.where(now, k + 1, steps), np.where(now, losses[..., k], lost)
            if asked.p_value(*tried, k + 1, screening) <= asked.delta * screening:
                proposed[k], (steps, lost) = tau, tried
                break
    return proposed
