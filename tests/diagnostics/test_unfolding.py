"""One problem answered step by step: what the page shows is what the model answered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from browser import browser, chromium
from haltkit.diagnostics import Diagnosis, Plan, diagnose
from haltkit.diagnostics.diagnosis import RESULTS_FILE
from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.unfolding import Unfolding
from haltkit.models.checkpoint import BUNDLED
from haltkit.models.reasoner.checkpoint import load_reasoner
from haltkit.models.reasoner.diagnosing import checkpoint_case
from haltkit.models.reasoner.measure import predictions
from haltkit.models.reasoner.subject import sequences_of
from haltkit.models.reasoner.task import Batch
from haltkit.reporting.report import render_page

PLAN = Plan(loops=4, deep_tokens=0, attention_windows=0, policies=())


@pytest.fixture(scope="module")
def shown() -> dict[str, Diagnosis]:
    found = {}
    for name in ("sudoku", "chase"):
        case = checkpoint_case(BUNDLED / name, name=name, tokens=64)
        found[name] = diagnose(case.subject, case.inputs[:1], PLAN, unfolding=case.unfolding)
    return found


@given(st.lists(st.lists(st.sampled_from("ab"), min_size=3, max_size=3), min_size=1, max_size=9))
def test_a_cell_has_settled_after_its_last_change(answers: list[list[str]]) -> None:
    asked = (True, False, True)
    unfolding = Unfolding("", 3, ("?",) * 3, asked, tuple(map(tuple, answers)), ("a",) * 3)
    for cell, settled in enumerate(unfolding.settled):
        course = [step[cell] for step in answers]
        if not asked[cell]:
            assert settled == 0
            continue
        assert len(set(course[settled - 1 :])) == 1
        assert settled == 1 or course[settled - 2] != course[settled - 1]


@pytest.mark.parametrize("name", ["sudoku", "chase"])
def test_the_answers_are_those_of_the_model_at_every_step(name: str, shown: dict[str, Diagnosis]) -> None:
    found = shown[name].trained.unfolding
    loaded = load_reasoner(BUNDLED / name)
    _, samples = sequences_of(loaded.task, 2)  # as many as the case has
    batch = Batch(samples.inputs, samples.labels, samples.needed)
    with torch.no_grad():
        predicted = predictions(loaded.model, batch, loaded.task.full_depth)
    words = [loaded.task.words(one) for one in batch.inputs]
    rows_of = [[r for r in range(len(words[i])) if name == "sudoku" or batch.asked[i, r]] for i in range(2)]
    one = next(i for i in range(2) if tuple(words[i][row] for row in rows_of[i]) == found.cells)
    rows = rows_of[one]
    for cell, row in enumerate(rows):
        if found.asked[cell]:
            expected = [loaded.task.answer(int(step[one, row])) for step in predicted]
            assert [answers[cell] for answers in found.answers] == expected
        else:
            assert {answers[cell] for answers in found.answers} == {found.cells[cell]}
    assert Diagnosis.from_json(shown[name].to_json()).trained.unfolding == found


@pytest.mark.parametrize("field", ["cells", "asked", "right", "answers", "columns"])
def test_a_damaged_problem_is_refused_by_its_place(field: str, shown: dict[str, Diagnosis]) -> None:
    values = shown["sudoku"].to_json()
    unfolding = values["models"]["trained"]["unfolding"]
    unfolding[field] = {"answers": [[]], "columns": 0}.get(field, [])
    with pytest.raises(DiagnosticError, match=r"models\.trained\.unfolding: "):
        Diagnosis.from_json(values)


def test_an_older_diagnosis_has_no_problem_to_show(shown: dict[str, Diagnosis]) -> None:
    values = shown["sudoku"].to_json()
    del values["models"]["trained"]["unfolding"]
    assert Diagnosis.from_json(values).trained.unfolding == Unfolding()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_fills_in_the_board_step_by_step(width: int, shown: dict[str, Diagnosis], tmp_path: Path) -> None:
    chromium()
    found = shown["sudoku"].trained.unfolding
    hostile = replace(found, title="<script>window.harm = 1</script>")
    diagnosis = replace(shown["sudoku"], trained=shown["sudoku"].trained.with_part("unfolding", hostile))
    (tmp_path / "report.html").write_text(render_page(diagnosis), encoding="utf-8")
    with browser(tmp_path / "profile") as page:
        page.open(tmp_path / "report.html", width, 900)
        assert page.problems == []
        assert page.evaluate("window.harm === undefined")
        wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide[0] <= wide[1], "scrolls sideways"
        for k in (1, 3, len(found.answers)):
            page.evaluate(
                f"(() => {{ const s = document.getElementById('unfolded'); s.value = {k}; "
                "s.dispatchEvent(new Event('input')); return 1; })()"
            )
            texts = page.evaluate("[...document.querySelectorAll('#cells button')].map(e => e.textContent)")
            assert texts == list(found.answers[k - 1])
            kinds = page.evaluate("[...document.querySelectorAll('#cells button')].map(e => e.className.split(' ')[0])")
            assert kinds == [
                "given" if not asked else "settled" if k >= settled else "open"
                for asked, settled in zip(found.asked, found.settled, strict=True)
            ]


def test_results_go_through_their_file(shown: dict[str, Diagnosis], tmp_path: Path) -> None:
    shown["chase"].save(tmp_path / RESULTS_FILE)
    assert Diagnosis.load(tmp_path / RESULTS_FILE).trained.unfolding == shown["chase"].trained.unfolding
