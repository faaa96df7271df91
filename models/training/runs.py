"""A training run: what moves in it, and the checkpoints that it is kept in.

A checkpoint is a folder ``step-XXXXXXXX`` that appears whole or not at all. It has the weights and the optimizer's
moments in float32 as safetensors and everything else that moves in ``progress.json``; nothing in it depends on how
many processes wrote it. Under FSDP weights and moments are in ``sharded/``, a file a process, written and read by
torch.distributed.checkpoint, which reads them on any number of processes. It takes whatever files are there and leaves
what none of them holds as it was, so ``progress.json`` lists them.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.files import FileError, read_json
from haltkit.folders import settle, sweep
from haltkit.models.checkpoint import build_model
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.files import check_shapes, check_weights, load_weights, save_checkpoint, write_model_config
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.text.data import Feed
from haltkit.models.text.tokenizer import copy_tokenizer
from haltkit.models.training.config import RunConfig
from haltkit.models.training.distributed import Processes, shared_folder
from haltkit.models.training.shards import check_shards, like, load_sharded, read_shards, save_shards, stored_shapes
from haltkit.models.weights import (
    SHARDED,
    CheckpointUnreadable,
    read_shapes,
    read_tensors,
    read_weights,
    save_tensors,
    weights_file,
)

__all__ = [
    "Run",
    "RunError",
    "WriteFailed",
    "best",
    "checkpoints",
    "clean",
    "latest",
    "progress_of",
    "prune",
    "read_progress",
    "read_state",
    "restore",
    "save",
    "writing",
]

PROGRESS, OPTIMIZER = "progress.json", "optimizer.safetensors"
RECENT_LOSSES = 32


class RunError(ValueError):
    """A run folder that cannot be started in or resumed from."""


class WriteFailed(RuntimeError):
    """A checkpoint or log could not be written; the checkpoints before it are whole."""


@dataclass
class Run:
    """One run in progress: what is configured, what moves, and where it is kept.

    Attributes:
        model: its weights; sharded ones under FSDP.
        objective: the loss as DDP or FSDP runs it.
        step: optimizer steps done, skipped updates included.
        samples: windows taken from the feed so far, by all processes; runs ahead of steps after a rollback.
        tokens: tokens that the weights have seen.
        best: least held-out loss so far, mean over ``eval_loops``.
        recent: the last losses, of which the median is what a spike is measured from.
        skips: updates skipped in a row.
    """

    config: RunConfig
    folder: Path
    model: LoopedGPT
    objective: nn.Module
    optimizer: torch.optim.AdamW
    feed: Feed
    processes: Processes
    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    next_snapshot: float = 0.0
    best: float | None = None
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_LOSSES))
    skips: int = 0

    @property
    def samples_per_step(self) -> int:
        return self.config.train.batch_size * self.config.train.grad_accumulation

    @property
    def tokens_per_step(self) -> int:
        return self.samples_per_step * self.config.model.block_size

    @property
    def trained(self) -> dict[str, Any]:
        """What a checkpoint's config.json says of its training."""
        return {"tokens": self.tokens, "steps": self.step, "samples": self.samples, "seconds": round(self.seconds, 1)}

    @property
    def sharded(self) -> bool:
        """Whether FSDP has sharded the weights."""
        return self.processes.world > 1 and self.config.train.strategy == "fsdp"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*"))


@contextmanager
def writing(run_folder: Path, what: str, kept: Callable[[Path], Sequence[Path]] = checkpoints) -> Iterator[None]:
    """Turn a failure to write into a message that says what is safe.

    Args:
        run_folder: of the run.
        what: the file or folder that is written.
        kept: the complete checkpoints in the run folder, oldest first.
    """
    try:
        yield
    except OSError as error:
        whole = kept(run_folder)
        last = f"the last complete checkpoint is {whole[-1].name}" if whole else "there is no checkpoint yet"
        raise WriteFailed(
            f"cannot write {what} in {str(run_folder)!r} ({error.strerror or error}); {last}. Mend that, then --resume"
        ) from error


def latest(folder: Path) -> Path:
    """The newest complete checkpoint.

    Raises:
        RunError: there is none.
    """
    for retired in (folder / "checkpoints").glob(".step-*.retired"):
        settle(retired.with_name(retired.name.removeprefix(".").removesuffix(".retired")))
    found = checkpoints(folder)
    if not found:
        raise RunError(f"no checkpoint in {str(folder)!r} to resume from")
    return found[-1]


def best(folder: Path) -> Path | None:
    """The checkpoint of least held-out loss; None where none was evaluated."""
    measured = {path: read_progress(path).get("held_out") for path in checkpoints(folder)}
    losses = {path: loss for path, loss in measured.items() if loss is not None}
    return min(losses, key=lambda path: losses[path]) if losses else None


def read_progress(path: Path) -> dict[str, Any]:
    """``progress.json`` of a checkpoint.

    Raises:
        RunError: it is missing or is not one.
    """
    try:
        progress = read_json(path / PROGRESS, "the progress", dict)
    except FileError as error:
        raise _damaged(path, str(error)) from None
    for key, kind in (("step", int), ("tokens", int), ("seconds", (int, float)), ("next_snapshot", (int, float))):
        if not isinstance(progress.get(key), kind):
            raise _damaged(path, f"{PROGRESS} has no number {key!r}")
    if not isinstance(progress.get("data"), (dict, type(None))):
        raise _damaged(path, f"{PROGRESS} says nothing of the data")
    return progress


def _damaged(path: Path, reason: str) -> RunError:
    if not path.is_dir():
        return RunError(
            f"there is no checkpoint {str(path)!r} any more: a run in progress removes its old ones. Try again, or "
            "name another"
        )
    return RunError(
        f"checkpoint {str(path)!r} is damaged ({reason}). It was not written like this by haltkit: the disk may have "
        "failed, or the file was edited. Remove that folder to resume from the one before it"
    )


def progress_of(run: Run, versions: Mapping[str, str], held_out: float | None = None) -> dict[str, Any]:
    """Collective: all that moves in a run except weights and moments, as JSON."""
    return {
        "step": run.step,
        "tokens": run.tokens,
        "samples": run.samples,
        "seconds": run.seconds,
        "next_snapshot": run.next_snapshot,
        "best": run.best,
        "held_out": held_out,
        "recent_losses": list(run.recent),
        "skips": run.skips,
        "data": run.feed.position(run.processes.gather),
        "seed": run.config.train.seed,
        "processes": run.processes.world,
        "precision": run.config.train.precision,
        "versions": dict(versions),
    }


def save(run: Run, versions: Mapping[str, str], held_out: float | None = None) -> dict[str, Any]:
    """Collective: write a checkpoint of this step, then prune old ones. Returns what its ``progress.json`` says.

    Raises:
        WriteFailed: it cannot be written; no partial folder remains and nothing has been pruned.
    """
    path = run.folder / "checkpoints" / f"step-{run.step:08d}"
    progress = progress_of(run, versions, held_out)
    state = {
        f"{name}/{key}": value
        for name, parameter in run.model.named_parameters()
        for key, value in run.optimizer.state.get(parameter, {}).items()
    }
    with writing(run.folder, path.name):
        with shared_folder(path, run.processes) as partial:
            if run.sharded:
                save_shards(partial / SHARDED, run.model, state)
                if run.processes.first:
                    write_model_config(partial, run.config.model, run.trained)
            elif run.processes.first:
                save_checkpoint(partial, run.model, run.config.model, dtype=torch.float32, trained=run.trained)
                save_tensors(state, partial / OPTIMIZER)
            if run.processes.first:
                copy_tokenizer(Path(run.config.data.path).expanduser(), partial)
                if run.sharded:
                    progress["shards"] = {p.name: p.stat().st_size for p in sorted((partial / SHARDED).iterdir())}
                (partial / PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
        if run.processes.first:
            prune(run.folder, run.config.train.keep_checkpoints, run.config.train.keep_every)
    return progress


def prune(folder: Path, newest: int, every: int) -> None:
    """Remove checkpoints except the newest, the best, and those at multiples of a number of steps (0: none)."""
    found = checkpoints(folder)
    kept = {*found[-newest:], best(folder)}
    for path in found:
        if path not in kept and not (every and read_progress(path)["step"] % every == 0):
            # Renamed first: what a kill leaves of it must not look like a checkpoint.
            gone = path.rename(path.with_name(f".{path.name}.partial"))
            shutil.rmtree(gone)


def restore(run: Run, path: Path, *, data: bool = True) -> None:
    """Collective: put a run back to where a checkpoint was written.

    Args:
        data: also the position in the training data; a rollback does not change it.

    Raises:
        RunError: the checkpoint is damaged, or was written over other data.
        CheckpointError: it does not fit the config.
    """
    progress = read_progress(path)
    weights, state = read_state(run.model, path, alone=run.processes.world == 1)
    if run.sharded:
        load_sharded(run.model, weights)
    else:
        load_weights(run.model, weights)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        parameter_name, _, key = name.rpartition("/")
        by_parameter.setdefault(parameter_name, {})[key] = value
    for name, parameter in run.model.named_parameters():
        run.optimizer.state[parameter] = {
            key: like(parameter, value) for key, value in by_parameter.get(name, {}).items()
        }
    run.step, run.seconds, run.tokens = int(progress["step"]), float(progress["seconds"]), int(progress["tokens"])
    run.next_snapshot = float(progress["next_snapshot"])
    run.recent.clear()
    run.recent.extend(progress.get("recent_losses", []))
    run.skips = int(progress.get("skips", 0))
    if data:
        run.best = progress.get("best")
        # Checkpoints of version 0.1.0's first weeks do not say; every step took one batch then.
        run.samples = int(progress.get("samples", run.tokens // run.config.model.block_size))
        if progress.get("data") is not None:
            run.feed.seek(progress["data"])


def _in_shards(path: Path, progress: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is in shards; if so they are checked.

    Raises:
        CheckpointUnreadable: a shard is missing or damaged.
    """
    if "shards" not in progress and not (path / SHARDED).is_dir():
        return False
    check_shards(path / SHARDED, progress.get("shards", {}))
    return True


def read_state(
    model: LoopedGPT, path: Path, *, alone: bool, moments: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Collective, unless ``alone``: a checkpoint's weights, sharded as the model's are, and its optimizer's state.

    Args:
        moments: without them the state is empty.

    Raises:
        RunError: the checkpoint is damaged.
        CheckpointError: it is one of another model.
    """
    progress = read_progress(path)
    try:
        if _in_shards(path, progress):
            weights, state = read_shards(model, path, alone, moments)
        else:
            weights, state = read_weights(path), read_tensors(path / OPTIMIZER) if moments else {}
        check_weights(model, weights)
    except CheckpointUnreadable as error:
        raise _damaged(path, str(error)) from None
    return weights, state


def check_stored(config: ModelConfig, path: Path) -> None:
    """Whether a checkpoint's weights, whole or in shards, are those of a config: from the files' headers alone.

    Raises:
        RunError: the checkpoint is damaged.
        CheckpointError: it is one of another model.
    """
    progress = read_progress(path)
    try:
        if _in_shards(path, progress):
            stored = stored_shapes(path / SHARDED)
            found = {n.removeprefix("model/"): shape for n, shape in stored.items() if n.startswith("model/")}
        else:
            found = read_shapes(weights_file(path))
        check_shapes(config, found, build_model)
    except CheckpointUnreadable as error:
        raise _damaged(path, str(error)) from None


def clean(folder: Path) -> None:
    """Remove partial files of killed writers from a run folder."""
    for place in (folder, folder / "checkpoints", folder / "snapshots"):
        sweep(place)
