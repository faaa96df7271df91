"""``haltkit solve``: the queue's answers are those of one problem alone, and bad problems are refused before any work."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from cases import run_command
from haltkit.models.reasoner.checkpoint import bundled_reasoner


@pytest.fixture
def boards() -> list[str]:
    task = bundled_reasoner("sudoku").task
    return ["".join(task.words(board)) for board in task.test_sets(6, seed=3)["mixed"].inputs]


def test_many_boards_get_what_each_gets_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, boards: list[str]
) -> None:
    path = tmp_path / "boards.txt"
    path.write_text("\n".join(boards) + "\n", encoding="utf-8")
    assert run_command("solve", "sudoku", path, "--slots", 2, "--json", "-") == 0
    together = json.loads(capsys.readouterr().out)
    alone = []
    for board in boards:
        assert run_command("solve", "sudoku", board, "--json", "-") == 0
        alone += json.loads(capsys.readouterr().out)
    assert together == alone
    assert len({one["steps"] for one in alone}) > 1


def test_watching_changes_nothing(capsys: pytest.CaptureFixture[str], boards: list[str]) -> None:
    assert run_command("solve", "sudoku", boards[0]) == 0
    plain = capsys.readouterr().out
    assert run_command("solve", "sudoku", boards[0], "--watch") == 0
    assert capsys.readouterr().out.strip().endswith(plain.strip())


def test_a_forest_on_standard_input_is_chased_row_by_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chain = " ".join(f"n{i}>n{i + 1}" for i in range(9))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{chain} n9 n0? n9?\n"))
    assert run_command("solve", "chase", "-", "--json", "-") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["right"]
    assert [line.split("  ")[0] for line in found["answer"].splitlines()] == ["n0: n9", "n9: n9"]
    assert found["steps"][0] > found["steps"][9]


@pytest.mark.parametrize(
    ("args", "token"),
    [
        (("sudoku", "11" + "." * 34), "twice"),
        (("sudoku", "." * 81), "6x6"),
        (("sudoku", "abc"), "'a'"),
        (("sudoku", "boards.txt"), "no file"),
        (("sudoku", "/dev/zero"), "not a regular file"),
        (("sudoku", "." * 36, "--json", "/proc/x.json"), "/proc/x.json"),
        (("sudoku", ""), "empty"),
        (("chase", "a>b b>a"), "cycle"),
        (("chase", "a>b"), "'b'"),
        (("text", "." * 36), "reasoners"),
        (("sudoku", "." * 36, "--slots", 0), "--slots"),
        (("sudoku", "." * 36, "--policy", "norm:tau=1,granularity=batch"), "granularity"),
        (("sudoku", "." * 36, "--json", "/no/such/folder/x.json"), "no folder"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], args: tuple[Any, ...], token: str) -> None:
    assert run_command("solve", *args) == 2
    said = capsys.readouterr()
    assert token in said.err
    assert said.out == ""
    # A board with several solutions says so first.
    assert len([line for line in said.err.splitlines() if "several solutions" not in line]) == 1
