"""``probe``: halt when a small fitted model is sure that the row has settled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from haltkit import signals
from haltkit.policies.linear import check_linear, linear
from haltkit.protocol import LoopStep, Verdict, check_tau
from haltkit.weights import Weights

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
        weights: for each region R, in floating point: ``R/state`` ``(D,)``, ``R/bias`` ``(1,)``, and for each of
            :data:`FEATURES` ``R/NAME`` ``(1,)``, which is 0 where the probe was fitted without it.

    Raises:
        ValueError: a threshold outside (0, 1].
        WeightsMisfit: tensors are missing or unknown, or of another shape or dtype.
    """

    tau: float
    weights: Weights = field(compare=False, repr=False)
    used: Mapping[str, tuple[str, ...]] = field(init=False, compare=False, repr=False)  # features by region

    def __post_init__(self) -> None:
        check_tau(self.tau)
        if self.tau > 1:
            raise ValueError(f"tau={self.tau} is above 1: it is a probability")
        tensors = self.weights.tensors
        used = {
            region: tuple(name for name in FEATURES if bool(tensors[f"{region}/{name}"]))
            for region in check_linear("probe", self.weights, FEATURES)
        }
        object.__setattr__(self, "used", used)

    def init(self, x0: Tensor) -> Tensor:
        return torch.zeros_like(signals.measured(x0))

    def update(self, state: Tensor, step: LoopStep) -> tuple[Tensor, Verdict]:
        logit, known = linear("probe", self.weights, step)
        names = self.used[step.region]
        if names:
            logit = logit + features(step, state, names) @ torch.cat([known[f"{step.region}/{n}"] for n in names])
        score = torch.sigmoid(-logit)
        before = step.d if "cosine" in names else state  # nothing else looks at it
        return before, Verdict(score, score < self.tau)
