"""Checkpoints: a folder with ``config.json``, ``model.safetensors``, the tokenizer and a model card.

Weights are safetensors and the rest is JSON, so loading runs no code from the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiktoken
import torch
from torch import Tensor

from haltkit.models.config import ConfigError, ModelConfig, from_dict, to_dict
from haltkit.models.files import settle, write_json
from haltkit.models.gpt import LoopedGPT
from haltkit.models.tokenizer import TOKENIZER_FILE, load_tokenizer

__all__ = [
    "BUNDLED",
    "Checkpoint",
    "CheckpointError",
    "CheckpointUnreadable",
    "build_model",
    "load_checkpoint",
    "load_weights",
    "save_checkpoint",
]

CONFIG_FILE, WEIGHTS_FILE, SHARDED = "config.json", "model.safetensors", "sharded"
GPT2_VOCABULARY = 50257
LISTED = 8  # differences that an error names one by one
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
BUNDLED = Path(__file__).parent / "bundled"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or does not match its config."""


class CheckpointUnreadable(CheckpointError):
    """A file of a checkpoint is missing or cannot be read."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the model in evaluation mode, its tokenizer, and what is known of its training."""

    model: LoopedGPT
    config: ModelConfig
    tokenizer: tiktoken.Encoding
    trained: dict[str, Any] = field(default_factory=dict)


def build_model(config: ModelConfig) -> LoopedGPT:
    """A freshly initialized model of this config (from torch's global generator)."""
    from dataclasses import asdict

    return LoopedGPT(**asdict(config))


def save_checkpoint(
    folder: Path, model: LoopedGPT, config: ModelConfig, *, dtype: torch.dtype, trained: dict[str, Any]
) -> None:
    """Write weights and config into an existing folder (make it with ``atomic_folder``)."""
    save_weights(folder, model.state_dict(), config, dtype=dtype, trained=trained)


def save_weights(
    folder: Path, weights: Mapping[str, Tensor], config: ModelConfig, *, dtype: torch.dtype, trained: dict[str, Any]
) -> None:
    """The same for weights by name, whole ones."""
    save_tensors({name: tensor.to(dtype) for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
    write_model_config(folder, config, trained)


def write_model_config(folder: Path, config: ModelConfig, trained: dict[str, Any]) -> None:
    """Write ``config.json`` of a checkpoint folder."""
    write_json(folder / CONFIG_FILE, {"model_type": "looped_gpt", "model": to_dict(config), "trained": trained})


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written, for instance because the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file as a dictionary.

    Raises:
        CheckpointUnreadable: the file is missing or is not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CheckpointUnreadable(f"no {path.name} in {str(path.parent)!r}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointUnreadable(f"{path.name} in {str(path.parent)!r} cannot be read: {error}") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint folder.

    Raises:
        CheckpointError: they are a pickle, or in shards; and as :func:`read_tensors`.
    """
    refuse_pickles(folder)
    if (folder / SHARDED).is_dir() and not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"{str(folder)!r} has its weights in shards, as FSDP wrote them: make a whole checkpoint of it with "
            f"'haltkit export {folder} --out DIR'"
        )
    return read_tensors(folder / WEIGHTS_FILE)


def check_weights(model: LoopedGPT, weights: dict[str, Tensor]) -> None:
    """Whether weights fit a model.

    Raises:
        CheckpointError: names or shapes differ; the differences are listed.
    """
    own = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    check_names_and_shapes(own, {name: tuple(weight.shape) for name, weight in weights.items()})


def check_names_and_shapes(own: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Whether tensors found somewhere are those that the model has.

    Raises:
        CheckpointError: names or shapes differ; the differences are listed, at most the first eight.
    """
    problems = [f"missing {name}" for name in own if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in own]
    problems += [
        f"{name} is {found[name]}, the config says {own[name]}"
        for name in own
        if name in found and found[name] != own[name]
    ]
    if problems:
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise CheckpointError(f"weights do not match the config: {'; '.join(problems[:LISTED])}{more}")


def load_weights(model: LoopedGPT, weights: dict[str, Tensor]) -> None:
    """Copy weights into a model, whatever their dtype.

    Raises:
        CheckpointError: see :func:`check_weights`.
    """
    check_weights(model, weights)
    model.load_state_dict(weights)


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's config and the training record of a checkpoint folder."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{str(folder)!r} is not a checkpoint: it has no {CONFIG_FILE}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config = from_dict(ModelConfig, values["model"], "model")
    except ConfigError as error:
        raise CheckpointError(f"{CONFIG_FILE} in {str(folder)!r}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{CONFIG_FILE} in {str(folder)!r} is not a checkpoint's: {error}") from None
    trained = values.get("trained", {})
    if not isinstance(trained, dict):
        raise CheckpointError(f"{CONFIG_FILE} in {str(folder)!r}: 'trained' is not a mapping")
    return config, trained


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose weights are there as a pickle only: reading one can run any code.

    Raises:
        CheckpointError: it names the file.
    """
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
    if pickles and not (folder / WEIGHTS_FILE).is_file():
        raise CheckpointError(
            f"{str(folder)!r} has its weights in {', '.join(pickles)}: a pickle can run code when it is read, so it is "
            f"refused. Ask for, or convert to, {WEIGHTS_FILE}"
        )


def load_checkpoint(
    folder: str | Path = BUNDLED, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Checkpoint:
    """Load a checkpoint folder, by default the one that ships with haltkit.

    Args:
        folder: written by training or by :func:`save_checkpoint`.
        dtype: of the weights and so of the computation; signals want float32 (the stored bf16 weights lose
            nothing on the way up).
        device: where the model goes.

    Raises:
        CheckpointError: missing or damaged files, or weights that do not match the config.
    """
    folder = Path(folder)
    settle(folder)
    config, trained = read_config(folder)
    weights = read_weights(folder)
    with torch.device("meta"):  # the shapes alone: a mistaken config must not fill the memory
        check_weights(build_model(config), weights)
    model = build_model(config)
    load_weights(model, weights)
    if not all(bool(weight.abs().amax() < torch.inf) for weight in weights.values()):
        raise CheckpointError(f"the weights in {str(folder)!r} are not finite")
    if (folder / TOKENIZER_FILE).is_file():
        tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    elif config.vocab_size >= GPT2_VOCABULARY:
        tokenizer = load_tokenizer("gpt2")
    else:
        raise CheckpointError(
            f"no {TOKENIZER_FILE} in {str(folder)!r}, and the model's {config.vocab_size} tokens are not gpt2's: load "
            "a run's 'final' or one of its snapshots, or put the tokenizer beside the weights"
        )
    if tokenizer.n_vocab > config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {str(folder)!r} has {tokenizer.n_vocab} tokens, the model {config.vocab_size}"
        )
    model.tokenizer, model.trained = tokenizer, trained
    return Checkpoint(model.to(device, dtype).eval(), config, tokenizer, trained)
