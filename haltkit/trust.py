"""Code that a file names is imported only where the user has allowed it.

What a user types, ``pkg.mod:Class`` in a spec or ``pkg.mod:function`` as a model, is imported. What stands in a file
that somebody may have handed over, such as a card or a checkpoint's config, is not, unless the user says so: by
``haltkit --allow-code COMMAND ...``, or within :func:`allow_code`. A class that the process has registered already
needs no import and no permission.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["CodeRefused", "allow_code", "check_import", "reading"]

_FILE: ContextVar[str | None] = ContextVar("file", default=None)
_ALLOWED: ContextVar[bool] = ContextVar("allowed", default=False)


class CodeRefused(ValueError):
    """A file names code that the user has not allowed to be imported."""


@contextmanager
def allow_code(allowed: bool = True) -> Iterator[None]:
    """Within the block, files that are read may name code, which is imported. Only for files that you trust."""
    token = _ALLOWED.set(allowed or _ALLOWED.get())
    try:
        yield
    finally:
        _ALLOWED.reset(token)


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Within the block, what is looked up stands in this file, which is named in the error."""
    token = _FILE.set(file)
    try:
        yield
    finally:
        _FILE.reset(token)


def check_import(place: str) -> None:
    """Called before a module is imported because a text names it.

    Raises:
        CodeRefused: the text stands in a file, and code from files is not allowed.
    """
    file = _FILE.get()
    if file is not None and not _ALLOWED.get():
        raise CodeRefused(
            f"{file} names code of its own, {place}: if you trust it, say haltkit --allow-code COMMAND ..., or "
            "haltkit.allow_code() in a program"
        )
