"""``haltkit report``: one HTML page of what ``haltkit diagnose`` found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder written by 'haltkit diagnose'.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page. [default: DIR/report.html]", show_default=False)
    ] = None,
) -> None:
    """Make one HTML page that opens from disk: trade-off, paths, signals, claims, and the text by steps taken."""
    from haltkit.cli.terminal import check_writable

    results = _results(folder)
    path = out or folder / "report.html"
    check_writable(path, ("html",))

    from haltkit.models.files import atomic_path
    from haltkit.report import render_page

    page = render_page(results)
    with atomic_path(path) as partial:
        partial.write_text(page, encoding="utf-8")
    print(f"page: {path} ({path.stat().st_size / 1e6:.1f} MB)")


def _results(folder: Path) -> dict[str, Any]:
    from haltkit.cli.diagnose import FORMAT, RESULTS

    path = folder / RESULTS
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} has no {RESULTS}: make it with 'haltkit diagnose --out {folder}'")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} was not written by this version of 'haltkit diagnose': run it again")
    return results
