"""Numbers as JSON has them, and back: what is not finite is null there, and NaN where it is calculated with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

__all__ = ["Numbers", "finite", "number", "numbers", "rounded"]

# A series of numbers of which some may not be defined.
Numbers = tuple[float | None, ...]


def rounded(value: Tensor | float, digits: int = 5) -> float | None:
    """A number with ``digits`` significant digits; None if it is not finite."""
    found = finite(float(value))
    return None if found is None else float(f"{found:.{digits}g}")


def finite(value: float | None) -> float | None:
    """The number itself; None if it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def number(value: float | None) -> float:
    """The number itself; NaN if there is none."""
    return math.nan if value is None else float(value)


def numbers(values: Sequence[float | None]) -> list[float]:
    """The numbers themselves, NaN where there is none."""
    return [number(value) for value in values]
