"""A diagnosis as a value: to JSON and back, damaged files, and the run that makes one, without the command line."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diagnoses import compared, results, row
from haltkit.attachment import Loop
from haltkit.diagnostics import (
    Diagnosis,
    DiagnosticError,
    Plan,
    Progress,
    diagnose,
    judge,
    measure_snapshot,
    survey_layers_once,
)
from haltkit.diagnostics.compared import read_comparison
from haltkit.diagnostics.diagnosis import FORMAT
from haltkit.diagnostics.judgement import Judgement
from haltkit.diagnostics.results import Cell, Control, Snapshot, Survey
from haltkit.diagnostics.unfolding import Unfolding
from haltkit.reporting.folder import write_diagnosis
from haltkit.reporting.report import _data, render_page
from haltkit.subject import Subject

pytestmark = pytest.mark.slow

REPRODUCTION = Path(__file__).parent.parent.parent / "examples" / "reproduction"
TEXT = st.text(max_size=4)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def unfoldings(draw: st.DrawFn) -> Unfolding:
    """Lists of one entry per cell."""
    cells = draw(st.integers(0, 2))
    each = st.tuples(*[TEXT] * cells)
    asked = draw(st.tuples(*[st.booleans()] * cells))
    answers = draw(st.lists(each, max_size=2).map(tuple))
    return Unfolding(draw(TEXT), draw(st.integers(1, 9)), draw(each), asked, answers, draw(each))


UNFOLDINGS = unfoldings()


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Any value of a type of the schema."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return PLAIN
    if origin in (Union, types.UnionType):
        return st.none() | values_of(next(one for one in inner if one is not type(None)))
    if origin is tuple:
        return st.lists(values_of(inner[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(TEXT, values_of(inner[1]), max_size=2)
    if origin is Literal:
        return st.sampled_from(inner)
    if kind is Unfolding:
        return UNFOLDINGS
    if dataclasses.is_dataclass(kind):
        return st.deferred(lambda: st.builds(kind, **{name: values_of(k) for name, k in get_type_hints(kind).items()}))
    return {
        str: TEXT,
        bool: st.booleans(),
        int: st.integers(-(2**53), 2**53),
        float: st.floats(allow_nan=False, allow_infinity=False),
    }[kind]


ABOUT = st.fixed_dictionaries(
    {}, optional={"model": TEXT, "text": TEXT, "tokens_seen": st.none() | st.integers(0, 2**53), "more": PLAIN}
)
ROWS = st.builds(row, TEXT, st.floats(0, 1), st.floats(0, 9), st.floats(0.1, 9))
DIAGNOSES = st.builds(
    Diagnosis,
    about=ABOUT,
    trained=values_of(Survey),
    untrained=values_of(Survey),
    snapshots=values_of(tuple[Snapshot, ...]),
    control=values_of(Control | None),
    grid=values_of(tuple[Cell, ...]),
    comparison=st.none() | st.lists(ROWS, min_size=1, max_size=2).map(lambda rows: read_comparison(compared(rows))),
    claims=values_of(tuple[Judgement, ...]),
    partial=st.booleans(),
)


@given(DIAGNOSES)
@settings(max_examples=60)
def test_json_and_back_is_the_same_diagnosis(diagnosis: Diagnosis) -> None:
    text = json.dumps(diagnosis.to_json(), allow_nan=False)
    assert Diagnosis.from_json(json.loads(text)) == diagnosis


@pytest.mark.parametrize("folder", [REPRODUCTION, REPRODUCTION / "one-region"], ids=["bundled", "one-region"])
def test_results_of_the_format_before_lose_nothing(folder: Path) -> None:
    before = json.loads((folder / "diagnose.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(Diagnosis.load(folder / "diagnose.json").to_json()))
    assert Diagnosis.from_json(now) == Diagnosis.from_json(before)
    assert now["format"] == FORMAT
    for key in ("about", "models", "control", "partial"):
        assert now[key] == before[key], key
    assert (now["snapshots"], now["grid"]) == (before["checkpoints"], before["grid"] or [])
    for mine, theirs in zip(*((one["comparison"] or {"rows": []})["rows"] for one in (now, before)), strict=True):
        assert [mine[key] for key in ("spec", "loss", "delta", "ms")] == [
            theirs[key] for key in ("spec", "ce", "delta_ce", "ms_per_token")
        ]
    assert [one["ruling"] for one in now["claims"]] == [one["verdict"] for one in before["claims"]]


def test_results_of_another_version_are_refused_by_name() -> None:
    for value, words in (
        ({"format": "haltkit-diagnose-1"}, "'haltkit-diagnose-1'"),
        ({"format": "haltkit-diagnose-4"}, "'haltkit-diagnose-4'"),
        ({}, "without a format"),
        ([], "without a format"),
    ):
        with pytest.raises(DiagnosticError, match=words):
            Diagnosis.from_json(value)


def test_a_fault_is_named_by_its_place() -> None:
    spoils: list[tuple[Callable[[dict[str, Any]], object], str]] = [
        (
            lambda f: f["models"]["trained"]["geometry"]["regions"]["a"].update(step_norm_mean=[1, "2"]),
            r"step_norm.mean\[1\]",
        ),
        (
            lambda f: f["models"]["trained"]["geometry"]["regions"]["a"].update(step_norm_std=3),
            r"step_norm.std must be a list",
        ),
        (lambda f: f["models"]["trained"].update(geometry=[]), "models.trained.geometry must be an object"),
        (lambda f: f["models"].update(other={}), "models.other"),
        (lambda f: f["snapshots"][0].pop("loops"), r"snapshots\[0\].loops is missing"),
        (lambda f: f["comparison"]["rows"][1].pop("ms"), "comparison: .*'ms'"),
        (lambda f: f["comparison"].update(levels=3), "comparison: "),
        (
            lambda f: f["comparison"]["rows"][1]["steps"].update(a="2"),
            r"comparison: rows\[1\].steps.a must be a number",
        ),
        (lambda f: f["grid"][0].update(layers=1.5), r"grid\[0\].layers must be a whole number"),
        (lambda f: f["about"].update(tokens_seen="many"), "tokens_seen must be a number"),
        (lambda f: f["about"].update(tokens_seen=10**400), "tokens_seen must be a number"),
        (lambda f: f.update(claims=[{"ruling": "maybe"}]), "ruling must be one of|name is missing"),
        (lambda f: f.update(partial=1), "partial must be true or false"),
    ]
    for spoil, words in spoils:
        found = results()
        spoil(found)
        with pytest.raises(DiagnosticError, match=words):
            Diagnosis.from_json(found)


HOSTILE = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        1.5,
        1e308,
        10**400,
        "",
        "<!--<script>",
        [],
        {},
        [[]],
        {"a": []},
        [None],
        "__proto__",
        {"rows": 3},
    ]
)


@given(st.data())
@settings(max_examples=150)
def test_a_damaged_file_is_refused_or_shown_and_never_an_error_of_another_kind(data: st.DataObject) -> None:
    found = copy.deepcopy(MADE_UP)
    for _ in range(data.draw(st.integers(1, 3))):
        at: Any = found
        for _ in range(12):
            if not isinstance(at, (dict, list)) or not at:
                break
            key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
            if data.draw(st.booleans()) or not isinstance(at[key], (dict, list)):
                at[key] = data.draw(HOSTILE)
                break
            at = at[key]
    with contextlib.suppress(DiagnosticError):
        json.dumps(_data(Diagnosis.from_json(found)), allow_nan=False)


MADE_UP = results()


# --- diagnose()


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(20, 8)
        self.core = nn.Linear(8, 8)
        self.core.weight.data.mul_(0.5)

    def forward(self, tokens: Tensor, loops: int = 4) -> Tensor:
        x = self.embed(tokens)
        for _ in range(loops):
            x = self.core(x)
        return x


TOKENS = torch.arange(24).view(2, 12) % 20
PLAN = Plan(loops=12, deep_tokens=12, deep_loops=16, policies=("norm:tau=0.1",))
CONTROL = Control(("a", "b", "c"), {"concentration": (0.1, 0.2, 0.3)}, 7)


def subject(name: str = "halves") -> Subject:
    model = Halves().eval()
    return Subject.of_modules(model, model, {"core": "core"}, name=name)


def cells(count: int, stop: bool = False) -> Any:
    for i in range(count):
        yield Cell("pre", "never", i + 1, "slider", {"cosine": 0.0, "distance": 0.0})
    if stop:
        raise KeyboardInterrupt


def test_a_library_user_diagnoses_with_every_control(tmp_path: Path) -> None:
    seen: list[Progress] = []
    parts: list[Diagnosis] = []
    measured = measure_snapshot(subject(), TOKENS, 12, tokens_seen=9)
    found = diagnose(
        subject(),
        TOKENS,
        PLAN,
        untrained=subject("fresh"),
        snapshots=[measured, lambda: measure_snapshot(subject(), TOKENS, 12, tokens_seen=3, steps=2)],
        control=lambda: CONTROL,
        grid=cells(2),
        comparison=read_comparison(compared([row("fixed", 1.0, 5.0, 2.0)])),
        about={"tokens_seen": 10},
        on_progress=seen.append,
        on_part=parts.append,
    )
    assert not found.partial
    assert found.about == {"model": "halves", "tokens_seen": 10}
    assert list(found.models) == ["trained", "untrained"]
    assert found.trained.geometry.regions["core"].mean("step_norm")[11] > 0
    assert found.trained.tokens.steps.keys() == {"norm:tau=0.1"}
    assert not found.untrained.tokens.text  # policies are looked at in the model itself
    assert [one.tokens_seen for one in found.snapshots] == [3, 9]  # by age
    assert (found.control, len(found.grid)) == (CONTROL, 2)
    assert found.claims == judge(found)
    assert all(part.partial for part in parts)
    assert replace(parts[-1], partial=False, claims=found.claims) == found
    windows = [
        (one.done, one.total) for one in seen if one.what.endswith("trained") and one.what[:4] in ("geom", "limi")
    ]
    assert windows[-1] == (6, PLAN.ticks(TOKENS) * 2)
    assert [(one.what, one.done, one.total) for one in seen[-2:]] == [("untrained blocks", k, None) for k in (1, 2)]
    written = write_diagnosis(found, tmp_path, "svg")
    assert Diagnosis.load(tmp_path / "diagnose.json") == found
    assert {path.suffix for path in written} == {".svg"}


class TwoLoops(nn.Module):
    """Somebody else's model: two loops, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(20, 8)
        self.core, self.refine = nn.Linear(8, 8), nn.Linear(8, 8)
        for layer in (self.core, self.refine):
            layer.weight.data.mul_(0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(16):
            x = self.core(x)
        for _ in range(16):
            x = self.refine(x)
        return x


def test_every_loop_of_a_foreign_model_is_diagnosed() -> None:
    model = TwoLoops().eval()
    loops = {name: Loop(body=(name,)) for name in ("core", "refine")}
    found = diagnose(Subject.attached(model, loops=loops), TOKENS, PLAN)
    assert not found.partial
    for regions in (found.trained.geometry.regions, found.trained.limits.regions, found.trained.tokens.curves):
        assert list(regions) == ["core", "refine"]
    assert list(found.trained.geometry.dlr) == ["core -> refine"]
    assert found.trained.tokens.steps["norm:tau=0.1"].keys() == {"core", "refine"}
    x = model.embed(TOKENS)
    norms = []
    for _ in range(12):
        x, before = model.core(x), x
        norms.append(float((x - before).detach().norm(dim=-1).mean()))
    assert found.trained.geometry.regions["core"].mean("step_norm") == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("where", ["snapshots", "control", "grid", "saving"])
def test_ctrl_c_keeps_everything_that_is_done(where: str) -> None:
    def stop(*_: object) -> Any:
        raise KeyboardInterrupt

    more: dict[str, Any] = {
        "snapshots": {"snapshots": [measure_snapshot(subject(), TOKENS, 12, tokens_seen=9), stop]},
        "control": {"control": stop},
        "grid": {"control": CONTROL, "grid": cells(2, stop=True)},
        "saving": {"on_part": stop},
    }[where]
    found = diagnose(subject(), TOKENS, PLAN, **more)
    assert found.partial
    assert found.trained.geometry.regions
    assert (len(found.snapshots), len(found.grid)) == {"snapshots": (1, 0), "grid": (0, 2)}.get(where, (0, 0))
    assert bool(found.trained.paths.segments) == (where != "saving")
    assert found.claims == judge(found)


def test_what_goes_into_json_is_checked_before_anything_is_run() -> None:
    def run(*_: object) -> Any:
        pytest.fail("something was run")

    untouched = Subject.of_modules(Halves(), run, {"core": "core"})
    with pytest.raises(DiagnosticError, match="plain values"):
        diagnose(untouched, TOKENS, PLAN, about={"where": untouched})
    with pytest.raises(DiagnosticError, match="no windows"):
        diagnose(untouched, TOKENS.flatten(), PLAN)


def test_the_control_is_measured_once_per_layer() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)).eval()
    with pytest.raises(DiagnosticError, match="cannot be seen"):
        survey_layers_once(model, ["0.linear1"], lambda x: model(x), torch.randn(2, 5, 8))


def test_a_page_needs_something_to_show() -> None:
    with pytest.raises(DiagnosticError, match="nothing to show"):
        render_page(Diagnosis())
