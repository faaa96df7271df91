"""Proofs of which dimension is the batch, on the calls of a loop's modules.

Nothing says which dimension of an argument or output is the batch. So it is tried: a module is run on two entries, and
must give the same two rows that it gives of the whole batch.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment.axes import TRIALS, Axes, BatchNorms, BodyCall, Proven, gathered, matching, same_rows, telling
from haltkit.attachment.errors import BatchNotFound, RowsMeet
from haltkit.attachment.outputs import mapped_tensors, writes_of

__all__ = ["Proofs"]


class Proofs:
    """What is proven of the calls of one loop's modules. It lasts as long as the session.

    Args:
        modules: of the body, by path.
        trying: calls inside it are no part of any loop.

    Attributes:
        norms: the batch norms among them.
    """

    def __init__(self, modules: dict[str, nn.Module], trying: Callable[[], AbstractContextManager[None]]) -> None:
        self._modules, self._trying, self.norms = tuple(modules.values()), trying, BatchNorms(modules)
        self._proven: dict[tuple[str, int, tuple[int, ...]], list[Proven]] = defaultdict(list)
        self._known: set[tuple[str, int]] = set()  # calls (module, place) of which something is proven

    def of(self, call: BodyCall, batch: int) -> Proven | None:
        """What is proven of a call."""
        known = self._proven[call.name, call.place, call.shape]
        return next((proven for proven in known if proven.fits(call, batch)), None)

    def has(self, name: str, place: int) -> bool:
        """Whether something is proven of the call of this module at this place of an iteration."""
        return (name, place) in self._known

    def look(self, call: BodyCall, output: Any, batch: int) -> Proven:
        """Prove what can be of a call that gives this output, and note it.

        Args:
            output: of the whole batch; None: not known without what surrounds the call, so the call is made once more.

        Raises:
            BatchNotFound: no argument has a dimension as large as the batch.
            RowsMeet: the module gives entries other rows when it is given others beside them.
        """
        with self._aside(call):
            plain = call.forward(*call.args, **call.kwargs) if output is None else output
            proven = self._prove(call, plain, batch)
        if telling(plain, proven.returned):  # equal rows prove nothing
            self._proven[call.name, call.place, call.shape].append(proven)
            self._known.add((call.name, call.place))
        return proven

    @contextmanager
    def _aside(self, call: BodyCall) -> Iterator[None]:
        """Calls made inside leave no trace: not in a loop, in the random numbers to come, or in what modules keep on
        themselves, such as a counter of their calls."""
        parts = [m for body in self._modules for m in body.modules()]
        kept = [(m, dict(vars(m)), dict(m._buffers)) for m in parts]
        buffers = {id(b): (b, b.clone(), writes_of(b)) for _, _, own in kept for b in own.values() if b is not None}
        given = mapped_tensors((call.args, call.kwargs))
        devices = {t.device.index for t in given if t.is_cuda}
        with torch.no_grad(), self._trying(), torch.random.fork_rng(devices=devices):
            try:
                yield
            finally:
                for module, attributes, own in kept:
                    _restore(vars(module), attributes)
                    _restore(module._buffers, own)
                for buffer, before, writes in buffers.values():
                    uncounted = writes is None and torch.is_inference_mode_enabled()
                    if uncounted or writes_of(buffer) != writes:  # in place
                        buffer.copy_(before)

    def _prove(self, call: BodyCall, output: Any, batch: int) -> Proven:
        """Find the batch dimensions by running the module on the last and the first entry."""
        given = mapped_tensors((call.args, call.kwargs))
        self._refuse_lists(call, batch)
        few = torch.tensor([batch - 1, 0] if batch > 2 else [1], device=given[0].device if given else None)
        trials = [few]
        if any(_may_index(t) for t in given):
            # Among two entries an index may point beyond the end, which no GPU survives: as many as there are go first.
            trials.insert(0, few.repeat(batch)[:batch])
        options = [[*(d for d, size in enumerate(t.shape) if size == batch), None] for t in given]
        for axes in itertools.islice(itertools.product(*options), TRIALS):
            returned = None
            for rows in trials:
                returned = self._tried(call, axes, rows, output, batch)
                if returned is None:
                    break
            if returned is not None:
                return Proven(axes, returned, tuple(t.shape for t in given))
        if all(option == [None] for option in options):
            raise BatchNotFound(
                f"execution='compact': no tensor that {call.name!r} is given has a dimension of {batch}, the batch, so "
                "entries cannot leave it. Describe the loop by modules that are given the batch as a dimension of its "
                "own, or use execution='masked'"
            )
        raise RowsMeet(
            f"execution='compact': {call.name!r} gives entries {few.tolist()} of the batch other rows when they are "
            "alone, so rows see each other there (attention or a norm across the batch), the batch is not the state's "
            "first dimension, or the module is random (call model.eval()). Use execution='masked'"
        )

    @staticmethod
    def _tried(call: BodyCall, axes: Axes, rows: Tensor, output: Any, batch: int) -> Axes | None:
        """The batch dimensions of the output, if a call on some entries gives these what the whole batch gives them."""
        args, kwargs = gathered((call.args, call.kwargs), axes, rows)
        try:
            some = call.forward(*args, **kwargs)
        except Exception:  # whatever a module says to shapes that do not fit together: these axes are not it
            return None
        returned = matching(some, output, rows, batch)
        if returned is None or call.state_of is None:
            return returned
        return returned if same_rows(call.state_of(some), call.state_of(output), 0, rows) else None

    @staticmethod
    def _refuse_lists(call: BodyCall, batch: int) -> None:
        """Only tensors are gathered: see that no list of numbers may be one per entry.

        Raises:
            BatchNotFound: one may.
        """
        for value in (*call.args, *call.kwargs.values()):
            if isinstance(value, list) and len(value) == batch and all(isinstance(v, (int, float)) for v in value):
                raise BatchNotFound(
                    f"execution='compact': {call.name!r} is given a list of {batch} numbers, as many as entries, and "
                    "only tensors can be gathered for those that go on. Give it a tensor (or, where the numbers belong "
                    "to no entries, a tuple), or use execution='masked'"
                )


def _may_index(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    for name in [name for name in now if name not in before]:
        del now[name]
    now.update(before)
