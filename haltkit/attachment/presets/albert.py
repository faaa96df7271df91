"""ALBERT (transformers): one group of layers applied ``num_hidden_layers`` times.

With several groups each is a region of its own, run one after the other; this describes the first.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from haltkit.attachment.description import Loop
from haltkit.protocol import Readout

__all__ = ["describe"]


def describe(model: nn.Module) -> tuple[Loop, Readout | None]:
    """``AlbertModel`` or ``AlbertForMaskedLM``; the latter's masked-LM head is the readout."""
    base = "albert." if hasattr(model, "albert") else ""
    head: Any = getattr(model, "predictions", None)
    return Loop(body=(f"{base}encoder.albert_layer_groups.0",), scope=f"{base}encoder"), head
