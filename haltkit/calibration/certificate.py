"""A certificate: what was calibrated, by which method, on which data, and exactly what follows from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from haltkit.files import parse_json

__all__ = ["Certificate", "Correction", "Method"]

Method = Literal["binomial", "hoeffding-bentkus", "betting", "conformal"]
Correction = Literal["fixed-sequence", "bonferroni", "holm", "by-step", "none"]
_KIND, _VERSION = "haltkit certificate", 1


@dataclass(frozen=True)
class Certificate:
    """What a calibration found. Also a calibration that certified nothing gives one, which says why.

    Attributes:
        risk: what the loss measures, such as ``disagreement``: the share of a sequence's tokens whose top prediction is
            another than at full depth.
        epsilon: the risk that the user accepts, in the loss' unit.
        delta: the probability, over the draw of the units, that the promise fails; None for ``conformal``, which
            promises an expectation.
        method: how a setting's losses become evidence.
        correction: how the number of settings is paid for; ``none`` for ``conformal``, whose theorem covers them.
        promise: what is guaranteed, in words.
        unit: what one unit is: ``sequence``, ``instance``.
        units: how many units were used for the test.
        units_needed: with fewer units this method certifies nothing at this epsilon and delta, even if every loss is 0.
        settings: what was tested, in the order of the test: from the safest to the most eager.
        chosen: index into ``settings``; None: nothing is certified, so run full depth.
        empirical_risk: mean loss of the chosen setting.
        p_value: of the chosen setting, for the hypothesis that its risk is above epsilon; None for ``conformal``.
        bound: for ``betting`` the upper confidence bound of the chosen setting by itself; for ``conformal`` the
            adjusted risk ``(n R + loss_bound) / (n + 1)``. The promise is about epsilon, not about this number, because
            the setting was chosen on the same units.
        loss_bound: the largest possible loss.
        data_hash: SHA-256 of the losses, so that the certificate can be matched with its data.
        seed: of the order in which the units were used.
        reason: why this setting was chosen, or why none was.
        loss: which of :mod:`haltkit.calibration.losses` the losses are; empty: none of them, or not known, as in files
            of before it was said.

    Raises:
        ValueError: fields that contradict each other, as in a file that was edited, or text that cannot be printed.
    """

    risk: str
    epsilon: float
    delta: float | None
    method: Method
    correction: Correction
    promise: str
    unit: str
    units: int
    units_needed: int
    settings: tuple[str, ...]
    chosen: int | None
    empirical_risk: float | None
    p_value: float | None
    bound: float | None
    loss_bound: float
    data_hash: str
    seed: int
    reason: str
    loss: str = ""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and not text.isprintable():  # it could steer the terminal that shows it
                    raise ValueError(f"a certificate with {name}={text!r}: allowed are characters that can be printed")
        if not 0 < self.epsilon < self.loss_bound < math.inf:
            raise ValueError(f"a certificate for epsilon={self.epsilon} with losses in [0, {self.loss_bound}]")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"a certificate for delta={self.delta}: it must be in (0, 1)")
        for name, allowed in (("method", get_args(Method)), ("correction", get_args(Correction))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"a certificate by {name}={getattr(self, name)!r}: known are {', '.join(allowed)}")
        if (self.delta is None) != (self.method == "conformal"):
            raise ValueError(f"a certificate by {self.method} with delta={self.delta}: only conformal has none")
        if self.chosen is not None and not 0 <= self.chosen < len(self.settings):
            raise ValueError(f"a certificate for setting {self.chosen} of {len(self.settings)}")
        if self.certified and self.units < self.units_needed:
            raise ValueError(f"a certificate from {self.units} units, where at least {self.units_needed} are needed")

    @property
    def certified(self) -> bool:
        """Whether some setting is certified."""
        return self.chosen is not None

    @property
    def setting(self) -> str | None:
        """The certified setting, or None: run full depth."""
        return None if self.chosen is None else self.settings[self.chosen]

    @property
    def digest(self) -> str:
        """SHA-256 of all its fields: losses alone may be those of another certificate, such as where all are 0."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The certificate as JSON, indented for readers; :meth:`from_json` gives it back exactly."""
        fields = {**dataclasses.asdict(self), "settings": list(self.settings)}
        return json.dumps({"kind": _KIND, "version": _VERSION, **fields}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """The certificate that :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, not a certificate, of a later version, or with fields missing, added or of a wrong
                type.
        """
        found: dict[str, Any] = parse_json(text, "the certificate", dict)
        if found.pop("kind", None) != _KIND:
            raise ValueError("this is not a haltkit certificate: 'kind' is missing or names something else")
        version = found.pop("version", None)
        if version != _VERSION:
            raise ValueError(f"a certificate of version {version}: this haltkit reads version {_VERSION}; upgrade it")
        found.setdefault("loss", "")
        names = {field.name for field in dataclasses.fields(cls)}
        if names != set(found):
            raise ValueError(
                f"a certificate with fields missing ({', '.join(sorted(names - set(found))) or 'none'}) or unknown "
                f"({', '.join(sorted(set(found) - names)) or 'none'})"
            )
        for name, value in found.items():
            if not _fits(name, value):
                raise ValueError(f"a certificate with {name}={value!r}: this is not what haltkit writes there")
        return cls(**{**found, "settings": tuple(found["settings"])})


_WHOLE = ("units", "units_needed", "seed")
_NUMBERS = ("epsilon", "loss_bound")
_OPTIONAL = ("delta", "empirical_risk", "p_value", "bound")


def _fits(name: str, value: Any) -> bool:
    if name == "settings":
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if name in _WHOLE or name == "chosen":
        return type(value) is int or (name == "chosen" and value is None)
    if name in _NUMBERS or name in _OPTIONAL:
        number = type(value) in (int, float) and math.isfinite(value)
        return number or (name in _OPTIONAL and value is None)
    return isinstance(value, str)
