"""One loop of a foreign model while a session is attached: what intercepts its modules, and its results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from haltkit.attachment.description import Loop
from haltkit.attachment.errors import BodyOutsideScope, ReentrantCheckpoint
from haltkit.attachment.frame import Frame
from haltkit.attachment.joining import Joining
from haltkit.attachment.kept import Kept
from haltkit.attachment.kv import CacheBook, CacheUse
from haltkit.attachment.onecall import ModelCalls, OneCall
from haltkit.attachment.override import Interceptor
from haltkit.attachment.part import Part
from haltkit.attachment.retiring import HaltedEntries
from haltkit.attachment.steadiness import ENOUGH, Inputs
from haltkit.attachment.tally import Tally
from haltkit.card import Card
from haltkit.loop import LoopObserver, LoopResult, LoopRun
from haltkit.protocol import HaltingPolicy, LoopStep, Readout, Verdict, granularity_of, judge

__all__ = ["Completed", "Passing", "Region"]


@dataclass(frozen=True)
class Completed:
    """One completed loop: steps and outcome of its rows, and the iterations that were computed and skipped.

    Where an enclosing loop has retired entries of the batch, theirs are of the newest loop that was run for them.
    """

    steps: Tensor
    outcome: Tensor
    computed: int
    skipped: int
    seconds: float = 0.0


class Passing:
    """Whether calls pass through a session as if nothing were attached: one switch for all of its regions."""

    def __init__(self) -> None:
        self._on: ContextVar[bool] = ContextVar("haltkit_passing", default=False)

    def __bool__(self) -> bool:
        return self._on.get()

    @contextmanager
    def through(self) -> Iterator[None]:
        """While a policy runs, modules that it calls (a readout) are not part of any loop."""
        token = self._on.set(True)
        try:
            yield
        finally:
            self._on.reset(token)


class Region:
    """A loop and the policy that halts it. Its interceptors are installed by the session.

    Attributes:
        tally: counts over all loops of the session.
        newest: the newest completed loop (of any thread).
        kept: its states.
        watched: what the body's modules were given in it, if that was watched.
    """

    def __init__(
        self,
        name: str,
        loop: Loop,
        policy: HaltingPolicy[Any],
        *,
        passing: Passing,
        calls: ModelCalls,
        caches: CacheBook,
        readout: Readout | None = None,
        observer: LoopObserver | None = None,
        allow_grad: bool = False,
        check: bool = True,
        max_steps: int | None = None,
        card: Card | None = None,
        throughout: tuple[int, ...] | None = None,
        disturb_before: int = 0,
        halted_entries: HaltedEntries | None = None,
    ) -> None:
        self.name, self.loop, self.policy = name, loop, policy
        self.passing, self.calls, self.caches = passing, calls, caches
        self.readout, self.observer = readout, observer
        self.allow_grad, self.max_steps, self.card, self.throughout = allow_grad, max_steps, card, throughout
        self.disturb_before, self.halted_entries = disturb_before, halted_entries
        self.joining: Joining | None = None  # the queue in progress
        self._check = check  # whether the inputs of a halted body are still to be checked
        self.tally = Tally()
        self.newest: Completed | None = None
        self.kept: Kept | None = None
        self.watched: Inputs | None = None
        self._calls: ContextVar[tuple[_ScopeCall, ...]] = ContextVar("haltkit_scopes", default=())
        self._returned = self._outside = 0  # calls of the scope that came to their end, of the body outside of any
        self._inside = False  # the body was called inside the scope

    # --- interceptors

    def scope(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The scope is entered: a new loop."""
        if self.passing:
            return forward(*args, **kwargs)
        if self.loop.refuse is not None:
            self.loop.refuse(args, kwargs)
        with self.calls.inside() as whole:
            call = _ScopeCall(self, whole, [*args, *kwargs.values()])
            token = self._calls.set((*self._calls.get(), call))
            finished = False
            try:
                output = forward(*args, **kwargs)
                finished = True
                self._returned += 1
                return output
            finally:
                self._calls.reset(token)
                try:
                    call.close(finished)
                finally:
                    call.kv.release()

    def body(self, path: str) -> Interceptor:
        """What is put around a module of the body."""

        def intercept(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.passing:
                return forward(*args, **kwargs)
            calls = self._calls.get()
            if not calls:
                _refuse_reentrant_checkpoint()
                self._outside += 1
                return forward(*args, **kwargs)
            self._inside = True
            return calls[-1].frame.call(path, forward, args, kwargs)

        return intercept

    def reset(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A module of an enclosing loop is called: this loop is over, and the next one is new."""
        if not self.passing and self._calls.get():
            self._calls.get()[-1].close(finished=True)
        return forward(*args, **kwargs)

    # --- one loop

    def watch(self) -> Inputs | None:
        """The watch on the body's inputs in a new loop."""
        if self.throughout is not None:
            return Inputs(self.loop, throughout=True, keep=self.throughout)
        return Inputs(self.loop, throughout=False) if self._check else None

    def start(self, x0: Tensor, kv: CacheUse, kept: Kept) -> LoopRun:
        """A loop begins at ``x0``; the depth that a cache settles goes before the policy."""
        policy = _Settled(self.policy, kv) if kv.uniform else self.policy
        observer = kept if self.observer is None else self.observer
        budget = None if self.max_steps is None else torch.full(x0.shape[:-1], self.max_steps, device=x0.device)
        return LoopRun(policy, x0, readout=self.readout, observer=observer, name=self.name, budget=budget)

    def completed(self, result: LoopResult, done: Completed, kept: Kept, inputs: Inputs | None) -> None:
        """A loop is over. ``result``: of the rows that it was run for.

        Raises:
            ValueError: it goes deeper by itself than the full depth that the card is for.
        """
        if self.card is not None and self.max_steps is None:
            self.card.check_reach(done.computed + done.skipped)
        self.newest, self.kept, self.watched = done, kept, inputs
        self._check = self._check and (inputs is None or inputs.replayed < ENOUGH)
        self.tally.add(result.steps, result.outcome, done.computed, done.skipped, done.seconds)
        Joining.completed(result)

    def check_ran(self) -> None:
        """After the session: was there anything to halt?

        Raises:
            BodyOutsideScope: the scope or the body was called, but never the one inside the other.
        """
        if self._inside:
            return
        first, scope = self.loop.body[0], self.loop.scope or "the model"
        if self._returned:
            raise BodyOutsideScope(
                f"{scope!r} was called {self._returned} times and {first!r} never ran in it: name a module whose "
                "forward the loop calls (not a ModuleList, but its members)"
            )
        if self._outside:
            raise BodyOutsideScope(
                f"{first!r} ran {self._outside} times, but never inside a call of {scope!r}: say "
                "scope='module:method' for the method that runs the loop"
            )


class _Settled:
    """A policy until it is known what depth a cache has, from then on that depth: it may take two steps to see."""

    def __init__(self, policy: HaltingPolicy[Any], kv: CacheUse) -> None:
        self.policy, self.kv, self.granularity = policy, kv, granularity_of(policy)

    def init(self, x0: Tensor) -> Any:
        return self.policy.init(x0) if self.kv.fixed_depth is None else None

    def update(self, state: Any, step: LoopStep) -> tuple[Any, Verdict]:
        depth = self.kv.fixed_depth
        if depth is None:
            return judge(self.policy, state, step)
        to_go = torch.full(step.x.shape[:-1], depth, device=step.x.device) - step.k  # steps
        return state, Verdict(to_go.float(), to_go <= 0)


class _ScopeCall:
    """One call of the scope: the frame of the loop in progress, a new one whenever the loop starts over."""

    def __init__(self, region: Region, whole: OneCall, given: list[Any]) -> None:
        self.region, self.whole = region, whole
        self.part: Part | None = None  # the entries of the batch that the loop in progress is run for
        self.kv = CacheUse(region.caches, given)
        self._new()

    def _new(self) -> None:
        region = self.region
        self.kept = Kept()
        self.frame = Frame(
            region.name,
            region.loop,
            self._start,
            region.passing.through,
            self.kv,
            self.whole,
            allow_grad=region.allow_grad,
            inputs=region.watch(),
            disturb_before=region.disturb_before,
            halted_entries=region.halted_entries,
            joining=region.joining if Joining.active() else None,
        )

    def _start(self, x0: Tensor) -> LoopRun:
        self.part = self.whole.part
        return self.region.start(x0, self.kv, self.kept)

    def close(self, finished: bool) -> None:
        """The loop is over. Unless the model raised, keep its result and be ready for the next."""
        frame = self.frame
        if frame.run is None:
            return
        if not finished:
            frame.run.finish()  # for the observer, which would wait for the end otherwise
            return
        self.kv.ends(frame.computed)
        if frame.inputs is not None:
            frame.inputs.ends()
        result, steps, outcome = self.whole.ended(self.region.name, frame.run.finish(), self.part)
        done = Completed(steps, outcome, frame.computed, frame.skipped, frame.seconds)
        self.region.completed(result, done, self.kept, frame.inputs)
        self._new()


def _refuse_reentrant_checkpoint() -> None:
    """Outside every scope, inside a backward pass, reentrant checkpointing runs the body again, and for real."""
    if torch._C._current_graph_task_id() == -1:
        return
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "backward" and frame.f_code.co_filename.endswith("checkpoint.py"):
            raise ReentrantCheckpoint(
                "reentrant activation checkpointing recomputes the body in the backward pass, outside the loop, and "
                "its gradients would be wrong: use checkpoint(..., use_reentrant=False)"
            )
        frame = frame.f_back
