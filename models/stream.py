"""Training text read and tokenized on the way, with a position that a checkpoint can hold.

The stream is dealt to as many *lanes* as the global batch has rows, by datasets' own split (by files where there are
enough, by documents otherwise). Row ``r`` of every batch is lane ``r``'s next window. Lanes, not processes, own the
documents, so any number of processes and workers sees the same samples, and resumes from the same positions.
"""

from __future__ import annotations

import copy
import itertools
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from torch.utils.data import DataLoader, IterableDataset

from haltkit.models.config import DataConfig
from haltkit.models.data import DataError, read_manifest
from haltkit.models.distributed import Processes
from haltkit.models.prepare import Source, held_out, resolve_source
from haltkit.models.tokenizer import END_OF_TEXT, TOKENIZER_FILE, encode, load_tokenizer

__all__ = ["StreamFeed"]

# Where a lane's next window begins: {"epoch", "document" (of the lane), "offset" (tokens into it), "state"}, the last
# being datasets' own position just before that document.
Position = dict[str, Any]
START: Position = {"epoch": 0, "document": 0, "offset": 0, "state": None}
Item = list[tuple[int, npt.NDArray[np.int64], Position]]


@dataclass(frozen=True)
class _Text:
    """What all lanes read, and how."""

    source: Source
    encoding: tiktoken.Encoding
    lanes: int
    length: int
    # Share of the documents that the prepared folder keeps for evaluation: the stream leaves the same ones out.
    holdout: float

    def documents(self, lane: int, position: Position) -> Iterator[tuple[Position, list[int]]]:
        """The lane's documents as tokens, for ever, each with the position of its beginning.

        Raises:
            DataError: no document at all in a lane, or one that cannot be read.
        """
        from datasets.distributed import split_dataset_by_node

        state, number = position["state"], position["document"]
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
                if ids := [] if held_out(text, self.holdout) else encode(self.encoding, text):
                    here = {"epoch": epoch, "document": number, "offset": 0, "state": before}
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
                # The last token is the next window's first; all that is left is this document's.
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
            yield [(lane, *next(stream)) for lane, stream in streams.items()]


class StreamFeed:
    """Windows of a streamed dataset; its position is that of each lane.

    Args:
        config: ``stream`` names the text; ``path`` a prepared folder that gives tokenizer and held-out documents.
        lanes: rows of the global batch.
        length: inputs a window.
        rows: the rows that this process takes.
    """

    def __init__(self, config: DataConfig, lanes: int, length: int, rows: Iterable[int]) -> None:
        folder = Path(config.path).expanduser()
        manifest = read_manifest(folder)
        source = resolve_source([config.stream], config.stream_config or None, config.stream_column)
        name = manifest["tokenizer"]["name"]
        encoding = load_tokenizer(folder if (folder / TOKENIZER_FILE).is_file() else name)
        self.described = {"kind": "stream", "stream": config.stream, "lanes": lanes, "length": length}
        self.text = _Text(source, encoding, lanes, length, float(manifest["settings"]["holdout"]))
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
            for lane, window, position in next(self._items):
                windows[lane], self.positions[lane] = window, position
        return np.stack([windows[row] for row in rows])

    def position(self, processes: Processes) -> dict[str, Any]:
        lanes: dict[int, Position] = {}
        for own in processes.gather(self.positions):
            lanes |= own
        return {**self.described, "positions": [lanes[lane] for lane in range(self.text.lanes)]}

    def seek(self, position: dict[str, Any], processes: Processes) -> None:
        for key, value in self.described.items():
            if position.get(key) != value:
                raise DataError(
                    f"the checkpoint was written over another stream ({key} {position.get(key)}, here {value}): "
                    "resumed, the run would not see the samples it would have seen. A stream has a lane for each row "
                    "of the batch: keep data.stream, train.batch_size and block_size (the number of processes is free)"
                )
        self.positions = {lane: dict(position["positions"][lane]) for lane in self.positions}
        self._items = None


def _outlive_signals(worker: int) -> None:
    """A stop is often sent to all processes of a job; the step in progress still needs its windows.

    A worker ends when its trainer does: it looks for it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(item: Item) -> Item:
    return item
