"""``table``: a depth for each kind of row, looked up before the loop."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from haltkit.protocol import LoopStep, Verdict
from haltkit.weights import Weights, WeightsMisfit

__all__ = ["Table"]


@dataclass(frozen=True)
class Table:
    """Run each row for the steps that its kind took when ``haltkit fit --policy table`` saw it: a baseline for routers.

    Nothing is measured in the loop, so it has no lag and costs one look-up per row. A subject says what kind each row
    is of (:class:`haltkit.Kinds`): the token's id, an edge or a query. Whatever runs a :class:`haltkit.Subject` whose
    rows can be given depths of their own takes a table; a loop alone does not know its rows and refuses it.

    Args:
        weights: for each region R ``R/depths`` ``(n,)``, the steps of kinds 0 to n - 1, and ``R/other`` ``(1,)``, those
            of every further kind; int64.

    Raises:
        WeightsMisfit: tensors are missing or unknown, of another shape or dtype, or less than one step.
    """

    weights: Weights = field(compare=False, repr=False)

    def __post_init__(self) -> None:
        tensors = self.weights.tensors
        names = {f"{region}/{name}" for region in self.weights.regions for name in ("depths", "other")}
        if wrong := sorted(names ^ set(tensors)):
            raise WeightsMisfit(
                f"these are not a table's weights: {wrong[0]!r} is {'missing' if wrong[0] in names else 'unknown'}. A "
                "table has REGION/depths and REGION/other: make it with 'haltkit fit --policy table'"
            )
        for name, tensor in tensors.items():
            fits = tensor.ndim == 1 and (len(tensor) == 1 or name.endswith("/depths")) and tensor.dtype == torch.int64
            if not fits or bool((tensor < 1).any()):
                wanted = "(n,)" if name.endswith("/depths") else "(1,)"
                raise WeightsMisfit(
                    f"these are not a table's weights: {name!r} is {tuple(tensor.shape)} of {tensor.dtype}, where "
                    f"{wanted} whole numbers of steps from 1, int64, are expected"
                )

    def steps(self, kinds: Tensor, region: str) -> Tensor:
        """The steps of rows of these kinds, int64 of the same shape.

        Raises:
            WeightsMisfit: the table is for other regions.
            ValueError: a kind below 0.
        """
        if bool((kinds < 0).any()):
            raise ValueError(f"a row of kind {int(kinds.min())}: kinds are numbers from 0")
        known = self._known(region).to(kinds.device)
        return known[kinds.clamp_max(len(known) - 1)]

    def deepest(self, region: str) -> int:
        """The most steps that any kind takes.

        Raises:
            WeightsMisfit: the table is for other regions.
        """
        return int(self._known(region).max())

    def _known(self, region: str) -> Tensor:
        """The steps of each kind, and at the end those of any other."""
        tensors = self.weights.tensors
        if f"{region}/depths" not in tensors:
            raise WeightsMisfit(f"the table is for {', '.join(self.weights.regions)}, and this loop is {region!r}")
        return torch.cat([tensors[f"{region}/depths"], tensors[f"{region}/other"]])

    def init(self, x0: Tensor) -> None:
        raise ValueError(
            "a table gives depths to kinds of rows before the loop starts, and this loop does not say what its rows "
            "are: use it where a Subject with kinds= runs it, as in 'haltkit compare' and 'haltkit eval' (mode forward)"
        )

    def update(self, state: None, step: LoopStep) -> tuple[None, Verdict]:
        raise AssertionError("a table is refused by init")  # pragma: no cover
