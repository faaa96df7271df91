"""KV caches and loops that do not always run to the same depth.

A body that writes keys and values at every iteration into slots of their own leaves the slots of skipped iterations
empty. If the depth then differs between calls with one cache (tokens of a generation), later and deeper tokens attend
to a context with holes, and nothing complains. So it is refused, unless one says what is meant.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from haltkit.attachment.errors import KVDepthMismatch

__all__ = ["CacheBook", "CacheUse", "KVMode"]

# refuse: an error where depth differs. uniform: the first call with a cache decides the depth of all later ones.
# freeze: the body goes on running with the halted state, so that every slot is written. copy: skipped iterations write
# the last one's keys and values.
KVMode = Literal["refuse", "uniform", "freeze", "copy"]
KV_MODES: tuple[KVMode, ...] = ("refuse", "uniform", "freeze", "copy")
REMEMBERED = 64  # caches; dictionaries among them are kept alive for it
LAYER = 2  # update(keys, values, layer, ...) in every cache of the Hugging Face kind


def _is_cache(value: Any) -> bool:
    """A cache of the Hugging Face kind."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


def _contents(value: Any) -> dict[Any, Any]:
    """The shapes of the tensors in a dictionary, also of one inside a dictionary."""
    found: dict[Any, Any] = {}
    for key, item in value.items():
        if isinstance(item, Tensor):
            found[key] = tuple(item.shape)
        elif isinstance(item, dict):
            found[key] = _contents(item)
    return found


def _reference(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:  # a plain dictionary
        return lambda: value


@dataclass
class CacheBook:
    """What a session knows of the caches it has met: the depth that each was filled to."""

    mode: KVMode = "refuse"
    stride: int | None = None
    _depths: list[tuple[Callable[[], Any], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in KV_MODES:
            raise ValueError(f"kv={self.mode!r}: allowed are {', '.join(KV_MODES)}")
        if self.stride is not None and self.mode != "copy":
            raise ValueError(f"kv_stride={self.stride} is for kv='copy', not for kv={self.mode!r}")

    def depth(self, cache: Any) -> int | None:
        """How deep an earlier call filled this cache."""
        return next((depth for found, depth in self._depths if found() is cache), None)

    def remember(self, cache: Any, depth: int) -> None:
        """Note how deep a call filled a cache, unless that is known."""
        self._depths = [(found, d) for found, d in self._depths if found() is not None][-REMEMBERED:]
        if self.depth(cache) is None:
            self._depths.append((_reference(cache), depth))


class CacheUse:
    """One call of the scope and the cache that its body modules are given, if any."""

    def __init__(self, book: CacheBook) -> None:
        self.book = book
        self.cache: Any = None
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []  # arguments, and what they held at first
        self._own_update: Any = None  # update as the instance had it, if it had one of its own
        self._previous: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._last: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._current: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @property
    def runs_on(self) -> bool:
        """The body must go on running after the halt, to fill the cache."""
        return self.cache is not None and self.book.mode == "freeze"

    @property
    def fixed_depth(self) -> int | None:
        """The depth that an earlier call with this cache has settled."""
        return self.book.depth(self.cache) if self.cache is not None and self.book.mode == "uniform" else None

    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look for a cache among a body module's arguments."""
        if self.cache is not None:
            return
        given = [*args, *kwargs.values()]
        for value in (*given, *(part for v in given if isinstance(v, (list, tuple)) for part in v)):
            if _is_cache(value) or (isinstance(value, dict) and self.book.depth(value) is not None):
                self._found(value)
                return
            if isinstance(value, dict) and not any(value is known for known, _ in self._dicts):
                self._dicts.append((value, _contents(value)))

    def look_again(self) -> None:
        """After an iteration: a dictionary that tensors were put into, or that grew, is a cache."""
        if self.cache is None:
            grown = next((d for d, before in self._dicts if _contents(d) != before), None)
            if grown is not None:
                self._found(grown)

    def _found(self, cache: Any) -> None:
        self.cache = cache
        if self.book.mode == "copy":
            if isinstance(cache, dict):
                raise KVDepthMismatch(
                    "kv='copy' writes skipped iterations through the cache's update method, which a dictionary does "
                    "not have in that sense: use kv='freeze' or 'uniform'"
                )
            self._own_update = vars(cache).get("update")
            original = cache.update

            def update(*args: Any, **kwargs: Any) -> Any:
                kept = tuple(a.clone() if i == LAYER and isinstance(a, Tensor) else a for i, a in enumerate(args))
                self._current.append((kept, kwargs))
                return original(*args, **kwargs)

            self._original = original
            cache.update = update

    def release(self) -> None:
        """Leave the cache as it was found."""
        if self.cache is not None and self.book.mode == "copy" and not isinstance(self.cache, dict):
            if self._own_update is None:
                vars(self.cache).pop("update", None)
            else:
                self.cache.update = self._own_update

    # --- told by the frame

    def begins(self) -> None:
        """A computed iteration is complete, or the first one begins."""
        self._previous, self._last, self._current = self._last, self._current, []

    def computed(self, depth: int, ending: bool) -> None:
        """The loop has reached ``depth``; ``ending`` says that it stops there.

        Raises:
            KVDepthMismatch: an earlier call with this cache ran another number of iterations.
        """
        if self.cache is None or self.book.mode not in ("refuse", "uniform"):
            return
        earlier = self.book.depth(self.cache)
        if earlier is not None and (depth > earlier or (ending and depth != earlier)):
            raise KVDepthMismatch(
                f"this KV cache was filled at {earlier} iterations and this call would leave it at {depth}: later "
                "tokens would miss keys and values of the deeper steps. Say kv='uniform' (one depth for all calls with "
                "a cache), 'freeze' (fills every slot, saves nothing) or 'copy' (repeats the last keys and values, an "
                "approximation)"
            )
        if ending:
            self.book.remember(self.cache, depth)

    @torch.no_grad()
    def skipped(self, number: int) -> None:
        """The ``number``-th iteration after the halt (from 1) was skipped: under ``copy``, write its slots."""
        if self.cache is None or self.book.mode != "copy":
            return
        stride = self._stride()
        for args, kwargs in self._last:
            moved = [a + number * stride if i == LAYER else a for i, a in enumerate(args)]
            if "layer_idx" in kwargs:
                kwargs = {**kwargs, "layer_idx": kwargs["layer_idx"] + number * stride}
            self._original(*moved, **kwargs)

    def _stride(self) -> int:
        """From an iteration's slots to the next one's."""
        if self.book.stride is not None:
            return self.book.stride
        found = {b - a for a, b in zip(self._layers(self._previous), self._layers(self._last), strict=False)}
        if len(self._previous) != len(self._last) or len(found) != 1:
            raise KVDepthMismatch(
                "kv='copy' needs to know how far an iteration's cache slots are from those of the one before, which "
                f"takes two iterations and equal distances (seen: {sorted(found) or 'one iteration'}): say kv_stride="
            )
        return found.pop()

    @staticmethod
    def _layers(calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> Iterator[int]:
        for args, kwargs in calls:
            yield int(args[LAYER] if len(args) > LAYER else kwargs["layer_idx"])
