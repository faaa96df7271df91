"""The checkpoint folder of a looped GPT: config, weights and tokenizer.

What builds the model is an argument: this module stands below the model, and :mod:`haltkit.models.checkpoint` above it.
What is common to checkpoints of all models is in :mod:`haltkit.models.weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tiktoken
import torch
from torch import Tensor, nn

from haltkit.folders import settle
from haltkit.models.config import ConfigError, from_dict, to_dict
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.text.tokenizer import TOKENIZER_FILE, load_tokenizer
from haltkit.models.weights import (
    CHECKPOINT_CONFIG,
    WEIGHTS_FILE,
    CheckpointError,
    Header,
    check_names_and_shapes,
    read_header,
    read_shapes,
    read_weights,
    save_tensors,
    weights_file,
    write_header,
)

__all__ = [
    "GPT2_VOCABULARY",
    "MODEL_TYPE",
    "check_shapes",
    "check_weights",
    "load_folder",
    "load_weights",
    "read_config",
    "save_checkpoint",
    "save_weights",
    "write_model_config",
]

M = TypeVar("M", bound=nn.Module)
MODEL_TYPE = "looped_gpt"
GPT2_VOCABULARY = 50257


def save_checkpoint(
    folder: Path, model: nn.Module, config: ModelConfig, *, dtype: torch.dtype, trained: dict[str, Any]
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
    write_header(folder, Header(MODEL_TYPE, to_dict(config), trained))


def check_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Whether weights fit a model.

    Raises:
        CheckpointError: names or shapes differ; the differences are listed.
    """
    own = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    check_names_and_shapes(own, {name: tuple(weight.shape) for name, weight in weights.items()})


def check_shapes(
    config: ModelConfig, found: Mapping[str, tuple[int, ...]], build: Callable[[ModelConfig], nn.Module]
) -> None:
    """Whether tensors of these shapes are the weights of a model of this config, before anything is built.

    Args:
        found: the tensors' shapes by name, from the header of their file.
        build: makes the model of a config; it is called on the meta device, where weights take no memory.

    Raises:
        CheckpointError: they are not; the differences are listed.
    """
    # Every layer has a tensor of its own, and every size is one of some tensor: what a mistaken config can cost below
    # is bounded by the file.
    if config.n_layer > len(found):
        raise CheckpointError(
            f"weights do not match the config: it says {config.n_layer:,} layers, the weights are {len(found)} tensors"
        )
    largest = max((size for shape in found.values() for size in shape), default=0)
    for name in ("vocab_size", "block_size", "d_model", "mlp_ratio"):
        if getattr(config, name) > largest:
            raise CheckpointError(
                f"weights do not match the config: it says {name} {getattr(config, name):,}, and no tensor of the "
                f"weights is larger than {largest:,} in any direction"
            )
    with torch.device("meta"):
        own = {name: tuple(weight.shape) for name, weight in build(config).state_dict().items()}
    check_names_and_shapes(own, found)


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into a model, whatever their dtype.

    Raises:
        CheckpointError: see :func:`check_weights`.
    """
    check_weights(model, weights)
    model.load_state_dict(weights)


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's config and the training record of a checkpoint folder.

    Raises:
        CheckpointError: not a checkpoint, one of another kind of model, or a config that cannot be used.
    """
    header = read_header(folder)
    if header.model_type != MODEL_TYPE:
        raise CheckpointError(
            f"{str(folder)!r} contains a model of type {header.model_type!r}; a checkpoint of type {MODEL_TYPE!r} is "
            "needed here"
        )
    try:
        config = from_dict(ModelConfig, header.model, "model")
    except ConfigError as error:
        raise CheckpointError(f"{CHECKPOINT_CONFIG} in {str(folder)!r}: {error}") from None
    return config, header.trained


def load_folder(
    folder: Path, build: Callable[[ModelConfig], M], *, dtype: torch.dtype, device: torch.device | str
) -> tuple[M, ModelConfig, tiktoken.Encoding, dict[str, Any]]:
    """A checkpoint folder's model in evaluation mode, its config, its tokenizer and the record of its training.

    Args:
        folder: written by training or by :func:`save_checkpoint`.
        build: makes the model of a config; its weights are then replaced.
        dtype, device: of the weights, and so of the computation.

    Raises:
        CheckpointError: missing or damaged files, or weights that do not match the config.
    """
    settle(folder)
    config, trained = read_config(folder)
    check_shapes(config, read_shapes(weights_file(folder)), build)
    weights = read_weights(folder)
    model = build(config)
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
    return model.to(device, dtype).eval(), config, tokenizer, trained
