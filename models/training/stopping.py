"""Asking a training run to stop: Ctrl-C and SIGTERM, so that the step in progress can finish and be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Stop", "stop_requests"]


class Stop(threading.Event):
    """Set by a signal.

    Attributes:
        number: of the signal; 0: none has come.
    """

    number: int = 0

    def ask(self, number: int) -> None:
        """Ask the run to stop."""
        self.number = number
        self.set()


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Within the block, SIGINT and SIGTERM ask to stop; outside the main thread no signal is caught."""
    asked = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {s: signal.signal(s, lambda number, _: asked.ask(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
