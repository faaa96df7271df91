"""A reasoner's checkpoint: a folder with ``config.json``, ``model.safetensors`` and, where it ships, a model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haltkit.folders import settle
from haltkit.models.config import ConfigError, from_dict, to_dict
from haltkit.models.reasoner.config import LayerConfig, ReasonerConfig, build_reasoner, plain
from haltkit.models.reasoner.model import Reasoner
from haltkit.models.reasoner.task import Task, make_task
from haltkit.models.weights import (
    BUNDLED,
    CHECKPOINT_CONFIG,
    WEIGHTS_FILE,
    CheckpointError,
    Header,
    check_names_and_shapes,
    read_header,
    read_weights,
    save_tensors,
    write_header,
)
from haltkit.trust import reading

__all__ = ["ReasonerCheckpoint", "bundled_reasoner", "load_reasoner", "save_reasoner"]

PREFIX = "haltkit-"  # a checkpoint's model_type is this and the task's name


@dataclass(frozen=True)
class _Settings:
    task: dict  # type: ignore[type-arg]  # from_dict checks a plain dict; the task reads what is in it


@dataclass(frozen=True)
class ReasonerCheckpoint:
    """A loaded checkpoint: the model in evaluation mode, its task and shape, and what is known of its training."""

    model: Reasoner
    task: Task
    shape: LayerConfig
    trained: dict[str, Any] = field(default_factory=dict)


def save_reasoner(folder: Path, weights: Mapping[str, Tensor], config: ReasonerConfig, trained: dict[str, Any]) -> None:
    """Write weights in float32 and ``config.json`` into an existing folder (make it with ``atomic_folder``)."""
    save_tensors({name: tensor.float() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
    model = {**to_dict(config.model), "task": plain(config.settings)}
    write_header(folder, Header(PREFIX + config.task, model, trained))


def load_reasoner(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ReasonerCheckpoint:
    """Load a checkpoint folder that :func:`save_reasoner` wrote.

    Args:
        folder: a run's ``final``, or a bundled one (:func:`bundled_reasoner`).
        dtype: of the weights, and so of the computation.
        device: where the model goes.

    Raises:
        CheckpointError: missing or damaged files, another kind of model, or weights that do not match the config.
        CodeRefused: the task is code of its own, and code from files is not allowed (:func:`haltkit.allow_code`).
    """
    folder = Path(folder)
    settle(folder)
    header = read_header(folder)
    if not header.model_type.startswith(PREFIX):
        raise CheckpointError(f"{str(folder)!r} contains a {header.model_type!r}, not a reasoner ({PREFIX}...)")
    try:
        settings = from_dict(_Settings, {"task": header.model.get("task", {})}).task
        with reading(f"the checkpoint {str(folder)!r}"):
            task = make_task(header.model_type.removeprefix(PREFIX), settings)
        layer = {name: value for name, value in header.model.items() if name != "task"}
        config = from_dict(LayerConfig, layer, "model")
    except ConfigError as error:
        raise CheckpointError(f"{CHECKPOINT_CONFIG} in {str(folder)!r}: {error}") from None
    weights = read_weights(folder)
    try:
        with torch.device("meta"):  # the shapes alone: a mistaken config must not fill the memory
            own = {name: tuple(weight.shape) for name, weight in build_reasoner(task, config).state_dict().items()}
    except RuntimeError as error:
        raise CheckpointError(f"{CHECKPOINT_CONFIG} in {str(folder)!r} asks for an impossible size: {error}") from None
    check_names_and_shapes(own, {name: tuple(weight.shape) for name, weight in weights.items()})
    if not all(bool(weight.isfinite().all()) for weight in weights.values()):
        raise CheckpointError(f"the weights in {str(folder)!r} are not finite")
    with torch.random.fork_rng():
        model = build_reasoner(task, config)
    model.load_state_dict(weights)
    return ReasonerCheckpoint(model.to(device, dtype).eval(), task, config, header.trained)


def bundled_reasoner(
    name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> ReasonerCheckpoint:
    """A reasoner that ships with haltkit: ``chase`` or ``sudoku``.

    Raises:
        CheckpointError: an unknown reasoner; the known ones are listed.
    """
    if not (BUNDLED / name / CHECKPOINT_CONFIG).is_file():
        known = sorted(path.parent.name for path in BUNDLED.glob(f"*/{CHECKPOINT_CONFIG}"))
        raise CheckpointError(f"no bundled reasoner {name!r}; there are: {', '.join(known)}")
    return load_reasoner(BUNDLED / name, dtype=dtype, device=device)
