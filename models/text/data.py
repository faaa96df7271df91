"""Token shards on disk, memory-mapped, cut into windows for training and evaluation."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from haltkit.files import FileError, read_json

__all__ = [
    "CHUNK",
    "MANIFEST",
    "DataError",
    "Feed",
    "Gather",
    "ShardFeed",
    "TokenData",
    "alone",
    "checksums",
    "is_manifest",
    "read_manifest",
    "read_text",
    "windows",
]

MANIFEST = "manifest.json"
# Tokens that one checksum in the manifest covers: a chunk is read and checked when the first window touches it.
CHUNK = 2**19


class DataError(ValueError):
    """Token data that is missing, incomplete or does not fit."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder written by ``haltkit prepare``.

    Raises:
        DataError: there is none, it is not JSON, or the preparation did not finish.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"no {MANIFEST} in {str(folder)!r}: make the data with 'haltkit prepare'")
    try:
        manifest = read_json(path, "the manifest", dict)
    except FileError as error:
        raise DataError(str(error)) from None
    if not is_manifest(manifest):
        raise DataError(f"{MANIFEST} in {str(folder)!r} is not one that 'haltkit prepare' writes")
    if not manifest.get("complete"):
        raise DataError(f"{str(folder)!r} is not finished: run the same 'haltkit prepare' again, it resumes")
    return manifest


def is_manifest(values: dict[str, Any]) -> bool:
    """Whether all is there that a reader of the shards uses, and of the right kind."""
    tokenizer, splits, settings = values.get("tokenizer"), values.get("splits"), values.get("settings", {})
    if not isinstance(tokenizer, dict) or not isinstance(splits, dict) or not isinstance(settings, dict):
        return False
    if not values.get("complete"):
        return True  # the beginning of one: what is missing comes later
    return (
        isinstance(tokenizer.get("vocab_size"), int)
        and isinstance(tokenizer.get("name"), str)
        and all(
            isinstance(split, dict)
            and isinstance(split.get("shards"), list)
            and all(
                isinstance(shard, dict)
                and isinstance(shard.get("file"), str)
                and Path(shard["file"]).name == shard["file"]
                and isinstance(shard.get("tokens"), int)
                and isinstance(shard.get("crc32", []), list)
                for shard in split["shards"]
            )
            for split in splits.values()
        )
    )


class TokenData:
    """One split of a prepared folder as a sequence of training windows.

    A window is ``length + 1`` tokens: inputs and, shifted by one, targets. Windows tile the split, so in an
    epoch each token is a target once.
    """

    def __init__(self, folder: Path, split: str, length: int) -> None:
        manifest = read_manifest(folder)
        if split not in manifest["splits"]:
            raise DataError(f"no split {split!r} in {str(folder)!r}; there are: {', '.join(manifest['splits'])}")
        self.vocab_size = int(manifest["tokenizer"]["vocab_size"])
        self.length = length
        self._shards: list[npt.NDArray[np.generic]] = []
        self._entries: list[dict[str, Any]] = manifest["splits"][split]["shards"]
        self._folder = folder
        for entry in self._entries:
            self._shards.append(_open_shard(folder / entry["file"], int(entry["tokens"])))
        # Chunks whose checksum has been found right; preparations of older versions have none.
        self._checked = [np.zeros(len(entry.get("crc32", ())), dtype=bool) for entry in self._entries]
        described = json.dumps([split, [[e["file"], e["tokens"], e.get("sha256")] for e in self._entries]])
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()[:16]
        self._ends = np.cumsum([shard.size for shard in self._shards])
        self.tokens = int(self._ends[-1]) if self._shards else 0
        if len(self) < 1:
            raise DataError(f"split {split!r} has {self.tokens} tokens, too few for one window of {length}")
        self._epoch: tuple[int, npt.NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return (self.tokens - 1) // self.length

    def window(self, index: int) -> npt.NDArray[np.int64]:
        """Window ``index``, ``(length + 1,)``."""
        start, parts = index * self.length, []
        need = self.length + 1
        number = int(np.searchsorted(self._ends, start, side="right"))
        while need:
            shard = self._shards[number]
            offset = start - int(self._ends[number] - shard.size)
            part = shard[offset : offset + need]
            self._check(number, offset, part)
            parts.append(part)
            need, start, number = need - part.size, start + part.size, number + 1
        return np.concatenate(parts).astype(np.int64)

    def spread(self, count: int) -> Tensor:
        """``count`` windows, or all there are, spread evenly over the split, ``(count, length + 1)``."""
        chosen = np.linspace(0, len(self) - 1, min(len(self), count)).astype(int)
        return torch.from_numpy(np.stack([self.window(int(i)) for i in chosen]))

    def _check(self, number: int, offset: int, part: npt.NDArray[np.generic]) -> None:
        """Check the chunks that ``part`` of shard ``number`` lies in, once each, and that its tokens exist."""
        shard, entry, checked = self._shards[number], self._entries[number], self._checked[number]
        for chunk in range(offset // CHUNK, (offset + part.size - 1) // CHUNK + 1):
            if chunk < len(checked) and not checked[chunk]:
                if _crc32(shard, chunk) != entry["crc32"][chunk]:
                    raise self._corrupt(number, chunk * CHUNK, f"the checksum of {CHUNK:,} tokens from there is wrong")
                checked[chunk] = True
        ids = part.astype(np.int64)
        if ids.size and int(ids.max()) >= self.vocab_size:
            bad = offset + int(np.argmax(ids >= self.vocab_size))
            raise self._corrupt(number, bad, f"token {int(shard[bad])}, the vocabulary has {self.vocab_size}")

    def _corrupt(self, number: int, token: int, reason: str) -> DataError:
        shard, file = self._shards[number], self._entries[number]["file"]
        start = getattr(shard, "offset", 0) + token * shard.itemsize
        return DataError(
            f"shard {file} in {str(self._folder)!r} is corrupt at byte {start:,} (token {token:,}): {reason}. Copy it "
            "again from where it was made, or prepare the data again"
        )

    def sample(self, seed: int, number: int) -> npt.NDArray[np.int64]:
        """The run's ``number``-th training window: a new permutation of all windows each epoch."""
        epoch, position = divmod(number, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng([seed, epoch]).permutation(len(self))
        return self.window(int(self._epoch[1][position]))


def _open_shard(path: Path, tokens: int) -> npt.NDArray[np.generic]:
    """Map one shard.

    Raises:
        DataError: it is missing, is not what ``prepare`` writes, or is shorter than the manifest says.
    """
    where = f"shard {path.name} in {str(path.parent)!r}"
    if not path.is_file():
        raise DataError(f"{where} is missing: copy it again from where it was made, or prepare the data again")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            start = file.tell()
    except (OSError, ValueError) as error:
        raise DataError(f"{where} cannot be read: its first bytes are not a shard's ({error})") from None
    if shape != (tokens,) or dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise DataError(
            f"{where} contains {dtype} of shape {shape}, the manifest says {tokens:,} tokens: prepare the data again"
        )
    if size != start + tokens * dtype.itemsize:
        raise DataError(
            f"{where} ends at byte {size:,}, it should at {start + tokens * dtype.itemsize:,}: it was cut off or added "
            "to. Copy it again from where it was made, or prepare the data again"
        )
    mapped: npt.NDArray[np.generic] = np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(tokens,))
    return mapped


def _crc32(shard: npt.NDArray[np.generic], chunk: int) -> int:
    return zlib.crc32(shard[chunk * CHUNK : (chunk + 1) * CHUNK].tobytes())


def checksums(shard: npt.NDArray[np.generic]) -> list[int]:
    """CRC-32 of each chunk of a shard, for the manifest."""
    return [_crc32(shard, chunk) for chunk in range(-(-shard.size // CHUNK))]


# A value of this process to the values of all processes of the run, by rank.
Gather = Callable[[Any], list[Any]]


def alone(value: Any) -> list[Any]:
    """The :data:`Gather` of a process without others."""
    return [value]


class Feed(Protocol):
    """Where a run's training windows come from."""

    def take(self, first: int, rows: Iterable[int]) -> npt.NDArray[np.int64]:
        """This process's windows of the global batch that begins at the run's ``first``-th sample.

        Args:
            first: counts all samples of all processes since the run began.
            rows: which rows of the batch; each is sample ``first + row``.

        Returns:
            ``(len(rows), length + 1)``.
        """
        ...

    def position(self, gather: Gather) -> dict[str, Any]:
        """Collective: where the next sample comes from, as JSON."""
        ...

    def seek(self, position: dict[str, Any]) -> None:
        """Go on from a position.

        Raises:
            DataError: it is one in other data.
        """
        ...


class ShardFeed:
    """Windows of prepared shards in the order that (seed, sample number) gives; its position is that number."""

    def __init__(self, data: TokenData, seed: int) -> None:
        self.data, self.seed = data, seed

    def take(self, first: int, rows: Iterable[int]) -> npt.NDArray[np.int64]:
        return np.stack([self.data.sample(self.seed, first + row) for row in rows])

    def position(self, gather: Gather) -> dict[str, Any]:
        return {"kind": "shards", "fingerprint": self.data.fingerprint, "seed": self.seed, "length": self.data.length}

    def seek(self, position: dict[str, Any]) -> None:
        here = self.position(alone)
        for key, value in here.items():
            if position.get(key) != value:
                raise DataError(
                    f"the checkpoint was written over other training data ({key} {position.get(key)}, here {value}): "
                    "resumed, the run would not see the samples it would have seen. Resume with the data, seed and "
                    "block_size that it began with; to go on over other data, anneal from it with --data"
                )


def read_text(path: Path, what: str = "text") -> str:
    """The whole of a UTF-8 file that a user named.

    Raises:
        DataError: no such file, or not UTF-8; ``what`` says what it was to be.
    """
    if not path.is_file():
        raise DataError(f"no {what} file {str(path)!r}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not UTF-8 text (byte {error.start})") from None


def windows(tokens: npt.ArrayLike, length: int) -> Tensor:
    """A token sequence cut into windows of ``length`` inputs and their targets, ``(N, length + 1)``.

    A remainder shorter than a window is dropped.

    Raises:
        DataError: not even one window.
    """
    ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
    count = (len(ids) - 1) // length
    if count < 1:
        raise DataError(f"the text has {len(ids)} tokens; a window needs {length + 1}")
    return ids[: count * length + 1].unfold(0, length + 1, length).contiguous()
