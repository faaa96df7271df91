"""Overriding a module's methods on one instance, and taking it back without a trace.

The instance gets a class of its own, a subclass of its class with the methods replaced, as
``torch.nn.utils.parametrize`` does. An attribute on the instance would survive into copies, which would then run
the original's weights.

What is installed follows from the list of interceptors alone and is put in place by steps that may be repeated, so an
exception that arrives between two of them (Ctrl-C) is mended by removing the interceptors once more.
"""

from __future__ import annotations

import bisect
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

__all__ = ["Interceptor", "Overrides", "intercepted"]

# interceptor(next, args, kwargs): call next(*args, **kwargs) for what the module would do.
Interceptor = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def _new(cls: type[Any], *args: Any) -> Any:
    """What copyreg does for a new object, which insists on the class that the instance has just now."""
    return cls.__new__(cls, *args)


def _uncompiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Code that a compiler passes by: what it does is for Python to do, and modules compiled inside it stay so."""
    disabled: Callable[..., Any] = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
    return disabled


@dataclass(frozen=True)
class _Entry:
    """One interceptor in a chain."""

    depth: int
    number: int  # of the session: which came first
    owner: object
    interceptor: Interceptor


class Overrides:
    """All interceptors of one module instance, outermost first; the module's class is swapped while there are any.

    Making one changes nothing about the module: :meth:`add` does.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original = type(module)
        self.chains: dict[str, list[_Entry]] = {}
        self.own: dict[str, Any] = {}  # methods that were attributes of the instance (accelerate, torch.compile)
        original, overrides = self.original, self

        def reduce(instance: Any, protocol: Any) -> Any:
            """Copies and pickles are plain modules of the original class, not attached to anything."""
            parts = list(original.__reduce_ex__(instance, protocol))
            parts[0:2] = _new, tuple(original if part is swapped else part for part in parts[1])
            if overrides.own and isinstance(parts[2], dict):
                parts[2] = {**parts[2], **overrides.own}
            return tuple(parts)

        members: dict[str, Any] = {"__reduce_ex__": reduce, "__module__": original.__module__, "_haltkit": self}
        swapped = type(original.__name__, (original,), members)
        swapped.__qualname__ = original.__qualname__
        # What a base class gives every new subclass (transformers wraps the forward of its layers) would come before
        # the interceptors, and the class of the module has it already.
        for name in [name for name in vars(swapped) if name not in members and not name.startswith("__")]:
            delattr(swapped, name)
        self.swapped = swapped

    @classmethod
    def on(cls, module: nn.Module) -> Overrides | None:
        """The overrides that a module has at present."""
        found = type(module).__dict__.get("_haltkit")
        return found if isinstance(found, cls) else None

    @classmethod
    def of(cls, module: nn.Module) -> Overrides:
        """The module's overrides; new ones, not in force yet, if it has none."""
        return cls.on(module) or cls(module)

    def owners(self) -> list[object]:
        """Who intercepts this module, in the order they came."""
        entries = [entry for chain in self.chains.values() for entry in chain]
        return [entry.owner for entry in sorted(entries, key=lambda entry: entry.number)]

    def add(self, method: str, owner: object, number: int, interceptor: Interceptor, depth: int) -> None:
        """Intercept a method, inside of all interceptors of the same or a smaller ``depth`` of nesting."""
        chain = self.chains.setdefault(method, [])
        place = bisect.bisect_right([entry.depth for entry in chain], depth)
        chain.insert(place, _Entry(depth, number, owner, interceptor))
        if type(self.module) is self.original:
            self.module.__class__ = self.swapped
        if method in self.own or method in self.swapped.__dict__:
            return
        if method in self.module.__dict__:
            self.own[method] = self.module.__dict__[method]
            self.module.__dict__[method] = self._method(method, self.own[method])
        else:
            setattr(self.swapped, method, self._method(method, None))

    def _method(self, name: str, attribute: Callable[..., Any] | None) -> Callable[..., Any]:
        chain, original = self.chains[name], self.original

        def call(index: int, base: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index == len(chain):
                return base(*args, **kwargs)
            return chain[index].interceptor(lambda *a, **k: call(index + 1, base, a, k), args, kwargs)

        if attribute is not None:
            return _uncompiled(lambda *args, **kwargs: call(0, attribute, args, kwargs))

        function = inspect.getattr_static(original, name)
        bound = isinstance(function, (staticmethod, classmethod))
        plain = getattr(original, name)

        def method(instance: Any, /, *args: Any, **kwargs: Any) -> Any:
            return call(0, plain if bound else partial(plain, instance), args, kwargs)

        return _uncompiled(method)

    def remove(self, owner: object) -> None:
        """Take back everything of one owner; with the last the module is what it was. May be repeated."""
        for name, chain in list(self.chains.items()):
            chain[:] = [entry for entry in chain if entry.owner is not owner]
            if chain:
                continue
            if name in self.own:
                self.module.__dict__[name] = self.own[name]
                del self.own[name]
            if name in self.swapped.__dict__:
                delattr(self.swapped, name)
            del self.chains[name]
        if not self.chains and type(self.module) is self.swapped:
            self.module.__class__ = self.original

    @property
    def disturbed(self) -> bool:
        """Somebody else has changed the module's class since, for instance by parametrizing a weight."""
        return type(self.module) is not self.swapped


@contextmanager
def intercepted(places: Sequence[tuple[nn.Module, str, Interceptor]]) -> Iterator[None]:
    """Intercept methods, each ``(module, method, interceptor)``, for the length of a ``with`` block, inside of all
    interceptors that the modules have."""
    owner = object()
    changed: list[Overrides] = []
    try:
        for module, method, interceptor in places:
            overrides = next((o for o in changed if o.module is module), None) or Overrides.of(module)
            changed.append(overrides)
            overrides.add(method, owner, sys.maxsize, interceptor, sys.maxsize)
        yield
    finally:
        for overrides in changed:
            overrides.remove(owner)
