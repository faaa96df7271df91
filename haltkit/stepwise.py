"""Thresholds by step: a policy that must be surer early than late, or the other way round."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from haltkit.protocol import (
    LoopStep,
    Passing,
    ThresholdPolicy,
    Verdict,
    check_count,
    judge,
)

__all__ = ["StepTaus", "TauByStep"]


@dataclass(frozen=True)
class StepTaus:
    """A threshold for each step, as text ``0.5@4/1.2@9``: 0.5 from step 4 on, 1.2 from step 9 on.

    Before the first step that is named nothing halts. The last threshold holds for all steps after it, as a single
    ``tau`` does, so that the same text can be used with any budget; end with ``0@K`` if nothing is to halt from step K
    on.

    Args:
        pieces: pairs of a step, ascending, and the threshold from that step on; 0: nothing halts.

    Raises:
        ValueError: no pieces, steps that do not ascend from 1, a threshold that is negative or not finite, or none
            above 0.
    """

    pieces: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "pieces", tuple((step, float(tau)) for step, tau in self.pieces))
        for step, tau in self.pieces:
            check_count("step", step)
            if not 0 <= tau < math.inf:
                raise ValueError(f"{tau}@{step}: a threshold is a finite number, 0 where nothing halts, at least 0")
        if any(a >= b for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"thresholds from steps {', '.join(map(str, self.steps))}: the steps must ascend")
        if not any(tau for _, tau in self.pieces):
            raise ValueError("thresholds by step of which none is above 0 never halt anything: give at least one")

    @classmethod
    def of_text(cls, text: str) -> StepTaus:
        """The thresholds that ``str()`` wrote.

        Raises:
            ValueError: other text, or as above.
        """
        pieces = []
        for piece in text.split("/"):
            tau, at, step = piece.partition("@")
            try:
                if not at:
                    raise ValueError
                pieces.append((int(step), float(tau)))
            except ValueError:
                raise ValueError(
                    f"{piece!r} is not TAU@STEP, a threshold and the step it begins at, as in 0.5@4"
                ) from None
        return cls(tuple(pieces))

    @classmethod
    def of_steps(cls, taus: Sequence[float | None]) -> StepTaus:
        """From the threshold of each step, the first one first; None or 0: nothing halts there.

        Raises:
            ValueError: as above.
        """
        pieces: list[tuple[int, float]] = []
        step = 1
        for tau, alike in groupby(0.0 if tau is None else tau for tau in taus):
            if pieces or tau:
                pieces.append((step, tau))
            step += sum(1 for _ in alike)
        return cls(tuple(pieces))

    def __str__(self) -> str:
        return "/".join(f"{tau!r}@{step}" if tau else f"0@{step}" for step, tau in self.pieces)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps at which the threshold changes."""
        return tuple(step for step, _ in self.pieces)

    @property
    def largest(self) -> float:
        """The largest threshold, below which a score must be to halt at any step."""
        return max(tau for _, tau in self.pieces)

    def at(self, k: int | Tensor, score: Tensor) -> float | Tensor:
        """The threshold at step ``k``, -inf where nothing halts: a number, or one per row in the dtype of ``score``."""
        known = (-math.inf, *(tau or -math.inf for _, tau in self.pieces))
        if not isinstance(k, Tensor):
            return known[bisect_right(self.steps, k)]
        place = torch.bucketize(k, torch.tensor(self.steps, device=k.device), right=True)
        return torch.tensor(known, dtype=score.dtype, device=score.device)[place.to(score.device)]


@dataclass(frozen=True)
class TauByStep(Passing):
    """Halt a row whose score at step k is below the threshold of step k.

    Args:
        policy: one with a ``tau``, which is the largest of the thresholds.
        taus: by step.

    Raises:
        ValueError: a policy without a ``tau``, or with another one.
    """

    policy: ThresholdPolicy[Any]
    taus: StepTaus

    def __post_init__(self) -> None:
        if not isinstance(self.policy, ThresholdPolicy):
            raise ValueError(f"{type(self.policy).__name__} has no tau that could depend on the step")
        if self.policy.tau != self.taus.largest:
            raise ValueError(
                f"the policy has tau={self.policy.tau}, and its largest threshold by step is {self.taus.largest}: give "
                "it that one"
            )

    @property
    def tau(self) -> float:
        """The largest threshold."""
        return self.taus.largest

    def update(self, state: Any, step: LoopStep) -> tuple[Any, Verdict]:
        state, (score, _) = judge(self.policy, state, step)
        return state, Verdict(score, score < self.taus.at(step.k, score))
