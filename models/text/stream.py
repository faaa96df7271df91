"""Training text read and tokenized on the way, with a position that a checkpoint can store.

The stream is dealt to as many *lanes* as the global batch has rows, by datasets' own split (by files where there are
enough, by documents otherwise). Row ``r`` of every batch is lane ``r``'s next window. Lanes, not processes, own the
documents, so any number of processes and workers sees the same samples, and resumes from the same positions.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from torch.utils.data import DataLoader, IterableDataset

from haltkit.models.text.config import DataConfig
from haltkit.models.text.data import MANIFEST, DataError, Gather, read_manifest
from haltkit.models.text.holdout import held_out
from haltkit.models.text.source import Source, Unreadable, resolve_source
from haltkit.models.text.tokenizer import END_OF_TEXT, TOKENIZER_FILE, encode, fingerprint, load_tokenizer

__all__ = ["StreamFeed"]

# Where a lane's next window begins: {"epoch", "document" (of the lane), "offset" (tokens into it), "state",
# "unreadable"}: datasets' own position just before that document, and how many before it could not be read.
Position = dict[str, Any]
START: Position = {"epoch": 0, "document": 0, "offset": 0, "state": None, "unreadable": 0}
# An error is handed on like a window: raised in a worker it would arrive as a page of traceback.
Item = list[tuple[int, npt.NDArray[np.int64], Position]] | DataError


@dataclass(frozen=True)
class _Text:
    """What all lanes read, and how."""

    source: Source
    encoding: tiktoken.Encoding
    lanes: int
    length: int
    # Share of the documents that the prepared folder keeps for evaluation: the stream skips the same ones.
    holdout: float
    # Keys of further documents that it keeps: see more_to_hold_out.
    also: frozenset[str] = frozenset()

    def documents(self, lane: int, position: Position) -> Iterator[tuple[Position, list[int]]]:
        """The lane's documents as tokens, for ever, each with the position of its beginning.

        Raises:
            DataError: no document at all in a lane, or one that cannot be read.
        """
        from datasets.distributed import split_dataset_by_node

        state, number, unreadable = position["state"], position["document"], position.get("unreadable", 0)
        for epoch in itertools.count(position["epoch"]):
            stream = split_dataset_by_node(self.source.open("train"), rank=lane, world_size=self.lanes)
            if state is not None:
                stream.load_state_dict(state)
            # iter, because in a DataLoader's worker plain iteration deals the files out a second time
            rows = stream.iter(batch_size=1)
            found = False
            while True:
                before = copy.deepcopy(stream.state_dict())
                text = self.source.next_text(rows, number, batched=True)
                if text is None:
                    break
                unreadable += isinstance(text, Unreadable)
                if ids := [] if held_out(text, self.holdout, self.also) else encode(self.encoding, text):
                    here = {"epoch": epoch, "document": number, "offset": 0, "state": before, "unreadable": unreadable}
                    yield here, [*ids, self.encoding.encode_single_token(END_OF_TEXT)]
                    found = True
                number += 1
            if not found and state is None:
                raise DataError(
                    f"{self.source.name}: lane {lane} of {self.lanes} (one a row of the batch) has no document: give "
                    "more text, or a smaller train.batch_size"
                )
            state, number = None, 0

    def windows(self, lane: int, position: Position) -> Iterator[tuple[npt.NDArray[np.int64], Position]]:
        """The lane's windows, ``(length + 1,)``, for ever, each with the position after it."""
        buffer: list[int] = []
        offset = position["offset"]
        for here, ids in self.documents(lane, position):
            buffer += ids[offset:]
            offset = 0
            while len(buffer) > self.length:
                window = np.array(buffer[: self.length + 1], dtype=np.int64)
                # The last token is the next window's first; all that remains is this document's.
                buffer = buffer[self.length :]
                yield window, {**here, "offset": len(ids) - len(buffer)}


class _Lanes(IterableDataset[Item]):
    """Several lanes in step: one window of each at a time. Workers share the lanes out."""

    def __init__(self, text: _Text, positions: dict[int, Position]) -> None:
        super().__init__()
        self.text, self.positions = text, positions

    def __iter__(self) -> Iterator[Item]:
        from torch.utils.data import get_worker_info

        worker = get_worker_info()
        lanes = list(self.positions)
        own = lanes if worker is None else lanes[worker.id :: worker.num_workers]
        streams = {lane: self.text.windows(lane, self.positions[lane]) for lane in own}
        while True:
            try:
                item = [(lane, *next(stream)) for lane, stream in streams.items()]
            except DataError as error:
                yield error
                return
            yield item


class StreamFeed:
    """Windows of a streamed dataset; its position is that of each lane.

    Args:
        config: ``stream`` names the text; ``path`` a prepared folder that gives tokenizer and held-out documents.
        lanes: rows of the global batch.
        length: inputs a window.
        rows: the rows that this process takes.

    Raises:
        DataError: nothing to read there, or a revision of files.
    """

    def __init__(self, config: DataConfig, lanes: int, length: int, rows: Iterable[int]) -> None:
        folder = Path(config.path).expanduser()
        manifest = read_manifest(folder)
        source = resolve_source([config.stream], config.stream_config or None, config.stream_column)
        if source.files and config.stream_revision:
            raise DataError(
                f"data.stream_revision is of a dataset on the Hub, and data.stream {config.stream!r} names files: "
                "leave it empty"
            )
        source = replace(source, skip_bad=config.bad_documents == "skip", revision=config.stream_revision or None)
        name = manifest["tokenizer"]["name"]
        encoding = load_tokenizer(folder if (folder / TOKENIZER_FILE).is_file() else name)
        holdout, keys = manifest.get("settings", {}).get("holdout"), manifest.get("held_out", [])
        if not isinstance(holdout, (int, float)) or not isinstance(keys, list):
            raise DataError(f"{MANIFEST} in {str(folder)!r} does not say which documents it keeps for validation")
        also = frozenset(map(str, keys))
        self.text = _Text(source, encoding, lanes, length, float(holdout), also)
        files = [[Path(path).name, Path(path).stat().st_size] for path in dict(source.files).get("train", ())]
        # All that decides which windows come after a position. What a branch on the Hub holds is not seen from here.
        self.described = {
            "kind": "stream",
            "stream": config.stream,
            "stream_config": config.stream_config,
            "stream_revision": config.stream_revision,
            "stream_column": config.stream_column,
            "bad_documents": config.bad_documents,
            "files": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16],
            "tokenizer": fingerprint(encoding),
            "holdout": self.text.holdout,
            "lanes": lanes,
            "length": length,
        }
        if also:
            self.described["held_out"] = hashlib.sha256(json.dumps(sorted(also)).encode()).hexdigest()[:16]
        self.workers = config.stream_workers
        self.positions: dict[int, Position] = {lane: dict(START) for lane in rows}
        self._items: Iterator[Item] | None = None

    def take(self, first: int, rows: Iterable[int]) -> npt.NDArray[np.int64]:
        if self._items is None:
            self._workers = min(self.workers, len(self.positions))
            lanes = _Lanes(self.text, dict(self.positions))
            loader = DataLoader(
                lanes, batch_size=None, num_workers=self._workers, collate_fn=_as_it_is, worker_init_fn=_outlive_signals
            )
            self._items = iter(loader)
        windows = {}
        for _ in range(max(1, self._workers)):  # each worker in turn gives its lanes' next windows
            item = next(self._items)
            if isinstance(item, DataError):
                raise item
            for lane, window, position in item:
                windows[lane], self.positions[lane] = window, position
        return np.stack([windows[row] for row in rows])

    def position(self, gather: Gather) -> dict[str, Any]:
        lanes: dict[int, Position] = {}
        for own in gather(self.positions):
            lanes |= own
        positions = [lanes[lane] for lane in range(self.text.lanes)]
        unreadable = sum(position.get("unreadable", 0) for position in positions)
        return {**self.described, "unreadable": unreadable, "positions": positions}

    def seek(self, position: dict[str, Any]) -> None:
        # Older positions say less, and are of when nothing could be skipped or pinned.
        written = {"bad_documents": "stop", "stream_revision": "", **position}
        for key, value in self.described.items():
            if written.get(key, value) != value:
                raise DataError(
                    f"the checkpoint was written over another stream ({key} {written[key]}, here {value}): resumed, "
                    "the run would not see the samples it would have seen. A stream has a lane for each row of the "
                    "batch: keep data.stream, its files, its stream_config, stream_revision, stream_column and "
                    "bad_documents, the tokenizer and holdout of data.path, train.batch_size and block_size (the "
                    "number of processes is free)"
                )
        self.positions = {lane: dict(position["positions"][lane]) for lane in self.positions}
        self._items = None


def _outlive_signals(worker: int) -> None:
    """A stop is often sent to all processes of a job, but the step in progress still needs its windows.

    So a worker heeds SIGTERM from its trainer alone, who ends its workers with it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "darwin":  # which does not tell who sends a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_heed_the_trainer, daemon=True).start()


def _heed_the_trainer() -> None:
    if sys.platform != "darwin":
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)


def _as_it_is(item: Item) -> Item:
    return item
