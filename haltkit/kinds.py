"""Kinds of rows, told apart by the input alone, and a depth for each row that is known before a pass runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from haltkit.protocol import check_count

__all__ = ["DepthByRow", "Kinds", "per_row"]

LONGEST_LABEL = 60


@dataclass(frozen=True)
class DepthByRow:
    """A number of steps for each row, known before the pass: nothing is measured. Make one by :meth:`Kinds.depths`.

    Attributes:
        of: from a sample to the steps of its rows by region, int64 from 1: ``(B, T)``, or ``(B,)`` where all rows of a
            sequence take the same.
        deepest: the most steps that any row takes, by region, in the order the regions run.
        label: for tables.
        hindsight: whether the steps were found by running these very samples to full depth: nobody can pick them.
    """

    of: Callable[[Any], Mapping[str, Tensor]]
    deepest: Mapping[str, int]
    label: str
    hindsight: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "deepest", dict(self.deepest))
        for region, steps in self.deepest.items():
            check_count(f"steps in region {region!r}", steps)

    def __hash__(self) -> int:
        return hash((self.of, tuple(self.deepest.items()), self.label))


@dataclass(frozen=True)
class Kinds:
    """Tells the rows of a sample apart by what the input shows, so that a fixed depth may differ from kind to kind.

    Attributes:
        of: from a sample to the kind of each row, int64 from 0: ``(B, T)``, or ``(B,)`` where all rows of a sequence
            are of one kind.
        names: of the kinds; None: they are numbers.
        what: a kind is, as in "fixed depth by empty cells".
    """

    of: Callable[[Any], Tensor]
    names: tuple[str, ...] | None = None
    what: str = "kind of row"

    def count(self, samples: Sequence[Any]) -> int:
        """How many kinds there are: as many as have names, else one more than the greatest number among the samples.

        Raises:
            ValueError: a kind below 0, or beyond the names.
        """
        found = [kinds for sample in samples if (kinds := self.of(sample)).numel()]
        low, high = (
            min((int(one.min()) for one in found), default=0),
            max((int(one.max()) for one in found), default=0),
        )
        known = high + 1 if self.names is None else len(self.names)
        if low < 0 or high >= known:
            wanted = "from 0" if self.names is None else f"0 to {known - 1} ({', '.join(self.names)})"
            raise ValueError(f"a row of kind {low if low < 0 else high}: kinds= numbers kinds {wanted}")
        return known

    def depths(self, steps: Mapping[str, Sequence[int]]) -> DepthByRow:
        """A fixed depth for each kind.

        Args:
            steps: by region, in the order the regions run; entry ``i`` is for kind ``i``.

        Raises:
            ValueError: no steps, less than one step, or not one number for each kind that has a name. What is made
                raises it of a sample with a kind that has no steps.
        """
        table = {region: tuple(counts) for region, counts in steps.items()}
        for region, counts in table.items():
            if not counts or (self.names is not None and len(counts) != len(self.names)):
                wanted = "at least 1" if self.names is None else f"{len(self.names)} ({', '.join(self.names)})"
                raise ValueError(f"{len(counts)} depths in region {region!r}: there are {wanted} kinds")
            for count in counts:
                check_count(f"steps in region {region!r}", count)
        looked_up = {region: torch.tensor(counts, dtype=torch.int64) for region, counts in table.items()}

        fewest = min(map(len, table.values()), default=0)

        def of(sample: Any) -> dict[str, Tensor]:
            kinds = self.of(sample)
            if kinds.numel() and not 0 <= int(kinds.min()) <= int(kinds.max()) < fewest:
                raise ValueError(f"a row of kind {int(kinds.max())}: there are depths for kinds 0 to {fewest - 1}")
            return {region: depths.to(kinds.device)[kinds] for region, depths in looked_up.items()}

        deepest = {region: max(counts) for region, counts in table.items()}
        return DepthByRow(of, deepest, f"by {self.what}: {'; '.join(map(self._said, table.values()))}")

    def _said(self, counts: Sequence[int]) -> str:
        """``edges 12, queries 19``; neighbours of the same depth together; the range alone where that is too long."""
        runs = [list(run) for _, run in groupby(range(len(counts)), key=lambda kind: counts[kind])]
        names = self.names or tuple(map(str, range(len(counts))))
        parts = [names[run[0]] if len(run) == 1 else f"{names[run[0]]}..{names[run[-1]]}" for run in runs]
        said = ", ".join(f"{part} {counts[run[0]]}" for part, run in zip(parts, runs, strict=True))
        return said if len(said) <= LONGEST_LABEL else f"{min(counts)} to {max(counts)} steps"


def per_row(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Values ``(B,)`` or ``(B, T)`` with an entry per row of ``(B, T)``."""
    return values.reshape(*values.shape, *[1] * (len(rows) - values.ndim)).expand(*rows)
