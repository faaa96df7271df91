"""Small models of our own with the structure and the names of models that no registry carries, and what runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import haltkit

WIDTH, HEADS, VOCABULARY = 16, 2, 50


def with_config(config: Any, run: Callable[[], Tensor], **values: int) -> Tensor:
    before = {name: getattr(config, name) for name in values}
    try:
        for name, value in values.items():
            setattr(config, name, value)
        return run()
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@dataclass(frozen=True)
class DrawnFromState:
    """Halts each entry at a depth from 1 to ``most`` that follows from its own first state alone."""

    most: int

    def init(self, x0: Tensor) -> Tensor:
        return x0.new_zeros(x0.shape[:-1])

    def update(self, state: Tensor, step: haltkit.LoopStep) -> tuple[Tensor, haltkit.Verdict]:
        if step.k == 1:
            sums = step.x.double().abs().flatten(1).sum(1).mul(1e3).floor().long().remainder(self.most) + 1
            state = sums.view(-1, *[1] * (state.ndim - 1)).expand_as(state).to(state)
        left = state - step.k
        return state, haltkit.Verdict(left, left <= 0)


class Counting(nn.Module):
    """A module, and the sizes of the first dimension that it was given."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, list[int]()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(len(args[0]))
        return self.inner(*args, **kwargs)


class InARow(nn.Module):
    """Two loops, one after the other, with a layer between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core, self.between, self.refine = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, first: int = 9, second: int = 7) -> Tensor:
        for _ in range(first):
            x = torch.tanh(self.core(x))
        x = self.between(x)
        for _ in range(second):
            x = torch.tanh(self.refine(x))
        return x


class Nested(nn.Module):
    """An inner loop within each step of an outer one, as HRM's; both are carried from step to step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high = (nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor, high: int = 5, low: int = 4) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(high):
            for _ in range(low):
                z = torch.tanh(self.low(z + x))
            x = torch.tanh(self.high(z + x))
        return x


class AtDepths:
    """Halts the n-th loop that it is asked about at the n-th depth."""

    def __init__(self, *depths: int) -> None:
        self.depths = list(depths)

    def init(self, x0: Tensor) -> int:
        return self.depths.pop(0)

    def update(self, state: int, step: haltkit.LoopStep) -> tuple[int, haltkit.Verdict]:
        score = torch.full_like(step.x[..., 0], float(step.k < state))
        return state, haltkit.Verdict(score, score < 0.5)


class SlotCache:
    """Keys and values by slot, as Hugging Face's caches keep them by layer."""

    def __init__(self) -> None:
        self.slots: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self) -> int:
        return self.slots[0][0].shape[-2] if self.slots else 0

    def update(self, keys: Tensor, values: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        slot = int(layer)
        if slot in self.slots:
            old_keys, old_values = self.slots[slot]
            keys, values = torch.cat([old_keys, keys], -2), torch.cat([old_values, values], -2)
        self.slots[slot] = keys, values
        return keys, values


class SandwichBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_4 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, block_idx: Tensor, cache: SlotCache | None = None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.update(k, v, block_idx)
        mask = torch.ones(t, k.shape[-2], dtype=torch.bool).tril(k.shape[-2] - t)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, WIDTH))
        out: Tensor = self.norm_4(x + self.mlp(x))
        return out


class RavenForCausalLM(nn.Module):
    """The structure of Huginn (arXiv 2502.05171): prelude, adapter and core in two loops, coda, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.ModuleList(SandwichBlock() for _ in range(n)) for n in (1, 2, 1)]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "prelude": blocks[0],
                "adapter": nn.Linear(2 * WIDTH, WIDTH, bias=False),
                "core_block": blocks[1],
                "coda": blocks[2],
                "ln_f": nn.RMSNorm(WIDTH),
            }
        )

    def embed(self, ids: Tensor, cache: SlotCache | None = None) -> Tensor:
        return self.transformer["prelude"][0](self.transformer["wte"](ids), torch.tensor(0), cache)

    def initial(self, e: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.randn(1, 64, WIDTH, generator=generator)[:, : e.shape[1]].expand_as(e)

    def core_block_forward(self, x: Tensor, e: Tensor, block_idx: Tensor, cache: SlotCache | None) -> Tensor:
        x = self.transformer["adapter"](torch.cat([x, e], -1))
        for block in self.transformer["core_block"]:
            block_idx += 1  # in place, as the original counts
            x = block(x, block_idx, cache)
        return x

    def forward(self, ids: Tensor, num_steps: tuple[int, int] = (8, 0), cache: SlotCache | None = None) -> Any:
        e = self.embed(ids, cache)
        x, block_idx = self.initial(e), torch.tensor(0)
        with torch.no_grad():
            for _ in range(num_steps[0]):
                x = self.core_block_forward(x, e, block_idx, cache)
        for _ in range(num_steps[1]):
            x = self.core_block_forward(x, e, block_idx, cache)
        return self.predict_from_latents(x, cache)

    def predict_from_latents(self, x: Tensor, cache: SlotCache | None = None) -> Any:
        x = self.transformer["ln_f"](x)
        x = self.transformer["coda"][0](x, torch.tensor(-1), cache)
        return SimpleNamespace(logits=self.transformer["ln_f"](x) @ self.transformer["wte"].weight.T)
