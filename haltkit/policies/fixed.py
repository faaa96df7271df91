"""``fixed``: halt after a set number of steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep, Verdict, check_count

__all__ = ["Fixed"]


@dataclass(frozen=True)
class Fixed:
    """Halt every row after ``steps`` steps: the baseline that any other policy has to beat.

    Args:
        steps: how often the body is applied, at least 1.
    """

    steps: int

    def __post_init__(self) -> None:
        check_count("steps", self.steps)

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: LoopStep) -> tuple[None, Verdict]:
        to_go = torch.full_like(signals.measured(step.x[..., 0]), self.steps).sub_(step.k).clamp_min_(0)
        return None, Verdict(to_go, to_go <= 0)
