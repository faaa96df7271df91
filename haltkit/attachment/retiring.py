"""What becomes of entries of the batch that have halted, in the calls of a loop's modules.

Compact execution retires them: a module is given the remaining entries alone, and its outputs are put back among the
last outputs of the others. Masked execution freezes them: they are computed with the others, and keep what they had.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from haltkit.attachment.axes import Axes, BodyCall, alike, held, scattered
from haltkit.attachment.errors import BatchNotFound, RowsMeet
from haltkit.attachment.proving import Proofs

__all__ = ["Freezing", "HaltedEntries", "Retiring"]

Within = Callable[[bool], AbstractContextManager[None]]


class HaltedEntries(ABC):
    """How a loop's modules are called where entries have halted. It lasts as long as the session.

    Args:
        modules: of the body, by path.
        trying: calls inside it are no part of any loop.
        around: modules inside whose calls other loops run, which must be given the same entries in all calls of one
            iteration.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        trying: Callable[[], AbstractContextManager[None]],
        around: Collection[str] = (),
    ) -> None:
        self._proofs, self._around = Proofs(modules, trying), frozenset(around)

    @abstractmethod
    def call(self, call: BodyCall, present: Tensor, batch: int, before: Any, leaves: bool, within: Within) -> Any:
        """The output for the whole batch, in which entries that have halted keep what they had.

        Args:
            call: the call.
            present: indices of the entries that are still running, ascending.
            batch: entries in all.
            before: this call's output in the iteration before, which halted entries keep; unused if there are none.
            leaves: whether this iteration leaves entries out of calls that other loops run in.
            within: is entered around the call, and told whether only the entries present are computed.

        Raises:
            BatchNotFound: no argument has a dimension as large as the batch.
            RowsMeet: the module gives entries other rows when it is given others beside them.
        """

    def encloses(self, name: str) -> bool:
        """Whether other loops run inside the calls of a module."""
        return name in self._around

    def axes(self, call: BodyCall, batch: int) -> Axes | None:
        """The batch dimension of each tensor that a call returns; None if it is not known."""
        proven = self._proofs.of(call, batch)
        return None if proven is None else proven.returned

    def _plain(self, call: BodyCall, output: Any) -> Any:
        """The output, where it is what the module gives alone: a loop that runs inside keeps states of halted rows."""
        return None if self.encloses(call.name) else output


class Retiring(HaltedEntries):
    """Compact execution: halted entries are not computed."""

    def can_leave(self, names: Sequence[str]) -> bool:
        """Whether an iteration that calls these modules can leave entries out of all calls that other loops run in."""
        return all(self._proofs.has(name, place) for place, name in enumerate(names) if self.encloses(name))

    def refuse_training(self) -> None:
        """See that no batch norm takes its statistics from the batch.

        Raises:
            RowsMeet: one does.
        """
        self._proofs.norms.refuse_training("execution='compact'", "rows that leave", "use execution='masked'")

    def call(self, call: BodyCall, present: Tensor, batch: int, before: Any, leaves: bool, within: Within) -> Any:
        proven, everybody = self._proofs.of(call, batch), len(present) == batch
        if proven is not None and not everybody and (leaves or not self.encloses(call.name)):
            with within(True):
                computed = call.on(present, proven.given)
            return scattered(computed, proven.returned, present, before)
        with within(False):
            output = call.forward(*call.args, **call.kwargs)
        if batch == 1:
            return output
        if proven is None:
            proven = self._proofs.look(call, self._plain(call, output), batch)
        return output if everybody else held(output, proven.returned, present, before)


class Freezing(HaltedEntries):
    """Masked execution: halted entries are computed with the others, and keep what their modules gave them last.

    A call whose batch dimension cannot be proven gives what it gives: of its halted entries, the state alone is kept.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._unproven: set[tuple[str, int, tuple[int, ...]]] = set()

    def call(self, call: BodyCall, present: Tensor, batch: int, before: Any, leaves: bool, within: Within) -> Any:
        with within(False):
            output = call.forward(*call.args, **call.kwargs)
        proven = self._proofs.of(call, batch) or self._tried(call, output, batch)
        if proven is None or len(present) == batch or not alike(output, before):
            return output
        return held(output, proven.returned, present, before)

    def _tried(self, call: BodyCall, output: Any, batch: int) -> Any:
        key = (call.name, call.place, call.shape)
        if batch == 1 or key in self._unproven or self._proofs.norms.training:
            return None
        try:
            return self._proofs.look(call, self._plain(call, output), batch)
        except (BatchNotFound, RowsMeet):
            self._unproven.add(key)
            return None
