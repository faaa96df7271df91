"""A session on a foreign model: policies that halt its loops through the modules that these call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment.axes import BatchNorms
from haltkit.attachment.description import Loop, call_parts, find_call, find_module
from haltkit.attachment.errors import AlreadyAttached, AttachError, DetachOrder
from haltkit.attachment.joining import Joining, QueueOutput
from haltkit.attachment.kv import CacheBook, KVMode
from haltkit.attachment.onecall import ModelCalls
from haltkit.attachment.override import Interceptor, Overrides
from haltkit.attachment.region import Completed, Passing, Region
from haltkit.attachment.regions import around, nesting
from haltkit.attachment.retiring import Freezing, HaltedEntries, Retiring
from haltkit.attachment.session import NOTHING_RAN, Session, next_number, trajectory_of
from haltkit.attachment.steadiness import Inputs
from haltkit.attachment.verify import NEVER, NOTHING, ByRegion, Probe
from haltkit.card import Card
from haltkit.loop import Execution, LoopObserver
from haltkit.policies import Fixed
from haltkit.protocol import HaltingPolicy, Readout
from haltkit.queue import check_slots, in_turn
from haltkit.recording.trajectory import Trajectory
from haltkit.standing import PLAIN, Standing

__all__ = ["Halting", "HaltingSession"]


@dataclass(frozen=True)
class Halting:
    """How a foreign model is halted: what a session is made of, and another one beside it.

    Attributes:
        loops: the descriptions by region, outer ones first.
        policies: one a region.
        readouts: from the state to logits, for regions that have one.
        observer: is called at every loop.
        allow_grad, kv, kv_stride, execution, total_steps: see :func:`haltkit.attach`.
        max_steps: of each loop, for regions that have such a budget.
        card: that the policies are from; it refuses loops that go deeper by themselves than it knows.
        standing: what is promised of the policies, where they are from a card.
        check: look, in the first loop of each region that halts, whether the body's inputs stand still after the halt.
        throughout: watch all loops from the first iteration on, and keep what these iterations were given (verify).
        disturb_before: give disturbed outputs in replayed iterations before this one, by region (verify).
        state_only: in masked execution halted entries keep the state and nothing beside it (verify).
    """

    loops: Mapping[str, Loop]
    policies: Mapping[str, HaltingPolicy[Any]]
    readouts: Mapping[str, Readout]
    observer: LoopObserver | None = None
    allow_grad: bool = False
    kv: KVMode = "refuse"
    kv_stride: int | None = None
    check: bool = True
    execution: Execution = "masked"
    max_steps: Mapping[str, int] = field(default_factory=dict)
    total_steps: int | None = None
    card: Card | None = None
    standing: Standing = PLAIN
    throughout: tuple[int, ...] | None = None
    disturb_before: Mapping[str, int] = field(default_factory=dict)
    state_only: bool = False


class HaltingSession(Session):
    """Policies that halt the loops of one foreign model, over one set of overridden modules."""

    def __init__(self, model: nn.Module, how: Halting) -> None:
        """Nothing about the model is changed yet: :meth:`attach` does that."""
        self.model, self.how, self.card = model, how, how.card
        self.regions = tuple(how.loops)
        self.policies, self.loops, self.readouts = dict(how.policies), dict(how.loops), dict(how.readouts)
        self.standing, self.number = how.standing, next_number()
        self._passing, self._calls = Passing(), ModelCalls(self.regions, how.total_steps)
        inside = around(how.loops)
        self._overrides: list[Overrides] = []
        self._parts = {
            name: Region(
                name,
                loop,
                how.policies[name],
                passing=self._passing,
                calls=self._calls,
                caches=CacheBook(how.kv, how.kv_stride, self._state(loop), loop.scope),
                readout=how.readouts.get(name),
                observer=how.observer,
                allow_grad=how.allow_grad,
                check=how.check,
                max_steps=how.max_steps.get(name),
                card=how.card,
                throughout=how.throughout,
                disturb_before=how.disturb_before.get(name, 0),
                halted_entries=self._halted_entries(loop, inside[name]),
            )
            for name, loop in how.loops.items()
        }
        self.tally = {name: region.tally for name, region in self._parts.items()}

    # --- attaching and detaching

    def _state(self, loop: Loop) -> nn.Module:
        """The module whose output is a loop's state."""
        return find_module(self.model, call_parts(loop.state_module)[0])

    def _halted_entries(self, loop: Loop, inside: Collection[str]) -> HaltedEntries | None:
        """What becomes of a loop's halted entries; ``inside``: modules of its body that other loops run in."""
        given = self._bodies(loop), self._passing.through, inside
        if self.how.execution == "compact":
            return Retiring(*given)
        return None if self.how.state_only else Freezing(*given)

    def _bodies(self, loop: Loop) -> dict[str, nn.Module]:
        """The modules of a loop's body, or whose methods it names, by path."""
        return {path: find_module(self.model, call_parts(path)[0]) for path in loop.body}

    def attach(self, beside: Session | None = None) -> HaltingSession:
        """Override the model's modules. ``beside``: a session that is detached meanwhile.

        Raises:
            AlreadyAttached: another session halts one of the loops.
            UnknownModule: the model has no such module or method.
        """
        try:
            self._check_free(beside)
            depth = nesting(self.loops)
            if self.how.total_steps is not None:
                self._intercept("", self._calls.intercept, -1)
            for name, region in self._parts.items():
                loop = region.loop
                for path in loop.body:
                    self._intercept(path, region.body(path), depth[name])
                for path in loop.reset_on:
                    self._intercept(path, region.reset, depth[name])
                self._intercept(loop.scope, region.scope, depth[name])
            return self
        except BaseException:
            self._restore()
            raise

    def _check_free(self, beside: Session | None) -> None:
        for loop in self.loops.values():
            for path in (*loop.body, *loop.reset_on, loop.scope):
                find_call(self.model, path)
            state = find_call(self.model, loop.state_module)
            found = Overrides.on(state[0])
            for owner in found.owners() if found else ():
                if isinstance(owner, HaltingSession) and owner is not beside and owner._halts(state, loop.scope):
                    raise AlreadyAttached(
                        f"a session is attached already to the loop whose state is {loop.state_module!r}: detach it "
                        "first"
                    )

    def _halts(self, state: tuple[nn.Module, str], scope: str) -> bool:
        """Whether this session halts a loop whose state this method of a module gives."""
        return any(
            loop.scope == scope and find_call(self.model, loop.state_module) == state for loop in self.loops.values()
        )

    def _intercept(self, path: str, interceptor: Interceptor, depth: int) -> None:
        module, method = find_call(self.model, path)
        overrides = next((o for o in self._overrides if o.module is module), None) or Overrides.of(module)
        self._overrides.append(overrides)  # before anything is changed, so that it is restored whatever happens
        overrides.add(method, self, self.number, interceptor, depth)

    def _restore(self) -> None:
        for overrides in self._overrides:
            overrides.remove(self)
        self._overrides = []

    def detach(self) -> None:
        try:
            self._check_order()
            self._restore()
        except DetachOrder:
            raise
        except BaseException:  # interrupted: begin again, and let it take effect when the model is what it was
            self._restore()
            raise

    def _check_order(self) -> None:
        for overrides in self._overrides:
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

    def _check_ran(self) -> None:
        for region in self._parts.values():
            region.check_ran()

    @contextmanager
    def detached(self) -> Iterator[None]:
        with self._passing.through():
            yield

    def at_full_depth(self) -> AbstractContextManager[Any]:
        if not self.how.max_steps:
            return self.detached()
        return self._probe({n: Fixed(self.how.max_steps[n]) if n in self.how.max_steps else NEVER for n in self.loops})

    def queue(
        self,
        items: Iterable[Any],
        call: Callable[[Any], Any],
        slots: int = 64,
        *,
        ordered: bool = True,
        ahead: int | None = None,
    ) -> Iterator[QueueOutput]:
        window = check_slots(slots, ordered, ahead)
        if len(self._parts) > 1:
            raise ValueError(f"a queue takes one loop, not {', '.join(self._parts)}: attach the one that halts items")
        if self.how.observer is not None:
            raise ValueError("an observer follows one loop at a time, and a queue runs many: attach without it")
        return self._queued(iter(items), call, slots, window)

    def _queued(
        self, items: Iterator[Any], call: Callable[[Any], Any], slots: int, window: int | None
    ) -> Iterator[QueueOutput]:
        """The results. Nothing happens before the first is asked for."""
        (region,) = self._parts.values()
        if region.joining is not None:
            raise ValueError("a queue of this session is in progress: read it to its end, or close it")
        first = None
        if self.how.check:
            for item in items:
                items, first = itertools.chain([item], items), self._alone(call, item)
                break
        region.joining = Joining(call, BatchNorms(self._bodies(region.loop)), self._passing.through, first)
        try:
            yield from in_turn(region.joining, items, slots, window)
        finally:
            region.joining = None

    def _alone(self, call: Callable[[Any], Any], item: Any) -> QueueOutput | None:
        """What an item gives when nothing runs beside it; None if it raises, which its result will say."""
        (region,) = self._parts.values()
        before = region.newest
        try:
            with torch.no_grad(), region.tally.paused():
                output = call(item)
        except AttachError:
            raise
        except Exception:
            return None
        done = region.newest
        if done is None or done is before:
            return None
        return QueueOutput(0, output, done.steps, done.outcome)

    # --- what came of it

    @property
    def newest(self) -> dict[str, Completed]:
        """The newest completed loop of every region that ran.

        Raises:
            ValueError: no loop has run to its end yet.
        """
        found = {name: region.newest for name, region in self._parts.items() if region.newest is not None}
        if not found:
            raise ValueError(NOTHING_RAN)
        return found

    @property
    def steps(self) -> dict[str, Tensor]:
        return {name: done.steps for name, done in self.newest.items()}

    @property
    def outcome(self) -> dict[str, Tensor]:
        return {name: done.outcome for name, done in self.newest.items()}

    @property
    def trajectory(self) -> Trajectory:
        if self.how.observer is not None:
            return trajectory_of(self.how.observer)
        kept = {name: region.kept for name, region in self._parts.items() if region.kept is not None}
        if not kept:
            raise ValueError(NOTHING_RAN)
        return Trajectory({name: states.trajectory for name, states in kept.items()})

    # --- for verify

    def _probe(
        self,
        policies: ByRegion,
        keep: tuple[int, ...] = (),
        disturb_before: Mapping[str, int] = NOTHING,
        state_only: bool = False,
    ) -> AbstractContextManager[Probe]:
        how = replace(
            self.how,
            policies=policies,
            observer=None,
            max_steps={},
            total_steps=None,
            card=None,
            throughout=keep,
            disturb_before=disturb_before,
            state_only=state_only,
        )
        return self._beside(HaltingSession(self.model, how))

    @contextmanager
    def _beside(self, other: HaltingSession) -> Iterator[HaltingSession]:
        with self.detached(), other.attach(beside=self):
            yield other

    def iterations(self) -> dict[str, int]:
        """Iterations computed in the newest loop of each region."""
        return {name: done.computed for name, done in self.newest.items()}

    def watched(self) -> dict[str, Inputs]:
        """What the modules of each region's body were given in its newest loop, where that was watched."""
        return {name: region.watched for name, region in self._parts.items() if region.watched is not None}
