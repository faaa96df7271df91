"""Synthetic loop bodies whose signals are known in closed form.

Each map sends ``x_{k-1}`` to ``x_k`` row by row. None of them is at its limit after one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from haltkit.protocol import Heads


@dataclass(frozen=True)
class Map:
    name: str
    step: Callable[[Tensor], Tensor]
    start: Tensor  # (2, D)
    step_norm: Callable[[int], float]  # of k >= 1, for row 0
    acceleration: Callable[[int], float]  # of k >= 2, for row 0
    converges: bool


def contraction(rate: float = 0.5) -> Map:
    """``x_k = rate^k x_0``: every signal falls by ``rate`` a step."""
    start = torch.tensor([[3.0, 4.0], [0.3, -0.4]], dtype=torch.float64)  # norms 5 and 0.5
    return Map(
        "contraction",
        lambda x: rate * x,
        start,
        lambda k: 5 * rate ** (k - 1) * (1 - rate),
        lambda k: 5 * rate ** (k - 2) * (1 - rate) ** 2,
        True,
    )


def rotation(cosine: float = 0.55, radius: float = 2.0) -> Map:
    """A turn by the angle of ``cosine`` about the origin: steps of one size, each turned by that angle."""
    angle = math.acos(cosine)
    turn = torch.tensor([[cosine, -math.sin(angle)], [math.sin(angle), cosine]], dtype=torch.float64)
    size = radius * math.sqrt(2 - 2 * cosine)
    return Map(
        "rotation",
        lambda x: x @ turn.T,
        torch.tensor([[radius, 0.0], [0.0, 1.0]], dtype=torch.float64),
        lambda k: size,
        lambda k: size * math.sqrt(2 - 2 * cosine),
        False,
    )


def slider(speed: float = 0.25) -> Map:
    """Drift at constant speed: no acceleration, and no convergence."""
    velocity = torch.tensor([speed, 0.0], dtype=torch.float64)
    start = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    return Map("slider", lambda x: x + velocity, start, lambda k: speed, lambda k: 0.0, False)


def orbit() -> Map:
    """Period two, ``x -> -x``: every step is the last one turned around."""
    start = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    return Map("orbit", lambda x: -x, start, lambda k: 10.0, lambda k: 20.0, False)


def diverger(rate: float = 2.0) -> Map:
    """``x_k = rate^k x_0``: finite for a long time, and ever faster."""
    start = torch.tensor([[3.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    return Map(
        "diverger",
        lambda x: rate * x,
        start,
        lambda k: 5 * rate ** (k - 1) * (rate - 1),
        lambda k: 5 * rate ** (k - 2) * (rate - 1) ** 2,
        False,
    )


MAPS = [contraction(), rotation(), slider(), orbit(), diverger()]


def wiggle(x: Tensor) -> Tensor:
    """A smooth row-wise map that contracts at a different pace in each direction: rows halt at different steps."""
    pace = torch.linspace(0.2, 0.9, x.shape[-1], dtype=x.dtype)
    return pace * x + 0.1 * torch.tanh(x.flip(-1)) + 0.05


def _logits(x: Tensor) -> Tensor:
    """Logits ``(..., 5)`` of any state, row by row."""
    weight = torch.sin(torch.arange(5 * x.shape[-1], dtype=x.dtype)).view(5, -1)
    return x @ weight.T


def _gate(x: Tensor) -> Tensor:
    """A gate that opens as the state shrinks, in no region linear."""
    return 1.5 - x.square().mean(-1).sqrt()


readout = Heads(_logits, _gate)
