"""Documents that cannot be read: where a file is damaged, and how its readable documents are still read."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from haltkit.models.text.data import DataError

__all__ = ["BUILDERS", "describe", "find_fault", "first_line", "nesting_fault", "tolerant"]

# The builder of `datasets` that reads files of each kind.
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".text": "text", ".md": "text"}


def tolerant(paths: Sequence[str], column: str) -> Any:
    """Local files as a dataset that gives a row without text for what cannot be read.

    Raises:
        DataError: a .json file, in which one mistake may hide where all further documents begin.
    """
    import datasets

    if whole := [Path(path).name for path in paths if Path(path).suffix == ".json"]:
        raise DataError(
            f"{whole[0]}: unreadable documents cannot be skipped in a .json file, which is read as a whole. Rename it "
            "to .jsonl if it has a document a line, or let them stop"
        )

    def rows(files: list[str]) -> Iterator[dict[str, Any]]:
        for file in map(Path, files):
            read = {"parquet": _parquet_rows, "json": _json_rows, "text": _text_row}[BUILDERS[file.suffix]]
            yield from read(file, column)

    return datasets.IterableDataset.from_generator(rows, gen_kwargs={"files": list(paths)})


def _text_row(path: Path, column: str) -> Iterator[dict[str, Any]]:
    try:
        yield {column: path.read_bytes().decode("utf-8")}
    except UnicodeDecodeError:
        yield {column: None}


def _json_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    for line in filter(bytes.strip, path.read_bytes().split(b"\n")):
        try:
            text = json.loads(line.decode("utf-8"))[column]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        yield {column: text if isinstance(text, str) else None}


def _parquet_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except Exception:  # pyarrow's own
        yield {column: None}
        return
    if column not in file.schema_arrow.names:
        yield dict.fromkeys(file.schema_arrow.names)  # for the message that lists them
        return
    for group in range(file.num_row_groups):
        try:
            texts = file.read_row_group(group, [column])[column].to_pylist()
        except Exception:
            texts = [None] * file.metadata.row_group(group).num_rows
        yield from ({column: text} for text in texts)


# JSON nested more deeply is not text with a few facts beside it; the readers of `datasets` end in an error from about
# 300 levels on, in a long wait from thousands and in a crash from a hundred thousand.
DEEPEST = 100
_JSON_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def nesting_fault(path: Path) -> str | None:
    """Where a JSON or JSONL file is nested too deeply for the readers; None where it is not."""
    if BUILDERS[path.suffix] != "json":
        return None
    status = path.stat()
    return _nesting_fault(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4096)
def _nesting_fault(path: Path, changed: int, size: int) -> str | None:
    with path.open("rb") as file:
        # A whole .json file is one value, wherever its lines end.
        lines = enumerate(file, 1) if path.suffix == ".jsonl" else [(1, file.read())]
        for number, line in lines:
            if line.count(b"[") + line.count(b"{") > DEEPEST and _depth(line) > DEEPEST:
                where = f"line {number:,}: " if path.suffix == ".jsonl" else ""
                return f"{where}nested more than {DEEPEST} levels deep"
    return None


def _depth(content: bytes) -> int:
    depth = deepest = 0
    for token in _JSON_TOKEN.finditer(content):
        first = token[0][:1]
        depth += 1 if first in b"[{" else -1 if first in b"]}" else 0
        if (deepest := max(deepest, depth)) > DEEPEST:
            break
    return deepest


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def find_fault(paths: Iterable[str]) -> str | None:
    """Where the first of these local files that cannot be read is wrong: file, byte offset and reason."""
    for name in paths:
        path = Path(name)
        try:
            kind = BUILDERS[path.suffix]
            if kind == "parquet":
                fault = _parquet_fault(path)
            elif kind == "json":
                fault = nesting_fault(path) or _json_fault(path)
            else:
                fault = _utf8_fault(path.read_bytes(), 0)
        except OSError as error:
            fault = f"{error.strerror or error}"
        if fault:
            return f"{path.name}{', ' if fault.startswith(('byte', 'line')) else ': '}{fault}"
    return None


def _utf8_fault(content: bytes, offset: int) -> str | None:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"byte {offset + error.start:,}: 0x{content[error.start]:02x} is not UTF-8 ({error.reason})"
    return None


def _json_fault(path: Path) -> str | None:
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, 1):
            if fault := _utf8_fault(line, offset):
                return f"line {number:,}, {fault}"
            if path.suffix == ".jsonl" and line.strip():
                try:
                    json.loads(line)
                except json.JSONDecodeError as error:
                    return f"line {number:,}, byte {offset + error.pos:,}: {error.msg}"
            offset += len(line)
    return None


def _parquet_fault(path: Path) -> str | None:
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's own
        return f"{describe(error)} ({path.stat().st_size:,} bytes)"
    for group in range(file.num_row_groups):
        try:
            file.read_row_group(group)
        except Exception as error:
            start = file.metadata.row_group(group).column(0).dictionary_page_offset
            start = file.metadata.row_group(group).column(0).data_page_offset if start is None else start
            return f"byte {start:,} (row group {group}): {describe(error)}"
    return None


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
