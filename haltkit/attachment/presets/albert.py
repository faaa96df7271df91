"""ALBERT (transformers): one group of layers applied ``num_hidden_layers`` times.

With several groups each is a region, ``group0`` and so on, and they run one after the other.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from haltkit.attachment.description import Loop
from haltkit.protocol import Readout

__all__ = ["describe"]


def describe(model: nn.Module) -> tuple[Loop | dict[str, Loop], Readout | None]:
    """``AlbertModel`` or a model with a head on it; the masked-LM head is a readout."""
    base = "albert." if hasattr(model, "albert") else ""
    groups = len(list(model.get_submodule(f"{base}encoder.albert_layer_groups").children()))
    loops = {
        f"group{i}": Loop(body=(f"{base}encoder.albert_layer_groups.{i}",), scope=f"{base}encoder")
        for i in range(groups)
    }
    head: Any = getattr(model, "predictions", None) if type(model).__name__ == "AlbertForMaskedLM" else None
    return loops["group0"] if groups == 1 else loops, head
