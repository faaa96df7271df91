"""The bundled sudoku model on boards that others made: py-sudoku's generator, not the one it was trained with.

    python examples/check_sudoku.py [--boards 128] [--empty 18 21 23 24] [--policy SPEC]

py-sudoku fills a board and empties cells at random; with many empty cells few of its boards have one solution. Board
``i`` is made from seed ``i``, and the first ``--boards`` with exactly one solution are taken, for each number of empty
cells. No board of the model's training is among them, in whichever disguise, and none comes twice.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from sudoku import Sudoku

from haltkit.models.reasoner.checkpoint import bundled_reasoner
from haltkit.models.reasoner.measure import curve, predictions
from haltkit.models.reasoner.task import Batch, from_numpy
from haltkit.models.sudoku.board import grade, solutions
from haltkit.models.sudoku.task import Sudoku as SudokuTask
from haltkit.models.sudoku.task import canonical, encode

SIDE, FULL = 6, 28
AT = (4, 8, 14, FULL)


def made_by_others(seed: int, empty: int) -> tuple[int, ...]:
    """Board ``seed`` of py-sudoku with this many empty cells; it may have several solutions."""
    board = Sudoku(3, 2, seed=seed).difficulty((empty + 0.5) / SIDE**2).board
    return tuple(digit or 0 for row in board for digit in row)


def independent(count: int, empty: int, known: set[bytes]) -> tuple[list[tuple[int, ...]], int]:
    """The first ``count`` boards with one solution that are not known, which then are; and how many were tried."""
    found: list[tuple[int, ...]] = []
    seed = 0
    while len(found) < count:
        board = made_by_others(seed, empty)
        seed += 1
        if len(solutions(board, 2)) == 1 and (form := canonical(board, SIDE)) not in known:
            known.add(form)
            found.append(board)
    return found, seed


def batch_of(boards: list[tuple[int, ...]]) -> Batch:
    """With the solutions as labels."""
    return from_numpy(*encode(np.array(boards), np.array([solutions(board, 1)[0] for board in boards])))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=int, default=128, help="for each number of empty cells")
    parser.add_argument("--empty", type=int, nargs="+", default=[18, 21, 23, 24])
    parser.add_argument("--policy", default="kl:tau=0.0013,granularity=sequence")
    options = parser.parse_args()
    loaded = bundled_reasoner("sudoku")
    assert isinstance(loaded.task, SudokuTask)
    known = {canonical(board.flatten().tolist(), SIDE) for board in loaded.task.base_boards[:, 0]}
    print(f"boards solved (cells right) after so many steps of {FULL}, and under {options.policy}", flush=True)
    for empty in options.empty:
        boards, tried = independent(options.boards, empty, known)
        batch = batch_of(boards)
        shares = curve(predictions(loaded.model, batch, FULL), batch)
        out = loaded.model.forward_adaptive(batch.inputs, options.policy, max_loops=FULL, execution="compact")
        halted = curve(out.logits.argmax(-1)[None], batch)
        steps = float(out.steps["loop"].double().mean())
        grades = [grade(board).name for board in boards]
        kinds = ", ".join(f"{grades.count(name)} {name}" for name in ("easy", "medium", "hard"))
        solved = "  ".join(f"{k}: {shares.sequences[k - 1]:.3f} ({shares.rows[k - 1]:.4f})" for k in AT)
        distinct = len({canonical(solutions(board, 1)[0], SIDE) for board in boards})
        print(f"{empty} empty cells: {len(boards)} boards of {tried} made ({kinds}; {distinct} different solutions)")
        print(f"  {solved}  policy: {halted.sequences[0]:.3f} ({halted.rows[0]:.4f}), {steps:.2f} steps", flush=True)


if __name__ == "__main__":
    main()
