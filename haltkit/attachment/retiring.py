"""Rows that are retired: a body's modules no longer compute the halted entries of the batch.

A module is given the remaining entries alone, and its outputs are put back among the last outputs of the others. It
is not known beforehand which dimension of an argument or output is the batch. So it is tried: a module is run on two
entries, and must give the same two rows that it gives of the whole batch.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment.axes import (
    TRIALS,
    Axes,
    BatchNorms,
    BodyCall,
    Proven,
    alike,
    gathered,
    held,
    matching,
    same_rows,
    scattered,
    telling,
)
from haltkit.attachment.errors import BatchNotFound, RowsMeet
from haltkit.attachment.outputs import mapped_tensors

__all__ = ["Holding", "Retiring"]

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
        self._modules, self._norms = tuple(modules.values()), BatchNorms(modules)
        self._trying, self._around = trying, frozenset(around)
        self._proven: dict[tuple[str, int, tuple[int, ...]], list[Proven]] = defaultdict(list)
        self._known: set[tuple[str, int]] = set()  # calls (module, place) of which something is proven

    def proven(self, names: Sequence[str]) -> bool:
        """Whether an iteration that calls these modules can leave entries out of all calls that other loops run in."""
        return all((name, place) in self._known for place, name in enumerate(names) if name in self._around)

    def encloses(self, name: str) -> bool:
        """Whether other loops run inside the calls of a module."""
        return name in self._around

    def axes(self, call: BodyCall, batch: int) -> Axes | None:
        """The batch dimension of each tensor that a call returns; None if it is not known."""
        proven = self._found(call, batch)
        return None if proven is None else proven.returned

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
        proven, everybody = self._found(call, batch), len(present) == batch
        if proven is not None and not everybody and (leaves or call.name not in self._around):
            with within(True):
                computed = call.on(present, proven.given)
            return scattered(computed, proven.returned, present, before)
        with within(False):
            output = call.forward(*call.args, **call.kwargs)
        if batch == 1:
            return output
        if proven is None:
            proven = self._look(call, output, batch)
        return output if everybody else held(output, proven.returned, present, before)

    def _found(self, call: BodyCall, batch: int) -> Proven | None:
        """What is proven of a call."""
        known = self._proven[call.name, call.place, call.shape]
        return next((proven for proven in known if proven.fits(call, batch)), None)

    def _look(self, call: BodyCall, output: Any, batch: int) -> Proven:
        """Prove what can be of a call, and note it.

        Raises:
            BatchNotFound, RowsMeet: see :meth:`call`.
        """
        with self._aside(call):
            # A loop that runs inside the module keeps the states of rows that have halted: what the module gives alone.
            plain = call.forward(*call.args, **call.kwargs) if call.name in self._around else output
            proven = self._prove(call, plain, batch)
        if telling(plain, proven.returned):  # equal rows prove nothing
            self._proven[call.name, call.place, call.shape].append(proven)
            self._known.add((call.name, call.place))
        return proven

    @contextmanager
    def _aside(self, call: BodyCall) -> Iterator[None]:
        """Calls made inside leave no trace: not in a loop, in the random numbers to come, or in a module's attributes,
        such as a counter of its calls."""
        kept = [(m, dict(vars(m)), dict(m._buffers)) for body in self._modules for m in body.modules()]
        given = mapped_tensors((call.args, call.kwargs))
        devices = {t.device.index for t in given if t.is_cuda}
        with torch.no_grad(), self._trying(), torch.random.fork_rng(devices=devices):
            try:
                yield
            finally:
                for module, attributes, buffers in kept:
                    _restore(vars(module), attributes)
                    _restore(module._buffers, buffers)

    def _prove(self, call: BodyCall, output: Any, batch: int) -> Proven:
        """Find the batch dimensions by running the module on the last and the first entry."""
        given = mapped_tensors((call.args, call.kwargs))
        few = [batch - 1, 0] if batch > 2 else [1]
        rows = torch.tensor(few, device=given[0].device if given else None)
        options = [[*(d for d, size in enumerate(t.shape) if size == batch), None] for t in given]
        for axes in itertools.islice(itertools.product(*options), TRIALS):
            args, kwargs = gathered((call.args, call.kwargs), axes, rows)
            try:
                some = call.forward(*args, **kwargs)
            except Exception:  # whatever a module says to shapes that do not fit together: these axes are not it
                continue
            returned = matching(some, output, rows, batch)
            if returned is None:
                continue
            if call.state_of is None or same_rows(call.state_of(some), call.state_of(output), 0, rows):
                return Proven(axes, returned, tuple(t.shape for t in given))
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


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    for name in [name for name in now if name not in before]:
        del now[name]
    now.update(before)


class Holding(Retiring):
    """What is known of the batch dimensions in masked execution, where halted entries are computed with the others.

    They keep what their modules gave them last, the state and all that a loop carries beside it. A call whose batch
    dimension cannot be proven gives what it gives: of its halted entries, the state alone is kept.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._unproven: set[tuple[str, int, tuple[int, ...]]] = set()

    def call(
        self,
        call: BodyCall,
        present: Tensor,
        batch: int,
        before: Any = None,
        leaves: bool = False,
        within: Within = lambda gathered: nullcontext(),
    ) -> Any:
        with within(False):
            output = call.forward(*call.args, **call.kwargs)
        proven = self._found(call, batch) or self._tried(call, output, batch)
        if proven is None or len(present) == batch or not alike(output, before):
            return output
        return held(output, proven.returned, present, before)

    def _tried(self, call: BodyCall, output: Any, batch: int) -> Proven | None:
        key = (call.name, call.place, call.shape)
        if batch == 1 or key in self._unproven or self._norms.training:
            return None
        try:
            return self._look(call, output, batch)
        except (BatchNotFound, RowsMeet):
            self._unproven.add(key)
            return None
