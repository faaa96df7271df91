"""Folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from haltkit.files import partial_path, sync

__all__ = ["atomic_folder", "leftovers", "settle", "sweep"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _retired_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.retired")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; it appears as ``path`` only if the block succeeds. An old ``path`` is replaced.

    Where the system can exchange two names at once (Linux), there is no moment without ``path``. Where it cannot,
    two renames do it, and :func:`settle` repairs the folder after a kill between them.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    settle(path)
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for written in partial.rglob("*"):
            sync(written)
        sync(partial)
        if not path.exists():
            os.replace(partial, path)
        elif not _exchange(partial, path):
            retired = _retired_path(path)
            os.replace(path, retired)
            os.replace(partial, path)
            shutil.rmtree(retired)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def leftovers(path: Path) -> tuple[Path, Path]:
    """Where a killed writer of ``path`` may have left something, which the next one removes."""
    path = path.resolve()
    return partial_path(path), _retired_path(path)


def settle(path: Path) -> None:
    """Finish or undo a replacement of ``path`` that a kill interrupted, where names cannot be exchanged at once."""
    path = path.resolve()  # "." and ".." have no name of their own
    if not path.name:
        return  # the root of the file system: nothing can lie beside it
    retired = _retired_path(path)
    if not retired.exists():
        return
    if path.exists():
        shutil.rmtree(retired)
    else:
        os.replace(retired, path)


def sweep(folder: Path) -> None:
    """Remove partial files of killed writers from ``folder``. No other process may be writing there."""
    for partial in [*folder.glob(".*.partial")]:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()


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
