"""tiny-recursive-model: one network, called n times on the latents and once on the output, in each refinement."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from haltkit.attachment.description import Loop
from haltkit.protocol import Heads, Readout

__all__ = ["describe"]


def describe(model: nn.Module) -> tuple[Loop, Readout | None]:
    """The refinement loop of ``forward``; its state is the output, the last of ``n + 1`` calls.

    The halting head judges a whole sequence, by the mean of its rows; each row is given its sequence's logit.
    """
    tiny: Any = model
    loop = Loop(body=("network",), period=tiny.num_latent_refinements + 1, initial=None)

    def gate(x: Tensor) -> Tensor:
        return tiny.to_halt_pred(x).unsqueeze(-1).expand(x.shape[:-1])  # type: ignore[no-any-return]

    return loop, Heads(tiny.to_pred, gate)
