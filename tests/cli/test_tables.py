"""Tables in terminals of any width: nothing is cut, and what is left out is named."""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from haltkit.cli.conclusions import print_conclusion
from haltkit.cli.grid import NARROWEST, Column, print_grid, print_wrapped
from haltkit.cli.oracles import describe_headroom, print_headroom, print_regret
from haltkit.cli.tables import print_claims, print_comparison
from haltkit.cli.terminal import tell
from haltkit.comparison import Comparison
from haltkit.comparison.possible import Possible
from haltkit.diagnostics import Diagnosis
from haltkit.headroom import Headroom

REPRODUCTION = Path(__file__).parents[2] / "examples" / "reproduction"
WIDTHS = (40, 60, 80, 110, 160)


def console_of(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=False)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def words(text: str) -> list[str]:
    return re.findall(r"[^\s,;]+", text)


cells = st.text("abc1.", min_size=1, max_size=8)


@st.composite
def grids(draw: st.DrawFn) -> list[Column]:
    rows = draw(st.integers(1, 4))
    columns = []
    for i in range(draw(st.integers(1, 6))):
        values = [f"{draw(cells)}-{i}-{row}" for row in range(rows)]
        spare = f"spare{i}" if i and draw(st.booleans()) else ""
        shorter = [value[-4:] for value in values]
        instead = Column(f"h{i}", shorter) if spare and draw(st.booleans()) else None
        columns.append(Column(f"h{i}", values, spare=spare, instead=instead, left=draw(st.booleans())))
    return columns


@given(grids(), st.integers(NARROWEST, 90))
def test_a_grid_shows_every_cell_or_names_what_it_leaves_out(columns: list[Column], width: int) -> None:
    console, sparing = console_of(width), [column.spare for column in columns if column.spare]
    print_grid(console, columns, title="a title", sparing=sparing)
    text = printed(console)
    told = " ".join(text.split()).partition("not shown at this width, but by --json:")
    missing = words(told[2])
    assert missing == sparing[: len(missing)]
    for column in columns:
        shown = column if column.spare not in missing or not column.spare else column.instead
        for cell in () if shown is None else (*shown.cells, *([shown.heading] if column is not columns[0] else [])):
            assert cell in words(text)
    assert all(len(line) <= width for line in text.splitlines())


def test_a_grid_that_has_room_leaves_nothing_out() -> None:
    console = console_of(20)
    print_grid(console, [Column("a", ["12345678"], left=True), Column("b", ["1234567890"], spare="b")], sparing=["b"])
    assert printed(console) == "a                  b\n12345678  1234567890\n"


@given(st.lists(st.text("ab", min_size=1, max_size=NARROWEST - 6), max_size=30), st.integers(NARROWEST, 60))
def test_wrapped_text_keeps_its_words_and_its_width(given: list[str], width: int) -> None:
    console = console_of(width)
    print_wrapped(console, "    " + " ".join(given))
    assert words(printed(console)) == given
    assert all(len(line) <= width for line in printed(console).splitlines())


def test_a_headroom_that_rounds_to_zero_has_no_sign() -> None:
    depths = Headroom("loop", "stable", 1000, 4, 0, (999, 1), (0.999, 1.0), (), None, 1.001, None)
    assert depths.headroom(0.99) < 0
    assert "headroom 0%" in " ".join(describe_headroom("loop", Possible(depths, {}), 0.99))


@pytest.mark.parametrize("terminal", [True, False])
def test_prose_is_wrapped_in_a_terminal_and_whole_in_a_pipe(terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    said = "  certified: " + "norm:tau=1 " * 9
    console = Console(file=io.StringIO(), width=40, force_terminal=terminal)
    tell(console, said)
    if terminal:
        assert words(printed(console)) == words(said)
        assert max(map(len, printed(console).splitlines())) <= 40
    else:
        assert capsys.readouterr().out == said + "\n"


@pytest.fixture(scope="module")
def result() -> Comparison:
    return Comparison.from_json(json.loads((REPRODUCTION / "compare.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_comparison_is_not_cut(result: Comparison, width: int) -> None:
    console = console_of(width)
    print_comparison(console, result)
    text = printed(console)
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for row in result.rows:
        (line,) = [at for at, one in enumerate(text.splitlines()) if one.split("  ")[0].rstrip() == row.label]
        below = " ".join(text.splitlines()[line : line + 6])
        assert {f"{row.ms:.3f}", f"{row.speedup:.2f}x", f"{row.delta:+.4f}"} <= set(words(below))
    assert ("not shown" in text) == (width in (80, 110))


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_said_of_a_comparison_and_a_diagnosis_is_not_cut(result: Comparison, width: int) -> None:
    console = console_of(width)
    print_headroom(console, result)
    print_conclusion(console, result)
    print_regret(console, result)
    print_claims(console, Diagnosis.load(REPRODUCTION / "diagnose.json"))
    text = printed(console)
    assert "…" not in text
    whole = [line for line in text.splitlines() if "ready to paste" in line or len(line.split()) == 1]  # a spec
    assert all(len(line) <= width for line in text.splitlines() if line not in whole)


@pytest.mark.parametrize("width", [60, 80, 110, 160])
def test_the_conclusion_fits_a_screen_and_has_every_policy_at_the_middle_level(result: Comparison, width: int) -> None:
    console = console_of(width)
    print_conclusion(console, result)
    lines, concluded = printed(console).splitlines(), result.conclusion()
    assert len(lines) <= 24
    assert lines[1].startswith("Conclusion: ")
    for finding in concluded.findings:
        if (finding.kind, finding.level) == ("loss", concluded.level):
            assert finding.best is not None
            (shown,) = [line for line in lines if line.split()[:1] == [finding.policy]]
            assert f"tau={finding.best.tau:g}: {finding.best.ms:.3f} {finding.against_fixed}" in shown


def test_a_wide_conclusion_has_every_finding_and_a_missing_setting_is_a_dash(result: Comparison) -> None:
    rows = tuple(
        replace(row, delta=1.0, agreement=0.1) if row.policy == "kl" else row for row in result.rows
    )  # good for no quality
    console = console_of(160)
    print_conclusion(console, replace(result, rows=rows))
    lines = printed(console).splitlines()
    (missing,) = [line for line in lines if line.startswith("kl ")]
    assert missing.split() == ["kl", *["-"] * 5]
    assert any("-: none is" in line for line in lines)
    for policy in ("accel", "norm"):
        (shown,) = [line for line in lines if line.startswith(f"{policy} ")]
        found = [finding for finding in result.conclusion().findings if finding.policy == policy]
        assert re.findall(r"\d\.\d{3}", shown) == [f"{one.best.ms:.3f}" for one in found if one.best is not None]


def test_one_repeat_is_said_to_give_no_error_of_the_time(result: Comparison) -> None:
    def told(repeats: int) -> str:
        console = console_of(160)
        rows = tuple(replace(row, ms_repeats=row.ms_repeats[:repeats]) for row in result.rows)
        print_comparison(console, replace(result, rows=rows))
        print_conclusion(console, replace(result, rows=rows))
        return printed(console)

    assert len(result.rows[0].ms_repeats) > 1
    assert "One repeat gives no error" not in told(2)
    one = told(1)
    assert "One repeat gives no error" in one
    assert "no clear difference" not in one
    assert all(f"{row.ms:.3f} ±?" in one for row in result.rows)
    assert not any(math.isnan(row.ms) for row in result.rows)
