"""Overriding a module's methods on one instance, and taking it back without a trace.

The instance gets a class of its own, a subclass of its class with the methods replaced, as
``torch.nn.utils.parametrize`` does. An attribute on the instance would survive into copies, which would then run
the original's weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

__all__ = ["Overrides"]

# interceptor(next, args, kwargs): call next(*args, **kwargs) for what the module would do.
Interceptor = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def _new(cls: type[Any], *args: Any) -> Any:
    """What copyreg does for a new object, which insists on the class that the instance has just now."""
    return cls.__new__(cls, *args)


def _uncompiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Code that a compiler passes by: what it does is for Python to do, and modules compiled inside it stay so."""
    disabled: Callable[..., Any] = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
    return disabled


class Overrides:
    """All interceptors of one module instance, outermost first; the module's class is swapped while there are any."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original = type(module)
        self.chains: dict[str, list[tuple[int, object, Interceptor]]] = {}
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
        self.swapped = swapped
        module.__class__ = swapped

    @classmethod
    def of(cls, module: nn.Module) -> Overrides:
        """The module's overrides, made if there are none."""
        found = type(module).__dict__.get("_haltkit")
        return found if isinstance(found, cls) else cls(module)

    def owners(self) -> list[object]:
        """Who intercepts this module, in the order they came."""
        found = sorted(
            ((number, owner) for chain in self.chains.values() for number, owner, _ in chain), key=lambda item: item[0]
        )
        return [owner for _, owner in found]

    def add(self, method: str, owner: object, number: int, interceptor: Interceptor, outside: bool) -> None:
        """Intercept a method; ``outside`` puts it before those that are not."""
        chain = self.chains.setdefault(method, [])
        chain.insert(0 if outside else len(chain), (number, owner, interceptor))
        if len(chain) > 1:
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
            return chain[index][2](lambda *a, **k: call(index + 1, base, a, k), args, kwargs)

        if attribute is not None:
            return _uncompiled(lambda *args, **kwargs: call(0, attribute, args, kwargs))

        function = inspect.getattr_static(original, name)
        bound = isinstance(function, (staticmethod, classmethod))
        plain = getattr(original, name)

        def method(instance: Any, /, *args: Any, **kwargs: Any) -> Any:
            return call(0, plain if bound else partial(plain, instance), args, kwargs)

        return _uncompiled(method)

    def remove(self, owner: object) -> None:
        """Take back everything of one owner; with the last the module is what it was."""
        for name, chain in list(self.chains.items()):
            chain[:] = [entry for entry in chain if entry[1] is not owner]
            if not chain:
                del self.chains[name]
                if name in self.own:
                    self.module.__dict__[name] = self.own.pop(name)
                else:
                    delattr(self.swapped, name)
        if not self.chains and type(self.module) is self.swapped:
            self.module.__class__ = self.original

    @property
    def disturbed(self) -> bool:
        """Somebody else has changed the module's class since, for instance by parametrizing a weight."""
        return type(self.module) is not self.swapped
