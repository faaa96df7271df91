"""A queue over a foreign model: items run side by side, and their calls of the body's modules are made together.

The model's own code decides what happens between the calls, so each item runs the model in a thread of its own. Only
one thread runs at a time: an item that calls a module of the body waits until all the others do, then the module is
called once with all of their arguments. An item that has halted goes on to its end alone, which costs next to nothing,
and the next one takes its place.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from haltkit.attachment.axes import TRIALS, Axes, BatchNorms, BodyCall, Proven, close, telling
from haltkit.attachment.errors import AttachError, BatchNotFound, RowsMeet
from haltkit.attachment.lanes import Abandoned, Lane, present_lane, raising
from haltkit.attachment.outputs import map_tensors, mapped_tensors, structure_of, tensors_in
from haltkit.loop import LoopResult, Outcome

__all__ = ["Joining", "QueueOutput"]


@dataclass(frozen=True, eq=False)
class QueueOutput:
    """What came of one item of a queue over a model.

    Attributes:
        index: the item's number in the source, from 0.
        output: what the call returned; None with an ``error``.
        steps: steps of each row of the item's newest loop, ``(...)`` int64; empty if no loop ran.
        outcome: an :class:`~haltkit.Outcome` per row, ``(...)`` int8.
        error: the exception that this item's call raised, or None.
    """

    index: int
    output: Any
    steps: Tensor
    outcome: Tensor
    error: Exception | None = None


class Joining:
    """The items of one queue: :class:`haltkit.queue.Batch` for :func:`haltkit.queue.in_turn`."""

    def __init__(
        self,
        call: Callable[[Any], Any],
        norms: BatchNorms,
        trying: Callable[[], AbstractContextManager[None]],
        first: QueueOutput | None,
    ) -> None:
        """``call`` runs the model on one item. ``trying``: calls inside it are no part of any loop. ``first``: what
        the first item gives alone, for a comparison."""
        self._call, self._norms, self._trying, self._first = call, norms, trying, first
        self._lanes: list[Lane] = []
        self._ended: list[Lane] = []
        self._known: dict[Any, Proven] = {}
        self._beside = False  # another item has run while the first one did

    # --- for the queue

    @property
    def running(self) -> int:
        return len(self._lanes)

    def admit(self, items: list[tuple[int, Any]]) -> None:
        threads = torch.get_num_threads()
        for number, item in items:
            lane = Lane(number, lambda item=item: self._call(item))  # type: ignore[misc]
            self._lanes.append(lane)
            lane.begin()
            self._beside = self._beside or (len(self._lanes) > 1 and self._lanes[0].number == 0)
        if items:
            torch.set_num_threads(threads)  # for threads that others start later
        self._sort_out()

    def step(self) -> list[tuple[int, QueueOutput]]:
        self._turn([lane for lane in self._lanes if lane.call is not None])
        while inside := [lane for lane in self._lanes if lane.call is not None and lane.call.place]:
            self._turn(inside)
        ended, self._ended = self._ended, []
        return [(lane.number, self._result(lane)) for lane in ended]

    def clear(self) -> None:
        for lane in self._lanes:
            while not lane.ended:  # model code may catch it, and call the body once more
                lane.resume(raising(Abandoned()))
        self._lanes = []

    # --- for the frames

    @staticmethod
    def active() -> bool:
        """Whether the present thread runs an item of a queue."""
        return present_lane() is not None

    def compute(self, call: BodyCall) -> Any:
        """What a call gives, made together with those of other items."""
        lane = present_lane()
        assert lane is not None
        return lane.ask(call)

    @staticmethod
    def completed(result: LoopResult) -> None:
        """The present item's loop is over."""
        lane = present_lane()
        if lane is not None:
            lane.result = result

    # --- one turn

    def _turn(self, waiting: list[Lane]) -> None:
        """Make the calls that these items wait for, those alike together."""
        self._norms.refuse_training("a queue", "items that run side by side", "run them one by one")
        alike: dict[Any, list[Lane]] = defaultdict(list)
        for lane in waiting:
            assert lane.call is not None
            given = structure_of((lane.call.args, lane.call.kwargs))
            alike[lane.mode, lane.call.name, lane.call.place, given].append(lane)
        for key, lanes in alike.items():
            calls = [lane.call for lane in lanes if lane.call is not None]
            with key[0].again():
                replies = self._replies(key, calls)
            for lane, reply in zip(lanes, replies, strict=True):
                lane.resume(reply)
        self._sort_out()

    def _replies(self, key: Any, calls: list[BodyCall]) -> list[Callable[[], Any]]:
        if len(calls) > 1 and key in self._known:
            proven = self._known[key]
            joined = _joined(calls, proven.given)
            if joined is not None:
                try:
                    output = calls[0].forward(*joined[0], **joined[1])
                except Exception:  # one of the items is at fault: it shall be told, and the others go on
                    return [self._alone(call) for call in calls]
                return [lambda part=part: part for part in _parted(output, proven.returned, len(calls))]  # type: ignore[misc]
        replies = [self._alone(call) for call in calls]
        if len(calls) > 1 and key not in self._known:
            self._prove(key, calls, replies)
        return replies

    @staticmethod
    def _alone(call: BodyCall) -> Callable[[], Any]:
        try:
            output = call.forward(*call.args, **call.kwargs)
        except Exception as error:
            return raising(error)
        return lambda: output

    def _prove(self, key: Any, calls: list[BodyCall], replies: list[Callable[[], Any]]) -> None:
        """Find the dimensions along which two calls can be made one.

        Raises:
            BatchNotFound: nothing that they are given has a dimension.
            RowsMeet: there are none.
        """
        try:
            alone = [reply() for reply in replies[:2]]
        except Exception:  # that item is told by its own reply
            return
        first = mapped_tensors((calls[0].args, calls[0].kwargs))
        options = [[*(d for d, size in enumerate(t.shape) if size == (t.shape[0])), None] for t in first]
        for axes in itertools.islice(itertools.product(*options), TRIALS):
            joined = _joined(calls[:2], axes)
            if joined is None:
                continue
            try:
                with self._trying():
                    together = calls[0].forward(*joined[0], **joined[1])
            except Exception:  # whatever a module says to shapes that do not fit together: these axes are not it
                continue
            returned = _returned(together, alone)
            if returned is not None:
                if telling(together, returned):  # equal items prove nothing
                    self._known[key] = Proven(axes, returned)
                return
        if all(option == [None] for option in options):
            raise BatchNotFound(
                f"a queue: no tensor that {calls[0].name!r} is given has a dimension, so items cannot be computed "
                "together. Describe the loop by modules that are given the batch, or run the items one by one"
            )
        raise RowsMeet(
            f"a queue: {calls[0].name!r} gives two items something else when it is called with both at once, so rows "
            "see each other there (attention or a norm across the batch), an item is no batch of its own, or the "
            "module is random (call model.eval()). Run the items one by one"
        )

    # --- ends

    def _sort_out(self) -> None:
        self._ended += [lane for lane in self._lanes if lane.ended]
        self._lanes = [lane for lane in self._lanes if not lane.ended]

    def _result(self, lane: Lane) -> QueueOutput:
        """What came of an item.

        Raises:
            AttachError: the model cannot be halted as described.
        """
        if lane.error is not None and (isinstance(lane.error, AttachError) or not isinstance(lane.error, Exception)):
            raise lane.error
        steps, outcome = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int8)
        if lane.result is not None:
            steps, outcome = lane.result.steps, lane.result.outcome
        elif lane.error is not None:
            steps, outcome = torch.tensor(0), torch.tensor(Outcome.ABSENT, dtype=torch.int8)
        found = QueueOutput(lane.number, lane.output, steps, outcome, lane.error)
        if lane.number == 0 and self._first is not None and self._beside:
            _compare(found, self._first)
        return found


def _compare(found: QueueOutput, alone: QueueOutput) -> None:
    """An item must get what it gets alone.

    Raises:
        RowsMeet: it does not.
    """
    pairs = list(itertools.zip_longest(tensors_in(found.output), tensors_in(alone.output)))
    same = torch.equal(found.steps, alone.steps) and all(
        one is not None and other is not None and _near(one, other) for one, other in pairs
    )
    if not same:
        raise RowsMeet(
            "the first item of the queue gets another output or other steps when other items run beside it: the model "
            "keeps something of a call on itself, or draws random numbers (call model.eval(), fix its initial state)"
        )


def _near(one: Tensor, other: Tensor) -> bool:
    """Equal to half of the digits: rounding grows from step to step."""
    return close(one, other, torch.finfo(one.dtype).eps ** 0.5 if one.is_floating_point() else None)


def _joined(calls: list[BodyCall], axes: Axes) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of several calls as those of one; None if what they must share differs."""
    columns = zip(*(mapped_tensors((call.args, call.kwargs)) for call in calls), strict=True)
    made: list[Tensor] = []
    for axis, tensors in zip(axes, columns, strict=True):
        if axis is not None:
            made.append(torch.cat(tensors, axis))
        elif all(t is tensors[0] or torch.equal(t, tensors[0]) for t in tensors[1:]):
            made.append(tensors[0])
        else:
            return None
    given = iter(made)
    args, kwargs = map_tensors(lambda _: next(given), (calls[0].args, calls[0].kwargs))
    return args, kwargs


def _parted(output: Any, axes: Axes, count: int) -> list[Any]:
    """The outputs of several calls from that of one. They share no counter of writes, so each may be written to."""
    columns = [
        [tensor] * count if axis is None else list(torch.unsafe_chunk(tensor, count, axis))
        for axis, tensor in zip(axes, mapped_tensors(output), strict=True)
    ]
    parts = []
    for row in range(count):
        given = iter([column[row] for column in columns])
        parts.append(map_tensors(lambda _, given=given: next(given), output))  # type: ignore[misc]
    return parts


def _returned(together: Any, alone: list[Any]) -> Axes | None:
    """The dimension of each tensor of an output along which the items are, if these get what they get alone."""
    tensors, singles = mapped_tensors(together), [mapped_tensors(one) for one in alone]
    if any(len(single) != len(tensors) for single in singles):
        return None
    found: list[int | None] = []
    for whole, *each in zip(tensors, *singles, strict=True):
        axis = next((d for d in range(whole.ndim) if _is_split(whole, each, d)), None)
        if axis is None and not all(close(whole, one) for one in each):
            return None
        found.append(axis)
    return tuple(found)


def _is_split(whole: Tensor, each: list[Tensor], axis: int) -> bool:
    if whole.shape[axis] % len(each):
        return False
    parts = whole.chunk(len(each), axis)
    return len(parts) == len(each) and all(close(part, one) for part, one in zip(parts, each, strict=True))
