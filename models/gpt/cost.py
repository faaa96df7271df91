"""What a training step costs: floating-point operations counted, memory measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from haltkit.models.gpt.config import ModelConfig, region_span

__all__ = ["SavedBytes", "Spent", "saved_bytes", "step_flops"]


@dataclass(frozen=True)
class Spent:
    """Floating-point operations for one token: forward, and backward through what gradients reach."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def step_flops(config: ModelConfig, loops: Mapping[str, int], backprop_depth: int | None = None) -> Spent:
    """Operations a token at these loop counts, two for each multiply-add.

    Matrix products only, attention's over the half of the scores that the causal mask keeps; a backward costs twice its
    forward, and only the last ``backprop_depth`` loops have one. What recomputation repeats is not counted: it is
    work of the method, not of the model.
    """
    d = config.d_model
    block = 2 * (4 * d * d + 2 * config.mlp_ratio * d * d) + 4 * config.block_size / 2 * d
    injection = 2 * 2 * d * d if config.injection != "never" else 0
    head = 2 * d * config.vocab_size
    looped = {name: region_span(name) for name in config.regions}
    once = config.n_layer - sum(last - first + 1 for first, last in looped.values())
    forward = backward = once * block + head
    for name, (first, last) in looped.items():
        one = (last - first + 1) * block + injection
        forward += loops[name] * one
        backward += min(loops[name], loops[name] if backprop_depth is None else backprop_depth) * one
    return Spent(forward, 2 * backward)


@dataclass
class SavedBytes:
    """Bytes of activations that a forward pass keeps for its backward pass; weights do not count."""

    value: int = 0


@contextmanager
def saved_bytes(weights: Iterator[Tensor]) -> Iterator[SavedBytes]:
    """Measure what the forward passes in the block keep, each storage once."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, Tensor] = {}  # holding them keeps their addresses from being used again
    measured = SavedBytes()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = tensor
            measured.value += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield measured
