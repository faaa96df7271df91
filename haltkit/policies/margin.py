"""``margin``: halt when the prediction is sure."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep, Verdict, check_tau, check_temperature

__all__ = ["Margin"]


@dataclass(frozen=True)
class Margin:
    """Halt a row when ``1 - (p_(1) - p_(2)) < tau``, the two most probable: CALM, arXiv 2207.07061. Needs a readout.

    It looks at one step alone, so it can halt at the first and has no lag. It asks whether the model is sure, not
    whether the loop has settled: a row that stays undecided runs to the end of the budget.

    Args:
        tau: threshold on one minus the gap; CALM's threshold on the gap itself is ``1 - tau``.
        temperature: divides the logits.
    """

    tau: float
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_tau(self.tau)
        check_temperature(self.temperature)

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: LoopStep) -> tuple[None, Verdict]:
        score = 1 - signals.margin(step.log_probabilities(self.temperature))
        return None, Verdict(score, score < self.tau)
