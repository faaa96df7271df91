"""The slots of a queue: a dense batch whose items are each at a step of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

from haltkit import signals
from haltkit.loop import Keep, Outcome
from haltkit.protocol import (
    HaltingPolicy,
    Heads,
    LoopStep,
    Readout,
    Verdict,
    check_count,
    check_state,
    granularity_of,
    judge,
    map_state,
)

__all__ = ["QueueItem", "QueueResult", "SlotBody", "Slots", "place"]

S = TypeVar("S")


class QueueItem(NamedTuple):
    """One item of a queue: a single row, or an instance whose rows start together and are retired together.

    A plain tensor stands for ``QueueItem(tensor)``, and a plain tuple for the fields in this order.

    Attributes:
        x0: initial state, ``(D,)`` for a row, ``(T, D)`` or ``(..., D)`` for an instance.
        inputs: what else the body is given: one tensor, or several. The body sees them stacked, ``(n, ...)``.
        budget: steps allowed for this item where they are fewer than ``max_steps``.
    """

    x0: Tensor
    inputs: Tensor | Sequence[Tensor] = ()
    budget: int | None = None


@dataclass(frozen=True, eq=False)
class QueueResult:
    """The result of one item; ``x``, ``steps`` and ``outcome`` equal those of ``run_loop`` on the item alone.

    Attributes:
        index: the item's number in the source, from 0.
        x: the state handed on, in the shape of the item's ``x0``; empty, ``(0,)``, if the item has an ``error``.
        steps: body applications per row, ``()`` for an item ``(D,)``, ``(T,)`` for ``(T, D)``; int64. 0 with an error.
        outcome: an :class:`~haltkit.loop.Outcome` per row, in the shape of ``steps``; int8. ``ABSENT`` with an error.
        error: the exception that ``prepare`` raised for this item, or None.
    """

    index: int
    x: Tensor
    steps: Tensor
    outcome: Tensor
    error: Exception | None = None


@runtime_checkable
class SlotBody(Protocol):
    """A body with a memory per slot, for example a cache per item. :func:`place` updates most memories."""

    def admit(self, slots: Tensor, inputs: tuple[Tensor, ...]) -> None:
        """New items take ``slots``, ``(m,)`` ascending: forget what these slots contain.

        A slot that does not exist yet is the next one after the last. ``inputs`` are those of the new items, each
        ``(m, ...)``. At first there is no slot.
        """
        ...

    def select(self, kept: Tensor) -> None:
        """From now on there are only the slots ``kept``, ``(n',)`` ascending, numbered anew from 0."""
        ...

    def step(self, x: Tensor, k: Tensor, active: Tensor) -> Tensor:
        """The next state from ``x``, both ``(n, ..., D)``, one item per slot.

        ``k`` is the step that each slot takes, ``(n,)`` int64, from 1. Rows that are not ``active``, ``(n, ...)``, have
        halted in an instance that goes on; what is returned for them is discarded.
        """
        ...


def place(held: Tensor | None, slots: Tensor, new: Tensor) -> Tensor:
    """``held`` ``(n, ...)`` with the rows ``new`` ``(m, ...)`` at ``slots``, which may reach beyond ``n``.

    ``held`` is None before the first items, and is not written to.
    """
    if held is None:
        return new
    added = max(0, int(slots[-1]) + 1 - len(held))
    inside = len(new) - added
    if inside:
        held = held.index_copy(0, slots[:inside], new[:inside])
    return torch.cat([held, new[inside:]]) if added else held


class _Batch(NamedTuple):
    """The tensors of all items, with one entry per slot."""

    x: Tensor  # (n, ..., D)
    active: Tensor  # (n, ...)
    steps: Tensor  # (n, ...)
    outcome: Tensor  # (n, ...)
    age: Tensor  # (n,) steps taken
    budget: Tensor  # (n,)
    inputs: tuple[Tensor, ...]  # (n, ...) each


class Slots:
    """The items that run, one per slot, each at a step of its own. Between steps no slot is empty."""

    def __init__(
        self, body: Any, policy: HaltingPolicy[Any], max_steps: int, readout: Readout | None, keep: Keep
    ) -> None:
        self.body, self.policy, self.max_steps, self.readout, self.keep = body, policy, max_steps, readout, keep
        self.memory: SlotBody | None = body if isinstance(body, SlotBody) else None
        self.kind: list[tuple[Any, ...]] | None = None  # shape, dtype and device of the first item's tensors
        self.batch: _Batch | None = None
        self.state: Any = None  # the policy's, of the first ``judged`` slots
        self.judged = 0
        self.names: list[int] = []  # the number of each slot's item
        self.free: list[int] = []  # slots whose item is retired, ascending
        self.newcomers: Tensor | None = None  # slots whose item has taken no step yet, ascending

    @property
    def running(self) -> int:
        return len(self.names) - len(self.free)

    def clear(self) -> None:
        """Retire all items."""
        self._select([])

    def admit(self, items: list[tuple[int, Any]]) -> None:
        """Put items into the free slots, then into new ones; free slots without a new item are removed."""
        new = [self._checked(number, item) for number, item in items]
        slots, spare = self.free[: len(new)], set(self.free[len(new) :])  # ascending: dropping the spare renumbers none
        if spare:
            self._select([slot for slot in range(len(self.names)) if slot not in spare])
        if not new:
            return
        slots += range(len(self.names), len(self.names) + len(new) - len(slots))
        for slot, (number, _) in zip(slots, items, strict=True):
            self.names[slot : slot + 1] = [number]
        x, *inputs = (torch.stack(parts) for parts in zip(*(tensors for tensors, _ in new), strict=True))
        rows, device = x.shape[:-1], x.device
        self.free, self.newcomers = [], torch.tensor(slots, device=device)
        entering = _Batch(
            x,
            torch.ones(rows, dtype=torch.bool, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
            torch.full(rows, Outcome.ABSENT, dtype=torch.int8, device=device),
            torch.zeros(len(new), dtype=torch.int64, device=device),
            torch.tensor([budget for _, budget in new], device=device),
            tuple(inputs),
        )
        self.batch = entering if self.batch is None else _place_all(self.batch, self.newcomers, entering)
        if self.memory is not None:
            self.memory.admit(self.newcomers, entering.inputs)

    def step(self) -> list[tuple[int, QueueResult]]:
        """Every item takes a step; the results of the items that are retired, by their numbers."""
        if self.batch is None:
            return []
        x, active, steps, outcome, age, budget, inputs = self.batch
        age = age + 1
        given = x.clone()  # a body may write into the state it is given, or return a buffer of its own each time
        new = self.body(given, *inputs) if self.memory is None else self.memory.step(given, age, active)
        if not isinstance(new, Tensor) or (new.shape, new.dtype) != (x.shape, x.dtype):
            found = f"{tuple(new.shape)}, {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"the body turned a state of shape {tuple(x.shape)}, {x.dtype}, into {found}: in a queue, where new "
                "items join those that have run, it must keep both"
            )
        per_row = (-1, *[1] * (active.ndim - 1))
        finite = signals.finite(new)
        sound = active & finite
        halted = sound & self._judge(new, age.view(per_row).expand(active.shape), sound)
        stops = active & (halted | ~finite | (age >= budget).view(per_row))
        ends = torch.where(halted, int(Outcome.CONVERGED), int(Outcome.BUDGET))
        ends = torch.where(finite, ends, int(Outcome.NONFINITE)).to(torch.int8)
        took = sound & ~(halted & (age > 1).view(per_row)) if self.keep == "previous" else sound
        x = torch.where(took.unsqueeze(-1), new, x)
        steps = torch.where(stops, age.view(per_row), steps)
        outcome, active = torch.where(stops, ends, outcome), active & ~stops
        self.batch = _Batch(x, active, steps, outcome, age, budget, inputs)
        retired = ~(active if active.ndim == 1 else active.flatten(1).any(1))
        gone = retired.nonzero().squeeze(-1)
        self.free = gone.tolist()
        if not self.free:
            return []
        parts = [part.index_select(0, gone).unbind() for part in (x, steps, outcome)]
        ended = [QueueResult(self.names[slot], *part) for slot, *part in zip(self.free, *parts, strict=True)]
        return [(result.index, result) for result in ended]

    def _judge(self, new: Tensor, k: Tensor, active: Tensor) -> Tensor:
        """Which rows the policy halts, ``(n, ...)``. Newcomers are judged apart: their state begins here."""
        x_prev = cast(_Batch, self.batch).x
        everything = LoopStep(k, new, x_prev, active, self.readout)  # each head is read at most once, for all slots

        def step_of(rows: Callable[[Tensor], Tensor], k: int | Tensor, active: Tensor) -> LoopStep:
            heads = Heads(lambda _: rows(everything.logits), lambda _: rows(everything.gate))
            return LoopStep(k, rows(new), rows(x_prev), active, heads)

        judged, newcomers, halt = self.judged, self.newcomers, None
        if newcomers is None or len(newcomers) < len(new):
            old = active if newcomers is None else active.index_fill(0, newcomers, False)
            step = step_of(lambda part: part[:judged], k[:judged], old[:judged])

            def one() -> LoopStep:
                return step_of(lambda part: part[:1], int(k[:1].max()), old[:1])

            self.state, (_, halt) = self._update(step, one)
        if newcomers is not None:
            step = step_of(lambda part: part.index_select(0, newcomers), 1, active.index_select(0, newcomers))
            state, verdict = judge(self.policy, self.policy.init(step.x_prev), step)
            self.state = state if halt is None else _place_all(self.state, newcomers, state)
            halt = place(halt, newcomers, verdict.halt)
        self.judged, self.newcomers = len(new), None
        return cast(Tensor, halt)

    def _update(self, step: LoopStep, one: Callable[[], LoopStep]) -> tuple[Any, Verdict]:
        """The policy's update where rows are at different steps; ``one`` makes that of the first slot alone."""
        try:
            return judge(self.policy, self.state, step)
        except Exception as error:  # whatever a policy of the user's raises
            try:
                judge(self.policy, map_state(lambda part: part[:1], self.state), one())
            except Exception:
                raise error from None  # it fails with a number, too
            raise ValueError(
                f"{type(self.policy).__name__} needs step.k to be one number; in a queue rows are at different steps, "
                "and step.k is an int64 tensor with an entry per row: write halt & (step.k >= n) in place of "
                "`if step.k >= n`"
            ) from error

    def _select(self, kept: list[int]) -> None:
        if self.batch is None:
            return
        slots = torch.tensor(kept, dtype=torch.int64, device=self.batch.x.device)
        if self.memory is not None:
            self.memory.select(slots)

        def select(part: Tensor) -> Tensor:
            return part.index_select(0, slots)

        self.batch = map_state(select, self.batch) if kept else None
        self.state = map_state(select, self.state) if kept else None
        self.names, self.free, self.judged = [self.names[slot] for slot in kept], [], len(kept)

    def _checked(self, number: int, item: Any) -> tuple[tuple[Tensor, ...], int]:
        """An item's tensors and budget."""
        if isinstance(item, Tensor):
            item = QueueItem(item)
        if not isinstance(item, tuple) or not 1 <= len(item) <= 3:
            raise ValueError(f"item {number} is {type(item).__name__}: allowed are a state and (state, inputs, budget)")
        x0, given, budget = QueueItem(*item)
        tensors = (x0, *given) if isinstance(given, tuple | list) else (x0, given)
        check_state(x0, f"item {number}")
        if not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise ValueError(f"item {number}: its inputs must be tensors")
        if budget is not None:
            check_count(f"item {number}: budget", budget)
        kind = [(tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors]
        if self.kind is None:
            if granularity_of(self.policy) == "sequence" and x0.ndim < 2:
                raise ValueError(
                    f"granularity=sequence pools over the rows of an instance (T, D); item {number} is one row "
                    f"{tuple(x0.shape)}. Use granularity=token"
                )
            self.kind = kind
        if kind != self.kind:
            have, want = (" and ".join(f"{shape} {dtype} on {on}" for shape, dtype, on in k) for k in (kind, self.kind))
            raise ValueError(
                f"item {number} is {have}; the items before it are {want}. All items of a queue, and their inputs, "
                "have equal shapes, dtypes and devices: pad them, or run a queue for each shape"
            )
        return tensors, self.max_steps if budget is None else min(budget, self.max_steps)


def _place_all(held: S, slots: Tensor, new: S) -> S:
    """:func:`place` for every tensor of a policy's state, or of another structure like it."""
    if isinstance(held, Tensor) and isinstance(new, Tensor):
        return cast(S, place(held, slots, new))
    if held is None and new is None:
        return held
    if isinstance(held, tuple) and isinstance(new, tuple) and type(held) is type(new) and len(held) == len(new):
        parts = [_place_all(a, slots, b) for a, b in zip(held, new, strict=True)]
        return cast(S, cast(Any, type(held))(*parts) if hasattr(held, "_fields") else tuple(parts))
    raise ValueError(
        f"a policy's state after its first step ({type(new).__name__}) has another structure than after later steps "
        f"({type(held).__name__}): in a queue rows of all ages share one state, so that the structures must be equal"
    )
