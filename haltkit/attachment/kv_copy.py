"""``kv="copy"``: skipped iterations write the keys and values of the last one that was computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from haltkit.attachment.caches import contents
from haltkit.attachment.errors import KVDepthMismatch
from haltkit.attachment.strides import Strides

__all__ = ["Copying"]

LAYER = 2  # update(keys, values, layer, ...) in every cache of the Hugging Face kind
Call = tuple[tuple[Any, ...], dict[str, Any]]


class Copying:
    """The updates of one cache during one call of the scope."""

    def __init__(self, cache: Any, strides: Strides) -> None:
        self.cache, self.strides = cache, strides
        self._own_update = vars(cache).get("update")  # as the instance had it, if it had one of its own
        self._update = cache.update
        self._iterations: list[list[Call]] = [[]]
        self._contents = contents(cache)
        self._inside = True
        cache.update = self._noting

    def call_begins(self) -> None:
        """A body module is called: what is written now belongs to the iteration.

        Raises:
            KVDepthMismatch: the loop wrote states beside keys and values since the one before.
        """
        self._check()
        self._inside = True

    def call_ends(self) -> None:
        """It has returned: layers around the loop may write into the cache as they like.

        Raises:
            KVDepthMismatch: it wrote states beside keys and values.
        """
        self._check()
        self.rests()

    def rests(self) -> None:
        """No body module is running: what is written belongs to no iteration."""
        self._inside = False

    def _noting(self, *args: Any, **kwargs: Any) -> Any:
        if not self._inside:  # a layer around the loop, or of a loop around it
            known = contents(self.cache) == self._contents
            result = self._update(*args, **kwargs)
            self._contents = contents(self.cache) if known else self._contents
            return result
        self._check()
        kept = tuple(a.clone() if i == LAYER and isinstance(a, Tensor) else a for i, a in enumerate(args))
        self._iterations[-1].append((kept, kwargs))
        result = self._update(*args, **kwargs)
        self._contents = contents(self.cache)
        return result

    def _check(self) -> None:
        """Raise if something was written into the cache past its update method.

        Raises:
            KVDepthMismatch: states beside keys and values.
        """
        if contents(self.cache) != self._contents:
            raise KVDepthMismatch(
                "kv='copy' repeats keys and values, and this cache keeps other states beside them (such as a short "
                "convolution's), which skipped iterations would not fill: use kv='freeze' or 'uniform'"
            )

    def begins(self) -> None:
        """An iteration begins."""
        if self._iterations[-1]:
            self._iterations.append([])

    @torch.no_grad()
    def skipped(self, number: int) -> None:
        """The ``number``-th iteration after the halt (from 1) was skipped: write its slots."""
        iterations = [calls for calls in self._iterations if calls]
        stride = self.strides.of(self._slots())
        for args, kwargs in iterations[-1] if iterations else []:
            moved = [a + number * stride if i == LAYER else a for i, a in enumerate(args)]
            if "layer_idx" in kwargs:
                kwargs = {**kwargs, "layer_idx": kwargs["layer_idx"] + number * stride}
            self._update(*moved, **kwargs)
        self._contents = contents(self.cache)

    def _slots(self) -> list[list[int]]:
        return [[_slot(call) for call in calls] for calls in self._iterations if calls]

    def release(self) -> None:
        """Leave the cache as it was found."""
        self.strides.learn(self._slots())
        if self._own_update is None:
            vars(self.cache).pop("update", None)
        else:
            self.cache.update = self._own_update


def _slot(call: Call) -> int:
    args, kwargs = call
    return int(args[LAYER] if len(args) > LAYER else kwargs["layer_idx"])
