"""The halting-policy protocol: what a policy is given at each step, and what it answers.

A policy object holds hyperparameters only. Everything that changes is in an explicit state, which
:meth:`HaltingPolicy.update` takes and returns. So one object can judge any number of loops at once, and an executor can
gather, scatter or permute the state's rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

from haltkit import signals
from haltkit.weights import WeightsMisfit, held_by

__all__ = [
    "Granularity",
    "HaltingPolicy",
    "Heads",
    "LoopStep",
    "Passing",
    "Readout",
    "ThresholdPolicy",
    "Verdict",
    "check_count",
    "check_state",
    "check_tau",
    "check_temperature",
    "each_head",
    "granularity_of",
    "has_logits",
    "judge",
    "map_state",
    "read",
]

Readout = Callable[[Tensor], Tensor]
Granularity = Literal["token", "sequence", "batch", "world"]
S = TypeVar("S")
MOST = 2**31 - 1  # steps, slots or hits: what an int32 holds


@dataclass(frozen=True)
class Heads:
    """What a model reads from its state, where that is more than logits: give it wherever a readout is given.

    ::

        heads = haltkit.Heads(model.lm_head, lambda x: model.early_exit_gate(x).squeeze(-1))
        haltkit.attach(model, "gate:tau=0.1,rule=cumulative", loop=loop, readout=heads)

    Args:
        logits: from the state ``(..., D)`` to logits ``(..., V)``; None: only the gate is known.
        gate: from the state ``(..., D)`` to ``(...)``, the logit of the probability to exit here: the model's own exit
            head, for the policy ``gate``.
    """

    logits: Readout | None
    gate: Readout

    def __call__(self, x: Tensor) -> Tensor:
        """Logits ``(..., V)``.

        Raises:
            ValueError: only the gate is known.
        """
        if self.logits is None:
            raise ValueError("these heads have a gate and no logits: give Heads the readout from the state to logits")
        return self.logits(x)


def has_logits(readout: Readout | None) -> bool:
    """Whether logits can be read: there is a readout, and not a gate alone."""
    return readout is not None and not (isinstance(readout, Heads) and readout.logits is None)


def each_head(readout: Readout, change: Callable[[Readout], Readout]) -> Readout:
    """The readout with every function in it changed; a gate stays beside its readout."""
    if not isinstance(readout, Heads):
        return change(readout)
    return Heads(None if readout.logits is None else change(readout.logits), change(readout.gate))


class Verdict(NamedTuple):
    """A policy's answer at one step, one entry per row.

    ``score``, ``(...)`` floating point, is what was measured (``+inf`` where the signal is not defined yet); ``halt``,
    ``(...)`` bool, says stop.
    """

    score: Tensor
    halt: Tensor


class LoopStep:
    """One step of a loop, as policies see it.

    Attributes:
        k: how many times the body has been applied, from 1. One number where all rows began together; where they did
            not (:func:`haltkit.run_queue`), ``(...)`` int64, an entry per row. ``halt & (step.k >= n)`` fits both.
        x: the state ``x_k``, ``(..., D)``.
        x_prev: the state ``x_{k-1}``, ``(..., D)``.
        active: rows that still run, ``(...)`` bool; entries of other rows mean nothing.
        region: the name of the loop.

    What several policies may use is computed once, when first used: :attr:`d`, :attr:`step_norm`,
    :attr:`logits`, :meth:`log_probabilities`, :attr:`margin` and :attr:`gate`.
    """

    def __init__(
        self,
        k: int | Tensor,
        x: Tensor,
        x_prev: Tensor,
        active: Tensor,
        readout: Readout | None = None,
        *,
        region: str = "loop",
    ) -> None:
        self.k = k
        self.x = x
        self.x_prev = x_prev
        self.active = active
        self.region = region
        self._readout = readout
        self._d: Tensor | None = None
        self._step_norm: Tensor | None = None
        self._logits: Tensor | None = None
        self._gate: Tensor | None = None
        self._margin: Tensor | None = None
        self._log_probabilities: dict[float, Tensor] = {}

    @property
    def d(self) -> Tensor:
        """The step ``d_k = x_k - x_{k-1}``, ``(..., D)``, in the precision of measurement."""
        if self._d is None:
            self._d = signals.difference(self.x, self.x_prev)
        return self._d

    @property
    def step_norm(self) -> Tensor:
        """``||d_k||``, ``(...)``."""
        if self._step_norm is None:
            self._step_norm = signals.norm(self.d)
        return self._step_norm

    @property
    def logits(self) -> Tensor:
        """``readout(x_k)``, ``(..., V)``: the readout runs at most once per step.

        Raises:
            ValueError: the loop was given no readout, or one that does not give logits row by row.
        """
        if self._logits is None:
            if self._readout is None or not has_logits(self._readout):
                which = "the loop" if self.region == "loop" else f"region {self.region!r}"
                raise ValueError(
                    f"this policy looks at logits, but {which} has no readout: pass readout=, a function from the "
                    "state (..., D) to logits (..., V), or choose a policy that looks at states, such as norm"
                )
            self._logits = read(self._readout, self.x)
        return self._logits

    @property
    def gate(self) -> Tensor:
        """The logit of the model's own probability to exit after this step, ``(...)``; computed at most once.

        Raises:
            ValueError: the loop was given no gate, or one that does not give one number per row.
        """
        if self._gate is None:
            if not isinstance(self._readout, Heads):
                raise ValueError(
                    "this policy reads the model's own exit head, a gate that the model has not: pass "
                    "readout=haltkit.Heads(readout, gate), where gate is a function from the state (..., D) to one "
                    "logit per row (...), or fit one with 'haltkit fit --policy gate'"
                )
            gate: Any = self._readout.gate(self.x)
            if not isinstance(gate, Tensor) or gate.shape != self.x.shape[:-1]:
                found = tuple(gate.shape) if isinstance(gate, Tensor) else type(gate).__name__
                single = found == (*self.x.shape[:-1], 1)
                mend = ": drop its last dimension, as in lambda x: gate(x).squeeze(-1)" if single else ""
                raise ValueError(
                    f"the gate turned states {tuple(self.x.shape)} into {found}: one logit per row, "
                    f"{tuple(self.x.shape[:-1])}, is expected{mend}"
                )
            self._gate = signals.measured(gate)
        return self._gate

    def log_probabilities(self, temperature: float = 1.0) -> Tensor:
        """``log softmax(logits / temperature)``, ``(..., V)``: computed at most once per step and temperature.

        Raises:
            ValueError: the loop was given no readout.
        """
        found = self._log_probabilities.get(temperature)
        if found is None:
            found = self._log_probabilities[temperature] = signals.log_probabilities(self.logits, temperature)
        return found

    @property
    def margin(self) -> Tensor:
        """``p_(1) - p_(2)`` of the readout, ``(...)``: computed at most once, and not at all where it was set.

        Raises:
            ValueError: the loop was given no readout.
        """
        if self._margin is None:
            self._margin = signals.margin(self.log_probabilities())
        return self._margin

    @margin.setter
    def margin(self, known: Tensor) -> None:
        self._margin = known


@runtime_checkable
class HaltingPolicy(Protocol[S]):
    """Decides, row by row, when a loop has thought enough.

    The state ``S`` is a tensor whose leading dimensions are the rows, None, or a (named) tuple of such states.
    """

    def init(self, x0: Tensor) -> S:
        """The state before the first step of a loop that starts at ``x0``, ``(..., D)``."""
        ...

    def update(self, state: S, step: LoopStep) -> tuple[S, Verdict]:
        """Measure one step and decide. Called at every step, whatever was decided before."""
        ...


@runtime_checkable
class ThresholdPolicy(HaltingPolicy[S], Protocol[S]):
    """A policy that halts a row when its score is below ``tau``."""

    @property
    def tau(self) -> float: ...


def granularity_of(policy: HaltingPolicy[Any]) -> Granularity:
    """Which rows decide together: ``token`` each for itself, ``sequence`` (last dimension of rows), ``batch``, or
    ``world`` (of all processes).

    A policy of your own that mixes rows says so in an attribute ``granularity``; all others judge row by row.
    """
    return cast(Granularity, getattr(policy, "granularity", "token"))


def map_state(function: Callable[[Tensor], Tensor], state: S) -> S:
    """Apply a function to every tensor of a policy's state, keeping its structure."""
    if isinstance(state, Tensor):
        return cast(S, function(state))
    if isinstance(state, tuple):
        parts = [map_state(function, part) for part in state]
        named = cast(Any, type(state))
        return cast(S, named(*parts) if hasattr(state, "_fields") else tuple(parts))
    if state is None:
        return state
    raise TypeError(f"a policy's state is made of tensors, tuples and None, not {type(state).__name__}")


def judge(policy: HaltingPolicy[Any], state: Any, step: LoopStep) -> tuple[Any, Verdict]:
    """The policy's update: its state after the step, and its verdict.

    Every update goes through here, also that of a policy inside a wrapper.

    Raises:
        ValueError: the policy does not answer with a :class:`Verdict` that has one entry per row.
        WeightsMisfit: tensors fail to combine in a policy that holds weights; the error itself is the cause.
    """
    try:
        state, verdict = policy.update(state, step)
    except RuntimeError as error:
        held = held_by(policy)
        if type(error) is not RuntimeError or not held:  # out of memory or lost processes, for instance
            raise
        raise WeightsMisfit(
            f"the policy failed on states of width {step.x.shape[-1]} in {step.region!r}: {error}. It holds "
            f"{', '.join(map(repr, held))}: check that they were made for this model"
        ) from error
    _check_verdict(policy, verdict, step.active)
    return state, verdict


class Passing:
    """A policy around ``policy`` that keeps nothing of its own: rows decide together and states begin as inside it."""

    policy: HaltingPolicy[Any]

    @property
    def granularity(self) -> Granularity:
        return granularity_of(self.policy)

    def init(self, x0: Tensor) -> Any:
        return self.policy.init(x0)


def _check_verdict(policy: HaltingPolicy[Any], verdict: Any, active: Tensor) -> None:
    """Refuse an answer that has not one entry per row. It looks at types and shapes, and waits for no device."""
    kind = type(policy).__name__
    if not isinstance(verdict, Verdict) or not all(isinstance(part, Tensor) for part in verdict):
        raise ValueError(f"{kind}.update must return (state, haltkit.Verdict(score, halt)), both of them tensors")
    score, halt = verdict
    if halt.dtype != torch.bool or not score.is_floating_point():
        raise ValueError(
            f"{kind} answers with a score of {score.dtype} and a halt of {halt.dtype}: Verdict(score, halt) has a "
            "floating-point score and a bool halt, in this order"
        )
    if not halt.shape == score.shape == active.shape:
        raise ValueError(
            f"{kind} answers with a score {tuple(score.shape)} and a halt {tuple(halt.shape)}, and the rows are "
            f"{tuple(active.shape)}: both must have one entry per row"
        )


def read(readout: Readout, x: Tensor) -> Tensor:
    """``readout(x)``: logits ``(..., V)`` of states ``(..., D)``.

    Raises:
        ValueError: it gives something else.
    """
    logits: Any = readout(x)
    if not isinstance(logits, Tensor) or logits.ndim != x.ndim or logits.shape[:-1] != x.shape[:-1]:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        wanted = ", ".join([*map(str, x.shape[:-1]), "V"])
        raise ValueError(f"the readout turned states {tuple(x.shape)} into {found}: logits ({wanted}) are expected")
    return logits


def check_state(x: Any, name: str) -> None:
    """Refuse a state of the loop ``name`` that cannot be measured.

    Raises:
        ValueError: no tensor ``(..., D)`` of real floating-point numbers with at least one per row.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"the state of {name!r} is a {type(x).__name__}: a tensor (..., D) is expected")
    if not x.is_floating_point():
        raise ValueError(
            f"the state of {name!r} is {x.dtype}, and real floating-point numbers are measured: give x.float(), or "
            "torch.view_as_real(x).flatten(-2) of complex ones"
        )
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"the state of {name!r} has the shape {tuple(x.shape)}: (..., D) with D >= 1 is expected")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is no number of steps, slots or hits.

    Raises:
        ValueError: not a whole number, below ``least``, or beyond an int32.
    """
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: a whole number is expected, not a {type(value).__name__}") from None
    if not least <= count <= MOST:
        raise ValueError(f"{name}={count}: it must be at least {least} and at most {MOST}")


def check_tau(tau: float) -> None:
    """Refuse a threshold that can never be used.

    Raises:
        ValueError: not a positive, finite number.
    """
    if not 0 < tau < torch.inf:
        raise ValueError(f"tau={tau} is not a threshold: it must be a positive, finite number, such as 1e-3")


def check_temperature(temperature: float) -> None:
    """Refuse a number that logits cannot be divided by.

    Raises:
        ValueError: not a positive number.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
