"""The rows of a loop: which are active, frozen or retired, with the steps and outcome of each.

*Active* rows are still running. A *frozen* row has halted and is still computed; its results are discarded. A
*retired* row is removed from the computation. The rows *present* are those that a step computes: active and frozen.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from haltkit.protocol import Granularity

__all__ = ["LoopRows", "Outcome"]

# Compact execution retires frozen rows once they are this share of those present: below it, moving the others costs
# more than computing these. A body takes about as long for FEW_ROWS rows as for half as many.
RETIRE_SHARE = 1 / 16
FEW_ROWS = 8


class Outcome(IntEnum):
    """How a row's loop ended."""

    ABSENT = 0  # not a row of the problem (padding): never run
    CONVERGED = 1  # its policy said halt
    BUDGET = 2  # it was still active at the last step allowed
    NONFINITE = 3  # its state stopped being finite; the last finite state is kept


class LoopRows:
    """Row bookkeeping of one loop; it knows neither the policy nor the body.

    What can be retired is a *unit*: a single row, or a whole sequence for a policy that judges sequences as one.

    Args:
        shape: of the rows, as given.
        granularity: which rows decide together.
        given: which rows are real, ``shape`` bool; None: all.
        budget: steps that each row may take, ``shape`` int64; None: no limit per row.
        compact: whether rows can be retired.

    Attributes:
        active: rows still running, among those present, bool.
        running: how many they are.
        steps, outcome: of each row present, once it has halted.
        budget: of the rows present, or None.

    Raises:
        ValueError: ``given`` or ``budget`` of another shape, or a budget that is not of whole numbers from 1.
    """

    def __init__(
        self,
        shape: torch.Size,
        granularity: Granularity,
        device: torch.device,
        *,
        given: Tensor | None,
        budget: Tensor | None,
        compact: bool,
    ) -> None:
        for what, values in (("rows", given), ("budget", budget)):
            if values is None:
                continue
            if not isinstance(values, Tensor):
                raise ValueError(f"{what} is a {type(values).__name__}: a tensor with an entry per row is expected")
            if values.shape != shape:
                raise ValueError(f"{what} has shape {tuple(values.shape)}; the state's rows are {tuple(shape)}")
        if budget is not None and (budget.is_floating_point() or budget.is_complex() or budget.dtype == torch.bool):
            raise ValueError(f"budget is {budget.dtype}: whole numbers of steps are expected, such as int64")
        if budget is not None and bool((budget < 1).any()):
            raise ValueError(f"budget={int(budget.min())} for some row: a loop takes at least 1 step")
        self._shape, layout = shape, tuple(shape)
        self._retires = compact and (granularity == "token" or (granularity == "sequence" and len(shape) > 1))
        if self._retires:
            layout = (math.prod(shape),) if granularity == "token" else (math.prod(shape[:-1]), shape[-1])
        elif compact and not shape:
            layout = (1,)
        active = torch.ones(shape, dtype=torch.bool, device=device) if given is None else given.bool().clone()
        self.active = active.reshape(layout)
        self.running = active.numel() if given is None else int(active.sum())
        self.steps = torch.zeros(layout, dtype=torch.int64, device=device)
        self.outcome = torch.full(layout, Outcome.ABSENT, dtype=torch.int8, device=device)
        self.budget = None if budget is None else budget.reshape(layout)
        self._present: Tensor | None = None  # which units are, (n,) ascending; None: all
        self._all: list[Tensor] = []  # state, steps and outcome of all units, once some have been retired

    @property
    def count(self) -> int:
        """How many rows are present."""
        return self.active.numel()

    def arranged(self, values: Tensor) -> Tensor:
        """Values of all rows, ``(*shape, ...)``, as the rows are arranged while present; call it before any retire."""
        return values.reshape(*self.active.shape, *values.shape[len(self._shape) :])

    def halt(self, k: int, halting: Tensor, ends: Tensor, running: int) -> None:
        """The rows ``halting`` halt at step ``k`` with the outcomes ``ends``; ``running`` rows go on."""
        self.steps = torch.where(halting, k, self.steps)
        self.outcome = torch.where(halting, ends.to(torch.int8), self.outcome)
        self.running = running

    def frozen(self) -> Tensor | None:
        """Rows present that have halted, indices into the flat rows present; None if no row is frozen."""
        return None if self.running == self.count else (~self.active).flatten().nonzero().squeeze(-1)

    def retire(self, x: Tensor, *, at_once: bool = False) -> Tensor | None:
        """Retire frozen units if there are enough of them (``at_once``: any). ``x``: the state of the rows present.

        Returns:
            the units kept, ``(n',)`` ascending indices into those that were present; None if all were kept.
        """
        if not self._retires or self.running == self.count:
            return None
        single = self.active.ndim == 1
        units = self.active if single else self.active.any(-1)  # (n,)
        count = len(units)
        going, few = (self.running, count <= FEW_ROWS) if single else (int(units.sum()), False)
        if going == count or (not at_once and (few or count - going < RETIRE_SHARE * count)):
            return None
        kept, gone = units.nonzero().squeeze(-1), (~units).nonzero().squeeze(-1)
        self._file((x, self.steps, self.outcome), gone)
        self._present = kept if self._present is None else self._present[kept]
        self.active, self.steps, self.outcome = (
            part.index_select(0, kept) for part in (self.active, self.steps, self.outcome)
        )
        if self.budget is not None:
            self.budget = self.budget.index_select(0, kept)
        return kept

    def rows_of(self, units: Tensor) -> Tensor:
        """The flat rows of units, ascending."""
        if self.active.ndim == 1:
            return units
        length = self.active.shape[-1]
        return (units.unsqueeze(-1) * length + torch.arange(length, device=units.device)).flatten()

    def _file(self, parts: tuple[Tensor, Tensor, Tensor], gone: Tensor) -> None:
        """Store state, steps and outcome of units that are retired."""
        if not self._all:  # nothing has been retired so far: all units are present
            self._all = [torch.empty_like(part) for part in parts]
        where = gone if self._present is None else self._present[gone]
        for i, part in enumerate(parts):
            if self._all[i].dtype != part.dtype:  # the body's first step changed it
                self._all[i] = self._all[i].to(part.dtype)
            self._all[i].index_copy_(0, where, part.index_select(0, gone))

    def _everywhere(self, present: Tensor, part: int) -> Tensor:
        if self._present is not None:
            everything = self._all[part]
            present = everything.to(present.dtype).index_copy(0, self._present, present)
        return present.reshape(self._shape + present.shape[self.active.ndim :])

    def all_states(self, x: Tensor) -> Tensor:
        """States of all rows in the shape given: ``x`` for the rows present, stored states for retired rows."""
        return self._everywhere(x, 0)

    def results(self, k: int) -> tuple[Tensor, Tensor]:
        """Steps and outcome of all rows in the shape given; rows still active end as ``BUDGET`` at step ``k``."""
        steps = torch.where(self.active, k, self.steps)
        outcome = torch.where(self.active, Outcome.BUDGET, self.outcome).to(torch.int8)
        return self._everywhere(steps, 1), self._everywhere(outcome, 2)
