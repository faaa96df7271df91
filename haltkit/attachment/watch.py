"""Observing a foreign loop with forward hooks: nothing is overridden, and nothing can change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment.description import Loop
from haltkit.attachment.hooks import Hooks
from haltkit.loop import LoopObserver, LoopResult, Outcome

__all__ = ["Watch", "observed_result"]


def observed_result(x: Tensor, k: int) -> LoopResult:
    """The result of a loop that nothing halted: its last state, and ``k`` steps for every row."""
    rows = x.shape[:-1]
    steps = torch.full(rows, k, dtype=torch.int64, device=x.device)
    return LoopResult(x, steps, torch.full(rows, Outcome.BUDGET, dtype=torch.int8, device=x.device))


class _Seen:
    """One call of the scope: how far its loop is."""

    def __init__(self) -> None:
        self.outputs = self.k = 0
        self.returned = False
        self.x0: Tensor | None = None
        self.x: Tensor | None = None


class Watch:
    """Follows the loop of region ``name`` and tells ``observer`` of its states and ``done`` of its end (last state, its
    number).

    A call of the scope that raises is forgotten.
    """

    def __init__(
        self, name: str, loop: Loop, observer: LoopObserver | None, done: Callable[[Tensor, int], None]
    ) -> None:
        self.name, self.loop, self.observer, self.done = name, loop, observer, done
        self._local = threading.local()
        self.returned = 0

    def hook(self, find: Callable[[str], nn.Module], hooks: Hooks) -> None:
        """Register the hooks."""
        loop, scope = self.loop, find(self.loop.scope_module)
        hooks.before(scope, self._enter, prepend=True)
        hooks.after(find(loop.state_module), self._state)
        for path in loop.reset_on:
            hooks.before(find(path), self._restart)
        hooks.after(scope, self._returned)
        hooks.after(scope, self._leave, always_call=True)
        if self.observer is not None:
            hooks.before(find(loop.body[0]), self._first, with_kwargs=True)

    @property
    def _calls(self) -> list[_Seen]:
        calls: list[_Seen] | None = getattr(self._local, "calls", None)
        if calls is None:
            calls = self._local.calls = []
        return calls

    def _enter(self, *_: Any) -> None:
        self._calls.append(_Seen())

    def _first(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._calls and self._calls[-1].k == self._calls[-1].outputs == 0 and self._calls[-1].x0 is None:
            x0 = self.loop.initial_state(args, kwargs)
            self._calls[-1].x0 = None if x0 is None else x0.detach().clone()  # the body may work in place

    def _state(self, _module: nn.Module, _args: Any, output: Any) -> None:
        calls = self._calls
        if not calls:
            return
        seen = calls[-1]
        seen.outputs += 1
        if seen.outputs < self.loop.period:
            return
        seen.outputs = 0
        seen.k += 1
        seen.x = self.loop.state_of(output)
        if self.observer is not None:
            if seen.k == 1:
                self.observer.begin(self.name, self.loop.start(seen.x0, seen.x.detach()))
            self.observer.step(self.name, seen.k, seen.x.detach())

    def _end(self, seen: _Seen) -> None:
        if seen.x is None:
            return
        x = seen.x.detach()
        if self.observer is not None:
            observed = observed_result(x, seen.k)
            self.observer.end(self.name, observed.steps, observed.outcome)
        self.done(x, seen.k)

    def _restart(self, *_: Any) -> None:
        if self._calls:
            self._end(self._calls[-1])
            self._calls[-1] = _Seen()

    def _returned(self, *_: Any) -> None:
        self._calls[-1].returned = True
        self.returned += 1

    def _leave(self, *_: Any) -> None:
        seen = self._calls.pop()
        if seen.returned:  # otherwise the call raised
            self._end(seen)
