"""The loop: applies a body until a policy, the budget or a non-finite state ends each row.

Two executions of the same function. *Masked*: every row is computed at every step and frozen rows discard the
result; the slow, obvious reference. *Compact*: frozen rows are retired, so that the body computes what is still
running. Step counts are the same, and states to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from haltkit import signals
from haltkit.bodies import CompactBody, FreezingBody, GuardedBody, LoopBody, RowWise
from haltkit.parts import PartwiseJudge, is_large
from haltkit.protocol import (
    HaltingPolicy,
    LoopStep,
    Readout,
    check_count,
    check_state,
    granularity_of,
    judge,
    map_state,
)
from haltkit.rows import LoopRows, Outcome
from haltkit.specs import PolicyLike, policy_of

__all__ = [
    "ChangedInPlace",
    "Execution",
    "Keep",
    "LoopObserver",
    "LoopResult",
    "LoopRun",
    "Outcome",
    "run_loop",
]

Execution = Literal["masked", "compact"]
Keep = Literal["current", "previous"]


class ChangedInPlace(ValueError):
    """A body that writes into the state it was given: its steps cannot be measured, nor its rows frozen."""


class LoopObserver(Protocol):
    """What a recorder implements: it is called at the start, at every step and at the end of a loop."""

    def begin(self, name: str, x0: Tensor) -> None: ...

    def step(self, name: str, k: int, x: Tensor) -> None: ...

    def end(self, name: str, steps: Tensor, outcome: Tensor) -> None: ...


@dataclass(frozen=True)
class LoopResult:
    """The result of a loop, one entry per row.

    Attributes:
        x: the state handed on, ``(..., D)``.
        steps: body applications, ``(...)`` int64; 0 for absent rows.
        outcome: an :class:`Outcome` per row, ``(...)`` int8.
    """

    x: Tensor
    steps: Tensor
    outcome: Tensor

    def __str__(self) -> str:
        """One line: the rows present, their steps, and how many ended how."""
        steps = self.steps[self.outcome != Outcome.ABSENT]
        if not steps.numel():
            return "no rows"
        low, high, mean = int(steps.min()), int(steps.max()), float(steps.double().mean())
        taken = f"{low} to {high} steps (mean {mean:.1f})" if low < high else f"{low} steps"
        ends = {kind: int((self.outcome == kind).sum()) for kind in Outcome if kind is not Outcome.ABSENT}
        return f"{steps.numel()} rows: {taken}; " + ", ".join(f"{n} {kind.name}" for kind, n in ends.items() if n)


class LoopRun:
    """A loop in progress, which its driver gives one new state at a time.

    :func:`run_loop` is the plain driver; a model that runs its own loop is another. A ``LoopRun`` judges each step
    and takes it; :class:`~haltkit.rows.LoopRows` records which rows are active, frozen or retired.

    Args:
        pure: the driver guarantees that states are never changed in place. Otherwise each step is
            checked, by the state's version counter; inference tensors, which count no versions, are copied.

    Attributes:
        x: the state of every row present: the newest of an active row, the last of a frozen one. ``(..., D)`` as
            given; in compact execution ``(n, D)``, or ``(n, T, D)`` for a policy that judges whole sequences.
        k: steps taken.
        rows: which rows are active, frozen or retired.
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
        pure: bool = False,
    ) -> None:
        if keep not in ("current", "previous"):
            raise ValueError(f"keep={keep!r}: allowed are 'current' and 'previous'")
        if execution not in ("masked", "compact"):
            raise ValueError(f"execution={execution!r}: allowed are 'masked' and 'compact'")
        check_state(x0, name)
        self.policy, self.readout, self.keep, self.observer, self.name = policy, readout, keep, observer, name
        self._compact, self._pure = execution == "compact", pure
        granularity = granularity_of(policy)
        self._collective = granularity == "world"
        row_by_row = granularity == "token" and readout is None
        self._partwise = PartwiseJudge(policy) if row_by_row and is_large(x0) else None
        self.rows = LoopRows(x0.shape[:-1], granularity, x0.device, given=rows, budget=budget, compact=self._compact)
        self.x, self.k = self.rows.arranged(x0), 0
        self.stopped, self.took, self.all_took = False, self.rows.active, True
        self._state = policy.init(self.x)
        self._before = self._stamp()
        if observer is not None:
            observer.begin(name, x0)

    @property
    def active(self) -> Tensor:
        """Rows still running, among those present, ``(...)`` bool."""
        return self.rows.active

    @property
    def running(self) -> int:
        """How many rows are still running."""
        return self.rows.running

    def advance(self, new: Tensor) -> Tensor:
        """Take the body's output for step ``k + 1``, judge it, and return the state of every row present.

        Raises:
            ValueError: the state's shape has changed.
            ChangedInPlace: the body has written into the state it was given.
        """
        new = self._checked(new)
        if self._partwise is not None and is_large(new):
            state, halted, finite = self._partwise.judge(self._state, self.k + 1, new, self.x, self.active, self.name)
            sound = self.active & finite
            going = self._within_budget(sound & ~halted)
        else:
            finite = signals.finite(new)
            sound = self.active & finite
            state, halted, going = self._judge(new, sound)
        self._take(new, sound, halted, going, int(going.sum()), finite)
        self._state = state
        return self.x

    def advance_if_sound(self, new: Tensor, probe: Tensor | None = None) -> bool:
        """As :meth:`advance`, with one read from the device: whether all rows are finite, and how many stay active.

        Returns:
            False, and nothing is changed, if ``new`` or ``probe`` is not finite: the step is to be guarded.

        Raises:
            ValueError: the state's shape has changed.
            ChangedInPlace: the body has written into the state it was given.
        """
        if probe is None and self._partwise is not None and is_large(new):  # a second look at it would cost more
            self.advance(new)
            return True
        new = self._checked(new)
        total = new.sum() if probe is None else new.sum() + probe  # NaN and infinity survive a sum
        # Looking costs nothing on a CPU; where processes decide collectively each must judge a step exactly once.
        first = total.is_cpu or self._collective
        if first and not math.isfinite(float(total)):
            return False
        state, halted, going = self._judge(new, self.active)
        running = int(torch.count_nonzero(going) if first else torch.where(total.isfinite(), going.sum(), -1))
        if running < 0:
            return False
        self._take(new, self.active, halted, going, running)
        self._state = state
        return True

    def _stamp(self) -> tuple[int, Tensor | None]:
        """What tells afterwards whether the state was changed in place: its version, or a copy of it."""
        if self._pure:
            return 0, None
        return (0, self.x.clone()) if self.x.is_inference() else (self.x._version, None)

    def _checked(self, new: Tensor) -> Tensor:
        if not isinstance(new, Tensor) or new.dtype != self.x.dtype:  # the states before were found good
            check_state(new, self.name)
        expected = (self.rows.count, self.x.shape[-1]) if self._compact else self.x.shape
        if new.shape != expected:
            raise ValueError(f"the body turned a state of shape {tuple(expected)} into {tuple(new.shape)}")
        if not self._pure:
            self._check_untouched(new)
        return new.view(self.x.shape) if self._compact else new

    def _check_untouched(self, new: Tensor) -> None:
        version, copy = self._before
        if copy is not None:  # whatever happened to the state: the copy is what it was
            self.x = copy
            return
        changed = self.x._version != version
        if not changed and not new.is_inference() and new._version != version:
            # The same memory under another version counter (x.data): what was written there was not counted.
            changed = new.untyped_storage().data_ptr() == self.x.untyped_storage().data_ptr() and new.numel() > 0
        if changed:
            raise ChangedInPlace(
                f"the body changed the state of {self.name!r} in place (such as x += ..., x.mul_(...), or a buffer of "
                "its own that it returns at every step), so the step cannot be measured and rows cannot be frozen: "
                "return a new tensor, or give the body a copy, as in lambda x: body(x.clone())"
            )

    def _judge(self, new: Tensor, sound: Tensor) -> tuple[Any, Tensor, Tensor]:
        """The policy's state after step ``k + 1``, the rows it halts, and those that go on; nothing is changed."""
        step = LoopStep(self.k + 1, new, self.x, sound, self.readout, region=self.name)
        state, verdict = judge(self.policy, self._state, step)
        # Sound and not halted, in one operation.
        return state, verdict.halt, self._within_budget(sound > verdict.halt)

    def _within_budget(self, going: Tensor) -> Tensor:
        return going if self.rows.budget is None else going & (self.rows.budget > self.k + 1)

    def _take(
        self, new: Tensor, sound: Tensor, halted: Tensor, going: Tensor, running: int, finite: Tensor | None = None
    ) -> None:
        """Step ``k + 1`` is taken. ``sound`` rows are active and finite; ``finite`` None: all active rows are."""
        rows, old = self.rows, self.x
        self.k += 1
        self.stopped = running != rows.running
        if not self.stopped:  # there is nothing to note
            took, self.all_took = going, running == rows.count
        else:
            halted = sound & halted
            ends = torch.where(halted, Outcome.CONVERGED, Outcome.BUDGET)
            if finite is not None:
                ends = torch.where(finite, ends, Outcome.NONFINITE)
            took = sound & ~halted if self.keep == "previous" and self.k > 1 else sound
            self.all_took = rows.running == rows.count if took is rows.active else bool(took.all())
            rows.halt(self.k, rows.active & ~going, ends, running)
            rows.active = going
        self.took = took
        # Where every row takes the new state, it is the state: no copy.
        self.x = new if self.all_took else torch.where(took.unsqueeze(-1), new, old)
        self._before = self._stamp()
        if self.observer is not None:
            # A row that halts now did reach the new state, whichever one it hands on.
            seen = self.x if self.keep == "current" else torch.where(sound.unsqueeze(-1), new, old)
            self.observer.step(self.name, self.k, rows.all_states(seen))

    def retire(self, *, at_once: bool = False) -> Tensor | None:
        """Retire frozen rows if there are enough of them (``at_once``: any).

        Returns:
            the rows kept, ascending indices into the flat rows that were present; None if all were kept.
        """
        kept = self.rows.retire(self.x, at_once=at_once)
        if kept is None:
            return None
        self.x = self.x.index_select(0, kept)
        self._state = map_state(lambda part: part.index_select(0, kept), self._state)
        self.took, self._before = self.rows.active, self._stamp()
        return self.rows.rows_of(kept)

    def finish(self) -> LoopResult:
        """End the loop: rows that are still active have used up the budget."""
        steps, outcome = self.rows.results(self.k)
        if self.observer is not None:
            self.observer.end(self.name, steps, outcome)
        return LoopResult(self.rows.all_states(self.x), steps, outcome)


def run_loop(
    body: LoopBody | Callable[..., Tensor],
    x0: Tensor,
    policy: PolicyLike,
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
        x0: initial state, ``(..., D)``, of real floating-point numbers.
        policy: decides row by row; an object, or a spec such as ``"norm:tau=1e-3"``.
        max_steps: the budget; rows still active then end as ``BUDGET``.
        readout: from the state to logits ``(..., V)``, for policies that look at predictions.
        rows: which rows are real, ``(...)`` bool (None: all); the others are never judged and keep ``x0``.
        keep: the state a converged row hands on. ``current`` is the newest; ``previous`` the one before it, as
            Algorithm 1 of arXiv 2509.23314 returns it (a row that halts at step 1 hands on ``x_1``).
            Steps count body applications either way.
        observer: is given every state; for instance a recorder.
        name: what the observer calls this loop.
        inputs: tensors ``(..., anything)`` with one entry per row, which a function is called with after the state. In
            compact execution the function sees ``(n, D)`` and the entries of these ``n`` rows, so that what belongs
            to a row must come this way and not from around the function.
        budget: steps allowed per row, ``(...)`` int64, where fewer than ``max_steps``.
        execution: ``masked`` computes every row at every step; ``compact`` retires those that have halted. Steps are
            the same. Compact wants a function of single rows, or a :class:`CompactBody`.

    Raises:
        ValueError: a bad spec, ``max_steps`` that is no whole number of at least 1, a state that is not of real
            floating-point numbers, ``rows``, ``inputs`` or ``budget`` of the wrong shape, a body that changes the
            state's shape, or one whose rows cannot be retired; a policy or readout whose answer is not row by row.
        ChangedInPlace: a body that writes into the state it is given.
    """
    check_count("max_steps", max_steps)
    check_state(x0, name)
    compact = execution == "compact"
    if not isinstance(body, LoopBody):
        looped: LoopBody = RowWise(body, inputs, x0.shape[:-1], compact)
    elif inputs:
        raise ValueError("inputs= is for functions; a body with a step method keeps what it needs itself")
    else:
        looped = body
    run = LoopRun(
        policy_of(policy),
        x0,
        readout=readout,
        rows=rows,
        keep=keep,
        observer=observer,
        name=name,
        budget=budget,
        execution=execution,
        pure=getattr(looped, "pure", False),
    )
    if compact:
        _run_compact(looped, run, max_steps)
    else:
        while run.running and run.k < max_steps:
            run.advance(looped.step(run.x, run.k + 1, run.active))
    return run.finish()


def _run_compact(body: LoopBody, run: LoopRun, max_steps: int) -> None:
    """Step until no row is active, retiring those that have halted."""
    if not isinstance(body, CompactBody):
        raise ValueError(
            f"rows of {type(body).__name__} cannot be retired: give it select (see haltkit.CompactBody), or use "
            "execution='masked'"
        )
    freezing = body if isinstance(body, FreezingBody) else None
    guarded = body if isinstance(body, GuardedBody) else None
    if guarded is None and (hasattr(body, "finite_probe") or hasattr(body, "guarded_step")):
        raise ValueError(f"{type(body).__name__} has one of finite_probe and guarded_step: it needs both, or neither")

    def settle(at_once: bool) -> None:
        kept = run.retire(at_once=at_once)
        if kept is not None:
            body.select(kept)
        if freezing is not None:
            freezing.freeze(run.rows.frozen())

    settle(at_once=True)
    while run.running and run.k < max_steps:
        x, active = run.x.flatten(0, -2), run.active.flatten()
        new = body.step(x, run.k + 1, active)
        probe = None if guarded is None else guarded.finite_probe()
        if not run.advance_if_sound(new, probe):
            if guarded is not None and probe is not None:
                new = guarded.guarded_step(x, run.k + 1, active)
            run.advance(new)
        if run.stopped and run.running:
            settle(at_once=False)
