"""A hidden layer beside a linear map of the state: what ``probe`` may have, and ``haltkit fit --hidden`` makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import functional as F

from haltkit.weights import Weights, WeightsMisfit

__all__ = ["HIDDEN", "check_hidden", "hidden"]

# Names of its tensors: (H, D + F), (H,) and (H,).
HIDDEN = ("hidden", "hidden_bias", "out")


def check_hidden(kind: str, weights: Weights, region: str, numbers: int) -> bool:
    """Whether a region has a hidden layer.

    Args:
        kind: of policy, for errors.
        weights: whose linear part has been checked (:func:`haltkit.policies.linear.check_linear`).
        region: the region.
        numbers: how many features it sees beside the state.

    Raises:
        WeightsMisfit: some of its tensors are missing, or of another shape or dtype.
    """
    tensors = weights.tensors
    have = [name for name in HIDDEN if f"{region}/{name}" in tensors]
    if not have:
        return False
    if len(have) < len(HIDDEN):
        missing = next(name for name in HIDDEN if name not in have)
        raise WeightsMisfit(
            f"these are not a {kind}'s weights: '{region}/{missing}' is missing, and '{region}/{have[0]}' is there. A "
            f"hidden layer has {', '.join(HIDDEN)}: make it with 'haltkit fit --policy {kind} --hidden'"
        )
    units, width = tensors[f"{region}/out"].numel(), len(tensors[f"{region}/state"]) + numbers
    for name, shape in zip(HIDDEN, ((units, width), (units,), (units,)), strict=True):
        tensor = tensors[f"{region}/{name}"]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise WeightsMisfit(
                f"these are not a {kind}'s weights: '{region}/{name}' is {tuple(tensor.shape)} of {tensor.dtype}, "
                f"where {shape} in floating point is expected"
            )
    return True


def hidden(known: Mapping[str, Tensor], region: str, x: Tensor, numbers: Tensor | None, which: Sequence[int]) -> Tensor:
    """``out . gelu(hidden @ [x ; features] + hidden_bias)``, ``(...)``.

    Args:
        known: all weights, on the device and in the precision of ``x``.
        region: the region.
        x: states, ``(..., D)``.
        numbers: the features that are used, ``(..., n)``; None: none.
        which: their places among all features; the columns of the others are 0.
    """
    weight, bias = known[f"{region}/hidden"], known[f"{region}/hidden_bias"]
    width = x.shape[-1]
    inner = F.linear(x, weight[:, :width], bias)
    if numbers is not None:
        inner = inner + F.linear(numbers, weight[:, [width + i for i in which]])
    out: Tensor = F.gelu(inner) @ known[f"{region}/out"]
    return out
