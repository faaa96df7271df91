"""What a layer's attention remembers while a region loops: the canonical semantics of halting.

At step ``k`` a token attends to token ``j``'s keys and values of step ``min(k, K_j)``, where ``K_j`` is the step
that ``j`` halted at: those that the layer computed during that step from its own input. They are kept here and
never recomputed from the final state, which would be another function.

:class:`MaskedMemory` computes all tokens at every step. :class:`CompactMemory` computes those that are *present*:
the active ones, and frozen ones that have not been retired yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from haltkit import signals
from haltkit.models.gpt.draws import EvaluationNoise
from haltkit.models.gpt.layers import LayerMemory, Noise, Region, attend, split_heads

__all__ = [
    "CompactMemory",
    "CompactRegionLoop",
    "MaskedMemory",
    "PresentRows",
    "RegionLoop",
    "RowMemory",
    "Rows",
    "run_once",
]


class MaskedMemory:
    """Keys and values of one layer for all tokens; those of frozen tokens stay what they were."""

    def __init__(self) -> None:
        self.active: Tensor | None = None  # (B, T), set before each step; None: all are
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def attend(self, qkv: Tensor, n_head: int) -> Tensor:
        """What all tokens read, ``(B, T, D)``."""
        q, k, v = split_heads(qkv, n_head)
        k, v, broken = self.update(k, v)
        return attend(q, k, v, broken).transpose(1, 2).flatten(2)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store this step's keys and values of active tokens, ``(B, H, T, D/H)``; return all tokens' latest.

        The third entry marks tokens whose keys or values are not finite, ``(B, T)``: they are zeroed and must be
        masked before the product, or 0 * inf would reach every earlier token.
        """
        if self._keys is not None and self._values is not None and self.active is not None:
            active = self.active[:, None, :, None]
            k, v = torch.where(active, k, self._keys), torch.where(active, v, self._values)
        self._keys, self._values = k, v
        broken = ~(signals.finite(k) & signals.finite(v)).all(1)  # (B, T)
        if not broken.any():
            return k, v, None
        hole = broken[:, None, :, None]
        return k.masked_fill(hole, 0.0), v.masked_fill(hole, 0.0), broken


class RegionLoop:
    """A region's body for one masked loop: the input to inject, the noise, and one memory for each layer."""

    pure = True

    def __init__(self, region: Region, e: Tensor, noise: Noise) -> None:
        self.region, self.e, self.noise = region, e, noise
        self.memories: Sequence[MaskedMemory] = [MaskedMemory() for _ in region.body.blocks]

    def step(self, x: Tensor, k: int, active: Tensor | None) -> Tensor:
        """``x_k`` from ``x_{k-1}``, ``(B, T, D)``; ``active`` is ``(B, T)``, None: all rows are."""
        for memory in self.memories:
            memory.active = active
        return self.region.step(x, self.e, k, self.noise, self.memories)


class PresentRows(Protocol):
    """Which rows a step computes.

    Attributes:
        guarded: something may not be finite, so look at every key, and mask.
        k: the step.
    """

    guarded: bool
    k: int

    def select(self, kept: Tensor) -> None:
        """From now on only the rows ``kept``, ``(n',)`` ascending indices into those present, are present."""
        ...

    def freeze(self, frozen: Tensor | None) -> None:
        """The rows ``frozen``, indices into those present, have halted and are still computed; None: none."""
        ...


class RowMemory(LayerMemory, Protocol):
    """A layer's memory in compact execution.

    ``probe`` is a number, ``()``, that is finite only if the last step's queries, keys and values were.
    """

    probe: Tensor | None

    def freeze(self) -> None:
        """The frozen rows have changed: what they have computed so far is to stay."""
        ...


class Rows:
    """The tokens present, ascending, among ``B`` sequences of ``T``; shared by the memories of one loop.

    Attributes:
        index: flat places of the tokens present, ``(n,)``; None: all tokens are present.
        frozen: flat places of those present that have halted, ``(h,)``; None: none has.
        guarded: something may not be finite: look at every key, and mask.
        k: the step being taken.
    """

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.length = batch, length
        self.index: Tensor | None = None
        self.frozen: Tensor | None = None
        self.guarded = False
        self.k = 0
        self._padding: tuple[Tensor, Tensor | None, Tensor] | None = None

    def select(self, kept: Tensor) -> None:
        self.index = kept if self.index is None else self.index[kept]
        self.frozen = self._padding = None

    def freeze(self, frozen: Tensor | None) -> None:
        self.frozen = frozen if frozen is None or self.index is None else self.index[frozen]

    def padding(self, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """How the rows present are laid out for attention, one line a sequence, filled up to the longest line.

        Returns:
            each row's slot ``(n,)``; the sequences that have lines, ``(S,)``, or None for all; the causal mask to add
            to scores, ``(S, 1, L, T)``. A filler sees the first token.
        """
        if self._padding is None:
            index = torch.arange(self.batch * self.length, device=like.device) if self.index is None else self.index
            sequence = torch.div(index, self.length, rounding_mode="floor")
            position = index - sequence * self.length
            counts = torch.bincount(sequence, minlength=self.batch)  # (B,)
            before = counts.cumsum(0) - counts
            lines, present = self.batch, None
            some = counts.nonzero().squeeze(-1)
            if 3 * len(some) <= self.batch:  # copying the keys of a third costs what reading all of them does
                present, lines = some, len(some)
            line = sequence if present is None else torch.searchsorted(present, sequence)
            width = int(counts.max())
            slot = line * width + torch.arange(len(index), device=index.device) - before[sequence]
            places = index.new_zeros(lines * width).index_copy_(0, slot, position).view(lines, 1, width, 1)
            future = torch.arange(self.length, device=index.device) > places
            mask = torch.zeros(future.shape, dtype=like.dtype, device=index.device).masked_fill_(future, -math.inf)
            self._padding = slot, present, mask
        return self._padding


class CompactMemory:
    """Keys and values of one layer for all tokens, of which only some are computed at a step.

    Attributes:
        kv: latest keys and values side by side, ``(B * T, 2D)``.
        probe: a number, ``()``, that is finite only if the last step's queries, keys and values were.
        history: ``kv`` after each step, if asked for.
    """

    def __init__(self, rows: Rows, *, history: bool = False) -> None:
        self.rows = rows
        self.kv: Tensor | None = None
        self.probe: Tensor | None = None
        self.history: list[Tensor] | None = [] if history else None
        self._frozen: Tensor | None = None

    def freeze(self) -> None:
        """Remember what the frozen rows have, to be put back after each step that computes them."""
        frozen = self.rows.frozen
        self._frozen = None if frozen is None or self.kv is None else self.kv.index_select(0, frozen)

    def attend(self, qkv: Tensor, n_head: int) -> Tensor:
        """What the rows present read, ``(n, D)``, from their ``(n, 3D)`` and all others' latest."""
        rows, d = self.rows, qkv.shape[-1] // 3
        kv, broken = self._latest(qkv, n_head)
        q = qkv[:, :d]
        if rows.index is None:
            q = q.view(rows.batch, rows.length, n_head, d // n_head).transpose(1, 2)
            k, v = kv.permute(2, 0, 3, 1, 4)
            return attend(q, k, v, broken).transpose(1, 2).reshape(len(qkv), d)
        slot, present, mask = rows.padding(qkv)
        if present is not None:
            kv = kv.index_select(0, present)
        if broken is not None:
            hidden = broken if present is None else broken[present]
            mask = mask.masked_fill(hidden[:, None, None, :], -math.inf)
        lines, _, width, _ = mask.shape
        padded = q.new_zeros(lines * width, d).index_copy_(0, slot, q)
        q = padded.view(lines, width, n_head, d // n_head).transpose(1, 2)
        k, v = kv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (S, H, L, D/H)
        y = y.transpose(1, 2).reshape(lines * width, d).index_select(0, slot)
        if broken is not None:  # a token whose own keys are not finite is not finite
            y = y.masked_fill(broken.flatten()[rows.index].unsqueeze(-1), math.nan)
        return y

    def _latest(self, qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor | None]:
        """All tokens' latest keys and values after this step, ``(B, T, 2, H, D/H)``, and which are broken, ``(B, T)``.

        Those that are not finite are zeroed where the step is guarded; None: it is not.
        """
        rows, d = self.rows, qkv.shape[-1] // 3
        self.probe = qkv.sum()
        latest = self._store(qkv[:, d:])
        kv = latest.view(rows.batch, rows.length, 2, n_head, d // n_head)
        if not rows.guarded:
            return kv, None
        broken = ~signals.finite(latest).view(rows.batch, rows.length)
        return kv.masked_fill(broken[:, :, None, None, None], 0.0), broken

    def _store(self, new: Tensor) -> Tensor:
        """Take the rows' keys and values of this step, ``(n, 2D)``; returns all tokens' latest, ``(B * T, 2D)``."""
        rows = self.rows
        if rows.index is None:
            kv = new
        elif self.kv is None:
            kv = new.new_zeros(rows.batch * rows.length, new.shape[-1]).index_copy_(0, rows.index, new)
        else:
            # What it was before this step is history.
            kept = self.history is not None and len(self.history) < rows.k
            kv = (self.kv.clone() if kept else self.kv).index_copy_(0, rows.index, new)
        if self._frozen is not None and rows.frozen is not None:
            kv.index_copy_(0, rows.frozen, self._frozen)
        if self.history is not None:
            self.history[rows.k - 1 :] = [kv]
        self.kv = kv
        return kv


class CompactRegionLoop:
    """A region's body for compact execution: what each row present is given, and one memory for each layer.

    Args:
        e: the region's input, ``(n, D)``.
        positions: of each row in its sequence, ``(n,)``.
        noise: by position.
        rows, memories: one memory for each of the region's layers, sharing ``rows``.
    """

    pure = True

    def __init__(
        self,
        region: Region,
        e: Tensor,
        positions: Tensor,
        noise: EvaluationNoise,
        rows: PresentRows,
        memories: Sequence[RowMemory],
    ) -> None:
        self.region, self.e, self.positions, self.noise = region, e, positions, noise
        self.rows, self.memories = rows, memories

    def step(self, x: Tensor, k: int, active: Tensor | None) -> Tensor:
        """``x_k`` from ``x_{k-1}``, ``(n, D)``."""
        self.rows.k = k
        return self.region.step(x, self.e, k, self.noise_at, self.memories)

    def noise_at(self, region: str, step: int, like: Tensor) -> Tensor:
        """Noise for the rows present, ``(n, D)``."""
        return self.noise.at(region, step, self.positions, like)

    def finite_probe(self) -> Tensor | None:
        total = None
        for memory in self.memories:
            total = memory.probe if total is None or memory.probe is None else total + memory.probe
        return None if self.rows.guarded else total

    def guarded_step(self, x: Tensor, k: int, active: Tensor | None) -> Tensor:
        self.rows.guarded = True  # and from now on: what is not finite stays
        return self.step(x, k, active)

    def select(self, kept: Tensor) -> None:
        self.e, self.positions = self.e.index_select(0, kept), self.positions.index_select(0, kept)
        self.rows.select(kept)

    def freeze(self, frozen: Tensor | None) -> None:
        self.rows.freeze(frozen)
        for memory in self.memories:
            memory.freeze()


def run_once(layer: nn.Module, x: Tensor, memory: RowMemory, rows: PresentRows) -> Tensor:
    """A layer that does not loop, over rows ``(n, D)``: guarded only where its probe is not finite."""
    out: Tensor = layer(x, memory)
    if not rows.guarded and memory.probe is not None and not math.isfinite(float(memory.probe)):
        rows.guarded = True
        out = layer(x, memory)
    return out
