"""The KV cache of a looped model: tokens that halted at different depths, read at any depth.

In a looped layer a token has keys and values of each step it took, and a later token at step ``k`` wants those of
step ``min(k, K_j)``. A *layout* says which of them are kept:

=================  ==================================================================================================
``depth-indexed``  all: exact. A slot for every step up to the deepest so far; a token fills the slots beyond its own
                   last step with that step's.
``last``           those of the last step ``K_j`` alone: the cache of a model without loops. A token at step ``k``
                   reads what others had computed *after* they halted, not at step ``k``.
``modulo:M``       ``M`` slots, step ``k`` in slot ``(k - 1) mod M``, the newest step winning: the KV-cache sharing of
                   arXiv 2502.05171 (section 6.2). A token at step ``k`` reads the newest step of the same residue.
=================  ==================================================================================================

The last two are other functions, near the exact one where keys change little from step to step. While a prompt is
read, a region's keys and values of every step are kept until the region ends, whatever the layout.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from haltkit import signals
from haltkit.models.gpt.memory import RowMemory

__all__ = ["CacheMemory", "DecodeRows", "LayerCache", "Layout", "NewRows", "parse_layout"]

R = TypeVar("R", bound="NewRows")


@dataclass(frozen=True)
class Layout:
    """Which steps' keys and values are kept. ``slots`` None: all of them, which is exact."""

    name: str
    slots: int | None

    def slot(self, k: int) -> int:
        """Where step ``k``, from 1, is written and read."""
        return k - 1 if self.slots is None else (k - 1) % self.slots

    def within(self, steps: int) -> Layout:
        """The same for loops of at most this many steps, without slots that they do not reach."""
        return self if self.slots is None else replace(self, slots=min(self.slots, steps))


def parse_layout(name: str) -> Layout:
    """A layout by its name.

    Raises:
        ValueError: an unknown one, or a number of slots below 1.
    """
    if name == "depth-indexed":
        return Layout(name, None)
    if name == "last":
        return Layout(name, 1)
    kind, _, number = name.partition(":")
    if kind == "modulo" and number.isdecimal() and int(number) >= 1:
        return Layout(name, int(number))
    raise ValueError(f"unknown layout {name!r}; known: depth-indexed (exact), last, modulo:M with M of 1 or more")


class LayerCache:
    """Keys and values of one layer, side by side: ``(slots, B, positions, 2D)``."""

    def __init__(self, layout: Layout, batch: int, capacity: int, width: int, like: Tensor) -> None:
        self.layout = layout
        self.filled = layout.slots or 1  # slots that have every token so far
        # Zeros, not whatever was in memory: a padded position is read with weight 0, and 0 * NaN is NaN.
        self.kv = like.new_zeros(self.filled, batch, capacity, width)

    def fill(self, history: Sequence[Tensor], steps: Tensor | None, length: int) -> None:
        """Keep what the layout keeps of a prompt.

        Args:
            history: keys and values after each step, ``(B * T, 2D)`` each.
            steps: ``K_j``, ``(B, T)``; None: nothing loops.
            length: ``T``.
        """
        batch, width = self.kv.shape[1], self.kv.shape[-1]
        if self.layout.slots is None:
            self._grow(len(history))
            self.filled = len(history)
            for slot, after in enumerate(history):
                self.kv[slot, :, :length] = after.view(batch, length, width)
            return
        if steps is None:
            self.kv[0, :, :length] = history[0].view(batch, length, width)
            return
        stacked = torch.stack(list(history)).view(len(history), batch, length, width)
        last = steps.clamp_min(1) - 1  # (B, T), from 0; padding takes no step and is never read
        for slot in range(self.layout.slots):
            newest = torch.where(last >= slot, last - (last - slot) % self.layout.slots, last)
            self.kv[slot, :, :length] = torch.take_along_dim(stacked, newest[None, :, :, None], 0)[0]

    def place(self, rows: Sequence[int], other: LayerCache) -> None:
        """Take the sequences of another cache, which may be shorter, in the place of these rows."""
        length, index = other.kv.shape[2], list(rows)
        self.deepen(other.filled, self.kv.shape[2])
        self.kv[:, index] = 0.0
        self.kv[: other.filled, index, :length] = other.kv[: other.filled]
        self.kv[other.filled : self.filled, index, :length] = other.kv[other.filled - 1]

    def _grow(self, slots: int) -> None:
        have = len(self.kv)
        if slots > have:
            more = self.kv.new_zeros(max(slots, 2 * have) - have, *self.kv.shape[1:])
            self.kv = torch.cat([self.kv, more])

    def deepen(self, k: int, end: int) -> None:
        """Room for step ``k`` of a cache that keeps all steps; the first ``end`` positions stay what they were."""
        if k > self.filled:
            self._grow(k)
            self.kv[self.filled : k, :, :end] = self.kv[self.filled - 1, :, :end]
            self.filled = k

    def write(self, rows: NewRows, new: Tensor) -> None:
        """Keep the new rows' keys and values of this step, ``(n, 2D)``, for those rows present that are active."""
        k, layout = rows.k, self.layout
        slot = layout.slot(k)
        if layout.slots is None:
            self.deepen(k, rows.end)
        # The slots of steps to come too: if the token halts here, this is what they contain.
        end = self.filled if layout.slots is None or k <= layout.slots else slot + 1
        where, new = rows.written(new)
        self.kv[(slice(slot, end), *where)] = new

    def nbytes(self, lengths: Sequence[int]) -> int:
        """Bytes in use for sequences of these lengths."""
        return self.filled * sum(lengths) * self.kv.shape[-1] * self.kv.element_size()


class NewRows(ABC):
    """Rows that are not in the cache yet, and which of them are present.

    Attributes:
        positions: of each, ``(n,)``.
        index: rows present, ``(m,)``; None: all. writers: of those, the active ones; None: all.
        end: one past the greatest position.
        guarded: something in the cache or in this step may not be finite.
        k: the step being taken.
    """

    def __init__(self, positions: Tensor, end: int, *, guarded: bool) -> None:
        self.positions, self.end, self.guarded = positions, end, guarded
        self.index: Tensor | None = None
        self.writers: Tensor | None = None
        self.k = 1
        self._mask: Tensor | None = None

    def all_present(self: R) -> R:
        """The same rows at the start of another loop."""
        again = copy(self)
        again.index, again.writers = None, None
        return again

    def select(self, kept: Tensor) -> None:
        self.index = kept if self.index is None else self.index[kept]
        self.writers = None

    def freeze(self, frozen: Tensor | None) -> None:
        self.writers = None
        if frozen is not None:
            count = len(self.positions) if self.index is None else len(self.index)
            active = torch.ones(count, dtype=torch.bool, device=frozen.device).index_fill_(0, frozen, False)
            self.writers = active.nonzero().squeeze(-1)

    @abstractmethod
    def written(self, new: Tensor) -> tuple[tuple[Any, Any], Tensor]:
        """Sequence and position of each active row, as indices, and those rows' entries of ``new``, ``(n, 2D)``."""

    @abstractmethod
    def memory(self, cache: LayerCache) -> RowMemory:
        """What one layer's attention reads and writes."""

    def _causal(self, like: Tensor) -> Tensor:
        """What hides the positions after each row's own, to add to scores, ``(n, end)``."""
        future = torch.arange(self.end, device=like.device) > self.positions.unsqueeze(-1)
        return torch.zeros(future.shape, dtype=like.dtype, device=like.device).masked_fill_(future, -math.inf)


class DecodeRows(NewRows):
    """The newest token of each of ``B`` sequences, at ``places``; ``place`` is the one of all, or None."""

    def __init__(self, places: Sequence[int], positions: Tensor, *, guarded: bool = False) -> None:
        super().__init__(positions, max(places) + 1, guarded=guarded)
        self.place = places[0] if min(places) == max(places) else None

    def written(self, new: Tensor) -> tuple[tuple[Any, Any], Tensor]:
        if self.place is not None and self.index is None and self.writers is None:
            return (slice(None), self.place), new
        sequence = torch.arange(len(new), device=new.device) if self.index is None else self.index
        if self.writers is not None:
            sequence, new = sequence[self.writers], new[self.writers]
        return (sequence, self.positions[sequence]), new

    def memory(self, cache: LayerCache) -> CacheMemory:
        return CacheMemory(cache, self)

    def mask(self, like: Tensor) -> Tensor | None:
        """What hides the positions after a sequence's own, ``(B, 1, 1, end)``; None if there are none."""
        if self.place is not None:
            return None
        if self._mask is None:
            self._mask = self._causal(like)[:, None, None, :]
        return self._mask


class CacheMemory:
    """One layer's attention while one new token of each sequence is computed."""

    def __init__(self, cache: LayerCache, rows: DecodeRows) -> None:
        self.cache, self.rows = cache, rows
        self.probe: Tensor | None = None

    def freeze(self) -> None:
        """Frozen rows do not write: there is nothing to remember."""

    def attend(self, qkv: Tensor, n_head: int) -> Tensor:
        """What the rows present read, ``(n, D)``, from their ``(n, 3D)`` and the cache."""
        rows, d = self.rows, qkv.shape[-1] // 3
        self.probe = qkv.sum()
        self.cache.write(rows, qkv[:, d:])
        kv = self.cache.kv[self.cache.layout.slot(rows.k), :, : rows.end]  # (B, T, 2D)
        mask, q, index = rows.mask(qkv), qkv[:, :d], rows.index
        batch = len(kv)
        gather = index is not None and 3 * len(index) <= batch  # beyond a third, reading all is cheaper than copying
        if index is not None and gather:
            kv, mask = kv.index_select(0, index), None if mask is None else mask.index_select(0, index)
        elif index is not None:
            q = q.new_zeros(batch, d).index_copy_(0, index, q)
        broken = None
        if rows.guarded:
            broken = ~signals.finite(kv)  # (B, T)
            kv = kv.masked_fill(broken.unsqueeze(-1), 0.0)
            hidden = torch.zeros(broken.shape, dtype=qkv.dtype, device=qkv.device).masked_fill_(broken, -math.inf)
            mask = hidden[:, None, None, :] if mask is None else mask + hidden[:, None, None, :]
        k, v = kv.view(*kv.shape[:2], 2, n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D/H)
        y = F.scaled_dot_product_attention(q.view(len(q), n_head, 1, -1), k, v, attn_mask=mask).view(len(q), d)
        if broken is not None:
            own = rows.positions if index is None or not gather else rows.positions[index]
            y = y.masked_fill(torch.take_along_dim(broken, own.unsqueeze(-1), 1), math.nan)
        return y if index is None or gather else y.index_select(0, index)
