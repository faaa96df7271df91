"""Which dimension of what a module is given and returns is the batch; found by trying and proved by comparing rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from haltkit.attachment.errors import RowsMeet
from haltkit.attachment.outputs import largest, map_tensors, mapped_tensors

__all__ = [
    "TRIALS",
    "Axes",
    "BatchNorms",
    "BodyCall",
    "Proven",
    "alike",
    "close",
    "gathered",
    "held",
    "matching",
    "same_rows",
    "scattered",
    "telling",
]

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
        args, kwargs = gathered((self.args, self.kwargs), axes, rows)
        return self.forward(*args, **kwargs)

    @property
    def shape(self) -> tuple[int, ...]:
        """How many dimensions each tensor argument has: which a proof is valid for."""
        return tuple(t.ndim for t in mapped_tensors((self.args, self.kwargs)))


@dataclass(frozen=True)
class Proven:
    """The batch dimensions of a call's arguments and outputs, and the shapes of those arguments."""

    given: Axes
    returned: Axes
    shapes: tuple[torch.Size, ...] = ()

    def fits(self, call: BodyCall, batch: int) -> bool:
        """Whether a call's arguments have the batch where it was proven to be, and nowhere else."""
        tensors = mapped_tensors((call.args, call.kwargs))
        return all(
            (batch not in t.shape or t.shape == shape) if axis is None else t.shape[axis] == batch
            for axis, t, shape in zip(self.given, tensors, self.shapes, strict=True)
        )


class BatchNorms:
    """The batch norms inside a body's modules, which let rows see each other in training."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._found = [
            (f"{path}.{inner}".rstrip("."), module)
            for path, body in modules.items()
            for inner, module in body.named_modules()
            if isinstance(module, _BatchNorm)
        ]

    @property
    def training(self) -> str:
        """The path of one that takes its statistics from the batch, or nothing."""
        return next((path for path, m in self._found if m.training or not m.track_running_stats), "")

    def refuse_training(self, where: str, who: str, instead: str) -> None:
        """See that none takes its statistics from the batch.

        Raises:
            RowsMeet: one does.
        """
        if path := self.training:
            raise RowsMeet(
                f"{where}: {path!r} is a batch norm that takes its statistics from the batch, so {who} would "
                f"change the others. Call model.eval(), or {instead}"
            )


def gathered(value: Any, axes: Sequence[int | None], rows: Tensor) -> Any:
    """A value with some entries of the batch."""
    axis_of = iter(axes)

    def some(tensor: Tensor) -> Tensor:
        axis = next(axis_of)
        return tensor if axis is None else tensor.index_select(axis, rows.to(tensor.device))

    return map_tensors(some, value)


def scattered(value: Any, axes: Sequence[int | None], rows: Tensor, whole: Any) -> Any:
    """``whole`` with the entries ``rows`` of the batch from ``value``."""
    pairs = zip(axes, mapped_tensors(whole), strict=True)

    def all_rows(tensor: Tensor) -> Tensor:
        axis, old = next(pairs)
        return tensor if axis is None else old.index_copy(axis, rows, tensor)

    return map_tensors(all_rows, value)


def held(value: Any, axes: Sequence[int | None], rows: Tensor, before: Any) -> Any:
    """``value`` for the entries ``rows`` of the batch, and ``before`` for the others."""
    return scattered(gathered(value, axes, rows), axes, rows, before)


def alike(one: Any, other: Any) -> bool:
    """Whether two values have tensors of the same shapes and types in the same places."""
    a, b = mapped_tensors(one), mapped_tensors(other)
    return [(t.shape, t.dtype) for t in a] == [(t.shape, t.dtype) for t in b]


def matching(some: Any, output: Any, rows: Tensor, batch: int) -> Axes | None:
    """The dimension of each tensor of an output that is the batch, if the rows computed alone are right."""
    alone, whole = mapped_tensors(some), mapped_tensors(output)
    if len(alone) != len(whole):
        return None
    found: list[int | None] = []
    for few, full in zip(alone, whole, strict=True):
        axis = next((d for d, size in enumerate(full.shape) if size == batch and same_rows(few, full, d, rows)), None)
        if axis is None and not close(few, full):
            return None
        found.append(axis)
    return tuple(found)


def same_rows(few: Tensor, full: Tensor, axis: int, rows: Tensor) -> bool:
    return axis < full.ndim and close(few, full.index_select(axis, rows))


def close(one: Tensor, other: Tensor, tolerance: float | None = None) -> bool:
    """Equal up to a share of the largest value, NaN equals NaN; None: the rounding of products of other sizes."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    one, other = one.detach(), other.detach()
    if not one.is_floating_point():
        return torch.equal(one, other)
    if tolerance is None:
        tolerance = min(128 * torch.finfo(one.dtype).eps, 0.03)
    return torch.allclose(one, other, rtol=0.0, atol=tolerance * largest(other), equal_nan=True)


def telling(output: Any, axes: Axes) -> bool:
    """Whether the rows of an output differ, so that a comparison of them could have failed."""
    whole = mapped_tensors(output)
    return all(axis is None for axis in axes) or any(
        axis is not None and tensor.numel() > 0 and not torch.equal(tensor.select(axis, 0), tensor.select(axis, -1))
        for axis, tensor in zip(axes, whole, strict=True)
    )
