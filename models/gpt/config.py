"""What decides the shape and the function of a LoopedGPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from haltkit.models.config import ConfigError

__all__ = ["ModelConfig", "region_span"]


LARGEST = 2**31 - 1  # of any size: their products fit into the numbers that tensors are counted in


def region_span(name: str) -> tuple[int, int]:
    """First and last layer (numbered from 1, both included) of a region called ``"4"`` or ``"5-6"``."""
    first, _, last = name.partition("-")
    try:
        span = int(first), int(last or first)
    except ValueError:
        raise ConfigError(f"region {name!r}: write one layer ('4') or a range ('5-6')") from None
    if name not in (f"{span[0]}", f"{span[0]}-{span[1]}"):
        raise ConfigError(
            f"region {name!r}: write it as {span[0]}-{span[1]}" if last else f"region {name!r}: write {span[0]}"
        )
    if span[0] < 1 or span[1] < span[0]:
        raise ConfigError(f"region {name!r}: layers are numbered from 1 and a range runs upwards")
    return span


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shape and the function of a :class:`~haltkit.models.gpt.model.LoopedGPT`.

    Sources: [P] arXiv 2509.23314 section 2 and appendix B, [G] arXiv 2502.05171; where both leave a
    choice open, the field's comment says what the values mean.
    """

    vocab_size: int = 50257
    block_size: int = 512
    n_layer: int = 12
    n_head: int = 12
    d_model: int = 768
    mlp_ratio: int = 4
    # Layers numbered from 1; "5-6" loops the pair together. Every other layer runs once.
    regions: tuple[str, ...] = ("4", "5-6", "7")
    # r: the loop count the model is trained around; also enters the init through the effective depth.
    mean_loops: int = 12
    # "residual": x = n2(x + attn(n1(x))), as [G]. "branch": x = x + n2(attn(n1(x))).
    norm_placement: Literal["residual", "branch"] = "residual"
    # A parameter-free RMSNorm at the end of each body step: keeps the state's norm at sqrt(d).
    state_norm: bool = False
    # An RMSNorm on what a region hands on, as [G] norms the loop's output.
    exit_norm: bool = True
    # When the region's input is mixed into the state through the learned projection of [state ; input].
    injection: Literal["every_step", "first_step", "never"] = "every_step"
    # "identity" starts the projection at [0.5 W ; 0.5 W + I]; "random" at W.
    injection_init: Literal["identity", "random"] = "random"
    # What x_0 is: truncated normal noise of variance 2/5 ([G]), zeros, or the region's own input.
    initial_state: Literal["noise", "zero", "input"] = "noise"
    # "every_step" adds fresh noise to the state before each application ([P]'s other reading).
    noise: Literal["initial", "every_step"] = "initial"
    noise_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "d_model", "mlp_ratio", "mean_loops"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, got {getattr(self, name)}")
            if getattr(self, name) > LARGEST:
                raise ConfigError(f"model.{name} must be at most {LARGEST:,}")
        if self.noise_seed < 0:
            raise ConfigError(f"model.noise_seed must not be negative, got {self.noise_seed}")
        if self.d_model % self.n_head:
            raise ConfigError(f"model.d_model={self.d_model} is not a multiple of n_head={self.n_head}")
        end = 0
        for name in self.regions:
            first, last = region_span(name)
            if first <= end:
                raise ConfigError(f"model.regions: {name!r} overlaps or precedes the region before it")
            if last > self.n_layer:
                raise ConfigError(f"model.regions: {name!r} ends after the last layer ({self.n_layer})")
            end = last
        if self.injection == "never" and self.initial_state != "input":
            raise ConfigError(
                "model.injection=never needs initial_state=input: otherwise the region never sees its input"
            )
        if self.noise == "every_step" and self.initial_state != "noise":
            raise ConfigError("model.noise=every_step needs initial_state=noise")
