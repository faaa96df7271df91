"""Held-out cross-entropy at fixed loop counts, and under halting policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from haltkit.models.gpt.model import LoopedGPT
from haltkit.protocol import HaltingPolicy

__all__ = ["Evaluated", "evaluate"]

Setting = int | str | HaltingPolicy[Any] | Mapping[str, str | HaltingPolicy[Any]]


@dataclass(frozen=True)
class Evaluated:
    """One setting on all batches.

    Attributes:
        loss: cross-entropy, nats a token.
        steps: mean body applications a token, by region.
    """

    loss: float
    steps: dict[str, float]


@torch.no_grad()
def evaluate(model: LoopedGPT, batches: Sequence[Tensor], setting: Setting, max_loops: int = 32) -> Evaluated:
    """Mean cross-entropy of windows ``(B, T + 1)`` at one setting.

    Args:
        model: evaluated as it is, mode and dtype included.
        batches: tensors of windows, of any sizes; every token counts the same.
        setting: a number of loops for all regions, or a policy as :meth:`LoopedGPT.forward_adaptive` takes it.
        max_loops: a policy's budget in each region.

    Raises:
        ValueError: a bad spec, or a loop count below 1.
    """
    total, tokens = 0.0, 0
    steps = dict.fromkeys(model.regions, 0.0)
    for batch in batches:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        if isinstance(setting, int):
            logits = model(inputs, setting if model.regions else {})
            steps = {name: total + setting * targets.numel() for name, total in steps.items()}
        else:
            out = model.forward_adaptive(inputs, setting, max_loops=max_loops)
            logits = out.logits
            steps = {name: total + float(out.steps[name].sum()) for name, total in steps.items()}
        total += float(F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum"))
        tokens += targets.numel()
    return Evaluated(total / tokens, {name: count / tokens for name, count in steps.items()})
