"""``kl``: halt when the prediction stops changing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep, Verdict, check_tau, check_temperature

__all__ = ["KL"]


@dataclass(frozen=True)
class KL:
    """Halt a row when ``KL(p_k || p_{k-1}) < tau`` nats: arXiv 2509.23314, Eq. 4. Needs a readout.

    Args:
        tau: threshold in nats.
        direction: ``current_previous`` is the paper's; ``previous_current`` is ``KL(p_{k-1} || p_k)``, which
            public implementations compute.
        temperature: divides the logits.
        min_p: probabilities below this share of the largest become ``1 / V`` first, so that the tail does not keep a
            row running; 0.1 is ``minp-kl`` in the code of arXiv 2502.05171. 0 changes nothing.
    """

    tau: float
    direction: signals.KLDirection = "current_previous"
    temperature: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        check_tau(self.tau)
        check_temperature(self.temperature)
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p={self.min_p} is outside [0, 1): it is a share of the largest probability")

    def init(self, x0: Tensor) -> Tensor | None:
        return None  # p_0 is the prediction of a random state: the signal begins with p_1

    def update(self, state: Tensor | None, step: LoopStep) -> tuple[Tensor, Verdict]:
        log_p = step.log_probabilities(self.temperature)
        if self.min_p > 0:
            log_p = signals.min_p(log_p, self.min_p)
        if state is None:
            score = torch.full(log_p.shape[:-1], torch.inf, dtype=log_p.dtype, device=log_p.device)
        else:
            score = signals.kl_divergence(log_p, state, self.direction)
        return log_p, Verdict(score, score < self.tau)
