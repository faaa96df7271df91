"""Which call of a loop's body reads what another has returned, found by changing one output at a time.

In every run all body modules give what they gave the first time, but for one output that is disturbed. A call that
then computes something else reads that output through the model's own code alone, and not through another module of the
body.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment.outputs import disturbed, map_tensors, tensors_in

__all__ = ["Call", "Leaf", "Reads", "leaves", "record_calls"]

Key = int | str  # an argument's position or name


@dataclass(frozen=True)
class Leaf:
    """Where a tensor is in an output: nowhere deeper than one step in."""

    kind: str  # "", "key", "index" or "field"
    at: Any = None

    def get(self, output: Any) -> Any:
        """The tensor."""
        if not self.kind:
            return output
        return getattr(output, self.at) if self.kind == "field" else output[self.at]

    def put(self, output: Any, tensor: Tensor) -> Any:
        """The output with another tensor there."""
        if not self.kind:
            return tensor
        if self.kind == "key":
            return {**output, self.at: tensor}
        if self.kind == "field":
            return dataclasses.replace(output, **{self.at: tensor})
        parts = [*output[: self.at], tensor, *output[self.at + 1 :]]
        return parts if isinstance(output, list) else tuple(parts)

    def select_text(self) -> str:
        """``select=`` as one would write it."""
        return f"lambda out: out.{self.at}" if self.kind == "field" else f"lambda out: out[{self.at!r}]"

    def put_text(self) -> str:
        """``put=`` as one would write it."""
        if self.kind == "key":
            return f"lambda out, x: {{**out, {self.at!r}: x}}"
        if self.kind == "field":
            return f"lambda out, x: dataclasses.replace(out, {self.at}=x)"
        return f"lambda out, x: (*out[:{self.at}], x, *out[{self.at + 1}:])"


def leaves(output: Any) -> list[Leaf]:
    """Where the floating-point tensors of an output are, as far as one step in."""
    if isinstance(output, Tensor):
        return [Leaf("")]
    found: list[tuple[Leaf, Any]] = []
    if isinstance(output, Mapping):
        found = [(Leaf("key", key), part) for key, part in output.items()]
    elif isinstance(output, (tuple, list)):
        found = [(Leaf("index", i), part) for i, part in enumerate(output)]
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        found = [(Leaf("field", f.name), getattr(output, f.name)) for f in dataclasses.fields(output)]
    return [leaf for leaf, part in found if isinstance(part, Tensor) and part.is_floating_point()]


@dataclass(frozen=True)
class Call:
    """One call of a body module.

    Attributes:
        module: its path.
        given: the tensors in each argument.
        bare: the arguments that are tensors themselves.
        computed: the tensors that it computed.
        output: what it returned to the model.
    """

    module: str
    given: dict[Key, list[Tensor]]
    bare: frozenset[Key]
    computed: list[Tensor]
    output: Any


Change = Callable[[int, Any], Any]  # (number of the call, what the module returned) to what it returns


def record_calls(
    model: nn.Module, body: Sequence[str], scope: str, run: Callable[[], Any], change: Change | None = None
) -> list[Call]:
    """The calls of the body's modules in the first call of the scope (or in all of ``run``, if that never calls it)."""
    calls: list[Call] = []
    entered = 0
    inside = False

    def enter(*_: Any) -> None:
        nonlocal entered, inside
        if not entered:
            calls.clear()
        entered += 1
        inside = entered == 1

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    def hook(path: str) -> Callable[..., Any]:
        given: list[tuple[dict[Key, list[Tensor]], frozenset[Key]]] = []

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named: dict[Key, Any] = dict(enumerate(args))
            named.update(kwargs)
            bare = frozenset(key for key, value in named.items() if isinstance(value, Tensor))
            given.append(({key: [t.clone() for t in tensors_in(value)] for key, value in named.items()}, bare))

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            seen = given.pop()
            if entered and not inside:
                return output
            number, computed = len(calls), [t.clone() for t in tensors_in(output)]
            if change is not None:
                output = change(number, output)
            calls.append(Call(path, *seen, computed, map_tensors(torch.clone, output)))
            return output

        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        return after

    handles: list[Any] = []
    try:
        owner = model.get_submodule(scope)
        handles.append(owner.register_forward_pre_hook(enter, prepend=True))
        handles.append(owner.register_forward_hook(leave, always_call=True))
        handles += [model.get_submodule(path).register_forward_hook(hook(path)) for path in body]
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


class Reads:
    """What reads what in one loop. Each question costs a run of the model.

    Raises:
        ValueError: the model computes something else in each run.
    """

    def __init__(self, model: nn.Module, body: Sequence[str], scope: str, run: Callable[[], Any]) -> None:
        self.model, self.body, self.scope, self.run = model, body, scope, run
        self.calls = record_calls(model, body, scope, run)
        self._plain = record_calls(model, body, scope, run, self._again)
        if self._differing(record_calls(model, body, scope, run, self._again)):
            raise ValueError("run gives another output each time: fix its seed, and call model.eval()")
        self._known: dict[tuple[int, Leaf], dict[int, list[Key]]] = {}

    def _again(self, number: int, output: Any) -> Any:
        """What the call returned the first time."""
        if number < len(self.calls):
            return map_tensors(torch.clone, self.calls[number].output)
        return output

    def of(self, number: int, leaf: Leaf) -> dict[int, list[Key]]:
        """The later calls that read this output of this call, and by which arguments."""
        key = number, leaf
        if key not in self._known:

            def change(at: int, output: Any) -> Any:
                output = self._again(at, output)
                return leaf.put(output, disturbed(leaf.get(output))) if at == number else output

            self._known[key] = self._differing(record_calls(self.model, self.body, self.scope, self.run, change))
        return self._known[key]

    def _differing(self, changed: list[Call]) -> dict[int, list[Key]]:
        found: dict[int, list[Key]] = {}
        for number, (before, after) in enumerate(zip(self._plain, changed, strict=False)):
            if before.module != after.module:
                break
            if _differ(before.computed, after.computed):
                found[number] = [k for k in before.given if _differ(before.given[k], after.given.get(k, []))]
        return found


def _differ(before: list[Tensor], after: list[Tensor]) -> bool:
    pairs = zip(before, after, strict=False)
    return len(before) != len(after) or any(a.shape != b.shape or not bool(torch.equal(a, b)) for a, b in pairs)
