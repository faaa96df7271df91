"""How a token is drawn from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from haltkit import signals

__all__ = ["GenerationError", "Sampling"]


class GenerationError(ValueError):
    """Prompts, policies or settings that text cannot be generated from."""


@lru_cache(maxsize=32)  # a wavefront draws a position anew in every sweep, and a draft is verified
def _gumbel(seed: int, position: int, count: int) -> npt.NDArray[np.float64]:
    """Gumbel noise of the first ``count`` tokens for one position of a sequence, ``(count,)``; read-only.

    The raw numbers of a counter-based generator, which NumPy never changes.
    """
    raw = np.random.Philox(key=seed, counter=[0, 0, 0, position]).random_raw(count)
    uniform = ((raw >> np.uint64(12)) + 0.5) * 2.0**-52  # above 0 and below 1
    noise: npt.NDArray[np.float64] = -np.log(-np.log(uniform))
    noise.setflags(write=False)
    return noise


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    A draw adds noise to the logits and takes the greatest sum (the Gumbel-max trick). The noise depends on the seed of
    the sequence, the position and the token alone, so a draw does not depend on the sampler or on other sequences, and
    rounding changes it only where two sums, or with ``top_k`` and ``top_p`` two tokens at the cut, are tied to the last
    digits. For the bundled model in float32, one row against five together, that is one draw of a million, with
    ``top_p=0.9`` too (150 positions, temperatures 1 and 1.5).

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among this many most likely tokens only.
        top_p: draw among the fewest most likely tokens that together have at least this probability.
        seed: of the draws; sequence ``i`` of a batch draws with ``seed + i``, as it does alone with that seed.
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

    def of(self, sequence: int) -> Sampling:
        """The same for one sequence of a batch alone."""
        return replace(self, seed=(self.seed + sequence) % 2**63)

    def pick(self, logits: Tensor, positions: Sequence[int], sequences: Sequence[int] | None = None) -> Tensor:
        """Tokens ``(n,)`` from finite logits ``(n, V)``.

        Args:
            positions: the place in its sequence that each token is for.
            sequences: each row's sequence in the batch (None: all are of sequence 0).
        """
        logits = signals.measured(logits)[:, : self.vocabulary]
        if self.temperature == 0 or self.top_k == 1:
            return logits.argmax(-1)
        seeds = [(self.seed + i) % 2**63 for i in ([0] * len(logits) if sequences is None else sequences)]
        each = [_gumbel(seed, place, logits.shape[-1]) for seed, place in zip(seeds, positions, strict=True)]
        noise = torch.from_numpy(np.stack(each)).to(logits.device)
        # Before dividing, and in float64, where every temperature has a value: a small one must not overflow.
        scaled = (logits - logits.amax(-1, keepdim=True)).double() / self.temperature
        if self.top_k is None and self.top_p is None:
            return noise.add_(scaled).argmax(-1)
        scaled, tokens = scaled.topk(min(self.top_k or logits.shape[-1], logits.shape[-1]), -1)  # the most likely first
        if self.top_p is not None:  # a token stays if those before it do not reach top_p
            probabilities = scaled.softmax(-1)
            scaled = scaled.masked_fill(probabilities.cumsum(-1) - probabilities >= self.top_p, -math.inf)
        place = (noise.gather(-1, tokens) + scaled).argmax(-1, keepdim=True)
        return tokens.gather(-1, place).squeeze(-1)
