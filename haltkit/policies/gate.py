"""``gate``: halt when an exit head says so, the model's own or a fitted one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from haltkit import signals
from haltkit.policies.linear import check_linear, linear
from haltkit.protocol import LoopStep, Verdict, check_tau
from haltkit.weights import Weights

__all__ = ["Gate"]

Rule = Literal["probability", "cumulative", "sum"]


@dataclass(frozen=True)
class Gate:
    """Halt a row by an exit head's probability ``lambda_k = sigmoid(gate(x_k))``.

    The head is the model's own, found as the ``gate`` of :class:`haltkit.Heads`, or a linear one that ``haltkit fit
    --policy gate`` has fitted on the frozen model. Rules, by what must fall below ``tau``:

    - ``probability``: ``1 - lambda_k``. TRM (arXiv 2510.04871) halts where the logit is above 0, which is ``tau=0.5``.
      So does HRM (arXiv 2506.21734) if the gate is its halt logit minus its continue logit. Nothing is remembered, so
      it can halt at the first step.
    - ``cumulative``: ``prod_{j<=k} (1 - lambda_j)``, what is left of the exit distribution ``p_k = lambda_k
      prod_{j<k} (1 - lambda_j)`` of PonderNet (arXiv 2107.05407), which draws the step at random. Ouro (arXiv
      2510.25741) exits where the cumulative probability reaches ``q``; that is ``tau = 1 - q``.
    - ``sum``: ``1 - sum_{j<=k} lambda_j``, not below 0: ACT (arXiv 1603.08983), whose epsilon is ``tau``.

    The papers also halt where the quantity equals their threshold; this policy halts below it.

    Args:
        tau: threshold, in (0, 1].
        rule: as above.
        weights: of a fitted head, in floating point, for each region R: ``R/state`` ``(D,)`` and ``R/bias`` ``(1,)``,
            of the logit ``x_k . state + bias``. None: the model's own head.

    Raises:
        ValueError: a threshold outside (0, 1], or an unknown rule.
        WeightsMisfit: tensors are missing or unknown, or of another shape or dtype.
    """

    tau: float
    rule: Rule = "probability"
    weights: Weights | None = field(default=None, compare=False, repr=False)
    fitted: bool = field(init=False)  # whether there are weights: what tells two gates apart

    def __post_init__(self) -> None:
        check_tau(self.tau)
        if self.tau > 1:
            raise ValueError(f"tau={self.tau} is above 1: it is a probability")
        if self.rule not in ("probability", "cumulative", "sum"):
            raise ValueError(f"rule={self.rule!r}: allowed are probability, cumulative, sum")
        if self.weights is not None:
            check_linear("gate", self.weights)
        object.__setattr__(self, "fitted", self.weights is not None)

    def init(self, x0: Tensor) -> Tensor | None:
        if self.rule == "probability":
            return None
        return torch.ones_like(signals.measured(x0[..., 0]))

    def update(self, state: Tensor | None, step: LoopStep) -> tuple[Tensor | None, Verdict]:
        on = signals.going_on(step.gate if self.weights is None else linear("gate", self.weights, step)[0])
        if state is None:
            return None, Verdict(on, on < self.tau)
        left = state * on if self.rule == "cumulative" else (state - (1 - on)).clamp_min(0)
        return left, Verdict(left, left < self.tau)
