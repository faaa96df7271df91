"""``stable``: halt when the top prediction has stayed the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep, Verdict, check_count

__all__ = ["Stable"]


class _State(NamedTuple):
    top: Tensor
    unchanged: Tensor


@dataclass(frozen=True)
class Stable:
    """Halt a row whose top prediction was that of the step before ``times`` times in a row. Needs a readout.

    ``argmax-stability`` in the code of arXiv 2502.05171. The score is ``1 / (1 + unchanged)``, so that it falls while
    nothing changes and "``unchanged >= times``" is "``score < 1 / times``": :attr:`tau` says so to a pool of rows.

    Args:
        times: how often in a row, at least 1. It is the only setting, and a whole number, so a
            comparison tries the values of the registry's record where the spec names none.
    """

    times: int = 2

    def __post_init__(self) -> None:
        check_count("times", self.times)

    @property
    def tau(self) -> float:
        """The score below which a row halts."""
        return 1 / self.times

    def init(self, x0: Tensor) -> _State:
        nothing = torch.zeros(x0.shape[:-1], dtype=torch.int64, device=x0.device)
        return _State(nothing - 1, nothing)

    def update(self, state: _State, step: LoopStep) -> tuple[_State, Verdict]:
        top = signals.top(step.logits)
        unchanged = (state.unchanged + 1) * (top == state.top)
        reciprocal = 1 / (1 + signals.measured(unchanged))
        score = torch.where(state.top < 0, torch.inf, reciprocal)
        return _State(top, unchanged), Verdict(score, unchanged >= self.times)
