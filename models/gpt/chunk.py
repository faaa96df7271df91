"""Several new positions of one sequence in one pass over its cache, each looping until its policy halts it.

The same function as adding them one by one: at step ``k`` a position reads those before it, cached or new, at their
step ``min(k, K_j)``. It is what verifies drafts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from haltkit import signals
from haltkit.models.gpt.cache import LayerCache, NewRows

__all__ = ["ChunkMemory", "ChunkRows"]


class ChunkRows(NewRows):
    """The new positions ``first .. first + count - 1`` of the only sequence."""

    def __init__(self, first: int, count: int, device: torch.device, *, guarded: bool = False) -> None:
        super().__init__(torch.arange(first, first + count, device=device), first + count, guarded=guarded)

    def present(self) -> Tensor:
        """Positions of the rows present, ``(m,)``."""
        return self.positions if self.index is None else self.positions[self.index]

    def written(self, new: Tensor) -> tuple[tuple[Any, Any], Tensor]:
        if self.index is None and self.writers is None:
            return (0, slice(self.end - len(new), self.end)), new
        positions = self.present()
        if self.writers is not None:
            positions, new = positions[self.writers], new[self.writers]
        return (0, positions), new

    def memory(self, cache: LayerCache) -> ChunkMemory:
        return ChunkMemory(cache, self)

    def mask(self, like: Tensor) -> Tensor:
        """The causal mask to add to scores, ``(m, end)``."""
        if self._mask is None:
            self._mask = self._causal(like)
        return self._mask if self.index is None else self._mask[self.index]


class ChunkMemory:
    """One layer's attention while several new positions of one sequence are computed."""

    def __init__(self, cache: LayerCache, rows: ChunkRows) -> None:
        self.cache, self.rows = cache, rows
        self.probe: Tensor | None = None

    def freeze(self) -> None:
        """Frozen rows do not write: there is nothing to remember."""

    def attend(self, qkv: Tensor, n_head: int) -> Tensor:
        """What the rows present read, ``(m, D)``, from their ``(m, 3D)`` and the cache."""
        rows, d = self.rows, qkv.shape[-1] // 3
        self.probe = qkv.sum()
        self.cache.write(rows, qkv[:, d:])
        kv, mask = self.cache.kv[self.cache.layout.slot(rows.k), 0, : rows.end], rows.mask(qkv)  # (T, 2D), (m, T)
        broken = None
        if rows.guarded:
            broken = ~signals.finite(kv)
            kv = kv.masked_fill(broken.unsqueeze(-1), 0.0)
            mask = mask.masked_fill(broken, -math.inf)
        q = qkv[:, :d].view(len(qkv), n_head, -1).transpose(0, 1)  # (H, m, D/H)
        k, v = kv.view(len(kv), 2, n_head, -1).permute(1, 2, 0, 3)
        y = F.scaled_dot_product_attention(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), attn_mask=mask)
        y = y[0].transpose(0, 1).reshape(len(qkv), d)
        return y if broken is None else y.masked_fill(broken[rows.present()].unsqueeze(-1), math.nan)
