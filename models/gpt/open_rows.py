"""The attention of several open positions of one sequence that are at different steps of their loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from haltkit.models.gpt.cache import LayerCache

__all__ = ["OpenMemory", "OpenRows"]


class OpenRows:
    """The contiguous positions that a layer computes, ``first .. first + n - 1``, and the step that each takes.

    Attributes:
        bias: the causal mask to add to scores, ``(capacity, capacity)``.
        k: each row's own step, from 1; empty for layers that do not loop.
    """

    def __init__(self, bias: Tensor, width: int) -> None:
        self.bias, self.width = bias, width
        self.first = 0
        self.k: list[int] = []
        self.places: tuple[Tensor, Tensor] | None = None

    def at(self, first: int, k: Sequence[int] = ()) -> None:
        """The rows from ``first`` on, at these steps."""
        self.first, self.k, self.places = first, list(k), None

    def history_places(self) -> tuple[Tensor, Tensor]:
        """Where each row keeps this step's keys and values: slots and columns, ``(n,)`` each."""
        if self.places is None:
            rows = range(self.first, self.first + len(self.k))
            device = self.bias.device
            self.places = (
                torch.tensor([k - 1 for k in self.k], device=device),
                torch.tensor([row % self.width for row in rows], device=device),
            )
        return self.places


class OpenMemory:
    """One layer's attention for the open positions of one sequence.

    The cache's slots all contain the newest keys and values of an open position, so that a row reads one slot, as it
    stands. What the position computed at earlier steps waits in ``history``, ``(slots, width, 2D)``, until the commit.
    """

    def __init__(self, cache: LayerCache, rows: OpenRows, *, loops: bool) -> None:
        self.cache, self.rows = cache, rows
        self.indexed = loops and cache.layout.slots is None
        shape = (1, rows.width, cache.kv.shape[-1])
        self.history = cache.kv.new_zeros(shape) if self.indexed else None

    def attend(self, qkv: Tensor, n_head: int) -> Tensor:
        """What the rows read, ``(n, D)``, from their queries, keys and values, ``(n, 3D)``."""
        rows, cache, n, d = self.rows, self.cache, len(qkv), qkv.shape[-1] // 3
        end, new = rows.first + n, qkv[:, d:]
        if self.history is not None:
            deepest = max(rows.k)
            cache.deepen(deepest, end)
            if deepest > len(self.history):
                more = self.history.new_zeros(max(deepest, 2 * len(self.history)), *self.history.shape[1:])
                more[: len(self.history)] = self.history
                self.history = more
            self.history[rows.history_places()] = new
        cache.kv[: cache.filled, 0, rows.first : end] = new
        q = qkv[:, :d].view(n, n_head, -1)
        if not self.indexed:
            return self._read(q, 0, 0, n)
        slots = [min(k, cache.filled) - 1 for k in rows.k]
        parts, start = [], 0
        for row in range(1, n + 1):
            if row == n or slots[row] != slots[start]:
                parts.append(self._read(q, slots[start], start, row))
                start = row
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, q: Tensor, slot: int, start: int, stop: int) -> Tensor:
        """What rows ``start .. stop - 1`` read in a slot, ``(stop - start, D)``, from queries ``(n, H, D/H)``."""
        first, end = self.rows.first + start, self.rows.first + stop
        heads = q.shape[1]
        k, v = self.cache.kv[slot, 0, :end].view(end, 2, heads, -1).permute(1, 2, 0, 3).unsqueeze(1)
        mask = self.rows.bias[first:end, :end] if stop - start > 1 else None
        y = F.scaled_dot_product_attention(q[start:stop].transpose(0, 1).unsqueeze(0), k, v, attn_mask=mask)
        return y[0].transpose(0, 1).reshape(stop - start, -1)

    def commit(self, position: int, steps: int) -> None:
        """A position took ``steps`` and is final: earlier steps get their own keys and values back."""
        if self.history is not None:
            self.cache.kv[: steps - 1, 0, position] = self.history[: steps - 1, position % self.rows.width]
