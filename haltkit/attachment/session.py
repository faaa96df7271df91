"""``attach``: halt the loop inside somebody else's model, without editing it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from haltkit.attachment.description import Action, Initial, Loop, find_module
from haltkit.attachment.errors import (
    AlreadyAttached,
    BodyOutsideScope,
    DetachOrder,
    ReentrantCheckpoint,
    UnknownModule,
)
from haltkit.attachment.frame import Frame
from haltkit.attachment.kept import Kept
from haltkit.attachment.kv import CacheBook, CacheUse, KVMode
from haltkit.attachment.native import Native, NativeSession
from haltkit.attachment.override import Overrides
from haltkit.attachment.tally import Tally
from haltkit.attachment.watch import Watch, observed_result
from haltkit.loop import LoopObserver, LoopResult, LoopRun
from haltkit.policies import Fixed
from haltkit.protocol import HaltingPolicy, Readout
from haltkit.recorder import Recorder
from haltkit.trajectory import Trajectory

__all__ = ["Session", "attach"]

_numbers = itertools.count()


def attach(
    model: nn.Module,
    policy: str | PathLike[str] | HaltingPolicy[Any] | None,
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
    kv: KVMode = "refuse",
    kv_stride: int | None = None,
) -> Session:
    """Halt the loop inside a model, without editing it::

        with haltkit.attach(model, "accel:tau=1e-3", body=["core"]) as session:
            out = model(tokens)
        session.steps, session.outcome

    When the policy has halted every row, the remaining iterations cost next to nothing: the body's modules give
    their outputs of the last complete iteration again, and the model's output is what it gives when run with that
    many loops: :meth:`Session.verify` proves it on your model, or tells what the description misses. While rows are
    still running, halted ones keep their state.

    Per-token and per-sequence freezing from outside does not reach into the body's attention: the frozen state is
    fed again and its keys and values are recomputed from it, which differs from the canonical semantics of
    :meth:`~haltkit.models.gpt.LoopedGPT.forward_adaptive`, and saves nothing until all rows are done.

    Args:
        model: any module whose loop calls modules of its own.
        policy: a spec or a policy; its granularity decides which rows halt together. The path of a YAML file that
            :func:`haltkit.compare` saved gives the spec and, unless one is given here, the description. None only
            observes: forward hooks, nothing is overridden, and the model's output is what it was to the bit.
        loop: the description as one value; or give its fields here (see :class:`Loop`). With neither, the preset for
            the model's class is used. A model that halts itself (the bundled LoopedGPT) gives a
            :class:`~haltkit.attachment.native.NativeSession`, whose ``steps`` and ``outcome`` are by region.
        readout: from the state to logits, for policies that look at predictions. It may call the model's own modules.
        observer: a recorder; :attr:`Session.trajectory` is then what it holds. None: the newest loop's states are kept
            by reference where they are small.
        kv: what to do about a KV cache with slots of its own for each iteration, which skipped iterations leave
            empty. ``refuse``: an error once depth differs between calls. ``uniform``: the first call with a cache
            decides the depth for all later ones. ``freeze``: the body runs on with the halted state, which fills the
            cache and saves nothing. ``copy``: skipped iterations write the last one's keys and values again, which
            saves the time and is another function.
        kv_stride: for ``copy``, the distance between the cache slots of successive iterations; None to see it from
            two of them.
        allow_grad: allow outputs recorded under ``no_grad`` to be replayed where gradients are on.

    Returns:
        the session, attached; leave its ``with`` block (or call :meth:`Session.detach`) to restore the model.

    Raises:
        AttachError: a subclass for each thing that would be wrong; see :mod:`haltkit.attachment.errors`.
        ValueError: a bad policy, or a description that contradicts itself.
    """
    if loop is not None and body is not None:
        raise ValueError("give the loop as one value or by its fields, not both")
    given = {
        "state": state, "select": select, "put": put, "scope": scope or None, "reset_on": tuple(reset_on) or None,
        "on_halt": on_halt or None, "carry": carry, "period": None if period == 1 else period,
        "initial": None if initial == 0 and initial is not None else "given",
    }  # fmt: skip
    if body is None and (ignored := [name for name, value in given.items() if value is not None]):
        raise ValueError(
            f"{', '.join(ignored)} belong to a description by fields, which needs body=; a Loop, a saved choice and a "
            "preset have their own"
        )
    if isinstance(policy, str) and policy.endswith((".yaml", ".yml")):
        policy = Path(policy)
    if isinstance(policy, PathLike):
        from haltkit.attachment.saved import load

        policy, described = load(policy)
        loop = described if loop is None and body is None else loop
    if body is not None:
        loop = Loop(
            body, state, select, put, initial, period, scope, reset_on, dict(on_halt or {}), carry,
        )  # fmt: skip
    if loop is None:
        from haltkit.attachment.presets import preset_for

        found, readout = preset_for(model, readout)
        if isinstance(found, Native):
            if policy is None:
                raise ValueError(f"to observe a {type(model).__name__} use haltkit.record(model), or give it a policy")
            if kv != "refuse" or kv_stride is not None or allow_grad:
                raise ValueError(f"a {type(model).__name__} halts itself: kv, kv_stride and allow_grad do not apply")
            native: Any = NativeSession(model, policy, found, observer)
            return native  # type: ignore[no-any-return]
        loop = found
    if isinstance(policy, str):
        from haltkit.registry import policy as build

        policy = build(policy)
    if policy is not None and not (hasattr(policy, "init") and hasattr(policy, "update")):
        raise ValueError(
            f"policy={policy!r} is none: give a spec such as 'norm:tau=0.1', a policy, the path of a saved choice, or "
            "None to observe"
        )
    book = CacheBook(kv, kv_stride)
    return Session(model, policy, loop, readout=readout, observer=observer, allow_grad=allow_grad, caches=book)


def trajectory_of(observer: LoopObserver | None) -> Trajectory:
    """What a recorder given as observer holds.

    Raises:
        ValueError: there is none, or it has recorded nothing.
    """
    if not isinstance(observer, Recorder):
        raise ValueError("nothing is recorded: attach(..., observer=haltkit.Recorder()) keeps the newest trajectory")
    return observer.trajectory


@dataclass(frozen=True)
class Pass:
    """One pass through the loop: its result, and the iterations that were computed and skipped."""

    result: LoopResult
    computed: int
    skipped: int
    seconds: float = 0.0


class Session:
    """A policy attached to a model's loop. A context manager; made by :func:`attach`.

    Attributes:
        loop: the description in force.
        policy: what judges; None where the loop is only observed.
        tally: counts over all loops of the session.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: HaltingPolicy[Any] | None,
        loop: Loop,
        *,
        readout: Readout | None = None,
        observer: LoopObserver | None = None,
        allow_grad: bool = False,
        caches: CacheBook | None = None,
    ) -> None:
        self.model, self.policy, self.loop = model, policy, loop
        self.readout, self.observer, self.allow_grad = readout, observer, allow_grad
        self.caches = caches or CacheBook()
        self.tally = Tally()
        self._check_glue = False
        self._frames: ContextVar[tuple[_Scoped, ...]] = ContextVar("haltkit_frames", default=())
        self._judging: ContextVar[bool] = ContextVar("haltkit_judging", default=False)
        self._last: Pass | None = None
        self._seen: tuple[Tensor, int] | None = None
        self._kept: Kept | None = None
        self._ran = False
        self.last_inputs: list[list[Tensor]] = []  # where the state enters in replayed iterations
        self._outside = self._entered = 0
        self._wrapped: list[Overrides] = []
        self._watch: Watch | None = None
        self._hooks: list[RemovableHandle] = []
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
            if self.policy is None:
                self._observe(modules, scope)
                return
            for path in loop.body:
                self._wrap(modules[path], "forward", self._body(path), outside=not loop.reset_on)
            for path in loop.reset_on:
                self._wrap(modules[path], "forward", self._reset, outside=False)
            self._wrap(scope, loop.scope_method, self._scope, outside=True)
        except BaseException:
            self._restore()
            raise

    def _observe(self, modules: Mapping[str, nn.Module], scope: nn.Module) -> None:
        """Forward hooks alone: they see everything, and cannot change what the model computes."""
        if self.loop.scope_method != "forward":
            raise ValueError(
                f"scope={self.loop.scope!r}: hooks only see calls of forward. Observe with a policy that never halts, "
                "such as fixed:steps=1000000, or name a module whose call is one pass of the loop"
            )
        self._watch = Watch(self.loop, self.observer, self._observed)
        self._hooks = self._watch.hook(modules, scope)

    def _observed(self, x: Tensor, iterations: int) -> None:
        self._seen, self._ran = (
            (x, iterations),
            True,
        )  # the result is made when it is asked for: observing should cost next to nothing
        self.tally.observed(iterations, x.shape[:-1].numel())

    def _wrap(self, module: nn.Module, method: str, interceptor: Any, outside: bool) -> None:
        overrides = Overrides.of(module)
        if overrides not in self._wrapped:
            self._wrapped.append(overrides)
        overrides.add(method, self, self.number, interceptor, outside)

    def _restore(self) -> None:
        for overrides in self._wrapped:
            overrides.remove(self)
        for hook in self._hooks:
            hook.remove()
        self._wrapped, self._hooks = [], []

    def detach(self) -> None:
        """Restore the model: classes, methods and attributes are what they were.

        Raises:
            DetachOrder: a session attached later still wraps one of the same modules.
        """
        for overrides in self._wrapped:
            if overrides.disturbed:
                raise DetachOrder(
                    f"the class of a {type(overrides.module).__name__} was changed while the session was attached (by "
                    "a parametrization, perhaps): take that back first, or detach before it"
                )
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
        if kind is not None or self._ran:
            return
        if self._watch is not None and self._watch.entered:
            raise BodyOutsideScope(
                f"{self.loop.scope or 'the model'!r} was called {self._watch.entered} times and no hook saw "
                f"{self.loop.state_module!r} run in it. Code compiled before does not run hooks that came later: "
                "attach first, or observe with a policy that never halts"
            )
        if self._entered:
            raise BodyOutsideScope(
                f"{self.loop.scope or 'the model'!r} was called {self._entered} times and {self.loop.body[0]!r} never "
                "ran in it: name a module whose forward the loop calls (not a ModuleList, but its members)"
            )
        if self._outside:
            raise BodyOutsideScope(
                f"{self.loop.body[0]!r} ran {self._outside} times, but never inside a call of "
                f"{self.loop.scope or 'the model'!r}: say scope='module:method' for the method that runs the loop"
            )

    # --- while the model runs

    def _scope(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._judging.get():
            return forward(*args, **kwargs)
        if self.loop.refuse is not None:
            self.loop.refuse(args, kwargs)
        self._entered += 1
        scoped = _Scoped(self)
        token = self._frames.set((*self._frames.get(), scoped))
        finished = False
        try:
            output = forward(*args, **kwargs)
            finished = True
            return output
        finally:
            self._frames.reset(token)
            try:
                if finished:
                    scoped.close()
            finally:
                scoped.kv.release()

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

    def _finished(self, done: Pass, inputs: list[list[Tensor]], kept: Kept) -> None:
        self._last, self.last_inputs, self._kept, self._ran = done, inputs, kept, True
        self.tally.add(done.result.steps, done.result.outcome, done.computed, done.skipped, done.seconds)

    # --- what came of it

    @property
    def newest(self) -> tuple[Any, ...]:
        """What is known of the newest loop, to be put back after a trial run."""
        return self._last, self._seen, self._kept

    @newest.setter
    def newest(self, values: tuple[Any, ...]) -> None:
        self._last, self._seen, self._kept = values

    @property
    def last(self) -> Pass:
        """The newest completed loop.

        Raises:
            ValueError: no loop has run to its end yet.
        """
        if self._seen is not None:
            return Pass(observed_result(*self._seen), self._seen[1], 0)
        if self._last is None:
            raise ValueError("no loop has run inside this session yet: call the model inside the with block")
        return self._last

    @property
    def steps(self) -> Tensor:
        """Iterations of each row in the newest loop (of any thread), ``(...)`` int64."""
        return self.last.result.steps

    @property
    def outcome(self) -> Tensor:
        """An :class:`~haltkit.loop.Outcome` for each row of the newest loop, ``(...)`` int8."""
        return self.last.result.outcome

    @property
    def trajectory(self) -> Trajectory:
        """The newest loop's trajectory: of the :class:`~haltkit.Recorder` that was given as observer, else its states.

        Raises:
            ValueError: nothing has run yet; or there was no recorder, and the loop is only observed or was too large to
                keep (64 MiB), or the model wrote over its states.
        """
        if self.observer is None and self.policy is not None:
            if self._kept is None:
                raise ValueError("no loop has run inside this session yet: call the model inside the with block")
            return self._kept.trajectory
        return trajectory_of(self.observer)

    @property
    def computed(self) -> int:
        """Iterations that ran, over all loops of the session."""
        return self.tally.computed

    @property
    def skipped(self) -> int:
        """Iterations that were spared, over all loops of the session."""
        return self.tally.skipped

    def summary(self) -> str:
        """Histogram of steps, outcomes, iterations computed and skipped and the time that saved, over all loops."""
        return str(self.tally)

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
    def using(self, policy: HaltingPolicy[Any], check_glue: bool = False) -> Iterator[None]:
        """Judge by another policy for a while; what it does does not count in the session's summary."""
        before = self.policy, self._check_glue
        self.policy, self._check_glue = policy, check_glue
        try:
            with self.tally.paused():
                yield
        finally:
            self.policy, self._check_glue = before


class _Scoped:
    """One call of the scope: the frame of the loop in progress, a new one whenever the loop starts over."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.kv = CacheUse(session.caches)
        self.kept = Kept()
        self.frame = self._new()

    def _new(self) -> Frame:
        session = self.session
        return Frame(
            session.loop,
            self._start,
            session.judging,
            self.kv,
            allow_grad=session.allow_grad,
            check_glue=session._check_glue,
        )

    def _start(self, x0: Tensor) -> LoopRun:
        session, settled = self.session, self.kv.fixed_depth
        assert session.policy is not None
        policy = session.policy if settled is None else Fixed(settled)
        self.kept = Kept()
        observer = self.kept if session.observer is None else session.observer
        return LoopRun(policy, x0, readout=session.readout, observer=observer, name=session.loop.body[0])

    def call(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.frame.call(path, forward, args, kwargs)

    def close(self) -> None:
        """The loop is over: keep its result and be ready for the next."""
        frame = self.frame
        if frame.run is not None:
            self.kv.look_again()
            self.kv.computed(frame.computed, ending=True)
            done = Pass(frame.run.finish(), frame.computed, frame.skipped, frame.seconds)
            self.session._finished(done, frame.inputs, self.kept)
        self.frame = self._new()


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
