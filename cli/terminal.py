"""The console that commands print on."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from haltkit.files import check_output as check_writable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

__all__ = ["check_writable", "make_console", "passing_bar"]


def make_console() -> Console:
    """A console as wide as the terminal, or as COLUMNS says; a pipe or a file has room for every column."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit() else Console(width=140)


def passing_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """A progress bar that goes away when its work is done; none where no terminal shows it."""
    from rich.progress import Progress

    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
