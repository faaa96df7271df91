"""Writing files so that a reader sees the old one or the new one, never half of either."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["atomic_folder", "atomic_path", "partial_path", "settle", "sweep", "write_json"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_path(path: Path) -> Path:
    """Where what will be ``path`` is written until it is complete."""
    return path.with_name(f".{path.name}.partial")


def _retired_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.retired")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; it takes ``path``'s place only if the block succeeds."""
    path = path.resolve()  # a link keeps pointing at what it did
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; it appears as ``path`` only if the block succeeds. An old ``path`` is replaced.

    Where the system can exchange two names at once (Linux), there is no moment without ``path``. Where it cannot,
    two renames do it, and :func:`settle` puts right what a kill between them leaves.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    settle(path)
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for written in partial.rglob("*"):
            _sync(written)
        _sync(partial)
        if not path.exists():
            os.replace(partial, path)
        elif not _exchange(partial, path):
            retired = _retired_path(path)
            os.replace(path, retired)
            os.replace(partial, path)
            shutil.rmtree(retired)
        _sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def settle(path: Path) -> None:
    """Put right what a kill in the middle of replacing ``path`` left, where names cannot be exchanged at once."""
    retired = _retired_path(path)
    if not retired.exists():
        return
    if path.exists():
        shutil.rmtree(retired)
    else:
        os.replace(retired, path)


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left half-written in ``folder``. Nobody else may be writing there."""
    for left in [*folder.glob(".*.partial")]:
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _exchange(a: Path, b: Path) -> bool:
    """Let two names change places in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, with a final newline. NaN is refused: it is not JSON."""
    text = json.dumps(value, indent=1, allow_nan=False)
    with atomic_path(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
