"""Proof, on the user's own model, that halting from outside gives what it says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from haltkit.attachment.description import Loop
from haltkit.attachment.errors import GlueDrift, VaryingInput
from haltkit.attachment.frame import _tensors
from haltkit.policies import Fixed

if TYPE_CHECKING:
    from haltkit.attachment.session import Session

__all__ = ["Report", "difference", "verify"]


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found. Differences are the largest over all tensors of the output; 0 is bit-equal.

    Attributes:
        k: the step of the forced halt.
        loops: iterations that the model runs by itself.
        neutral: difference that attaching makes when nothing halts.
        drift: change of the body's input between replayed iterations; None where fewer than two were replayed.
        halted: difference between a forced halt at ``k`` and the model run with ``k`` loops; None without ``run_at``.
    """

    k: int
    loops: int
    neutral: float
    drift: float | None
    halted: float | None

    @property
    def ok(self) -> bool:
        """Everything that could be checked is exactly equal, and a halt was compared or at least seen to be steady."""
        seen = self.drift is not None or self.halted is not None
        return seen and self.neutral == 0 and not self.drift and not self.halted

    def __str__(self) -> str:
        def verdict(value: float | None, unknown: str) -> str:
            return unknown if value is None else "exactly equal" if value == 0 else f"differs by up to {value:.3g}"

        return "\n".join(
            [
                f"attached, nothing halts: {verdict(self.neutral, '')} (the model runs {self.loops} iterations)",
                f"halted at {self.k}, the body's input while replaying: "
                + verdict(self.drift, "not checked, fewer than two iterations were replayed"),
                f"halted at {self.k}, against the model run with {self.k}: "
                + verdict(self.halted, "not compared, no run_at was given"),
            ]
        )


def difference(one: Any, other: Any) -> float:
    """The largest difference over the tensors of two outputs; 0 is bit-equal, inf another structure or shape."""
    a, b = _tensors(one), _tensors(other)
    if not a and not b:
        raise ValueError("run must return what is to be compared: tensors, or containers of them")
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    gaps = [
        0.0 if torch.equal(x, y) else float((x.double() - y.double()).abs().max()) for x, y in zip(a, b, strict=True)
    ]
    # Not equal, and yet the difference is NaN (not finite somewhere) or 0 (another dtype): no number says how much.
    return max(
        float("inf") if gap != gap or (gap == 0 and not torch.equal(x, y)) else gap
        for gap, x, y in zip(gaps, a, b, strict=True)
    )


def verify(session: Session, run: Callable[[], Any], k: int, run_at: Callable[[int], Any] | None = None) -> Report:
    """Compare runs of the user's own model.

    Args:
        session: attached to the model.
        run: calls the model on some input and returns its output; called three times, and must be deterministic.
        k: where to force a halt, below the number of iterations that the model runs.
        run_at: calls the model on the same input with that many loops, for the comparison that settles it.

    Raises:
        GlueDrift: the body's input goes on changing after the halt, so state is carried outside the described modules.
        VaryingInput: likewise, and the input does not depend on the state at all: a recurrence over a sequence.
        ValueError: the model ran no more than ``k`` iterations, ``run`` is not deterministic or returns no tensor, or
            the session only observes.
    """
    if session.policy is None:
        raise ValueError("this session only observes, and halts nothing: attach a policy to verify a halt")
    kept = session.newest
    try:
        return _verify(session, run, k, run_at)
    finally:
        session.newest = kept


def _verify(session: Session, run: Callable[[], Any], k: int, run_at: Callable[[int], Any] | None) -> Report:
    never = Fixed(2**31 - 1)
    with torch.no_grad():
        with session.detached():
            plain = run()
        with session.using(never):
            neutral = difference(run(), plain)
            loops = session.last.computed
        if neutral:
            with session.detached():
                if difference(run(), plain):
                    raise ValueError("run gives another output each time: fix its seed, and call model.eval()")
        if not 1 <= k < loops:
            raise ValueError(f"k={k}: the model runs {loops} iterations, so a halt can be forced at 1 to {loops - 1}")
        with session.using(Fixed(k), check_glue=True):
            halted = run()
        inputs, state = session.last_inputs, session.last.result.x
        drift = _drift(inputs)
        compared = None
        if run_at is not None:
            with session.detached():
                compared = difference(halted, run_at(k))
    if drift and compared != 0:
        _refuse(session.loop, inputs, state, drift)
    return Report(k, loops, neutral, drift, compared)


def _drift(inputs: list[list[Tensor]]) -> float | None:
    """The largest change between successive replayed iterations."""
    if len(inputs) < 2:
        return None
    return max(difference(a, b) for a, b in itertools.pairwise(inputs))


def _refuse(loop: Loop, inputs: list[list[Tensor]], state: Tensor, drift: float) -> None:
    """Say which of the two it is: the state steady and something else new each time, or the state itself moving."""
    steady = [all(torch.equal(a, b) for a, b in itertools.pairwise(column)) for column in zip(*inputs, strict=True)]
    carries = [t.shape == state.shape and torch.equal(t, state) for t in inputs[0]]
    if any(s and c for s, c in zip(steady, carries, strict=True)):
        raise VaryingInput(
            f"after the halt {loop.body[0]!r} was still given new input at each iteration (changing by up to "
            f"{drift:.3g}) beside the state: a recurrence over a sequence cannot be halted in depth. Record it instead"
        )
    raise GlueDrift(
        f"after the halt the input of {loop.body[0]!r} went on changing (by up to {drift:.3g}): the model carries "
        "state outside the described modules, such as h = h + f(h). Say on_halt={...: 'zero'} for a residual branch, "
        "'identity' for a map of the state, carry= if the state enters elsewhere, or describe the loop by the module "
        "that contains the sum"
    )
