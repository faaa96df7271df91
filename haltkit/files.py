"""Files that haltkit writes and files that a user may have edited.

Writing: a reader sees the old file or the new one, never half of either; only regular files are replaced, and no folder
is made that nobody asked for. A command calls :func:`check_output` before its work and one of the writers after it.
Reading: :func:`read_json` and :func:`read_yaml` report everything that can be wrong with such a file in one line.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast, overload

from haltkit.locks import taking_turns

__all__ = [
    "FileError",
    "atomic_path",
    "check_output",
    "check_room",
    "is_stdout",
    "parse_json",
    "partial_path",
    "read_json",
    "read_yaml",
    "sync",
    "usual_mode",
    "write_json",
    "write_text",
]

T = TypeVar("T")
_KINDS = {dict: "a mapping", list: "a list", str: "a text", int: "a whole number", float: "a number"}


class FileError(ValueError):
    """A file that cannot be written where it was asked for, or whose contents are not what they should be."""


def is_stdout(path: str | Path) -> bool:
    """Whether a path means standard output, which is written as ``-``."""
    return str(path) == "-"


@overload
def check_output(path: None, suffixes: Sequence[str] = ()) -> None: ...


@overload
def check_output(path: str | Path, suffixes: Sequence[str] = ()) -> Path: ...


def check_output(path: str | Path | None, suffixes: Sequence[str] = ()) -> Path | None:
    """Refuse a place that a result cannot be written to, before minutes are spent on computing the result.

    Args:
        path: a file, new or to be replaced; ``-`` for standard output; None for no output.
        suffixes: endings that the name may have, without the dot and in lower case; none: any, and ``-``.

    Returns:
        The path to hand to :func:`write_text`, :func:`write_json` or :func:`atomic_path`; ``~`` is the user's home.

    Raises:
        FileError: the folder is missing, something other than a regular file is there, the name is too long or ends
            otherwise, or permission is denied.
    """
    if path is None:
        return None
    if is_stdout(path) and not suffixes:
        return Path(path)
    where, target = f"cannot write {str(path)!r}", _target(path)
    path = Path(path).expanduser()
    if suffixes and path.suffix[1:].lower() not in suffixes:
        raise FileError(f"{where}: the name must end in .{', .'.join(suffixes)}")
    check_room(target, where)
    return path


def check_room(target: Path, where: str) -> None:
    """Whether a file or folder of this name can be made, or replaced, in the folder that it is in, which is there.

    Args:
        target: the path, past links.
        where: the head of the message.

    Raises:
        FileError: the name is too long, or permission is denied.
    """
    longest = os.pathconf(target.parent, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if len(os.fsencode(partial_path(target).name)) > longest:
        raise FileError(f"{where}: the name is too long")
    if not os.access(target.parent, os.W_OK | os.X_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise FileError(f"{where}: permission denied, or the disk is read-only")
    _try_creating(target.parent, where)


def _try_creating(folder: Path, where: str) -> None:
    """Some folders say that they can be written to and take no new file (/proc, a full quota)."""
    trial = folder / f".haltkit-{uuid.uuid4().hex}.partial"  # where no other process is writing
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise FileError(f"{where}: {error.strerror or error}") from None


def _target(path: str | Path) -> Path:
    """The file that a path leads to, past ``~`` and links (which keep pointing at it).

    Raises:
        FileError: its folder is missing, or something other than a regular file is there.
    """
    where = f"cannot write {str(path)!r}"
    try:
        target = Path(path).expanduser().resolve()
        problem = _not_a_file(target)
    except OSError as error:
        problem = error.strerror or str(error)
    except (RuntimeError, ValueError) as error:  # links in a circle, no such user, a zero byte
        problem = str(error)
    if problem is not None:
        raise FileError(f"{where}: {problem}")
    return target


def _not_a_file(target: Path) -> str | None:
    """Why a regular file cannot be put here, None where it can."""
    if target.is_symlink():
        return "it is a link to itself"
    if target.is_dir():
        return "it is a folder"
    if not target.parent.exists():
        return f"there is no folder {str(target.parent)!r}"
    if not target.parent.is_dir():
        return f"{str(target.parent)!r} is not a folder"
    if target.exists() and not target.is_file():
        return "it is not a regular file"
    return None


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_path(path: Path) -> Path:
    """Where what will be ``path`` is written until it is complete."""
    path = path.resolve()
    return path.with_name(f".{path.name}.partial")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; it takes ``path``'s place only if the block succeeds.

    Processes that write the same file come one after the other, and the last one's is what stays.

    Raises:
        FileError: there is no folder for it, or ``path`` is something other than a regular file.
    """
    path = _target(path)
    partial = partial_path(path)
    with taking_turns(partial):
        try:
            partial.write_bytes(b"")
            yield partial
            if path.exists():
                shutil.copymode(path, partial)
            sync(partial)
            os.replace(partial, path)  # and what then is at that name is the next writer's
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Give a file that the block writes the mode that new files get here, or leave it the mode that it has.

    Some writers make a private temporary file and rename it, so that others could not read the result.
    """
    new = not path.exists()
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        yield
    except BaseException:
        if new:
            path.unlink(missing_ok=True)
        raise
    path.chmod(mode)


def write_text(path: str | Path, text: str) -> None:
    """Write text (UTF-8) atomically to a regular file, or to standard output where ``path`` is ``-``.

    Raises:
        FileError: see :func:`atomic_path`.
    """
    if is_stdout(path):
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    with atomic_path(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically, indented, with a final newline; ``-`` is standard output. NaN is not JSON and refused."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def parse_json(text: str, where: str, kind: type[T]) -> T:
    """Parse JSON text that a user may have edited.

    Args:
        where: what the text is, at the head of the message.
        kind: the type that the text must have at its top level: ``dict``, ``list``, ...

    Raises:
        FileError: not JSON (NaN and infinite numbers are not), nested too deeply, or of another kind.
    """

    def refuse(constant: str) -> float:
        raise FileError(f"{where} contains {constant}, which is not a JSON number")

    def finite(number: str) -> float:
        value = float(number)
        return value if math.isfinite(value) else refuse(number)

    try:
        value = json.loads(text, parse_constant=refuse, parse_float=finite)
    except FileError:
        raise
    except json.JSONDecodeError as error:
        raise FileError(f"{where} is not JSON: {error}") from None
    except ValueError as error:  # a whole number of more digits than Python converts
        raise FileError(f"{where} contains a number that cannot be read: {error}") from None
    except RecursionError:
        raise FileError(f"{where} is nested too deeply") from None
    return _of_kind(value, where, kind)


def read_json(path: Path, what: str, kind: type[T]) -> T:
    """Read a JSON file that a user may have edited.

    Args:
        what: what the file is, for messages: ``"the manifest"``.
        kind: the type that it must have at its top level.

    Raises:
        FileError: there is no such file, it cannot be read, or as :func:`parse_json`; the message names the file.
    """
    return parse_json(_read(path, what), f"{what} in {str(path)!r}", kind)


def read_yaml(path: Path, what: str, kind: type[T]) -> T:
    """The same for YAML, of which no tag can make an object.

    A key that is written twice is refused, for the writer may have meant the first one; so are aliases (``*a``), of
    which a few lines stand for more than fits in memory.
    """
    import yaml

    where = f"{what} in {str(path)!r}"
    try:
        value = yaml.load(_read(path, what), Loader=_yaml_loader())
    except (yaml.YAMLError, ValueError) as error:  # a date or number that Python cannot convert is a ValueError
        if isinstance(error, FileError):
            raise
        raise FileError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise FileError(f"{where} is nested too deeply") from None
    return _of_kind(value, where, kind)


@functools.cache
def _yaml_loader() -> Any:
    """The safe loader, less aliases and repeated keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = cast(Any, self).peek_event().start_mark
                raise yaml.MarkedYAMLError(None, None, "aliases are not read here: write the value out", mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                if (name := (key.tag, str(key.value))) in seen:
                    raise yaml.MarkedYAMLError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

    return Loader


def _read(path: Path, what: str) -> str:
    with contextlib.suppress(OSError):
        if path.exists() and not path.is_file():
            raise FileError(f"{what} in {str(path)!r} is not a regular file")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError(f"there is no file {str(path)!r} ({what})") from None
    except UnicodeDecodeError as error:
        raise FileError(f"{what} in {str(path)!r} is not UTF-8 text (byte {error.start:,})") from None
    except OSError as error:
        raise FileError(f"{what} in {str(path)!r} cannot be read: {error.strerror or error}") from None


def _of_kind(value: Any, where: str, kind: type[T]) -> T:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, float)):
        raise FileError(
            f"{where} must hold {_KINDS.get(kind, kind.__name__)} at its top level, not "
            f"{_KINDS.get(type(value), type(value).__name__)}"
        )
    _check_numbers(value, where)
    return value


def _check_numbers(value: Any, where: str) -> None:
    """Refuse whole numbers beyond the range of a float, which would overflow wherever one is computed with."""
    waiting, seen = [value], set()  # YAML may say one part many times, or put it into itself
    while waiting:
        one = waiting.pop()
        if isinstance(one, int) and one.bit_length() > 1023:
            raise FileError(f"{where} contains a whole number of more than 300 digits")
        if isinstance(one, (dict, list)) and id(one) not in seen:
            seen.add(id(one))
            waiting += one.values() if isinstance(one, dict) else one
