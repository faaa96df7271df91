"""Models that halt their own regions: attaching puts their adaptive forward in place of the plain one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from haltkit.attachment.errors import AlreadyAttached, GradientLost
from haltkit.attachment.override import Overrides
from haltkit.attachment.session import NOTHING_RAN, Session, next_number, trajectory_of
from haltkit.attachment.steadiness import Inputs
from haltkit.attachment.tally import Tally
from haltkit.attachment.verify import NOTHING, ByRegion, Probe
from haltkit.card import Card
from haltkit.loop import LoopObserver
from haltkit.protocol import HaltingPolicy
from haltkit.recording.trajectory import Trajectory
from haltkit.standing import PLAIN, Standing

__all__ = ["HaltedCall", "HaltsItself", "NativeSession"]


@dataclass(frozen=True)
class HaltedCall:
    """The result of one call of a model that halts itself.

    Attributes:
        output: what the model's plain call would return.
        steps, outcome: of each row, by region in the order they ran.
        budget: steps that each region would take if nothing halted.
    """

    output: Any
    steps: Mapping[str, Tensor]
    outcome: Mapping[str, Tensor]
    budget: Mapping[str, int]


@runtime_checkable
class HaltsItself(Protocol):
    """What a model that knows haltkit offers, of itself or through a preset."""

    @property
    def looped_regions(self) -> Sequence[str]:
        """Names of the regions, in the order they run."""
        ...

    def readout(self, x: Tensor) -> Tensor:
        """From the state of any region to logits."""
        ...

    def halted_call(
        self,
        policies: Mapping[str, HaltingPolicy[Any]],
        observer: LoopObserver | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> HaltedCall:
        """The model's forward with these arguments, each region halted by its policy."""
        ...


class NativeSession(Session):
    """Policies for a model that halts itself.

    The semantics are the model's canonical ones also token by token, and every execution that it offers is used.
    """

    def __init__(
        self,
        model: nn.Module,
        native: HaltsItself,
        policies: Mapping[str, HaltingPolicy[Any]],
        observer: LoopObserver | None = None,
        card: Card | None = None,
        standing: Standing = PLAIN,
    ) -> None:
        """Nothing about the model is changed yet: :meth:`attach` does that. A card refuses calls of another budget."""
        self.model, self.native, self.observer, self.card = model, native, observer, card
        self.standing = standing
        self.regions = tuple(native.looped_regions)
        self.policies, self.loops = dict(policies), {}
        self.readouts = dict.fromkeys(self.regions, native.readout)
        self.tally = {name: Tally() for name in self.regions}
        self.number = next_number()
        self._newest: HaltedCall | None = None
        self._passing: ContextVar[bool] = ContextVar("haltkit_passing", default=False)
        self._overrides: Overrides | None = None

    def attach(self, beside: Session | None = None) -> NativeSession:
        """Override the model's forward. ``beside``: a session that is detached meanwhile.

        Raises:
            AlreadyAttached: another session halts this model.
        """
        try:
            found = Overrides.on(self.model)
            for owner in found.owners() if found else ():
                if isinstance(owner, NativeSession) and owner is not beside:
                    raise AlreadyAttached("a session is attached already to this model: detach it first")
            self._overrides = Overrides.of(self.model)
            self._overrides.add("forward", self, self.number, self._forward, depth=0)
            return self
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> None:
        if self._overrides is not None:
            self._overrides.remove(self)

    def detach(self) -> None:
        try:
            self._restore()
        except BaseException:
            self._restore()
            raise

    @contextmanager
    def detached(self) -> Iterator[None]:
        token = self._passing.set(True)
        try:
            yield
        finally:
            self._passing.reset(token)

    def _forward(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._passing.get():
            return forward(*args, **kwargs)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            raise GradientLost(
                f"{type(self.model).__name__} halts itself without gradients: call it under torch.no_grad() or "
                "torch.inference_mode()"
            )
        call = self.native.halted_call(self.policies, self.observer, args, kwargs)
        for budget in call.budget.values():
            if self.card is not None:
                self.card.check_depth(budget)
        self._newest = call
        for name, steps in call.steps.items():
            ran = _deepest(steps)
            self.tally[name].add(steps, call.outcome[name], ran, call.budget[name] - ran, 0.0)
        return call.output

    @property
    def _call(self) -> HaltedCall:
        if self._newest is None:
            raise ValueError(NOTHING_RAN)
        return self._newest

    @property
    def steps(self) -> dict[str, Tensor]:
        return dict(self._call.steps)

    @property
    def outcome(self) -> dict[str, Tensor]:
        return dict(self._call.outcome)

    @property
    def trajectory(self) -> Trajectory:
        return trajectory_of(self.observer)

    # --- for verify

    def _probe(
        self,
        policies: ByRegion,
        keep: tuple[int, ...] = (),
        disturb_before: Mapping[str, int] = NOTHING,
        state_only: bool = False,
    ) -> AbstractContextManager[Probe]:
        return self._beside(NativeSession(self.model, self.native, policies))

    @contextmanager
    def _beside(self, other: NativeSession) -> Iterator[NativeSession]:
        with self.detached(), other.attach(beside=self):
            yield other

    def iterations(self) -> dict[str, int]:
        """The largest number of steps of any row, by region."""
        return {name: _deepest(steps) for name, steps in self.steps.items()}

    def watched(self) -> dict[str, Inputs]:
        """Nothing is replayed, so there is nothing to watch."""
        return {}


def _deepest(steps: Tensor) -> int:
    """The largest number of steps of any row; 0 of an empty batch."""
    return int(steps.max()) if steps.numel() else 0
