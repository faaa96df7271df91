"""The sudoku task: boards of our own with exactly one solution, and all that look different but are the same board.

A row of a sequence is a cell; its columns are the digit given (0: none), its row, its column and its box, from 1. The
label of every cell is its digit in the solution.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations, product
from typing import Any, Literal

import numpy as np
from torch import Tensor

from haltkit.kinds import Kinds
from haltkit.models.config import ConfigError, from_dict
from haltkit.models.reasoner.task import Batch, Level, from_numpy
from haltkit.models.sudoku.board import (
    BOXES,
    SPACING,
    check_board,
    format_board,
    grade,
    grid,
    parse_board,
    solutions,
)

__all__ = [
    "Puzzle",
    "Sudoku",
    "SudokuSettings",
    "canonical",
    "empty_cells",
    "encode",
    "generate",
    "make_task",
    "scramble",
]


@dataclass(frozen=True)
class SudokuSettings:
    """What boards are drawn from.

    Attributes:
        side: 4, 6 or 9.
        boards: base boards that training draws from; each is met in ever new disguises (see :func:`scramble`).
        seed: of the base boards.
        fewest, most: givens of a board are drawn evenly from here; a board that loses its one solution keeps more.
        steps: least and greatest number of steps that training draws.
        batch: boards in a batch.
    """

    side: int = 6
    boards: int = 4096
    seed: int = 1
    fewest: int = 8
    most: int = 20
    steps: tuple[int, int] = (4, 20)
    batch: int = 64

    def __post_init__(self) -> None:
        if self.side not in BOXES:
            raise ConfigError(f"task.side must be one of {', '.join(map(str, BOXES))}, got {self.side}")
        if not 0 <= self.fewest <= self.most <= self.side**2:
            raise ConfigError(f"task: 0 <= fewest <= most <= {self.side**2} must hold, got {self.fewest}, {self.most}")
        if not 1 <= self.steps[0] <= self.steps[1] or self.boards < 1 or self.batch < 1 or self.seed < 0:
            raise ConfigError("task: steps must rise from at least 1, boards and batch be at least 1, seed at least 0")


def generate(rng: np.random.Generator, side: int, fewest: int, most: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A board with exactly one solution, and the solution.

    A full board is filled at random, then cells are emptied in random order while one solution remains, down to a
    number of givens drawn evenly from ``fewest`` to ``most``.
    """
    empty = [0] * side**2
    solution = solutions(empty, 1, order=lambda digits: [int(d) for d in rng.permutation(digits)])[0]
    wanted = int(rng.integers(fewest, most + 1))
    board, givens = list(solution), side**2
    for cell in rng.permutation(side**2).tolist():
        if givens <= wanted:
            break
        digit, board[cell] = board[cell], 0
        if len(solutions(board, 2)) == 1:
            givens -= 1
        else:
            board[cell] = digit
    return tuple(board), solution


def scramble(rng: np.random.Generator, boards: np.ndarray, side: int) -> np.ndarray:
    """The same boards in disguise, ``(count, k, n, n)``: each with its own change of digits, bands, rows and columns.

    Bands (rows of boxes) change places, rows within a band, stacks, columns within a stack; where boxes are square,
    rows and columns may be swapped. ``k`` boards (a puzzle and its solution) get the same change. 0 stays 0.
    """
    high, wide = BOXES[side]
    count = len(boards)

    def lines(size: int) -> np.ndarray:
        """A permutation of ``n`` lines in groups of ``size``, ``(count, n)``."""
        groups = rng.random((count, side // size)).argsort(1)
        within = rng.random((count, side // size, size)).argsort(2)
        return (groups[:, :, None] * size + within).reshape(count, side)

    rows, columns = lines(high), lines(wide)
    digits = np.zeros((count, side + 1), dtype=np.int64)
    digits[:, 1:] = rng.random((count, side)).argsort(1) + 1
    each = np.arange(count)[:, None, None, None]
    which = np.arange(boards.shape[1])[None, :, None, None]
    moved = boards[each, which, rows[:, None, :, None], columns[:, None, None, :]]
    if high == wide:
        moved = np.where(rng.random(count)[:, None, None, None] < 0.5, moved.swapaxes(2, 3), moved)
    out: np.ndarray = digits[each, moved]
    return out


def canonical(board: Sequence[int], side: int) -> bytes:
    """What all disguises of a board have in common, and no other board: the least of them, digits by first use.

    Two boards are the same one in disguise exactly if these are equal.
    """
    geometry = _transformations(side)
    moved = np.asarray(board, dtype=np.int64)[geometry]  # (transformations, n * n)
    names = np.zeros((len(moved), side + 1), dtype=np.int64)
    used = np.zeros(len(moved), dtype=np.int64)
    each = np.arange(len(moved))
    out = np.zeros(moved.shape, dtype=np.uint8)
    for cell in range(side**2):
        digit = moved[:, cell]
        fresh = (digit > 0) & (names[each, digit] == 0)
        used += fresh
        names[each[fresh], digit[fresh]] = used[fresh]
        out[:, cell] = names[each, digit]
    return bytes(min(row.tobytes() for row in out))


@cache
def _transformations(side: int) -> np.ndarray:
    """Every change of places that keeps rows, columns and boxes, ``(count, n * n)``: where each cell comes from."""
    high, wide = BOXES[side]

    def lines(size: int) -> list[list[int]]:
        within = list(permutations(range(size)))
        return [
            [group * size + line for group, order in zip(groups, orders, strict=True) for line in order]
            for groups in permutations(range(side // size))
            for orders in product(within, repeat=side // size)
        ]

    rows, columns = np.array(lines(high)), np.array(lines(wide))
    cells = (rows[:, None, :, None] * side + columns[None, :, None, :]).reshape(-1, side, side)
    if high == wide:
        cells = np.concatenate([cells, cells.swapaxes(1, 2)])
    out: np.ndarray = cells.reshape(len(cells), -1)
    return out


def encode(boards: np.ndarray, solved: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boards and solutions, ``(B, n * n)``, as inputs ``(B, n * n, 4)``, labels and needed steps ``(B, n * n)``."""
    count, cells = boards.shape
    side = round(cells**0.5)
    inputs = np.empty((count, cells, 4), dtype=np.int64)
    inputs[..., 0] = boards
    inputs[..., 1] = np.arange(cells) // side + 1
    inputs[..., 2] = np.arange(cells) % side + 1
    inputs[..., 3] = np.array(grid(side).box) + 1
    return inputs, solved - 1, np.zeros((count, cells), dtype=np.int64)


def empty_cells(inputs: Tensor) -> Tensor:
    """How many cells of each board have no given, ``(B, n * n, 4)`` to ``(B,)``: the difficulty that a board shows."""
    return (inputs[..., 0] == 0).sum(-1)


@cache
def _pool(side: int, seed: int, count: int, fewest: int, most: int) -> np.ndarray:
    """``count`` base boards and solutions, ``(count, 2, n, n)``; board ``i`` depends on ``seed`` and ``i`` alone."""
    pairs = [generate(np.random.default_rng([seed, 0x5D0, i]), side, fewest, most) for i in range(count)]
    return np.array(pairs, dtype=np.int64).reshape(count, 2, side, side)


@dataclass(frozen=True)
class Sudoku:
    """The task; see the module."""

    settings: SudokuSettings = field(default_factory=SudokuSettings)
    name: str = "sudoku"
    item: str = "board"
    granularity: Literal["token", "sequence"] = "sequence"
    full_depth: int = 28
    kinds: Kinds | None = field(default=Kinds(lambda batch: empty_cells(batch.inputs), what="empty cells"), repr=False)

    @property
    def columns(self) -> tuple[int, ...]:
        side = self.settings.side
        return (side + 1,) * 4

    @property
    def classes(self) -> int:
        return self.settings.side

    @property
    def positions(self) -> int:
        return self.settings.side**2

    @property
    def levels(self) -> Sequence[Level]:
        return (Level(0, self.settings.steps, self.settings.batch),)

    @property
    def base_boards(self) -> np.ndarray:
        """Boards that training draws from, and their solutions, ``(boards, 2, n, n)``, made at the first call."""
        s = self.settings
        return _pool(s.side, s.seed, s.boards, s.fewest, s.most)

    def sample(self, rng: np.random.Generator, level: int, count: int) -> Batch:
        pool = self.base_boards
        moved = scramble(rng, pool[rng.integers(0, len(pool), count)], self.settings.side).reshape(count, 2, -1)
        return from_numpy(*encode(moved[:, 0], moved[:, 1]))

    def test_sets(self, count: int, seed: int) -> dict[str, Batch]:
        """``mixed``, drawn as in training from other base boards, and its boards by grade (sets of their own)."""
        s = self.settings
        drawn = scramble(
            np.random.default_rng([seed, 0x7E57]), _pool(s.side, 10**6 + seed, count, s.fewest, s.most), s.side
        ).reshape(count, 2, -1)
        sets = {"mixed": from_numpy(*encode(drawn[:, 0], drawn[:, 1]))}
        names = np.array([grade(board).name for board in drawn[:, 0].tolist()])
        for name in ("easy", "medium", "hard"):
            of = drawn[names == name]
            if len(of):
                sets[name] = from_numpy(*encode(of[:, 0], of[:, 1]))
        return sets

    def words(self, rows: Tensor) -> list[str]:
        """The given of each cell; ``.`` where there is none."""
        return [str(given) if given else "." for given in rows[:, 0].tolist()]

    @property
    def across(self) -> int:
        return self.settings.side

    def answer(self, label: int) -> str:
        """The digit."""
        return str(label + 1)

    def split(self, text: str) -> list[str]:
        """Boards of a text: one per line, or, where a line is no whole board, one per paragraph."""
        lines = [line for line in text.splitlines() if line.strip()]
        if all(sum(c not in SPACING for c in line) >= self.settings.side**2 for line in lines):
            return lines
        return [part for part in re.split(r"\n\s*\n", text) if part.strip()]

    def read(self, text: str) -> Puzzle:
        """A board as text (see :func:`~haltkit.models.sudoku.board.parse_board`).

        Raises:
            ValueError: it cannot be read, has another side than the model's, contradicts itself, or has no solution.
        """
        board, side = parse_board(text), self.settings.side
        if len(board) != side**2:
            other = math.isqrt(len(board))
            raise ValueError(f"a board of {other}x{other} cells: this model solves {side}x{side}")
        check_board(board)
        found = solutions(board, 2)
        note = "this board has several solutions: any of them counts as right" if len(found) > 1 else ""
        return Puzzle(board, from_numpy(*encode(np.array([board]), np.array([found[0]]))), note)


@dataclass(frozen=True, eq=False)
class Puzzle:
    """A board that a user wrote.

    Attributes:
        givens: digits row by row, 0 where there is none.
        batch: of one sequence; its labels are the board's first solution.
        note: says so where the board has several.
    """

    givens: tuple[int, ...]
    batch: Batch
    note: str = ""

    def right(self, answers: Sequence[int]) -> bool:
        """Whether the digits (less 1, as classes are) keep the givens and solve the board."""
        board = [answer + 1 for answer in answers]
        kept = all(given in (0, digit) for given, digit in zip(self.givens, board, strict=True))
        return kept and solutions(board, 1) == [tuple(board)]

    def show(self, answers: Sequence[int], steps: Sequence[int] | None = None) -> str:
        """The board with frames between boxes."""
        del steps  # a board halts as a whole
        return format_board([answer + 1 for answer in answers])


def make_task(settings: dict[str, Any]) -> Sudoku:
    """The task with these settings.

    Raises:
        ConfigError: settings that do not work.
    """
    return Sudoku(from_dict(SudokuSettings, settings, "task"))
