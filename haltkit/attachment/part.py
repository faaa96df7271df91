"""Which entries of the model's batch a call of a loop's body is made for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Part", "by_entry"]


def by_entry(rows: Tensor) -> Tensor:
    """Whether any row of an entry of the batch, the first dimension, is set: ``(n, ...)`` bool to ``(n,)``."""
    if rows.ndim == 0:
        return rows.view(1)
    return rows.flatten(1).any(1) if rows.ndim > 1 else rows


@dataclass(frozen=True)
class Part:
    """The entries of the batch that the calls of an enclosing loop are made for.

    Attributes:
        batch: entries of the model's batch.
        given: the entries that are computed, ascending indices ``(n,)`` into the model's batch.
        running: those of them that no enclosing loop has halted, ``(n,)`` bool.
        apart: they are all of them, so the halted ones are not computed.
    """

    batch: int
    given: Tensor
    running: Tensor
    apart: bool = True

    @classmethod
    def whole(cls, batch: int, device: torch.device) -> Part:
        return cls(batch, torch.arange(batch, device=device), torch.ones(batch, dtype=torch.bool, device=device))

    def narrowed(self, present: Tensor, gathered: bool) -> Part:
        """The entries ``present`` (indices into those given) go on; ``gathered``: the others are not computed."""
        if gathered:
            return Part(self.batch, self.given[present], self.running[present], self.apart)
        going = torch.zeros_like(self.running).index_fill(0, present, True)
        return Part(self.batch, self.given, self.running & going, apart=False)
