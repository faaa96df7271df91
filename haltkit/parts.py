"""Judging many rows a part at a time, so that what is measured stays in the processor's caches.

A policy that judges row by row may be asked about any part of the rows. For a state of hundreds of megabytes, judging
in parts reads memory once; judging it whole reads and allocates memory for every intermediate.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import HaltingPolicy, LoopStep, judge, map_state

__all__ = ["PartwiseJudge", "is_large"]

LARGE = 2**22  # numbers in a state, from which on judging it whole exceeds the caches
PART = 2**18  # numbers in a part


def is_large(x: Tensor) -> bool:
    """Whether a state is better judged in parts: on a CPU, far larger than its caches, and without gradients."""
    return x.numel() >= LARGE and x.is_cpu and not x.requires_grad


def _taken(place: slice, part: Tensor) -> Tensor:
    return part[place]


def _leaves(state: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(part: Tensor) -> Tensor:
        found.append(part)
        return part

    map_state(note, state)
    return found


class PartwiseJudge:
    """Asks a policy that judges row by row, one part of the rows after the other, and keeps its state in one place.

    The state's memory is allocated once, at the first step, and belongs to this object: later steps write into it.
    """

    def __init__(self, policy: HaltingPolicy[Any]) -> None:
        self.policy = policy
        self._memory: list[Tensor] = []

    def judge(
        self, state: Any, k: int, new: Tensor, x: Tensor, active: Tensor, region: str
    ) -> tuple[Any, Tensor, Tensor]:
        """The policy's state after step ``k``, the rows it halts, and the rows whose new state is finite.

        Args:
            new, x: ``x_k`` and ``x_{k-1}``, ``(..., D)``.
            active: rows that still run, ``(...)`` bool.
        """
        shape, flat, before = active.shape, new.flatten(0, -2), x.flatten(0, -2)
        count, size = len(flat), max(1, PART // max(1, new.shape[-1]))
        running = active.flatten()
        given = map_state(lambda part: part.reshape(count, *part.shape[len(shape) :]), state)
        finite, halted = torch.empty_like(running), torch.empty_like(running)
        after: Any = state
        for start in range(0, count, size):
            place = slice(start, min(start + size, count))
            # NaN and infinity survive a sum, which costs less than looking at every row.
            finite[place] = True if math.isfinite(float(flat[place].sum())) else signals.finite(flat[place])
            step = LoopStep(k, flat[place], before[place], running[place] & finite[place], region=region)
            after, verdict = judge(self.policy, map_state(partial(_taken, place), given), step)
            halted[place] = verdict.halt
            self._keep(_leaves(after), start, place, count)
        memory = iter(self._memory)
        kept = map_state(lambda _: next(memory), after)
        return map_state(lambda part: part.view(*shape, *part.shape[1:]), kept), halted.view(shape), finite.view(shape)

    def _keep(self, leaves: list[Tensor], start: int, place: slice, count: int) -> None:
        alike = [(leaf.dtype, leaf.shape[1:]) for leaf in leaves]
        if start == 0 and alike != [(kept.dtype, kept.shape[1:]) for kept in self._memory if len(kept) == count]:
            self._memory = [leaf.new_empty(count, *leaf.shape[1:]) for leaf in leaves]
        for kept, leaf in zip(self._memory, leaves, strict=True):
            kept[place] = leaf
