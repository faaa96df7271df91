"""How a token is drawn from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from haltkit import signals

__all__ = ["GenerationError", "Sampling"]


class GenerationError(ValueError):
    """Prompts, policies or settings that text cannot be generated from."""


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among this many most likely tokens only.
        top_p: draw among the fewest most likely tokens that together have at least this probability.
        seed: of the draws. Each sequence has draws of its own, whatever is in the batch beside it.
        vocabulary: draw among this many first tokens only, where a tokenizer has fewer than the model (None: all).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise GenerationError(f"temperature={self.temperature}: it must be 0 (most likely token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"top_k={self.top_k}: it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p={self.top_p}: it must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise GenerationError(f"seed={self.seed}: it must be 0 or more and below 2**63")
        if self.vocabulary is not None and self.vocabulary < 1:
            raise GenerationError(f"vocabulary={self.vocabulary}: it must be at least 1")

    def draws(self, batch: int, count: int) -> Tensor:
        """Uniform numbers for ``count`` tokens of each sequence, ``(B, count)``; row ``i`` from seed ``seed + i``."""
        each = [torch.Generator().manual_seed((self.seed + i) % 2**63) for i in range(batch)]
        return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64) for generator in each])

    def choose(self, logits: Tensor, u: Tensor) -> Tensor:
        """Tokens ``(B,)`` from logits ``(B, V)`` and uniform numbers ``(B,)``, by the inverse of the distribution.

        Raises:
            GenerationError: logits that are not finite.
        """
        sound = signals.finite(logits[:, : self.vocabulary]).tolist()
        if not all(sound):
            raise GenerationError(
                f"logits of sequence {sound.index(False) + 1} are not finite: there is no token to choose"
            )
        return self.pick(logits, u)

    def pick(self, logits: Tensor, u: Tensor) -> Tensor:
        """:meth:`choose`, of logits that are known to be finite."""
        logits = signals.measured(logits)[:, : self.vocabulary]
        if self.temperature == 0 or self.top_k == 1:
            return logits.argmax(-1)
        # Before dividing, and in float64, where every temperature has a value: a small one must not overflow.
        scaled = (logits - logits.amax(-1, keepdim=True)).double() / self.temperature
        if self.top_k is None and self.top_p is None:
            probabilities, tokens = scaled.softmax(-1), None
        else:
            count = logits.shape[-1] if self.top_k is None else min(self.top_k, logits.shape[-1])
            scaled, tokens = scaled.topk(count, -1)  # the most likely first
            probabilities = scaled.softmax(-1)
            if self.top_p is not None:  # a token stays if those before it do not reach top_p
                before = probabilities.cumsum(-1) - probabilities
                probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        reached = probabilities.cumsum(-1)
        target = u.to(logits.device).unsqueeze(-1) * reached[:, -1:]
        place = torch.searchsorted(reached, target, right=True).clamp_max(reached.shape[-1] - 1)
        return (place if tokens is None else tokens.gather(-1, place)).squeeze(-1)
