"""Policies around policies: they change what is decided, never what is measured.

Each is a policy itself, so they nest. The order that the registry builds is pooling, then thresholds by step
(:mod:`haltkit.stepwise`), then patience, then ``CheckEvery`` and ``MinSteps``: patience therefore counts every measured
step, also those at which ``CheckEvery`` halts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from haltkit.protocol import (
    Granularity,
    HaltingPolicy,
    LoopStep,
    Passing,
    ThresholdPolicy,
    Verdict,
    check_count,
    granularity_of,
    judge,
)

__all__ = ["AllOf", "AnyOf", "CheckEvery", "MinSteps", "Patience", "Pooled"]


class _PatienceState(NamedTuple):
    inner: Any
    hits: Tensor


@dataclass(frozen=True)
class Patience:
    """Halt when the inner policy says so ``count`` steps in a row."""

    policy: HaltingPolicy[Any]
    count: int

    def __post_init__(self) -> None:
        check_count("patience", self.count)

    @property
    def granularity(self) -> Granularity:
        return granularity_of(self.policy)

    def init(self, x0: Tensor) -> _PatienceState:
        hits = torch.zeros(x0.shape[:-1], dtype=torch.int32, device=x0.device)
        return _PatienceState(self.policy.init(x0), hits)

    def update(self, state: _PatienceState, step: LoopStep) -> tuple[_PatienceState, Verdict]:
        inner, (score, halt) = judge(self.policy, state.inner, step)
        hits = (state.hits + 1) * halt
        return _PatienceState(inner, hits), Verdict(score, hits >= self.count)


@dataclass(frozen=True)
class MinSteps(Passing):
    """Never halt before step ``steps``."""

    policy: HaltingPolicy[Any]
    steps: int

    def __post_init__(self) -> None:
        check_count("min_steps", self.steps, least=0)

    def update(self, state: Any, step: LoopStep) -> tuple[Any, Verdict]:
        state, (score, halt) = judge(self.policy, state, step)
        return state, Verdict(score, halt & (step.k >= self.steps))


@dataclass(frozen=True)
class CheckEvery(Passing):
    """Halt only at steps that are a multiple of ``every``; measure at all of them."""

    policy: HaltingPolicy[Any]
    every: int

    def __post_init__(self) -> None:
        check_count("check_every", self.every)

    def update(self, state: Any, step: LoopStep) -> tuple[Any, Verdict]:
        state, (score, halt) = judge(self.policy, state, step)
        return state, Verdict(score, halt & (step.k % self.every == 0))


@dataclass(frozen=True)
class Pooled:
    """One decision for a whole sequence or batch: the rows' scores are pooled, then compared with ``tau``.

    Only active rows count. The answer depends on every row of the pool, so in a causal model it is not causal.

    Args:
        policy: one with a ``tau``.
        over: ``sequence`` pools over the last dimension of rows (``T`` of ``(B, T, D)``); ``batch`` over all rows;
            ``world`` over all rows of all processes of the default group of ``torch.distributed``, one reduction of two
            numbers per step, so that every process takes the same number of steps. If one process stops alone, because
            none of its states is finite, the others wait until the group's timeout.
        reduce: mean or maximum of the scores.
    """

    policy: ThresholdPolicy[Any]
    over: Literal["sequence", "batch", "world"]
    reduce: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        if not isinstance(self.policy, ThresholdPolicy):
            raise ValueError(f"{type(self.policy).__name__} has no tau to compare a pooled score with")
        if self.over not in ("sequence", "batch", "world") or self.reduce not in ("mean", "max"):
            raise ValueError(f"pooling over {self.over!r} by {self.reduce!r}: sequence, batch or world, mean or max")

    @property
    def tau(self) -> float:
        """What the pooled score is compared with."""
        return self.policy.tau

    @property
    def granularity(self) -> Granularity:
        return self.over

    def init(self, x0: Tensor) -> Any:
        if self.over == "sequence" and x0.ndim < 3:
            raise ValueError(
                f"pooling over a sequence needs states (..., T, D); these are {tuple(x0.shape)}. "
                "Use granularity=token or batch"
            )
        if self.over == "world" and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError("granularity=world pools over processes, and torch.distributed has no process group here")
        return self.policy.init(x0)

    def update(self, state: Any, step: LoopStep) -> tuple[Any, Verdict]:
        state, (score, _) = judge(self.policy, state, step)
        dims = (-1,) if self.over == "sequence" else tuple(range(score.ndim))
        if self.reduce == "mean":
            total = torch.where(step.active, score, 0.0).sum(dims, keepdim=True)
            count = step.active.sum(dims, keepdim=True)
            if self.over == "world":
                total, count = _over_ranks(torch.stack([total, count.to(total.dtype)]), "SUM")
            pooled = total / count
        else:
            pooled = torch.where(step.active, score, -torch.inf).amax(dims, keepdim=True)
            if self.over == "world":
                pooled = _over_ranks(pooled, "MAX")
        pooled = pooled.expand_as(score)
        return state, Verdict(pooled, pooled < self.policy.tau)


def _over_ranks(values: Tensor, how: Literal["SUM", "MAX"]) -> Tensor:
    values = values.clone()
    torch.distributed.all_reduce(values, op=getattr(torch.distributed.ReduceOp, how))
    return values


@dataclass(frozen=True)
class AnyOf:
    """Halt when any part halts. The score is the number of parts that do not halt."""

    policies: tuple[HaltingPolicy[Any], ...]

    def __post_init__(self) -> None:
        _check_parts(self.policies)

    @property
    def granularity(self) -> Granularity:
        return _widest(self.policies)

    def init(self, x0: Tensor) -> tuple[Any, ...]:
        return tuple(policy.init(x0) for policy in self.policies)

    def update(self, state: tuple[Any, ...], step: LoopStep) -> tuple[tuple[Any, ...], Verdict]:
        states, halts = _update_parts(self.policies, state, step)
        return states, Verdict((~halts).sum(0).float(), halts.any(0))


@dataclass(frozen=True)
class AllOf:
    """Halt when all parts halt at the same step. The score is the number of parts that do not halt."""

    policies: tuple[HaltingPolicy[Any], ...]

    def __post_init__(self) -> None:
        _check_parts(self.policies)

    @property
    def granularity(self) -> Granularity:
        return _widest(self.policies)

    def init(self, x0: Tensor) -> tuple[Any, ...]:
        return tuple(policy.init(x0) for policy in self.policies)

    def update(self, state: tuple[Any, ...], step: LoopStep) -> tuple[tuple[Any, ...], Verdict]:
        states, halts = _update_parts(self.policies, state, step)
        return states, Verdict((~halts).sum(0).float(), halts.all(0))


def _check_parts(policies: tuple[HaltingPolicy[Any], ...]) -> None:
    if len(policies) < 2:
        raise ValueError(f"a combination needs at least two policies, got {len(policies)}")


def _widest(policies: tuple[HaltingPolicy[Any], ...]) -> Granularity:
    found = {granularity_of(policy) for policy in policies}
    coarse: tuple[Granularity, ...] = ("world", "batch", "sequence")
    return next((granularity for granularity in coarse if granularity in found), "token")


def _update_parts(
    policies: tuple[HaltingPolicy[Any], ...], states: tuple[Any, ...], step: LoopStep
) -> tuple[tuple[Any, ...], Tensor]:
    """Every part's new state, and their halts stacked, ``(parts, ...)``."""
    answers = [judge(policy, state, step) for policy, state in zip(policies, states, strict=True)]
    return tuple(state for state, _ in answers), torch.stack([verdict.halt for _, verdict in answers])
