"""One writer per folder: a lock that ends with the process that took it."""

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

__all__ = ["LOCK_FILE", "FolderInUse", "hold"]

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


def _make(folder: Path) -> list[Path]:
    """Make a folder with its parents; those that were missing, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _lock(folder: Path, what: str) -> int | None:
    try:
        import fcntl
    except ImportError:
        return None
    path = folder / LOCK_FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            try:
                if error.errno in _UNSUPPORTED:
                    path.unlink(missing_ok=True)
                    return None
                if not isinstance(error, BlockingIOError):
                    raise
                raise FolderInUse(
                    f"{str(folder)!r} is in use by {_holder(descriptor)}: wait until that has ended, stop it, or "
                    "choose another folder"
                ) from None
            finally:
                os.close(descriptor)
        # The holder before may have removed the file between our opening and our locking it: then it is not the one
        # that others will find here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    _descriptors.add(descriptor)
    about = {"what": what, "process": os.getpid(), "machine": socket.gethostname(), "since": time.strftime("%F %T")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(about).encode(), 0)
    return descriptor


def _holder(descriptor: int) -> str:
    """Who wrote a lock file, as far as it can be read: the holder may be about to write it."""
    try:
        about = json.loads(os.pread(descriptor, 4096, 0))
        return f"{about['what']} (process {about['process']} on {about['machine']}, since {about['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
