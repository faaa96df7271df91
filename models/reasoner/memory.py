"""What a bidirectional layer remembers while it loops: the canonical semantics of :mod:`haltkit.models.gpt.memory`.

At step ``k`` a row attends to the keys and values of all rows ``j`` of its sequence, of step ``min(k, K_j)``. There
are no earlier rows here, so a row that is not finite is hidden from all others of its sequence; rows that are absent
(padding) are never seen.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from haltkit.models.gpt.layers import split_heads
from haltkit.models.gpt.memory import CompactMemory, MaskedMemory, Rows

__all__ = ["AllRows", "BidirectionalMemory", "CompactBidirectionalMemory", "CompactRows"]


class AllRows:
    """No halting: at each step all rows see all rows of their sequence, of this step.

    Args:
        rows: which are real, ``(B, T)`` bool; None: all.
    """

    def __init__(self, rows: Tensor | None = None) -> None:
        self.seen = None if rows is None else rows[:, None, None, :]  # (B, 1, 1, T)

    def attend(self, qkv: Tensor, n_head: int) -> Tensor:
        """What each row reads, ``(B, T, D)``, from queries, keys and values ``(B, T, 3D)``."""
        q, k, v = split_heads(qkv, n_head)
        if not torch.is_grad_enabled():
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen).transpose(1, 2).flatten(2)
        # The fused kernel's backward pass on a CPU takes longer than two products and a softmax.
        scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)
        if self.seen is not None:
            scores = scores.masked_fill(~self.seen, -math.inf)
        weights = scores.softmax(-1, dtype=torch.promote_types(v.dtype, torch.float32)).to(v.dtype)
        return (weights @ v).transpose(1, 2).flatten(2)


class BidirectionalMemory(MaskedMemory):
    """Keys and values of all rows; those of frozen rows stay what they were.

    Args:
        rows: which are real, ``(B, T)`` bool; None: all.
    """

    def __init__(self, rows: Tensor | None = None) -> None:
        super().__init__()
        self.rows = rows

    def attend(self, qkv: Tensor, n_head: int) -> Tensor:
        """What all rows read, ``(B, T, D)``."""
        q, k, v = split_heads(qkv, n_head)
        k, v, broken = self.update(k, v)
        seen = _seen(self.rows, broken)
        mask = None if seen is None else seen[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, D/H)
        if broken is not None:  # a row whose own keys are not finite is not finite
            y = y.masked_fill(broken[:, None, :, None], math.nan)
        return y.transpose(1, 2).flatten(2)


class CompactRows(Rows):
    """The rows present where every row sees its whole sequence.

    Args:
        batch, length: ``B`` sequences of ``T``.
        rows: which are real, ``(B, T)`` bool; None: all.
    """

    def __init__(self, batch: int, length: int, rows: Tensor | None = None) -> None:
        super().__init__(batch, length)
        self.real = rows
        self._lines: tuple[Tensor | None, Tensor | None, int, int] | None = None

    def select(self, kept: Tensor) -> None:
        """From now on only the rows ``kept``, indices into those present, are present."""
        super().select(kept)
        self._lines = None

    def lines(self) -> tuple[Tensor | None, Tensor | None, int, int]:
        """How the rows present are laid out for attention, one line a sequence, filled up to the longest line.

        Returns:
            each row's slot ``(n,)``, or None where the lines are full; the sequences that have lines, ``(S,)``, or
            None for all; how many lines, and how wide.
        """
        if self._lines is None:
            assert self.index is not None
            index = self.index
            sequence = torch.div(index, self.length, rounding_mode="floor")
            counts = torch.bincount(sequence, minlength=self.batch)  # (B,)
            some = counts.nonzero().squeeze(-1)
            width, lines, present, line = int(counts.max()), self.batch, None, sequence
            # Copying the keys of a few sequences costs less than filling lines for those that have none.
            if 2 * len(some) <= self.batch or len(some) * width == len(index):
                present, lines, line = some, len(some), torch.searchsorted(some, sequence)
            slot = None
            if lines * width != len(index):
                before = counts.cumsum(0) - counts
                slot = line * width + torch.arange(len(index), device=index.device) - before[sequence]
            self._lines = slot, present if lines < self.batch else None, lines, width
        return self._lines


class CompactBidirectionalMemory(CompactMemory):
    """Keys and values of all rows, of which only those present are computed at a step."""

    rows: CompactRows

    def __init__(self, rows: CompactRows, *, history: bool = False) -> None:
        super().__init__(rows, history=history)

    def attend(self, qkv: Tensor, n_head: int) -> Tensor:
        """What the rows present read, ``(n, D)``, from their ``(n, 3D)`` and all others' latest."""
        rows, d = self.rows, qkv.shape[-1] // 3
        kv, broken = self._latest(qkv, n_head)
        seen = _seen(rows.real, broken)
        q, slot, lines, width = qkv[:, :d], None, rows.batch, rows.length
        if rows.index is not None:
            slot, present, lines, width = rows.lines()
            if present is not None:
                kv, seen = kv.index_select(0, present), None if seen is None else seen.index_select(0, present)
            if slot is not None:
                q = q.new_zeros(lines * width, d).index_copy_(0, slot, q)
        q = q.reshape(lines, width, n_head, d // n_head).transpose(1, 2)
        k, v = kv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if seen is None else seen[:, None, None, :])
        y = y.transpose(1, 2).reshape(lines * width, d)
        if slot is not None:
            y = y.index_select(0, slot)
        if broken is not None:
            own = broken.flatten() if rows.index is None else broken.flatten()[rows.index]
            y = y.masked_fill(own.unsqueeze(-1), math.nan)
        return y


def _seen(rows: Tensor | None, broken: Tensor | None) -> Tensor | None:
    """Which rows may be attended to, ``(B, T)`` bool; None: all. A sequence that has none sees all: zeros."""
    if broken is None:
        return rows
    seen = ~broken if rows is None else rows & ~broken
    return seen | ~seen.any(-1, keepdim=True)
