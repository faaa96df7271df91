"""Checkpoints of the bundled looped GPT: a folder with ``config.json``, weights, the tokenizer and a model card.

Weights are safetensors and the rest is JSON, so loading runs no code from the folder.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tiktoken
import torch

from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.files import load_folder
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.weights import BUNDLED

__all__ = ["BUNDLED", "Checkpoint", "build_model", "load_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the model in evaluation mode, its tokenizer, and what is known of its training."""

    model: LoopedGPT
    config: ModelConfig
    tokenizer: tiktoken.Encoding
    trained: dict[str, Any] = field(default_factory=dict)


def build_model(config: ModelConfig) -> LoopedGPT:
    """A freshly initialized model of this config (from torch's global generator)."""
    return LoopedGPT(**asdict(config))


def load_checkpoint(
    folder: str | Path = BUNDLED, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Checkpoint:
    """Load a checkpoint folder, by default the one that ships with haltkit.

    Args:
        folder: written by training or by :func:`~haltkit.models.gpt.files.save_checkpoint`.
        dtype: of the weights and so of the computation; signals want float32 (the stored bf16 weights lose
            nothing on the way up).
        device: where the model goes.

    Raises:
        CheckpointError: missing or damaged files, or weights that do not match the config.
    """
    model, config, tokenizer, trained = load_folder(Path(folder).expanduser(), build_model, dtype=dtype, device=device)
    model.tokenizer, model.trained = tokenizer, trained
    return Checkpoint(model, config, tokenizer, trained)
