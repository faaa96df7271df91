"""``probe``: halt when a small fitted model is sure that the row has settled."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep, Verdict, check_tau
from haltkit.weights import Weights, WeightsMisfit

__all__ = ["FEATURES", "Probe", "features"]

# Besides the projection of the state. A probe that was fitted with the margin needs a readout.
FEATURES = ("size", "cosine", "step", "margin")


def features(step: LoopStep, d_prev: Tensor, names: tuple[str, ...] = FEATURES) -> Tensor:
    """What a probe sees of a step besides the state itself, ``(..., len(names))``.

    Args:
        step: the step.
        d_prev: the step before, ``(..., D)``; zeros before the first.
        names: of :data:`FEATURES`: ``size``, ``log(||d_k|| / ||x_k||)``; ``cosine``, ``cos(d_k, d_{k-1})``, 0 at the
            first step; ``step``, ``log k``; ``margin``, ``p_(1) - p_(2)`` of the readout.
    """
    found: dict[str, Tensor] = {}
    if "size" in names:
        found["size"] = (step.step_norm / (signals.norm(step.x) + signals.EPS) + signals.EPS).log()
    if "cosine" in names:
        found["cosine"] = torch.nan_to_num(signals.cosine(step.d, d_prev))
    if "step" in names:
        k = step.k if isinstance(step.k, Tensor) else torch.tensor(step.k, device=step.x.device)
        found["step"] = k.to(step.step_norm.dtype).log().expand(step.x.shape[:-1])
    if "margin" in names:
        found["margin"] = signals.margin(step.log_probabilities())
    return torch.stack([found[name] for name in names], -1)


@dataclass(frozen=True)
class Probe:
    """Halt a row when the fitted probability that its prediction will still change is below ``tau``.

    A logistic regression, by region, on ``x_k`` and a few numbers of the step (:func:`features`); ``haltkit fit`` makes
    the weights. It looks at one step alone but for the cosine, so it can halt at the first step.

    Args:
        tau: threshold on the probability, in (0, 1].
        weights: for each region R: ``R/state`` ``(D,)``, ``R/bias`` ``(1,)``, and for each feature that was fitted
            ``R/NAME`` ``(1,)``.

    Raises:
        ValueError: a threshold outside (0, 1].
    """

    tau: float
    weights: Weights = field(compare=False, repr=False)

    def __post_init__(self) -> None:
        check_tau(self.tau)
        if self.tau > 1:
            raise ValueError(f"tau={self.tau} is above 1: it is a probability")

    def init(self, x0: Tensor) -> Tensor:
        return torch.zeros_like(signals.measured(x0))

    def update(self, state: Tensor, step: LoopStep) -> tuple[Tensor, Verdict]:
        x = signals.measured(step.x)
        known = self.weights.like(x)
        projection, bias = known.get(f"{step.region}/state"), known.get(f"{step.region}/bias")
        if projection is None or bias is None:
            fitted = ", ".join(sorted({name.rpartition("/")[0] for name in known}))
            raise WeightsMisfit(f"the probe was fitted for {fitted}, and this loop is {step.region!r}")
        logit = x @ projection + bias
        names = tuple(name for name in FEATURES if f"{step.region}/{name}" in known)
        if names:
            logit = logit + features(step, state, names) @ torch.cat([known[f"{step.region}/{n}"] for n in names])
        score = torch.sigmoid(-logit)
        before = step.d if "cosine" in names else state  # nothing else looks at it
        return before, Verdict(score, score < self.tau)
