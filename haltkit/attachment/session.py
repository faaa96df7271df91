"""``attach``: halt the loop inside somebody else's model, without editing it."""

from __future__ import annotations

import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment.description import Action, Initial, Loop, find_module
from haltkit.attachment.errors import (
    AlreadyAttached,
    BodyOutsideScope,
    DetachOrder,
    KVDepthMismatch,
    ReentrantCheckpoint,
    UnknownModule,
)
from haltkit.attachment.frame import Frame
from haltkit.attachment.override import Overrides
from haltkit.loop import LoopObserver, LoopResult, LoopRun, Outcome
from haltkit.protocol import HaltingPolicy, Readout

__all__ = ["Session", "attach"]

_numbers = itertools.count()


def attach(
    model: nn.Module,
    policy: str | HaltingPolicy[Any],
    loop: Loop | None = None,
    *,
    body: Sequence[str] | None = None,
    state: str | None = None,
    select: Callable[[Any], Tensor] | None = None,
    put: Callable[[Any, Tensor], Any] | None = None,
    initial: int | str | Initial | None = 0,
    period: int = 1,
    scope: str = "",
    reset_on: Sequence[str] = (),
    on_halt: Mapping[str, Action] | None = None,
    readout: Readout | None = None,
    observer: LoopObserver | None = None,
    carry: tuple[str, int] | None = None,
    allow_grad: bool = False,
) -> Session:
    """Halt the loop inside a model, without editing it::

        with haltkit.attach(model, "accel:tau=1e-3", body=["core"]) as session:
            out = model(tokens)
        session.steps, session.outcome

    When the policy has halted every row, the remaining iterations cost next to nothing: the body's modules give
    their outputs of the last complete iteration again, and the model's output is what it gives when run with that
    many loops. While rows are still running, halted ones keep their state. :meth:`Session.verify` proves both on
    your model.

    Per-token and per-sequence freezing from outside does not reach into the body's attention: the frozen state is
    fed again and its keys and values are recomputed from it, which differs from the canonical semantics of
    :meth:`~haltkit.models.gpt.LoopedGPT.forward_adaptive`, and saves nothing until all rows are done.

    Args:
        model: any module whose loop calls modules of its own.
        policy: a spec or a policy; its granularity decides which rows halt together.
        loop: the description as one value; or give its fields here (see :class:`Loop`). With neither, the preset for
            the model's class is used.
        readout: from the state to logits, for policies that look at predictions. It may call the model's own modules.
        observer: a recorder.
        allow_grad: allow outputs recorded under ``no_grad`` to be replayed where gradients are on.

    Returns:
        the session, attached; leave its ``with`` block (or call :meth:`Session.detach`) to restore the model.

    Raises:
        AttachError: a subclass for each thing that would be wrong; see :mod:`haltkit.attachment.errors`.
        ValueError: a bad policy, or a description that contradicts itself.
    """
    if isinstance(policy, str):
        from haltkit.registry import policy as build

        policy = build(policy)
    if loop is not None and body is not None:
        raise ValueError("give the loop as one value or by its fields, not both")
    if body is not None:
        loop = Loop(
            body, state, select, put, initial, period, scope, reset_on, dict(on_halt or {}), carry,
        )  # fmt: skip
    if loop is None:
        from haltkit.attachment.presets import preset_for

        loop, readout = preset_for(model, readout)
    return Session(model, policy, loop, readout=readout, observer=observer, allow_grad=allow_grad)


@dataclass(frozen=True)
class Pass:
    """One pass through the loop: its result, and the iterations that were computed and skipped."""

    result: LoopResult
    computed: int
    skipped: int


class Session:
    """A policy attached to a model's loop. A context manager; made by :func:`attach`.

    Attributes:
        loop: the description in force.
        passes: completed loops, the newest last; only their step counts and outcomes are kept beyond the newest.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: HaltingPolicy[Any],
        loop: Loop,
        *,
        readout: Readout | None = None,
        observer: LoopObserver | None = None,
        allow_grad: bool = False,
    ) -> None:
        self.model, self.policy, self.loop = model, policy, loop
        self.readout, self.observer, self.allow_grad = readout, observer, allow_grad
        self._check_glue = False
        self._lock = threading.Lock()
        self._frames: ContextVar[tuple[_Scoped, ...]] = ContextVar("haltkit_frames", default=())
        self._judging: ContextVar[bool] = ContextVar("haltkit_judging", default=False)
        self._last: Pass | None = None
        self._histogram: Counter[int] = Counter()
        self._outcomes: Counter[str] = Counter()
        self.computed = self.skipped = 0
        self.last_inputs: list[list[Tensor]] = []  # where the state enters in replayed iterations
        self._outside = 0
        self._caches: list[tuple[Any, int]] = []
        self._wrapped: list[Overrides] = []
        self.number = next(_numbers)
        self._attach()

    # --- attaching and detaching

    def _attach(self) -> None:
        loop = self.loop
        modules = {path: find_module(self.model, path) for path in (*loop.body, *loop.reset_on)}
        scope = find_module(self.model, loop.scope_module)
        if not callable(getattr(scope, loop.scope_method, None)):
            where = loop.scope_module or type(scope).__name__
            raise UnknownModule(f"scope={loop.scope!r}: {where} has no method {loop.scope_method!r}")
        state = modules[loop.state_module]
        found = type(state).__dict__.get("_haltkit")
        for owner in found.owners() if isinstance(found, Overrides) else ():
            if isinstance(owner, Session) and find_module(owner.model, owner.loop.state_module) is state:
                raise AlreadyAttached(
                    f"a session is attached already to the loop whose state is {loop.state_module!r}: detach it first"
                )
        try:
            for path in loop.body:
                self._wrap(modules[path], "forward", self._body(path), outside=not loop.reset_on)
            for path in loop.reset_on:
                self._wrap(modules[path], "forward", self._reset, outside=False)
            self._wrap(scope, loop.scope_method, self._scope, outside=True)
        except BaseException:
            self._restore()
            raise

    def _wrap(self, module: nn.Module, method: str, interceptor: Any, outside: bool) -> None:
        overrides = Overrides.of(module)
        if overrides not in self._wrapped:
            self._wrapped.append(overrides)
        overrides.add(method, self, self.number, interceptor, outside)

    def _restore(self) -> None:
        for overrides in self._wrapped:
            overrides.remove(self)
        self._wrapped = []

    def detach(self) -> None:
        """Restore the model: classes, methods and attributes are what they were.

        Raises:
            DetachOrder: a session attached later still wraps one of the same modules.
        """
        for overrides in self._wrapped:
            if overrides.owners()[-1] is not self:
                raise DetachOrder(
                    f"{type(overrides.module).__name__} is also wrapped by a session that was attached later: detach "
                    "the newest first"
                )
        self._restore()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.detach()
        if kind is None and self._last is None and self._outside:
            raise BodyOutsideScope(
                f"{self.loop.body[0]!r} ran {self._outside} times, but never inside a call of "
                f"{self.loop.scope or 'the model'!r}: say scope='module:method' for the method that runs the loop"
            )

    # --- while the model runs

    def _scope(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._judging.get():
            return forward(*args, **kwargs)
        scoped = _Scoped(self)
        token = self._frames.set((*self._frames.get(), scoped))
        finished = False
        try:
            output = forward(*args, **kwargs)
            finished = True
            return output
        finally:
            self._frames.reset(token)
            if finished:
                scoped.close()

    def _body(self, path: str) -> Any:
        def intercept(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._judging.get():
                return forward(*args, **kwargs)
            frames = self._frames.get()
            if not frames:
                _refuse_reentrant_checkpoint()
                self._outside += 1
                return forward(*args, **kwargs)
            return frames[-1].call(path, forward, args, kwargs)

        return intercept

    def _reset(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._judging.get() and self._frames.get():
            self._frames.get()[-1].close()
        return forward(*args, **kwargs)

    @contextmanager
    def judging(self) -> Any:
        """While the policy runs, modules that it calls (a readout) are not part of the loop."""
        token = self._judging.set(True)
        try:
            yield
        finally:
            self._judging.reset(token)

    def _finished(self, done: Pass, inputs: list[list[Tensor]]) -> None:
        with self._lock:
            self._last, self.last_inputs = done, inputs
            self.computed += done.computed
            self.skipped += done.skipped
            self._histogram.update(done.result.steps.flatten().tolist())
            self._outcomes.update(Outcome(int(o)).name for o in done.result.outcome.flatten())

    def check_cache(self, cache: Any, depth: int, ending: bool) -> None:
        """Refuse to leave a KV cache filled to different depths.

        Raises:
            KVDepthMismatch: an earlier call with this cache ran another number of iterations.
        """
        for seen, earlier in self._caches:
            if seen is cache and (depth > earlier or (ending and depth != earlier)):
                raise KVDepthMismatch(
                    f"this KV cache was filled at {earlier} iterations and this call would leave it at {depth}: later "
                    "tokens would miss keys and values of the deeper steps. Use a policy that halts at one depth "
                    "(fixed:steps=...), or run without a cache"
                )

    def remember_cache(self, cache: Any, depth: int) -> None:
        """Note how deep a call filled a cache."""
        if not any(seen is cache for seen, _ in self._caches):
            self._caches.append((cache, depth))

    # --- what came of it

    @property
    def last(self) -> Pass:
        """The newest completed loop.

        Raises:
            ValueError: no loop has run to its end yet.
        """
        if self._last is None:
            raise ValueError("no loop has run inside this session yet: call the model inside the with block")
        return self._last

    @property
    def steps(self) -> Tensor:
        """Iterations of each row in the newest loop, ``(...)`` int64."""
        return self.last.result.steps

    @property
    def outcome(self) -> Tensor:
        """An :class:`~haltkit.loop.Outcome` for each row of the newest loop, ``(...)`` int8."""
        return self.last.result.outcome

    def summary(self) -> str:
        """Histogram of steps, outcomes, and iterations computed and skipped, over all loops of the session."""
        if not self._histogram:
            return "no loop has run inside this session"
        total = sum(self._histogram.values())
        widest = max(self._histogram.values())
        lines = [
            f"{steps:5d} steps {count:8d} rows {'#' * max(1, round(30 * count / widest))}"
            for steps, count in sorted(self._histogram.items())
        ]
        outcomes = ", ".join(f"{name} {count / total:.1%}" for name, count in self._outcomes.most_common())
        share = self.skipped / max(1, self.computed + self.skipped)
        return "\n".join(
            [*lines, outcomes, f"iterations: {self.computed} computed, {self.skipped} skipped ({share:.0%})"]
        )

    def verify(self, run: Callable[[], Any], k: int, run_at: Callable[[int], Any] | None = None) -> Any:
        """Prove on this model that attaching is neutral and that a halt at ``k`` is right.

        See :func:`haltkit.attachment.verify.verify`.
        """
        from haltkit.attachment.verify import verify

        return verify(self, run, k, run_at)

    @contextmanager
    def detached(self) -> Any:
        """Leave the model alone for a while: calls pass through as if nothing were attached."""
        with self.judging():
            yield

    @contextmanager
    def using(self, policy: HaltingPolicy[Any], check_glue: bool = False) -> Any:
        """Judge by another policy for a while; what it does does not count in the session's summary."""
        before = self.policy, self._check_glue
        counted = self._histogram.copy(), self._outcomes.copy(), self.computed, self.skipped
        self.policy, self._check_glue = policy, check_glue
        try:
            yield
        finally:
            self.policy, self._check_glue = before
            self._histogram, self._outcomes, self.computed, self.skipped = counted


class _Scoped:
    """One call of the scope: the frame of the loop in progress, a new one whenever the loop starts over."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.cache: Any = None
        self.frame = self._new()

    def _new(self) -> Frame:
        session = self.session
        return Frame(
            session.loop, self._start, session.judging, allow_grad=session.allow_grad, check_glue=session._check_glue
        )

    def _start(self, x0: Tensor) -> LoopRun:
        session = self.session
        return LoopRun(
            session.policy, x0, readout=session.readout, observer=session.observer, name=session.loop.body[0]
        )

    def call(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame, session = self.frame, self.session
        cache = next((v for v in (*args, *kwargs.values()) if _is_cache(v)), None)
        if cache is not None:
            self.cache = cache
        computed, halted = frame.computed, frame.halted
        output = frame.call(path, forward, args, kwargs)
        if self.cache is not None:
            if frame.computed > computed:
                session.check_cache(self.cache, frame.computed, ending=False)
            if frame.halted and not halted:
                session.check_cache(self.cache, frame.computed, ending=True)
        return output

    def close(self) -> None:
        """The loop is over: keep its result and be ready for the next."""
        frame = self.frame
        if frame.run is not None:
            if self.cache is not None:
                self.session.check_cache(self.cache, frame.computed, ending=True)
                self.session.remember_cache(self.cache, frame.computed)
            self.session._finished(Pass(frame.run.finish(), frame.computed, frame.skipped), frame.inputs)
        self.frame = self._new()


def _is_cache(value: Any) -> bool:
    """A KV cache as Hugging Face makes them, or as a plain dictionary that attention fills."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


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
