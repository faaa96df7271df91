"""``haltkit report``: an HTML page of what ``haltkit diagnose`` found, or the claims of several models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from haltkit.cli.options import JsonPath
from haltkit.cli.terminal import check_writable, make_console, progress, say, write_results

if TYPE_CHECKING:
    from haltkit.diagnostics import Diagnosis


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="Folder written by 'haltkit diagnose'; of several, their claims side by side."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The page (.html), or the table of several (.md). [default: DIR/report.html, or the terminal]",
            show_default=False,
        ),
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Make one HTML page that opens from disk: trade-off, paths, signals, claims, and the text by steps taken.

    Of several folders, make a table of the papers' claims instead, with a column per model.
    """
    from haltkit.files import write_text

    json_path = check_writable(json_path)
    console = make_console(json_path)
    with progress("reading"):
        found = [_read(folder) for folder in folders]
    models = [
        {"folder": str(at), "model": one.name, "heading": one.heading, "claims": one.claims}
        for at, one in zip(folders, found, strict=True)
    ]
    if len(found) > 1:
        from haltkit.diagnostics.claims import claims_by_model

        table = claims_by_model(_columns(folders, found))
        if out is None:
            say(console, table.removesuffix("\n"))
        else:
            write_text(check_writable(out, ("md",)), table)
            say(console, f"claims: {out}")
        write_results(console, json_path, {"models": models})
        return
    path = check_writable(out or folders[0] / "report.html", ("html",))

    from haltkit.reporting.report import render_page

    with progress("drawing the page"):
        write_text(path, render_page(found[0]))
    size = path.stat().st_size
    say(console, f"page: {path} ({size / 1e6:.1f} MB)")
    write_results(console, json_path, {"page": str(path), "bytes": size, "models": models})


def _columns(folders: list[Path], found: list[Diagnosis]) -> dict[str, Diagnosis]:
    """The diagnoses by their headings: the model's name, and the folder's too where several are of one name."""
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ValueError(f"{str(twice)!r} is given twice: give each folder once, and one alone for its page")
    names = [one.name for one in found]
    headings = [name if names.count(name) == 1 else f"{name} ({at})" for name, at in zip(names, folders, strict=True)]
    return dict(zip(headings, found, strict=True))


def _read(folder: Path) -> Diagnosis:
    from haltkit.diagnostics import Diagnosis
    from haltkit.diagnostics.diagnosis import RESULTS_FILE

    source = folder / RESULTS_FILE
    if not source.is_file():
        raise ValueError(f"{str(folder)!r} has no {RESULTS_FILE}: make it with 'haltkit diagnose --out {folder}'")
    return Diagnosis.load(source)
