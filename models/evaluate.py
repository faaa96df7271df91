"""Held-out cross-entropy at fixed loop counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from haltkit.models.gpt import LoopedGPT

__all__ = ["fixed_depth_losses"]


@torch.no_grad()
def fixed_depth_losses(model: LoopedGPT, batches: Sequence[Tensor], loops: Sequence[int]) -> dict[int, float]:
    """Mean cross-entropy in nats per token at each loop count.

    Args:
        model: evaluated as it is, mode and dtype included; a model without regions gives one value for all.
        batches: windows ``(B, T + 1)``.
        loops: the counts, the same for every region.
    """
    counts = list(loops) if model.regions else list(loops)[:1]
    losses = dict.fromkeys(counts, 0.0)
    for batch in batches:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        for count in counts:
            logits = model(inputs, count if model.regions else {})
            losses[count] += float(F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()))
    return {count: losses[count if model.regions else counts[0]] / len(batches) for count in loops}
