"""A table that fits the terminal: columns are left out by name, or every row becomes a block of lines."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Column", "print_grid", "print_wrapped"]

GAP = 2  # spaces between columns
NARROWEST = 20  # no line is wrapped to less


@dataclass(frozen=True)
class Column:
    """A column and what may be left out of it.

    Attributes:
        heading: one line.
        cells: of one line each, one per row.
        note: what the numbers mean, for the line below the table.
        left: aligned to the left.
        spare: what is missing where the column is left out, in the user's words; empty: it is never left out.
        instead: a narrower column that stands there then; None: nothing does.
    """

    heading: str
    cells: Sequence[str]
    note: str = ""
    left: bool = False
    spare: str = ""
    instead: Column | None = None


def print_grid(
    console: Console,
    columns: Sequence[Column],
    *,
    title: str = "",
    sparing: Sequence[str] = (),
    breaks: Collection[int] = (),
) -> None:
    """Print columns side by side, the first one being what a row is about.

    Where they do not fit, columns are left out in the order of ``sparing``, and named. Where the others do not fit
    either, every row becomes a block of lines, with all columns.

    Args:
        title: stands above.
        sparing: what may be left out (``Column.spare``).
        breaks: rows with an empty line before them.
    """
    from rich.text import Text

    kept, missing = list(columns), []
    for spare in sparing:
        at = next((i for i, column in enumerate(kept) if column.spare == spare), None)
        if at is not None and _width(kept) > console.width:
            instead = kept[at].instead
            kept[at : at + 1] = [] if instead is None else [instead]
            missing.append(spare)
    fits = _width(kept) <= console.width
    if not fits:
        kept, missing = list(columns), []
    widths = _widths(kept)
    if title:
        print_wrapped(console, title, style="italic")
    if fits:
        headings = _line([column.heading for column in kept], kept, widths)
        console.print(Text(headings, style="bold"), soft_wrap=True)
    for i in range(len(kept[0].cells)):
        if i in breaks:
            console.print()
        if fits:
            console.print(Text(_line([column.cells[i] for column in kept], kept, widths)), soft_wrap=True)
        else:
            _print_block(console, kept, i)
    notes = "; ".join(column.note for column in kept if column.note)
    if notes:
        print_wrapped(console, f"  {notes}", style="dim")
    if missing:
        print_wrapped(console, f"  not shown at this width, but by --json: {', '.join(missing)}", style="dim")


def print_wrapped(console: Console, text: str, style: str = "") -> None:
    """Print a text, whose lines that are too long go on below, indented; words are never cut."""
    from rich.text import Text

    for line in text.split("\n"):
        indent = line[: len(line) - len(line.lstrip(" "))]
        wrapped = textwrap.fill(
            line.strip(),
            max(console.width, NARROWEST),
            initial_indent=indent,
            subsequent_indent=indent + "  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        console.print(Text(wrapped, style=style), soft_wrap=True)


def _widths(columns: Sequence[Column]) -> list[int]:
    from rich.cells import cell_len

    return [max(map(cell_len, (column.heading, *column.cells))) for column in columns]


def _width(columns: Sequence[Column]) -> int:
    return sum(_widths(columns)) + GAP * (len(columns) - 1)


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    from rich.cells import cell_len

    parts = []
    for cell, column, width in zip(cells, columns, widths, strict=True):
        space = " " * (width - cell_len(cell))
        parts.append(cell + space if column.left else space + cell)
    return (" " * GAP).join(parts).rstrip()


def _print_block(console: Console, columns: Sequence[Column], row: int) -> None:
    """What the row is about, and below it heading and cell of every other column that says something."""
    from rich.cells import cell_len
    from rich.text import Text

    console.print(Text(columns[0].cells[row]), soft_wrap=True)
    pairs = [f"{column.heading} {column.cells[row]}".strip() for column in columns[1:] if column.cells[row]]
    line = ""
    for i, pair in enumerate(pairs):
        part = pair + ("," if i + 1 < len(pairs) else "")
        if line and cell_len(f"  {line} {part}") > console.width:
            console.print(Text(f"  {line}"), soft_wrap=True)
            line = part
        else:
            line = f"{line} {part}".strip()
    if line:
        console.print(Text(f"  {line}"), soft_wrap=True)
