"""Which call of a loop's body reads what another has returned, found by changing one output at a time.

In every run all body modules give what they gave the first time, but for one output that is disturbed. A call that
then computes something else reads that output through the model's own code alone, and not through another module of the
body.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment.description import find_call
from haltkit.attachment.leaf import Leaf
from haltkit.attachment.outputs import disturbed, map_tensors, mapped_tensors, tensors_in
from haltkit.attachment.override import Interceptor, intercepted

__all__ = ["Call", "Reads"]

Key = int | str  # an argument's position or name


@dataclass(frozen=True)
class Call:
    """One call of a body module.

    Attributes:
        module: its path.
        given: the tensors in each argument.
        bare: the arguments that are tensors themselves.
        computed: the tensors that it computed.
        output: what it returned to the model.
        handed: the very tensors that the model got, and how often each had been written to by then.
        role: what tells apart the calls of one module: which arguments there are, and those that are words or truths.
    """

    module: str
    given: dict[Key, list[Tensor]]
    bare: frozenset[Key]
    computed: list[Tensor]
    output: Any
    handed: list[tuple[Tensor, int]]
    role: frozenset[tuple[Key, str | bool | None]]

    @property
    def changed_in_place(self) -> bool:
        """The model has written into what it got."""
        return any(not tensor.is_inference() and tensor._version != version for tensor, version in self.handed)


Change = Callable[[int, Any], Any]  # (number of the call, what the module returned) to what it returns


class _Recording:
    """The calls of the body's modules in the first call of the scope, or in all of ``run`` if that never calls it."""

    def __init__(self, change: Change | None, scoped: bool) -> None:
        """``change``: what a call returns instead. ``scoped``: whether the scope is known to be called."""
        self.calls: list[Call] = []
        self.entered = 0
        self._change, self._scoped, self._inside = change, scoped, False

    def run(self, model: nn.Module, body: Sequence[str], scope: str, run: Callable[[], Any]) -> _Recording:
        """Run the model once."""
        places = [(*find_call(model, scope), self._enter), *((*find_call(model, p), self._record(p)) for p in body)]
        with intercepted(places), torch.no_grad():
            run()
        return self

    def _enter(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.entered:
            self.calls.clear()
        self.entered += 1
        self._inside = self.entered == 1
        try:
            return forward(*args, **kwargs)
        finally:
            self._inside = False

    def _record(self, path: str) -> Interceptor:
        def record(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if (self.entered or self._scoped) and not self._inside:
                return forward(*args, **kwargs)
            named: dict[Key, Any] = dict(enumerate(args))
            named.update(kwargs)
            given = {key: [t.clone() for t in tensors_in(value)] for key, value in named.items()}
            bare = frozenset(key for key, value in named.items() if isinstance(value, Tensor))
            role = frozenset((key, v if isinstance(v, (str, bool)) else None) for key, v in named.items())
            output = forward(*args, **kwargs)
            number, computed = len(self.calls), [t.clone() for t in tensors_in(output)]
            if self._change is not None:
                output = self._change(number, output)
            handed = [(t, 0 if t.is_inference() else t._version) for t in mapped_tensors(output)]
            self.calls.append(Call(path, given, bare, computed, map_tensors(torch.clone, output), handed, role))
            return output

        return record


class Reads:
    """What reads what in one loop. Each question costs a run of the model.

    Raises:
        ValueError: the model computes something else in each run.
    """

    def __init__(self, model: nn.Module, body: Sequence[str], scope: str, run: Callable[[], Any]) -> None:
        self.model, self.body, self.scope, self.run = model, body, scope, run
        first = _Recording(None, scoped=False).run(model, body, scope, run)
        self.calls, self._scoped = first.calls, bool(first.entered)
        self._plain = self._calls(self._again)
        if self._differing(self._calls(self._again)):
            raise ValueError("run gives another output each time: fix its seed, and call model.eval()")
        self._known: dict[tuple[int, Leaf], dict[int, bool]] = {}

    def _calls(self, change: Change) -> list[Call]:
        """The calls of another run."""
        return _Recording(change, self._scoped).run(self.model, self.body, self.scope, self.run).calls

    def _again(self, number: int, output: Any) -> Any:
        """What the call returned the first time."""
        if number < len(self.calls):
            return map_tensors(torch.clone, self.calls[number].output)
        return output

    def of(self, number: int, leaf: Leaf) -> dict[int, bool]:
        """The later calls that read this output of this call, and whether as numbers: a token chosen by it is none."""
        key = number, leaf
        if key not in self._known:

            def change(at: int, output: Any) -> Any:
                output = self._again(at, output)
                return leaf.put(output, disturbed(leaf.get(output))) if at == number else output

            self._known[key] = self._differing(self._calls(change))
        return self._known[key]

    def goes_on(self, change: Callable[[Any], Any]) -> bool:
        """Whether the model calls its body once more if its last call returns another output."""

        def changed(at: int, output: Any) -> Any:
            if at >= len(self.calls):
                raise _OneMore
            output = self._again(at, output)
            return change(output) if at == len(self.calls) - 1 else output

        try:
            self._calls(changed)
        except _OneMore:
            return True
        return False

    def _differing(self, changed: list[Call]) -> dict[int, bool]:
        found: dict[int, bool] = {}
        for number, (before, after) in enumerate(zip(self._plain, changed, strict=False)):
            if before.module != after.module:
                break
            if _differ(before.computed, after.computed):
                given = [(_numbers(t), _numbers(after.given.get(key, []))) for key, t in before.given.items()]
                found[number] = any(_differ(old, new) for old, new in given)
        return found


class _OneMore(Exception):
    """The body is called once more than in the first run."""


def _numbers(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _differ(before: list[Tensor], after: list[Tensor]) -> bool:
    pairs = zip(before, after, strict=False)
    return len(before) != len(after) or any(a.shape != b.shape or not bool(torch.equal(a, b)) for a, b in pairs)
