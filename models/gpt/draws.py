"""Random draws of the recipe, each keyed by what it belongs to.

A draw depends on (seed, step, ...) alone, never on how many processes there are or on what was drawn
before, so a resumed or a differently split run sees the same loop counts and the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["STATE_STD", "EvaluationNoise", "TrainingNoise", "loop_count", "truncated_normal_"]

# [G]: the initial state is truncated normal with variance 2/5.
STATE_STD = math.sqrt(2 / 5)

_ERF_3 = math.erf(3 / math.sqrt(2))
# First entry of every key: keeps the streams of different purposes apart.
_LOOPS, _TRAINING_NOISE, _EVALUATION_NOISE = 1, 2, 3


def _entropy(*key: int | str) -> np.random.SeedSequence:
    words = [int.from_bytes(k.encode(), "little") if isinstance(k, str) else k for k in key]
    return np.random.SeedSequence(words)


def _generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    state = int(_entropy(*key).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state & (2**63 - 1))


def loop_count(mean: int, sigma: float, *, seed: int, step: int, micro_step: int, region: str) -> int:
    """One draw of the lognormal-Poisson loop schedule of [G].

    ``tau ~ Normal(log(mean) - sigma^2 / 2, sigma)`` and ``K ~ Poisson(exp(tau)) + 1``, so the expected
    count is ``mean + 1``.
    """
    rng = np.random.default_rng(_entropy(_LOOPS, seed, step, micro_step, region))
    rate = math.exp(rng.normal(math.log(mean) - sigma**2 / 2, sigma))
    return int(rng.poisson(rate)) + 1


def truncated_normal_(tensor: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill ``tensor`` in place with a normal of ``std`` cut at three standard deviations."""
    return _normal_from_uniform_(_uniform_(tensor, generator), std)


@torch.no_grad()
def _uniform_(tensor: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform over the values that the error function takes within three standard deviations."""
    return tensor.uniform_(-_ERF_3, _ERF_3, generator=generator)


@torch.no_grad()
def _normal_from_uniform_(tensor: Tensor, std: float) -> Tensor:
    """The inverse of the distribution function, so that what each number becomes depends on it alone."""
    return tensor.erfinv_().mul_(std * math.sqrt(2)).clamp_(-3 * std, 3 * std)


class TrainingNoise:
    """Fresh noise for each sample, region and loop step of one training step.

    Drawn where it is used, by that device's own generator: a GPU would wait for a CPU's draws longer than for all else
    in a step. The same key gives the same numbers on every CPU; a GPU's are its model's own, and may be its PyTorch's.

    Args:
        seed: the run's seed.
        samples: global index of each sample of the batch; its length is ``B``.
    """

    def __init__(self, seed: int, samples: Sequence[int]) -> None:
        self.seed = seed
        self.samples = tuple(samples)

    def __call__(self, region: str, step: int, like: Tensor) -> Tensor:
        """Noise of shape ``(B, T, D)``, float32, for loop step ``step`` (0: the initial state) of ``region``."""
        out = torch.empty(like.shape, dtype=torch.float32, device=like.device)
        for row, sample in zip(out, self.samples, strict=True):
            _uniform_(row, _generator(_TRAINING_NOISE, self.seed, sample, step, region, device=like.device))
        return _normal_from_uniform_(out, STATE_STD)


class EvaluationNoise:
    """One float32 table a region, drawn once from (seed, region) and indexed by position.

    A token's initial state then depends on its position in its own sequence alone: not on the batch it
    is in, the padding beside it, or how much of the sequence is already cached.
    """

    def __init__(self, seed: int, block_size: int, d_model: int) -> None:
        self.seed = seed
        self.shape = (block_size, d_model)
        self._tables: dict[tuple[str, int, torch.device], Tensor] = {}

    def table(self, region: str, step: int = 0, device: torch.device | None = None) -> Tensor:
        """The whole table, ``(block_size, D)`` float32; drawn on the CPU, the same on every device."""
        cpu = torch.device("cpu")
        key = (region, step, device or cpu)
        if key not in self._tables:
            with torch.inference_mode(False):  # the table outlives whoever asks first
                if key[-1] == cpu:
                    generator = _generator(_EVALUATION_NOISE, self.seed, step, region)
                    self._tables[key] = truncated_normal_(torch.empty(self.shape), STATE_STD, generator)
                else:
                    self._tables[key] = self.table(region, step).to(key[-1])
        return self._tables[key]

    def __call__(self, region: str, step: int, like: Tensor) -> Tensor:
        """Noise of shape ``(T, D)`` for positions ``0 .. T-1``, in ``like``'s dtype and device."""
        return self.table(region, step, like.device)[: like.shape[-2]].to(like)

    def at(self, region: str, step: int, positions: Tensor, like: Tensor) -> Tensor:
        """Noise of shape ``(n, D)`` for tokens at ``positions``, ``(n,)``, in ``like``'s dtype and device."""
        return self.table(region, step, like.device)[positions].to(like.dtype)
