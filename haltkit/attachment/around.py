"""A loop that is written around calls of a model, as a module that can be attached to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from haltkit.attachment.description import check_model

__all__ = ["LoopAround"]


class LoopAround(nn.Module):
    """A function that calls a model in a loop, as the ``forward`` of a module that has the model as a part::

        def solve(puzzles):
            carry = model.initial_carry(puzzles)
            for _ in range(16):
                carry, answer = model(carry, puzzles)
            return answer

        looped = haltkit.LoopAround(model, solve)
        with haltkit.attach(looped, "norm:tau=0.1", body=["model"], select=..., put=...) as session:
            answer = looped(puzzles)

    Each call of it is one loop, or several where ``run`` is described so. :func:`haltkit.discover` proposes the
    description.

    Args:
        model: what the loop calls; ``"model"`` in paths.
        run: contains the loop; whatever the module is called with goes to it.

    Raises:
        ValueError: no module, or ``run`` cannot be called.
    """

    def __init__(self, model: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        check_model(model)
        if not callable(run):
            raise ValueError(f"run is a {type(run).__name__}: the function whose loop calls the model is expected")
        self.model = model
        self._run = (run,)  # in a tuple: were it a module, it would be a part of this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``run`` returns."""
        return self._run[0](*args, **kwargs)
