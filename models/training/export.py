"""Checkpoint folders to use and to share: weights alone, in bf16, with config, tokenizer and model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haltkit.files import write_json
from haltkit.folders import atomic_folder
from haltkit.models.checkpoint import build_model
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.files import read_config, save_weights
from haltkit.models.gpt.hub import write_card
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.text.tokenizer import copy_tokenizer
from haltkit.models.training.runs import PROGRESS, RunError, best, check_stored, read_progress, read_state

__all__ = ["export", "write_export"]


def write_export(
    folder: Path,
    model: LoopedGPT,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    trained: dict[str, Any],
    progress: dict[str, Any],
    tokenizer: Path,
) -> None:
    """Fill an existing folder (make it with ``atomic_folder``).

    Args:
        model: of this config; it is asked for its card only.
        weights: by name, whole ones.
        progress: for a run that goes on from here.
        tokenizer: a folder that has it, unless it is gpt2's.
    """
    save_weights(folder, weights, config, dtype=torch.bfloat16, trained=trained)
    copy_tokenizer(tokenizer, folder)
    write_card(model, folder)
    write_json(folder / PROGRESS, progress)


def export(source: Path, out: Path) -> Path:
    """Make such a folder of a run's checkpoint, whole or in shards, in one process. Returns the checkpoint's path.

    Args:
        source: the checkpoint; or a run folder, for the best of those that it keeps.
        out: it must not exist.

    Raises:
        RunError: ``out`` exists, the run keeps no checkpoint that was evaluated, or the checkpoint is damaged.
        CheckpointError: it is not one.
    """
    if out.exists():
        raise RunError(f"{str(out)!r} exists already: choose another folder")
    if (source / "checkpoints").is_dir():
        found = best(source)
        if found is None:
            raise RunError(
                f"{str(source)!r} keeps no checkpoint that was evaluated, so none is the best: name one of those in "
                f"{str(source / 'checkpoints')!r}"
            )
        source = found
    config, trained = read_config(source)
    progress = read_progress(source)
    check_stored(config, source)
    model = build_model(config)
    weights, _ = read_state(model, source, alone=True, moments=False)
    progress = {key: value for key, value in progress.items() if key != "shards"}
    with atomic_folder(out) as partial:
        write_export(partial, model, config, weights, trained=trained, progress=progress, tokenizer=source)
    return source
