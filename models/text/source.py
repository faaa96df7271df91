"""Where text is read from: a Hugging Face dataset, or local Parquet, JSONL or text files by split."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haltkit.models.text.data import DataError
from haltkit.models.text.faults import BUILDERS, describe, find_fault, first_line, nesting_fault, tolerant

__all__ = ["Source", "Unreadable", "resolve_source"]

_HUB = "hf:"  # before a dataset's name
_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}


class Unreadable(str):
    """Stands in the place of a document that cannot be read: it has no text."""


@dataclass(frozen=True)
class Source:
    """What to read: a Hub dataset (``files`` empty) or local files by split."""

    name: str
    config: str | None = None
    files: tuple[tuple[str, tuple[str, ...]], ...] = ()
    column: str = "text"
    # Of the dataset on the Hub; None is its newest.
    revision: str | None = None
    # Give an Unreadable for a document that is not text, for a JSONL line or a text file that cannot be read, and for
    # each document of a damaged row group of a Parquet file (one for a file whose row groups cannot be found).
    skip_bad: bool = False

    def open(self, split: str) -> Any:
        """The split as a streamed dataset.

        Raises:
            DataError: it cannot be opened, for whatever reason.
        """
        import datasets

        keys: dict[str, Any] = {"split": split, "streaming": True}
        try:
            if not self.files:
                if self.revision is not None:
                    keys["revision"] = self.revision
                return datasets.load_dataset(self.name, self.config, **keys)
            paths = dict(self.files)[split]
            builder = BUILDERS[Path(paths[0]).suffix]
            if self.skip_bad:
                return tolerant(paths, self.column)
            for path in map(Path, paths):  # a reader that is given such a file may never return
                if fault := nesting_fault(path):
                    raise DataError(f"{path.name}, {fault}")
            if builder == "text":
                keys["sample_by"] = "document"
            return datasets.load_dataset(builder, data_files={split: list(paths)}, **keys)
        except DataError:
            raise
        except Exception as error:  # datasets and its readers raise many kinds; each means it cannot be opened
            where = find_fault(dict(self.files).get(split, ()))
            advice = (
                f": {where}"
                if where
                else ""
                if self.files
                else "; give a dataset on the Hub that this machine can reach, or local files"
            )
            raise DataError(
                f"cannot open {self.name!r} ({type(error).__name__}: {first_line(error)}){advice}"
            ) from None

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.files) or ("train",)

    def texts(self, split: str, skip: int = 0) -> Iterator[str]:
        """The documents' texts, in order, without the first ``skip``.

        Raises:
            DataError: the column is missing or is not text, or a file cannot be read.
        """
        stream = self.open(split)
        rows = iter(stream.skip(skip) if skip else stream)
        for number in itertools.count(skip):
            text = self.next_text(rows, number, split)
            if text is None:
                return
            yield text

    def next_text(
        self, rows: Iterator[dict[str, Any]], number: int, split: str = "train", *, batched: bool = False
    ) -> str | None:
        """The next document of an opened split, None at its end.

        Args:
            rows: as datasets gives them, or in batches of one with ``batched``.
            number: of the document, for messages.

        Raises:
            DataError: see :meth:`texts`.
        """
        try:
            row = next(rows)
        except StopIteration:
            return None
        except Exception as error:  # a reader's own exception, which names no file
            where = find_fault(dict(self.files).get(split, ()))
            raise DataError(
                f"{self.name}, split {split}, after document {number}: {where or describe(error)}"
            ) from None
        if self.column not in row:
            if self.skip_bad and not row:
                return Unreadable()
            raise DataError(f"no column {self.column!r} in {self.name}; there are: {', '.join(row)}")
        text = row[self.column][0] if batched else row[self.column]
        if not isinstance(text, str):
            if self.skip_bad:
                return Unreadable()
            raise DataError(
                f"{self.name}, split {split}, document {number}: column {self.column!r} contains "
                f"{type(text).__name__}, not text"
            )
        return text


def resolve_source(names: Iterable[str], config: str | None = None, column: str = "text") -> Source:
    """Sort out what was named on the command line: files, folders and patterns, or one Hub dataset.

    A dataset is written ``hf:NAME``, or ``OWNER/NAME`` where no folder ``OWNER`` is here; everything else is a path,
    and nothing is asked of the network for it.

    Where files named ``train...`` and files named ``validation...`` (``valid``, ``val``) are given together, as
    datasets are published, they are those splits and all others belong to ``train``. Otherwise a name says nothing, and
    all files belong to ``train``.

    Raises:
        DataError: nothing matches, files of several kinds, or an unknown kind.
    """
    names = list(names)
    dataset = _dataset(names)
    if dataset is not None:
        return Source(name=dataset, config=config, column=column)
    paths: list[Path] = []
    for name in names:
        place = Path(name).expanduser()
        if place.is_dir():
            found = sorted(p for p in place.iterdir() if p.suffix in BUILDERS and not _is_readme(p))
            if not found:
                raise DataError(f"no {', '.join(sorted(BUILDERS))} files in folder {name!r}")
            paths += found
        elif place.exists():  # also where the name has characters of a pattern
            paths.append(place)
        elif matched := sorted(glob.glob(str(place))):
            paths += map(Path, matched)
        else:
            hint = "" if "/" in name or place.suffix else f"; a dataset on the Hub is written hf:{name}"
            raise DataError(f"no file or folder {name!r}{hint}")
    if missing := [p.name for p in paths if not p.is_file()]:
        raise DataError(f"{missing[0]} is not a regular file")
    unknown = [p.name for p in paths if p.suffix not in BUILDERS]
    if unknown:
        raise DataError(f"{unknown[0]}: unknown kind of file; known: {', '.join(sorted(BUILDERS))}")
    if len({BUILDERS[p.suffix] for p in paths}) > 1:
        raise DataError("the files are of several kinds; give one kind at a time")
    files: dict[str, list[str]] = {}
    by_name = [_SPLITS.get(re.split(r"[-_.]", path.stem)[0].lower(), "") for path in paths]
    published = {"train", "validation"} <= set(by_name)
    for path, split in zip(paths, by_name, strict=True):
        files.setdefault((split if published else "") or "train", []).append(str(path.resolve()))
    label = Path(names[0]).name if len(names) == 1 else f"{len(paths)} files"
    ordered = sorted((split, tuple(found)) for split, found in files.items())
    return Source(name=label, files=tuple(ordered), column=column)


def _dataset(names: Sequence[str]) -> str | None:
    """The Hub dataset that the names mean, None where they are paths.

    Raises:
        DataError: a dataset beside other names, or one without a name.
    """
    marked = [name for name in names if name.startswith(_HUB)]
    if not marked and not (len(names) == 1 and _is_repository(names[0])):
        return None
    if len(names) > 1:
        raise DataError(f"{marked[0]}: a dataset on the Hub is named alone")
    if not (name := names[0].removeprefix(_HUB)):
        raise DataError(f"{_HUB} needs the name of a dataset on the Hub behind it")
    return name


def _is_repository(name: str) -> bool:
    """Whether a name cannot be meant as a path: ``OWNER/NAME``, without a folder ``OWNER`` here."""
    owner, _, rest = name.partition("/")
    return (
        bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name))
        and Path(rest).suffix not in BUILDERS
        and not Path(owner).exists()
    )


def _is_readme(path: Path) -> bool:
    return path.stem.lower() in {"readme", "license"}
