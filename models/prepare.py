"""From text to token shards: any Hugging Face dataset, or local Parquet, JSONL or text files.

Documents are taken in order and written in shards; the manifest is rewritten after each shard and says
how many documents it covers, so an interrupted preparation goes on where the last shard ended.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from haltkit.models.data import MANIFEST, DataError, checksums
from haltkit.models.files import atomic_path, write_json
from haltkit.models.tokenizer import END_OF_TEXT, TOKENIZER_FILE, encode, load_tokenizer, train_tokenizer, write_ranks

__all__ = ["Progress", "Source", "prepare", "resolve_source"]

_BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".text": "text", ".md": "text"}
_SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
_TOKENIZER_SAMPLE_CHARACTERS = 200_000_000
_BATCH_DOCUMENTS = 64


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
            builder = _BUILDERS[Path(paths[0]).suffix]
            if self.skip_bad:
                return _tolerant(paths, self.column)
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
                f"cannot open {self.name!r} ({type(error).__name__}: {_first_line(error)}){advice}"
            ) from None

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.files) or ("train",)

    def texts(self, split: str, skip: int = 0) -> Iterator[str]:
        """The documents' texts, in order, the first ``skip`` left out.

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
                f"{self.name}, split {split}, document {number}: column {self.column!r} holds "
                f"{type(text).__name__}, not text"
            )
        return text


def _tolerant(paths: Sequence[str], column: str) -> Any:
    """Local files as a dataset that gives a row without text for what cannot be read.

    Raises:
        DataError: a .json file, in which one mistake may hide where all further documents begin.
    """
    import datasets

    if whole := [Path(path).name for path in paths if Path(path).suffix == ".json"]:
        raise DataError(
            f"{whole[0]}: unreadable documents cannot be left out of a .json file, which is read as a whole. Rename it "
            "to .jsonl if it has a document a line, or let them stop"
        )

    def rows(files: list[str]) -> Iterator[dict[str, Any]]:
        for file in map(Path, files):
            read = {"parquet": _parquet_rows, "json": _json_rows, "text": _text_row}[_BUILDERS[file.suffix]]
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
        except (ValueError, KeyError, TypeError):
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


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def find_fault(paths: Iterable[str]) -> str | None:
    """Where the first of these local files that cannot be read is wrong: file, byte offset and reason."""
    for name in paths:
        path = Path(name)
        try:
            kind = _BUILDERS[path.suffix]
            if kind == "parquet":
                fault = _parquet_fault(path)
            elif kind == "json":
                fault = _json_fault(path)
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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def resolve_source(names: Iterable[str], config: str | None = None, column: str = "text") -> Source:
    """Sort out what was named on the command line: files, folders and patterns, or one Hub dataset.

    Files whose names begin with ``train``, ``validation``, ``valid`` or ``val`` go to that split, all
    others to ``train``.

    Raises:
        DataError: nothing matches, files of several kinds, or an unknown kind.
    """
    names = list(names)
    paths: list[Path] = []
    for name in names:
        if Path(name).is_dir():
            paths += sorted(p for p in Path(name).iterdir() if p.suffix in _BUILDERS and not _is_readme(p))
            if not paths:
                raise DataError(f"no {', '.join(sorted(_BUILDERS))} files in folder {name!r}")
        elif matched := sorted(glob.glob(name)):
            paths += map(Path, matched)
        elif Path(name).suffix in _BUILDERS or glob.has_magic(name) or len(names) > 1:
            raise DataError(f"no file {name!r}")
    if not paths:
        if len(names) != 1:
            raise DataError(f"none of {', '.join(map(repr, names))} is a file; a Hub dataset is named alone")
        return Source(name=names[0], config=config, column=column)
    unknown = [p.name for p in paths if p.suffix not in _BUILDERS]
    if unknown:
        raise DataError(f"{unknown[0]}: unknown kind of file; known: {', '.join(sorted(_BUILDERS))}")
    if len({_BUILDERS[p.suffix] for p in paths}) > 1:
        raise DataError("the files are of several kinds; give one kind at a time")
    files: dict[str, list[str]] = {}
    for path in paths:
        word = re.split(r"[-_.]", path.stem)[0].lower()
        files.setdefault(_SPLITS.get(word, "train"), []).append(str(path.resolve()))
    label = Path(names[0]).name if len(names) == 1 else f"{len(paths)} files"
    ordered = sorted((split, tuple(found)) for split, found in files.items())
    return Source(name=label, files=tuple(ordered), column=column)


def _is_readme(path: Path) -> bool:
    return path.stem.lower() in {"readme", "license"}


@dataclass(frozen=True)
class Progress:
    """How far a preparation has come: ``stage`` is a split's name or ``tokenizer``."""

    stage: str
    documents: int
    tokens: int


class _Writer:
    """The shards of all splits and the manifest that describes them."""

    def __init__(
        self, folder: Path, manifest: dict[str, Any], dtype: type[np.unsignedinteger[Any]], encoding: tiktoken.Encoding
    ) -> None:
        self.folder, self.manifest, self.dtype, self.encoding = folder, manifest, dtype, encoding
        self.buffers: dict[str, list[np.ndarray[Any, Any]]] = {}
        self.pending = 0

    def add(self, split: str, ids: list[int]) -> None:
        self.buffers.setdefault(split, []).append(np.asarray(ids, dtype=self.dtype))
        self.pending += len(ids)

    def flush(self, stage: str, documents: int, empty: int, unreadable: int) -> None:
        file = self.manifest["tokenizer"]["file"]
        if file is not None and not (self.folder / file).is_file():
            # Kept beside the data, so that a checkpoint trained on it can be read.
            write_ranks(self.encoding, self.folder / file)
        for split, parts in self.buffers.items():
            entry = self.manifest["splits"].setdefault(split, {"tokens": 0, "documents": 0, "shards": []})
            tokens = np.concatenate(parts)
            name = f"{split}-{len(entry['shards']):05d}.npy"
            with atomic_path(self.folder / name) as partial, partial.open("wb") as file:
                np.save(file, tokens)
            digest = hashlib.sha256(tokens.tobytes()).hexdigest()
            shard = {"file": name, "tokens": int(tokens.size), "sha256": digest, "crc32": checksums(tokens)}
            entry["shards"].append(shard)
            entry["tokens"] += int(tokens.size)
            entry["documents"] += len(parts)
        self.manifest["progress"][stage] = {"documents": documents, "empty": empty, "unreadable": unreadable}
        write_json(self.folder / MANIFEST, self.manifest)
        self.buffers, self.pending = {}, 0


def prepare(
    source: Source,
    out: Path,
    *,
    tokenizer: str | None = "gpt2",
    train_vocab: int | None = None,
    holdout: float = 0.01,
    shard_tokens: int = 16_000_000,
    max_tokens: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Tokenize ``source`` into ``out`` and return the manifest.

    Args:
        source: what to read.
        out: folder for shards, ``manifest.json`` and, if trained here, ``tokenizer.tiktoken``.
        tokenizer: see :func:`~haltkit.models.tokenizer.load_tokenizer`; ignored when ``train_vocab`` is given.
        train_vocab: train a byte-level BPE of this size on the source's training split first.
        holdout: share of the documents, chosen by a hash of their text, that go to ``validation`` when the
            source has no such split of its own.
        shard_tokens: a shard is closed at the first document end past so many tokens.
        max_tokens: stop after so many tokens in all.
        on_progress: called after every batch of documents.

    Raises:
        DataError: ``out`` holds the beginning of another preparation, or the source has no text.
    """
    report = on_progress or (lambda _: None)
    settings = {
        "source": {"name": source.name, "config": source.config, "column": source.column,
                   "files": {split: [Path(p).name for p in paths] for split, paths in source.files}},
        "tokenizer": f"bpe-{train_vocab}" if train_vocab else str(tokenizer),
        "holdout": holdout, "shard_tokens": shard_tokens, "max_tokens": max_tokens,
    }  # fmt: skip
    if source.skip_bad:
        settings["bad_documents"] = "skip"
    manifest = _begin(out, settings)
    if manifest.get("complete"):
        return manifest
    encoding = _tokenizer(source, out, tokenizer, train_vocab, report)
    manifest["tokenizer"] = {
        "name": settings["tokenizer"],
        "vocab_size": encoding.n_vocab,
        "file": None if settings["tokenizer"] in ("gpt2", "None") else TOKENIZER_FILE,
    }
    dtype = np.uint16 if encoding.n_vocab <= 2**16 else np.uint32
    writer = _Writer(out, manifest, dtype, encoding)
    end = encoding.encode_single_token(END_OF_TEXT)
    own_validation = "validation" in source.splits
    total = sum(entry["tokens"] for entry in manifest["splits"].values())
    pool = ThreadPoolExecutor(2)  # tiktoken lets go of the interpreter's lock
    for stage in source.splits:
        done = manifest["progress"].get(stage, {"documents": 0, "empty": 0})
        documents, empty, unreadable = done["documents"], done["empty"], done.get("unreadable", 0)
        stream = source.texts(stage, skip=documents)
        while (max_tokens is None or total < max_tokens) and (
            batch := list(itertools.islice(stream, _BATCH_DOCUMENTS))
        ):
            for text, ids in zip(batch, pool.map(functools.partial(encode, encoding), batch), strict=True):
                if max_tokens is not None and total >= max_tokens:
                    break
                documents += 1
                if not ids:
                    if isinstance(text, Unreadable):
                        unreadable += 1
                    else:
                        empty += 1
                    continue
                kept_back = not own_validation and held_out(text, holdout)
                writer.add("validation" if kept_back else stage, [*ids, end])
                total += len(ids) + 1
            if writer.pending >= shard_tokens:
                writer.flush(stage, documents, empty, unreadable)
            report(Progress(stage, documents, total))
        if total:
            writer.flush(stage, documents, empty, unreadable)
    if not total:
        raise DataError(f"{source.name} holds no text")
    manifest["complete"] = True
    write_json(out / MANIFEST, manifest)
    return manifest


def held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the validation split: a function of its text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") < share * 2**64


def _begin(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    path = out / MANIFEST
    if not path.is_file():
        return {"settings": settings, "tokenizer": {}, "splits": {}, "progress": {}, "complete": False}
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        earlier = dict(manifest["settings"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{MANIFEST} in {str(out)!r} is not one of haltkit's: choose another folder") from None
    for key, value in settings.items():
        if earlier.get(key) != value:
            raise DataError(
                f"{str(out)!r} holds data prepared with {key}={earlier.get(key)!r}, not {value!r}: "
                "choose another folder, or the same settings to resume"
            )
    return manifest


def _tokenizer(
    source: Source, out: Path, name: str | None, train_vocab: int | None, report: Callable[[Progress], None]
) -> tiktoken.Encoding:
    path = out / TOKENIZER_FILE
    if not train_vocab:
        return load_tokenizer(name or "gpt2")
    if path.is_file() and load_tokenizer(path).n_vocab == train_vocab:
        return load_tokenizer(path)

    def sample() -> Iterator[str]:
        characters = 0
        for documents, text in enumerate(source.texts("train"), 1):
            characters += len(text)
            if documents % _BATCH_DOCUMENTS == 0:
                report(Progress("tokenizer", documents, 0))
            yield text
            if characters >= _TOKENIZER_SAMPLE_CHARACTERS:
                return

    return train_tokenizer(sample(), train_vocab, path)
