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

from haltkit.files import FileError, partial_path, sync
from haltkit.locks import taking_turns

__all__ = ["atomic_folder", "check_beside", "settle", "sweep"]

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _retired_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.retired")


def _marker(path: Path) -> Path:
    """A file that is there while ``path`` is written: what lies at the two paths above is then haltkit's own."""
    return path.with_name(f".{path.name}.writing")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; it appears as ``path`` only if the block succeeds. An old ``path`` is replaced.

    Processes that write the same folder come one after the other, and the last one's is what stays. What a killed
    writer left beside ``path`` is removed. Where the system can exchange two names at once (Linux), there is no moment
    without ``path``. Where it cannot, two renames do it, and :func:`settle` repairs the folder after a kill between
    them.

    Raises:
        FileError: see :func:`check_beside`.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    check_beside(path)  # before the marker says that what lies there is haltkit's
    partial, retired, marker = partial_path(path), _retired_path(path), _marker(path)
    with taking_turns(marker):
        marker.touch()
        sync(path.parent)
        _settle(path)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            for written in partial.rglob("*"):
                sync(written)
            sync(partial)
            if not path.exists():
                os.replace(partial, path)
            elif not _exchange(partial, path):
                os.replace(path, retired)
                os.replace(partial, path)
                shutil.rmtree(retired)
            sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if not retired.exists():  # else settle has to put it back
                marker.unlink(missing_ok=True)


def check_beside(path: Path) -> None:
    """Whether what lies where ``path`` is written, until it is complete, is what a killed writer of haltkit left.

    Raises:
        FileError: it is somebody else's.
    """
    path = path.resolve()
    for place in (partial_path(path), _retired_path(path)):
        # Looked at twice: a writer that ends in between takes its marker away after what the marker is about.
        if not _free(place) and not _marker(path).exists() and not _free(place):
            raise FileError(
                f"{str(place)!r} is there and is not haltkit's, which writes {path.name!r} there until it is complete: "
                "move it, or name another folder"
            )


def _free(place: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    try:
        return not os.path.lexists(place) or (place.is_dir() and not place.is_symlink() and not any(place.iterdir()))
    except FileNotFoundError:  # it has just gone
        return True


def settle(path: Path) -> None:
    """Finish or undo a replacement of ``path`` that a kill interrupted, where names cannot be exchanged at once.

    One that is still going on is left to its writer.
    """
    path = path.resolve()  # "." and ".." have no name of their own
    if not path.name:
        return  # the root of the file system: nothing can lie beside it
    marker = _marker(path)
    if _retired_path(path).exists() and marker.exists():  # else there is nothing, or nothing of ours
        with taking_turns(marker, wait=False) as alone:
            if alone:
                _settle(path)


def _settle(path: Path) -> None:
    """The same for the one who has the marker."""
    retired = _retired_path(path)
    if not retired.exists():
        return
    if path.exists():
        shutil.rmtree(retired)
    else:
        os.replace(retired, path)


def sweep(folder: Path) -> None:
    """Remove partial files and folders of killed writers from ``folder``, where only haltkit writes.

    No other process may be writing there.
    """
    for partial in [*folder.glob(".*.partial")]:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()
    for marker in [*folder.glob(".*.writing")]:
        if not marker.with_suffix(".retired").exists():
            marker.unlink()


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
