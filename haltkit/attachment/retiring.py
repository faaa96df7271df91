"""Rows that are retired: a body's modules no longer compute the halted entries of the batch.

A module is given the remaining entries alone, and its outputs are put back among the last outputs of the others. It
is not known beforehand which dimension of an argument or output is the batch. So it is tried: a module is run on two
entries, and must give the same two rows that it gives of the whole batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment.axes import (
    TRIALS,
    BatchNorms,
    BodyCall,
    Proven,
    gathered,
    matching,
    same_rows,
    scattered,
    telling,
)
from haltkit.attachment.errors import BatchNotFound, RowsMeet
from haltkit.attachment.outputs import mapped_tensors

__all__ = ["Retiring"]

Within = Callable[[bool], AbstractContextManager[None]]


class Retiring:
    """What is known about the batch dimensions of one loop's modules. It lasts as long as the session."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        trying: Callable[[], AbstractContextManager[None]],
        around: Collection[str] = (),
    ) -> None:
        """``modules``: of the body, by path. ``trying``: calls inside it are no part of any loop. ``around``: modules
        inside whose calls other loops run, which must be given the same entries in all calls of one iteration."""
        self._norms = BatchNorms(modules)
        self._trying, self._around = trying, frozenset(around)
        self._proven: dict[tuple[str, int, tuple[int, ...]], Proven] = {}
        self._known: set[tuple[str, int]] = set()  # calls (module, place) of which something is proven

    def proven(self, names: Sequence[str]) -> bool:
        """Whether an iteration that calls these modules can leave entries out of all calls that other loops run in."""
        return all((name, place) in self._known for place, name in enumerate(names) if name in self._around)

    def refuse_training(self) -> None:
        """See that no batch norm takes its statistics from the batch.

        Raises:
            RowsMeet: one does.
        """
        self._norms.refuse_training("execution='compact'", "rows that leave", "use execution='masked'")

    def call(
        self,
        call: BodyCall,
        present: Tensor,
        batch: int,
        before: Any = None,
        leaves: bool = True,
        within: Within = lambda gathered: nullcontext(),
    ) -> Any:
        """The output for the whole batch, of which only the entries ``present`` are computed.

        Args:
            call: the call.
            present: indices of the entries that are still running, ascending.
            batch: entries in all.
            before: this call's output in the iteration before, which retired entries keep; unused if none is retired.
            leaves: whether this iteration leaves entries out of calls that other loops run in; see :meth:`proven`.
            within: is entered around the call, and told whether only the entries present are computed.

        Raises:
            BatchNotFound: no argument has a dimension as large as the batch.
            RowsMeet: the module gives entries other rows when it is given others beside them.
        """
        key = (call.name, call.place, call.shape)
        proven, everybody = self._proven.get(key), len(present) == batch
        if proven is not None and not everybody and (leaves or call.name not in self._around):
            with within(True):
                computed = call.on(present, proven.given)
            return scattered(computed, proven.returned, present, before)
        with within(False):
            output = call.forward(*call.args, **call.kwargs)
        if batch == 1:
            return output
        if proven is None:
            plain = self._plain(call) if call.name in self._around else output
            proven = self._prove(call, plain, batch)
            if telling(plain, proven.returned):  # equal rows prove nothing
                self._proven[key] = proven
                self._known.add((call.name, call.place))
        if everybody:
            return output
        return scattered(gathered(output, proven.returned, present), proven.returned, present, before)

    def _plain(self, call: BodyCall) -> Any:
        """What the module gives by itself: a loop that runs inside it keeps the states of rows that have halted."""
        with torch.no_grad(), self._trying():
            return call.forward(*call.args, **call.kwargs)

    def _prove(self, call: BodyCall, output: Any, batch: int) -> Proven:
        """Find the batch dimensions by running the module on the last and the first entry."""
        given = mapped_tensors((call.args, call.kwargs))
        few = [batch - 1, 0] if batch > 2 else [1]
        rows = torch.tensor(few, device=given[0].device if given else None)
        options = [[*(d for d, size in enumerate(t.shape) if size == batch), None] for t in given]
        for axes in itertools.islice(itertools.product(*options), TRIALS):
            args, kwargs = gathered((call.args, call.kwargs), axes, rows)
            try:
                with torch.no_grad(), self._trying():
                    some = call.forward(*args, **kwargs)
            except Exception:  # whatever a module says to shapes that do not fit together: these axes are not it
                continue
            returned = matching(some, output, rows, batch)
            if returned is None:
                continue
            if call.state_of is None or same_rows(call.state_of(some), call.state_of(output), 0, rows):
                return Proven(axes, returned)
        if all(option == [None] for option in options):
            raise BatchNotFound(
                f"execution='compact': no tensor that {call.name!r} is given has a dimension of {batch}, the batch, so "
                "entries cannot leave it. Describe the loop by modules that are given the batch as a dimension of its "
                "own, or use execution='masked'"
            )
        raise RowsMeet(
            f"execution='compact': {call.name!r} gives entries {few} of the batch other rows when they are alone, so "
            "rows see each other there (attention or a norm across the batch), the batch is not the state's first "
            "dimension, or the module is random (call model.eval()). Use execution='masked'"
        )
