"""How far the cache slots of an iteration are from those of the one before."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from haltkit.attachment.errors import KVDepthMismatch

__all__ = ["Strides"]


@dataclass
class Strides:
    """How far an iteration's cache slots are from those of the one before: given, or learned from three iterations."""

    given: int | None = None
    learned: int | None = None

    def learn(self, iterations: list[list[int]]) -> None:
        """From the slots that successive iterations wrote, if there are three at equal distances."""
        distances = _distances(iterations)
        if len(iterations) > 2 and distances is not None and len(distances) == 1:
            self.learned = next(iter(distances))

    def of(self, iterations: list[list[int]]) -> int:
        """From the slots that successive iterations wrote.

        Raises:
            KVDepthMismatch: too few iterations, or distances that are not all equal.
        """
        if self.given is not None:
            return self.given
        distances = _distances(iterations)
        known = set() if self.learned is None else {self.learned}
        if distances is None or len(distances | known) > 1:
            raise KVDepthMismatch(
                f"kv='copy' needs cache slots at one distance from iteration to iteration; here the iterations wrote "
                f"{iterations} (a first one with slots of its own, perhaps): use kv='freeze' or 'uniform', or say "
                "kv_stride= if you know the distance of the later ones"
            )
        self.learn(iterations)
        if self.learned is None:
            raise KVDepthMismatch(
                "kv='copy' needs to know how far an iteration's cache slots are from those of the one before, which "
                f"takes three iterations with equal distances (seen: {len(iterations)}): say kv_stride="
            )
        return self.learned


def _distances(iterations: list[list[int]]) -> set[int] | None:
    """From each slot to the one that the next iteration wrote in its place; None if their number changes."""
    pairs = list(itertools.pairwise(iterations))
    if any(len(before) != len(after) for before, after in pairs):
        return None
    return {b - a for before, after in pairs for a, b in zip(before, after, strict=True)}
