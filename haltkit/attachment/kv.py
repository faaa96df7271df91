"""KV caches and loops that do not always run to the same depth.

A body that writes keys and values at every iteration into slots of their own leaves the slots of skipped iterations
empty. If the depth then differs between calls with one cache (tokens of a generation), later and deeper tokens attend
to a context with holes, and nothing complains. So it is refused, unless one says what is meant.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from haltkit.attachment.caches import (
    LEAST_DIMENSIONS,
    MEMORY,
    Turn,
    Witness,
    candidates,
    fingerprint,
    grown,
    is_cache,
    named_tensors,
)
from haltkit.attachment.errors import KVDepthMismatch
from haltkit.attachment.kv_copy import Copying
from haltkit.attachment.outputs import tensors_in
from haltkit.attachment.strides import Strides

__all__ = ["CacheBook", "CacheUse", "KVMode"]

# refuse: an error where depth differs. uniform: the first call with a cache decides the depth of all later ones.
# freeze: the body goes on running with the halted state, so that every slot is written. copy: skipped iterations write
# the last one's keys and values.
KVMode = Literal["refuse", "uniform", "freeze", "copy"]
KV_MODES: tuple[KVMode, ...] = ("refuse", "uniform", "freeze", "copy")
# How deep the newest call went that returned keys and values, by the module whose output is the state: for tensors
# that were stacked or reordered on the way from one call to the next, and so cannot be told from others.
_newest: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


@dataclass
class CacheBook:
    """What a region does about caches.

    Attributes:
        mode: see :func:`haltkit.attach`.
        stride: of ``copy``, if given.
        state: the module whose output is the state; with the scope it tells the loops of one cache apart.
        scope: see :class:`~haltkit.attachment.description.Loop`.
        writes: the first iteration was seen to write into the cache that it was given.
    """

    mode: KVMode = "refuse"
    stride: int | None = None
    state: nn.Module | None = None
    scope: str = ""
    writes: bool = False

    def __post_init__(self) -> None:
        if self.mode not in KV_MODES:
            raise ValueError(f"kv={self.mode!r}: allowed are {', '.join(KV_MODES)}")
        if self.stride is not None and self.mode != "copy":
            raise ValueError(f"kv_stride={self.stride} is for kv='copy', not for kv={self.mode!r}")

    @property
    def loop(self) -> tuple[int, str]:
        """Which loop a depth belongs to, where several fill one cache."""
        return id(self.state), self.scope


class CacheUse:
    """One call of the scope, with what it was ``given``, and the caches that its body modules are given, if any."""

    def __init__(self, book: CacheBook, given: Sequence[Any] = ()) -> None:
        self.book, self._given = book, given
        self._storages: set[int] | None = None  # of the tensors that the scope was given
        self._named: set[int] = set()  # those of them that are no part of anything, and so no slots
        self._start: int | None = None  # where x_0 is
        # A cache object tells how deep it was filled: what is handed on as values needs no look (but see ``copy``).
        self._known = False
        self._slots: dict[int, set[int]] = {}  # place among a body's tensors to where in those it read
        self.caches: list[Any] = []
        self._harmless: dict[int, Any] = {}  # what holds no cache and cannot come to, by identity
        self._witness: Witness | None = None  # of a cache when the body was first given it
        self._earlier: int | None = None  # how deep an earlier call filled them
        self._looked: list[tuple[Any, dict[Any, Any]]] = []  # what may be a cache, and what it held at first
        self._returned = self._read = False  # keys and values as values
        self._turn = Turn()
        self._iteration = 0
        self._copying: Copying | None = None

    @property
    def in_use(self) -> bool:
        """The body reads a cache, as an object or as values."""
        return bool(self.caches) or self._read

    @property
    def runs_on(self) -> bool:
        """The body must go on running after the halt, to fill the cache."""
        return self.book.mode == "freeze" and (self.in_use or self._returned)

    @property
    def uniform(self) -> bool:
        """The first call with a cache decides the depth of all later ones."""
        return self.book.mode == "uniform"

    @property
    def fixed_depth(self) -> int | None:
        """The depth that an earlier call with this cache has settled."""
        return self._earlier if self.uniform else None

    # --- recognising caches

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A body module is about to be called: look for a cache among its arguments."""
        if self._copying is not None:
            self._copying.call_begins()
        for given in (*args, *kwargs.values()):
            if isinstance(given, Tensor) and given.ndim < LEAST_DIMENSIONS:
                continue
            if self._harmless.get(id(given), self) is given or any(given is found for found in self.caches):
                continue
            inside = list(candidates([given]))
            for value in inside:
                self._look_at(value)
            if not inside:  # most arguments are the same in every call
                self._harmless[id(given)] = given

    def _look_at(self, value: Any) -> None:
        if any(value is found for found in self.caches):
            return
        if is_cache(value) or MEMORY.depth(value, self.book.loop) is not None:
            self._found(value)
        elif self._iteration <= 1 and not any(value is known for known, _ in self._looked):
            self._looked.append((value, fingerprint(value)))

    def starts_at(self, x0: Tensor | None) -> None:
        """The loop begins at ``x0``, which the scope may have been given, and which is no cache."""
        self._start = None if x0 is None else x0.data_ptr()

    def begins(self) -> None:
        """An iteration begins."""
        self._iteration += 1
        if self._iteration == 2 and self._witness is not None and self._witness.written:
            self.book.writes, self._witness = True, None
        if self._iteration > 2:
            self._looked = []  # what two iterations left alone is not a cache
        if self._copying is not None:
            self._copying.begins()

    def reads(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A body module is called in this iteration: was it returned what it is given, by an earlier call?"""
        if self._read or self._known:
            return
        given = tensors_in([*args, *kwargs.values()])
        if self._returned and self._reads_slots(given):
            self._reads_values(self._newest)
            return
        for tensor in given:
            depth = MEMORY.filled(tensor, self._turn, self._iteration)
            if depth is not None:
                self._reads_values(depth)
                return

    def after(self, args: tuple[Any, ...], kwargs: dict[str, Any], beside: list[Tensor], state: Tensor | None) -> None:
        """A body module has returned ``beside`` beside the ``state``: what it changed, or made longer, is a cache."""
        if self._copying is not None:
            self._copying.call_ends()
        for value, before in list(self._looked):
            if fingerprint(value) != before:
                self._looked = [entry for entry in self._looked if entry[0] is not value]
                if not isinstance(value, Tensor) or state is None or value.shape != state.shape:
                    self._found(value)
        if self._known:
            return
        kept = [t for t in beside if t.ndim > 2]
        self._returned = self._returned or bool(kept)
        if kept and not self._read and self._iteration == 1:
            given = [t for t in tensors_in([*args, *kwargs.values()]) if t is not state]
            if grown(given, kept):
                self._reads_values(self._newest)
            else:
                self._reads_slots(given)
        for tensor in beside:
            MEMORY.returned(tensor, self._turn, self._iteration)

    @property
    def _newest(self) -> int | None:
        return None if self.book.state is None else _newest.get(self.book.state)

    def _reads_slots(self, given: list[Tensor]) -> bool:
        """Whether a body module reads, step by step, one part after the other of what the scope was given."""
        if self._storages is None:
            outside = [t for t in tensors_in(self._given) if t.ndim > 2]
            self._storages = {t.untyped_storage().data_ptr() for t in outside}
            self._named = {id(t) for value in self._given for t in named_tensors(value)}
        for place, tensor in enumerate(given):
            at = tensor.data_ptr()
            if (
                tensor.ndim > 2
                and id(tensor) not in self._named
                and at != self._start
                and tensor.untyped_storage().data_ptr() in self._storages
            ):
                self._slots.setdefault(place, set()).add(at)
        return any(len(read) > 1 for read in self._slots.values())

    def handed(self, beside: list[Tensor], depth: int) -> None:
        """The same once more, after the halt; under inference mode these are copies."""
        for tensor in beside:
            MEMORY.returned(tensor, self._turn, depth)

    def _reads_values(self, depth: int | None) -> None:
        self._read = True
        self._earlier = depth if self._earlier is None else self._earlier

    def _found(self, cache: Any) -> None:
        self.caches.append(cache)
        if is_cache(cache) and self._witness is None and not self.book.writes:
            self._witness = Witness(cache)
        self._known = self._known or (self.book.mode != "copy" and is_cache(cache))
        if self._earlier is None:
            self._earlier = MEMORY.depth(cache, self.book.loop)
        if self.book.mode != "copy":
            return
        if len(self.caches) > 1:
            raise KVDepthMismatch(
                "kv='copy' writes skipped iterations into one cache, and this loop has several (one for each "
                "iteration, perhaps): use kv='freeze' or 'uniform'"
            )
        if not is_cache(cache):
            raise KVDepthMismatch(
                "kv='copy' writes skipped iterations through the cache's update method, which a "
                f"{'dictionary' if isinstance(cache, dict) else type(cache).__name__} does not have in that sense: use "
                "kv='freeze' or 'uniform'"
            )
        strides = MEMORY.strides(cache, self.book.loop) if self.book.stride is None else Strides(self.book.stride)
        self._copying = Copying(cache, strides)

    def release(self) -> None:
        """Leave the cache as it was found."""
        if self._copying is not None:
            self._copying.release()

    # --- told by the frame

    def goes_on(self, number: int) -> None:
        """Iteration ``number`` is about to be computed.

        Raises:
            KVDepthMismatch: an earlier call did not get so far.
        """
        if self._earlier is not None and number > self._earlier and self.book.mode in ("refuse", "uniform"):
            self._mismatch(number)

    def ends(self, depth: int) -> None:
        """The loop stops at ``depth``.

        Raises:
            KVDepthMismatch: an earlier call with this cache ran another number of iterations.
        """
        self._turn.depth = depth
        if self._copying is not None:
            self._copying.rests()
        if depth == 1 and self._returned and self._slots and not self._read:  # one step cannot show that they differ
            self._reads_values(self._newest)
        if self._returned and self.book.state is not None:
            _newest[self.book.state] = depth
        if self.book.mode not in ("refuse", "uniform"):
            return
        if self._earlier is not None and depth != self._earlier:
            self._mismatch(depth)
        for cache in self.caches:
            MEMORY.remember(cache, self.book.loop, depth)

    def _mismatch(self, depth: int) -> None:
        raise KVDepthMismatch(
            f"this KV cache was filled at {self._earlier} iterations and this call would fill it at {depth}: later "
            "tokens would miss keys and values of the deeper steps. Say kv='uniform' (one depth for all calls with "
            "a cache), 'freeze' (fills every slot, saves nothing) or 'copy' (repeats the last keys and values, an "
            "approximation)"
        )

    def skipped(self, number: int) -> None:
        """The ``number``-th iteration after the halt (from 1) was skipped: under ``copy``, write its slots.

        Raises:
            KVDepthMismatch: keys and values are returned as values, or their slots are not known; or none of the
                iterations that were computed has written into the cache, so that one of those skipped may have to.
        """
        if number == 1 and self._witness is not None and not self._witness.written:
            raise KVDepthMismatch(
                f"the body is given a KV cache, and none of its {self._iteration} iterations before the halt wrote "
                "into it: where only a later one does (the last, perhaps), this call would leave no keys and values "
                "for later tokens. Say kv='freeze' (which saves nothing), or run without a cache"
            )
        if self.book.mode != "copy":
            return
        if self._returned or self._read:
            raise KVDepthMismatch(
                "kv='copy' writes skipped iterations through the cache's update method, and this model hands keys and "
                "values on as values: use kv='freeze' or 'uniform'"
            )
        if self._copying is not None:
            self._copying.skipped(number)
