"""The layers of a looped GPT: attention, block, and the region that applies its blocks again and again.

Block and initial state follow Geiping et al. (arXiv 2502.05171, [G]).

Shapes: ``B`` sequences, ``T`` positions, ``D`` model width, ``H`` heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = [
    "RMS_EPS",
    "Block",
    "InitialState",
    "Injection",
    "LayerMemory",
    "Noise",
    "NormPlacement",
    "RMSNorm",
    "Region",
    "RegionBody",
    "attend",
    "split_heads",
]

# noise(region, step, like): (T, D) or (B, T, D); step 0 is the initial state.
Noise = Callable[[str, int, Tensor], Tensor]
NormPlacement = Literal["residual", "branch"]
Injection = Literal["every_step", "first_step", "never"]
InitialState = Literal["noise", "zero", "input"]
RMS_EPS = 1e-6
QUERY_CHUNK = 128


class LayerMemory(Protocol):
    """What one layer's attention remembers from step to step of a loop, or from token to token."""

    def attend(self, qkv: Tensor, n_head: int) -> Tensor:
        """What each row reads, ``(..., D)``, from queries, keys and values ``(..., 3D)``, heads side by side."""
        ...


def attend(q: Tensor, k: Tensor, v: Tensor, broken: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Causal attention, ``(B, H, T, D/H)`` each; no position sees those that are ``broken``, ``(B, T)``.

    ``bias`` is the causal mask to add to scores, at least ``(T, T)`` float32; where it is given, gradients are cheaper.
    """
    if broken is not None:
        causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=causal & ~broken[:, None, None, :])
        # A token whose own keys or values are not finite is itself not finite, whatever it read from others.
        return y.masked_fill(broken[:, None, :, None], math.nan)
    if q.device.type != "cpu" or not torch.is_grad_enabled() or bias is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # On a CPU the fused kernel's backward takes a third of a training step; two products and a softmax, compiled,
    # take far less. The mask is a ready-made tensor: one made from indices is worked out again, unvectorized, for
    # every score. Queries go in chunks, so that most of what lies above the diagonal is never computed.
    q = q * (1 / math.sqrt(q.shape[-1]))
    measured = torch.promote_types(v.dtype, torch.float32)
    chunks = []
    for start in range(0, q.shape[-2], QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, q.shape[-2])
        scores = q[..., start:end, :] @ k[..., :end, :].transpose(-2, -1)
        weights = (scores + bias[start:end, :end]).softmax(-1, dtype=measured).to(v.dtype)
        chunks.append(weights @ v[..., :end, :])
    return torch.cat(chunks, -2)


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(B, T, 3D)`` into queries, keys and values, ``(B, H, T, D/H)`` each; views."""
    b, t, d = qkv.shape
    q, k, v = qkv.view(b, t, 3, n_head, d // 3 // n_head).permute(2, 0, 3, 1, 4)
    return q, k, v


class RMSNorm(nn.RMSNorm):
    """RMSNorm whose gain follows the input's dtype, which under autocast is not the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Attention(nn.Module):
    causal_bias: Tensor | None

    def __init__(self, d_model: int, n_head: int) -> None:
        super().__init__()
        self.register_buffer("causal_bias", None, persistent=False)  # see _attend
        self.n_head = n_head
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, memory: LayerMemory | None = None) -> Tensor:
        qkv = self.qkv(x)
        if memory is not None:
            read: Tensor = self.proj(memory.attend(qkv, self.n_head))
            return read
        y = attend(*split_heads(qkv, self.n_head), bias=self.causal_bias)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(x.shape))
        return out


class MLP(nn.Module):
    def __init__(self, d_model: int, ratio: int) -> None:
        super().__init__()
        self.fc = nn.Linear(d_model, ratio * d_model, bias=False)
        self.proj = nn.Linear(ratio * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(F.silu(self.fc(x)))
        return out


class Block(nn.Module):
    """One transformer layer with sandwich RMSNorm in one of the two senses of the word."""

    def __init__(self, d_model: int, n_head: int, mlp_ratio: int, norm_placement: NormPlacement) -> None:
        super().__init__()
        self.norm_placement = norm_placement
        self.n1, self.n2, self.n3, self.n4 = (RMSNorm(d_model, eps=RMS_EPS) for _ in range(4))
        self.attn = Attention(d_model, n_head)
        self.mlp = MLP(d_model, mlp_ratio)

    def forward(self, x: Tensor, memory: LayerMemory | None = None) -> Tensor:
        if self.norm_placement == "residual":  # [G]
            x = self.n2(x + self.attn(self.n1(x), memory))
            x = self.n4(x + self.mlp(self.n3(x)))
        else:
            x = x + self.n2(self.attn(self.n1(x), memory))
            x = x + self.n4(self.mlp(self.n3(x)))
        return x


class RegionBody(nn.Module):
    """One loop step of a region: inject the input, run the region's layers, norm the state.

    A module of its own so that hooks see each step: its first input is ``x_{k-1}``, its output ``x_k``.
    """

    def __init__(self, blocks: Sequence[Block], d_model: int, *, inject: bool, state_norm: bool) -> None:
        super().__init__()
        self.adapter = nn.Linear(2 * d_model, d_model, bias=False) if inject else None
        self.blocks = nn.ModuleList(blocks)
        # No gain: the norm of the state is then sqrt(D) exactly, a known scale for every threshold.
        self.norm = RMSNorm(d_model, eps=RMS_EPS, elementwise_affine=False) if state_norm else None

    def forward(self, x: Tensor, e: Tensor | None = None, memory: Sequence[LayerMemory] | None = None) -> Tensor:
        """``x_k`` from ``x_{k-1}``, both ``(B, T, D)``; ``e`` is the region's input, None to inject nothing."""
        if e is not None and self.adapter is not None:
            x = self.adapter(torch.cat([x, e.to(x.dtype)], dim=-1))
        for i, block in enumerate(self.blocks):
            x = block(x, None if memory is None else memory[i])
        return x if self.norm is None else self.norm(x)


class Region(nn.Module):
    """A looped group of layers and how its loop starts, is fed and ends."""

    def __init__(
        self,
        name: str,
        body: RegionBody,
        d_model: int,
        *,
        injection: Injection,
        initial_state: InitialState,
        noise_every_step: bool,
        exit_norm: bool,
    ) -> None:
        super().__init__()
        self.name = name
        self.body = body
        self.injection = injection
        self.initial = initial_state
        self.noise_every_step = noise_every_step
        self.exit_norm = RMSNorm(d_model, eps=RMS_EPS) if exit_norm else None

    def initial_state(self, e: Tensor, noise: Noise) -> Tensor:
        """``x_0`` for the region's input ``e``, ``(B, T, D)``."""
        if self.initial == "input":
            return e
        if self.initial == "zero":
            return torch.zeros_like(e)
        return noise(self.name, 0, e).to(e.dtype).expand_as(e)

    def step(self, x: Tensor, e: Tensor, k: int, noise: Noise, memory: Sequence[LayerMemory] | None = None) -> Tensor:
        """``x_k`` from ``x_{k-1}``; ``k`` counts from 1."""
        if self.noise_every_step and k > 1:
            x = x + noise(self.name, k - 1, e).to(x.dtype)
        inject = self.injection == "every_step" or (self.injection == "first_step" and k == 1)
        out: Tensor = self.body(x, e if inject else None, memory)
        return out

    def exit(self, x: Tensor) -> Tensor:
        """What the region hands on, from its last state: ``(..., D)``, row by row."""
        return x if self.exit_norm is None else self.exit_norm(x)

    def forward(
        self, e: Tensor, steps: int, noise: Noise, backprop_depth: int | None = None, recompute: bool = False
    ) -> Tensor:
        """:meth:`unroll`, as the call that engines of distributed training gather weights around."""
        return self.unroll(e, steps, noise, backprop_depth, recompute)

    def unroll(
        self, e: Tensor, steps: int, noise: Noise, backprop_depth: int | None = None, recompute: bool = False
    ) -> Tensor:
        """A fixed number of steps, no policy: ``(B, T, D)`` to ``(B, T, D)``.

        Gradients flow through the last ``backprop_depth`` steps only (None: through all). With ``recompute`` only
        each step's first state is kept for them, and the step is computed again on the way back.
        """
        x = self.initial_state(e, noise)
        cut = 0 if backprop_depth is None else max(0, steps - backprop_depth)
        with torch.no_grad():
            for k in range(1, cut + 1):
                x = self.step(x, e, k, noise)
        for k in range(cut + 1, steps + 1):
            if recompute and torch.is_grad_enabled():
                # Nothing in a step draws from a global generator.
                x = checkpoint(self.step, x, e, k, noise, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.step(x, e, k, noise)
        return self.exit(x)
