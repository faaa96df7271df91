"""Several loops in one model: their names, and which of them runs inside which."""

from __future__ import annotations

import re
from collections.abc import Mapping

from haltkit.attachment.description import Loop, call_parts

__all__ = ["ONE", "around", "checked", "nesting"]

ONE = "loop"  # the region's name where a model has a single loop
_NAME = re.compile(r"[\w.-]+")  # what "region=spec" can name


def checked(loops: Mapping[str, Loop]) -> dict[str, Loop]:
    """The loops by region, outer ones before those inside them.

    Raises:
        ValueError: no loop at all, a name that no spec could name, something that is not a :class:`Loop`, or two
            regions with one state.
    """
    if not loops:
        raise ValueError("loops={}: name at least one region and describe its loop")
    for name, loop in loops.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"region {name!r}: a name is made of letters, digits, '_', '-' and '.'")
        if not isinstance(loop, Loop):
            raise ValueError(f"region {name!r}: a haltkit.Loop is expected, not a {type(loop).__name__}")
    states: dict[tuple[str, str], str] = {}
    for name, loop in loops.items():
        first = states.setdefault((loop.state_module, loop.scope), name)
        if first != name:
            raise ValueError(f"regions {first} and {name} both have the state {loop.state_module!r}: they are one loop")
    depth = nesting(loops)
    return {name: loops[name] for name in sorted(loops, key=depth.__getitem__)}


def nesting(loops: Mapping[str, Loop]) -> dict[str, int]:
    """How many loops enclose each region's, at least 1 if it starts over inside a loop that is not described."""
    return {
        name: max(bool(loop.reset_on), sum(_encloses(other, loop) for other in loops.values() if other is not loop))
        for name, loop in loops.items()
    }


def around(loops: Mapping[str, Loop]) -> dict[str, frozenset[str]]:
    """The modules of each region's body inside whose calls a loop of another region runs, or a part of it."""
    return {
        name: frozenset(
            of
            for of in loop.body
            for other in loops.values()
            if other is not loop and _encloses(loop, other)
            for path in (other.scope_module, *other.body)
            if path and (path == of or _is_part(path, of))
        )
        for name, loop in loops.items()
    }


def _encloses(outer: Loop, inner: Loop) -> bool:
    """Whether one loop runs inside each iteration of another."""
    if any(path in outer.body for path in inner.reset_on):
        return True
    inside = (inner.scope_module, *inner.body)
    if inner.scope_module and inner.scope_module in outer.body:
        return True
    return any(_is_part(path, of) for of in outer.body for path in inside)


def _is_part(path: str, of: str) -> bool:
    """Whether a module is inside of another, which a method may stand for: that may call all of its own modules."""
    owner = call_parts(of)[0]
    return path.startswith(f"{owner}.") or (not owner and path != of)
