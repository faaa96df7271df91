"""Sharing checkpoints: what huggingface_hub's mixin saves, loads and pushes for a LoopedGPT.

A shared folder is a checkpoint folder like any other: ``config.json``, ``model.safetensors``, the tokenizer, a model
card. Loading reads JSON and safetensors and runs no code from the folder; pickles are refused, and never downloaded.
"""

from __future__ import annotations

from pathlib import Path

from haltkit.models.checkpoint import (
    CONFIG_FILE,
    GPT2_VOCABULARY,
    WEIGHTS_FILE,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    refuse_pickles,
    save_checkpoint,
)
from haltkit.models.config import ModelConfig, from_dict
from haltkit.models.gpt import LoopedGPT
from haltkit.models.tokenizer import TOKENIZER_FILE, write_ranks

__all__ = ["load_folder", "save_folder", "write_card"]

CARD_FILE = "README.md"
FILES = [CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, CARD_FILE]


def save_folder(model: LoopedGPT, folder: Path) -> None:
    """Write config, weights in the model's own dtype, and tokenizer into an existing folder.

    Raises:
        CheckpointError: the model has no tokenizer, and GPT-2's does not fit it.
    """
    arguments = model._hub_mixin_config  # those that it was built with, which the mixin has noted
    assert isinstance(arguments, dict)
    config = from_dict(ModelConfig, arguments)
    if model.tokenizer is not None:
        write_ranks(model.tokenizer, folder / TOKENIZER_FILE)
    elif config.vocab_size < GPT2_VOCABULARY:
        raise CheckpointError(
            f"a model of {config.vocab_size} tokens cannot be used without its tokenizer: set model.tokenizer first "
            "(haltkit.models.tokenizer.load_tokenizer)"
        )
    save_checkpoint(folder, model, config, dtype=model.wte.weight.dtype, trained=model.trained)


def write_card(model: LoopedGPT, folder: Path) -> None:
    """Write the mixin's model card into a folder that is not saved through it."""
    model.generate_model_card().save(folder / CARD_FILE)


def load_folder(
    source: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    token: str | bool | None = None,
) -> Checkpoint:
    """Load a local folder or a repository on the Hub; see :func:`~haltkit.models.checkpoint.load_checkpoint`."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(
                source, revision=revision, cache_dir=cache_dir, force_download=force_download, token=token,
                local_files_only=local_files_only, allow_patterns=FILES,
            )
        )  # fmt: skip
    refuse_pickles(folder)
    return load_checkpoint(folder)
