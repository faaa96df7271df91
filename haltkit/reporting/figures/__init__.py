"""The papers' figures from a diagnosis, drawn with matplotlib, legible in grey.

Each function takes a diagnosis and returns a figure, or None where the diagnosis lacks what it shows;
:func:`draw_figures` writes those that there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from haltkit.diagnostics.diagnosis import Diagnosis
from haltkit.files import atomic_path
from haltkit.reporting.figures import mechanistic, two_scale
from haltkit.reporting.frontier import plot_comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "POLICIES_FIGURE", "draw_figures"]

FIGURES: Mapping[str, Callable[[Diagnosis], Figure | None]] = {
    "figure1-paths": two_scale.paths,
    "figure2-dlr": two_scale.dlr,
    "figure3-steps": two_scale.steps,
    "figure5-angles": two_scale.angles,
    "curvature": two_scale.bends,
    "limits": mechanistic.limits,
    "layers": mechanistic.layers,
    "attention": mechanistic.attention,
    "stages": mechanistic.stages,
    "cycles": mechanistic.cycles,
    "grid": mechanistic.grid,
}
POLICIES_FIGURE = "figure4-policies"


def draw_figures(diagnosis: Diagnosis, folder: Path, fmt: str = "png") -> list[Path]:
    """Write every figure that the diagnosis has data for; figures of a partial diagnosis say so.

    Args:
        folder: must be there.
        fmt: png, svg or pdf.

    Returns:
        the files written.
    """
    written = []
    for name, draw in FIGURES.items():
        figure = draw(diagnosis)
        if figure is None:
            continue
        if diagnosis.partial:
            figure.suptitle("partial: interrupted", fontsize=9, color="0.4")
        path = folder / f"{name}.{fmt}"
        with atomic_path(path) as partial:
            figure.savefig(partial, dpi=120, format=fmt)
        written.append(path)
    if diagnosis.comparison is not None:
        path = folder / f"{POLICIES_FIGURE}.{fmt}"
        with atomic_path(path) as partial:
            plot_comparison(diagnosis.comparison, partial, "policies against fixed depths", fmt)
        written.append(path)
    return written
