"""Recognising key-value caches, and remembering with each how deep it was filled.

A cache is an object of the Hugging Face kind; a dictionary, a list, a tensor or an object of a package's own that a
body module changes; or tensors that a body module returned beside its state in one call of the model and is given in
another. What is known of a cache is kept with the cache, so that another session knows it too.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment.outputs import writes_of
from haltkit.attachment.strides import Strides

__all__ = [
    "LEAST_DIMENSIONS",
    "MEMORY",
    "Memory",
    "Turn",
    "Witness",
    "candidates",
    "contents",
    "fingerprint",
    "grown",
    "is_cache",
    "named_tensors",
]

LEAST_DIMENSIONS = 4  # of a tensor that is a cache, with those for heads or layers: a state has fewer
REMEMBERED = 64  # dictionaries and lists, which this keeps in memory
DEPTH = 5  # how far objects inside objects are looked into


def is_cache(value: Any) -> bool:
    """A cache of the Hugging Face kind."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def size(value: Any) -> int:
    """The size of a cache: its length where it knows that, else its count of numbers."""
    if is_cache(value):
        return int(value.get_seq_length())
    return sum(math.prod(shape) for shape, _ in contents(value).values())


def candidates(given: list[Any]) -> Iterator[Any]:
    """The values among a module's arguments, also inside tuples and lists of them, that might be a cache."""
    for value in given:
        if isinstance(value, Tensor):
            if value.ndim >= LEAST_DIMENSIONS:
                yield value
        elif isinstance(value, (dict, list)) or is_cache(value) or (hasattr(value, "__dict__") and not _passive(value)):
            yield value
        if isinstance(value, (tuple, list)):
            yield from candidates([part for part in value if not isinstance(part, Tensor)])


def named_tensors(value: Any) -> Iterator[Tensor]:
    """A tensor, or those that a dictionary or dataclass has under names of their own: inputs, not one slot per step."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from named_tensors(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from named_tensors(getattr(value, entry.name))


def _passive(value: Any) -> bool:
    return isinstance(value, (nn.Module, type)) or callable(value)


def contents(value: Any, depth: int = DEPTH) -> dict[Any, Any]:
    """What the tensors inside an object are at present: shape, and how often written where that is counted."""
    return {path: (tuple(tensor.shape), writes_of(tensor)) for path, tensor in _inside(value, depth).items()}


def fingerprint(value: Any) -> dict[Any, Any]:
    """As :func:`contents`; of inference tensors, whose writes are not counted, the sum of what they hold as text."""
    return {
        path: (tuple(tensor.shape), _sum(tensor) if writes is None else writes)
        for path, tensor in _inside(value).items()
        for writes in [writes_of(tensor)]
    }


def _sum(tensor: Tensor) -> str:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return str(real.sum(dtype=torch.float32).item())  # NaN as text equals itself


class Witness:
    """A cache as it is now, to see later whether it has been written."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self._before = [(tensor, writes_of(tensor)) for tensor in _inside(cache).values()]
        self._length = 0 if self._before else size(cache)  # all that is seen of one whose tensors are hidden

    @property
    def written(self) -> bool:
        """It was written, or may have been: writes into the memory of an inference tensor are not counted."""
        now = list(_inside(self.cache).values())
        if len(now) != len(self._before) or (not now and size(self.cache) != self._length):
            return True
        for tensor, (before, writes) in zip(now, self._before, strict=True):
            if tensor is not before or writes_of(tensor) != writes:
                return True
        in_place = getattr(self.cache, "is_compileable", True)  # transformers' name for caches of a fixed size
        return bool(in_place) and any(writes is None for _, writes in self._before)


def _inside(value: Any, depth: int = DEPTH) -> dict[Any, Tensor]:
    """The tensors inside an object, by where they are."""
    if isinstance(value, Tensor):
        return {(): value}
    if depth == 0 or _passive(value):
        return {}
    if isinstance(value, dict):
        items: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, (list, tuple)):
        items = iter(enumerate(value))
    elif hasattr(value, "__dict__"):
        items = iter(vars(value).items())
    else:
        return {}
    return {(key, *rest): what for key, item in list(items) for rest, what in _inside(item, depth - 1).items()}


def grown(given: list[Tensor], returned: list[Tensor]) -> bool:
    """Whether something that was returned begins with something that was given, longer in one dimension."""
    return any(_begins_with(new, old) for old in given for new in returned)


def _begins_with(new: Tensor, old: Tensor) -> bool:
    if new.ndim != old.ndim or new.ndim < 3 or new.dtype != old.dtype or old.numel() == 0:
        return False
    longer = [i for i, (a, b) in enumerate(zip(new.shape, old.shape, strict=True)) if a != b]
    if len(longer) != 1 or new.shape[longer[0]] < old.shape[longer[0]]:
        return False
    return bool((new.narrow(longer[0], 0, old.shape[longer[0]]) == old).all())


@dataclass
class Turn:
    """One call of the scope, to which tensors that its body returned belong. ``depth``: known when it is over."""

    depth: int | None = None


@dataclass
class _Known:
    """What is remembered with one object."""

    reference: Callable[[], Any]
    depths: dict[Any, int] = field(default_factory=dict)  # by loop
    strides: dict[Any, Strides] = field(default_factory=dict)
    size: int = 0
    returned: tuple[Turn, int] | None = None  # in which call and iteration


class Memory:
    """What is known of caches, for as long as they exist."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._held: list[Any] = []

    def _find(self, value: Any) -> _Known | None:
        found = self._known.get(id(value))
        return found if found is not None and found.reference() is value else None

    def _of(self, value: Any) -> _Known:
        found = self._find(value)
        if found is None:
            key = id(value)
            try:
                reference: Callable[[], Any] = weakref.ref(value, lambda _: self._known.pop(key, None))
            except TypeError:  # a plain dictionary or list
                reference = _strong(value)
                self._held.append(value)
                if len(self._held) > REMEMBERED:
                    self._known.pop(id(self._held.pop(0)), None)
            found = self._known[key] = _Known(reference)
        return found

    def depth(self, cache: Any, loop: Any) -> int | None:
        """How deep an earlier call of a loop filled a cache; None also if it has been emptied since."""
        found = self._find(cache)
        if found is None or loop not in found.depths:
            return None
        if size(cache) < found.size:
            found.depths.clear()
        return found.depths.get(loop)

    def remember(self, cache: Any, loop: Any, depth: int) -> None:
        """Note how deep a call filled a cache, unless that is known, and its size now."""
        known = self._of(cache)
        known.depths.setdefault(loop, depth)
        known.size = size(cache)

    def strides(self, cache: Any, loop: Any) -> Strides:
        """What is known of the slots that a loop's iterations write."""
        return self._of(cache).strides.setdefault(loop, Strides())

    def returned(self, tensor: Tensor, turn: Turn, iteration: int) -> None:
        """A body module has returned a tensor beside its state."""
        known = self._of(tensor)
        if known.returned is None:
            known.returned = turn, iteration

    def filled(self, tensor: Tensor, turn: Turn, iteration: int) -> int | None:
        """How deep the call went that returned a tensor which this ``iteration`` of another call is given.

        None if no body returned it, or in another iteration: a cell's state that is handed on from call to call.
        """
        found = self._find(tensor)
        if found is None or found.returned is None or found.returned[0] is turn:
            return None
        earlier, at = found.returned
        if earlier.depth is None or at != min(iteration, earlier.depth):
            return None
        return earlier.depth if earlier.depth > 1 or iteration > 1 else None


def _strong(value: Any) -> Callable[[], Any]:
    return lambda: value


MEMORY = Memory()
