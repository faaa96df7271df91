"""From text to token shards: any Hugging Face dataset, or local Parquet, JSONL or text files.

Documents are taken in order and written in shards; the manifest is rewritten after each shard and says
how many documents it covers, so an interrupted preparation goes on where the last shard ended.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from haltkit.files import FileError, atomic_path, read_json, write_json
from haltkit.locks import hold
from haltkit.models.text.data import MANIFEST, DataError, checksums, is_manifest
from haltkit.models.text.holdout import Document, document_key, held_out, more_to_hold_out
from haltkit.models.text.source import Source, Unreadable
from haltkit.models.text.tokenizer import (
    END_OF_TEXT,
    TOKENIZER_FILE,
    check_vocabulary_size,
    encode,
    load_tokenizer,
    train_tokenizer,
    write_ranks,
)

__all__ = ["Progress", "prepare"]

_TOKENIZER_SAMPLE_CHARACTERS = 200_000_000
_BATCH_DOCUMENTS = 64


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
        self.buffers: dict[str, list[Document]] = {}
        self.pending = 0

    def add(self, split: str, text: str, ids: list[int]) -> None:
        document = Document(document_key(text), np.asarray(ids, dtype=self.dtype))
        self.buffers.setdefault(split, []).append(document)
        self.pending += len(ids)

    def keep_enough_back(self, share: float) -> None:
        """Before the first shard is written: hold out more documents where the hash gave too few."""
        if self.manifest["splits"]:
            return
        chosen = more_to_hold_out(self.buffers.get("train", []), self.buffers.get("validation", []), share)
        if not chosen:
            return
        self.manifest["held_out"] = sorted(chosen)
        train = self.buffers["train"]
        self.buffers["train"] = [document for document in train if document.key not in chosen]
        self.buffers.setdefault("validation", []).extend(document for document in train if document.key in chosen)

    def flush(self, stage: str, documents: int, empty: int, unreadable: int) -> None:
        file = self.manifest["tokenizer"]["file"]
        if file is not None and not (self.folder / file).is_file():
            # Kept beside the data, so that a checkpoint trained on it can be read.
            write_ranks(self.encoding, self.folder / file)
        for split, parts in self.buffers.items():
            entry = self.manifest["splits"].setdefault(split, {"tokens": 0, "documents": 0, "shards": []})
            tokens = np.concatenate([document.tokens for document in parts])
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
        tokenizer: see :func:`~haltkit.models.text.tokenizer.load_tokenizer`; ignored when ``train_vocab`` is given.
        train_vocab: train a byte-level BPE of this size on the source's training split first.
        holdout: share of the documents, chosen by a hash of their text, that go to ``validation`` when the
            source has no such split of its own; more of them where that came to too little text
            (:func:`~haltkit.models.text.holdout.more_to_hold_out`), which the manifest then lists.
        shard_tokens: a shard ends at the first document end past this many tokens.
        max_tokens: the most tokens in all.
        on_progress: called after every batch of documents.

    Raises:
        DataError: ``out`` contains the beginning of another preparation, or the source has no text.
        FolderInUse: another preparation is writing into ``out``.
    """
    report = on_progress or (lambda _: None)
    if train_vocab is not None:
        check_vocabulary_size(train_vocab)
    settings = {
        "source": {
            "name": source.name,
            "config": source.config,
            "column": source.column,
            "files": {split: [Path(p).name for p in paths] for split, paths in source.files},
        },
        "tokenizer": str(tokenizer) if train_vocab is None else f"bpe-{train_vocab}",
        "holdout": holdout,
        "shard_tokens": shard_tokens,
        "max_tokens": max_tokens,
    }
    if source.skip_bad:
        settings["bad_documents"] = "skip"
    with hold(out, "haltkit prepare"):
        manifest = _begin(out, settings)
        if not manifest.get("complete"):
            encoding = _tokenizer(source, out, tokenizer, train_vocab, report)
            _write_shards(source, out, manifest, encoding, report)
        return manifest


def _write_shards(
    source: Source,
    out: Path,
    manifest: dict[str, Any],
    encoding: tiktoken.Encoding,
    report: Callable[[Progress], None],
) -> None:
    """Tokenize from where the manifest says that the shards end, to the end of the source."""
    settings = manifest["settings"]
    max_tokens, shard_tokens, holdout = settings["max_tokens"], settings["shard_tokens"], settings["holdout"]
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
                writer.add("validation" if kept_back else stage, text, [*ids, end])
                total += len(ids) + 1
            if writer.pending >= shard_tokens:
                if not own_validation:
                    writer.keep_enough_back(holdout)
                writer.flush(stage, documents, empty, unreadable)
            report(Progress(stage, documents, total))
        if total:
            if not own_validation:
                writer.keep_enough_back(holdout)
            writer.flush(stage, documents, empty, unreadable)
    if not total:
        raise DataError(f"{source.name} contains no text")
    manifest["complete"] = True
    write_json(out / MANIFEST, manifest)


def _begin(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    path = out / MANIFEST
    if not path.is_file():
        return {"settings": settings, "tokenizer": {}, "splits": {}, "progress": {}, "complete": False}
    try:
        manifest = read_json(path, "the manifest", dict)
    except FileError as error:
        raise DataError(f"{error}; choose another folder") from None
    earlier = manifest.get("settings")
    if not isinstance(earlier, dict) or not is_manifest(manifest) or not isinstance(manifest.get("progress"), dict):
        raise DataError(f"{MANIFEST} in {str(out)!r} is not one of haltkit's: choose another folder")
    for key, value in settings.items():
        if earlier.get(key) != value:
            raise DataError(
                f"{str(out)!r} contains data prepared with {key}={earlier.get(key)!r}, not {value!r}: "
                "choose another folder, or the same settings to resume"
            )
    return manifest


def _tokenizer(
    source: Source, out: Path, name: str | None, train_vocab: int | None, report: Callable[[Progress], None]
) -> tiktoken.Encoding:
    path = out / TOKENIZER_FILE
    if train_vocab is None:
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
