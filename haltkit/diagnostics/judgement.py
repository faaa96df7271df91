"""A claim of a paper, judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["NO", "UNKNOWN", "YES", "Judgement", "Ruling", "Value", "show_values"]

Ruling = Literal["reproduced", "not reproduced", "cannot tell at this scale"]
YES: Ruling = "reproduced"
NO: Ruling = "not reproduced"
UNKNOWN: Ruling = "cannot tell at this scale"


@dataclass(frozen=True)
class Value:
    """One measured number; ``spread`` is one standard deviation over tokens, where there is one."""

    value: float | None
    spread: float | None = None


@dataclass(frozen=True)
class Judgement:
    """What became of a claim. ``measured`` and ``untrained`` map a label (a region, a boundary) to a :class:`Value`."""

    name: str
    paper: str
    text: str
    quantity: str
    rule: str
    ruling: Ruling
    measured: dict[str, Value] = field(default_factory=dict)
    untrained: dict[str, Value] = field(default_factory=dict)
    reason: str = ""


def show_values(values: Mapping[str, Value]) -> str:
    """The numbers with their labels in one line."""
    return "; ".join(
        f"{label}: {'undefined' if v.value is None else format(v.value, '.3g')}"
        + (f" ± {v.spread:.2g}" if v.spread is not None else "")
        for label, v in values.items()
    )
