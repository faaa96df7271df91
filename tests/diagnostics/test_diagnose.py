"""``haltkit diagnose`` and ``haltkit report``: on checkpoints, run folders and a model that is not ours; and the page."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from browser import browser, chromium
from cases import run_command
from haltkit.diagnostics import Diagnosis, DiagnosticError, Snapshot, Survey
from haltkit.diagnostics.results import Cell, Geometry, Seed
from haltkit.diagnostics.schema import encode
from haltkit.files import FileError
from haltkit.locks import hold
from haltkit.models.checkpoint import BUNDLED, build_model, load_checkpoint
from haltkit.models.gpt import diagnosing
from haltkit.models.gpt import grid as cyclic
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.files import save_checkpoint
from haltkit.models.gpt.subject import text_windows
from haltkit.models.text.tokenizer import TOKENIZER_FILE
from haltkit.reporting.figures import FIGURES, draw_figures
from haltkit.reporting.report import render_page
from haltkit.subject import Subject

pytestmark = pytest.mark.slow

QUICK = ("--tokens", "64", "--loops", "6", "--deep-tokens", "32", "--deep-loops", "16")
PARTS = {"geometry", "limits", "attention", "paths", "tokens"}


def results_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "diagnose.json").read_text(encoding="utf-8"))
    return found


def write_checkpoint(folder: Path, config: ModelConfig, tokens: int, tokenizer: Path) -> None:
    folder.mkdir(parents=True)
    torch.manual_seed(tokens)
    save_checkpoint(folder, build_model(config), config, dtype=torch.float32, trained={"tokens": tokens})
    shutil.copy(tokenizer / TOKENIZER_FILE, folder / TOKENIZER_FILE)


@pytest.fixture(scope="module")
def run_folder(data_folder: Path, tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four snapshots, one of which has its statistics written already, as training leaves them."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    for tokens in (100, 200, 400, 800):
        write_checkpoint(run / "snapshots" / f"tokens-{tokens:010d}", tiny_config, tokens, data_folder)
    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sample.txt"
    path.write_text("Document 3 says that 3 and 4 make 7.\n" * 14, encoding="utf-8")
    return path


def old_row(spec: str, tau: float | None, delta: float, ms: float) -> dict[str, Any]:
    """A row as comparisons had them before they had a version."""
    return {
        "policy": spec.partition(":")[0],
        "spec": spec,
        "tau": tau,
        "ce": 5.0,
        "ppl": 148.4,
        "delta_ce": delta,
        "delta_ce_se": None,
        "agreement": 0.99,
        "agreement_se": None,
        "kl_to_full": 0.001,
        "steps": {"2": 4.0, "3-4": 3.0},
        "ms_per_token": ms,
        "ms_spread": [ms, ms],
        "ms_repeats": [ms],
        "speedup": 1.5,
        "outcomes": {},
        "causal": True,
    }


ROWS = [
    old_row("fixed:steps=8", None, 0.0, 4.0),
    old_row("accel:tau=0.1", 0.1, 0.01, 2.0),
    old_row("accel:tau=1.0", 1.0, 0.2, 1.0),
]
COMPARISON = {"rows": ROWS, "tokens": 64, "sequences": 2, "timed_tokens": 32}


@pytest.fixture(scope="module")
def diagnosed(run_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    (out / "compare.json").write_text(json.dumps(COMPARISON), encoding="utf-8")
    assert run_command("diagnose", run_folder, "--out", out, "--text", text, *QUICK) == 0
    assert run_command("report", out) == 0
    return out


def test_a_run_folder_gives_figures_numbers_claims_and_a_page(diagnosed: Path) -> None:
    found = results_of(diagnosed)
    assert found["partial"] is False
    assert found["models"]["trained"].keys() == PARTS
    assert found["models"]["untrained"].keys() == PARTS - {"tokens"}
    assert [one["tokens_seen"] for one in found["snapshots"]] == [100, 200, 400, 800]
    assert found["about"]["tokens_seen"] == 800  # no 'final': the newest snapshot
    geometry = found["models"]["trained"]["geometry"]
    assert geometry["tokens"] == 64
    assert len(geometry["regions"]["3-4"]["step_norm_mean"]) == 6
    assert {f.stem for f in diagnosed.glob("*.png")} == set(FIGURES) - {"grid"} | {"figure4-policies"}
    assert all(f.stat().st_size > 10_000 for f in diagnosed.glob("*.png"))
    claims = (diagnosed / "claims.md").read_text(encoding="utf-8")
    assert claims.count("\n| ") == len(found["claims"]) + 1
    assert 3e6 < (diagnosed / "report.html").stat().st_size < 10e6


def test_geometry_agrees_with_the_statistics_of_snapshots(run_folder: Path, text: Path, diagnosed: Path) -> None:
    loaded = load_checkpoint(run_folder / "snapshots" / "tokens-0000000800")
    reduced = diagnosing.loop_statistics(loaded.model, text_windows(loaded, text, 64)[:, :-1], 6)
    geometry = results_of(diagnosed)["models"]["trained"]["geometry"]
    for name, region in geometry["regions"].items():
        for key in ("step_norm_mean", "cosine_std", "cosine_of_means", "distance_to_last_mean"):
            expected = [v for v in reduced["regions"][name][key] if v is not None]
            assert [v for v in region[key] if v is not None] == pytest.approx(expected, rel=2e-3, abs=1e-6), key
    for boundary, conventions in geometry["dlr"].items():
        for name, numbers in conventions.items():
            assert numbers["mean"] == pytest.approx(reduced["dlr"][boundary][name]["mean"], rel=1e-3)
            assert numbers["median"] == pytest.approx(reduced["dlr"][boundary][name]["median"], rel=0.03)


def test_snapshots_may_be_their_statistics_alone(run_folder: Path, tmp_path: Path) -> None:
    measured = {"tokens_seen": 7, "loops": 4, "regions": {}, "dlr": {}}
    (tmp_path / "a.json").write_text(json.dumps(measured), encoding="utf-8")
    (tmp_path / "untrained.json").write_text(json.dumps({**measured, "tokens_seen": 0}), encoding="utf-8")
    (tmp_path / "release.json").write_text(json.dumps({**measured, "tokens_seen": 9}), encoding="utf-8")
    refuse = lambda checkpoint: pytest.fail("nothing needs measuring")  # noqa: E731
    (found,) = diagnosing.find_snapshots(tmp_path, refuse, 4)
    assert encode(found) == measured
    with pytest.raises(DiagnosticError, match=r"measured at 4 loops and cannot stand beside 5: give --loops 4"):
        diagnosing.find_snapshots(tmp_path, refuse, 5)
    (tmp_path / "b.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(FileError, match=r"b.json' must hold a mapping"):
        diagnosing.find_snapshots(tmp_path, refuse, 4)
    with pytest.raises(DiagnosticError, match="neither snapshots"):
        diagnosing.find_snapshots(run_folder, refuse, 4)


def test_snapshots_are_measured_at_the_depth_and_on_the_tokens_asked_for(diagnosed: Path, run_folder: Path) -> None:
    for one in results_of(diagnosed)["snapshots"]:
        assert (one["loops"], one["tokens"]) == (6, 64)
        assert all(len(region["step_norm_mean"]) == 6 for region in one["regions"].values())


def test_statistics_that_training_wrote_at_another_depth_are_measured_again(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokens-0000000100"
    shutil.copytree(run_folder / "snapshots" / folder.name, folder)
    stored = {"tokens_seen": 100, "loops": 32, "regions": {}, "dlr": {}}
    (folder / "statistics.json").write_text(json.dumps(stored), encoding="utf-8")
    windows = lambda loaded: torch.arange(16)[None]  # noqa: E731
    assert [encode(one) for one in diagnosing.find_snapshots(tmp_path, windows, 32)] == [stored]
    (measure,) = diagnosing.find_snapshots(tmp_path, windows, 4)
    assert not isinstance(measure, Snapshot)
    measured = measure()
    assert (measured.loops, measured.tokens_seen) == (4, 100)
    assert measured.regions.keys() == {"2", "3-4"}


def test_the_bundled_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ("--tokens", "256", "--loops", "4", "--deep-tokens", "0", "--policies", "norm-rel:tau=0.1")
    assert run_command("diagnose", "--out", tmp_path, *quick, "--figures", "svg") == 0
    shown = capsys.readouterr().out
    assert "Claims, judged on bundled" in shown
    assert "haltkit report" in shown
    assert run_command("report", tmp_path) == 0
    found = results_of(tmp_path)
    assert found["models"]["trained"].keys() == PARTS - {"limits"}
    steps = found["models"]["trained"]["tokens"]["steps"]["norm-rel:tau=0.1"]
    assert steps.keys() == {"4", "5-6", "7"}
    assert all(1 <= s <= 4 for taken in steps.values() for s in taken)
    assert found["models"]["trained"]["tokens"]["how"] == "native"
    assert (tmp_path / "figure3-steps.svg").is_file()


def test_a_model_that_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    (tmp_path / "albert_case.py").write_text(
        "import torch\n"
        "from transformers import AlbertConfig, AlbertModel\n"
        "from haltkit.diagnostics import Case\n"
        "from haltkit.subject import Subject\n"
        "def make():\n"
        "    config = AlbertConfig(vocab_size=50, embedding_size=16, hidden_size=32, num_hidden_layers=20,\n"
        "        num_attention_heads=4, intermediate_size=64)\n"
        "    model = AlbertModel(config).eval()\n"
        "    layer = 'encoder.albert_layer_groups.0.albert_layers.0'\n"
        "    return Subject.attached(model, name='albert', samples=torch.arange(24).view(2, 1, 12),\n"
        "        layers={'loop': [layer]})\n"
        "def wrong():\n    return 3\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run_command("diagnose", "albert_case:make", "--out", "out", "--loops", "8", "--deep-loops", "16") == 0
    assert run_command("report", "out") == 0
    found = results_of(tmp_path / "out")
    model = found["models"]["trained"]
    name = "loop"
    assert found["about"]["model"] == "albert"
    assert len(model["geometry"]["regions"][name]["cosine_mean"]) == 8  # it runs 20 by itself
    assert sum(model["limits"]["regions"][name]["limits"]["cosine"].values()) == 24
    assert model["attention"]["unseen"] == []
    assert model["tokens"]["how"] == "replayed"
    assert list(model["tokens"]["left_out"]) == ["kl:tau=1e-3"]
    assert "albert" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert run_command("diagnose", "albert_case:wrong", "--out", "out") == 2


@pytest.mark.parametrize("last", [2, 7])
def test_ctrl_c_keeps_what_is_done(
    last: int,
    run_folder: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At the second window of the first survey; and at the first of the untrained model's long run."""
    plain, calls = Subject.record, 0

    def interrupted(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:  # two windows for each model's geometry, then two for each one's long run
            raise KeyboardInterrupt
        return plain(*args, **keywords)

    monkeypatch.setattr(Subject, "record", interrupted)
    quick = ("--tokens", "64", "--loops", "4", "--deep-tokens", "64", "--deep-loops", "16")
    assert run_command("diagnose", run_folder, "--out", tmp_path, "--text", text, *quick) == 130
    assert calls == last  # nothing was begun after it
    assert "marked partial" in capsys.readouterr().out
    found = results_of(tmp_path)
    assert found["partial"] is True
    models = found["models"]
    if last == 2:
        assert models["trained"]["geometry"]["partial"] is True
        assert models["trained"]["geometry"]["tokens"] == 32
        assert list(models) == ["trained"]
    else:
        assert models["trained"]["geometry"]["partial"] is False
        assert models["trained"]["limits"]["tokens"] == 64
        assert models["untrained"]["limits"]["partial"] is True
    assert (tmp_path / "figure3-steps.png").is_file()
    assert '"partial":true' in render_page(Diagnosis.from_json(found))
    assert "(partial: interrupted)" in (tmp_path / "claims.md").read_text(encoding="utf-8")


def test_ctrl_c_keeps_the_snapshots_and_cells_that_are_done(
    run_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(function: Any, after: int) -> Any:
        calls = iter(range(after))

        def call_or_stop(*args: Any, **keywords: Any) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return function(*args, **keywords)

        return call_or_stop

    quick = ("--tokens", "32", "--loops", "4", "--deep-tokens", "0", "--grid", "--text", text)
    with monkeypatch.context() as patch:
        patch.setattr(diagnosing, "measure_snapshot", stopped(diagnosing.measure_snapshot, 2))
        assert run_command("diagnose", run_folder, "--out", tmp_path / "a", *quick) == 130
    assert [one["tokens_seen"] for one in results_of(tmp_path / "a")["snapshots"]] == [100, 200]
    alone = run_folder / "snapshots" / "tokens-0000000800"
    with monkeypatch.context() as patch:
        patch.setattr(cyclic, "_one_seed", stopped(cyclic._one_seed, 7))
        assert run_command("diagnose", alone, "--out", tmp_path / "b", *quick) == 130
    found = results_of(tmp_path / "b")
    assert [cell["layers"] for cell in found["grid"]] == [1, 2]
    assert next(c for c in found["claims"] if c["name"] == "M4")["reason"].startswith("the grid")
    assert (tmp_path / "b" / "grid.png").is_file()


def test_bad_input_is_one_line_and_exit_code_2(
    run_folder: Path,
    data_folder: Path,
    tiny_config: ModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loops_off = tmp_path / "control"
    write_checkpoint(loops_off, replace(tiny_config, regions=()), 5, data_folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "diagnose.json").write_text("{}", encoding="utf-8")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "compare.json").write_text("[]", encoding="utf-8")
    half = {**COMPARISON, "rows": [*ROWS[:2], {"policy": "accel", "tau": 1.0}]}
    files = {
        "half/compare.json": json.dumps(half),
        "deep/compare.json": "[" * 100_000,
        "other/diagnose.json": '{"format": "haltkit-diagnose-1", "models": {}}',
        "cut/diagnose.json": '{"format": "haltkit-diagnose-3", "models": {"trai',
        "nan/diagnose.json": '{"format": "haltkit-diagnose-3", "about": {"tokens_seen": NaN}}',
        "edited/diagnose.json": json.dumps({"format": "haltkit-diagnose-3", "models": {"trained": {"paths": 3}}}),
        "deepest/diagnose.json": '{"format": "haltkit-diagnose-3", "about": ' + '{"a":' * 99 + "1" + "}" * 100,
        "nested/a.json": "[" * 100_000,
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    out = ("--out", tmp_path / "out")
    stored = tmp_path / "stored"
    stored.mkdir()
    (stored / "a.json").write_text('{"tokens_seen": 7, "loops": 32, "regions": {}, "dlr": {}}', encoding="utf-8")
    (tmp_path / "foreign_case.py").write_text(
        "import torch\n"
        "from haltkit.diagnostics import Case\n"
        "from haltkit.subject import Subject\n"
        "def make():\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(2, 2))\n"
        "    subject = Subject.of_modules(model, model, {'core': '0'})\n"
        "    return Case(subject, torch.zeros(2, 8, dtype=torch.long))\n"
        "def flat():\n    return Case(make().subject, torch.zeros(8, dtype=torch.long))\n"
        "def odd():\n    case = make()\n    case.about['where'] = case\n    return case\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("haltkit.diagnostics.diagnose", lambda *_, **__: pytest.fail("something was run"))
    cases = [
        (("diagnose", run_folder, *out, "--control", run_folder), "has looped regions"),
        (("diagnose", run_folder, *out, "--control", tmp_path / "empty"), "neither a checkpoint"),
        (("diagnose", run_folder, *out, "--snapshots", tmp_path / "empty"), "neither snapshots"),
        (("diagnose", run_folder, *out, "--snapshots", stored, "--loops", "6"), "give --loops 32"),
        (("diagnose", run_folder, *out, "--snapshots", tmp_path), "without looped regions"),
        (("diagnose", "foreign_case:make", *out, "--control", loops_off), "is for checkpoints"),
        (("diagnose", "foreign_case:flat", *out), "no windows"),
        (("diagnose", "foreign_case:odd", *out), "give plain values"),
        (("diagnose", "foreign_case:make", *out, "--snapshots", stored), "is for checkpoints"),
        (("diagnose", loops_off, *out), "without looped regions"),
        (("diagnose", tmp_path / "empty", *out), "neither a checkpoint"),
        (("diagnose", run_folder, *out, "--loops", "1"), "greater than or equal to 2"),
        (("diagnose", run_folder, *out, "--figures", "gif"), "allowed are png"),
        (("diagnose", run_folder, *out, "--policies", "norm"), "tau"),
        (("diagnose", "no_such_module:make", *out), "No module named"),
        (("diagnose", run_folder, *out, "--text", tmp_path / "none.txt"), "no text file"),
        (("diagnose", run_folder, "--out", tmp_path / "odd"), "at its top level"),
        (("diagnose", run_folder, "--out", tmp_path / "half"), "KeyError('spec'). Remove it"),
        (("diagnose", run_folder, "--out", tmp_path / "deep"), "nested too deeply"),
        (("diagnose", run_folder, *out, "--snapshots", tmp_path / "nested"), "a.json' is nested too deeply"),
        (("report", tmp_path / "other"), "of the format 'haltkit-diagnose-1'"),
        (("report", tmp_path / "cut"), "is not JSON"),
        (("report", tmp_path / "nan"), "NaN"),
        (("report", tmp_path / "edited"), "models.trained.paths must be an object, not 3"),
        (("report", tmp_path / "deepest"), "about is nested more than 64 levels deep"),
        (("diagnose", run_folder, "--out", loops_off / "config.json"), "is not a folder"),
        (("report", tmp_path / "empty"), "make it with 'haltkit diagnose"),
        (("report", tmp_path / "broken"), "run it again"),
    ]
    for args, words in cases:
        assert run_command(*args) == 2, args
        said = capsys.readouterr().err.strip()
        assert words in said, args
        assert "\n" not in said
    assert not (tmp_path / "out").exists()
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*.*")} >= files.keys()
    assert all((tmp_path / name).read_text(encoding="utf-8") == content for name, content in files.items())
    assert [p.name for p in (tmp_path / "half").iterdir()] == ["compare.json"]  # no partial output
    profile = diagnosing.control_profile(loops_off, lambda loaded: torch.arange(8)[None])
    assert len(profile.profiles["mixing"]) == tiny_config.n_layer
    with pytest.raises(DiagnosticError, match="nothing to show"):
        render_page(Diagnosis())


def test_two_diagnoses_do_not_write_in_one_folder(
    run_folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hold(tmp_path, "haltkit diagnose") as locked:
        if not locked:
            pytest.skip("this file system has no locks")
        assert run_command("diagnose", run_folder, "--out", tmp_path, "--text", text, *QUICK) == 2
        assert str(tmp_path) in capsys.readouterr().err
        assert not (tmp_path / "diagnose.json").exists()


def test_a_one_region_model_with_its_control_is_judged_in_the_cyclic_papers_setting(
    data_folder: Path,
    tiny_config: ModelConfig,
    text: Path,
    tmp_path: Path,
) -> None:
    seen = 3_000_000  # so it says
    write_checkpoint(tmp_path / "one", replace(tiny_config, regions=("2-5",)), seen, data_folder)
    write_checkpoint(tmp_path / "off", replace(tiny_config, regions=()), seen, data_folder)
    args = ("diagnose", tmp_path / "one", "--control", tmp_path / "off", "--out", tmp_path / "out", "--text", text)
    assert run_command(*args, *QUICK, "--figures", "svg") == 0
    found = results_of(tmp_path / "out")
    judged = {one["name"]: one for one in found["claims"]}
    assert judged["M2"]["ruling"] == "reproduced"  # an untrained contraction settles, attention and all
    assert judged["M2"]["reason"] == "the untrained model has it too"
    for name in ("M1", "M3"):
        assert judged[name]["ruling"] != "cannot tell at this scale", judged[name]["reason"]
    assert judged["P8 noise"]["ruling"] == "cannot tell at this scale"  # one region has no boundary
    stages = found["models"]["trained"]["stages"]["2-5"]
    assert stages.keys() == {"concentration", "sink_rate", "mixing", "compression"}
    assert len(stages["mixing"]) == 16
    assert stages["mixing"][0].keys() == {"correlation", "shuffled_mean", "shuffled_high"}
    assert f"first pass: {stages['concentration'][0]['correlation']:.3g}" in (tmp_path / "out" / "claims.md").read_text(
        encoding="utf-8"
    )
    assert (tmp_path / "out" / "cycles.svg").is_file()
    assert "layer 4, untrained" in (tmp_path / "out" / "layers.svg").read_text(encoding="utf-8")  # a label, as comment
    assert run_command("report", tmp_path / "out") == 0


def test_figures_need_only_what_they_show(tmp_path: Path) -> None:
    assert draw_figures(Diagnosis(), tmp_path) == []
    begun = Survey(Geometry(dlr={"a -> b": {}}))  # interrupted before the first window
    assert draw_figures(Diagnosis(trained=begun), tmp_path) == []
    kinds = (("pre", 1), ("pre", 2), ("branch", 1))  # two layers of branch were never run
    cells = [Cell(n, "never", k, "slider", {"cosine": 1.0, "distance": 0.0}, 2.0, 0.5) for n, k in kinds]
    assert [p.name for p in draw_figures(Diagnosis(grid=tuple(cells)), tmp_path, "pdf")] == ["grid.pdf"]


# --- the grid of untrained blocks


def test_pre_norm_is_what_its_name_says() -> None:
    torch.manual_seed(0)
    model = cyclic.untrained_block("pre", "never", 1)
    block = next(iter(model.regions.values())).body.blocks[0]
    x = torch.randn(1, 5, 64)
    middle = x + block.attn(block.n1(x))
    torch.testing.assert_close(block(x), middle + block.mlp(block.n3(middle)))


def test_the_grid_has_every_cell_and_counts_every_token_of_every_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cyclic, "NORMS", ("pre", "branch+state"))
    monkeypatch.setattr(cyclic, "LAYERS", (1, 2))
    grid = cyclic.Grid(seeds=2, loops=16, sequences=1)
    cells = list(grid)
    assert len(cells) == len(grid) == 2 * 3 * 2
    for cell in cells:
        for one in cell.seeds:
            assert sum(one.cosine.values()) == sum(one.distance.values()) == 24
            assert (one.distinct is None) == (cell.layers == 1)
    assert cells[0] == next(iter(grid))  # drawn from the seeds alone
    # Every layer's share is small, and stays: several points at a cosine near 1, where a bound on it would see one.
    small = next(c for c in cells if (c.norm, c.injection, c.layers) == ("pre", "every_step", 2))
    assert small.least_cosine is not None
    assert small.least_cosine > 0.99
    assert small.limit == "cyclic fixed points"
    injected = [cell for cell in cells if cell.injection == "every_step"]
    assert all(cell.fixed == {"cosine": 1, "distance": 1} for cell in injected)


def test_a_state_that_grows_is_no_fixed_point_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    for axis, value in (("NORMS", "branch"), ("INJECTIONS", "never"), ("LAYERS", 4)):
        monkeypatch.setattr(cyclic, axis, (value,))
    (cell,) = cyclic.Grid(seeds=1, sequences=1)
    assert cell.limit == "fixed in direction, norm grows"
    assert cell.fixed == {"cosine": 1, "distance": 0}
    assert cell.growth is not None
    assert 1.8 < cell.growth < 2.2  # each recurrence adds the same again


def test_a_tie_of_seeds_is_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = iter(["slider", "orbit", "slider", "orbit", "slider", "orbit", "orbit", "slider", "orbit"])
    plain = cyclic._one_seed

    def one_seed(*args: Any) -> Seed:
        return replace(plain(*args), limit=next(kinds))

    monkeypatch.setattr(cyclic, "_one_seed", one_seed)
    for axis, values in (("NORMS", ("pre",)), ("INJECTIONS", ("never",)), ("LAYERS", (1, 2))):
        monkeypatch.setattr(cyclic, axis, values)
    assert [c.limit for c in cyclic.Grid(seeds=2, loops=16, sequences=1)] == ["mixed", "mixed"]
    assert next(iter(cyclic.Grid(seeds=3, loops=16, sequences=1))).limit == "orbit"


# --- the page, in a browser


def test_the_page_works_in_a_browser_wide_and_narrow(diagnosed: Path, tmp_path: Path) -> None:
    chromium()
    with browser(tmp_path / "profile") as page:
        for width in (1280, 390):
            page.open(diagnosed / "report.html", width, 900)
            assert page.problems == []
            wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
            assert wide[0] <= wide[1], "scrolls sideways"
            drawn = page.evaluate(
                "[...document.querySelectorAll('.plot')].map(e => [e.id, !!e.querySelector('.main-svg')])"
            )
            assert {name for name, there in drawn if there} == {
                "tradeoff",
                "curve",
                "paths",
                "step_norm-2",
                "step_norm-3-4",
                "cosine-2",
                "cosine-3-4",
            }

        # Hover over a token shows its curve and its steps.
        steps = results_of(diagnosed)["models"]["trained"]["tokens"]["steps"]["norm-rel:tau=0.01"]["2"]
        assert page.evaluate("document.querySelectorAll('#tokens span').length") == len(steps)
        before = page.evaluate("document.getElementById('curve').data[0].y[3]")
        page.hover("#tokens span:nth-child(6)")
        assert page.evaluate("document.getElementById('token').textContent").startswith("Position 5,")
        assert f": {steps[5]} steps in region 2" in page.evaluate("document.getElementById('token').textContent")
        assert page.evaluate("document.getElementById('curve').data[0].y[3]") != before
        assert page.evaluate("[...document.querySelectorAll('#tokens span')].map(s => +s.dataset.steps)") == steps

        # Another region repaints the text.
        page.evaluate(
            "(() => { const r = document.getElementById('region'); r.value = '3-4'; r.dispatchEvent(new Event('change')); })()"
        )
        other = results_of(diagnosed)["models"]["trained"]["tokens"]["steps"]["norm-rel:tau=0.01"]["3-4"]
        assert page.evaluate("[...document.querySelectorAll('#tokens span')].map(s => +s.dataset.steps)") == other

        # The slider, by keyboard, takes steps away from the paths.
        points = "document.getElementById('paths').data.find(t => t.mode === 'markers').x.length"
        assert page.evaluate("document.getElementById('step-value').textContent") == "6"
        count = page.evaluate(points)
        page.evaluate("document.getElementById('step').focus()")
        page.press("ArrowLeft", 37)
        assert page.evaluate("document.getElementById('step-value').textContent") == "5"
        assert page.evaluate(points) == count * 6 / 7

        # Hover over a point of the trade-off plot tells its setting.
        page.hover("#tradeoff .scatterlayer .trace:nth-child(2) .points path:nth-of-type(1)")
        deadline = time.monotonic() + 5
        while "accel:tau=" not in (
            hovered := page.evaluate("document.querySelector('#tradeoff .hoverlayer').textContent")
        ):
            assert time.monotonic() < deadline, hovered
            time.sleep(0.1)
        page.evaluate("document.getElementById('close').click()")
        assert page.evaluate("document.getElementById('tradeoff').layout.yaxis.range") == [-0.02, 0.02]
        assert page.problems == []


HOSTILE = "<!--<script>document.body.dataset.hit=1</script><img src=x onerror=document.body.dataset.hit=1>&lt;b&gt;"


def test_nothing_in_hostile_results_becomes_html_or_runs(diagnosed: Path, tmp_path: Path) -> None:
    found = results_of(diagnosed)
    found["about"] |= {"model": HOSTILE, "text": HOSTILE}
    trained = found["models"]["trained"]
    for region in (HOSTILE, "__proto__", "constructor"):
        for one in found["models"].values():
            one["geometry"]["regions"][region] = one["geometry"]["regions"]["2"]
        trained["tokens"]["curves"][region] = trained["tokens"]["curves"]["2"]
    trained["tokens"]["steps"] = {
        policy: {**steps, **dict.fromkeys((HOSTILE, "__proto__", "constructor"), steps["2"])}
        for policy, steps in trained["tokens"]["steps"].items()
    }
    trained["tokens"]["steps"][HOSTILE] = next(iter(trained["tokens"]["steps"].values()))
    trained["tokens"]["text"][:3] = [HOSTILE, "</script><script>document.body.dataset.hit=1</script>", "\u202e\u2028"]
    trained["paths"]["text"] = [HOSTILE] * len(trained["paths"]["text"])
    for segment in trained["paths"]["segments"]:
        segment["name"] += HOSTILE
    for row in found["comparison"]["rows"][1:]:
        row |= {"policy": HOSTILE, "spec": HOSTILE, "steps": {HOSTILE: 3.0}}
    for row in found["comparison"]["rows"]:
        row["unit"] = HOSTILE
    found["comparison"] |= {"metric": HOSTILE, "item": HOSTILE, "levels": [0.1, 0.2, 0.3]}
    for claim in found["claims"]:
        claim |= {"name": HOSTILE, "paper": HOSTILE, "text": HOSTILE, "reason": HOSTILE, "rule": f'"{HOSTILE}'}
        claim["measured"] = {HOSTILE: {"value": None, "spread": None}}
    page_file = tmp_path / "report.html"
    page_file.write_text(render_page(Diagnosis.from_json(found)), encoding="utf-8")
    chromium()
    with browser(tmp_path / "profile") as page:
        page.open(page_file, 1280, 900)
        assert page.problems == []
        assert page.evaluate("document.body.dataset.hit || 'no'") == "no"
        assert page.evaluate("[...document.querySelectorAll('.note:not([hidden])')].map(e => e.textContent)") == []
        assert page.evaluate("document.querySelectorAll('img, iframe, a').length") == 0
        assert page.evaluate("document.querySelectorAll('script').length") == 3
        # It is all there, as text.
        assert page.evaluate("document.title") == f"Diagnosis of {HOSTILE}"
        assert page.evaluate("document.querySelector('#tokens span').textContent") == HOSTILE
        assert page.evaluate("document.querySelector('#claims td').textContent") == HOSTILE
        assert page.evaluate("document.querySelector('#claims td:nth-child(2)').title").endswith(HOSTILE)
        assert page.evaluate("document.querySelector('#tradeoff .legendtext:last-of-type').textContent") in (
            "fixed depth",
            HOSTILE,
        )
        assert HOSTILE in page.evaluate("[...document.querySelectorAll('.legendtext')].map(e => e.textContent)")
        assert page.evaluate("document.getElementById('band').textContent") == f"within 0.2 {HOSTILE}"
        options = page.evaluate("[...document.querySelectorAll('#region option')].map(e => e.value)")
        assert options == ["2", "3-4", HOSTILE, "__proto__", "constructor"]
        for region in options:
            page.evaluate(
                f"(() => {{ const r = document.getElementById('region'); r.value = {json.dumps(region)};"
                " r.dispatchEvent(new Event('change')); })()"
            )
            assert f"in region {region}." in page.evaluate("document.getElementById('token').textContent")
        page.hover("#tradeoff .scatterlayer .trace:nth-child(2) .points path:nth-of-type(1)")
        deadline = time.monotonic() + 5
        while HOSTILE not in (hovered := page.evaluate("document.querySelector('#tradeoff .hoverlayer').textContent")):
            assert time.monotonic() < deadline, hovered
            time.sleep(0.1)
        assert page.problems == []


def test_a_part_that_contradicts_itself_is_named_and_the_others_are_shown(diagnosed: Path, tmp_path: Path) -> None:
    found = results_of(diagnosed)
    found["models"]["trained"]["tokens"]["text"] = ["one"]  # there are steps of 32
    page_file = tmp_path / "report.html"
    page_file.write_text(render_page(Diagnosis.from_json(found)), encoding="utf-8")
    chromium()
    with browser(tmp_path / "profile") as page:
        page.open(page_file, 1280, 900)
        notes = page.evaluate("[...document.querySelectorAll('.note:not([hidden])')].map(e => e.textContent)")
        assert len(notes) == 1
        assert notes[0].startswith('The part "tokens" cannot be shown')
        assert page.evaluate("document.querySelectorAll('#claims tr').length") == len(found["claims"])
        assert page.problems == []


def test_bundled_is_a_checkpoint_and_finding_one_prefers_final(run_folder: Path, tmp_path: Path) -> None:
    assert diagnosing.find_target(BUNDLED) == diagnosing.Target(BUNDLED, None)
    assert diagnosing.find_target(run_folder).checkpoint.name == "tokens-0000000800"
    copied = tmp_path / "run"
    shutil.copytree(run_folder, copied)
    shutil.copytree(run_folder / "snapshots" / "tokens-0000000100", copied / "final")
    assert diagnosing.find_target(copied).checkpoint.name == "final"


def test_a_reasoner_is_diagnosed_beside_an_untrained_one(tmp_path: Path) -> None:
    options = ("--tokens", 128, "--loops", 4, "--deep-tokens", 0, "--out", tmp_path / "out")
    assert run_command("diagnose", "chase", *options) == 0
    found = Diagnosis.load(tmp_path / "out" / "diagnose.json")
    assert list(found.models) == ["trained", "untrained"]
    assert found.trained.geometry != found.untrained.geometry
    words = set(found.trained.tokens.text)
    assert len(words) == 64
    assert all(">" in word or "?" in word for word in words)
