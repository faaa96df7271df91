"""``probe``: halt when a small fitted model is sure that the row has settled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from haltkit import signals
from haltkit.policies.hidden import HIDDEN, check_hidden, hidden
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
        found["cosine"] = torch.nan_to_num(signals.step_angle(step.d, d_prev, step.step_norm))
    if "step" in names:
        k = step.k if isinstance(step.k, Tensor) else torch.tensor(step.k, device=step.x.device)
        found["step"] = k.to(step.step_norm.dtype).log().expand(step.x.shape[:-1])
    if "margin" in names:
        found["margin"] = step.margin
    return torch.stack([found[name] for name in names], -1)


@dataclass(frozen=True)
class Probe:
    """Halt a row when the fitted probability that its prediction will still change is below ``tau``.

    A logistic regression, by region, on ``x_k`` and a few numbers of the step (:func:`features`); ``haltkit fit`` makes
    the weights. It looks at one step alone but for the cosine, so it can halt at the first step. A region may have a
    hidden layer as well, whose output is added to the logit.

    Args:
        tau: threshold on the probability, in (0, 1].
        weights: for each region R, in floating point: ``R/state`` ``(D,)``, ``R/bias`` ``(1,)``, and for each of
            :data:`FEATURES` ``R/NAME`` ``(1,)``, which is 0 where the probe was fitted without it. For a hidden layer
            of ``H`` units ``R/hidden`` ``(H, D + 4)`` on ``x_k`` and those numbers, ``R/hidden_bias`` ``(H,)`` and
            ``R/out`` ``(H,)``.

    Raises:
        ValueError: a threshold outside (0, 1].
        WeightsMisfit: tensors are missing or unknown, or of another shape or dtype.
    """

    tau: float
    weights: Weights = field(compare=False, repr=False)
    used: Mapping[str, tuple[str, ...]] = field(init=False, compare=False, repr=False)  # features by region
    hidden: frozenset[str] = field(init=False, compare=False, repr=False)  # regions with a hidden layer

    def __post_init__(self) -> None:
        check_tau(self.tau)
        if self.tau > 1:
            raise ValueError(f"tau={self.tau} is above 1: it is a probability")
        regions = check_linear("probe", self.weights, FEATURES, HIDDEN)
        several = frozenset(one for one in regions if check_hidden("probe", self.weights, one, len(FEATURES)))
        object.__setattr__(self, "hidden", several)
        object.__setattr__(self, "used", {region: self._used(region) for region in regions})

    def _used(self, region: str) -> tuple[str, ...]:
        """The features with a weight that is not 0."""
        tensors = self.weights.tensors
        used = torch.cat([tensors[f"{region}/{name}"] != 0 for name in FEATURES])
        if region in self.hidden:
            used = used | (tensors[f"{region}/hidden"][:, -len(FEATURES) :] != 0).any(0)
        return tuple(name for name, one in zip(FEATURES, used.tolist(), strict=True) if one)

    def init(self, x0: Tensor) -> Tensor:
        return torch.zeros_like(signals.measured(x0))

    def update(self, state: Tensor, step: LoopStep) -> tuple[Tensor, Verdict]:
        logit, known = linear("probe", self.weights, step)
        names = self.used[step.region]
        numbers = features(step, state, names) if names else None
        if numbers is not None:
            logit = logit + numbers @ torch.cat([known[f"{step.region}/{n}"] for n in names])
        if step.region in self.hidden:
            which = [FEATURES.index(name) for name in names]
            logit = logit + hidden(known, step.region, signals.measured(step.x), numbers, which)
        score = torch.sigmoid(-logit)
        before = step.d if "cosine" in names else state  # nothing else looks at it
        return before, Verdict(score, score < self.tau)
