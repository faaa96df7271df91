"""The monitor's false alarms, its power, and what it costs."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from haltkit.calibration import Monitor
from haltkit.calibration.monitor import checks_until_alarm, spot_check_cost

pytestmark = pytest.mark.slow


def watch(losses: np.ndarray, epsilon: float, delta: float) -> int | None:
    """The check at which the alarm goes off, or None."""
    monitor = Monitor(epsilon, delta)
    for i, loss in enumerate(losses, 1):
        monitor = monitor.update(float(loss))
        if monitor.alarm:
            return i
    return None


def test_false_alarms_are_no_more_frequent_than_delta_however_often_one_looks() -> None:
    """Risk exactly epsilon, looked at after each of 1,000 checks; 3 standard errors of 200 runs."""
    generator, delta, runs = np.random.default_rng(0), 0.1, 200
    alarms = sum(watch(generator.random(1000) < 0.05, 0.05, delta) is not None for _ in range(runs))
    assert alarms / runs <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)


def test_a_drifting_risk_that_never_exceeds_epsilon_raises_no_more_alarms() -> None:
    generator, runs = np.random.default_rng(1), 100
    risk = 0.05 * (1 + np.sin(np.arange(1000) / 50)) / 2
    alarms = sum(watch(generator.random(1000) < risk, 0.05, 0.1) is not None for _ in range(runs))
    assert alarms / runs <= 0.1


@pytest.mark.parametrize("factor", [2, 4, 10])
def test_a_risk_above_epsilon_raises_the_alarm_about_when_it_is_expected(factor: int) -> None:
    generator, epsilon, delta = np.random.default_rng(2), 0.02, 0.05
    expected = checks_until_alarm(factor * epsilon, epsilon, delta)
    found = [watch(generator.random(int(20 * expected)) < factor * epsilon, epsilon, delta) for _ in range(40)]
    assert None not in found
    assert expected / 3 < float(np.median(found)) < 1.5 * expected


def test_the_wealth_is_the_mean_over_bets_of_the_product_of_gains() -> None:
    epsilon, losses = 0.1, [0.0, 0.5, 1.0, 0.0, 0.2]
    monitor = Monitor(epsilon, 0.05)
    for loss in losses:
        monitor = monitor.update(loss)
    bets = [0.5 / epsilon * 2.0**-i for i in range(12)]
    assert monitor.wealth == pytest.approx(sum(math.prod(1 + b * (x - epsilon) for x in losses) for b in bets) / 12)
    assert monitor.risk == pytest.approx(0.34)
    assert monitor.checks == 5


def test_an_alarm_stays_on_and_a_monitor_can_be_stored() -> None:
    monitor = Monitor(0.01, 0.05)
    for _ in range(3):
        monitor = monitor.update(1.0)
    assert monitor.alarm
    assert monitor.p_value <= 0.05
    for _ in range(200):
        monitor = monitor.update(0.0)
    assert monitor.wealth < 1
    assert monitor.alarm
    assert Monitor(**asdict(monitor)) == monitor


def test_losses_in_another_range_give_the_same_wealth() -> None:
    one, other = Monitor(0.1, 0.05), Monitor(0.4, 0.05, loss_bound=4.0)
    for loss in (0.0, 0.25, 1.0):
        one, other = one.update(loss), other.update(4 * loss)
    assert one.log_wealths == pytest.approx(other.log_wealths)


def test_spot_checks_cost_the_steps_beyond_the_halt() -> None:
    generator = np.random.default_rng(3)
    steps, checked = generator.integers(1, 13, 100_000), generator.random(100_000) < 0.05
    taken = np.where(checked, 12, steps)
    assert taken.mean() - steps.mean() == pytest.approx(spot_check_cost(0.05, steps.mean(), 12), rel=0.05)
    assert checks_until_alarm(0.01, 0.01, 0.05) == math.inf


@pytest.mark.parametrize(
    "call",
    [
        lambda: Monitor(0.0, 0.1),
        lambda: Monitor(0.1, 1.0),
        lambda: Monitor(0.1, 0.1, loss_bound=0.05),
        lambda: Monitor(0.1, 0.1).update(1.5),
        lambda: Monitor(0.1, 0.1).update(math.nan),
        lambda: Monitor(0.1, 0.1).risk,
        lambda: spot_check_cost(1.1, 3, 12),
        lambda: spot_check_cost(0.1, 13, 12),
    ],
)
def test_a_monitor_refuses_what_makes_no_sense(call: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        call()
