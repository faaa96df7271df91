"""The console that commands print on, where their results go as JSON, and how they show that they are at work."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from haltkit.files import check_output as check_writable
from haltkit.files import is_stdout, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

    from haltkit.standing import Standing

P = ParamSpec("P")
T = TypeVar("T")

__all__ = [
    "check_writable",
    "make_console",
    "passing_bar",
    "progress",
    "say",
    "say_standing",
    "starting",
    "tell",
    "write_results",
]


def make_console(json_path: Path | None = None) -> Console:
    """A console as wide as the terminal, or as COLUMNS says; a pipe or a file has room for every column.

    It prints nothing where standard output is for JSON, which is what ``json_path`` then says.
    """
    from rich.console import Console

    wide = not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdigit()
    return Console(width=140 if wide else None, quiet=json_path is not None and is_stdout(json_path))


def say(console: Console, line: str = "") -> None:
    """Print a line as it stands, neither wrapped nor coloured, unless the console prints nothing."""
    if not console.quiet:
        print(line)  # rich's own print would write into a progress line on standard error


def tell(console: Console, line: str) -> None:
    """Print prose: in a terminal a line that is too long goes on below, indented, and words are not cut."""
    from haltkit.cli.grid import print_wrapped

    if console.is_terminal:
        print_wrapped(console, line)
    else:
        say(console, line)


def say_standing(console: Console, name: str, standing: Standing | str) -> None:
    """Print what is promised of a card's policy, or what it is used without, where there is something to say."""
    if str(standing):
        say(console, f"{name}: {standing}")


def write_results(console: Console, json_path: Path | None, results: Any) -> None:
    """What ``--json`` asks for: the results as JSON, and a line that says where they are.

    Args:
        results: plain values and dataclasses of them; numbers that are not finite become null.

    Raises:
        FileError: the file cannot be written any more (see :func:`check_writable`).
    """
    if json_path is not None:
        write_json(json_path, _plain(results))
        say(console, f"results: {json_path}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        value = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def passing_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """A progress bar that goes away when its work is done; none where no terminal shows it."""
    from rich.progress import Progress

    hidden = not console.is_terminal or os.environ.get("RANK", "0") != "0"  # of torchrun's processes one talks for all
    # What a user's own code prints meanwhile stays above the bar, unless it goes to a file.
    return Progress(*columns, console=console, transient=True, disable=hidden, redirect_stdout=sys.stdout.isatty())


@contextmanager
def progress(doing: str) -> Iterator[Callable[..., None]]:
    """A line on standard error while something takes its time; none where standard error is no terminal.

    Args:
        doing: what takes time.

    Yields:
        A function with the arguments of rich's ``Progress.update``: ``description``, ``completed``, ``total``,
        ``advance``.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    words = TextColumn("{task.description}", markup=False)
    with passing_bar(Console(stderr=True), words, BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        yield partial(bar.update, bar.add_task(doing, total=None))


def starting(command: Callable[P, T]) -> Callable[P, T]:
    """The command, with a line on standard error while torch is imported, which takes seconds."""

    @wraps(command)
    def run(*arguments: P.args, **options: P.kwargs) -> T:
        if "torch" not in sys.modules:
            with progress("starting"):
                import_module("torch")
        return command(*arguments, **options)

    return run
