"""One body call as it was recorded, to be given again after the halt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from haltkit.attachment.errors import GradientLost, MutatedOutput
from haltkit.attachment.outputs import map_tensors, tensors_in

__all__ = ["Recorded", "beside"]


@dataclass(frozen=True)
class Recorded:
    """One body call of an iteration."""

    name: str
    output: Any
    versions: tuple[int, ...] | None  # None: the tape has its own copy, as inference tensors have no versions
    grad_enabled: bool

    @classmethod
    def of(cls, name: str, output: Any, copies: bool) -> Recorded:
        tensors = tensors_in(output)
        if copies or any(t.is_inference() for t in tensors):
            return cls(name, map_tensors(torch.clone, output), None, torch.is_grad_enabled())
        # A container of its own: the model may put other tensors into the one that it was given.
        return cls(name, map_tensors(_same, output), tuple(t._version for t in tensors), torch.is_grad_enabled())

    def again(self, allow_grad: bool) -> Any:
        """The output once more.

        Raises:
            MutatedOutput: the model has changed it in place.
            GradientLost: it was made without gradients, and now they are wanted.
        """
        if self.versions is not None and self.versions != tuple(t._version for t in tensors_in(self.output)):
            raise MutatedOutput(
                f"the model changes the output of {self.name!r} in place (such as h += ...), so it cannot be given "
                "again after the halt: make that operation out of place, say copies=True, or describe the loop by "
                "other modules"
            )
        if torch.is_grad_enabled() and not self.grad_enabled and not allow_grad:
            raise GradientLost(
                f"{self.name!r} ran under no_grad before the halt and would be replayed where gradients are on: the "
                "loop would train nothing. Halt under torch.no_grad(), or say allow_grad=True if that is meant"
            )
        return map_tensors(_same if self.versions is not None else torch.clone, self.output)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def beside(output: Any, state: Tensor | None) -> list[Tensor]:
    """What a body module returned beside the state."""
    return [] if isinstance(output, Tensor) else [t for t in tensors_in(output) if t is not state]
