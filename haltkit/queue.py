"""A queue for loops: a fixed number of slots, where the next item takes the place of one that has halted, at once.

A batch that runs until its slowest item has halted computes fewer and fewer items per step. Here every step computes
as many as there are slots for as long as the source has items, so that time follows the mean number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from haltkit.loop import Keep, Outcome
from haltkit.protocol import Readout, check_count, granularity_of
from haltkit.slots import QueueItem, QueueResult, SlotBody, Slots
from haltkit.specs import PolicyLike, policy_of

__all__ = ["Batch", "QueueItem", "QueueResult", "SlotBody", "check_slots", "in_turn", "run_queue"]

R = TypeVar("R")


class Batch(Protocol[R]):
    """Items that run side by side."""

    @property
    def running(self) -> int:
        """How many run."""
        ...

    def admit(self, items: list[tuple[int, Any]]) -> None:
        """Further items begin, each with its number in the source."""
        ...

    def step(self) -> list[tuple[int, R]]:
        """Every item takes a step; the items that end with it, each with its number."""
        ...

    def clear(self) -> None:
        """Give up what still runs."""
        ...


def run_queue(
    body: SlotBody | Callable[..., Tensor],
    items: Iterable[Any],
    policy: PolicyLike,
    slots: int = 64,
    *,
    max_steps: int = 32,
    readout: Readout | None = None,
    keep: Keep = "current",
    prepare: Callable[[Any], Any] | None = None,
    ordered: bool = True,
    ahead: int | None = None,
) -> Iterator[QueueResult]:
    """Run a loop on each item of a queue, ``slots`` items at a time::

        import torch, haltkit

        states = (torch.randn(8) for _ in range(1000))  # any iterable, also one without an end
        for result in haltkit.run_queue(lambda x: x / 2 + 1, states, "norm:tau=1e-3", slots=16):
            result.index, result.x, int(result.steps), haltkit.Outcome(int(result.outcome))

    Every item gets the steps and the outcome that :func:`haltkit.run_loop` gives it alone, and its state to rounding.
    Nothing is computed for a retired item: a free slot takes the next item before the next step, and once no
    item may be admitted the batch shrinks. It runs without gradients.

    Memory: at most ``slots`` items run. With ``ordered``, results wait for those of earlier items; the source is then
    read at most ``ahead`` items beyond the last result handed out, so running items and waiting results together are
    at most ``ahead``. Nothing is read from the source before the first result is asked for, or while the consumer is
    busy. A source that blocks makes the running items wait.

    Args:
        body: a function from the states of all slots, ``(n, ..., D)`` (and ``inputs``, each ``(n, ...)``), to the next
            ones; or a :class:`SlotBody`. Items must not see each other; rows of one
            instance may. It may write into the state.
        items: tensors or :class:`QueueItem`; all of one shape, dtype and device, and so are their inputs. Each item may
            be anything if there is ``prepare``.
        policy: an object or a spec; judges rows, or instances (``granularity=sequence``), which are retired once all
            their rows have halted.
        slots: how many items run at a time.
        max_steps: the budget; rows still active then end as ``BUDGET``.
        readout: from the state to logits ``(..., V)``, for policies that look at predictions.
        keep: the state that a converged row hands on, see :func:`haltkit.run_loop`.
        prepare: makes an item from what the source gives. An ``Exception`` that it raises becomes the ``error`` of this
            item's result, and the queue goes on. Errors of the source itself, and of the body, end the queue.
        ordered: results come in the order of the items; False: as they complete.
        ahead: see above; ``8 * slots`` unless given. An item that takes many steps delays the results after it, and
            once ``ahead`` items are read, it runs with fewer other items.

    Raises:
        ValueError: a bad spec, ``slots`` or ``max_steps`` that is no whole number of at least 1, ``ahead`` below
            ``slots``, a policy that pools over a batch or world, a body with a memory that cannot take new items; while
            results are drawn: an item that is none, is not of real floating-point numbers or has another shape than
            the first (with its number), a body that changes the state's shape or dtype, a policy or readout whose
            answer is not row by row, a policy that cannot take a step number per row.
    """
    built = policy_of(policy)
    granularity = granularity_of(built)
    window = check_slots(slots, ordered, ahead)
    check_count("max_steps", max_steps)
    if keep not in ("current", "previous"):
        raise ValueError(f"keep={keep!r}: allowed are 'current' and 'previous'")
    if granularity not in ("token", "sequence"):
        raise ValueError(
            f"granularity={granularity} makes one decision for all rows, but items of a queue start and halt one "
            "by one: use granularity=token, or granularity=sequence for items (T, D)"
        )
    if hasattr(body, "step") and not isinstance(body, SlotBody):
        raise ValueError(
            f"{type(body).__name__} keeps a memory for one loop and cannot take new items: give it admit and select "
            "(see haltkit.SlotBody), or pass a function of the state"
        )
    batch = Slots(body, built, max_steps, readout, keep)
    return in_turn(batch, iter(items), slots, window, prepare, _failed)


def _failed(index: int, error: Exception) -> QueueResult:
    absent = torch.tensor(Outcome.ABSENT, dtype=torch.int8)
    return QueueResult(index, torch.empty(0), torch.tensor(0), absent, error)


def check_slots(slots: int, ordered: bool, ahead: int | None) -> int | None:
    """How far the source is read beyond the last result handed out; None: results come as they complete.

    Raises:
        ValueError: ``slots`` or ``ahead`` that is no whole number of at least 1, or fewer items ahead than slots.
    """
    check_count("slots", slots)
    ahead = 8 * slots if ahead is None else ahead
    check_count("ahead", ahead)
    if ahead < slots:
        raise ValueError(f"ahead={ahead} would not fill the {slots} slots: it must be at least slots")
    return ahead if ordered else None


def in_turn(
    batch: Batch[R],
    source: Iterator[Any],
    slots: int,
    ahead: int | None,
    prepare: Callable[[Any], Any] | None = None,
    failed: Callable[[int, Exception], R] | None = None,
) -> Iterator[R]:
    """Admit, step, hand out, until the source is exhausted; see :func:`run_queue` for the order of results.

    Args:
        batch: what runs the items.
        source: of the items.
        slots: how many run at a time.
        ahead: how far the source is read beyond the last result handed out; None: results come as they complete.
        prepare: makes an item from what the source gives.
        failed: the result of an item whose preparation has raised; None: that ends the queue.
    """
    waiting: dict[int, R] = {}  # completed and not handed out, by the item's number
    read = due = 0  # items read, results handed out
    exhausted = False
    try:
        while True:
            admitted: list[tuple[int, Any]] = []
            room = slots - batch.running if ahead is None else min(slots - batch.running, due + ahead - read)
            while room > 0 and not exhausted:
                try:
                    item = next(source)
                except StopIteration:
                    exhausted = True
                    break
                try:
                    admitted.append((read, item if prepare is None else prepare(item)))
                except Exception as error:
                    if failed is None:
                        raise
                    waiting[read] = failed(read, error)
                read, room = read + 1, room - 1
            with torch.no_grad():  # never across a yield
                batch.admit(admitted)
                waiting.update(batch.step())
            while waiting and (ahead is None or due in waiting):
                index = due if ahead is not None else next(iter(waiting))
                due += 1
                yield waiting.pop(index)
            if exhausted and not batch.running:
                return
    finally:
        batch.clear()
