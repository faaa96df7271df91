"""Calibrate: from the losses of each unit under each setting to the most eager setting that can be promised."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from haltkit.calibration import bounds
from haltkit.calibration.certificate import Certificate, Correction, Method
from haltkit.calibration.testing import bonferroni, fixed_sequence, holm

__all__ = ["calibrate", "data_hash", "least_units", "p_values"]

Floats = NDArray[np.float64]
ROUNDING = 1e-9  # of the loss' bound: a mean that is this close to epsilon cannot be told from it


def calibrate(
    losses: ArrayLike | Tensor,
    *,
    epsilon: float,
    delta: float = 0.1,
    method: Method = "betting",
    correction: Correction = "fixed-sequence",
    risk: str = "loss",
    unit: str = "sequence",
    settings: Sequence[str] | None = None,
    cost: ArrayLike | Tensor | None = None,
    loss_bound: float = 1.0,
    seed: int = 0,
    loss: str = "",
) -> Certificate:
    """Certify the most eager setting whose risk is at most epsilon.

    Args:
        losses: ``(units, settings)``, in ``[0, loss_bound]``, against full depth or against labels; of halted
            runs, not of replayed ones, where rows see each other. One row per sequence or instance: average over the
            tokens of a text first, which are not independent.
        epsilon: the accepted risk, in ``(0, loss_bound)``.
        delta: the accepted probability that the promise fails, in (0, 1); not used by ``conformal``.
        method: ``betting`` fits every loss; ``binomial`` is exact where a loss is 0 or ``loss_bound`` and nothing
            between; ``hoeffding-bentkus`` does not depend on the order of the units; ``conformal`` promises an
            expectation only.
        correction: ``fixed-sequence`` needs settings in an order fixed before these losses were seen, from the safest
            to the most eager; ``bonferroni`` and ``holm`` need no order and pay for each setting.
        risk: what the loss measures, for the record.
        unit: what one row of ``losses`` is, for the record.
        settings: a label per setting, such as its policy's spec; their indices if not given.
        cost: ``(settings,)``, such as mean steps: the cheapest certified setting is chosen. Otherwise the last one.
        loss_bound: the largest possible loss.
        seed: of the order in which ``betting`` uses the units; the other methods do not depend on order.
        loss: which of :mod:`haltkit.calibration.losses` these are, so that spot checks can make more of them; empty:
            none of them.

    Returns:
        a certificate; where nothing can be certified, one without a chosen setting that says how many units are
        needed, or that the safest setting's risk is too large.

    Raises:
        ValueError: epsilon or delta outside their range, no units or settings, losses outside ``[0, loss_bound]``,
            losses that ``binomial`` does not fit, or labels or costs of another number than settings.
    """
    values = _array(losses)
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"losses of shape {values.shape}: (units, settings) is expected, with at least one setting")
    values = bounds.checked_losses(values, loss_bound)
    units, count = values.shape
    if not units:
        raise ValueError("no units to calibrate on: a split without units certifies nothing")
    labels = tuple(map(str, range(count))) if settings is None else tuple(settings)
    costs = None if cost is None else _array(cost)
    if len(labels) != count or (costs is not None and costs.shape != (count,)):
        raise ValueError(f"{count} settings need as many labels and costs, one each")
    if not 0 < epsilon < loss_bound:
        raise ValueError(f"epsilon={epsilon} is outside (0, {loss_bound}), the range of the loss")
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} is outside (0, 1): it is the probability that the promise fails")
    if correction not in ("fixed-sequence", "bonferroni", "holm"):
        raise ValueError(f"correction={correction!r}: allowed are fixed-sequence, bonferroni, holm")
    share = delta / count if correction != "fixed-sequence" and method != "conformal" else delta
    record = partial(
        Certificate,
        risk=risk,
        epsilon=epsilon,
        delta=None if method == "conformal" else delta,
        method=method,
        correction="none" if method == "conformal" else correction,
        unit=unit,
        units=units,
        units_needed=least_units(epsilon, share, method, loss_bound),
        settings=labels,
        loss_bound=loss_bound,
        data_hash=data_hash(values),
        seed=seed,
        loss=loss,
    )
    if method == "conformal":
        return _conformal(values, epsilon, loss_bound, costs, record)
    order = np.random.default_rng(seed).permutation(units)
    p = p_values(values[order], epsilon, share, method, loss_bound)
    if correction == "fixed-sequence":
        certified = np.arange(fixed_sequence(p, delta))
    else:
        masks = bonferroni if correction == "bonferroni" else holm
        certified = np.flatnonzero(masks(list(p), delta))
    if not len(certified):
        return _nothing(values, record)
    chosen = _cheapest(certified, costs)
    column = values[order, chosen]
    bound = float(bounds.betting_upper_bounds(column, share, loss_bound)) if method == "betting" else None
    return record(
        chosen=chosen,
        empirical_risk=float(column.mean()),
        p_value=float(next(iter(p_values(column[:, None], epsilon, share, method, loss_bound)))),
        bound=bound,
        promise=f"With probability at least {1 - delta:.6g} over the draw of the {units} calibration units, the "
        f"expected {risk} of a new {unit} of the same distribution is at most {epsilon:g} under the chosen setting.",
        reason=f"{len(certified)} of {count} settings are certified; the "
        f"{'last' if costs is None else 'cheapest'} of them is chosen",
    )


def p_values(losses: Floats, epsilon: float, delta: float, method: Method, loss_bound: float) -> Iterable[float]:
    """The p-value of each setting, ``(units, settings)``, for "the risk is above epsilon"; lazily where that saves.

    1 where the mean loss is above epsilon, by any method and at any delta: a bettor's wealth may have peaked before the
    losses came, and a delta near 1 asks for less than a mean. The promise holds then, but nobody believes it.

    Raises:
        ValueError: a loss between 0 and ``loss_bound`` for ``binomial``, or an unknown method.
    """
    found = _p_values(losses, epsilon, delta, method, loss_bound)
    above = losses.mean(0) > epsilon
    return (1.0 if above[i] else p for i, p in enumerate(found))


def _p_values(losses: Floats, epsilon: float, delta: float, method: Method, loss_bound: float) -> Iterable[float]:
    units, count = losses.shape
    if method == "betting":
        return map(float, bounds.betting_p_values(losses, epsilon, delta, loss_bound))
    if method == "hoeffding-bentkus":
        means = losses.mean(0)
        return (bounds.hoeffding_bentkus_p_value(float(means[i]), units, epsilon, loss_bound) for i in range(count))
    if method == "binomial":
        if not np.isin(losses, (0.0, loss_bound)).all():
            raise ValueError(
                f"binomial fits a loss that is 0 or {loss_bound}, and some of these are between: use betting or "
                "hoeffding-bentkus"
            )
        failures = np.count_nonzero(losses, 0)
        return (bounds.binomial_p_value(int(failures[i]), units, epsilon / loss_bound) for i in range(count))
    raise ValueError(f"method={method!r}: allowed are binomial, hoeffding-bentkus, betting, conformal")


def least_units(epsilon: float, delta: float, method: Method, loss_bound: float = 1.0) -> int:
    """The least number of units with which a method can certify anything: with no loss observed.

    For ``binomial`` and ``hoeffding-bentkus`` this is :func:`~haltkit.calibration.bounds.units_needed`; ``conformal``
    needs ``loss_bound / epsilon - 1``; ``betting`` a few more than ``binomial``, while its bets grow.
    """
    if method == "conformal":
        return max(1, math.ceil(loss_bound / epsilon * (1 - 1e-15) - 1))
    exact = bounds.units_needed(epsilon / loss_bound, delta)
    if method != "betting":
        return exact

    def enough(units: int) -> bool:
        return float(bounds.betting_p_values(np.zeros(units), epsilon, delta, loss_bound)) <= delta

    low, high = exact - 1, exact
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def data_hash(losses: ArrayLike) -> str:
    """SHA-256 of losses: their shape, then their values as little-endian float64 in row order."""
    values = np.ascontiguousarray(losses, dtype="<f8")
    return hashlib.sha256(repr(values.shape).encode() + values.tobytes()).hexdigest()


def _array(values: ArrayLike | Tensor) -> Floats:
    return np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64)


def _cheapest(certified: NDArray[np.int64], costs: Floats | None) -> int:
    return int(certified[-1] if costs is None else certified[int(costs[certified].argmin())])


def _conformal(values: Floats, epsilon: float, bound: float, costs: Floats | None, record: Any) -> Certificate:
    last = bounds.conformal_index(values, epsilon, bound)
    if last is None:
        return _nothing(values, record)
    chosen = _cheapest(np.arange(last + 1), costs)
    units, adjusted = len(values), np.maximum.accumulate(values, 1)[:, chosen].sum()
    keywords = record.keywords
    certificate: Certificate = record(
        chosen=chosen,
        empirical_risk=float(values[:, chosen].mean()),
        p_value=None,
        bound=float((adjusted + bound) / (units + 1)),
        promise=f"On average over calibrations with {units} units like this one, the expected {keywords['risk']} of a "
        f"new {keywords['unit']} of the same distribution is at most {epsilon:g}, where a calibration that certifies "
        "nothing counts as no loss. This calibration by itself may be above it.",
        reason=f"{last + 1} of {values.shape[1]} settings qualify; the "
        f"{'last' if costs is None else 'cheapest'} of them is chosen",
    )
    return certificate


def _nothing(values: Floats, record: Any) -> Certificate:
    """The certificate that certifies nothing, with what it would take."""
    known = record.keywords
    units, needed, epsilon, unit = len(values), known["units_needed"], known["epsilon"], known["unit"]
    risk = float(values[:, 0].mean())
    if units < needed:
        reason = f"{units} units are too few: with no loss at all, {needed} are needed for epsilon={epsilon:g}" + (
            f" and delta={known['delta']:g}" if known["delta"] is not None else ""
        )
    elif (about := _units_at(risk, known)) is None:
        reason = (
            f"the safest setting has a mean loss of {risk:.3g}, which is not below epsilon={epsilon:g}: more units do "
            "not help, a safer setting does"
        )
    else:
        reason = (
            f"the safest setting has a mean loss of {risk:.3g}, too close to epsilon={epsilon:g} for {units} units: "
            f"about {about} are needed"
        )
    certificate: Certificate = record(
        chosen=None,
        empirical_risk=None,
        p_value=None,
        bound=None,
        promise=f"Nothing is promised: run every {unit} to full depth.",
        reason=reason,
    )
    return certificate


def _units_at(risk: float, known: dict[str, Any]) -> int | None:
    """About how many units certify a setting of this observed risk, by Hoeffding's bound; None: no number in sight."""
    bound, epsilon = float(known["loss_bound"]), float(known["epsilon"])
    delta: float | None = known["delta"]
    if epsilon - risk <= ROUNDING * bound:
        return None
    if delta is None:
        return math.ceil((bound - epsilon) / (epsilon - risk))
    exponent = bounds.relative_entropy(risk / bound, epsilon / bound)
    return math.ceil(math.log(1 / delta) / exponent) if exponent > 0 else None
