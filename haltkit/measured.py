"""What a policy was seen to cost when it was chosen, and on which machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LEVEL", "Measured"]

# Share of rows that lose nothing at the fixed depths that are named, where no other level was asked for.
LEVEL = 0.99
_NUMBER = (int, float)


@dataclass(frozen=True)
class Measured:
    """Speed and headroom as they were measured; nothing is promised of them.

    Attributes:
        machine: processor and cores, as :func:`haltkit.timing.machine` says.
        item: what a time is for, as in "ms per answer".
        ms: wall-clock milliseconds per item under the policy.
        full_ms: the same at full depth, in the same run.
        steps: mean steps under the policy, by region.
        oracle_steps: mean steps of the *stable* oracle by region; empty where they were not looked for.
        fixed_depths: the best fixed depth by region, for the share of rows in ``level``.
        level: of the fixed depths; None where there are none.

    Raises:
        ValueError: a time that is not positive and finite.
    """

    machine: str
    item: str
    ms: float
    full_ms: float
    steps: Mapping[str, float]
    oracle_steps: Mapping[str, float] = field(default_factory=dict)
    fixed_depths: Mapping[str, int] = field(default_factory=dict)
    level: float | None = None

    def __post_init__(self) -> None:
        if not all(0 < one < math.inf for one in (self.ms, self.full_ms)):
            raise ValueError(f"ms={self.ms} and full_ms={self.full_ms}: a time is positive and finite")

    def __str__(self) -> str:
        """One sentence or two, for a model card."""
        said = f"{_by_region(self.steps)} steps, {self.ms:.3g} ms/{self.item} against {self.full_ms:.3g} at full depth"
        said += f" ({self.full_ms / self.ms:.2f}x), on {self.machine}"
        if self.oracle_steps:
            said += f". An oracle takes {_by_region(self.oracle_steps)} steps"
        if self.level is not None:
            said += f"; the best fixed depth for agreement {self.level:g} is {_by_region(self.fixed_depths)}"
        return said

    def fields(self) -> dict[str, Any]:
        """As plain values, rounded to four digits; :meth:`of_fields` gives them back."""
        found: dict[str, Any] = {"machine": self.machine, "item": self.item}
        found |= {"ms": _rounded(self.ms), "full_ms": _rounded(self.full_ms)}
        found["steps"] = {name: _rounded(taken) for name, taken in self.steps.items()}
        if self.oracle_steps:
            found["oracle_steps"] = {name: _rounded(taken) for name, taken in self.oracle_steps.items()}
        if self.level is not None:
            found |= {"fixed_depths": dict(self.fixed_depths), "level": self.level}
        return found

    @classmethod
    def of_fields(cls, fields: Any) -> Measured:
        """What :meth:`fields` wrote.

        Raises:
            ValueError: fields missing or unknown, or of a wrong type.
        """
        kinds = {"machine": str, "item": str, "ms": _NUMBER, "full_ms": _NUMBER, "steps": dict}
        optional = {"oracle_steps": dict, "fixed_depths": dict, "level": _NUMBER}
        known: dict[str, Any] = {**kinds, **optional}
        wrong = not isinstance(fields, dict) or not set(kinds) <= set(fields) or bool(set(fields) - set(known))
        wrong = wrong or not all(_fits(value, known[name]) for name, value in fields.items())
        wrong = wrong or not all(
            isinstance(name, str) and _fits(value, _NUMBER)
            for part in fields.values()
            if isinstance(part, dict)
            for name, value in part.items()
        )
        if wrong:
            raise ValueError(
                f"measured has {', '.join(kinds)} and may have {', '.join(optional)}: texts, finite numbers, and such "
                "numbers by region"
            )
        return cls(**fields)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind; a number is finite, and true is none."""
    if kind is not _NUMBER:
        return isinstance(value, kind)
    return type(value) in _NUMBER and math.isfinite(value)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _by_region(steps: Mapping[str, float]) -> str:
    return " ".join(f"{taken:.4g}" for taken in steps.values())
