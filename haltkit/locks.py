"""One writer at a time: locks that end with the process that took them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["LOCK_FILE", "FolderInUse", "hold", "taking_turns"]

LOCK_FILE = ".haltkit-lock"
# What file systems answer that know no locks.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
# Locks of this process: a forked child inherits the descriptors and would keep the locks of a parent that has died.
_descriptors: set[int] = set()


class FolderInUse(ValueError):
    """Another process is writing in a folder."""


def _let_go_in_child() -> None:
    for descriptor in _descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def hold(folder: Path, what: str) -> Iterator[bool]:
    """Lock a folder for one writer; the folder is made, and removed again if it is empty at the end.

    The operating system ends the lock when the process ends, however that comes about, so a lock that can be seen
    belongs to a running process. On Linux it also works between machines that share the folder over NFS (unless
    mounted with ``nolock`` or ``local_lock``) or SMB; on Lustre it needs the mount option ``flock``.

    Args:
        what: the name of the writer in the message to other writers: ``"haltkit train"``.

    Yields:
        Whether the folder is locked: False where the file system or the system (Windows) has no such locks.

    Raises:
        FolderInUse: another process has the lock; the message names that process.
        ValueError: something other than a folder is there.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder: {what} needs one of its own")
    made = _make(folder)
    try:
        descriptor = _lock(folder, what)
        try:
            yield descriptor is not None
        finally:
            if descriptor is not None:
                (folder / LOCK_FILE).unlink(missing_ok=True)  # while held: see _lock
                _descriptors.discard(descriptor)
                os.close(descriptor)
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # something has been written there
                path.rmdir()


@contextmanager
def taking_turns(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Lock a file, which is made if it is not there, so that all who do the same come one after the other.

    The block may rename or remove the file: the next one makes another.

    Args:
        wait: until nobody else has the lock.

    Yields:
        Whether it is this one's turn, which it also is where there are no such locks (see :func:`hold`).
    """
    try:
        descriptor = _locked(path, wait)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        if descriptor is not None:
            _descriptors.discard(descriptor)
            os.close(descriptor)


def _make(folder: Path) -> list[Path]:
    """Make a folder with its parents; those that were missing, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _lock(folder: Path, what: str) -> int | None:
    path = folder / LOCK_FILE
    try:
        descriptor = _locked(path, wait=False)
    except BlockingIOError:
        raise FolderInUse(
            f"{str(folder)!r} is in use by {_holder(path)}: wait until that has ended, stop it, or choose another "
            "folder"
        ) from None
    if descriptor is None:
        path.unlink(missing_ok=True)
        return None
    about = {"what": what, "process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%F %T")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(about).encode(), 0)
    return descriptor


def _locked(path: Path, wait: bool) -> int | None:
    """A descriptor that holds the lock of the file at ``path``, which is made; None where there are no such locks.

    Raises:
        BlockingIOError: another one has the lock, and it was not waited for.
    """
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:  # also Ctrl-C while it waits
            os.close(descriptor)
            if isinstance(error, OSError) and error.errno in _UNSUPPORTED:
                return None
            raise
        # The holder before may have removed the file between our opening and our locking it: then it is not the one
        # that others will find here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                _descriptors.add(descriptor)
                return descriptor
        os.close(descriptor)


def _holder(path: Path) -> str:
    """Who wrote a lock file, as far as it can be read: the holder may be about to write or to remove it."""
    try:
        about = json.loads(path.read_bytes())
        return f"{about['what']} (process {about['process']} on {about['machine']}, since {about['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
