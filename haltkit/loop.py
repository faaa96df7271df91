"""The loop: applies a body until a policy, the budget or a non-finite state ends each row.

Two executions of the same function. *Masked*: every row is computed at every step and halted rows discard the
result; the slow, obvious reference. *Compact*: halted rows leave the set at hand, so that the body computes what is
still running. Step counts are the same, and states to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import HaltingPolicy, LoopStep, Readout, granularity_of, map_state

__all__ = [
    "CompactBody",
    "Execution",
    "Keep",
    "LoopBody",
    "LoopObserver",
    "LoopResult",
    "LoopRun",
    "Outcome",
    "run_loop",
]

Execution = Literal["masked", "compact"]
Keep = Literal["current", "previous"]
# Compact execution leaves halted rows behind once they are this share of the rows at hand: below it, moving the
# others costs more than computing these. And a handful of rows costs a body as much as half of it.
LEAVE_SHARE = 1 / 16
FEW_ROWS = 8


class Outcome(IntEnum):
    """How a row's loop ended."""

    ABSENT = 0  # not a row of the problem (padding): never run
    CONVERGED = 1  # its policy said halt
    BUDGET = 2  # it was still going at the last step allowed
    NONFINITE = 3  # its state stopped being finite; the last finite state is kept


@runtime_checkable
class LoopBody(Protocol):
    """A body that knows which rows are live and may keep a memory for the length of one loop.

    A plain function of the state will do where rows do not see each other. Where they do (attention), what a live
    row reads of a halted one is the body's to keep: haltkit's canonical semantics are that at step ``k`` a row
    sees of row ``j`` what ``j`` computed at step ``min(k, K_j)``, ``K_j`` being the step ``j`` halted at.
    """

    def step(self, x: Tensor, k: int, live: Tensor) -> Tensor:
        """``x_k`` from ``x_{k-1}``, both ``(..., D)``; rows that are not ``live`` ``(...)`` may return anything."""
        ...


@runtime_checkable
class CompactBody(LoopBody, Protocol):
    """A body that can leave halted rows behind, for ``execution="compact"``.

    It is given states as ``(n, D)``, ``n`` being the rows at hand: at first all, in order. Rows that halt stay at
    hand for a while (their results are discarded) until enough have gathered to be left behind together.
    """

    def select(self, kept: Tensor) -> None:
        """From now on only the rows ``kept``, ``(n',)`` ascending indices into those at hand, are at hand."""
        ...

    def hold(self, halted: Tensor | None) -> None:
        """The rows ``halted``, indices into those at hand, have halted but are at hand all the same; None: no row."""
        ...

    def doubt(self) -> Tensor | None:
        """A number, ``()``, that is finite only if every intermediate of the last step was; None if rows never meet.

        It may be infinite or NaN without need. The loop then asks for the step again, by :meth:`redo`.
        """
        ...

    def redo(self, x: Tensor, k: int, live: Tensor) -> Tensor:
        """As :meth:`step`, for the step just taken; rows that are not finite must reach no earlier ones."""
        ...


class LoopObserver(Protocol):
    """What a recorder implements: told of the start, of every step and of the end of a loop."""

    def begin(self, name: str, x0: Tensor) -> None: ...

    def step(self, name: str, k: int, x: Tensor) -> None: ...

    def end(self, name: str, steps: Tensor, outcome: Tensor) -> None: ...


@dataclass(frozen=True)
class LoopResult:
    """What a loop came to, one entry a row.

    Attributes:
        x: the state handed on, ``(..., D)``.
        steps: body applications, ``(...)`` int64; 0 for absent rows.
        outcome: an :class:`Outcome` each, ``(...)`` int8.
    """

    x: Tensor
    steps: Tensor
    outcome: Tensor


class LoopRun:
    """A loop in progress, told of one new state at a time by whoever applies the body.

    :func:`run_loop` is the plain way to drive one; a model that runs its own loop drives it from outside. It owns
    what is decided about each row: the policy's state, the budget's count, freezing, and rows that stop being finite.

    Attributes:
        x: the state of every row at hand: the newest of a live row, the last of one that has halted. ``(..., D)`` as
            given; in compact execution ``(n, D)``, or ``(n, T, D)`` for a policy that judges whole sequences.
        k: steps taken.
        live: rows still running, ``(...)`` bool.
        running: how many they are.
        stopped: some row stopped at the last step.
        took: rows that took the newest state, ``(...)`` bool; the others kept theirs.
        all_took: every row did.
    """

    def __init__(
        self,
        policy: HaltingPolicy[Any],
        x0: Tensor,
        *,
        readout: Readout | None = None,
        rows: Tensor | None = None,
        keep: Keep = "current",
        observer: LoopObserver | None = None,
        name: str = "loop",
        budget: Tensor | None = None,
        execution: Execution = "masked",
    ) -> None:
        shape = x0.shape[:-1]
        if keep not in ("current", "previous"):
            raise ValueError(f"keep={keep!r}: allowed are 'current' and 'previous'")
        if execution not in ("masked", "compact"):
            raise ValueError(f"execution={execution!r}: allowed are 'masked' and 'compact'")
        for what, given in (("rows", rows), ("budget", budget)):
            if given is not None and given.shape != shape:
                raise ValueError(f"{what} has shape {tuple(given.shape)}; the state's rows are {tuple(shape)}")
        if budget is not None and bool((budget < 1).any()):
            raise ValueError(f"budget={int(budget.min())} for some row: a loop takes at least 1 step")
        self.policy, self.readout, self.keep, self.observer, self.name = policy, readout, keep, observer, name
        self._compact = execution == "compact"
        self._shape = shape
        # The first dimension at hand is what compact execution shrinks: single rows, or sequences that halt as one.
        at_hand, granularity = tuple(shape), granularity_of(policy)
        self._together = granularity == "world"
        self._shrinks = self._compact and (granularity == "token" or (granularity == "sequence" and len(shape) > 1))
        if self._shrinks:
            at_hand = (math.prod(shape),) if granularity == "token" else (math.prod(shape[:-1]), shape[-1])
        elif self._compact and not shape:
            at_hand = (1,)
        live = torch.ones(shape, dtype=torch.bool, device=x0.device) if rows is None else rows.bool().clone()
        self.x, self.live, self.k = x0.reshape(*at_hand, x0.shape[-1]), live.reshape(at_hand), 0
        self.running = live.numel() if rows is None else int(live.sum())
        self.stopped, self.took, self.all_took = False, self.live, True
        self._steps = torch.zeros(at_hand, dtype=torch.int64, device=x0.device)
        self._outcome = torch.full(at_hand, Outcome.ABSENT, dtype=torch.int8, device=x0.device)
        self._budget = None if budget is None else budget.reshape(at_hand)
        self._at_hand: Tensor | None = None  # which units are, (n,) ascending; None: all
        self._left: list[Tensor] = []  # state, steps and outcome of all units, once some have been left behind
        self._state = policy.init(self.x)
        if observer is not None:
            observer.begin(name, x0)

    def advance(self, new: Tensor) -> Tensor:
        """Take the body's output for step ``k + 1``, judge it, and return the state of every row at hand.

        Raises:
            ValueError: the state's shape has changed.
        """
        new = self._checked(new)
        finite = signals.finite(new)
        live = self.live & finite
        state, halted, going = self._judge(new, live)
        self._take(new, live, halted, going, int(going.sum()), finite)
        self._state = state
        return self.x

    def advance_if_sound(self, new: Tensor, doubt: Tensor | None = None) -> bool:
        """As :meth:`advance`, looking at the device once: whether all rows are finite, and how many go on.

        Returns:
            False, and nothing is changed, if ``new`` or ``doubt`` is not finite: the step wants care.

        Raises:
            ValueError: the state's shape has changed.
        """
        new = self._checked(new)
        total = new.sum() if doubt is None else new.sum() + doubt  # NaN and infinity survive a sum
        # Looking costs nothing on a CPU; where processes decide together each must judge a step exactly once.
        first = total.is_cpu or self._together
        if first and not math.isfinite(float(total)):
            return False
        state, halted, going = self._judge(new, self.live)
        running = int(torch.count_nonzero(going) if first else torch.where(total.isfinite(), going.sum(), -1))
        if running < 0:
            return False
        self._take(new, self.live, halted, going, running)
        self._state = state
        return True

    def _checked(self, new: Tensor) -> Tensor:
        expected = (self.live.numel(), self.x.shape[-1]) if self._compact else self.x.shape
        if new.shape != expected:
            raise ValueError(f"the body turned a state of shape {tuple(expected)} into {tuple(new.shape)}")
        return new.view(self.x.shape) if self._compact else new

    def _judge(self, new: Tensor, live: Tensor) -> tuple[Any, Tensor, Tensor]:
        """The policy's state after step ``k + 1``, the rows it halts, and those that go on; nothing is changed."""
        step = LoopStep(self.k + 1, new, self.x, live, self.readout)
        state, verdict = self.policy.update(self._state, step)
        going = live > verdict.halt  # live and not halted, in one operation
        if self._budget is not None:
            going = going & (self._budget > self.k + 1)
        return state, verdict.halt, going

    def _take(
        self, new: Tensor, live: Tensor, halted: Tensor, going: Tensor, running: int, finite: Tensor | None = None
    ) -> None:
        """Step ``k + 1`` is taken. ``live`` rows have a state that is finite; ``finite`` None: all that ran."""
        self.k += 1
        self.stopped = running != self.running
        if not self.stopped:  # there is nothing to note
            took, self.all_took = going, running == going.numel()
        else:
            stops, halted = self.live & ~going, live & halted
            self._steps = torch.where(stops, self.k, self._steps)
            ends = torch.where(halted, Outcome.CONVERGED, Outcome.BUDGET)
            if finite is not None:
                ends = torch.where(finite, ends, Outcome.NONFINITE)
            self._outcome = torch.where(stops, ends.to(torch.int8), self._outcome)
            took = live
            if self.keep == "previous" and self.k > 1:
                took = live & ~halted
            if took is self.live:
                self.all_took = self.running == took.numel()
            else:
                self.all_took = bool(took.all())
            self.live, self.running = going, running
        self.took = took
        # Where every row takes the new state, it is the state: no copy.
        old, self.x = self.x, new if self.all_took else torch.where(took.unsqueeze(-1), new, self.x)
        if self.observer is not None:
            # A row that halts now did reach the new state, whichever one it hands on.
            seen = self.x if self.keep == "current" else torch.where(live.unsqueeze(-1), new, old)
            self.observer.step(self.name, self.k, self._everywhere(seen, 0))

    def leave(self, *, at_once: bool = False) -> Tensor | None:
        """Leave halted rows behind if there are enough of them (``at_once``: any).

        Returns:
            indices of the rows kept into the flat rows that were at hand, ascending; None if all were kept.
        """
        if not self._shrinks or self.running == self.live.numel():
            return None
        units = self.live if self.live.ndim == 1 else self.live.any(-1)  # (n,)
        count = len(units)
        if self.live.ndim == 1:
            going, few = self.running, count <= FEW_ROWS
        else:
            going, few = int(units.sum()), False
        if going == count or (not at_once and (few or count - going < LEAVE_SHARE * count)):
            return None
        kept, gone = units.nonzero().squeeze(-1), (~units).nonzero().squeeze(-1)
        self._put_down(gone)
        self._at_hand = kept if self._at_hand is None else self._at_hand[kept]
        self.x, self.live, self._steps, self._outcome = (
            part.index_select(0, kept) for part in (self.x, self.live, self._steps, self._outcome)
        )
        self.took = self.live
        if self._budget is not None:
            self._budget = self._budget.index_select(0, kept)
        self._state = map_state(lambda part: part.index_select(0, kept), self._state)
        if self.live.ndim == 1:
            return kept
        length = self.live.shape[-1]
        return (kept.unsqueeze(-1) * length + torch.arange(length, device=kept.device)).flatten()

    def halted_at_hand(self) -> Tensor | None:
        """Rows at hand that have halted, indices into the flat rows at hand; None if there is no such row."""
        return None if self.running == self.live.numel() else (~self.live).flatten().nonzero().squeeze(-1)

    def _put_down(self, gone: Tensor) -> None:
        """Note what units that leave have come to."""
        parts = (self.x, self._steps, self._outcome)
        if not self._left:  # nothing has been left so far: all units are at hand
            self._left = [torch.empty_like(part) for part in parts]
        where = gone if self._at_hand is None else self._at_hand[gone]
        for i, part in enumerate(parts):
            if self._left[i].dtype != part.dtype:  # the body's first step changed it
                self._left[i] = self._left[i].to(part.dtype)
            self._left[i].index_copy_(0, where, part.index_select(0, gone))

    def _everywhere(self, at_hand: Tensor, part: int) -> Tensor:
        """State (``part`` 0), steps (1) or outcome (2) of all rows in the shape given, from that of those at hand."""
        if self._at_hand is not None:
            left = self._left[part]
            at_hand = left.to(at_hand.dtype).index_copy(0, self._at_hand, at_hand)
        return at_hand.reshape(self._shape + at_hand.shape[self.live.ndim :])

    def finish(self) -> LoopResult:
        """Close the loop: rows that are still live have run out of budget."""
        steps = self._everywhere(torch.where(self.live, self.k, self._steps), 1)
        outcome = self._everywhere(torch.where(self.live, Outcome.BUDGET, self._outcome).to(torch.int8), 2)
        if self.observer is not None:
            self.observer.end(self.name, steps, outcome)
        return LoopResult(self._everywhere(self.x, 0), steps, outcome)


class _RowWise:
    """A function of single rows, and what it is given beside the state, as a body."""

    def __init__(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], rows: Sequence[int], flat: bool
    ) -> None:
        for given in inputs:
            if given.shape[: len(rows)] != tuple(rows):
                raise ValueError(f"inputs of shape {tuple(given.shape)} are not one a row; the rows are {tuple(rows)}")
        self.function = function
        count = math.prod(rows)
        self.inputs = [given.reshape(count, *given.shape[len(rows) :]) if flat else given for given in inputs]

    def step(self, x: Tensor, k: int, live: Tensor) -> Tensor:
        return self.function(x, *self.inputs)

    def redo(self, x: Tensor, k: int, live: Tensor) -> Tensor:
        raise NotImplementedError("never asked for: rows do not meet")

    def select(self, kept: Tensor) -> None:
        self.inputs = [given.index_select(0, kept) for given in self.inputs]

    def hold(self, halted: Tensor | None) -> None:
        """Rows do not see each other."""

    def doubt(self) -> None:
        return None


def run_loop(
    body: LoopBody | Callable[..., Tensor],
    x0: Tensor,
    policy: HaltingPolicy[Any],
    *,
    max_steps: int = 32,
    readout: Readout | None = None,
    rows: Tensor | None = None,
    keep: Keep = "current",
    observer: LoopObserver | None = None,
    name: str = "loop",
    inputs: Sequence[Tensor] = (),
    budget: Tensor | None = None,
    execution: Execution = "masked",
) -> LoopResult:
    """Apply ``body`` to ``x0`` again and again until every row has halted.

    Args:
        body: a :class:`LoopBody`, or a function from ``x_{k-1}`` (and ``inputs``) to ``x_k``.
        x0: initial state, ``(..., D)``.
        policy: decides row by row.
        max_steps: the budget; rows still live then end as ``BUDGET``.
        readout: from the state to logits ``(..., V)``, for policies that look at predictions.
        rows: which rows are real, ``(...)`` bool (None: all); the others are never judged and keep ``x0``.
        keep: the state a converged row hands on. ``current`` is the newest; ``previous`` the one before it, as
            Algorithm 1 of arXiv 2509.23314 leaves it (for rows that halt at step 1 there is none to prefer).
            Steps count body applications either way.
        observer: told of every state, for instance a recorder.
        name: what the observer calls this loop.
        inputs: tensors ``(..., anything)`` with an entry a row, which a function is called with after the state. In
            compact execution the function sees ``(n, D)`` and the entries of these ``n`` rows, so that what belongs
            to a row must come this way and not from around the function.
        budget: a row's own budget, ``(...)`` int64, where it is below ``max_steps``.
        execution: ``masked`` computes every row at every step; ``compact`` leaves halted rows behind. Steps are the
            same. Compact wants a function of single rows, or a :class:`CompactBody`.

    Raises:
        ValueError: ``max_steps`` below 1, ``rows``, ``inputs`` or ``budget`` of the wrong shape, a body that changes
            the state's shape, or one that cannot leave rows behind.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps}: a loop takes at least 1 step")
    run = LoopRun(
        policy, x0, readout=readout, rows=rows, keep=keep, observer=observer, name=name, budget=budget,
        execution=execution,
    )  # fmt: skip
    compact = execution == "compact"
    if not isinstance(body, LoopBody):
        looped: LoopBody = _RowWise(body, inputs, x0.shape[:-1], compact)
    elif inputs:
        raise ValueError("inputs= is for functions; a body with a step method keeps what it needs itself")
    else:
        looped = body
    if not compact:
        while run.running and run.k < max_steps:
            run.advance(looped.step(run.x, run.k + 1, run.live))
        return run.finish()
    if not isinstance(looped, CompactBody):
        raise ValueError(
            f"{type(body).__name__} cannot leave rows behind: give it select, hold, doubt and redo (see CompactBody), "
            "or use execution='masked'"
        )
    _settle(looped, run, at_once=True)
    while run.running and run.k < max_steps:
        x, live = run.x.flatten(0, -2), run.live.flatten()
        new = looped.step(x, run.k + 1, live)
        doubt = looped.doubt()
        if not run.advance_if_sound(new, doubt):
            run.advance(new if doubt is None else looped.redo(x, run.k + 1, live))
        if run.stopped and run.running:
            _settle(looped, run)
    return run.finish()


def _settle(body: CompactBody, run: LoopRun, at_once: bool = False) -> None:
    """Some rows have halted: leave them behind, or tell the body that they stay."""
    kept = run.leave(at_once=at_once)
    if kept is not None:
        body.select(kept)
    body.hold(run.halted_at_hand())
