"""Where a run's events go: JSONL always, TensorBoard always, Weights & Biases where asked for."""

from __future__ import annotations

import json
import os
import platform
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from haltkit.files import FileError, read_json, write_json
from haltkit.models.config import ConfigError, to_dict
from haltkit.models.training.config import RunConfig
from haltkit.models.training.runs import writing

__all__ = ["LOG_FILE", "Event", "end_at_a_whole_line", "log_to", "versions"]

# What training reports: {"kind": "start" | "step" | "eval" | "checkpoint" | "snapshot" | "fault" | "end", ...}.
Event = Mapping[str, Any]
LOG_FILE, WANDB_FILE = "log.jsonl", "wandb.json"
SCALARS = ("loss", "lr", "grad_norm", "tokens_per_second")


def versions() -> dict[str, str]:
    """What the run is made of, for its log and its checkpoints."""
    import numpy as np
    import torch

    from haltkit import __version__

    return {
        "haltkit": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x {torch.get_num_threads()}",
    }


@contextmanager
def log_to(
    folder: Path, config: RunConfig, step: int, on_event: Callable[[Event], None] | None
) -> Iterator[Callable[[Event], None]]:
    """Write every event to ``log.jsonl``, TensorBoard and, if configured, Weights & Biases; then pass it on.

    Args:
        step: the run goes on after it; what TensorBoard has of later steps was lost with them and is hidden.

    Raises:
        ConfigError: ``wandb_project`` is set and wandb is not installed.
        WriteFailed: the log cannot be written.
    """
    wandb = _wandb(folder, config)
    with writing(folder, LOG_FILE):
        end_at_a_whole_line(folder / LOG_FILE)
        log = (folder / LOG_FILE).open("a", encoding="utf-8", buffering=1)
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def emit(event: Event) -> None:
        step = event["step"]
        numbers = {f"train/{key}": event[key] for key in SCALARS if event["kind"] == "step"}
        numbers |= {f"eval/loss at {loops} loops": loss for loops, loss in event.get("losses", {}).items()}
        with writing(folder, LOG_FILE):
            log.write(json.dumps(event) + "\n")
            for name, value in numbers.items():
                board.add_scalar(name, value, step)
            if event["kind"] in ("eval", "end"):
                board.flush()
        if wandb is not None and numbers:
            wandb.log(numbers, step=step)
        if on_event is not None:
            on_event(event)

    try:
        yield emit
    finally:
        with writing(folder, LOG_FILE):
            board.close()
            log.close()
        if wandb is not None:
            wandb.finish()


def _wandb(folder: Path, config: RunConfig) -> Any:
    if not config.train.wandb_project:
        return None
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"train.wandb_project={config.train.wandb_project!r} needs wandb: pip install wandb, or leave it empty"
        ) from None
    # Written down, so that a resumed run continues its curves; folders may share a name, runs an identity never.
    known = folder / WANDB_FILE
    if not known.is_file():
        with writing(folder, WANDB_FILE):
            write_json(known, {"id": secrets.token_hex(8)})
    try:
        identity = read_json(known, "the run's identity at Weights & Biases", dict)["id"]
    except (FileError, KeyError):
        raise ConfigError(
            f"{str(known)!r} does not say under which id the run is known to Weights & Biases: correct it, or leave "
            "train.wandb_project empty"
        ) from None
    return wandb.init(
        project=config.train.wandb_project,
        id=identity,
        name=folder.resolve().name,
        dir=str(folder),
        resume="allow",
        config=to_dict(config),
    )


def end_at_a_whole_line(path: Path) -> None:
    """Cut off a partial last line, which a kill during a write can cause."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - 2**16)
        file.seek(start)
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(start + tail.rfind(b"\n") + 1)
