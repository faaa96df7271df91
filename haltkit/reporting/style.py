"""What figures share: panels, lines and markers that are told apart in grey, and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LABELS", "LINES", "MARKERS", "MODELS", "drawable", "panels", "region_title", "short_count"]

MARKERS = "osD^vP*X"
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 2)))
# The line of each model of a diagnosis.
MODELS = {"trained": "-", "untrained": ":"}
# Signals as formulas.
LABELS = {
    "step_norm": r"$\Vert d_k \Vert$",
    "cosine": r"$\cos(d_k, d_{k-1})$",
    "difference": r"$\Vert x_t - x_{t-1} \Vert$",
    "relative": r"$\Vert x_t - x^* \Vert \;/\; \Vert x^* \Vert$",
}


def panels(rows: int, columns: int, width: float = 3.4, height: float = 2.9) -> tuple[Figure, Any]:
    """A figure and its panels, ``[row][column]``, of this width and height in inches each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, width * columns), height * rows))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)  # inches: labels keep off their neighbours' ticks
    return figure, figure.subplots(rows, columns, squeeze=False)


def drawable(points: Sequence[Sequence[float | None]]) -> list[Sequence[float]]:
    """The points whose two coordinates are known: a state that is not finite has none."""
    return [[x, y] for x, y in points if x is not None and y is not None]


def short_count(tokens: float) -> str:
    """``65.5M`` or ``131k``."""
    return f"{tokens / 1e6:.3g}M" if tokens >= 1e6 else f"{tokens / 1e3:.3g}k"


def region_title(name: str, more: str = "", longest: int = 28) -> str:
    """``region NAME``; a long path keeps its end, which tells it from others."""
    shown = name if len(name) <= longest else "…" + name[1 - longest :]
    return f"region {shown}{more}"
