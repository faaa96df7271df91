"""tiny-recursive-model: one network, called n times on the latents and once on the output, in each refinement."""

from __future__ import annotations

from typing import Any

from torch import nn

from haltkit.attachment.description import Loop
from haltkit.protocol import Readout

__all__ = ["describe"]


def describe(model: nn.Module) -> tuple[Loop, Readout | None]:
    """The refinement loop of ``forward``; its state is the output, the last of ``n + 1`` calls."""
    tiny: Any = model
    loop = Loop(body=("network",), period=tiny.num_latent_refinements + 1, initial=None)
    return loop, tiny.to_pred
