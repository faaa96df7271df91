"""One pass through the layers: the only place where a network is walked, whatever its depth and its memory.

:func:`fixed_pass` repeats each region a given number of times; :func:`halting_pass` until policies halt it, within
budgets. What an execution remembers from step to step, or from token to token, is a :class:`Memories`: all rows
(masked), those present (compact), or a cache (:mod:`haltkit.models.gpt.decoding`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from haltkit.bodies import LoopBody
from haltkit.loop import Execution, Keep, LoopObserver, run_loop
from haltkit.models.gpt.draws import EvaluationNoise
from haltkit.models.gpt.layers import Noise, Region
from haltkit.models.gpt.memory import (
    CompactMemory,
    CompactRegionLoop,
    MaskedMemory,
    RegionLoop,
    Rows,
    run_once,
)
from haltkit.protocol import HaltingPolicy

__all__ = [
    "Budgets",
    "CompactMemories",
    "Keeper",
    "MaskedMemories",
    "Memories",
    "Network",
    "Pass",
    "fixed_pass",
    "halting_pass",
    "walk",
]


class Network(Protocol):
    """What a pass, a cache and a generator need to know of a model."""

    layers: nn.ModuleDict
    noise: EvaluationNoise
    vocab_size: int
    block_size: int

    @property
    def regions(self) -> dict[str, Region]: ...

    def loop_counts(self, loops: int | Mapping[str, int] | None) -> dict[str, int]: ...

    def embed(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor: ...

    def readout(self, x: Tensor) -> Tensor: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...


class Body(LoopBody, Protocol):
    """A region's body, which can also step with every row active (``active`` None)."""

    def step(self, x: Tensor, k: int, active: Tensor | None) -> Tensor: ...


class Memories(Protocol):
    """Where one pass keeps keys and values: what masked, compact and cached execution differ in."""

    @property
    def execution(self) -> Execution: ...

    def once(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        """The output of a layer that does not loop."""
        ...

    def begin(self, name: str, region: Region, e: Tensor) -> tuple[Body, Tensor]:
        """The body of a loop that begins, and its ``x_0``, from the region's input ``e``."""
        ...

    def end(self, name: str, body: Any, steps: Tensor | None) -> None:
        """The loop of that body is over; its rows took ``steps`` (None: all rows as many)."""
        ...


class Keeper(Protocol):
    """Is given the keys and values of each layer at its end; nothing else refers to them any longer."""

    def keep(self, name: str, blocks: Sequence[Sequence[Tensor]], steps: Tensor | None, guarded: bool) -> None:
        """Take what a layer computed.

        Args:
            blocks: for each of its blocks the keys and values after every step, ``(B * T, 2D)`` each; one step where
                nothing loops.
            steps: ``K_j``, ``(B, T)``; None: nothing loops.
            guarded: something was not finite.
        """
        ...


@dataclass(frozen=True)
class Pass:
    """The result of a pass, without the head.

    Attributes:
        x: the last layer's output, ``(..., D)``.
        steps: body applications of each row, by region, ``(...)`` int64.
        outcome: a :class:`haltkit.Outcome` each, by region, ``(...)`` int8.
    """

    x: Tensor
    steps: dict[str, Tensor]
    outcome: dict[str, Tensor]


@dataclass(frozen=True)
class Budgets:
    """How many steps a row may take: in each region, and over all of them (``total``; None: no limit).

    ``by_row`` says it for each row of a region, ``(B, T)`` int64; None: all rows have their region's budget.
    """

    by_region: dict[str, int]
    total: int | None = None
    by_row: Mapping[str, Tensor] | None = None

    @classmethod
    def of(
        cls,
        network: Network,
        max_loops: int | Mapping[str, int],
        total_loops: int | None,
        by_row: Mapping[str, Tensor] | None = None,
    ) -> Budgets:
        """Checked against a network's regions.

        Raises:
            ValueError: a budget with less than a step for a region, a mapping that does not name the regions, or both a
                total and budgets of rows.
        """
        if by_row is not None and total_loops is not None:
            raise ValueError("total_loops and budgets by row both say what a row may spend: give one of them")
        if by_row is not None and by_row.keys() != set(network.regions):
            raise ValueError(f"budgets for {', '.join(by_row)}; the model's regions are {', '.join(network.regions)}")
        if isinstance(max_loops, int) and max_loops < 1:
            raise ValueError(f"max_loops={max_loops}: a loop takes at least 1 step")
        count = len(network.regions)
        if total_loops is not None and total_loops < count:
            raise ValueError(
                f"total_loops={total_loops}: the model has {count} regions, and each takes a step at least"
            )
        counts = network.loop_counts(max_loops)
        return cls(counts, None if total_loops is None else min(total_loops, sum(counts.values())), by_row)

    def remaining(self, name: str, taken: Mapping[str, Tensor], like: Tensor) -> Tensor | None:
        """What each row may spend in region ``name``, the shape of ``like``'s rows; None: its own budget alone counts.

        First come, first served, but one step is kept for each region still to come.

        Args:
            taken: steps in the regions before, by name.
            like: the state, ``(..., D)``.
        """
        if self.total is None:
            return None if self.by_row is None else self.by_row[name]
        most = torch.full(like.shape[:-1], self.total - (len(self.by_region) - 1 - len(taken)), device=like.device)
        for steps in taken.values():
            most = most - steps
        return most.clamp_max(self.by_region[name])


def walk(
    layers: nn.ModuleDict,
    x: Tensor,
    loop: Callable[[str, Region, Tensor], Tensor],
    once: Callable[[str, nn.Module, Tensor], Tensor],
) -> Tensor:
    """``x`` through all layers in order: regions by ``loop``, the others by ``once``."""
    for name, layer in layers.items():
        x = loop(name, layer, x) if isinstance(layer, Region) else once(name, layer, x)
    return x


def fixed_pass(
    layers: nn.ModuleDict,
    x: Tensor,
    counts: Mapping[str, int],
    noise: Noise,
    *,
    memories: Memories | None = None,
    backprop_depth: int | None = None,
    recompute: bool = False,
) -> Tensor:
    """Through all layers at fixed loop counts, with no policy and nothing looked at: ``(..., D)`` to ``(..., D)``.

    Args:
        counts: steps of each region.
        noise: for the regions' initial states; ``memories`` have their own.
        memories: None: every row is computed, and nothing is remembered.
        backprop_depth, recompute: see :meth:`haltkit.models.gpt.layers.Region.unroll`; without memories only.
    """

    def loop(name: str, region: Region, e: Tensor) -> Tensor:
        if memories is None:  # as a call, which engines of distributed training gather weights around
            out: Tensor = region(e, counts[name], noise, backprop_depth, recompute)
            return out
        body, h = memories.begin(name, region, e)
        for k in range(1, counts[name] + 1):
            h = body.step(h, k, None)
        memories.end(name, body, None)
        return region.exit(h)

    def once(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        if memories is not None:
            return memories.once(name, layer, x)
        out: Tensor = layer(x)
        return out

    return walk(layers, x, loop, once)


def halting_pass(
    network: Network,
    x: Tensor,
    policies: Mapping[str, HaltingPolicy[Any]],
    budgets: Budgets,
    memories: Memories,
    *,
    rows: Tensor | None = None,
    keep: Keep = "current",
    observer: LoopObserver | None = None,
) -> Pass:
    """Through all layers, each region looping until its policy halts it.

    Args:
        x: the embedded rows, ``(B, T, D)``, or ``(B, D)`` for one new token each.
        policies: one for each region.
        rows, keep, observer: see :func:`haltkit.run_loop`; the observer is given each region's name.
    """
    steps: dict[str, Tensor] = {}
    outcome: dict[str, Tensor] = {}

    def loop(name: str, region: Region, e: Tensor) -> Tensor:
        body, x0 = memories.begin(name, region, e)
        result = run_loop(
            body,
            x0,
            policies[name],
            max_steps=budgets.by_region[name],
            readout=network.readout,
            rows=rows,
            keep=keep,
            observer=observer,
            name=name,
            budget=budgets.remaining(name, steps, x0),
            execution=memories.execution,
        )
        memories.end(name, body, result.steps)
        steps[name], outcome[name] = result.steps, result.outcome
        return region.exit(result.x)

    return Pass(walk(network.layers, x, loop, memories.once), steps, outcome)


class MaskedMemories:
    """All rows at every step: the slow, obvious reference."""

    execution: Execution = "masked"

    def __init__(self, noise: Noise) -> None:
        self.noise = noise

    def once(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        """A layer over ``(B, T, D)``: here, too, a token that is not finite must not reach earlier ones."""
        out: Tensor = layer(x, MaskedMemory())
        return out

    def begin(self, name: str, region: Region, e: Tensor) -> tuple[RegionLoop, Tensor]:
        return RegionLoop(region, e, self.noise), region.initial_state(e, self.noise)

    def end(self, name: str, body: RegionLoop, steps: Tensor | None) -> None:
        """Nothing is kept."""


class CompactMemories:
    """Those rows of ``B`` sequences of ``T`` that are still present.

    Args:
        keeper: is given each layer's keys and values, for instance to cache them.
    """

    execution: Execution = "compact"

    def __init__(self, batch: int, length: int, noise: EvaluationNoise, keeper: Keeper | None = None) -> None:
        self.batch, self.length, self.noise, self.keeper = batch, length, noise, keeper

    def once(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        rows = Rows(self.batch, self.length)
        memory = CompactMemory(rows)
        out = run_once(layer, x.flatten(0, 1), memory, rows)
        if self.keeper is not None and memory.kv is not None:
            self.keeper.keep(name, [[memory.kv]], None, rows.guarded)
        return out.view_as(x)

    def begin(self, name: str, region: Region, e: Tensor) -> tuple[CompactRegionLoop, Tensor]:
        rows = Rows(self.batch, self.length)
        memories = [CompactMemory(rows, history=self.keeper is not None) for _ in region.body.blocks]
        positions = torch.arange(self.length, device=e.device).repeat(self.batch)
        body = CompactRegionLoop(region, e.flatten(0, 1), positions, self.noise, rows, memories)
        return body, region.initial_state(e, self.noise)

    def end(self, name: str, body: CompactRegionLoop, steps: Tensor | None) -> None:
        if self.keeper is not None:
            histories = [memory.history or [] for memory in body.memories if isinstance(memory, CompactMemory)]
            self.keeper.keep(name, histories, steps, body.rows.guarded)
