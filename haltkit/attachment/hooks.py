"""Forward hooks that are taken back for certain, also those whose registering was interrupted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["Hooks"]


class Hooks:
    """The hooks of one session. A hook is noted before it is registered, and found again in the module's own tables."""

    def __init__(self) -> None:
        self._noted: list[tuple[nn.Module, Callable[..., Any]]] = []

    def before(self, module: nn.Module, hook: Callable[..., Any], **options: bool) -> None:
        """As ``module.register_forward_pre_hook``."""
        self._noted.append((module, hook))
        module.register_forward_pre_hook(hook, **options)

    def after(self, module: nn.Module, hook: Callable[..., Any], **options: bool) -> None:
        """As ``module.register_forward_hook``."""
        self._noted.append((module, hook))
        module.register_forward_hook(hook, **options)

    def remove(self) -> None:
        """Take all of them back. May be repeated."""
        for module, hook in self._noted:
            tables: list[dict[int, Any]] = [
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks,
                module._forward_pre_hooks,
            ]
            ours = [key for table in tables[3:] for key, found in table.items() if found is hook]
            for key in ours:
                for table in tables:
                    table.pop(key, None)
        self._noted = []
