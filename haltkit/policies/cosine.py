"""``cosine``: halt when the state's direction stops changing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep, Verdict, check_tau

__all__ = ["CosineDistance"]


@dataclass(frozen=True)
class CosineDistance:
    """Halt a row when ``1 - cos(x_k, x_{k-1}) < tau``: ``cosine`` in the code of arXiv 2502.05171.

    The saturation measure of CALM (arXiv 2207.07061) is the same. Blind to a state that only grows or shrinks. Near
    convergence it is half the square of the part of the normalized step that is across the state, so its useful
    thresholds are about the square of those of ``norm-rel``.

    Args:
        tau: threshold, without unit.
    """

    tau: float

    def __post_init__(self) -> None:
        check_tau(self.tau)

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: LoopStep) -> tuple[None, Verdict]:
        score = signals.cosine_distance(step.x, step.x_prev)
        return None, Verdict(score, score < self.tau)
