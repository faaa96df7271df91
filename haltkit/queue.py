"""A queue for loops: a fixed number of slots, where the next item takes the place of one that has halted, at once.

A batch that runs until its slowest item has halted computes fewer and fewer items per step. Here every step computes
as many as there are slots for as long as the source has items, so that time follows the mean number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from haltkit.loop import Keep, Outcome
from haltkit.protocol import HaltingPolicy, Readout, granularity_of
from haltkit.slots import QueueItem, QueueResult, SlotBody, Slots

__all__ = ["QueueItem", "QueueResult", "SlotBody", "run_queue"]


def run_queue(
    body: SlotBody | Callable[..., Tensor],
    items: Iterable[Any],
    policy: HaltingPolicy[Any],
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
        for result in haltkit.run_queue(lambda x: x / 2 + 1, states, haltkit.policy("norm:tau=1e-3"), slots=16):
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
        policy: judges rows, or instances (``granularity=sequence``); these are retired once all their rows have halted.
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
        ValueError: ``slots`` or ``max_steps`` below 1, ``ahead`` below ``slots``, a policy that pools over a batch or
            world, a body with a memory that cannot take new items; while results are drawn: an item that is none or of
            another shape than the first (with its number), a body that changes the state's shape or dtype, a policy
            that cannot take a step number per row.
    """
    granularity = granularity_of(policy)
    if slots < 1:
        raise ValueError(f"slots={slots}: a queue needs at least 1 slot")
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps}: a loop takes at least 1 step")
    ahead = 8 * slots if ahead is None else ahead
    if ahead < slots:
        raise ValueError(f"ahead={ahead} would not fill the {slots} slots: it must be at least slots")
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
    batch = Slots(body, policy, max_steps, readout, keep)
    return _results(batch, iter(items), prepare, slots, ahead if ordered else None)


def _results(
    batch: Slots, source: Iterator[Any], prepare: Callable[[Any], Any] | None, slots: int, ahead: int | None
) -> Iterator[QueueResult]:
    """Admit, step, hand out; ``ahead`` None: in any order."""
    waiting: dict[int, QueueResult] = {}  # completed and not handed out, by the item's number
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
                    absent = torch.tensor(Outcome.ABSENT, dtype=torch.int8)
                    waiting[read] = QueueResult(read, torch.empty(0), torch.tensor(0), absent, error)
                read, room = read + 1, room - 1
            with torch.no_grad():  # never across a yield
                batch.admit(admitted)
                waiting.update((result.index, result) for result in batch.step())
            while waiting and (ahead is None or due in waiting):
                index = due if ahead is not None else next(iter(waiting))
                due += 1
                yield waiting.pop(index)
            if exhausted and not batch.running:
                return
    finally:
        batch.clear()
