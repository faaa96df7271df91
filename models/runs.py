"""A training run: what moves in it, and the checkpoints that it is kept in.

A checkpoint is a folder ``step-XXXXXXXX`` that appears whole or not at all. It holds the weights and the optimizer's
moments in float32 as safetensors and everything else that moves in ``progress.json``; nothing in it depends on how
many processes wrote it. Under FSDP weights and moments are in ``sharded/``, a file a process, written and read by
torch.distributed.checkpoint, which reads them on any number of processes. It takes whatever files are there and leaves
what none of them holds as it was, so ``progress.json`` lists them.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.models.checkpoint import (
    SHARDED,
    CheckpointUnreadable,
    check_names_and_shapes,
    check_weights,
    load_weights,
    read_tensors,
    read_weights,
    save_checkpoint,
    save_tensors,
    write_model_config,
)
from haltkit.models.config import RunConfig
from haltkit.models.data import Feed
from haltkit.models.distributed import Processes, shared_folder
from haltkit.models.files import settle, sweep
from haltkit.models.gpt import LoopedGPT
from haltkit.models.tokenizer import copy_tokenizer

__all__ = [
    "Run", "RunError", "WriteFailed", "best", "checkpoints", "clean", "latest", "progress_of", "prune", "read_progress",
    "read_state", "restore", "save", "writing",
]  # fmt: skip

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
        return {
            "tokens": self.tokens, "steps": self.step, "samples": self.samples, "seconds": round(self.seconds, 1),
        }  # fmt: skip

    @property
    def sharded(self) -> bool:
        """Whether FSDP has sharded the weights."""
        return self.processes.world > 1 and self.config.train.strategy == "fsdp"


@contextmanager
def writing(run_folder: Path, what: str) -> Iterator[None]:
    """Turn a failure to write into a message that says what is safe."""
    try:
        yield
    except OSError as error:
        kept = checkpoints(run_folder)
        last = f"the last complete checkpoint is {kept[-1].name}" if kept else "there is no checkpoint yet"
        raise WriteFailed(
            f"cannot write {what} in {str(run_folder)!r} ({error.strerror or error}); {last}. Mend that, then --resume"
        ) from error


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*"))


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
        progress: dict[str, Any] = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        progress["step"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, f"{PROGRESS}: {type(error).__name__}: {error}") from None
    return progress


def _damaged(path: Path, reason: str) -> RunError:
    return RunError(
        f"checkpoint {str(path)!r} is damaged ({reason}). haltkit does not write such: the disk or somebody did. "
        "Remove that folder to resume from the one before it"
    )


def progress_of(run: Run, versions: Mapping[str, str], held_out: float | None = None) -> dict[str, Any]:
    """Together: all that moves in a run except weights and moments, as JSON."""
    return {
        "step": run.step, "tokens": run.tokens, "samples": run.samples, "seconds": run.seconds,
        "next_snapshot": run.next_snapshot, "best": run.best, "held_out": held_out, "recent_losses": list(run.recent),
        "skips": run.skips, "data": run.feed.position(run.processes), "seed": run.config.train.seed,
        "processes": run.processes.world, "versions": dict(versions),
    }  # fmt: skip


def save(run: Run, versions: Mapping[str, str], held_out: float | None = None) -> dict[str, Any]:
    """Together: write a checkpoint of this step, then prune old ones. Returns what its ``progress.json`` says.

    Raises:
        WriteFailed: it cannot be written; no half of it is left and nothing has been pruned.
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
                _save_shards(partial / SHARDED, run.model, state)
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
    """Remove checkpoints except the newest, the best, and those of every so many steps (0: none)."""
    found = checkpoints(folder)
    kept = {*found[-newest:], best(folder)}
    for path in found:
        if path not in kept and not (every and read_progress(path)["step"] % every == 0):
            # Renamed first: what a kill leaves of it must not look like a checkpoint.
            gone = path.rename(path.with_name(f".{path.name}.partial"))
            shutil.rmtree(gone)


def restore(run: Run, path: Path, *, data: bool = True) -> None:
    """Together: put a run back to where a checkpoint was written.

    Args:
        data: also the position in the training data; a rollback leaves it where it is.

    Raises:
        RunError: the checkpoint is damaged, or was written over other data.
        CheckpointError: it does not fit the config.
    """
    progress = read_progress(path)
    weights, state = read_state(run.model, path, alone=run.processes.world == 1)
    if run.sharded:
        _load_sharded(run.model, weights)
    else:
        load_weights(run.model, weights)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        parameter_name, _, key = name.rpartition("/")
        by_parameter.setdefault(parameter_name, {})[key] = value
    for name, parameter in run.model.named_parameters():
        run.optimizer.state[parameter] = {
            key: _like(parameter, value) for key, value in by_parameter.get(name, {}).items()
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
            run.feed.seek(progress["data"], run.processes)


def read_state(
    model: LoopedGPT, path: Path, *, alone: bool, moments: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Together, unless ``alone``: a checkpoint's weights, sharded as the model's are, and its optimizer's state.

    Args:
        moments: without them the state is empty.

    Raises:
        RunError: the checkpoint is damaged.
        CheckpointError: it is one of another model.
    """
    progress = read_progress(path)
    try:
        if "shards" in progress or (path / SHARDED).is_dir():
            _check_shards(path / SHARDED, progress.get("shards", {}))
            weights, state = _read_shards(model, path, alone, moments)
        else:
            weights, state = read_weights(path), read_tensors(path / OPTIMIZER) if moments else {}
        check_weights(model, weights)
    except CheckpointUnreadable as error:
        raise _damaged(path, str(error)) from None
    return weights, state


def clean(folder: Path) -> None:
    """Remove what writers that were killed left in a run folder."""
    for place in (folder, folder / "checkpoints", folder / "snapshots"):
        sweep(place)


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A moment as its parameter is: on its device, sharded as it is. The count of steps is one number everywhere."""
    value = value.to(parameter.device)
    if type(parameter.data) is Tensor or not value.ndim:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _load_sharded(model: LoopedGPT, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_like(parameter, weights[name]))


def _save_shards(folder: Path, model: LoopedGPT, state: Mapping[str, Tensor]) -> None:
    """Together: each process writes its part.

    Raises:
        OSError: one of them could not; everybody is told.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as save_shards

    tensors = {f"model/{name}": weight.detach() for name, weight in model.state_dict().items()}
    tensors |= {f"optimizer/{name}": value.reshape(1) if not value.ndim else value for name, value in state.items()}
    try:
        save_shards(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise _first_failure(error) from None


def _first_failure(error: Any) -> BaseException:
    """What went wrong in the first process where something did."""
    failures: dict[int, tuple[BaseException, Any]] = error.failures
    return failures[min(failures)][0]


def _check_shards(folder: Path, sizes: Mapping[str, int]) -> None:
    """Whether the shards that were written are there, whole as far as their length tells.

    Raises:
        CheckpointUnreadable: it names the file.
    """
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointUnreadable(f"no {name} in {str(folder)!r}")
        if path.stat().st_size != size:
            raise CheckpointUnreadable(
                f"{name} in {str(folder)!r} cannot be read: it ends at byte {path.stat().st_size:,}, it should at "
                f"{size:,}"
            )


def _read_shards(
    model: LoopedGPT, path: Path, alone: bool, moments: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read what FSDP wrote, each process its part under FSDP again, the whole otherwise."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    folder = path / SHARDED
    try:
        stored = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        tensors: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            tensors[f"model/{name}"] = torch.zeros_like(parameter.detach())
            for key in ("exp_avg", "exp_avg_sq", "step") if moments else ():
                if (full := f"optimizer/{name}/{key}") in stored:
                    tensors[full] = torch.zeros(1) if key == "step" else torch.zeros_like(parameter.detach())
        own = {name: tuple(t.shape) for name, t in tensors.items()}
        found = {name: tuple(t.size) for name, t in stored.items() if isinstance(t, TensorStorageMetadata)}
        check_names_and_shapes(own, {name: found[name] for name in found if moments or name.startswith("model/")})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process: that is meant
            load_shards(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except (OSError, KeyError, SafetensorError, CheckpointException) as error:
        cause = _first_failure(error) if isinstance(error, CheckpointException) else error
        raise CheckpointUnreadable(f"{SHARDED} in {str(path)!r} cannot be read: {cause}") from None
    weights = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    state = {
        name.removeprefix("optimizer/"): t[0] if name.endswith("/step") else t
        for name, t in tensors.items()
        if name.startswith("optimizer/")
    }
    return weights, state
