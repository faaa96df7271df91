"""What a sample of losses says about the risk: p-values and upper confidence bounds that hold for any distribution.

A *loss* is a number in ``[0, bound]`` per unit (a sequence or an instance, never a token), the *risk* is its
expectation, and ``epsilon`` is the risk that a user accepts. Units are independent draws from one distribution. Every
p-value tests the hypothesis "the risk is above epsilon": where the hypothesis is true, the p-value is at most ``delta``
with probability at most ``delta``, for every ``delta``, every number of units and every distribution of the losses.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "betting_p_values",
    "betting_upper_bounds",
    "binomial_cdf",
    "binomial_p_value",
    "checked_losses",
    "conformal_index",
    "hoeffding_bentkus_p_value",
    "relative_entropy",
    "units_needed",
]

Floats = NDArray[np.float64]
_ROUNDING = float(np.finfo(np.float64).eps) / 2
_HALVINGS = 60  # of a bracket in [0, 1]: more than a float64 resolves


def checked_losses(losses: ArrayLike, bound: float = 1.0) -> Floats:
    """Losses as float64, unchanged in shape.

    Raises:
        ValueError: ``bound`` is not positive and finite; a loss is NaN or outside ``[0, bound]``.
    """
    if not 0 < bound < math.inf:
        raise ValueError(f"bound={bound}: the largest possible loss must be positive and finite")
    values = np.asarray(losses, dtype=np.float64)
    wrong = ~((values >= 0) & (values <= bound))
    if wrong.any():
        raise ValueError(
            f"a loss of {values[wrong][0]} is outside [0, {bound}]: the bounds hold for losses in a known range; cut "
            "the loss to the range, or name the largest possible loss with bound="
        )
    return values


def binomial_cdf(successes: int, trials: int, probability: float) -> float:
    """``P(Bin(trials, probability) <= successes)``, summed exactly term by term in logarithms.

    The relative error is about ``trials`` roundings of float64 (1e-11 for 100,000 trials).

    Raises:
        ValueError: ``trials`` is negative or ``probability`` is outside (0, 1).
    """
    if trials < 0 or not 0 < probability < 1:
        raise ValueError(f"{trials} trials with probability {probability}: at least 0 trials, in (0, 1)")
    if successes < 0:
        return 0.0
    if successes >= trials:
        return 1.0
    i = np.arange(1, successes + 1, dtype=np.float64)
    choose = np.concatenate([[0.0], np.cumsum(np.log((trials - i + 1) / i))])
    count = np.arange(successes + 1)
    terms = choose + count * math.log(probability) + (trials - count) * math.log1p(-probability)
    largest = float(terms.max())
    return min(1.0, math.exp(largest) * math.fsum(np.exp(terms - largest)))


def binomial_p_value(failures: int, units: int, epsilon: float) -> float:
    """The exact p-value of a loss that is 0 or 1: ``P(Bin(units, epsilon) <= failures)``.

    It promises what the module says, and no p-value that depends on the number of failures alone is smaller. Clopper
    and Pearson (1934); used for risk control in arXiv 2101.02703, Section 3.

    Raises:
        ValueError: no units, ``failures`` outside ``[0, units]``, or ``epsilon`` outside (0, 1).
    """
    _check_units(units)
    if not 0 <= failures <= units:
        raise ValueError(f"{failures} failures among {units} units: between 0 and {units} are possible")
    return binomial_cdf(failures, units, epsilon)


def hoeffding_bentkus_p_value(risk: float, units: int, epsilon: float, bound: float = 1.0) -> float:
    """The smaller of Hoeffding's and Bentkus' tail bounds for the mean of ``units`` losses in ``[0, bound]``.

    With ``R = risk / bound``, ``e = epsilon / bound`` and ``h1(a, b) = a ln(a/b) + (1-a) ln((1-a)/(1-b))``::

        p = min( exp(-n h1(min(R, e), e)),  exp(1) * P(Bin(n, e) <= ceil(n R)),  1 )

    It promises what the module says. It uses the mean alone, so it does not profit from a small variance; use
    :func:`betting_p_values` where losses are not all 0 or ``bound``. arXiv 2101.02703, Eq. 6, and arXiv 2110.01052,
    Proposition 3.

    Args:
        risk: the mean of the losses.

    Raises:
        ValueError: no units, ``risk`` outside ``[0, bound]``, or ``epsilon`` outside ``(0, bound)``.
    """
    _check_units(units)
    checked_losses(risk, bound)
    mean, level = risk / bound, epsilon / bound
    if not 0 < level < 1:
        raise ValueError(f"epsilon={epsilon} is outside (0, {bound})")
    hoeffding = math.exp(-units * relative_entropy(min(mean, level), level))
    total = units * mean * (1 - 4 * _ROUNDING)  # a mean of whole numbers, times their count, misses one by a rounding
    bentkus = math.e * binomial_cdf(math.ceil(total), units, level)
    return min(1.0, hoeffding, bentkus)


def relative_entropy(a: float, b: float) -> float:
    """``h1(a, b)`` of :func:`hoeffding_bentkus_p_value`: of a coin with chance ``a`` to one with chance ``b``."""
    first = a * math.log(a / b) if a > 0 else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)


def betting_p_values(losses: ArrayLike, epsilon: float, delta: float, bound: float = 1.0) -> Floats:
    """p-values by betting: one over the largest wealth of a bettor who bets that the risk is below epsilon.

    With ``x_t`` the losses over ``bound`` in their order and ``e = epsilon / bound``, the bettor's wealth after ``t``
    units is ``W_t = prod_{i <= t} (1 - nu_i (x_i - e))`` with

        nu_t = min( sqrt(2 ln(1/delta) / (n s2_{t-1})), 1 ),
        mu_t = (1/2 + sum_{i<=t} x_i) / (1 + t),  s2_t = (1/4 + sum_{i<=t} (x_i - mu_i)^2) / (1 + t),  s2_0 = 1/4.

    Each bet is fixed before its loss is seen, so the wealth is a nonnegative supermartingale where the risk is above
    epsilon, and by Ville's inequality ``1 / max_t W_t`` is a p-value with the module's promise. Waudby-Smith and Ramdas
    (arXiv 2010.09686); in this form arXiv 2101.02703, Section 3.1.3. ``p <= delta`` says the same as "the bound of
    :func:`betting_upper_bounds` is at most epsilon".

    Args:
        losses: ``(units,)`` or ``(units, settings)``, in an order that does not depend on the losses: shuffle units
            that were collected in some order.
        delta: the level at which the p-value will be used; it sizes the bets. The p-value holds at any level.

    Returns:
        one per setting, ``(settings,)``; ``()`` for losses ``(units,)``.
    """
    x, bets = _bets(losses, delta, bound)
    level = epsilon / bound
    if not 0 < level < 1:
        raise ValueError(f"epsilon={epsilon} is outside (0, {bound})")
    return np.exp(-np.maximum(_largest_log_wealth(x, bets, level), 0.0))


def betting_upper_bounds(losses: ArrayLike, delta: float, bound: float = 1.0) -> Floats:
    """Upper confidence bounds by betting: the root in R of ``max_t prod_{i<=t} (1 - nu_i (x_i - R)) = 1 / delta``.

    The bets are those of :func:`betting_p_values`, scaled by ``bound``. For each setting by itself, the risk is at most
    the bound with probability at least ``1 - delta``; nothing is promised about the largest or the smallest of several.
    Waudby-Smith and Ramdas (arXiv 2010.09686); in this form arXiv 2101.02703, Section 3.1.3.

    Returns:
        one per setting, ``(settings,)`` or ``()``, rounded up by less than 1e-15 ``bound``; ``bound`` where the losses
        rule out nothing.
    """
    x, bets = _bets(losses, delta, bound)
    low, high = np.zeros(x.shape[1:]), np.ones(x.shape[1:])
    target = math.log(1 / delta)
    for _ in range(_HALVINGS):  # the wealth grows with R, factor by factor
        middle = (low + high) / 2
        reached = _largest_log_wealth(x, bets, middle) >= target
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return high * bound


def _bets(losses: ArrayLike, delta: float, bound: float) -> tuple[Floats, Floats]:
    x = checked_losses(losses, bound) / bound
    if x.ndim not in (1, 2):
        raise ValueError(f"losses of shape {x.shape}: (units,) or (units, settings) is expected")
    units = len(x)
    _check_units(units)
    _check_delta(delta)
    t = np.arange(1, units + 1, dtype=np.float64).reshape(-1, *[1] * (x.ndim - 1))
    mean = (0.5 + np.cumsum(x, 0)) / (1 + t)
    variance = (0.25 + np.cumsum((x - mean) ** 2, 0)) / (1 + t)
    before = np.concatenate([np.full_like(variance[:1], 0.25), variance[:-1]])
    return x, np.minimum(np.sqrt(2 * math.log(1 / delta) / (units * before)), 1.0)


def _largest_log_wealth(x: Floats, bets: Floats, level: Floats | float) -> Floats:
    with np.errstate(divide="ignore"):  # a bet of everything may lose everything
        largest: Floats = np.cumsum(np.log1p(-bets * (x - level)), 0).max(0)
    return largest


def conformal_index(losses: ArrayLike, epsilon: float, bound: float = 1.0) -> int | None:
    """Conformal risk control: the last setting whose mean loss is at most ``((n + 1) epsilon - bound) / n``.

    It promises an *expectation*: over the draw of the ``n`` units and of one new unit, the mean loss of the new unit at
    the chosen setting is at most epsilon. It does not promise that the risk of the setting found today is at most
    epsilon; the risk may be above in about half of all calibrations. Units need only be exchangeable. arXiv 2208.02814,
    Theorem 1, for a loss that never falls from one setting to the next; each unit's loss is replaced by its running
    maximum over the settings before, which never falls and is never smaller than the loss.

    Args:
        losses: ``(units, settings)``, settings from the safest to the most eager.

    Returns:
        the index, or None where not even the safest setting qualifies: run full depth, whose loss is 0 by definition.
    """
    values = checked_losses(losses, bound)
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"losses of shape {values.shape}: (units, settings) is expected, with at least one setting")
    units = len(values)
    _check_units(units)
    if not 0 < epsilon < bound:
        raise ValueError(f"epsilon={epsilon} is outside (0, {bound})")
    risks = np.maximum.accumulate(values, 1).mean(0)
    passed = np.flatnonzero(risks <= ((units + 1) * epsilon - bound) / units)
    return int(passed[-1]) if len(passed) else None


def units_needed(epsilon: float, delta: float, failures: int = 0) -> int:
    """How many units it takes to show a risk of at most epsilon, if ``failures`` of them have the full loss.

    The least ``n`` with ``P(Bin(n, epsilon) <= failures) <= delta``: for no failure ``ln(delta) / ln(1 - epsilon)``,
    about ``ln(1 / delta) / epsilon``. With fewer units no exact test of a binary loss can certify, whatever they show.

    Args:
        epsilon: a share of the loss' bound, in (0, 1).

    Raises:
        ValueError: epsilon or delta outside (0, 1), or a negative number of failures.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon={epsilon} is outside (0, 1)")
    _check_delta(delta)
    if failures < 0:
        raise ValueError(f"{failures} failures: at least 0 are possible")
    low = failures  # that few units can always fail as often: never enough
    high = max(failures + 1, math.ceil(math.log(delta) / math.log1p(-epsilon)))
    while binomial_cdf(failures, high, epsilon) > delta:
        low, high = high, 2 * high
    while high - low > 1:  # the tail falls with the number of units
        middle = (low + high) // 2
        enough = binomial_cdf(failures, middle, epsilon) <= delta
        low, high = (low, middle) if enough else (middle, high)
    return high


def _check_units(units: int) -> None:
    if units < 1:
        raise ValueError("no units: a risk cannot be judged without a single loss")


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} is outside (0, 1): it is the probability that the promise fails")
