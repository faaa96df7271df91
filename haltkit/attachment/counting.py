"""Steps of every row in one call of a model."""

from __future__ import annotations

from torch import Tensor

__all__ = ["Taken"]


class Taken:
    """Observes the loops of one call of a model.

    Attributes:
        steps: of every row by region, ``(...)`` int64 each, over all turns of a loop that runs inside another one.
        outcomes: an :class:`~haltkit.Outcome` of every row by region, ``(...)`` int8 each, of the newest turn.
    """

    def __init__(self) -> None:
        self.steps: dict[str, Tensor] = {}
        self.outcomes: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Another call of the model begins."""
        self.steps, self.outcomes = {}, {}

    def begin(self, name: str, x0: Tensor) -> None:
        """A loop starts."""

    def step(self, name: str, k: int, x: Tensor) -> None:
        """A loop has taken a step."""

    def end(self, name: str, steps: Tensor, outcome: Tensor) -> None:
        """A loop is over."""
        before = self.steps.get(name)
        self.steps[name] = steps if before is None else before + steps
        self.outcomes[name] = outcome
