"""One pass through a foreign loop: what was recorded of it, and what it gives after the halt."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from haltkit.attachment.description import Loop
from haltkit.attachment.errors import GradientLost, MutatedOutput, StateShapeChanged, TapeMismatch
from haltkit.attachment.kv import CacheUse
from haltkit.loop import LoopRun

__all__ = ["Frame"]


def _tensors(output: Any) -> list[Tensor]:
    """The tensors directly inside an output."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, (tuple, list)):
        return [t for part in output for t in _tensors(part)]
    if isinstance(output, dict):
        return [t for part in output.values() for t in _tensors(part)]
    return [t for t in vars(output).values() if isinstance(t, Tensor)] if hasattr(output, "__dict__") else []


def map_tensors(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Apply a function to the tensors of an output, keeping its structure."""
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, tuple):
        parts = [map_tensors(function, part) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    if isinstance(output, list):
        return [map_tensors(function, part) for part in output]
    if isinstance(output, dict):
        changed: Any = copy.copy(output)
        for key, value in output.items():
            changed[key] = map_tensors(function, value)
        return changed
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        changed = copy.copy(output)
        for field in dataclasses.fields(output):
            object.__setattr__(changed, field.name, map_tensors(function, getattr(output, field.name)))
        return changed
    return output


@dataclass(frozen=True)
class _Recorded:
    """One body call of an iteration."""

    name: str
    output: Any
    versions: tuple[int, ...] | None  # None: inference tensors have none, so the tape holds a copy of its own
    grad_enabled: bool

    @classmethod
    def of(cls, name: str, output: Any) -> _Recorded:
        tensors = _tensors(output)
        if any(t.is_inference() for t in tensors):
            return cls(name, map_tensors(torch.clone, output), None, torch.is_grad_enabled())
        # A container of its own: the model may put other tensors into the one that it was given.
        return cls(name, map_tensors(_same, output), tuple(t._version for t in tensors), torch.is_grad_enabled())

    def again(self, allow_grad: bool) -> Any:
        """The output once more.

        Raises:
            MutatedOutput: the model has changed it in place.
            GradientLost: it was made without gradients, and now they are wanted.
        """
        if self.versions is None:
            return map_tensors(torch.clone, self.output)
        if self.versions != tuple(t._version for t in _tensors(self.output)):
            raise MutatedOutput(
                f"the model changes the output of {self.name!r} in place (such as h += ...), so it cannot be given "
                "again after the halt: make that operation out of place, or describe the loop by other modules"
            )
        if torch.is_grad_enabled() and not self.grad_enabled and not allow_grad:
            raise GradientLost(
                f"{self.name!r} ran under no_grad before the halt and would be replayed where gradients are on: the "
                "loop would train nothing. Halt under torch.no_grad(), or say allow_grad=True if that is meant"
            )
        return map_tensors(_same, self.output)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class Frame:
    """A loop in progress inside one call of the scope.

    An iteration begins with the first call of ``body[0]`` after the state has come ``period`` times. A halt takes
    effect there, so that modules called after the state in the same iteration still run.
    """

    def __init__(
        self,
        loop: Loop,
        start: Callable[[Tensor], LoopRun],
        judging: Callable[[], AbstractContextManager[None]],
        kv: CacheUse,
        *,
        allow_grad: bool,
        check_glue: bool,
    ) -> None:
        self.loop, self._start, self._judging, self.kv = loop, start, judging, kv
        self.allow_grad, self.check_glue = allow_grad, check_glue
        self.run: LoopRun | None = None
        self.halted = False
        self.computed = self.skipped = 0  # iterations
        self.seconds = 0.0  # inside the body's modules, as the host sees it
        self.inputs: list[list[Tensor]] = []  # where the state enters, while replaying, if glue is being checked
        self._tape: list[_Recorded] = []
        self._last: list[_Recorded] = []
        self._position = 0
        self._outputs = 0
        self._ended = True
        self._x0: Tensor | None = None
        self._kept: Any = None  # the output with the state handed on, graph and all
        self._seen: tuple[Tensor, int] | None = None  # the newest state as it was when it was judged
        self._stopped: Tensor | None = None  # rows that had halted when this iteration began

    def call(self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A body module is called: run it, or give its output of the last complete iteration."""
        self.kv.look(args, kwargs)
        if self._ended and name == self.loop.body[0]:
            self._begin(args, kwargs)
        if self.halted:
            return self._replay(name, args, kwargs)
        started = time.perf_counter()
        output = forward(*args, **kwargs)
        self.seconds += time.perf_counter() - started
        if name == self.loop.state_module:
            self._outputs += 1
            if self._outputs == self.loop.period:
                output = self._judge(output)
                self._ended = True
        if self._stopped is not None:
            output = self._act_on_stopped(name, output, args, kwargs)
        self._tape.append(_Recorded.of(name, output))
        return output

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ended, self._outputs = False, 0
        if self.halted:
            return
        self._last, self._tape = self._tape, []
        self.kv.begins()
        if self.run is None:
            self._x0 = self.loop.initial_state(args, kwargs)
            if self._x0 is not None and not self._x0.is_inference():
                self._seen = self._x0, self._x0._version
            return
        self.kv.look_again()
        done = self.run.running == 0
        self.kv.computed(self.computed, ending=done)
        if done and not self.kv.runs_on:
            self.halted, self._position = True, 0
        elif self.run.running < self.run.live.numel():
            self._stopped = ~self.run.live

    def _judge(self, output: Any) -> Any:
        x = self.loop.state_of(output)
        if self.run is None:
            # Without an x_0 the first step is not defined: an infinite one makes every signal of it +inf.
            start = torch.full_like(x, torch.inf) if self._x0 is None else self._x0.detach()
            if start.shape != x.shape:
                raise StateShapeChanged(
                    f"x_0, taken from the first call of {self.loop.body[0]!r}, is {tuple(start.shape)}, and the state "
                    f"{tuple(x.shape)}: say initial=, or None if x_0 cannot be had"
                )
            self.run = self._start(start)
        elif x.shape != self.run.x.shape:
            raise StateShapeChanged(
                f"the state was {tuple(self.run.x.shape)} and became {tuple(x.shape)} inside one loop: if rows are "
                "dropped there, let the scope be what is called once a round"
            )
        self.computed += 1
        if self.run.running == 0:  # runs on to fill a cache: every row keeps its state
            return self._keep(output, torch.zeros_like(self.run.live))
        if x.is_inference():
            x = x.clone()  # what happens to the model's own cannot be seen: inference tensors count no versions
        elif self._seen is not None and self._seen[0]._version != self._seen[1]:
            raise MutatedOutput(
                f"the model changes the state in place after {self.loop.state_module!r} gave it (such as h += ..., or "
                "a body that works in its own buffer), so steps cannot be measured and halted rows cannot be kept: "
                "make that operation out of place, or describe the loop by a module that contains it"
            )
        self._seen = None if x.is_inference() else (x, x._version)
        with torch.no_grad(), self._judging():
            if not self.run.advance_if_sound(x.detach()):
                self.run.advance(x.detach())
        if self._kept is None or self.run.all_took:
            self._kept = output
            return output
        return self._keep(output, self.run.took)

    def _keep(self, output: Any, took: Tensor) -> Any:
        """The output with the rows that did not take it as they were: the state itself, graph and all, and every other
        tensor of the output that has these rows (an LSTM's cell, say)."""
        new, old = _tensors(output), _tensors(self._kept)
        if len(new) != len(old):  # its structure changes from step to step: the state alone is known to correspond
            new, old = [self.loop.state_of(output)], [self.loop.state_of(self._kept)]
            self._kept = self.loop.with_state(output, torch.where(took.unsqueeze(-1), new[0], old[0]))
            return self._kept
        if torch.is_grad_enabled() and not self.allow_grad:
            for fresh, kept in zip(new, old, strict=True):
                if fresh.requires_grad and not kept.requires_grad:
                    raise GradientLost(
                        "rows halted under no_grad and are kept where gradients are on: those rows would train "
                        "nothing. Halt under torch.no_grad(), or say allow_grad=True if that is meant"
                    )
        before = iter(old)

        def rows(tensor: Tensor) -> Tensor:
            kept = next(before)
            if tensor.shape[: took.ndim] != took.shape or kept.shape != tensor.shape:
                return tensor
            return torch.where(took.view(*took.shape, *[1] * (tensor.ndim - took.ndim)), tensor, kept)

        self._kept = map_tensors(rows, output)
        return self._kept

    def _watch(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        carry = self.loop.carry
        if name == (carry[0] if carry else self.loop.body[0]) and len(self.inputs) == self.skipped:
            watched = (args[carry[1]],) if carry else (*args, *kwargs.values())
            self.inputs.append([t.detach().clone() for value in watched for t in _tensors(value)])

    def _act_on_stopped(self, name: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What ``on_halt`` says, for the rows that had halted when this iteration began."""
        action = self.loop.on_halt.get(name, "replay")
        if action == "replay" or self._stopped is None:
            return output
        stopped = self._stopped
        given = self._input(args, kwargs) if action == "identity" else None

        def act(tensor: Tensor) -> Tensor:
            mask = stopped.view(*stopped.shape, *[1] * (tensor.ndim - stopped.ndim))
            return tensor.masked_fill(mask, 0) if given is None else torch.where(mask, given, tensor)

        return map_tensors(act, output)

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a map of the state is given: the argument that the description names, or the first."""
        where = self.loop.initial
        if isinstance(where, str) and where in kwargs:
            return kwargs[where]
        if isinstance(where, int) and where < len(args):
            return args[where]
        return args[0] if args else next(iter(kwargs.values()))

    def _replay(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.check_glue:
            self._watch(name, args, kwargs)
        entry = self._last[self._position]
        if entry.name != name:
            raise TapeMismatch(
                f"after the halt the model called {name!r} where its last iteration called {entry.name!r}: the body is "
                "not the same modules in the same order each time. Name in body= all that one iteration calls"
            )
        self._position = (self._position + 1) % len(self._last)
        if self._position == 0:
            self._ended = True
            self.skipped += 1
            self.kv.skipped(self.skipped)
        action = self.loop.on_halt.get(name, "replay")
        if action == "identity":
            return self._input(args, kwargs)
        output = entry.again(self.allow_grad)
        return map_tensors(torch.zeros_like, output) if action == "zero" else output
