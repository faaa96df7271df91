"""What a body's modules are given around a halt: after it, nothing that carries the state may change any more.

After the halt the body's outputs repeat. If what its modules are given goes on changing, the model carries
something from iteration to iteration outside of them, and a halt of the body does not halt the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from haltkit.attachment.description import Loop
from haltkit.attachment.errors import GlueDrift, VaryingInput
from haltkit.attachment.outputs import tensors_in

__all__ = ["ENOUGH", "Inputs", "gap"]

ENOUGH = 2  # replayed iterations in which the first halted loop must be seen to stand still


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors; 0 is equal to the bit, NaN included, inf another shape or dtype."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(a, b):
        return 0.0
    same = (a == b) | (a.isnan() & b.isnan())
    worst = float((a.double() - b.double()).abs().masked_fill(same, 0).max())
    return float("inf") if worst != worst else worst


@dataclass(frozen=True)
class _Given:
    """One call of a body module: the tensors that it was given."""

    module: str
    tensors: list[Tensor]


def _changed(before: list[_Given], after: list[_Given]) -> bool:
    return any(
        gap(a, b)
        for old, new in zip(before, after, strict=False)
        for a, b in zip(old.tensors, new.tensors, strict=False)
    )


class Inputs:
    """The inputs of all body modules over one loop.

    Only what the description calls the ``carry`` is watched, if it names one. A number (a tensor of one integer) is not
    watched: it counts iterations.

    Args:
        loop: the loop.
        throughout: watch before the halt too, to tell inputs that stand still since the halt from those that always do;
            otherwise raise when two replayed iterations differ: the same modules may also run in a second loop.
        keep: numbers of iterations, from 1, whose inputs and states are kept.
    """

    def __init__(self, loop: Loop, *, throughout: bool, keep: tuple[int, ...] = ()) -> None:
        self.loop, self.throughout = loop, throughout
        self.kept: dict[int, list[_Given]] = {number: [] for number in keep}
        self.states: dict[int, Tensor] = {}  # at the iterations kept
        self.newest: Tensor | None = None
        self.replayed = 0  # iterations that were replayed to their end
        self.state: Tensor | None = None  # at the halt
        self._number = 0
        self._halted = False
        self._now: list[_Given] = []
        self._before: list[_Given] | None = None
        self._moved: set[tuple[int, int]] = set()  # (call, tensor) that changed up to the halt
        self._seen: set[tuple[int, int]] = set()
        self._modules: dict[int, str] = {}
        self._drift: dict[tuple[int, int], float] = {}
        self._first: list[_Given] = []  # of the first replayed iteration

    def see(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A body module is called."""
        if self.throughout or self._halted:
            self._now.append(_Given(module, [t.detach().clone() for t in self._watched(module, args, kwargs)]))

    def _watched(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
        carry = self.loop.carry
        if carry is not None:
            if module == carry[0] and carry[1] < len(args):
                yield from tensors_in(args[carry[1]])
            return
        for value in (*args, *kwargs.values()):
            for tensor in tensors_in(value):
                if tensor.is_floating_point() or tensor.numel() > 1:
                    yield tensor

    def begins(self, halted: bool, state: Tensor | None = None) -> None:
        """An iteration begins; the one before it, if any, is complete. ``state``: at the halt, the first time."""
        self.ends()
        if halted and not self._halted:
            self.state = state
        self._number += 1
        self._halted = halted

    def ends(self) -> None:
        """The iteration is complete."""
        now, self._now = self._now, []
        if self._number in self.kept:
            self.kept[self._number] = now
        if not now:
            return
        before, self._before = self._before, now
        self.replayed += self._halted
        if self.replayed == 1:
            self._first = now
        if before is None:
            return
        for call, (old, new) in enumerate(zip(before, now, strict=False)):
            self._modules[call] = new.module
            for place, (a, b) in enumerate(zip(old.tensors, new.tensors, strict=False)):
                change = gap(a, b)
                self._seen.add((call, place))
                if self.replayed <= 1:  # what the first replayed iteration is given was computed before the halt
                    if change:
                        self._moved.add((call, place))
                else:
                    self._drift[call, place] = max(change, self._drift.get((call, place), 0.0))

        if not self.throughout:
            self.refuse_drift()

    def stated(self, x: Tensor) -> None:
        """The loop has a new state."""
        if self.throughout:
            self.newest = x
            if self._number in self.kept:
                self.states[self._number] = x.clone()

    def moved_into(self, number: int) -> bool:
        """Whether any input of a kept iteration differs from that of the one before, kept too."""
        return _changed(self.kept[number - 1], self.kept[number])

    def reads_as(self, other: Inputs, number: int) -> bool:
        """Whether a kept iteration was given the same in another loop."""
        return not _changed(self.kept[number], other.kept[number])

    @property
    def drift(self) -> float | None:
        """The largest change between replayed iterations; None where none could be seen.

        That is where fewer than two iterations were replayed or, watched throughout, nothing had moved before the halt.
        """
        if self.replayed < 2 or not self._drift:
            return None
        worst = max(self._drift.values())
        return None if self.throughout and not self._moved and not worst else worst

    @property
    def steady(self) -> list[str]:
        """Modules with an input that moved up to the halt and stood still after it."""
        return self._named({place for place in self._moved if self._drift.get(place) == 0})

    @property
    def constant(self) -> list[str]:
        """Modules with inputs none of which ever moved: that they stand still proves nothing."""
        moved = {call for call, _ in self._moved | {place for place, change in self._drift.items() if change}}
        return self._named({(call, place) for call, place in self._seen if call not in moved})

    def _named(self, places: set[tuple[int, int]]) -> list[str]:
        return list(dict.fromkeys(self._modules[call] for call, _ in sorted(places)))

    def refuse_drift(self) -> None:
        """Raise if something drifts, and say which of two things it is.

        Raises:
            VaryingInput: the state stands still, and something new comes at each iteration beside it.
            GlueDrift: the state itself goes on moving.
        """
        if not self.drift:
            return
        call, place = max(self._drift, key=lambda at: self._drift[at])
        where, size = self._modules[call], self._drift[call, place]
        if self._carries_steady_state():
            raise VaryingInput(
                f"after the halt {where!r} was still given new input at each iteration (changing by up to {size:.3g}) "
                "beside the state: a recurrence over a sequence cannot be halted in depth. Record it instead; or, if "
                "what changes is a loop-index embedding, name by carry= where the state enters, or say check=False"
            )
        raise GlueDrift(
            f"after the halt the input of {where!r} went on changing (by up to {size:.3g}): the model carries state "
            "outside the described modules, such as h = h + f(h). Say on_halt={...: 'zero'} for a residual branch, "
            "'identity' for a map of the state, carry= if the state enters elsewhere, or describe the loop by the "
            "module that contains the sum. (Where verify finds the halt exactly equal, say check=False)"
        )

    def _carries_steady_state(self) -> bool:
        state = self.state
        if state is None:
            return False
        return any(
            self._drift.get((call, place)) == 0 and t.shape == state.shape and torch.equal(t, state)
            for call, given in enumerate(self._first)
            for place, t in enumerate(given.tensors)
        )
