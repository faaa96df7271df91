"""One problem answered step by step, cell by cell, for models whose answers a reader can check."""

from __future__ import annotations

from dataclasses import dataclass

from haltkit.diagnostics.errors import DiagnosticError

__all__ = ["Unfolding"]


@dataclass(frozen=True)
class Unfolding:
    """The answers of every step on one problem.

    Attributes:
        title: what the problem is.
        columns: cells per line.
        cells: what each cell says beforehand: a given digit, a query.
        asked: whether the model answers the cell.
        answers: ``answers[k - 1][cell]``, the answer after step k; what the cell says where nothing is asked.
        right: the right answer of each cell; likewise.

    Raises:
        DiagnosticError: a list that has not one entry per cell, or no columns.
    """

    title: str = ""
    columns: int = 1
    cells: tuple[str, ...] = ()
    asked: tuple[bool, ...] = ()
    answers: tuple[tuple[str, ...], ...] = ()
    right: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rows = {f"answers[{k}]": answers for k, answers in enumerate(self.answers)}
        for name, entries in {"asked": self.asked, "right": self.right, **rows}.items():
            if len(entries) != len(self.cells):
                raise DiagnosticError(f"{name} has {len(entries)} entries, and there are {len(self.cells)} cells")
        if self.columns < 1:
            raise DiagnosticError(f"columns is {self.columns}: there must be at least 1")

    @property
    def settled(self) -> tuple[int, ...]:
        """For each cell the step from which its answer never changes; 0 where nothing is asked."""
        found = []
        for cell, asked in enumerate(self.asked):
            course = [answers[cell] for answers in self.answers]
            last = len(course)
            while last > 1 and course[last - 2] == course[-1]:
                last -= 1
            found.append(last if asked else 0)
        return tuple(found)
