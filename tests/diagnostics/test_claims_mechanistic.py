"""Each rule of [M] on a diagnosis made up so that the answer is known."""

from __future__ import annotations

from typing import Any

import pytest

from diagnoses import (
    CONTROL,
    NO,
    UNKNOWN,
    YES,
    Spoil,
    attention,
    cell_of,
    layer_counts,
    limits,
    region,
    regions,
    results,
    rulings,
    two_layers,
)
from haltkit.diagnostics import Diagnosis, judge
from haltkit.diagnostics.claims import mechanistic
from haltkit.diagnostics.stages import resample


def one_layer_is_no_other_kind(found: dict[str, Any]) -> None:
    for cell in found["grid"]:
        cell.update(cell_of("fixed point" if cell["layers"] == 1 else "cyclic fixed points"))


def one_cell_type(found: dict[str, Any]) -> None:
    for cell in found["grid"]:
        cell.update(cell_of("fixed point"))


def seeds_that_disagree(found: dict[str, Any]) -> None:
    """The cells differ as before by what most seeds say, but one seed says otherwise each time."""
    for cell in found["grid"]:
        cell["seeds"] = [*cell["seeds"][:2], {"limit": "unknown"}]


def one_pair_in_many(found: dict[str, Any]) -> None:
    one_cell_type(found)
    found["grid"][0].update(cell_of("slider"))


def ouros_norm_settles(found: dict[str, Any]) -> None:
    for cell in found["grid"]:
        if cell["norm"] == "branch+state" and cell["injection"] == "every_step":
            cell.update(cell_of("cyclic fixed points"))


def branch_alone_wanders(found: dict[str, Any]) -> None:
    for cell in found["grid"]:
        if cell["norm"] == "branch":
            cell.update(cell_of("slider"))


def passes(*alike: bool) -> Spoil:
    """Let these passes repeat the control's stages, and the others not."""
    profiles = [resample(CONTROL, 4) if yes else [0.5, 0.1, 0.6, 0.9] for yes in alike]
    return lambda found: regions(found, "attention")["a"]["profiles"].update(concentration=profiles)


def seen(tokens: float | None) -> Spoil:
    return lambda found: found["about"].update(tokens_seen=tokens)


CASES: list[tuple[str, Spoil, str]] = [
    ("M1", two_layers, UNKNOWN),
    ("M1", lambda f: regions(f, "limits")["a"]["layer_limits"].update({"layer 2": layer_counts(80)}), NO),
    ("M1", lambda f: regions(f, "limits")["a"].update(distinct=0.9), NO),
    ("M1", lambda f: regions(f).update(b=region()), UNKNOWN),  # two regions are not that paper's setting
    ("M1", lambda f: f["models"]["trained"].pop("limits"), UNKNOWN),
    *((name, lambda f: f["models"]["trained"].pop("limits"), YES) for name in ("M2", "M3")),  # no long run is needed
    ("M2", lambda f: regions(f, "attention")["a"].update(successive=[[1.0] * 4] * 15), NO),
    ("M2", two_layers, UNKNOWN),
    ("M3", lambda f: regions(f, "attention")["a"].update(attention([0.5, 0.1, 0.6, 0.9])), NO),
    ("M3", lambda f: f.update(control=None), UNKNOWN),
    ("M3", passes(False, *[True] * 15), NO),  # a loop that converged to it in one pass repeats one thing
    ("M3", passes(True, *[False] * 15), NO),
    ("M3", passes(True, *[False] * 7, *[True] * 8), YES),
    ("M3", lambda f: f["control"].update(tokens_seen=1_900_000), UNKNOWN),
    *((name, seen(1.9e6), UNKNOWN) for name in ("M1", "M2", "M3")),
    *((name, seen(None), UNKNOWN) for name in ("M1", "M2", "M3")),
    ("M4", one_cell_type, NO),
    ("M4", one_layer_is_no_other_kind, NO),
    ("M4", seeds_that_disagree, NO),
    ("M4", one_pair_in_many, NO),
    *((name, lambda f: f["grid"].pop(), UNKNOWN) for name in ("M4", "M5", "M6")),  # cut short
    ("M5", one_cell_type, NO),
    ("M5", ouros_norm_settles, NO),
    ("M5", branch_alone_wanders, YES),  # not a placement of that paper
    ("M6", seeds_that_disagree, NO),
    ("M6", one_cell_type, NO),
    ("M7", lambda f: regions(f, "limits").update(a=limits(ratio=0.4)), NO),
]


@pytest.mark.parametrize(("name", "spoil", "ruling"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_each_rule_can_say_otherwise(name: str, spoil: Spoil, ruling: str) -> None:
    found = results()
    spoil(found)
    assert rulings(found)[name] == ruling


def test_every_claim_has_a_case_against_it() -> None:
    assert {name for name, _, ruling in CASES if ruling == NO} == {claim.name for claim in mechanistic.CLAIMS}


def test_the_stages_of_the_untrained_model_stand_beside() -> None:
    stages = next(one for one in judge(Diagnosis.from_json(results())) if one.name == "M3")
    assert stages.untrained.keys() == stages.measured.keys()
    assert stages.untrained["first pass"].value < stages.measured["first pass"].value


def test_how_states_settle_stands_beside_how_attention_does() -> None:
    settles = next(one for one in judge(Diagnosis.from_json(results())) if one.name == "M2")
    assert settles.measured["a"].value == pytest.approx(0.5**7)
    assert settles.measured["a, states"].value == pytest.approx(0.4**7)
    assert settles.untrained["a, states"].value == pytest.approx(0.4**7)
