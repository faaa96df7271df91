"""The tensors inside what a module is given or returns: alone, or in tuples, lists, dictionaries (and what their
``values()`` gives) and objects."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, ValuesView
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "disturbed",
    "first_tensor",
    "largest",
    "map_tensors",
    "mapped_tensors",
    "structure_of",
    "tensors_in",
    "with_first_tensor",
    "writes_of",
]


def first_tensor(output: Any) -> Tensor | None:
    """The tensor that an output is, or begins with, as a tuple or a dataclass; None if it does not."""
    if isinstance(output, Tensor):
        return output
    found = None
    if isinstance(output, tuple) and output:
        found = output[0]
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        found = getattr(output, dataclasses.fields(output)[0].name)
    return found if isinstance(found, Tensor) else None


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """The output, of the same type, with another :func:`first_tensor`."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple):
        parts = (tensor, *output[1:])
        return type(output)(*parts) if hasattr(output, "_fields") else parts
    return dataclasses.replace(output, **{dataclasses.fields(output)[0].name: tensor})


def writes_of(tensor: Tensor) -> int | None:
    """How often a tensor has been written to; None of an inference tensor, which does not count it."""
    return None if tensor.is_inference() else tensor._version


def largest(tensor: Tensor) -> float:
    """The largest finite number of a tensor in absolute terms, 0 without one: what a difference is held against."""
    finite = tensor[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def disturbed(tensor: Tensor) -> Tensor:
    """A tensor with noise of its own size, the same each time; one that is not of floating point as it is."""
    if not tensor.is_floating_point():
        return tensor
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
    return tensor + noise * (tensor.abs().mean() + 0.1)


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors inside a value, in order; of an object that is no container, those that are its attributes."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, (tuple, list, ValuesView)):
        return [t for part in output for t in tensors_in(part)]
    if isinstance(output, dict):
        return [t for part in output.values() for t in tensors_in(part)]
    if not hasattr(output, "__dict__"):
        return []
    nested = dataclasses.fields(output) if dataclasses.is_dataclass(output) and not isinstance(output, type) else ()
    inside = [t for field in nested for t in tensors_in(getattr(output, field.name))]
    names = {field.name for field in nested}
    return inside + [t for name, t in vars(output).items() if name not in names and isinstance(t, Tensor)]


def map_tensors(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Apply a function to the tensors of a value, keeping its structure."""
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, tuple):
        parts = [map_tensors(function, part) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else tuple(parts)
    if isinstance(output, list):
        return [map_tensors(function, part) for part in output]
    if isinstance(output, ValuesView):  # of a dictionary, which shows its own values alone
        return dict(enumerate(map_tensors(function, part) for part in output)).values()
    if isinstance(output, dict):
        changed: Any = copy.copy(output)
        for key, value in output.items():
            changed[key] = map_tensors(function, value)
        return changed
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        changed = copy.copy(output)
        for field in dataclasses.fields(output):
            object.__setattr__(changed, field.name, map_tensors(function, getattr(output, field.name)))
        return changed
    return output


def mapped_tensors(output: Any) -> list[Tensor]:
    """The tensors of a value that :func:`map_tensors` replaces, in its order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, output)
    return found


def structure_of(value: Any) -> Any:
    """What two values have in common whose tensors :func:`map_tensors` can put together: all but the tensors' numbers.

    It can be compared and hashed. An object that is no container is itself, and equal to nothing else.
    """
    if isinstance(value, Tensor):
        return Tensor, tuple(value.shape), value.dtype, value.device
    if isinstance(value, (tuple, list, ValuesView)):
        return type(value), *map(structure_of, value)
    if isinstance(value, dict):
        return type(value), *((key, structure_of(part)) for key, part in value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), *(structure_of(getattr(value, field.name)) for field in dataclasses.fields(value))
    plain = isinstance(value, (bool, int, float, str, type(None)))
    return type(value), value if plain else id(value)  # by type, for True equals 1
