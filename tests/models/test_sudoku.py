"""Sudoku: the solver against brute force, the generator's laws, disguises, and boards that are none."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sudoku import Sudoku as OtherSudoku

from haltkit.models.config import ConfigError
from haltkit.models.reasoner.checkpoint import bundled_reasoner
from haltkit.models.reasoner.measure import curve, predictions
from haltkit.models.reasoner.model import LOOP
from haltkit.models.reasoner.task import make_task
from haltkit.models.sudoku.board import (
    BOXES,
    check_board,
    format_board,
    grade,
    grid,
    parse_board,
    solutions,
    solve,
)
from haltkit.models.sudoku.task import Sudoku, SudokuSettings, canonical, encode, generate, scramble

SIDES = st.sampled_from(list(BOXES))
KNOWN = "53..7.... 6..195... .98....6. 8...6...3 4..8.3..1 7...2...6 .6....28. ...419..5 ....8..79"
SOLVED = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


def is_solved(board: tuple[int, ...], side: int) -> bool:
    return all(sorted(board[c] for c in unit) == list(range(1, side + 1)) for unit in grid(side).units)


def all_full_boards() -> list[tuple[int, ...]]:
    """All 288 boards of side 4, from rows put together blindly."""
    rows = [row for row in product(range(1, 5), repeat=4) if len(set(row)) == 4]
    return [sum(four, ()) for four in product(rows, repeat=4) if is_solved(sum(four, ()), 4)]


FULL = all_full_boards()


def test_geometry() -> None:
    assert len(FULL) == 288
    for side, (high, wide) in BOXES.items():
        geometry = grid(side)
        assert high * wide == side
        assert all(len(set(unit)) == side for unit in geometry.units)
        assert {len(p) for p in geometry.peers} == {2 * (side - 1) + (high - 1) * (wide - 1)}
    with pytest.raises(ValueError, match="a side of 4, 6, 9"):
        grid(5)


@given(st.lists(st.integers(0, 4), min_size=16, max_size=16), st.integers(0, 16))
@settings(max_examples=80)
def test_solver_finds_what_looking_through_all_boards_finds(digits: list[int], emptied: int) -> None:
    digits[:emptied] = [0] * emptied
    fitting = {full for full in FULL if all(d in (0, f) for d, f in zip(digits, full, strict=True))}
    assert set(solutions(digits, 1000)) == fitting
    assert len(solutions(digits, 2)) == min(2, len(fitting))


@given(SIDES, st.integers(0, 10**6))
@settings(max_examples=12)
def test_generated_boards_have_exactly_one_solution(side: int, seed: int) -> None:
    fewest, most = {4: (4, 8), 6: (9, 16), 9: (30, 40)}[side]
    board, solution = generate(np.random.default_rng(seed), side, fewest, most)
    assert is_solved(solution, side)
    assert solutions(board, 3) == [solution]
    assert solve(board) == solution
    assert sum(map(bool, board)) >= fewest
    assert generate(np.random.default_rng(seed), side, fewest, most) == (board, solution)


@given(SIDES, st.integers(0, 10**6))
@settings(max_examples=12)
def test_disguised_boards_are_as_hard_and_have_the_disguised_solution(side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pair = np.array(generate(rng, side, side * side // 3, side * side // 2)).reshape(1, 2, side, side)
    moved = scramble(rng, pair.repeat(3, 0), side).reshape(3, 2, -1)
    for board, solution in moved.tolist():
        assert solutions(board, 2) == [tuple(solution)]
        assert grade(board) == grade(pair[0, 0].flatten().tolist())


@given(st.sampled_from([4, 6]), st.integers(0, 10**6))
@settings(max_examples=8)
def test_a_board_is_known_again_in_every_disguise(side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pair = np.array([generate(rng, side, side, side * 2)[0] for _ in range(2)]).reshape(2, 1, side, side)
    moved = scramble(rng, pair, side)
    first, second = (canonical(board.flatten().tolist(), side) for board in pair)
    assert [canonical(board.flatten().tolist(), side) for board in moved] == [first, second]
    other = pair[0].flatten().tolist()
    other[other.index(0)] = side
    assert canonical(other, side) != first


@pytest.mark.parametrize(("side", "empty"), [(4, 10), (6, 18), (6, 24)])
def test_the_solver_agrees_with_one_that_others_wrote(side: int, empty: int) -> None:
    """Whether a board has one solution, and which, on boards of py-sudoku: some have one, others several."""
    high, wide = BOXES[side]
    found = []
    for seed in range(40):
        theirs = OtherSudoku(wide, high, seed=seed).difficulty((empty + 0.5) / side**2)
        board = tuple(digit or 0 for row in theirs.board for digit in row)
        ours = solutions(board, 2)
        assert board.count(0) == empty
        assert (len(ours) > 1) == theirs.has_multiple_solutions()
        if len(ours) == 1:
            assert ours[0] == tuple(digit for row in theirs.solve().board for digit in row)
        found.append(len(ours))
    assert {1, 2} == set(found)


def test_disguises_reach_every_cell_and_digit() -> None:
    board = np.zeros((1, 1, 6, 6), dtype=np.int64)
    board[0, 0, 0, 0] = 1
    moved = scramble(np.random.default_rng(0), board.repeat(4000, 0), 6)[:, 0]
    assert ((moved > 0).sum((1, 2)) == 1).all()
    assert ((moved > 0).mean(0) > 0.5 / 36).all()
    assert len(np.unique(moved)) == 7


def test_grades() -> None:
    known = grade(parse_board(KNOWN))
    assert (known.givens, known.singles, known.left) == (30, True, 0)
    assert grade(parse_board(SOLVED)).rounds == 0
    hardest = grade(parse_board("8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."))
    assert hardest.name == "hard"
    assert hardest.left > 0
    one = list(parse_board(SOLVED))
    one[40] = 0
    assert (grade(one).rounds, grade(one).name) == (1, "easy")


@given(SIDES, st.integers(0, 10**6))
@settings(max_examples=10)
def test_boards_are_read_as_they_are_written(side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    board = tuple(rng.integers(0, side + 1, side**2).tolist())
    assert parse_board(format_board(board)) == board
    for empty in ".0_":
        assert parse_board("".join(str(d) if d else empty for d in board)) == board


def test_a_known_board_is_solved() -> None:
    assert solve(parse_board(KNOWN)) == parse_board(SOLVED)
    assert format_board(parse_board("1234 3412 2143 432."))[:15] == "1 2 | 3 4\n3 4 |"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12", "a board of 2 cells: there are 16 (4x4), 36 (6x6), 81 (9x9)"),
        ("", "a board of 0 cells"),
        (KNOWN + ".", "a board of 82 cells"),
        (KNOWN.replace("7", "x", 1), "'x' at character 5 is no digit"),
        ("12..\n..3q\n....\n....", "'q' at line 2, character 4"),
        ("12|..\n34|..\n--+--\n..|3q\n..|..", "'q' at line 4, character 5"),
    ],
)
def test_text_that_is_no_board_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^[^\n]*$") as raised:
        parse_board(text)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5...............", "5 in row 1, column 1 is impossible: a 4x4 board has 1 to 4"),
        ("1..1............", "1 is given twice in row 1: in row 1, column 1 and in row 1, column 4"),
        ("2...........2...", "2 is given twice in column 1: in row 1, column 1 and in row 4, column 1"),
        (".3..3...........", "3 is given twice in box 1: in row 1, column 2 and in row 2, column 1"),
        ("12.....3..4.....", "has no solution"),
        ("1234............", "has several solutions: row 3, column 2 can be 1 or 3"),
    ],
)
def test_boards_that_are_no_puzzles_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^[^\n]*$") as raised:
        solve(parse_board(text))
    assert message in str(raised.value)
    if "several" in message:
        check_board(parse_board(text))  # it can be solved all the same


def test_batches() -> None:
    task = Sudoku(SudokuSettings(boards=5))
    batch = task.sample(np.random.default_rng(0), 0, 7)
    assert batch.inputs.shape == (7, 36, 4)
    assert batch.asked.all()
    for inputs, labels in zip(batch.inputs.tolist(), batch.labels.tolist(), strict=True):
        board = [digit for digit, *_ in inputs]
        assert solutions(board, 2) == [tuple(label + 1 for label in labels)]
        assert [place[1:] for place in inputs] == [[c // 6 + 1, c % 6 + 1, grid(6).box[c] + 1] for c in range(36)]
    sets = task.test_sets(20, 3)
    assert sum(len(part.inputs) for name, part in sets.items() if name != "mixed") == 20
    assert encode(np.zeros((2, 16), int), np.ones((2, 16), int))[1].max() == 0


def test_a_written_board_is_read_and_any_of_its_solutions_is_right() -> None:
    task = Sudoku(SudokuSettings(boards=5))
    puzzle = task.read("." * 36)
    assert puzzle.note
    found = solutions([0] * 36, 2)
    assert all(puzzle.right([digit - 1 for digit in one]) for one in found)
    assert not puzzle.right([0] * 36)
    given = task.read(str(found[1][0]) + "." * 35)
    assert not given.right([digit % 6 for digit in found[1]])  # digits renamed: a board, but not with this given
    assert parse_board(puzzle.show([digit - 1 for digit in found[0]])) == found[0]
    assert task.split("1.....\n" * 6 + "\n" + "2.....\n" * 6) == ["1.....\n" * 5 + "1.....", "2.....\n" * 6]
    assert task.split("." * 36 + "\n\n" + "1" + "." * 35) == ["." * 36, "1" + "." * 35]


@pytest.mark.parametrize(
    ("text", "token"),
    [
        (SOLVED, "6x6"),
        ("11" + "." * 34, "twice"),
        ("7" + "." * 35, "impossible"),
        ("x" * 36, "'x'"),
        ("...", "3 cells"),
    ],
)
def test_a_board_that_cannot_be_read_is_refused_by_what_is_wrong(text: str, token: str) -> None:
    with pytest.raises(ValueError, match=token):
        Sudoku(SudokuSettings(boards=5)).read(text if isinstance(text, str) else "".join(map(str, text)))


@pytest.mark.parametrize("settings", [{"side": 5}, {"fewest": 20, "most": 10}, {"steps": [9, 3]}, {"boards": 0}])
def test_settings_that_do_not_work_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        make_task("sudoku", settings)


def test_the_bundled_model_solves_as_many_boards_as_its_card_says() -> None:
    loaded = bundled_reasoner("sudoku")
    batch = loaded.task.test_sets(40, 11)["mixed"]
    shares = curve(predictions(loaded.model, batch, 28), batch)
    assert shares.sequences[-1] >= 0.8
    assert shares.rows[-1] >= 0.95
    assert shares.sequences[0] < 0.2  # it needs its loops
    spec = "kl:tau=1e-3,granularity=sequence,pool=max"
    masked, compact = (
        loaded.model.forward_adaptive(batch.inputs, spec, execution=execution) for execution in ("masked", "compact")
    )
    assert (masked.logits.argmax(-1) == compact.logits.argmax(-1)).double().mean() > 0.99  # in float32
    assert len(set(masked.steps[LOOP][:, 0].tolist())) > 2
