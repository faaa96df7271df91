"""The bundled LoopedGPT halts its own regions, token by token in the canonical semantics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from torch import Tensor, nn

from haltkit.attachment.native import HaltedCall
from haltkit.loop import LoopObserver
from haltkit.protocol import HaltingPolicy, Readout

__all__ = ["LoopedGPTHalting", "describe"]


class _Output(Protocol):
    """What ``forward_adaptive`` returns."""

    @property
    def logits(self) -> Tensor: ...

    @property
    def steps(self) -> Mapping[str, Tensor]: ...

    @property
    def outcome(self) -> Mapping[str, Tensor]: ...


class _LoopedGPT(Protocol):
    """As much of the model as is used here."""

    @property
    def regions(self) -> Mapping[str, nn.Module]: ...

    def loop_counts(self, loops: int | Mapping[str, int] | None) -> dict[str, int]: ...

    def forward_adaptive(
        self,
        tokens: Tensor,
        policy: Mapping[str, HaltingPolicy[Any]],
        *,
        max_loops: Mapping[str, int],
        observer: LoopObserver | None,
    ) -> _Output: ...

    def readout(self, x: Tensor) -> Tensor: ...


class LoopedGPTHalting:
    """Every region at once; ``loops`` of the model's call is the budget of each."""

    def __init__(self, model: _LoopedGPT) -> None:
        self.model = model
        self.looped_regions: Sequence[str] = tuple(model.regions)

    def readout(self, x: Tensor) -> Tensor:
        """See :class:`~haltkit.attachment.native.HaltsItself`."""
        return self.model.readout(x)

    def halted_call(
        self,
        policies: Mapping[str, HaltingPolicy[Any]],
        observer: LoopObserver | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> HaltedCall:
        """See :class:`~haltkit.attachment.native.HaltsItself`."""
        tokens, loops = self._arguments(*args, **kwargs)
        budget = self.model.loop_counts(loops)
        out = self.model.forward_adaptive(tokens, policies, max_loops=budget, observer=observer)
        return HaltedCall(out.logits, out.steps, out.outcome, budget)

    @staticmethod
    def _arguments(
        tokens: Tensor, loops: int | Mapping[str, int] | None = None
    ) -> tuple[Tensor, int | Mapping[str, int] | None]:
        """The arguments of ``LoopedGPT.forward``."""
        return tokens, loops


def describe(model: nn.Module) -> tuple[LoopedGPTHalting, Readout | None]:
    """How a LoopedGPT halts itself, and its readout."""
    native = LoopedGPTHalting(cast(_LoopedGPT, model))
    return native, native.readout
