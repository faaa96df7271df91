"""Huginn (``RavenForCausalLM``, arXiv 2502.05171): an adapter mixes state and input, then the core blocks run."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from haltkit.attachment.description import Loop
from haltkit.protocol import Readout

__all__ = ["describe"]


def describe(model: nn.Module) -> tuple[Loop, Readout | None]:
    """The recurrent core, in both of its loops (without and with gradients); the readout runs the coda."""
    raven: Any = model
    blocks = tuple(f"transformer.core_block.{i}" for i in range(len(raven.transformer.core_block)))

    def initial(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return args[0][..., : args[0].shape[-1] // 2]  # type: ignore[no-any-return]  # the adapter is given [x ; e]

    def readout(x: Tensor) -> Tensor:
        return raven.predict_from_latents(x).logits  # type: ignore[no-any-return]

    return Loop(body=("transformer.adapter", *blocks), initial=initial), readout
