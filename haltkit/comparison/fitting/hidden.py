"""Fit a hidden layer beside a logistic regression, by gradient descent from the regression's optimum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from haltkit.headroom import LogisticProbe

__all__ = ["HiddenProbe", "fit_hidden"]

STEPS, BATCH = 1000, 2048
RATE, DECAY = 3e-3, 1e-2  # AdamW's, the rate falling linearly to 0


@dataclass(frozen=True, eq=False)
class HiddenProbe:
    """``P(settled) = sigmoid(weight . f + bias + out . gelu(hidden f + hidden_bias))``, float64.

    Attributes:
        linear: ``weight`` ``(F,)`` and ``bias`` ``()``.
        hidden: ``(H, F)``, for features as they are (their standardization is folded in).
        hidden_bias: ``(H,)``.
        out: ``(H,)``.
    """

    linear: LogisticProbe
    hidden: Tensor
    hidden_bias: Tensor
    out: Tensor

    def logit(self, features: Tensor) -> Tensor:
        """``(..., F)`` to ``(...)``; above 0 the probe says settled."""
        f = features.to(self.hidden.dtype)
        return (
            self.linear.logit(f[..., : len(self.linear.weight)])
            + F.gelu(f @ self.hidden.T + self.hidden_bias) @ self.out
        )


def fit_hidden(
    features: Tensor, target: Tensor, start: LogisticProbe, units: int, generator: torch.Generator
) -> HiddenProbe:
    """Lower the mean log-loss of a logistic regression by a hidden layer; all weights are trained together.

    The layer's outputs start at 0, so that training starts at the regression.

    Args:
        features: ``(N, F)``, finite.
        target: ``(N,)`` bool.
        start: fitted on them.
        units: ``H``.
        generator: of the layer's initial weights and of the batches; a CPU's.

    Raises:
        ValueError: fewer than one unit.
    """
    if units < 1:
        raise ValueError(f"a hidden layer of {units} units: at least 1 is expected")
    x, y = features.detach().double().cpu(), target.float().cpu()
    mean, spread = x.mean(0), x.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    x = ((x - mean) / spread).float()
    width = x.shape[1]
    weight, bias = (start.weight * spread).float(), (start.bias + start.weight @ mean).float()
    inner = torch.randn(units, width, generator=generator) / width**0.5
    parts = [part.requires_grad_() for part in (weight, bias, inner, torch.zeros(units), torch.zeros(units))]
    weight, bias, inner, inner_bias, out = parts
    optimizer = torch.optim.AdamW(parts, RATE, weight_decay=DECAY)
    with torch.enable_grad():
        for step in range(STEPS):
            rows = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator)
            batch = x[rows]
            logit = batch @ weight + bias + F.gelu(batch @ inner.T + inner_bias) @ out
            loss = F.binary_cross_entropy_with_logits(logit, y[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            optimizer.step()
    weight, bias, inner, inner_bias, out = (part.detach().double() for part in parts)
    weight, inner = weight / spread, inner / spread
    return HiddenProbe(LogisticProbe(weight, bias - weight @ mean), inner, inner_bias - inner @ mean, out)
