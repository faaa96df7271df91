"""Rows that are retired: a body's modules no longer compute the halted entries of the batch.

A module is given the remaining entries alone, and its outputs are put back among the last outputs of the others. It
is not known beforehand which dimension of an argument or output is the batch. So it is tried: a module is run on two
entries, and must give the same two rows that it gives of the whole batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from haltkit.attachment.errors import BatchNotFound, RowsMeet
from haltkit.attachment.outputs import map_tensors, mapped_tensors

__all__ = ["BodyCall", "Retiring"]

TRIALS = 32  # combinations of dimensions that are tried for one module
Axes = tuple["int | None", ...]  # the batch dimension of each tensor; None: it has no batch and is shared


@dataclass(frozen=True)
class BodyCall:
    """One call of a body's module.

    Attributes:
        name: path of the module.
        place: number of this call in the iteration; one module may be called several times.
        forward: what to call.
        args, kwargs: what it is given, for the whole batch.
        state_of: from its output to the state, if this module's output is the state; else None.
    """

    name: str
    place: int
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state_of: Callable[[Any], Tensor] | None = None

    def on(self, rows: Tensor, axes: Axes) -> Any:
        """The output for some entries of the batch."""
        args, kwargs = _gathered((self.args, self.kwargs), axes, rows)
        return self.forward(*args, **kwargs)

    @property
    def shape(self) -> tuple[int, ...]:
        """How many dimensions each tensor argument has: which a proof is valid for."""
        return tuple(t.ndim for t in mapped_tensors((self.args, self.kwargs)))


@dataclass(frozen=True)
class _Proven:
    """The batch dimensions of a call's arguments and outputs."""

    given: Axes
    returned: Axes


class Retiring:
    """What is known about the batch dimensions of one loop's modules. It lasts as long as the session."""

    def __init__(self, modules: dict[str, nn.Module], trying: Callable[[], AbstractContextManager[None]]) -> None:
        """``modules``: of the body, by path. ``trying``: calls inside it are no part of any loop."""
        self._norms = [
            (f"{path}.{inner}".rstrip("."), module)
            for path, body in modules.items()
            for inner, module in body.named_modules()
            if isinstance(module, _BatchNorm)
        ]
        self._trying = trying
        self._proven: dict[tuple[str, int, tuple[int, ...]], _Proven] = {}

    def refuse_training(self) -> None:
        """See that no batch norm takes its statistics from the batch.

        Raises:
            RowsMeet: one does.
        """
        for path, module in self._norms:
            if module.training or not module.track_running_stats:
                raise RowsMeet(
                    f"execution='compact': {path!r} is a batch norm that takes its statistics from the batch, so rows "
                    "that leave would change the others. Call model.eval(), or use execution='masked'"
                )

    def call(self, call: BodyCall, present: Tensor, batch: int, before: Any) -> Any:
        """The output for the whole batch, of which only the entries ``present`` are computed.

        Args:
            call: the call.
            present: indices of the entries that are still running, ascending.
            batch: entries in all.
            before: this call's output in the iteration before, which retired entries keep; unused if none is retired.

        Raises:
            BatchNotFound: no argument has a dimension as large as the batch.
            RowsMeet: the module gives entries other rows when it is given others beside them.
        """
        key = (call.name, call.place, call.shape)
        proven = self._proven.get(key)
        if proven is not None:
            computed = (
                call.on(present, proven.given) if len(present) < batch else call.forward(*call.args, **call.kwargs)
            )
        else:
            output = call.forward(*call.args, **call.kwargs)
            if batch == 1:
                return output
            proven = self._prove(call, output, batch)
            if _telling(output, proven.returned):  # equal rows prove nothing
                self._proven[key] = proven
            computed = output if len(present) == batch else _gathered(output, proven.returned, present)
        return computed if len(present) == batch else _scattered(computed, proven.returned, present, before)

    def _prove(self, call: BodyCall, output: Any, batch: int) -> _Proven:
        """Find the batch dimensions by running the module on the last and the first entry."""
        given = mapped_tensors((call.args, call.kwargs))
        few = [batch - 1, 0] if batch > 2 else [1]
        rows = torch.tensor(few, device=given[0].device if given else None)
        options = [[*(d for d, size in enumerate(t.shape) if size == batch), None] for t in given]
        for axes in itertools.islice(itertools.product(*options), TRIALS):
            try:
                with torch.no_grad(), self._trying():
                    some = call.on(rows, axes)
            except Exception:  # whatever a module says to shapes that do not fit together: these axes are not it
                continue
            returned = _matching(some, output, rows, batch)
            if returned is None:
                continue
            if call.state_of is None or _same_rows(call.state_of(some), call.state_of(output), 0, rows):
                return _Proven(axes, returned)
        if all(option == [None] for option in options):
            raise BatchNotFound(
                f"execution='compact': no tensor that {call.name!r} is given has a dimension of {batch}, the batch, so "
                "entries cannot leave it. Describe the loop by modules that are given the batch as a dimension of its "
                "own, or use execution='masked'"
            )
        raise RowsMeet(
            f"execution='compact': {call.name!r} gives entries {few} of the batch other rows when they are alone, so "
            "rows see each other there (attention or a norm across the batch), the batch is not the state's first "
            "dimension, or the module is random (call model.eval()). Use execution='masked'"
        )


def _gathered(value: Any, axes: Sequence[int | None], rows: Tensor) -> Any:
    """A value with some entries of the batch."""
    axis_of = iter(axes)

    def some(tensor: Tensor) -> Tensor:
        axis = next(axis_of)
        return tensor if axis is None else tensor.index_select(axis, rows)

    return map_tensors(some, value)


def _scattered(value: Any, axes: Sequence[int | None], rows: Tensor, whole: Any) -> Any:
    """``whole`` with the entries ``rows`` of the batch from ``value``."""
    pairs = zip(axes, mapped_tensors(whole), strict=True)

    def all_rows(tensor: Tensor) -> Tensor:
        axis, old = next(pairs)
        return tensor if axis is None else old.index_copy(axis, rows, tensor)

    return map_tensors(all_rows, value)


def _matching(some: Any, output: Any, rows: Tensor, batch: int) -> Axes | None:
    """The dimension of each tensor of an output that is the batch, if the rows computed alone are right."""
    alone, whole = mapped_tensors(some), mapped_tensors(output)
    if len(alone) != len(whole):
        return None
    found: list[int | None] = []
    for few, full in zip(alone, whole, strict=True):
        axis = next((d for d, size in enumerate(full.shape) if size == batch and _same_rows(few, full, d, rows)), None)
        if axis is None and not _close(few, full):
            return None
        found.append(axis)
    return tuple(found)


def _same_rows(few: Tensor, full: Tensor, axis: int, rows: Tensor) -> bool:
    return axis < full.ndim and _close(few, full.index_select(axis, rows))


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal up to the rounding of products of other sizes, relative to the largest value; NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = one.detach(), other.detach()
    if not one.is_floating_point():
        return torch.equal(one, other)
    finite = other[other.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    tolerance = min(128 * torch.finfo(one.dtype).eps, 0.03) * largest
    return torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)


def _telling(output: Any, axes: Axes) -> bool:
    """Whether the rows of an output differ, so that a comparison of them could have failed."""
    whole = mapped_tensors(output)
    return all(axis is None for axis in axes) or any(
        axis is not None and not torch.equal(tensor.select(axis, 0), tensor.select(axis, -1))
        for axis, tensor in zip(axes, whole, strict=True)
    )
