"""Bodies: what is repeated, from a plain function to one whose rows see each other and can be retired.

A body implements only what it needs: :class:`LoopBody` to be told which rows are active, :class:`CompactBody` to have
rows retired, :class:`FreezingBody` and :class:`GuardedBody` where rows read each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["CompactBody", "FreezingBody", "GuardedBody", "LoopBody", "RowWise"]


@runtime_checkable
class LoopBody(Protocol):
    """A body that is told the step and which rows are active, and may keep a memory for the length of one loop.

    A plain function of the state suffices where rows do not see each other. Where they do (attention), what an active
    row reads of a halted one is the body's to keep: haltkit's canonical semantics are that at step ``k`` a row
    sees of row ``j`` what ``j`` computed at step ``min(k, K_j)``, ``K_j`` being the step ``j`` halted at.

    A body that never writes into a state may say so with an attribute ``pure = True``, which spares the check.
    """

    def step(self, x: Tensor, k: int, active: Tensor) -> Tensor:
        """``x_k`` from ``x_{k-1}``, both ``(..., D)``; rows that are not ``active`` ``(...)`` may return anything."""
        ...


@runtime_checkable
class CompactBody(LoopBody, Protocol):
    """A body whose rows can be retired, for ``execution="compact"``.

    It is given states as ``(n, D)``, ``n`` being the rows present: at first all, in order. Rows that halt stay
    present for a while, frozen (their results are discarded), until enough have gathered to be retired together.
    Where rows see each other, two more protocols apply: :class:`FreezingBody` and :class:`GuardedBody`.
    """

    def select(self, kept: Tensor) -> None:
        """From now on only the rows ``kept``, ``(n',)`` ascending indices into those present, are present."""
        ...


@runtime_checkable
class FreezingBody(CompactBody, Protocol):
    """A compact body that is told which rows present are frozen, because other rows read what they computed."""

    def freeze(self, frozen: Tensor | None) -> None:
        """The rows ``frozen``, indices into those present, have halted and are still computed; None: none."""
        ...


@runtime_checkable
class GuardedBody(CompactBody, Protocol):
    """A compact body in which a row that is not finite could reach others, and which can keep it from them.

    A step is first taken unguarded. If its finite probe is not finite, the loop discards the step and takes it again
    as a guarded step.
    """

    def finite_probe(self) -> Tensor | None:
        """A number, ``()``, that is finite only if every intermediate of the last step was; None if it was guarded.

        It may also be infinite or NaN when every intermediate was finite.
        """
        ...

    def guarded_step(self, x: Tensor, k: int, active: Tensor) -> Tensor:
        """As :meth:`step`, for the step just taken; rows that are not finite must reach no earlier ones."""
        ...


class RowWise:
    """A function of single rows, with its inputs other than the state, as a body."""

    def __init__(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], rows: Sequence[int], flat: bool
    ) -> None:
        for given in inputs:
            if given.shape[: len(rows)] != tuple(rows):
                raise ValueError(
                    f"inputs of shape {tuple(given.shape)} have not one entry per row; the rows are {tuple(rows)}"
                )
        self.function = function
        count = math.prod(rows)
        self.inputs = [given.reshape(count, *given.shape[len(rows) :]) if flat else given for given in inputs]

    def step(self, x: Tensor, k: int, active: Tensor) -> Tensor:
        return self.function(x, *self.inputs)

    def select(self, kept: Tensor) -> None:
        self.inputs = [given.index_select(0, kept) for given in self.inputs]
