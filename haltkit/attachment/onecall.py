"""One call of the model, and what its loops share: a joint budget, and which entries an inner loop runs for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from haltkit.attachment.errors import BatchNotFound
from haltkit.loop import LoopResult, Outcome

__all__ = ["ModelCalls", "OneCall", "Part", "Spending", "by_entry"]


def by_entry(rows: Tensor) -> Tensor:
    """Whether any row of an entry of the batch, the first dimension, is set: ``(n, ...)`` bool to ``(n,)``."""
    if rows.ndim == 0:
        return rows.view(1)
    return rows.flatten(1).any(1) if rows.ndim > 1 else rows


@dataclass(frozen=True)
class Part:
    """The entries of the batch that the calls of an enclosing loop are made for.

    Attributes:
        batch: entries of the model's batch.
        given: the entries that are computed, ascending indices ``(n,)`` into the model's batch.
        running: those of them that no enclosing loop has halted, ``(n,)`` bool.
        apart: they are all of them, so the halted ones are not computed.
    """

    batch: int
    given: Tensor
    running: Tensor
    apart: bool = True

    @classmethod
    def whole(cls, batch: int, device: torch.device) -> Part:
        return cls(batch, torch.arange(batch, device=device), torch.ones(batch, dtype=torch.bool, device=device))

    def narrowed(self, present: Tensor, gathered: bool) -> Part:
        """The entries ``present`` (indices into those given) go on; ``gathered``: the others are not computed."""
        if gathered:
            return Part(self.batch, self.given[present], self.running[present], self.apart)
        going = torch.zeros_like(self.running).index_fill(0, present, True)
        return Part(self.batch, self.given, self.running & going, apart=False)


class Spending:
    """What each entry has taken of a joint budget. A step counts, one for each loop, when it begins.

    An entry has room for one more step of a loop if the budget also has room for one step of every loop that must run
    then: of those that began inside the loop's step before, and of the regions that have not begun yet.
    """

    def __init__(self, total: int, regions: Sequence[str]) -> None:
        self._total, self._awaited = total, set(regions)
        # Of each entry, (batch,); a number while it is the same for all.
        self._taken: Tensor | int = 0  # steps
        self.begun: Tensor | int = 0  # loops

    def begins(self, region: str, part: Part | None) -> None:
        """A loop begins."""
        self._awaited.discard(region)
        self.begun = self.begun + 1 if part is None else self._spread(self.begun, part.running, part)

    def step(self, entries: Tensor | None, part: Part | None) -> None:
        """Entries begin a step, ``(n,)`` bool of those that the loop is given; None: all of them."""
        if part is not None:
            running = part.running if entries is None else part.running & self._aligned(entries, len(part.given))
            self._taken = self._spread(self._taken, running, part)
        else:
            self._taken = self._taken + (1 if entries is None else self._aligned(entries.long()))

    def room(self, count: int, since: Tensor | int, part: Part | None, device: torch.device) -> Tensor:
        """Which of the ``count`` entries that a loop is given may take another step, ``(count,)`` bool.

        Args:
            count: the entries.
            since: loops that had begun when the step before did.
            part: which entries they are.
            device: of the result.
        """
        needed = torch.as_tensor(self._taken + 1 + self.begun - since + len(self._awaited), device=device)
        if part is not None:
            needed = needed.expand(part.batch)[part.given]
        room = needed <= self._total
        return self._aligned(room.expand(count) if room.ndim == 0 else room, count)

    @staticmethod
    def _spread(counts: Tensor | int, running: Tensor, part: Part) -> Tensor:
        """Counts of all entries, with one more for those of a part that are running."""
        every = torch.as_tensor(counts, device=part.given.device).expand(part.batch)
        return every.index_add(0, part.given, running.long())

    def _aligned(self, entries: Tensor, count: int | None = None) -> Tensor:
        expected = count if count is not None else len(self._taken) if isinstance(self._taken, Tensor) else None
        if expected is not None and len(entries) != expected:
            raise BatchNotFound(
                f"total_steps counts the steps of each entry of the batch, and the loops disagree about how many there "
                f"are ({len(entries)} and {expected} in the states' first dimension): give each loop a budget of its "
                "own, max_steps={region: steps}"
            )
        return entries


class OneCall:
    """One call of the model.

    Attributes:
        part: the entries that calls are made for at present; None: all.
        spending: of the joint budget; None without one.
    """

    def __init__(self, spending: Spending | None) -> None:
        self.part: Part | None = None
        self.spending = spending
        self._newest: dict[str, tuple[Tensor, Tensor]] = {}  # steps and outcome of all entries, by region

    @contextmanager
    def entries(self, present: Tensor, batch: int, gathered: bool) -> Iterator[None]:
        """Calls made inside are for some entries of those given; see :meth:`Part.narrowed`."""
        before = self.part
        self.part = (before or Part.whole(batch, present.device)).narrowed(present, gathered)
        try:
            yield
        finally:
            self.part = before

    def ended(self, region: str, result: LoopResult, part: Part | None) -> tuple[LoopResult, Tensor, Tensor]:
        """A loop is over, that was run for the entries ``part``.

        Returns:
            its result for those that no enclosing loop has halted; steps and outcome of all entries, each from the
            newest loop that was run for it.

        Raises:
            BatchNotFound: the first dimension of its state is not the batch.
        """
        if part is None:
            self._newest[region] = result.steps, result.outcome
            return result, result.steps, result.outcome
        if not result.steps.ndim or len(result.steps) != len(part.given):
            raise BatchNotFound(
                f"execution='compact': region {region!r} was run for {len(part.given)} entries of the batch, and its "
                f"state has rows {tuple(result.steps.shape)}: the first dimension of a state must be the batch"
            )
        counted = LoopResult(*(rows[part.running] for rows in (result.x, result.steps, result.outcome)))
        where, shape = part.given[part.running], (part.batch, *result.steps.shape[1:])
        before = self._newest.get(region)
        if before is None or before[0].shape != shape:
            before = result.steps.new_zeros(shape), result.outcome.new_full(shape, int(Outcome.ABSENT))
        steps, outcome = (
            old.index_copy(0, where, new) for old, new in zip(before, (counted.steps, counted.outcome), strict=True)
        )
        self._newest[region] = steps, outcome
        return counted, steps, outcome


class ModelCalls:
    """The calls of the model: one for all regions of a session. The outermost call that is intercepted is one."""

    def __init__(self, regions: Sequence[str], total_steps: int | None) -> None:
        self._regions, self._total = tuple(regions), total_steps
        self._now: ContextVar[OneCall | None] = ContextVar("haltkit_call", default=None)

    @contextmanager
    def inside(self) -> Iterator[OneCall]:
        """The call in progress, or a new one for the length of the ``with`` block."""
        now = self._now.get()
        if now is not None:
            yield now
            return
        now = OneCall(None if self._total is None else Spending(self._total, self._regions))
        token = self._now.set(now)
        try:
            yield now
        finally:
            self._now.reset(token)

    def intercept(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is put around the model."""
        with self.inside():
            return forward(*args, **kwargs)
