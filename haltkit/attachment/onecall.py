"""One call of the model, and what its loops share: a joint budget, and which entries an inner loop runs for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from haltkit.attachment.errors import BatchNotFound
from haltkit.attachment.part import Part
from haltkit.attachment.spending import Spending
from haltkit.loop import LoopResult, Outcome

__all__ = ["ModelCalls", "OneCall"]


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
