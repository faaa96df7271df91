"""Sharing checkpoints: what huggingface_hub's mixin saves, loads and pushes for a model.

A shared folder is a checkpoint folder like any other: ``config.json``, ``model.safetensors``, the tokenizer, a model
card. Loading reads JSON and safetensors and runs no code from the folder; pickles are refused, and never downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import tiktoken
import torch
from huggingface_hub import ModelHubMixin
from torch import nn

from haltkit.models.config import from_dict
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.files import GPT2_VOCABULARY, load_folder, save_checkpoint
from haltkit.models.text.tokenizer import TOKENIZER_FILE, write_ranks
from haltkit.models.weights import CHECKPOINT_CONFIG, WEIGHTS_FILE, CheckpointError, refuse_pickles

__all__ = ["Shared", "write_card"]

S = TypeVar("S", bound="Shared")
CARD_FILE = "README.md"
FILES = [CHECKPOINT_CONFIG, WEIGHTS_FILE, TOKENIZER_FILE, CARD_FILE]
MODEL_CARD = """---
{{ card_data }}
---

# A looped GPT

A decoder-only transformer some of whose layers run many times in one forward pass, trained with
[haltkit](https://pypi.org/project/haltkit/); `config.json` has its shape and what is known of its training.

```python
from haltkit.models.gpt.model import LoopedGPT

model = LoopedGPT.from_pretrained("{{ repo_id | default("this/repository", true) }}")
ids = model.tokenizer.encode_ordinary("When has a looped model thought enough?")
```

`model(tokens, loops)` runs a fixed number of loops, `model.forward_adaptive(tokens, "norm:tau=1.0")` as many as a
halting policy asks for. Loading runs no code from this repository.
"""


class Shared(
    nn.Module, ModelHubMixin, library_name="haltkit", tags=["looped-transformer"], model_card_template=MODEL_CARD
):
    """A model that can be saved, loaded and pushed: ``save_pretrained``, ``from_pretrained``, ``push_to_hub``.

    Its arguments are those of :class:`~haltkit.models.gpt.config.ModelConfig`.

    Attributes:
        tokenizer: travels with the model; None for a new one.
        trained: what is known of the training; empty for a new one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: tiktoken.Encoding | None = None
        self.trained: dict[str, Any] = {}

    @property
    def _model_config(self) -> ModelConfig:
        arguments = self._hub_mixin_config  # those that it was built with, which the mixin has noted
        if not isinstance(arguments, dict):
            raise TypeError(f"{type(self).__name__} was not built from the arguments of a ModelConfig")
        return from_dict(ModelConfig, arguments)

    @property
    def function_config(self) -> dict[str, Any]:
        """See :class:`haltkit.identity.SaysItsFunction`."""
        return asdict(self._model_config)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write config, weights in the model's own dtype, and tokenizer into an existing folder.

        Raises:
            CheckpointError: the model has no tokenizer, and GPT-2's does not fit it.
        """
        config = self._model_config
        if self.tokenizer is not None:
            write_ranks(self.tokenizer, save_directory / TOKENIZER_FILE)
        elif config.vocab_size < GPT2_VOCABULARY:
            raise CheckpointError(
                f"a model of {config.vocab_size} tokens cannot be used without its tokenizer: set model.tokenizer "
                "first (haltkit.models.text.tokenizer.load_tokenizer)"
            )
        dtype = next(self.parameters()).dtype
        save_checkpoint(save_directory, self, config, dtype=dtype, trained=self.trained)

    @classmethod
    def _from_pretrained(
        cls: type[S],
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **model_kwargs: Any,
    ) -> S:
        """The model of a local folder or of a repository on the Hub; see ``load_folder`` in ``files``."""
        if model_kwargs:
            raise CheckpointError(
                f"from_pretrained takes no {', '.join(model_kwargs)}: the model is what config.json says"
            )
        folder = Path(model_id)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    token=token,
                    local_files_only=local_files_only,
                    allow_patterns=FILES,
                )
            )
        refuse_pickles(folder)
        make: Callable[..., S] = cls
        model, _, tokenizer, trained = load_folder(
            folder, lambda config: make(**asdict(config)), dtype=torch.float32, device="cpu"
        )
        model.tokenizer, model.trained = tokenizer, trained
        return model


def write_card(model: Shared, folder: Path) -> None:
    """Write the mixin's model card into a folder that is not saved through it."""
    model.generate_model_card().save(folder / CARD_FILE)
