"""``probe``: halt when a small fitted model is sure that the row has settled."""

from __future__ import annotations

from collections.abc import Mapping
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


def _checked(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """The features that the probe of each region uses, by region in order of their names."""
    needed = ("state", "bias", *FEATURES)
    regions = sorted({name.rpartition("/")[0] for name in tensors})
    names = {f"{region}/{name}" for region in regions for name in needed}
    if wrong := sorted(names ^ set(tensors)):
        raise WeightsMisfit(
            f"these are not a probe's weights: {wrong[0]!r} is {'missing' if wrong[0] in names else 'unknown'}. A "
            f"probe has REGION/NAME for the names {', '.join(needed)}: make it with 'haltkit fit'"
        )
    for name, tensor in tensors.items():
        fits = tensor.ndim == 1 and (len(tensor) == 1 or name.endswith("/state"))
        if not fits or not tensor.is_floating_point():
            raise WeightsMisfit(
                f"these are not a probe's weights: {name!r} is {tuple(tensor.shape)} of {tensor.dtype}, where "
                f"{'(D,)' if name.endswith('/state') else '(1,)'} in floating point is expected"
            )
    return {region: tuple(name for name in FEATURES if bool(tensors[f"{region}/{name}"])) for region in regions}


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
        object.__setattr__(self, "used", _checked(self.weights.tensors))

    def init(self, x0: Tensor) -> Tensor:
        return torch.zeros_like(signals.measured(x0))

    def update(self, state: Tensor, step: LoopStep) -> tuple[Tensor, Verdict]:
        x = signals.measured(step.x)
        known = self.weights.like(x)
        if step.region not in self.used:
            raise WeightsMisfit(f"the probe was fitted for {', '.join(self.used)}, and this loop is {step.region!r}")
        names = self.used[step.region]
        logit = x @ known[f"{step.region}/state"] + known[f"{step.region}/bias"]
        if names:
            logit = logit + features(step, state, names) @ torch.cat([known[f"{step.region}/{n}"] for n in names])
        score = torch.sigmoid(-logit)
        before = step.d if "cosine" in names else state  # nothing else looks at it
        return before, Verdict(score, score < self.tau)
