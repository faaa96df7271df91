"""One pass through a foreign loop: what was recorded of it, and what it gives after the halt."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from haltkit.attachment.acting import act_on_stopped, identity, zeroed
from haltkit.attachment.axes import Axes, BodyCall
from haltkit.attachment.description import Loop
from haltkit.attachment.errors import (
    GradientLost,
    MutatedOutput,
    NeverEnds,
    RowsMeet,
    StateShapeChanged,
    TapeMismatch,
)
from haltkit.attachment.joining import Joining
from haltkit.attachment.kv import CacheUse
from haltkit.attachment.onecall import OneCall
from haltkit.attachment.outputs import disturbed, first_tensor, map_tensors, mapped_tensors
from haltkit.attachment.part import by_entry
from haltkit.attachment.retiring import HaltedEntries, Retiring
from haltkit.attachment.steadiness import Inputs
from haltkit.attachment.tape import Recorded, beside
from haltkit.loop import LoopRun
from haltkit.protocol import MOST

__all__ = ["Frame"]

ENDLESS = 10_000  # iterations given again in one loop, after which it is taken not to end


class Frame:
    """A loop in progress inside one call of the scope.

    Replayed iterations before ``disturb_before`` give disturbed outputs: what is read of them then shows (for verify).

    An iteration begins with the first call of ``body[0]`` after the state has come ``period`` times. A halt takes
    effect there, so that modules called after the state in the same iteration still run.
    """

    def __init__(
        self,
        region: str,
        loop: Loop,
        start: Callable[[Tensor], LoopRun],
        judging: Callable[[], AbstractContextManager[None]],
        kv: CacheUse,
        whole: OneCall,
        *,
        allow_grad: bool,
        inputs: Inputs | None,
        disturb_before: int = 0,
        halted_entries: HaltedEntries | None = None,
        joining: Joining | None = None,
    ) -> None:
        self.region, self.loop, self._start, self._judging, self.kv = region, loop, start, judging, kv
        self.whole = whole
        self.allow_grad, self.inputs, self.disturb_before = allow_grad, inputs, disturb_before
        self.halted_entries, self.joining = halted_entries, joining
        self.run: LoopRun | None = None
        self.halted = False
        self.computed = self.skipped = 0  # iterations
        self.seconds = 0.0  # inside the body's modules, as the host sees it
        self._tape: list[Recorded] = []
        self._last: list[Recorded] = []
        self._position = 0
        self._outputs = 0
        self._ended = True
        self._x0: Tensor | None = None
        self._kept: Any = None  # the output with the state handed on, graph and all
        self._seen: tuple[Tensor, int] | None = None  # the newest state as it was when it was judged
        self._present: Tensor | None = None  # entries of the batch that have rows active in this iteration
        self._stopped: Tensor | None = None  # rows that had halted when this iteration began
        self._leaves = False  # the entries without active rows are not computed in this iteration
        self._returned: Axes | None = None  # the batch dimensions of the newest output, where they are proven
        self._begun: Tensor | int = 0  # loops of this call of the model when this iteration began
        self._budget: Tensor | None = None  # the budget of this loop alone

    def call(self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A body module is called: run it, or give its output of the last complete iteration."""
        if not self.halted:
            self.kv.before(args, kwargs)
        if self._ended and name == self.loop.body[0]:
            self._begin(args, kwargs)
        if self.inputs is not None:
            self.inputs.see(name, args, kwargs)
        if self.halted:
            return self._replay(name, args, kwargs)
        self.kv.reads(args, kwargs)
        self.kv.goes_on(self.computed + (not self._ended))
        started = time.perf_counter()
        output = self._compute(name, forward, args, kwargs)
        self.seconds += time.perf_counter() - started
        state = self.loop.state_of(output) if name == self.loop.state_module else first_tensor(output)
        self.kv.after(args, kwargs, beside(output, state), state)
        if name == self.loop.state_module:
            self._outputs += 1
            if self._outputs == self.loop.period:
                output = self._judge(output)
                self._ended = True
        if self._stopped is not None:
            output = act_on_stopped(self.loop, name, output, args, kwargs, self._stopped)
        self._tape.append(Recorded.of(name, output, self.loop.copies))
        return output

    def _compute(self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a body module gives. Entries that have halted keep what they had; the items of a queue are computed
        together."""
        place = len(self._tape)
        if self.joining is not None:
            if self.kv.in_use:
                raise RowsMeet(f"a queue: {name!r} is given a cache, and the items of a queue have none in common")
            return self.joining.compute(BodyCall(name, place, forward, args, kwargs))
        state_of = self.loop.state_of if name == self.loop.state_module else None
        call = BodyCall(name, place, forward, args, kwargs, state_of)
        before = self._last[place] if place < len(self._last) else None
        how = self.halted_entries
        if isinstance(how, Retiring):
            return self._retired(how, call, before)
        self._returned = None
        return forward(*args, **kwargs) if how is None else self._frozen(how, call, before)

    def _retired(self, how: Retiring, call: BodyCall, before: Recorded | None) -> Any:
        """Compact execution: what a call gives, of whose entries only those still active are computed."""
        if self.kv.in_use:
            raise RowsMeet(
                f"execution='compact': {call.name!r} is given a cache, whose entries would have to be retired with the "
                "rows: use execution='masked'"
            )
        how.refuse_training()
        if self.run is None or self._present is None:
            return call.forward(*call.args, **call.kwargs)
        self._expect(call.name, "" if before is None else before.name)
        return self._without_halted(how, call, before, self._present, len(self.run.active))

    def _frozen(self, how: HaltedEntries, call: BodyCall, before: Recorded | None) -> Any:
        """Masked execution: what a call gives. Entries that have halted keep what it gave them, the state and all else
        that the loop may carry."""
        stopped = self._stopped
        if stopped is None or not stopped.ndim or self.kv.in_use or self.kv.runs_on:
            return call.forward(*call.args, **call.kwargs)
        if before is None or before.name != call.name:
            return call.forward(*call.args, **call.kwargs)
        if len(self._last) == 1 == len(mapped_tensors(before.output)) and not how.encloses(call.name):
            return call.forward(*call.args, **call.kwargs)  # the state is all there is
        if self._present is None:  # once in an iteration: it waits for the device
            self._present = by_entry(~stopped).nonzero().squeeze(-1)
        return self._without_halted(how, call, before, self._present, len(stopped))

    def _without_halted(
        self, how: HaltedEntries, call: BodyCall, before: Recorded | None, present: Tensor, batch: int
    ) -> Any:
        """What a call gives the entries that go on; the others have what it gave them in the iteration before."""
        if len(present) == batch or before is None:
            output = how.call(call, present, batch, None, True, lambda gathered: nullcontext())
        else:
            kept, whole = before.again(self.allow_grad), self.whole
            output = how.call(
                call, present, batch, kept, self._leaves, lambda gathered: whole.entries(present, batch, gathered)
            )
        self._returned = how.axes(call, batch)
        return output

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ended, self._outputs = False, 0
        if self.halted:
            if self.inputs is not None:
                self.inputs.begins(halted=True)
            return
        self._last, self._tape = self._tape, []
        if self.run is None:
            self.kv.begins()
            if self.whole.part is not None and not self.whole.part.apart:
                self.inputs = None  # what an enclosing loop has halted is handed on from another step
            if self.inputs is not None:
                self.inputs.begins(halted=False)
            if self.whole.spending is not None:
                self.whole.spending.begins(self.region, self.whole.part)
                self._spend(None)
            x0 = self.loop.initial_state(args, kwargs)
            self.kv.starts_at(x0)
            if x0 is not None and self._unwatched(x0):
                x0 = x0.clone()
            elif x0 is not None:
                self._seen = x0, x0._version
            self._x0 = x0
            return
        done = self.run.running == 0
        if done:
            self.kv.ends(self.computed)
        if done and not self.kv.runs_on:
            self.halted, self._position = True, 0
        else:
            self.kv.begins()
        if self.inputs is not None:
            self.inputs.begins(self.halted, self.run.x)
        if self.halted:
            return
        if self.run.running < self.run.active.numel():
            self._stopped = ~self.run.active
        self._spend(by_entry(self.run.active))
        self._present = None
        if isinstance(self.halted_entries, Retiring) and self.run.active.ndim:
            self._present = by_entry(self.run.active).nonzero().squeeze(-1)
            self._leaves = self.halted_entries.can_leave([entry.name for entry in self._last])

    def _spend(self, entries: Tensor | None) -> None:
        """Entries begin a step of the joint budget; None: all of them."""
        spending = self.whole.spending
        if spending is not None:
            spending.step(entries, self.whole.part)
            self._begun = spending.begun

    def _limit(self, run: LoopRun) -> None:
        """Rows whose entry has no room in the joint budget for one more step end with the present one."""
        spending = self.whole.spending
        if spending is None:
            return
        if self.computed == 1:
            self._budget = run.rows.budget
        room = spending.room(len(by_entry(run.active)), self._begun, self.whole.part, run.x.device)
        limit = torch.where(room, MOST, run.k + 1).view(-1, *[1] * (run.active.ndim - 1)).expand_as(run.active)
        run.rows.budget = limit if self._budget is None else torch.minimum(limit, self._budget)

    def _judge(self, output: Any) -> Any:
        x = self.loop.state_of(output)
        if self.run is None:
            self.run = self._start(self.loop.start(self._x0, x))
        elif x.shape != self.run.x.shape:
            raise StateShapeChanged(
                f"the state was {tuple(self.run.x.shape)} and became {tuple(x.shape)} inside one loop: if rows are "
                "dropped there, let the scope be what is called once a round"
            )
        self.computed += 1
        if self.run.running == 0 and self._kept is not None:  # runs on to fill a cache: every row keeps its state
            return self._keep(output, torch.zeros_like(self.run.active))
        unwatched = self._unwatched(x)
        if unwatched:
            x = x.clone()
        elif self._seen is not None and self._seen[0]._version != self._seen[1]:
            raise MutatedOutput(
                f"the model changes the state in place after {self.loop.state_module!r} gave it (such as h += ..., or "
                "a body that works in its own buffer), so steps cannot be measured and halted rows cannot be kept: "
                "make that operation out of place, say copies=True (which costs a copy of the outputs in every "
                "iteration), or describe the loop by a module that contains it"
            )
        self._seen = None if unwatched else (x, x._version)
        if self.inputs is not None:
            self.inputs.stated(x.detach())
        if self.run.running:  # an empty batch has no rows to judge
            self._limit(self.run)
            with torch.no_grad(), self._judging():
                if not self.run.advance_if_sound(x.detach()):
                    self.run.advance(x.detach())
        if self._kept is None or self.run.all_took:
            self._kept = self._own(output)
            return output
        return self._keep(output, self.run.took)

    def _keep(self, output: Any, took: Tensor) -> Any:
        """The output with the rows that did not take it as they were: the state itself, graph and all, and every other
        tensor of the output that has these rows (an LSTM's cell, say)."""
        new, old = mapped_tensors(output), mapped_tensors(self._kept)
        if len(new) != len(old):  # its structure changes from step to step: the state alone is known to correspond
            new, old = [self.loop.state_of(output)], [self.loop.state_of(self._kept)]
            held = self.loop.with_state(output, torch.where(took.unsqueeze(-1), new[0], old[0]))
            self._kept = self._own(held)
            return held
        if torch.is_grad_enabled() and not self.allow_grad:
            for fresh, kept in zip(new, old, strict=True):
                if fresh.requires_grad and not kept.requires_grad:
                    raise GradientLost(
                        "rows halted under no_grad and are kept where gradients are on: those rows would train "
                        "nothing. Halt under torch.no_grad(), or say allow_grad=True if that is meant"
                    )
        before = iter(old)
        known = self._returned
        axes = iter(known if known is not None and len(known) == len(new) else [0] * len(new))

        def rows(tensor: Tensor) -> Tensor:
            kept = next(before)
            if next(axes) != 0 or tensor.shape[: took.ndim] != took.shape or kept.shape != tensor.shape:
                return tensor
            return torch.where(took.view(*took.shape, *[1] * (tensor.ndim - took.ndim)), tensor, kept)

        held = map_tensors(rows, output)
        self._kept = self._own(held)
        return held

    def _unwatched(self, x: Tensor) -> bool:
        """Whether the model may change a state without being seen: inference tensors count no versions."""
        return self.loop.copies or x.is_inference()

    def _own(self, output: Any) -> Any:
        """An output that stays what it is, whatever the model does with the one that it was given."""
        return map_tensors(lambda t: t.clone() if self._unwatched(t) else t, output)

    @staticmethod
    def _expect(name: str, recorded: str) -> None:
        """The model calls the module that it called here in the iteration before.

        Raises:
            TapeMismatch: it does not.
        """
        if name != recorded:
            did = f"called {recorded!r}" if recorded else "ended"
            raise TapeMismatch(
                f"the model called {name!r} where its iteration before {did}, so outputs of halted rows cannot be "
                "given again: the body is not the same modules in the same order each time. Name in body= all that one "
                "iteration calls"
            )

    def _replay(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entry = self._last[self._position]
        self._expect(name, entry.name)
        number = self.computed + self.skipped + 1  # of this iteration
        self._position = (self._position + 1) % len(self._last)
        if self._position == 0:
            self._ended = True
            self.skipped += 1
            if self.skipped > ENDLESS:
                raise NeverEnds(
                    f"the loop around {self.loop.body[0]!r} has gone on for {ENDLESS} iterations after the halt: it "
                    "ends by something that stands still now, such as a residual that is computed outside of the "
                    "body. Give the model a greatest number of iterations, name in body= the module that computes "
                    "what it ends by, or, if that is a flag in the output of a module of the body, say on_halt={...: "
                    "a function from that output to one that says that the loop is over}"
                )
            self.kv.skipped(self.skipped)
        action = self.loop.on_halt.get(name, "replay")
        if action == "identity":
            return identity(self.loop, name, entry.output, args, kwargs)
        output = entry.again(self.allow_grad)
        if action == "zero":
            return zeroed(self.loop, name, output, torch.zeros_like)
        self.kv.handed(beside(output, first_tensor(output)), self.computed)
        output = map_tensors(disturbed, output) if number < self.disturb_before else output
        return action(output) if callable(action) else output
