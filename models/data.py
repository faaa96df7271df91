"""Token shards on disk, memory-mapped, cut into windows for training and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["MANIFEST", "DataError", "TokenData", "read_manifest", "windows"]

MANIFEST = "manifest.json"


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
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{MANIFEST} in {str(folder)!r} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or not {"splits", "tokenizer"} <= manifest.keys():
        raise DataError(f"{MANIFEST} in {str(folder)!r} is not one that 'haltkit prepare' writes")
    if not manifest.get("complete"):
        raise DataError(f"{str(folder)!r} is not finished: run the same 'haltkit prepare' again, it resumes")
    return manifest


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
        for entry in manifest["splits"][split]["shards"]:
            try:
                shard = np.load(folder / entry["file"], mmap_mode="r")
            except (OSError, ValueError) as error:
                raise DataError(f"shard {entry['file']} in {str(folder)!r} cannot be read: {error}") from None
            if shard.ndim != 1 or shard.size != entry["tokens"]:
                raise DataError(
                    f"shard {entry['file']} in {str(folder)!r} holds {shard.size} tokens, "
                    f"the manifest says {entry['tokens']}: prepare the data again"
                )
            self._shards.append(shard)
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
            parts.append(part)
            need, start, number = need - part.size, start + part.size, number + 1
        return np.concatenate(parts).astype(np.int64)

    def sample(self, seed: int, number: int) -> npt.NDArray[np.int64]:
        """The run's ``number``-th training window: a new permutation of all windows each epoch."""
        epoch, position = divmod(number, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng([seed, epoch]).permutation(len(self))
        return self.window(int(self._epoch[1][position]))


def windows(tokens: npt.ArrayLike, length: int) -> Tensor:
    """A token sequence cut into windows of ``length`` inputs and their targets, ``(N, length + 1)``.

    A remainder shorter than a window is left out.

    Raises:
        DataError: not even one window.
    """
    ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
    count = (len(ids) - 1) // length
    if count < 1:
        raise DataError(f"the text has {len(ids)} tokens; a window needs {length + 1}")
    return ids[: count * length + 1].unfold(0, length + 1, length).contiguous()
