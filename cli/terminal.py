"""What commands share: the console they print on and where they may write."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["check_writable", "make_console"]


def make_console() -> Console:
    """A console as wide as the terminal; a pipe or a file has room for every column."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=140)


def check_writable(path: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Refuse a place that cannot be written to before minutes are spent on measuring."""
    if path is None:
        return
    where = f"cannot write {str(path)!r}"
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{where}: there is no folder {str(path.parent)!r}")
    if path.is_dir():
        raise ValueError(f"{where}: it is a folder")
    if path.exists() and not path.is_file():
        raise ValueError(f"{where}: it is not a regular file")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError(f"{where}: permission denied")
    if suffixes and path.suffix[1:].lower() not in suffixes:
        raise ValueError(f"{where}: the name must end in .{', .'.join(suffixes)}")
