"""A fitted linear map of the state, by region: what ``probe`` and ``gate`` share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from haltkit import signals
from haltkit.protocol import LoopStep
from haltkit.weights import Weights, WeightsMisfit

__all__ = ["check_linear", "linear"]


def check_linear(
    kind: str, weights: Weights, numbers: tuple[str, ...] = (), besides: tuple[str, ...] = ()
) -> list[str]:
    """The regions that the weights are for, in order of their names.

    Args:
        kind: of policy, for errors.
        weights: ``R/state`` ``(D,)``, ``R/bias`` ``(1,)`` and ``R/NAME`` ``(1,)`` for each region R.
        numbers: those names.
        besides: names that a region may have as well, which are not looked at.

    Raises:
        WeightsMisfit: tensors are missing or unknown, or of another shape or dtype.
    """
    needed = ("state", "bias", *numbers)
    regions = weights.regions
    others = {f"{region}/{name}" for region in regions for name in besides}
    tensors = {name: tensor for name, tensor in weights.tensors.items() if name not in others}
    names = {f"{region}/{name}" for region in regions for name in needed}
    if wrong := sorted(names ^ set(tensors)):
        raise WeightsMisfit(
            f"these are not a {kind}'s weights: {wrong[0]!r} is {'missing' if wrong[0] in names else 'unknown'}. A "
            f"{kind} has REGION/NAME for the names {', '.join(needed)}: make it with 'haltkit fit --policy {kind}'"
        )
    for name, tensor in tensors.items():
        fits = tensor.ndim == 1 and (len(tensor) == 1 or name.endswith("/state"))
        if not fits or not tensor.is_floating_point():
            raise WeightsMisfit(
                f"these are not a {kind}'s weights: {name!r} is {tuple(tensor.shape)} of {tensor.dtype}, where "
                f"{'(D,)' if name.endswith('/state') else '(1,)'} in floating point is expected"
            )
    return regions


def linear(kind: str, weights: Weights, step: LoopStep) -> tuple[Tensor, Mapping[str, Tensor]]:
    """``x_k . state + bias`` of the step's region, ``(...)``, and all weights on its device and in its precision.

    Raises:
        WeightsMisfit: the weights are for other regions.
    """
    x = signals.measured(step.x)
    known = weights.like(x)
    if f"{step.region}/state" not in known:
        raise WeightsMisfit(f"the {kind} was fitted for {', '.join(weights.regions)}, and this loop is {step.region!r}")
    return x @ known[f"{step.region}/state"] + known[f"{step.region}/bias"], known
