"""The loop: applies a body until a policy, the budget or a non-finite state ends each row.

Masked execution: every row is computed at every step and halted rows discard the result. It is the slow, obvious
reference for every faster execution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import HaltingPolicy, LoopStep, Readout

__all__ = ["Keep", "LoopBody", "LoopObserver", "LoopResult", "LoopRun", "Outcome", "run_loop"]

Keep = Literal["current", "previous"]


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
        x: the state of every row, ``(..., D)``: the newest of a live row, the last of one that has halted.
        k: steps taken.
        live: rows still running, ``(...)`` bool.
        running: how many they are.
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
    ) -> None:
        shape = x0.shape[:-1]
        if keep not in ("current", "previous"):
            raise ValueError(f"keep={keep!r}: allowed are 'current' and 'previous'")
        if rows is not None and rows.shape != shape:
            raise ValueError(f"rows has shape {tuple(rows.shape)}; the state's rows are {tuple(shape)}")
        self.policy, self.readout, self.keep, self.observer, self.name = policy, readout, keep, observer, name
        self.x, self.k = x0, 0
        self.live = torch.ones(shape, dtype=torch.bool, device=x0.device) if rows is None else rows.bool().clone()
        self.running = int(self.live.sum())
        self.took, self.all_took = self.live, True
        self._steps = torch.zeros(shape, dtype=torch.int64, device=x0.device)
        self._outcome = torch.full(shape, Outcome.ABSENT, dtype=torch.int8, device=x0.device)
        self._state = policy.init(x0)
        if observer is not None:
            observer.begin(name, x0)

    def advance(self, new: Tensor) -> Tensor:
        """Take the body's output for step ``k + 1``, judge it, and return the state of every row.

        Raises:
            ValueError: the state's shape has changed.
        """
        if new.shape != self.x.shape:
            raise ValueError(f"the body turned a state of shape {tuple(self.x.shape)} into {tuple(new.shape)}")
        self.k += 1
        finite = _finite(new)
        live = self.live & finite
        step = LoopStep(self.k, new, self.x, live, self.readout)
        self._state, verdict = self.policy.update(self._state, step)
        going = live & ~verdict.halt
        running = int(going.sum())
        if running == self.running:  # nobody stopped: there is nothing to note
            took, self.all_took = going, running == going.numel()
        else:
            stopped = self.live & ~going
            self._steps = torch.where(stopped, self.k, self._steps)
            self._outcome = torch.where(stopped, Outcome.CONVERGED, self._outcome)
            self._outcome = torch.where(self.live & ~finite, Outcome.NONFINITE, self._outcome)
            took = going if self.keep == "previous" and self.k > 1 else live
            self.live, self.running, self.all_took = going, running, bool(took.all())
        self.took = took
        # Where every row takes the new state, it is the state: no copy.
        self.x = new if self.all_took else torch.where(took.unsqueeze(-1), new, self.x)
        if self.observer is not None:
            # A row that halts now did reach the new state, whichever one it hands on.
            seen = self.x if self.keep == "current" else torch.where(live.unsqueeze(-1), new, self.x)
            self.observer.step(self.name, self.k, seen)
        return self.x

    def finish(self) -> LoopResult:
        """Close the loop: rows that are still live have run out of budget."""
        steps = torch.where(self.live, self.k, self._steps)
        outcome = torch.where(self.live, Outcome.BUDGET, self._outcome).to(torch.int8)
        if self.observer is not None:
            self.observer.end(self.name, steps, outcome)
        return LoopResult(self.x, steps, outcome)


@dataclass(frozen=True)
class _RowWise:
    function: Callable[[Tensor], Tensor]

    def step(self, x: Tensor, k: int, live: Tensor) -> Tensor:
        return self.function(x)


def run_loop(
    body: LoopBody | Callable[[Tensor], Tensor],
    x0: Tensor,
    policy: HaltingPolicy[Any],
    *,
    max_steps: int = 32,
    readout: Readout | None = None,
    rows: Tensor | None = None,
    keep: Keep = "current",
    observer: LoopObserver | None = None,
    name: str = "loop",
) -> LoopResult:
    """Apply ``body`` to ``x0`` again and again until every row has halted.

    Args:
        body: a :class:`LoopBody`, or a function from ``x_{k-1}`` to ``x_k``.
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

    Raises:
        ValueError: ``max_steps`` below 1, ``rows`` of the wrong shape, or a body that changes the state's shape.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps}: a loop takes at least 1 step")
    looped = body if isinstance(body, LoopBody) else _RowWise(body)
    run = LoopRun(policy, x0, readout=readout, rows=rows, keep=keep, observer=observer, name=name)
    while run.running and run.k < max_steps:
        run.advance(looped.step(run.x, run.k + 1, run.live))
    return run.finish()


def _finite(x: Tensor) -> Tensor:
    """Rows whose entries are all finite, ``(..., D)`` to ``(...)``; the maximum propagates NaN.

    (``vector_norm`` with ``ord=inf`` says the same, ten times as slowly on a CPU.)
    """
    return signals.measured(x).abs().amax(-1) < torch.inf
