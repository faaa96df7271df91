"""One item of a queue in a thread of its own, which runs only while the queue waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from haltkit.attachment.axes import BodyCall
from haltkit.loop import LoopResult

__all__ = ["Abandoned", "Lane", "Mode", "present_lane", "raising"]


class Abandoned(BaseException):
    """The queue is closed before this item has ended."""


class Mode(NamedTuple):
    """What PyTorch keeps for each thread: a call is made as the item's own thread would make it."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def present(cls) -> Mode:
        """That of the present thread."""
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        autocast = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same in another thread."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield


class Lane:
    """One item's run of the model, in a thread that runs only while the queue waits for it."""

    def __init__(self, number: int, work: Callable[[], Any]) -> None:
        """The work is done as the present thread would do it, but without gradients."""
        self.number = number
        self._begun_in = Mode.present()._replace(grad=False)
        self.call: BodyCall | None = None  # what it waits for
        self.mode: Mode | None = None
        self.output: Any = None
        self.error: BaseException | None = None
        self.result: LoopResult | None = None
        self.ended = False
        self._work, self._reply = work, _nothing
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=f"haltkit item {number}", daemon=True)

    def begin(self) -> None:
        """Run to the first call of the body, or to the end."""
        self._thread.start()
        self._stopped.acquire()

    def resume(self, reply: Callable[[], Any]) -> None:
        """Run on to the next call, or to the end; ``reply`` gives what the call returns, or raises."""
        self._reply = reply
        self._go.release()
        self._stopped.acquire()

    def ask(self, call: BodyCall) -> Any:
        """In the item's own thread: wait for what a call returns."""
        self.call, self.mode = call, Mode.present()
        self._stopped.release()
        self._go.acquire()
        self.call, reply = None, self._reply
        return reply()

    def _run(self) -> None:
        # What runs here are small operations: a thread pool for each item would only cost its creation.
        torch.set_num_threads(1)
        _lane.set(self)
        try:
            with self._begun_in.again():
                self.output = self._work()
        except BaseException as error:  # handed to whoever reads the queue
            self.error = error
        finally:
            self.ended = True
            self._stopped.release()


_lane: ContextVar[Lane | None] = ContextVar("haltkit_lane", default=None)


def _nothing() -> None:
    return None


def raising(error: BaseException) -> Callable[[], Any]:
    def reply() -> Any:
        raise error

    return reply


def present_lane() -> Lane | None:
    """The item that the present thread runs, if it runs one."""
    return _lane.get()
