"""What it costs in theory: operations that were counted, and the steps that occurred."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from haltkit.models.gpt.model import LoopedGPT, Region

__all__ = ["flops", "means"]


def flops(model: LoopedGPT, steps: Mapping[str, float], keys: float) -> float:
    """Floating-point operations of one token: matrix products and attention, those that do not loop included.

    Args:
        steps: mean body applications by region.
        keys: how many tokens it attends to.
    """
    d, total = model.d_model, 2.0 * model.d_model * model.vocab_size
    for name, layer in model.layers.items():
        blocks = layer.body.blocks if isinstance(layer, Region) else [layer]
        weights = sum(p.numel() for b in blocks for n, p in b.named_parameters() if p.ndim == 2)
        adapter = layer.body.adapter if isinstance(layer, Region) else None
        weights += 0 if adapter is None else adapter.weight.numel()
        total += steps.get(name, 1.0) * (2.0 * weights + len(blocks) * 4.0 * d * keys)
    return total


def means(steps: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean steps by region."""
    return {name: float(taken.double().mean()) for name, taken in steps.items()}
