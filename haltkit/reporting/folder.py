"""A diagnosis as a folder: results as JSON, the claims as a table, and the figures."""

from __future__ import annotations

from pathlib import Path

from haltkit.comparison import Comparison
from haltkit.diagnostics import load_comparison
from haltkit.diagnostics.claims import claims_table
from haltkit.diagnostics.diagnosis import RESULTS_FILE, Diagnosis
from haltkit.files import check_output, write_text
from haltkit.reporting.figures import draw_figures

__all__ = ["CLAIMS_FILE", "COMPARISON_FILE", "check_folder", "write_diagnosis"]

CLAIMS_FILE, COMPARISON_FILE = "claims.md", "compare.json"


def check_folder(folder: Path) -> Comparison | None:
    """Check, before anything is run, that a diagnosis can be written to a folder.

    Returns:
        the comparison that ``haltkit compare --json`` wrote there beforehand; None if there is none.

    Raises:
        ValueError: not a folder, a file in it that cannot be replaced, or a damaged comparison.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder: choose another one for the diagnosis")
    if folder.exists():
        for name in (RESULTS_FILE, CLAIMS_FILE):
            check_output(folder / name)
    path = folder / COMPARISON_FILE
    return load_comparison(path) if path.exists() else None


def write_diagnosis(diagnosis: Diagnosis, folder: Path, fmt: str = "png") -> list[Path]:
    """Write the results, the claims and the figures of a diagnosis.

    :func:`haltkit.reporting.report.render_page` makes the page.

    Args:
        folder: made if it is not there.
        fmt: of the figures: png, svg or pdf.

    Returns:
        the figures written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    diagnosis.save(folder / RESULTS_FILE)
    write_text(folder / CLAIMS_FILE, claims_table(diagnosis))
    return draw_figures(diagnosis, folder, fmt)
