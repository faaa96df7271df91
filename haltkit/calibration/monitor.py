"""Watching a certified setting in use: a bet against it that may be looked at after every spot check.

Now and then a unit that would halt runs on to full depth: a *spot check*. Its loss is what halting would have cost.
:class:`Monitor` bets that the risk is above epsilon; the wealth grows only if it is. At whatever moment one looks, and
however often, the alarm is false with probability at most ``delta`` over the whole life of the monitor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

__all__ = ["Monitor", "checks_until_alarm", "spot_check_cost"]

# Shares of the largest possible bet. The wealth is the mean over them, so whichever is best for the risk that comes
# is followed but for a factor of their number: 12 of them cost ln(12) = 2.5 nats at most, spread over all checks.
_BETS = tuple(float(2.0**-i) for i in range(12))


@dataclass(frozen=True)
class Monitor:
    """An anytime-valid test of "the risk is at most epsilon", fed by spot checks.

    The wealth after checks ``x_1 .. x_t`` is the mean over bets ``b`` of ``prod_i (1 + b (x_i - epsilon))``. Where the
    expected loss of every check, given the past, is at most epsilon, this is a nonnegative supermartingale that starts
    at 1; by Ville's inequality it ever reaches ``1 / delta`` with probability at most ``delta``. Nothing else is
    assumed: the units may drift. Waudby-Smith and Ramdas (arXiv 2010.09686).

    A value: :meth:`update` returns the next monitor, and the fields can be stored between processes::

        monitor = Monitor(epsilon=0.01, delta=0.05)
        monitor = monitor.update(loss)
        if monitor.alarm: ...

    Args:
        epsilon: the certified risk, in ``(0, loss_bound)``.
        delta: the accepted probability of a false alarm, ever.
        loss_bound: the largest possible loss.
        checks: how many spot checks were seen.
        total: the sum of their losses.
        log_wealths: of each bet.
        peak: the logarithm of the largest wealth so far: an alarm stays on.
    """

    epsilon: float
    delta: float
    loss_bound: float = 1.0
    checks: int = 0
    total: float = 0.0
    log_wealths: tuple[float, ...] = (0.0,) * len(_BETS)
    peak: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.loss_bound < math.inf or not 0 < self.epsilon < self.loss_bound:
            raise ValueError(f"epsilon={self.epsilon} is outside (0, {self.loss_bound}), the range of the loss")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta={self.delta} is outside (0, 1): it is the probability of a false alarm")
        if len(self.log_wealths) != len(_BETS):
            raise ValueError(f"{len(self.log_wealths)} wealths, where a monitor has {len(_BETS)}")
        if not all(map(math.isfinite, (*self.log_wealths, self.peak))) or self.peak < 0:
            raise ValueError("wealths of a monitor are finite, and the largest so far is at least 1, the stake")
        if not 0 <= self.total <= self.checks * self.loss_bound * (1 + 1e-9):
            raise ValueError(f"{self.checks} spot checks cannot have lost {self.total}: at most {self.loss_bound} each")

    def update(self, loss: float) -> Monitor:
        """The monitor after one more spot check.

        Args:
            loss: of halting, for a unit picked at random among all, before its loss was known.

        Raises:
            ValueError: a loss outside ``[0, loss_bound]``.
        """
        x = float(loss)
        if not 0 <= x <= self.loss_bound:
            raise ValueError(f"a loss of {x} is outside [0, {self.loss_bound}]: cut it to the range")
        # The largest bet keeps the wealth above zero whatever comes: 1 - (1 / epsilon) epsilon / 2 = 1 / 2.
        gains = (math.log1p(0.5 * b / self.epsilon * (x - self.epsilon)) for b in _BETS)
        wealths = tuple(w + g for w, g in zip(self.log_wealths, gains, strict=True))
        peak = max(self.peak, _log_mean(wealths))
        return replace(self, checks=self.checks + 1, total=self.total + x, log_wealths=wealths, peak=peak)

    @property
    def wealth(self) -> float:
        """What a stake of 1 has become: evidence against "the risk is at most epsilon"."""
        return math.exp(min(_log_mean(self.log_wealths), 700.0))

    @property
    def p_value(self) -> float:
        """Of "the risk is at most epsilon", valid at every moment: one over the largest wealth so far."""
        return math.exp(-self.peak)

    @property
    def alarm(self) -> bool:
        """Whether the wealth has ever reached ``1 / delta``: the certified risk is no longer kept."""
        return self.peak >= -math.log(self.delta)

    @property
    def risk(self) -> float:
        """Mean loss over the spot checks.

        Raises:
            ValueError: there was none: a run without spot checks says nothing about the risk.
        """
        if not self.checks:
            raise ValueError("no spot checks were made, so nothing is known about the risk: let some units run on")
        return self.total / self.checks

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Between which bounds the risk is, at this level, if it stayed the same over all spot checks.

        Valid at every moment, however often one looks. The bounds are where a mixture of bets on every other risk q,
        ``prod_i (q / r)^x_i ((1 - q) / (1 - r))^(1 - x_i)`` for losses in [0, 1] with mean r, weighted by the
        arcsine law, reaches ``1 / (1 - level)``: for losses of 0 and 1 it is the ratio of likelihoods, for others it is
        no larger in expectation, since it is convex in x. Robbins (1970).

        Raises:
            ValueError: a level outside (0, 1), or no spot checks.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level} is outside (0, 1)")
        mean = min(1.0, self.risk / self.loss_bound)
        won, count = mean * self.checks, self.checks
        mixed = math.lgamma(won + 0.5) + math.lgamma(count - won + 0.5) - math.lgamma(count + 1) - math.log(math.pi)

        def excluded(r: float) -> bool:
            fits = (won * math.log(r) if won else 0.0) + ((count - won) * math.log1p(-r) if won < count else 0.0)
            return mixed - fits >= -math.log1p(-level)

        low = _edge(excluded, 0.0, mean) if mean > 0 else 0.0
        high = _edge(excluded, 1.0, mean) if mean < 1 else 1.0
        return low * self.loss_bound, high * self.loss_bound


def _edge(excluded: Callable[[float], bool], outside: float, inside: float) -> float:
    """The outer end of what is not excluded, to float64's precision; ``inside`` is not excluded."""
    for _ in range(60):
        middle = (outside + inside) / 2
        if middle in (0.0, 1.0) or excluded(middle):
            outside = middle
        else:
            inside = middle
    return outside


def _log_mean(logs: tuple[float, ...]) -> float:
    largest = max(logs)
    return largest + math.log(sum(math.exp(value - largest) for value in logs) / len(logs))


def spot_check_cost(rate: float, mean_steps: float, full_depth: float, *, again: bool = False) -> float:
    """Steps that spot checks add per unit, on average: ``rate * (full_depth - mean_steps)``.

    A unit that runs on from where it would have halted takes only the steps beyond that. This is the run at full depth
    only where all rows that see each other halt together: otherwise the others have read rows that had halted, and the
    unit must run again from its beginning, which costs ``rate * full_depth``.

    Args:
        rate: the share of units that are checked, in [0, 1].
        mean_steps: steps of a unit that halts.
        full_depth: steps of a unit that does not.
        again: whether units run again, as under :func:`haltkit.watch`.

    Raises:
        ValueError: a rate outside [0, 1], or ``mean_steps`` outside ``[0, full_depth]``.
    """
    if not 0 <= rate <= 1 or not 0 <= mean_steps <= full_depth:
        raise ValueError(f"a share of {rate} and {mean_steps} of {full_depth} steps: [0, 1] and [0, full depth]")
    return rate * (full_depth if again else full_depth - mean_steps)


def checks_until_alarm(risk: float, epsilon: float, delta: float, loss_bound: float = 1.0) -> float:
    """About how many spot checks it takes until the alarm, if a loss of ``loss_bound`` comes at this risk.

    ``ln(bets / delta)`` over the growth per check of the best bet in the monitor's list; infinite where no bet grows.
    An estimate, not a promise.
    """
    rise = loss_bound * 0.5 / epsilon * np.array(_BETS)
    share = risk / loss_bound
    growth = share * np.log1p(rise * (1 - epsilon / loss_bound)) + (1 - share) * np.log1p(-0.5 * np.array(_BETS))
    best = float(growth.max())
    return math.log(len(_BETS) / delta) / best if best > 0 else math.inf
