"""``fixed``: halt after a set number of steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep, Verdict

__all__ = ["Fixed"]


@dataclass(frozen=True)
class Fixed:
    """Halt every row after ``steps`` steps: the baseline that any other policy has to beat.

    Args:
        steps: how often the body is applied, at least 1.
    """

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: a loop takes at least 1 step")

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: LoopStep) -> tuple[None, Verdict]:
        to_go = torch.full_like(signals.measured(step.x[..., 0]), self.steps).sub_(step.k).clamp_min_(0)
        return None, Verdict(to_go, to_go <= 0)
