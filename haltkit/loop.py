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

__all__ = ["Keep", "LoopBody", "LoopObserver", "LoopResult", "Outcome", "run_loop"]

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
    if keep not in ("current", "previous"):
        raise ValueError(f"keep={keep!r}: allowed are 'current' and 'previous'")
    shape = x0.shape[:-1]
    if rows is not None and rows.shape != shape:
        raise ValueError(f"rows has shape {tuple(rows.shape)}; the state's rows are {tuple(shape)}")
    looped = body if isinstance(body, LoopBody) else _RowWise(body)

    live = torch.ones(shape, dtype=torch.bool, device=x0.device) if rows is None else rows.bool().clone()
    steps = torch.zeros(shape, dtype=torch.int64, device=x0.device)
    outcome = torch.full(shape, Outcome.ABSENT, dtype=torch.int8, device=x0.device)
    x, state, running = x0, policy.init(x0), int(live.sum())
    if observer is not None:
        observer.begin(name, x0)
    for k in range(1, max_steps + 1):
        if not running:
            break
        new = looped.step(x, k, live)
        if new.shape != x.shape:
            raise ValueError(f"the body turned a state of shape {tuple(x.shape)} into {tuple(new.shape)}")
        steps = torch.where(live, k, steps)
        finite = live & _finite(new)
        outcome = torch.where(live & ~finite, Outcome.NONFINITE, outcome)
        state, verdict = policy.update(state, LoopStep(k, new, x, finite, readout))
        halted = finite & verdict.halt
        outcome = torch.where(halted, Outcome.CONVERGED, outcome)
        took = finite & ~halted if keep == "previous" and k > 1 else finite
        live = finite & ~halted
        running = int(live.sum())
        # With every row still running the new state is the state: no copy.
        x = new if running == live.numel() else torch.where(took.unsqueeze(-1), new, x)
        if observer is not None:
            observer.step(name, k, x)
    outcome = torch.where(live, Outcome.BUDGET, outcome).to(torch.int8)
    if observer is not None:
        observer.end(name, steps, outcome)
    return LoopResult(x, steps, outcome)


def _finite(x: Tensor) -> Tensor:
    """Rows whose entries are all finite, ``(..., D)`` to ``(...)``; one pass, NaN propagates."""
    largest: Tensor = torch.linalg.vector_norm(signals.measured(x), ord=torch.inf, dim=-1)
    return largest < torch.inf
