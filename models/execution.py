"""One adaptive forward pass of the bundled model, masked or compact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from haltkit.loop import Execution, Keep, LoopObserver, run_loop
from haltkit.models.gpt import LoopedGPT, Region
from haltkit.models.memory import CompactMemory, CompactRegionLoop, MaskedMemory, RegionLoop, Rows
from haltkit.protocol import HaltingPolicy

__all__ = ["Keeper", "Policies", "run_policies", "share_budget"]

Policies = str | HaltingPolicy[Any] | Mapping[str, str | HaltingPolicy[Any]]


class Keeper(Protocol):
    """Told of the keys and values of each layer when a pass leaves it; nobody else holds them any longer."""

    def keep(self, name: str, blocks: Sequence[Sequence[Tensor]], steps: Tensor | None, careful: bool) -> None:
        """Take what a layer computed.

        Args:
            blocks: for each of its blocks the keys and values after every step, ``(B * T, 2D)`` each; one step where
                nothing loops.
            steps: ``K_j``, ``(B, T)``; None: nothing loops.
            careful: something was not finite.
        """
        ...


def share_budget(total: int | None, spent: Tensor | None, later: int, max_loops: int) -> Tensor | None:
    """What each token may spend in the region at hand, ``(...)`` int64; None: nothing but ``max_loops`` limits it.

    First come, first served, but one step is kept for each region still to come.

    Args:
        total: budget over all regions.
        spent: steps so far, ``(...)``; None: this is the first region.
        later: regions still to come.
    """
    if total is None:
        return None
    left = total - later
    return torch.clamp(left - spent, max=max_loops) if spent is not None else torch.tensor(min(left, max_loops))


def check_budget(model: LoopedGPT, max_loops: int | Mapping[str, int], total_loops: int | None) -> dict[str, int]:
    """The budget of each region by name; refuse those that leave a region without a step."""
    if isinstance(max_loops, int) and max_loops < 1:
        raise ValueError(f"max_loops={max_loops}: a loop takes at least 1 step")
    if total_loops is not None and total_loops < len(model.regions):
        raise ValueError(f"total_loops={total_loops}: the model has {len(model.regions)} regions, a step each at least")
    return model.loop_counts(max_loops)


def run_policies(
    model: LoopedGPT,
    tokens: Tensor,
    policies: Mapping[str, HaltingPolicy[Any]],
    *,
    max_loops: int | Mapping[str, int],
    total_loops: int | None = None,
    rows: Tensor | None = None,
    keep: Keep = "current",
    observer: LoopObserver | None = None,
    execution: Execution = "masked",
    keeper: Keeper | None = None,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Everything but the head: the last layer's output ``(B, T, D)``, and steps and outcome by region.

    ``keeper`` is told of keys and values in compact execution.

    Raises:
        ValueError: budgets that leave a region without a step, padding before a token, an unknown execution.
    """
    budgets = check_budget(model, max_loops, total_loops)
    if execution not in ("masked", "compact"):
        raise ValueError(f"execution={execution!r}: allowed are 'masked' and 'compact'")
    if rows is not None and bool((rows[:, 1:] & ~rows[:, :-1]).any()):
        raise ValueError("rows: padding must be at the end of a sequence, not before one of its tokens")
    compact = execution == "compact"
    x = model.embed(tokens)
    positions = torch.arange(tokens.shape[1], device=x.device).repeat(len(tokens))
    steps: dict[str, Tensor] = {}
    outcome: dict[str, Tensor] = {}
    spent: Tensor | None = None
    later = len(model.regions)
    for name, layer in model.layers.items():
        if isinstance(layer, Region):
            later -= 1
            budget = share_budget(total_loops, spent, later, budgets[name])
            rows_at_hand = Rows(*tokens.shape)
            memories = [CompactMemory(rows_at_hand, history=keeper is not None) for _ in layer.body.blocks]
            result = run_loop(
                CompactRegionLoop(layer, x.flatten(0, 1), positions, model.noise, rows_at_hand, memories)
                if compact
                else RegionLoop(layer, x, model.noise),
                layer.initial_state(x, model.noise),
                policies[name],
                max_steps=budgets[name],
                readout=model.readout,
                rows=rows,
                keep=keep,
                observer=observer,
                name=name,
                budget=None if budget is None else budget.to(x.device).expand(tokens.shape),
                execution=execution,
            )
            x, steps[name], outcome[name] = layer.leave(result.x), result.steps, result.outcome
            spent = steps[name] if spent is None else spent + steps[name]
            if keeper is not None:
                keeper.keep(name, [memory.history or [] for memory in memories], result.steps, rows_at_hand.careful)
        elif compact:
            x = run_once(name, layer, x, keeper)
        else:
            x = layer(x, MaskedMemory())  # a token that is not finite must not reach earlier ones here either
    return x, steps, outcome


def run_once(name: str, layer: nn.Module, x: Tensor, keeper: Keeper | None) -> Tensor:
    """A layer that does not loop, over all tokens ``(B, T, D)``; with care only where it is needed."""
    rows = Rows(*x.shape[:2])
    memory = CompactMemory(rows)
    out: Tensor = layer(x.flatten(0, 1), memory)
    if memory.doubt is not None and not math.isfinite(float(memory.doubt)):
        rows.careful = True
        out = layer(x.flatten(0, 1), memory)
    if keeper is not None and memory.kv is not None:
        keeper.keep(name, [[memory.kv]], None, rows.careful)
    return out.view_as(x)
