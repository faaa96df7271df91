"""A joint budget of steps: what each entry of the batch has taken of it, over all loops of one call of the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from haltkit.attachment.errors import BatchNotFound
from haltkit.attachment.part import Part

__all__ = ["Spending"]


class Spending:
    """What each entry has taken of a joint budget. A step counts, one for each loop, when it begins.

    An entry has room for one more step of a loop if the budget also has room for one step of every loop that must run
    then: of those that began inside the loop's step before, and of the regions that have not begun yet.
    """

    def __init__(self, total: int, regions: Sequence[str]) -> None:
        self._total, self._awaited = total, set(regions)
        # Of each entry, (batch,); a number while it is the same for all.
        self._taken: Tensor | int = 0  # steps
        self.begun: Tensor | int = 0  # loops

    def begins(self, region: str, part: Part | None) -> None:
        """A loop begins."""
        self._awaited.discard(region)
        self.begun = self.begun + 1 if part is None else self._spread(self.begun, part.running, part)

    def step(self, entries: Tensor | None, part: Part | None) -> None:
        """Entries begin a step, ``(n,)`` bool of those that the loop is given; None: all of them."""
        if part is not None:
            running = part.running if entries is None else part.running & self._aligned(entries, len(part.given))
            self._taken = self._spread(self._taken, running, part)
        else:
            self._taken = self._taken + (1 if entries is None else self._aligned(entries.long()))

    def room(self, count: int, since: Tensor | int, part: Part | None, device: torch.device) -> Tensor:
        """Which of the ``count`` entries that a loop is given may take another step, ``(count,)`` bool.

        Args:
            count: the entries.
            since: loops that had begun when the step before did.
            part: which entries they are.
            device: of the result.
        """
        needed = torch.as_tensor(self._taken + 1 + self.begun - since + len(self._awaited), device=device)
        if part is not None:
            needed = needed.expand(part.batch)[part.given]
        room = needed <= self._total
        return self._aligned(room.expand(count) if room.ndim == 0 else room, count)

    @staticmethod
    def _spread(counts: Tensor | int, running: Tensor, part: Part) -> Tensor:
        """Counts of all entries, with one more for those of a part that are running."""
        every = torch.as_tensor(counts, device=part.given.device).expand(part.batch)
        return every.index_add(0, part.given, running.long())

    def _aligned(self, entries: Tensor, count: int | None = None) -> Tensor:
        expected = count if count is not None else len(self._taken) if isinstance(self._taken, Tensor) else None
        if expected is not None and len(entries) != expected:
            raise BatchNotFound(
                f"total_steps counts the steps of each entry of the batch, and the loops disagree about how many there "
                f"are ({len(entries)} and {expected} in the states' first dimension): give each loop a budget of its "
                "own, max_steps={region: steps}"
            )
        return entries
