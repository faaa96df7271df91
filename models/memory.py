"""What a layer's attention remembers while a region loops: the canonical semantics of halting.

At step ``k`` a token attends to token ``j``'s keys and values of step ``min(k, K_j)``, where ``K_j`` is the step
that ``j`` halted at: those that the layer computed during that step from its own input. They are kept here and
never recomputed from the final state, which would be another function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from haltkit.models.gpt import Noise, Region

__all__ = ["MaskedMemory", "RegionLoop"]


class MaskedMemory:
    """Keys and values of one layer for all tokens; those of halted tokens stay what they were."""

    def __init__(self) -> None:
        self.live: Tensor | None = None  # (B, T), set before each step
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._broken: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store this step's keys and values of live tokens, ``(B, H, T, D/H)``; return all tokens' latest.

        The third entry marks tokens whose keys or values are not finite, ``(B, T)``: they are zeroed and must be
        masked before the product, or 0 * inf would reach every earlier token.
        """
        if self._keys is not None and self._values is not None and self.live is not None:
            live = self.live[:, None, :, None]
            k, v = torch.where(live, k, self._keys), torch.where(live, v, self._values)
        self._keys, self._values = k, v
        size = torch.linalg.vector_norm(torch.cat([k, v], -1), ord=torch.inf, dim=-1)  # (B, H, T)
        broken = ~(size < torch.inf).all(1)  # (B, T)
        if not broken.any():
            return k, v, None
        hole = broken[:, None, :, None]
        return k.masked_fill(hole, 0.0), v.masked_fill(hole, 0.0), broken


class RegionLoop:
    """A region's body for one loop: the input to inject, the noise, and one memory a layer."""

    def __init__(self, region: Region, e: Tensor, noise: Noise) -> None:
        self.region, self.e, self.noise = region, e, noise
        self.memories: Sequence[MaskedMemory] = [MaskedMemory() for _ in region.body.blocks]

    def step(self, x: Tensor, k: int, live: Tensor) -> Tensor:
        """``x_k`` from ``x_{k-1}``, ``(B, T, D)``; ``live`` is ``(B, T)``."""
        for memory in self.memories:
            memory.live = live
        return self.region.step(x, self.e, k, self.noise, self.memories)
