"""Models that halt their own regions: attaching puts their adaptive forward in place of the plain one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment.errors import AlreadyAttached, GradientLost
from haltkit.attachment.override import Overrides
from haltkit.attachment.tally import Tally
from haltkit.loop import LoopObserver
from haltkit.protocol import HaltingPolicy

__all__ = ["Native", "NativeSession"]

Policies = str | HaltingPolicy[Any] | Mapping[str, str | HaltingPolicy[Any]]
# (policies, observer, args, kwargs of the model's call) to (output, steps by region, outcome by region).
Run = Callable[
    [Any, LoopObserver | None, tuple[Any, ...], dict[str, Any]], tuple[Any, dict[str, Tensor], dict[str, Tensor]]
]


@dataclass(frozen=True)
class Native:
    """How a model that knows haltkit halts itself.

    ``check`` raises for policies that do not fit the model's regions.
    """

    run: Run
    check: Callable[[Any], None]
    budgets: Callable[[tuple[Any, ...], dict[str, Any]], dict[str, int]]


class NativeSession:
    """A policy a region, attached to a model that halts itself. A context manager; made by :func:`~haltkit.attach`.

    The semantics are the model's canonical ones also token by token, and every execution that it offers is used.
    """

    def __init__(self, model: nn.Module, policy: Any, native: Native, observer: LoopObserver | None = None) -> None:
        native.check(policy)
        self.model, self.policy, self.native, self.observer = model, policy, native, observer
        self.tally = Tally()
        self._steps: dict[str, Tensor] = {}
        self._outcome: dict[str, Tensor] = {}
        self._bypass = False
        found = type(model).__dict__.get("_haltkit")
        if isinstance(found, Overrides) and any(isinstance(owner, NativeSession) for owner in found.owners()):
            raise AlreadyAttached("a session is attached already to this model: detach it first")
        self._overrides = Overrides.of(model)
        self._overrides.add("forward", self, next(_numbers), self._forward, outside=True)

    def _forward(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._bypass:
            return forward(*args, **kwargs)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            raise GradientLost(
                f"{type(self.model).__name__} halts itself without gradients: call it under torch.no_grad() or "
                "torch.inference_mode()"
            )
        output, self._steps, self._outcome = self.native.run(self.policy, self.observer, args, kwargs)
        budgets = self.native.budgets(args, kwargs)
        for name, steps in self._steps.items():
            ran = int(steps.max())
            self.tally.add(steps, self._outcome[name], ran, budgets[name] - ran, 0.0)
        return output

    def __enter__(self) -> NativeSession:
        return self

    def __exit__(self, *error: Any) -> None:
        self.detach()

    def detach(self) -> None:
        """Restore the model's own forward."""
        self._overrides.remove(self)

    def _result(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if not values:
            raise ValueError("no loop has run inside this session yet: call the model inside the with block")
        return values

    @property
    def steps(self) -> dict[str, Tensor]:
        """Steps of each row in the newest call, by region, ``(B, T)`` int64 each."""
        return self._result(self._steps)

    @property
    def outcome(self) -> dict[str, Tensor]:
        """An :class:`~haltkit.loop.Outcome` for each row of the newest call, by region, ``(B, T)`` int8 each."""
        return self._result(self._outcome)

    @property
    def trajectory(self) -> Any:
        """The newest trajectory, if a :class:`~haltkit.Recorder` was given as observer."""
        from haltkit.attachment.session import trajectory_of

        return trajectory_of(self.observer)

    def summary(self) -> str:
        """Histogram of steps, outcomes, and loop iterations run and spared, over all calls and regions."""
        return str(self.tally)

    def verify(self, run: Callable[[], Any], k: int, run_at: Callable[[int], Any] | None = None) -> Any:
        """Prove on this model that attaching is neutral and that a halt at ``k`` in every region is right.

        See :func:`haltkit.attachment.verify.verify`; ``neutral`` compares with a policy that never halts.
        """
        from haltkit.attachment.verify import Report, difference

        before = self.policy
        with torch.no_grad(), self.tally.paused():
            try:
                self._bypass = True
                plain, expected = run(), None if run_at is None else run_at(k)
                self._bypass = False
                self.policy = f"fixed:steps={2**31 - 1}"
                neutral = difference(run(), plain)
                loops = max(int(steps.max()) for steps in self.steps.values())
                self.policy = f"fixed:steps={k}"
                halted = run()
            finally:
                self.policy, self._bypass = before, False
        return Report(k, loops, neutral, None, None if expected is None else difference(halted, expected))


_numbers = itertools.count()
