"""Which modules a model calls, in which order and from where."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from haltkit.attachment.outputs import tensors_in

__all__ = ["Calls"]


class Calls:
    """The calls of modules in the first call of the whole model, or in all of ``run`` if a method runs the loop."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
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
            with torch.no_grad():
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
