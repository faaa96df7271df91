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


class OuroLayer(SandwichBlock):
    """A layer that keeps its keys and values of every step in a slot of their own."""

    def __init__(self, index: int, layers: int) -> None:
        super().__init__()
        self.index, self.layers = index, layers

    def forward(self, x: Tensor, *, past_key_value: SlotCache | None = None, current_ut: int = 0) -> Tensor:  # type: ignore[override]
        return super().forward(x, torch.tensor(current_ut * self.layers + self.index), past_key_value)


class OuroModel(nn.Module):
    """The loop of Ouro (arXiv 2510.25741): all layers and the norm again and again, and a gate on each state."""

    def __init__(self, layers: int = 2, steps: int = 6) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(OuroLayer(i, layers) for i in range(layers))
        self.norm = nn.RMSNorm(WIDTH)
        self.early_exit_gate = nn.Linear(WIDTH, 1)
        self.total_ut_steps = steps

    def forward(
        self, ids: Tensor, past_key_values: SlotCache | None = None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        x, states, gates = self.embed_tokens(ids), [], []
        for current_ut in range(self.total_ut_steps):
            for layer in self.layers:
                x = layer(x, past_key_value=past_key_values, current_ut=current_ut)
            x = self.norm(x)
            states.append(x)
            gates.append(self.early_exit_gate(x))
        return x, states, gates


class OuroForCausalLM(nn.Module):
    """The structure of Ouro: after the loop a step is chosen for each token, or all are weighted."""

    def __init__(self, threshold: float = 1.0, **keys: int) -> None:
        super().__init__()
        self.model = OuroModel(**keys)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.early_exit_threshold = threshold

    @staticmethod
    def exit_distribution(gates: list[Tensor]) -> Tensor:
        """``p_k = lambda_k prod_{j<k} (1 - lambda_j)``, and what is left at the last step; ``(..., steps)``."""
        left, found = torch.ones_like(gates[0].squeeze(-1)), []
        for gate in gates[:-1]:
            exits = torch.sigmoid(gate.squeeze(-1))
            found.append(exits * left)
            left = left * (1 - exits)
        return torch.stack([*found, left], -1)

    def exit_steps(self, gates: list[Tensor], threshold: float) -> Tensor:
        """The first step, from 1, at which the distribution adds up to the threshold; the last if none does."""
        reached = self.exit_distribution(gates).cumsum(-1) >= threshold
        return torch.where(reached.any(-1), reached.float().argmax(-1) + 1, len(gates))

    def forward(
        self,
        ids: Tensor,
        past_key_values: SlotCache | None = None,
        *,
        exit_at_step: int | None = None,
        exit_threshold: float | None = None,
        weighted: bool = False,
    ) -> Any:
        _, states, gates = self.model(ids, past_key_values)
        if weighted:
            each = self.lm_head(torch.stack(states, -2)) * self.exit_distribution(gates).unsqueeze(-1)
            return SimpleNamespace(logits=each.sum(-2))
        steps = self.exit_steps(gates, self.early_exit_threshold if exit_threshold is None else exit_threshold)
        if exit_at_step is not None:
            steps = torch.full_like(steps, exit_at_step + 1)
        chosen = torch.stack(states, -2).take_along_dim((steps - 1)[..., None, None], -2).squeeze(-2)
        return SimpleNamespace(logits=self.lm_head(chosen))
