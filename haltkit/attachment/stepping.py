"""Stepping a foreign model's loop from outside: one call of the model whose loop goes on from given states."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from haltkit import signals
from haltkit.attachment.attach import attach
from haltkit.attachment.axes import close
from haltkit.attachment.description import Loop, find_call
from haltkit.attachment.errors import CannotStep
from haltkit.attachment.outputs import first_tensor
from haltkit.attachment.override import intercepted
from haltkit.loop import Outcome
from haltkit.policies import Fixed
from haltkit.protocol import HaltingPolicy, Readout

__all__ = ["Ran", "Stepping"]

INSTEAD = "Continue the text token by token instead: haltkit.generation, or calls of the model inside haltkit.attach"
# From an iteration's number, from 1, and its state to the state that the next iteration and the output are given.
Putting = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Ran:
    """One call of the model.

    Attributes:
        logits: ``(B, T, V)``; NaN where a position's state did not stay finite.
        states: before the first iteration (infinite if that is not known) and after each, ``(B, T, D)``.
        steps: that each position took, ``(B, T)`` int64.
        iterations: that the model's own loop went through, replayed ones included.
    """

    logits: Tensor
    states: list[Tensor]
    steps: Tensor
    iterations: int


class _Recorded:
    """Observes one loop: copies of its states."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def begin(self, name: str, x0: Tensor) -> None:
        self.states = [x0.clone()]

    def step(self, name: str, k: int, x: Tensor) -> None:
        self.states.append(x.clone())

    def end(self, name: str, steps: Tensor, outcome: Tensor) -> None:
        """Nothing is noted."""


class Stepping:
    """Runs a causal model on texts ``(B, T)``, with its loop halted by a policy or at a depth, from states put into it.

    Args:
        model: the model.
        run: from token ids ``(B, T)`` to the model's output, without a cache.
        name: of the region; loop: its description; readout: from its state to logits, if there is one.
    """

    def __init__(
        self, model: nn.Module, run: Callable[[Tensor], Any], name: str, loop: Loop, readout: Readout | None = None
    ) -> None:
        self.model, self.run, self.name, self.loop, self.readout = model, run, name, loop, readout

    def __call__(
        self,
        ids: Tensor,
        policy: HaltingPolicy[Any] | int,
        put: Putting | None = None,
        *,
        max_steps: int | None = None,
    ) -> Ran:
        """One call of the model.

        Args:
            ids: the texts.
            policy: halts the loop; a number: after that many iterations.
            put: what is given on in the place of each iteration's state.
            max_steps: see :func:`haltkit.attach`.

        Raises:
            CannotStep: output or state have other rows than ``(B, T)``, or the loop's module also runs elsewhere.
            AttachError: the loop cannot be halted.
        """
        recorded, loop = _Recorded(), self.loop
        policies = {self.name: Fixed(policy) if isinstance(policy, int) else policy}
        putting = _Putting(loop, put)
        module, method = find_call(self.model, loop.state_module)
        how: dict[str, Any] = {"observer": recorded, "max_steps": max_steps, "readout": self.readout}
        # What the first halted loop of a session is checked for, `proved` has seen in another way.
        with attach(self.model, policies, loops={self.name: loop}, check=False, **how) as session:
            with intercepted([(module, method, putting)] if put else []):
                logits = self._logits(self.run(ids))
            tally = session.tally[self.name]
            if tally.loops != 1 or (put and putting.outputs != tally.computed * loop.period):
                raise self.refused(
                    f"one call of the model runs it {tally.loops} times, or {loop.state_module!r} also runs outside"
                )
            steps, outcome = session.steps[self.name], session.outcome[self.name]
        for what, tensor in (("output", logits), ("state", recorded.states[-1])):
            if tensor.shape[:2] != ids.shape or tensor.ndim != 3:
                raise self.refused(
                    f"for tokens {tuple(ids.shape)} its {what} is {tuple(tensor.shape)}, and (batch, tokens, ...) is "
                    "needed"
                )
        broken = outcome == Outcome.NONFINITE  # the loop went on with the state before
        return Ran(
            logits.masked_fill(broken.unsqueeze(-1), math.nan), recorded.states, steps, tally.computed + tally.skipped
        )

    def _logits(self, output: Any) -> Tensor:
        """The logits in the model's output."""
        found = getattr(output, "logits", None)
        found = first_tensor(output) if found is None else found
        if not isinstance(found, Tensor):
            raise self.refused(f"run returns a {type(output).__name__} without logits: let it return the logits")
        return found

    def refused(self, why: str) -> CannotStep:
        """The error that says why this loop cannot be stepped, and what works."""
        where = "the loop" if self.name == "loop" else f"the loop {self.name!r}"
        model = type(self.model).__name__
        return CannotStep(f"{where} of this {model} cannot be stepped from outside: {why}. {INSTEAD}")

    def proved(self, prompt: Tensor) -> int:
        """Prove on a prompt, ``(1, T)``, that the loop can be stepped; the iterations that the model runs by itself.

        The loop that is given its own second state must give its own third, and the output that belongs to it: a loop
        that carries another state, counts its steps or sums them up does not. No position may see a later one.

        Raises:
            CannotStep: it cannot.
            AttachError: it cannot even be halted.
            ValueError: the prompt's states are not finite, which proves nothing.
        """
        longer = torch.cat([prompt, prompt[:, :1]], 1)
        seen = self(longer, 3)
        if not bool(signals.finite(seen.logits).all()):
            raise ValueError("the states of the prompt are not finite: a wavefront cannot continue it")
        if seen.iterations < 3:
            raise self.refused(f"it takes {seen.iterations} steps, too few to tell")
        again = self(longer, 2, lambda k, x: seen.states[2] if k == 1 else x)
        _, _, _, third = seen.states
        for what, one, other in (("state", again.states[2], third), ("output", again.logits, seen.logits)):
            if not close(one, other, 0.0):
                raise self.refused(
                    f"with its own second state put into it, it gives another third {what}, so a step reads more than "
                    "the state and the tokens (a second state, or the step's number), or the output sums up the steps"
                )
        shorter = self(prompt, 3)
        if not close(shorter.logits, seen.logits[:, :-1]):
            raise self.refused(
                "a token that follows changes the output of those before it, so the model is not causal, or it begins "
                "each call with other states (fix its seed in run)"
            )
        return seen.iterations


class _Putting:
    """Intercepts the state module: counts its outputs, and puts another state into the last of each iteration."""

    def __init__(self, loop: Loop, put: Putting | None) -> None:
        self.loop, self.put, self.outputs = loop, put, 0

    def __call__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = forward(*args, **kwargs)
        self.outputs += 1
        if self.put is None or self.outputs % self.loop.period:
            return output
        x = self.loop.state_of(output)
        new = self.put(self.outputs // self.loop.period, x)
        return output if new is x else self.loop.with_state(output, new)
