"""``entropy``: halt when the prediction's uncertainty stops changing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep, Verdict, check_tau, check_temperature

__all__ = ["EntropyChange"]


@dataclass(frozen=True)
class EntropyChange:
    """Halt a row when ``abs(H_k - H_{k-1}) < tau`` nats. Needs a readout.

    ``entropy-diff`` in the code of arXiv 2502.05171. Blind to a prediction that moves to another token as likely.

    Args:
        tau: threshold in nats.
        temperature: divides the logits.
    """

    tau: float
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_tau(self.tau)
        check_temperature(self.temperature)

    def init(self, x0: Tensor) -> Tensor:
        return torch.full_like(signals.measured(x0[..., 0]), torch.inf)  # the entropy of a random state says nothing

    def update(self, state: Tensor, step: LoopStep) -> tuple[Tensor, Verdict]:
        entropy = signals.entropy(step.log_probabilities(self.temperature))
        score = signals.entropy_change(entropy, state)
        return entropy, Verdict(score, score < self.tau)
