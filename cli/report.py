"""``haltkit report``: one HTML page of what ``haltkit diagnose`` found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder written by 'haltkit diagnose'.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page. [default: DIR/report.html]", show_default=False)
    ] = None,
) -> None:
    """Make one HTML page that opens from disk: trade-off, paths, signals, claims, and the text by steps taken."""
    from haltkit.diagnostics import Diagnosis
    from haltkit.diagnostics.diagnosis import RESULTS_FILE
    from haltkit.files import check_output, write_text

    source = folder / RESULTS_FILE
    if not source.is_file():
        raise ValueError(f"{str(folder)!r} has no {RESULTS_FILE}: make it with 'haltkit diagnose --out {folder}'")
    diagnosis = Diagnosis.load(source)
    path = check_output(out or folder / "report.html", ("html",))

    from haltkit.reporting.report import render_page

    write_text(path, render_page(diagnosis))
    print(f"page: {path} ({path.stat().st_size / 1e6:.1f} MB)")
