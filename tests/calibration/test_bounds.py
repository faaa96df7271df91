"""p-values and bounds against closed forms and brute force, and their validity by simulation."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haltkit.calibration.bounds import (
    betting_p_values,
    betting_upper_bounds,
    binomial_cdf,
    binomial_p_value,
    conformal_index,
    hoeffding_bentkus_p_value,
    units_needed,
)

seeds = st.integers(0, 2**31)


@given(st.integers(0, 60), st.integers(-2, 62), st.sampled_from([Fraction(1, 100), Fraction(1, 3), Fraction(9, 10)]))
def test_binomial_tail_equals_the_sum_in_exact_arithmetic(trials: int, successes: int, probability: Fraction) -> None:
    exact = sum(
        (
            math.comb(trials, i) * probability**i * (1 - probability) ** (trials - i)
            for i in range(min(successes, trials) + 1)
        ),
        Fraction(0),
    )
    assert binomial_cdf(successes, trials, float(probability)) == pytest.approx(float(exact), rel=1e-12)


def test_binomial_tail_of_many_trials_neither_underflows_nor_drifts() -> None:
    n, p = 100_000, 0.01
    middle = binomial_cdf(1000, n, p)
    assert 0.5 < middle < 0.52  # the median of Bin(n, p) is n p, and the tail includes it
    by_gamma = sum(
        math.exp(
            math.lgamma(n + 1)
            - math.lgamma(i + 1)
            - math.lgamma(n - i + 1)
            + i * math.log(p)
            + (n - i) * math.log1p(-p)
        )
        for i in range(1001)
    )
    assert middle == pytest.approx(by_gamma, rel=1e-8)
    assert binomial_cdf(0, n, p) == pytest.approx(math.exp(n * math.log1p(-p)))


@pytest.mark.parametrize(("units", "epsilon"), [(50, 0.1), (230, 0.01), (1000, 0.05)])
def test_binomial_p_value_is_valid_and_exact(units: int, epsilon: float) -> None:
    """At risk epsilon, P(p <= delta) is the largest attainable probability that is at most delta."""
    pmf = np.diff([0.0, *(binomial_cdf(k, units, epsilon) for k in range(units + 1))])
    p = np.array([binomial_p_value(k, units, epsilon) for k in range(units + 1)])
    for delta in (0.01, 0.05, 0.1, 0.5):
        rejected = pmf[p <= delta].sum()
        assert rejected <= delta + 1e-12
        following = pmf[: np.count_nonzero(p <= delta) + 1].sum()
        assert following > delta  # one more failure would break the promise


def test_hoeffding_bentkus_is_the_smaller_of_the_two_closed_forms() -> None:
    n, epsilon = 200, 0.1
    for failures in range(n + 1):
        mean = failures / n
        a = min(mean, epsilon)
        h1 = (a * math.log(a / epsilon) if a else 0.0) + (1 - a) * math.log((1 - a) / (1 - epsilon))
        expected = min(1.0, math.exp(-n * h1), math.e * binomial_cdf(failures, n, epsilon))
        assert hoeffding_bentkus_p_value(mean, n, epsilon) == pytest.approx(expected, rel=1e-9)
        assert hoeffding_bentkus_p_value(2.5 * mean, n, 2.5 * epsilon, bound=2.5) == pytest.approx(expected, rel=1e-9)


def test_hoeffding_bentkus_is_never_below_the_exact_binomial() -> None:
    for n, epsilon in [(40, 0.2), (300, 0.02), (1000, 0.3)]:
        for failures in range(n + 1):
            assert hoeffding_bentkus_p_value(failures / n, n, epsilon) >= binomial_p_value(failures, n, epsilon) - 1e-12


def wealth(x: list[float], delta: float, risk: float) -> float:
    """The bettor's largest wealth, written as the definition reads: one unit after another."""
    n, total, squares, variance, product, largest = len(x), 0.0, 0.0, 0.25, 1.0, 0.0
    for t, value in enumerate(x, 1):
        product *= 1 - min(math.sqrt(2 * math.log(1 / delta) / (n * variance)), 1) * (value - risk)
        largest = max(largest, product)
        total += value
        squares += (value - (0.5 + total) / (1 + t)) ** 2
        variance = (0.25 + squares) / (1 + t)
    return largest


@given(seeds, st.integers(1, 60), st.sampled_from([0.05, 0.2]), st.sampled_from([1.0, 0.3, 4.0]))
def test_betting_bound_is_the_root_of_the_wealth(seed: int, units: int, delta: float, bound: float) -> None:
    x = np.random.default_rng(seed).beta(0.3, 2, units)
    upper = float(betting_upper_bounds(bound * x, delta, bound)) / bound
    if upper < 1:
        assert wealth(list(x), delta, upper) == pytest.approx(1 / delta, rel=1e-6)
    else:
        assert wealth(list(x), delta, 1.0) <= 1 / delta * (1 + 1e-6)


@given(seeds, st.integers(1, 60), st.floats(0.02, 0.98))
def test_betting_p_value_is_one_over_the_largest_wealth_and_agrees_with_the_bound(
    seed: int, units: int, epsilon: float
) -> None:
    delta = 0.1
    x = np.random.default_rng(seed).beta(0.3, 2, (units, 3))
    p, upper = betting_p_values(x, epsilon, delta), betting_upper_bounds(x, delta)
    for i in range(3):
        assert p[i] == pytest.approx(1 / max(1.0, wealth(list(x[:, i]), delta, epsilon)), rel=1e-9)
        if abs(upper[i] - epsilon) > 1e-9:
            assert (p[i] <= delta) == (upper[i] <= epsilon)


LAWS = {
    "rare full losses": lambda g, n: (g.random(n) < 0.05).astype(float),
    "many small losses": lambda g, n: g.beta(0.5, 9.5, n),
    "rare large, else small": lambda g, n: np.where(g.random(n) < 0.04, 1.0, 1 / 96),
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("units", [60, 400])
def test_p_values_at_the_boundary_are_at_most_delta_no_more_often_than_delta(law: object, units: int) -> None:
    """Risk exactly epsilon, the worst case of the hypothesis; 3 standard errors of 2,000 repetitions."""
    delta, epsilon, repetitions = 0.1, 0.05, 2000
    generator = np.random.default_rng(7)
    x = np.stack([law(generator, units) for _ in range(repetitions)], 1)
    limit = delta + 3 * math.sqrt(delta * (1 - delta) / repetitions)
    assert (betting_p_values(x, epsilon, delta) <= delta).mean() <= limit
    assert (betting_upper_bounds(x, delta) < epsilon).mean() <= limit
    bentkus = np.array([hoeffding_bentkus_p_value(float(m), units, epsilon) for m in x.mean(0)])
    assert (bentkus <= delta).mean() <= limit


def test_bounds_are_tight_enough_to_be_useful() -> None:
    """With a small variance betting certifies what the mean alone cannot."""
    x = np.full(200, 0.02)
    assert float(betting_p_values(x, 0.05, 0.1)) <= 0.1
    assert hoeffding_bentkus_p_value(0.02, 200, 0.05) == pytest.approx(0.0608, abs=0.03)
    assert float(betting_upper_bounds(x, 0.1)) < 0.04


def test_units_needed_is_the_least_number_that_certifies() -> None:
    assert units_needed(0.01, 0.1) == 230
    assert units_needed(0.01, 0.05) == 299
    for epsilon, delta, failures in itertools.product([0.01, 0.1, 0.4], [0.01, 0.2], [0, 1, 7]):
        n = units_needed(epsilon, delta, failures)
        assert binomial_p_value(failures, n, epsilon) <= delta
        assert n - 1 == failures or binomial_p_value(failures, n - 1, epsilon) > delta
    for epsilon in (0.001, 0.01):
        assert units_needed(epsilon, 0.05) == pytest.approx(math.log(20) / epsilon, rel=0.01)


@given(seeds, st.floats(0.02, 0.6))
def test_conformal_index_is_the_last_that_the_inequality_admits(seed: int, epsilon: float) -> None:
    generator = np.random.default_rng(seed)
    losses = generator.random((30, 9)) * np.linspace(0, 1, 9)
    found = conformal_index(losses, epsilon)
    admitted = []
    for k in range(9):
        risk = sum(max(row[: k + 1]) for row in losses) / 30
        if 30 * risk / 31 + 1 / 31 <= epsilon:
            admitted.append(k)
    assert found == (admitted[-1] if admitted else None)


def test_conformal_risk_control_holds_in_expectation_also_for_losses_that_fall_again() -> None:
    generator, epsilon, means = np.random.default_rng(3), 0.1, []
    for _ in range(1500):
        difficulty = generator.random((101, 1))
        losses = (difficulty < np.linspace(0, 0.5, 20)) * (generator.random((101, 20)) < 0.8)
        index = conformal_index(losses[:100].astype(float), epsilon)
        means.append(0.0 if index is None else float(losses[100, index]))
    assert np.mean(means) <= epsilon + 3 * np.std(means) / math.sqrt(len(means))
    assert np.mean(means) >= epsilon / 3  # and it is not vacuous


@pytest.mark.parametrize(
    "call",
    [
        lambda: binomial_p_value(1, 0, 0.1),
        lambda: binomial_p_value(3, 2, 0.1),
        lambda: binomial_p_value(0, 9, 1.0),
        lambda: hoeffding_bentkus_p_value(0.1, 9, 0.0),
        lambda: hoeffding_bentkus_p_value(1.1, 9, 0.1),
        lambda: hoeffding_bentkus_p_value(math.nan, 9, 0.1),
        lambda: betting_p_values([0.1, 1.2], 0.1, 0.1),
        lambda: betting_p_values([0.1, -0.2], 0.1, 0.1),
        lambda: betting_p_values([], 0.1, 0.1),
        lambda: betting_p_values([0.5], 1.5, 0.1),
        lambda: betting_upper_bounds([0.5], 0.0),
        lambda: betting_upper_bounds([0.5], 0.1, bound=math.inf),
        lambda: conformal_index([0.5], 0.1),
        lambda: conformal_index([[0.5]], 1.1),
        lambda: units_needed(0.0, 0.1),
        lambda: units_needed(0.1, 1.0),
        lambda: units_needed(0.1, 0.1, -1),
    ],
)
def test_impossible_arguments_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        call()
