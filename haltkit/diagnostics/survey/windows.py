"""Windows of text, one at a time, until they are all used or Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from haltkit.diagnostics.errors import DiagnosticError

__all__ = ["Tick", "each_window"]

# Told after each window.
Tick = Callable[[], None]


def each_window(windows: Tensor, use: Callable[[Tensor], None], tick: Tick | None) -> bool:
    """Use windows ``(N, T)`` one at a time, each as ``(1, T)``; whether all of them were.

    Raises:
        DiagnosticError: there is none.
    """
    if not len(windows):
        raise DiagnosticError("there is no window of text to run on")
    try:
        for window in windows:
            use(window[None])
            if tick is not None:
                tick()
    except KeyboardInterrupt:
        return False
    return True
