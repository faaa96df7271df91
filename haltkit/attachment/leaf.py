"""Where one part of an output is, to take it out, to put another in its place, and to write both as code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

__all__ = ["Leaf", "leaves", "parts", "replaced_text"]

DEPTH = 4  # containers inside each other that are looked into


@dataclass(frozen=True)
class Step:
    """From a container to one of its parts.

    Attributes:
        kind: "key" of a mapping, "index" of a tuple, "item" of a list, "value" of a dictionary's ``values()``, "name"
            of a named tuple, "field" of a dataclass.
        at: the key, the number or the name.
    """

    kind: Literal["key", "index", "item", "value", "name", "field"]
    at: Any

    def get(self, output: Any) -> Any:
        """The part."""
        if self.kind == "value":
            return list(output)[self.at]
        return getattr(output, self.at) if self.kind in ("field", "name") else output[self.at]

    def get_text(self, text: str) -> str:
        """The part, as code."""
        if self.kind == "value":
            return f"list({text})[{self.at}]"
        return f"{text}.{self.at}" if self.kind in ("field", "name") else f"{text}[{self.at!r}]"

    def put(self, output: Any, part: Any) -> Any:
        """The container with another part."""
        if self.kind == "key":
            return {**output, self.at: part}
        if self.kind == "field":
            return dataclasses.replace(output, **{self.at: part})
        if self.kind == "name":
            return output._replace(**{self.at: part})
        members = [*output]
        members[self.at] = part
        if self.kind == "value":
            return dict(enumerate(members)).values()
        return members if self.kind == "item" else tuple(members)


@dataclass(frozen=True)
class Leaf:
    """The way from an output to one of its parts; no steps: the output itself."""

    path: tuple[Step, ...] = ()

    def get(self, output: Any) -> Any:
        """The part."""
        for step in self.path:
            output = step.get(output)
        return output

    def put(self, output: Any, part: Any) -> Any:
        """The output, of the same type, with another part."""
        return self._put(output, self.path, part)

    def _put(self, output: Any, path: tuple[Step, ...], part: Any) -> Any:
        if not path:
            return part
        step, *rest = path
        return step.put(output, self._put(step.get(output), tuple(rest), part))

    def text(self, output: str) -> str:
        """The part, as code."""
        for step in self.path:
            output = step.get_text(output)
        return output

    def select_text(self) -> str:
        """``select=`` as one would write it."""
        return f"lambda out: {self.text('out')}"

    def put_text(self) -> str:
        """``put=`` as one would write it."""
        return f"lambda out, x: {replaced_text('out', {self: 'x'})}"


def replaced_text(output: str, changes: Mapping[Leaf, str]) -> str:
    """An output with some of its parts replaced, as code: what stands in their place by where they are."""
    if Leaf() in changes:
        return changes[Leaf()]
    inside: dict[Step, dict[Leaf, str]] = {}
    for leaf, part in changes.items():
        inside.setdefault(leaf.path[0], {})[Leaf(leaf.path[1:])] = part
    new = {step: replaced_text(step.get_text(output), part) for step, part in inside.items()}
    kind = next(iter(new)).kind
    if kind == "key":
        return f"{{**{output}, {', '.join(f'{step.at!r}: {part}' for step, part in new.items())}}}"
    if kind in ("field", "name"):
        fields = ", ".join(f"{step.at}={part}" for step, part in new.items())
        return f"dataclasses.replace({output}, {fields})" if kind == "field" else f"{output}._replace({fields})"
    members, done = [], 0
    all_of = f"list({output})" if kind == "value" else output
    for step in sorted(new, key=lambda step: int(step.at)):
        between = f"{done or ''}:{step.at}"
        members += [*([f"*{all_of}[{between}]"] if step.at > done else []), new[step]]
        done = step.at + 1
    members.append(f"*{all_of}[{done}:]")
    listed = ", ".join(members)
    if kind == "value":
        return f"dict(enumerate([{listed}])).values()"
    return f"[{listed}]" if kind == "item" else f"({listed})"


def leaves(output: Any) -> list[Leaf]:
    """Where the floating-point tensors of an output are."""
    return [leaf for leaf, part in parts(output) if isinstance(part, Tensor) and part.is_floating_point()]


def parts(output: Any, path: tuple[Step, ...] = ()) -> Iterator[tuple[Leaf, Any]]:
    """Everything in an output that is no container, and where it is."""
    inside = [] if len(path) > DEPTH else _inside(output)
    if not inside:
        yield Leaf(path), output
    for step, part in inside:
        yield from parts(part, (*path, step))


def _inside(output: Any) -> Sequence[tuple[Step, Any]]:
    """The parts of a container; none of anything else."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [(Step("field", f.name), getattr(output, f.name)) for f in dataclasses.fields(output) if f.init]
    if isinstance(output, Mapping):
        return [(Step("key", key), part) for key, part in output.items()]
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return [(Step("name", name), getattr(output, name)) for name in output._fields]
    if isinstance(output, (tuple, list)):
        return [(Step("index" if isinstance(output, tuple) else "item", i), part) for i, part in enumerate(output)]
    if isinstance(output, ValuesView):
        return [(Step("value", i), part) for i, part in enumerate(output)]
    return []
