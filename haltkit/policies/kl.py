"""``kl``: halt when the prediction stops changing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep, Verdict, check_tau

__all__ = ["KL"]


@dataclass(frozen=True)
class KL:
    """Halt a row when ``KL(p_k || p_{k-1}) < tau`` nats: arXiv 2509.23314, Eq. 4. Needs a readout.

    Args:
        tau: threshold in nats.
        direction: ``current_previous`` is the paper's; ``previous_current`` is ``KL(p_{k-1} || p_k)``, which
            public implementations compute.
        temperature: divides the logits.
    """

    tau: float
    direction: signals.KLDirection = "current_previous"
    temperature: float = 1.0

    formula: ClassVar[str] = "KL(p_k || p_{k-1}), p = softmax(readout(x) / temperature)"
    scale: ClassVar[str] = "nats; [0, inf)"
    patience: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_tau(self.tau)
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive")

    def init(self, x0: Tensor) -> Tensor | None:
        return None  # p_0 is the prediction of a random state: the signal begins with p_1

    def update(self, state: Tensor | None, step: LoopStep) -> tuple[Tensor, Verdict]:
        log_p = signals.log_probabilities(step.logits, self.temperature)
        if state is None:
            score = torch.full(log_p.shape[:-1], torch.inf, dtype=log_p.dtype, device=log_p.device)
        else:
            score = signals.kl_divergence(log_p, state, self.direction)
        return log_p, Verdict(score, score < self.tau)
