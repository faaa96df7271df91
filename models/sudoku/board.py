"""Sudoku boards: reading and writing them, a solver that counts solutions, and how hard a board is for a person.

A board of side ``n`` has boxes of ``box_rows x box_columns``: 2x2 (side 4), 2x3 (side 6), 3x3 (side 9). It is a tuple
of ``n * n`` digits, row by row; 0 is an empty cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

__all__ = [
    "BOXES",
    "SPACING",
    "Grade",
    "Grid",
    "check_board",
    "format_board",
    "grade",
    "grid",
    "parse_board",
    "solutions",
    "solve",
]

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # box rows and columns by side
EMPTY = ".0_-"
SPACING = " \t\r\n|+,"
ANY = 1 << 20  # solutions counted at most, where all are wanted


@dataclass(frozen=True)
class Grid:
    """The geometry of boards of one side.

    Attributes:
        side: ``n``.
        box: for each cell, row by row, the number of its box.
        units: rows, columns and boxes, ``n`` cells each.
        peers: for each cell the others in its row, column or box.
    """

    side: int
    box: tuple[int, ...]
    units: tuple[tuple[int, ...], ...]
    peers: tuple[tuple[int, ...], ...]


@cache
def grid(side: int) -> Grid:
    """The geometry of boards of this side.

    Raises:
        ValueError: not 4, 6 or 9.
    """
    if side not in BOXES:
        raise ValueError(f"side {side}: boards have a side of {', '.join(map(str, BOXES))}")
    high, wide = BOXES[side]
    across = side // wide
    cells = range(side * side)
    box = tuple(cell // side // high * across + cell % side // wide for cell in cells)
    rows = [tuple(c for c in cells if c // side == i) for i in range(side)]
    columns = [tuple(c for c in cells if c % side == i) for i in range(side)]
    boxes = [tuple(c for c in cells if box[c] == i) for i in range(side)]
    units = tuple(rows + columns + boxes)
    peers = tuple(tuple(sorted({o for u in units if c in u for o in u} - {c})) for c in cells)
    return Grid(side, box, units, peers)


def parse_board(text: str) -> tuple[int, ...]:
    """A board from text: digits, and ``.``, ``0``, ``_`` or ``-`` for empty cells; spaces and frames are skipped.

    A line of ``-`` and ``+`` alone is a frame.

    Raises:
        ValueError: a character that is neither, or a length that is no board's; one line that says where.
    """
    numbered = enumerate(text.splitlines(), 1)
    lines = [(row, line) for row, line in numbered if not line.strip() or set(line.strip()) - set("-+= |")]
    kept = [(row, at, c) for row, line in lines for at, c in enumerate(line, 1) if c not in SPACING]
    for row, at, c in kept:
        if c not in EMPTY and not ("1" <= c <= "9"):
            where = f"character {at}" if len(lines) == 1 else f"line {row}, character {at}"
            raise ValueError(f"{c!r} at {where} is no digit: write 1 to 9, and . or 0 for an empty cell")
    sides = {side * side: side for side in BOXES}
    if len(kept) not in sides:
        raise ValueError(
            f"a board of {len(kept)} cells: there are {', '.join(f'{n} ({s}x{s})' for n, s in sides.items())}"
        )
    return tuple(0 if c in EMPTY else int(c) for _, _, c in kept)


def format_board(board: Sequence[int]) -> str:
    """A board as lines of digits with frames between boxes; ``.`` is an empty cell."""
    side = _side(board)
    high, wide = BOXES[side]
    lines = []
    for row in range(side):
        cells = [str(d) if d else "." for d in board[row * side : (row + 1) * side]]
        parts = [" ".join(cells[at : at + wide]) for at in range(0, side, wide)]
        if row and row % high == 0:
            lines.append("-+-".join("-" * len(part) for part in parts))
        lines.append(" | ".join(parts))
    return "\n".join(lines)


def check_board(board: Sequence[int]) -> None:
    """Whether a board is a puzzle at all.

    Raises:
        ValueError: a digit above its side, one given twice in a row, column or box, or a board without any solution.
    """
    side = _side(board)
    _check_givens(board)
    if not solutions(board, 1):
        raise ValueError(f"this {side}x{side} board has no solution")


def _check_givens(board: Sequence[int]) -> None:
    side = _side(board)
    for cell, digit in enumerate(board):
        if not 0 <= digit <= side:
            raise ValueError(f"{digit} in {_place(cell, side)} is impossible: a {side}x{side} board has 1 to {side}")
    for kind, at in (("row", 0), ("column", side), ("box", 2 * side)):
        for i, unit in enumerate(grid(side).units[at : at + side], 1):
            where: dict[int, int] = {}
            for cell in unit:
                digit = board[cell]
                if digit and digit in where:
                    first, second = _place(where[digit], side), _place(cell, side)
                    raise ValueError(f"{digit} is given twice in {kind} {i}: in {first} and in {second}")
                where[digit] = cell


def _place(cell: int, side: int) -> str:
    return f"row {cell // side + 1}, column {cell % side + 1}"


def _side(board: Sequence[int]) -> int:
    for side in BOXES:
        if side * side == len(board):
            return side
    raise ValueError(f"a board of {len(board)} cells: there are {', '.join(str(s * s) for s in BOXES)}")


def solutions(
    board: Sequence[int], limit: int = 2, order: Callable[[list[int]], list[int]] | None = None
) -> list[tuple[int, ...]]:
    """Up to ``limit`` solutions of a board.

    Args:
        board: its givens must not contradict each other in a row, column or box, or there is no solution.
        limit: how many to look for; 2 tells whether there is exactly one.
        order: in which order digits are tried at a branch; None: ascending.
    """
    side = _side(board)
    geometry, everything = grid(side), (1 << side) - 1
    used = [0] * len(geometry.units)  # digits by unit, as bits
    cells = [0] * len(board)
    of = _units_of(side)

    def put(cell: int, bit: int) -> None:
        cells[cell] |= bit
        for unit in of[cell]:
            used[unit] |= bit

    def take(cell: int) -> None:
        bit = cells[cell]
        cells[cell] = 0
        for unit in of[cell]:
            used[unit] &= ~bit

    for cell, digit in enumerate(board):
        if digit:
            bit = 1 << (digit - 1)
            a, b, c = of[cell]
            if not bit & everything or (used[a] | used[b] | used[c]) & bit:
                return []
            put(cell, bit)
    found: list[tuple[int, ...]] = []
    empty = [cell for cell, bit in enumerate(cells) if not bit]

    def search(left: list[int]) -> None:
        if not left:
            found.append(tuple(bit.bit_length() for bit in cells))
            return
        fewest, best, free = side + 1, -1, 0
        for place, cell in enumerate(left):
            a, b, c = of[cell]
            candidates = everything & ~(used[a] | used[b] | used[c])
            count = candidates.bit_count()
            if count < fewest:
                fewest, best, free = count, place, candidates
                if count <= 1:
                    break
        if not fewest:
            return
        cell = left[best]
        rest = left[:best] + left[best + 1 :]
        digits = [d for d in range(side) if free >> d & 1]
        for digit in digits if order is None else order(digits):
            put(cell, 1 << digit)
            search(rest)
            take(cell)
            if len(found) >= limit:
                return

    search(empty)
    return found


@cache
def _units_of(side: int) -> tuple[tuple[int, int, int], ...]:
    box = grid(side).box
    return tuple((c // side, side + c % side, 2 * side + box[c]) for c in range(side * side))


def solve(board: Sequence[int]) -> tuple[int, ...]:
    """The one solution of a board.

    Raises:
        ValueError: see :func:`check_board`; or several solutions.
    """
    check_board(board)
    found = solutions(board, 2)
    if len(found) > 1:
        cell = next(c for c, (a, b) in enumerate(zip(*found, strict=True)) if a != b)
        digits = " or ".join(str(one[cell]) for one in found)
        raise ValueError(f"this board has several solutions: {_place(cell, _side(board))} can be {digits}")
    return found[0]


@dataclass(frozen=True)
class Grade:
    """How hard a board is.

    Attributes:
        givens: cells that are given.
        rounds: rounds of filling in, all at once, each cell that a naked or a hidden single decides, until nothing is.
        singles: they suffice to solve it.
        left: cells that they do not fill.
    """

    givens: int
    rounds: int
    singles: bool
    left: int

    @property
    def name(self) -> str:
        """``easy`` (singles suffice, up to 4 rounds), ``medium`` (more rounds) or ``hard`` (singles do not suffice)."""
        if not self.singles:
            return "hard"
        return "easy" if self.rounds <= 4 else "medium"


def grade(board: Sequence[int]) -> Grade:
    """How hard a board is; it should have one solution."""
    side = _side(board)
    geometry, everything = grid(side), (1 << side) - 1
    cells, rounds = [1 << (d - 1) if d else 0 for d in board], 0
    of = _units_of(side)
    while True:
        used = [0] * len(geometry.units)
        for unit, members in enumerate(geometry.units):
            for cell in members:
                used[unit] |= cells[cell]
        free = [
            0 if cells[c] else everything & ~(used[of[c][0]] | used[of[c][1]] | used[of[c][2]])
            for c in range(len(cells))
        ]
        decided = {c: bits for c, bits in enumerate(free) if bits and not bits & (bits - 1)}
        for members in geometry.units:
            once = twice = 0
            for cell in members:
                twice |= once & free[cell]
                once |= free[cell]
            hidden = once & ~twice
            if hidden:
                for cell in members:
                    if free[cell] & hidden:
                        decided[cell] = free[cell] & hidden
        if not decided:
            left = cells.count(0)
            return Grade(sum(1 for d in board if d), rounds, not left, left)
        for cell, bits in decided.items():
            cells[cell] = bits
        rounds += 1
