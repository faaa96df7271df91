"""Which modules a model calls, in which order and from where."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from haltkit.attachment.description import find_call
from haltkit.attachment.outputs import tensors_in
from haltkit.attachment.override import Interceptor, intercepted

__all__ = ["Calls"]


class Calls:
    """The calls of modules in the first call of the whole model, or in all of ``run`` if a method runs the loop.

    Args:
        model: the model.
        methods: ``"module:method"``, to be followed as if they were modules.
    """

    def __init__(self, model: nn.Module, methods: Sequence[str] = ()) -> None:
        self.model, self.methods = model, methods
        self.calls: list[tuple[str, tuple[str, ...]]] = []  # (module, modules that were running when it was called)
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.roots = 0
        self.method = ""
        self._running: list[str] = []
        self._inside = False

    def watch(self, run: Callable[[], Any]) -> None:
        """Run the model once."""
        handles = []
        try:
            handles.append(self.model.register_forward_pre_hook(self._enter_root, prepend=True))
            handles.append(self.model.register_forward_hook(self._leave_root, always_call=True))
            for name, module in self.model.named_modules():
                if name:
                    handles.append(module.register_forward_pre_hook(self._enter(name)))
                    handles.append(module.register_forward_hook(self._leave(name)))
            places = [(*find_call(self.model, path), self._follow(path)) for path in self.methods]
            with intercepted(places), torch.no_grad():
                run()
        finally:
            for handle in handles:
                handle.remove()

    def _enter_root(self, *_: Any) -> None:
        if not self.roots:  # what ran before belongs to no call of the model
            self.calls.clear()
            self.shapes.clear()
            self.method = ""
        self.roots += 1
        self._inside = self.roots == 1

    def _leave_root(self, *_: Any) -> None:
        self._inside = False

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self._inside or not self.roots:
                self.calls.append((name, tuple(self._running)))
                if not self.roots and not self._running:
                    self.method = self.method or _method_of(self.model)
            self._running.append(name)

        return hook

    def _follow(self, name: str) -> Interceptor:
        enter, leave = self._enter(name), self._leave(name)

        def follow(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            enter()
            output = method(*args, **kwargs)
            leave(None, None, output)
            return output

        return follow

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            self._running.pop()
            found = tensors_in(output)
            if self._inside or not self.roots:
                self.shapes.setdefault(name, []).append(tuple(found[0].shape) if found else ())

        return hook


def _method_of(model: nn.Module) -> str:
    """The outermost method of the model that is running."""
    frame, name = sys._getframe(), ""
    while frame is not None:
        if frame.f_locals.get("self") is model and hasattr(type(model), frame.f_code.co_name):
            name = frame.f_code.co_name
        if frame.f_back is None:
            break
        frame = frame.f_back
    return name
