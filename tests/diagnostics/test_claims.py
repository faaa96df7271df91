"""What holds for every claim, whichever paper it is from."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cases import run_command
from diagnoses import UNKNOWN, YES, regions, results, rulings
from haltkit.diagnostics import CLAIMS, Diagnosis, Judgement, claims_table, judge

REPRODUCTION = Path(__file__).parent.parent.parent / "examples" / "reproduction"


def without_figures(judgement: Judgement) -> Judgement:
    return replace(judgement, measured={}, untrained={})


def figures(judgement: Judgement) -> dict[str, float]:
    found: dict[str, float] = {}
    for part, values in (("trained", judgement.measured), ("untrained", judgement.untrained)):
        for name, value in values.items():
            for what, number in (("value", value.value), ("spread", value.spread)):
                found[f"{part}, {name}, {what}"] = math.nan if number is None else number
    return found


def judged(found: dict[str, Any]) -> dict[str, Any]:
    return {judgement.name: judgement for judgement in judge(Diagnosis.from_json(found))}


FOLDERS = [REPRODUCTION, REPRODUCTION / "one-region", *(REPRODUCTION / "reasoners" / n for n in ("chase", "sudoku"))]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_committed_results_are_judged_as_the_committed_table_says(folder: Path) -> None:
    stored = Diagnosis.load(folder / "diagnose.json")
    again = judge(stored)
    assert [without_figures(one) for one in again] == [without_figures(one) for one in stored.claims]
    for one, known in zip(again, stored.claims, strict=True):  # sums round differently on another processor
        assert figures(one) == pytest.approx(figures(known), rel=1e-9, nan_ok=True)
    assert claims_table(replace(stored, claims=again)) == (folder / "claims.md").read_text(encoding="utf-8")


def test_claims_of_several_models_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [REPRODUCTION, *FOLDERS[2:]]
    assert run_command("report", *folders) == 0
    table = capsys.readouterr().out
    assert table == (REPRODUCTION / "claims-by-model.md").read_text(encoding="utf-8")
    rows = [line.replace("\\|", "").split(" | ") for line in table.splitlines() if line.startswith("| P1 ")]
    for folder, cell in zip(folders, rows[0][2:], strict=True):
        judgement = next(one for one in Diagnosis.load(folder / "diagnose.json").claims if one.name == "P1")
        assert cell.startswith(f"**{judgement.ruling}**")
    assert run_command("report", *folders, "--out", tmp_path / "page.html") == 2
    capsys.readouterr()
    assert run_command("report", REPRODUCTION, REPRODUCTION) == 2
    assert "each folder once" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_two_diagnoses_of_one_model_are_told_apart_by_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(REPRODUCTION / "diagnose.json", again)
    assert run_command("report", REPRODUCTION, again, FOLDERS[2]) == 0
    name, other = (Diagnosis.load(folder / "diagnose.json").name for folder in (REPRODUCTION, FOLDERS[2]))
    head = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("|  | claim"))
    assert head.split(" | ")[2:] == [f"{name} ({REPRODUCTION})", f"{name} ({again})", f"{other} |"]


def test_everything_as_the_papers_say_is_reproduced() -> None:
    found = judge(Diagnosis.from_json(results()))
    assert {f.name: (f.ruling, f.reason) for f in found if f.ruling != YES} == {}
    assert not any("untrained model has it" in f.reason for f in found)


def test_nothing_at_hand_tells_nothing_and_says_why() -> None:
    for judgement in judge(Diagnosis()):
        assert judgement.ruling == UNKNOWN, judgement.name
        assert judgement.reason, judgement.name


def test_every_claim_has_a_rule_and_a_name_of_its_own() -> None:
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.rule and claim.quantity for claim in CLAIMS)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_states_that_stopped_being_finite_tell_nothing_in_whatever_region_they_are(order: tuple[str, str]) -> None:
    found = results()
    for part in ("geometry", "limits"):
        whole = regions(found, part)["a"]
        both = {"a": whole, "b": {**whole, "nonfinite": 3}}
        found["models"]["trained"][part]["regions"] = {name: both[name] for name in order}
    for name in ("P1", "P2", "P4", "P5", "P8 net", "M7"):
        judgement = judged(found)[name]
        assert (judgement.ruling, judgement.reason) == (UNKNOWN, "states stopped being finite"), name


def test_numbers_that_are_not_there_are_no_error() -> None:
    found = results()
    found["models"]["trained"]["geometry"]["dlr"] = {"a -> b": {"noise": {"mean": None, "std": None, "median": None}}}
    regions(found, "limits")["a"].update(distinct=None)
    regions(found, "attention")["a"]["successive"][7] = [None] * 4
    for name in ("P8 noise", "M1", "M2"):
        judgement = judged(found)[name]
        assert (judgement.ruling, judgement.reason) == (UNKNOWN, "states stopped being finite"), name
        json.dumps(replace(Diagnosis(), claims=tuple(judged(found).values())).to_json(), allow_nan=False)


def test_what_the_untrained_model_shares_is_said() -> None:
    found = results()
    found["models"]["untrained"] = copy.deepcopy(found["models"]["trained"])
    shared = {name for name, one in judged(found).items() if one.reason.endswith("the untrained model has it too")}
    assert shared == {"P1", "P2", "P4", "P5", "M1", "M2", "M3", "M7"} | {n for n in rulings(found) if n[:3] == "P8 "}
