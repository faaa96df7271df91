"""A model whose rows settle at steps that are known beforehand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Count", "Countdown", "readout"]


class Countdown(nn.Module):
    """A row ``(h, 0)`` counts to h, one per step, and predicts class 1 from step h on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))  # tells two models apart
        self.body = Count()

    def forward(self, x: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            x = self.body(x)
        return x * self.scale


class Count(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        hops, count = x.unbind(-1)
        return torch.stack([hops, torch.minimum(count + 1, hops)], -1)


def readout(x: Tensor) -> Tensor:
    settled = x[..., 1] - x[..., 0] + 0.5
    return torch.stack([-settled, settled], -1)
