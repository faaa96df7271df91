"""ALBERT (transformers): one group of layers applied ``num_hidden_layers`` times.

With several groups each is a loop of its own, run one after the other; they are attached to one by one.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from haltkit.attachment.description import Loop
from haltkit.attachment.errors import AttachError
from haltkit.protocol import Readout

__all__ = ["describe"]


def describe(model: nn.Module) -> tuple[Loop, Readout | None]:
    """``AlbertModel`` or a model with a head on it; the masked-LM head is a readout.

    Raises:
        AttachError: several groups of layers.
    """
    base = "albert." if hasattr(model, "albert") else ""
    groups = len(model.get_submodule(f"{base}encoder").albert_layer_groups)  # type: ignore[arg-type]
    if groups > 1:
        raise AttachError(
            f"this ALBERT has {groups} groups of layers, each a loop of its own: attach to each, "
            f'body=["{base}encoder.albert_layer_groups.0"] and so on'
        )
    head: Any = getattr(model, "predictions", None) if type(model).__name__ == "AlbertForMaskedLM" else None
    return Loop(body=(f"{base}encoder.albert_layer_groups.0",), scope=f"{base}encoder"), head
