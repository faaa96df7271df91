"""Spot checks in use: which units are run to full depth as well, what that showed, and what it cost.

A value that can be stored between processes, so that one monitor lives as long as the setting that it watches.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from haltkit.calibration.certificate import Certificate
from haltkit.calibration.monitor import Monitor, spot_check_cost
from haltkit.files import parse_json

__all__ = ["SpotChecks"]

_KIND, _VERSION = "haltkit spot checks", 1


@dataclass(frozen=True)
class SpotChecks:
    """A monitor, the units that it has seen, and the draws that decide which ones are checked.

    Whether unit ``i`` is checked depends on ``seed`` and ``i`` alone, never on what is in it: a monitor is only valid
    for units picked at random. Make one with :meth:`of`.

    Attributes:
        monitor: of the certified risk.
        rate: the share of units that are checked, in (0, 1].
        seed: of the draws.
        certificate: the digest of the certificate that is watched, by which another one is told.
        units: how many were run.
        steps: of all of them together, under the policy: the mean over a unit's rows, added up over its regions.
        extra: steps that checked units took again to full depth, counted likewise.

    Raises:
        ValueError: a rate outside (0, 1], a negative seed, or counts that contradict each other.
    """

    monitor: Monitor
    rate: float
    seed: int = 0
    certificate: str = ""
    units: int = 0
    steps: float = 0.0
    extra: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(
                f"rate={self.rate} is outside (0, 1]: it is the share of units that are run to full depth as well, and "
                "without spot checks nothing is known about the risk"
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")
        if not 0 <= self.monitor.checks <= self.units:
            raise ValueError(f"{self.monitor.checks} spot checks of {self.units} units")
        if not all(0 <= steps < math.inf for steps in (self.steps, self.extra)):
            raise ValueError(f"steps={self.steps} and extra={self.extra}: steps are counted from 0")

    @classmethod
    def of(cls, certificate: Certificate, rate: float, seed: int = 0, delta: float | None = None) -> SpotChecks:
        """Spot checks of what a certificate promises, before any unit is run.

        Args:
            certificate: that certifies a setting.
            rate: the share of units that are checked.
            seed: of the draws.
            delta: the accepted probability of a false alarm, ever; None: the certificate's, and 0.05 where it promises
                an expectation and has none.

        Raises:
            ValueError: the certificate promises nothing, or the rate is outside (0, 1].
        """
        if not certificate.certified:
            raise ValueError(f"there is nothing to watch, for nothing is certified: {certificate.reason}")
        chosen = (0.05 if certificate.delta is None else certificate.delta) if delta is None else delta
        monitor = Monitor(certificate.epsilon, chosen, certificate.loss_bound)
        return cls(monitor, rate, seed, certificate.digest)

    def check_for(self, certificate: Certificate) -> None:
        """Whether these are spot checks of what a certificate promises.

        Raises:
            ValueError: they are of another certificate.
        """
        known = (self.certificate, self.monitor.epsilon, self.monitor.loss_bound)
        if known != (certificate.digest, certificate.epsilon, certificate.loss_bound):
            raise ValueError(
                f"these spot checks are of another certificate (epsilon {self.monitor.epsilon:g}, SHA-256 "
                f"{self.certificate[:8]}), and this one has epsilon {certificate.epsilon:g}, SHA-256 "
                f"{certificate.digest[:8]}: begin new ones"
            )

    @property
    def due(self) -> bool:
        """Whether the next unit is to be checked."""
        return bool(np.random.default_rng([self.seed, self.units]).random() < self.rate)

    def passed(self, steps: float) -> SpotChecks:
        """After a unit of so many steps that was not checked."""
        return replace(self, units=self.units + 1, steps=self.steps + steps)

    def checked(self, steps: float, full_steps: float, loss: float) -> SpotChecks:
        """After a unit that was checked: it took ``full_steps`` again, and halting it lost ``loss``."""
        return replace(self.passed(steps), extra=self.extra + full_steps, monitor=self.monitor.update(loss))

    def __str__(self) -> str:
        seen = f"{self.monitor.checks:,} of {self.units:,} units checked"
        if not self.monitor.checks:
            return f"{seen}, so nothing is known about the risk"
        found = f"mean loss {self.monitor.risk:.4g} where {self.monitor.epsilon:g} is certified"
        return f"{seen}, {found}, {'ALARM' if self.alarm else 'no alarm'} (p-value {self.monitor.p_value:.3g})"

    @property
    def alarm(self) -> bool:
        """Whether the certified risk is exceeded; it stays on."""
        return self.monitor.alarm

    @property
    def mean_steps(self) -> float:
        """Steps per unit under the policy; 0 before the first unit."""
        return self.steps / self.units if self.units else 0.0

    @property
    def cost(self) -> float:
        """Steps per unit that spot checks have added, as counted."""
        return self.extra / self.units if self.units else 0.0

    @property
    def expected_cost(self) -> float:
        """Steps per unit that spot checks add on average at this rate, by what checked units took to full depth."""
        full = self.extra / self.monitor.checks if self.monitor.checks else 0.0
        return spot_check_cost(self.rate, min(self.mean_steps, full), full, again=True)

    def to_json(self) -> str:
        """As JSON; :meth:`from_json` gives it back exactly."""
        return json.dumps({"kind": _KIND, "version": _VERSION, **dataclasses.asdict(self)}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> SpotChecks:
        """What :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, not spot checks, of a later version, or with fields missing, added or of a wrong type.
        """
        found: dict[str, Any] = parse_json(text, "what is stored of spot checks", dict)
        if found.pop("kind", None) != _KIND:
            raise ValueError("these are not haltkit's spot checks: 'kind' is missing or names something else")
        if (version := found.pop("version", None)) != _VERSION:
            raise ValueError(f"spot checks of version {version}: this haltkit reads version {_VERSION}; upgrade it")
        monitor = _read(Monitor, found.get("monitor"))
        return cls(**_fields(cls, {**found, "monitor": monitor}))


_NUMBER = (int, float)
_WHOLE = ("seed", "units", "checks")


def _read(kind: type[Monitor], values: Any) -> Monitor:
    if not isinstance(values, dict) or not isinstance(values.get("log_wealths"), list):
        raise ValueError("spot checks without a monitor: this is not what haltkit writes there")
    wealths = values["log_wealths"]
    if not all(type(one) in _NUMBER for one in wealths):
        raise ValueError("spot checks whose monitor's wealths are no numbers: this is not what haltkit writes there")
    return kind(**{**_fields(kind, values), "log_wealths": tuple(wealths)})


def _fields(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """The values, where they are those of all fields.

    Raises:
        ValueError: fields missing, unknown or of a wrong type.
    """
    names = {field.name for field in fields(kind)}
    if names != set(values):
        raise ValueError(
            f"spot checks with fields missing ({', '.join(sorted(names - set(values))) or 'none'}) or unknown "
            f"({', '.join(sorted(set(values) - names)) or 'none'})"
        )
    for name, value in values.items():
        if name in ("monitor", "log_wealths"):
            continue
        wanted: Any = str if name == "certificate" else int if name in _WHOLE else _NUMBER
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise ValueError(f"spot checks with {name}={value!r}: this is not what haltkit writes there")
    return values
