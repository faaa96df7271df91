"""Every example runs as its docstring says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from haltkit.models.training.config import load_config
from haltkit.models.training.loop import train

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
ARGUMENTS = {
    "bench_attach.py": ["--repeats", "1"],
    "bench_effect.py": ["--sequences", "4", "--steps", "6", "--deepest", "5-6=3;7=2"],
    "bench_specs.py": ["--windows", "2", "--steps", "4", "--repeats", "1"],
    "bench_batches.py": ["--batches", "2", "--tokens", "8", "--decoded", "2", "--repeats", "1"],
    "bench_recorded_calibration.py": ["--models", "sudoku", "--units", "8", "--draws", "8", "--splits", "3"],
    "gallery.py": ["own loop, for", "own loop, input added at each step"],
    "bench_attach_rows.py": ["--width", "32", "--tokens", "4", "--latents", "1", "--boards", "70", "--repeats", "1"],
    "bench_wavefront.py": ["--tokens", "8", "--prompts", "1", "--chosen", "1", "--repeats", "1"],
    "bench_refill.py": ["--prompts", "3", "--slots", "2", "--longest", "4", "--repeats", "1"],
    "bench_generate.py": ["--width", "32", "--tokens", "2", "--repeats", "1"],
    "bench_training.py": ["--config", "tiny", "--eager", "--rounds", "1"],
    "bench_queue.py": ["--items", "9", "--slots", "4", "--width", "32", "--repeats", "1"],
    "bench_kinds.py": ["--forests", "2", "--repeats", "1", "--least", "0.9"],
    "bench_sudoku.py": ["--boards", "9", "--part", "5", "--slots", "4", "--repeats", "1"],
    "check_sudoku.py": ["--boards", "2", "--empty", "18"],
    "bench_calibration.py": ["--splits", "2"],
    "bench_early_risk.py": [
        "--sequences",
        "96",
        "--fresh",
        "8",
        "--batch",
        "8",
        "--full-depth",
        "5",
        "--epsilon",
        "0.4",
    ],
    "bench_rows.py": ["--rows", "64", "--steps", "2", "--repeats", "1"],
    "bench_policy_cost.py": ["--rows", "16", "--width", "64", "--vocabulary", "100", "--seconds", "0.1"],
}


# Their heads say what they need: the source of a model that is on no registry, the results of make compare. The last
# one has a test of its own.
BY_HAND = {"check_huginn.py", "check_ouro.py", "draw_overview.py", "run_notebook.py"}


@pytest.mark.parametrize(
    "path", sorted(p for p in EXAMPLES.glob("*.py") if p.name not in BY_HAND), ids=lambda path: path.name
)
def test_example(path: Path) -> None:
    dependency = "ignore:`torch.jit.script` is deprecated:DeprecationWarning"  # of tiny-recursive-model, on import
    command = [sys.executable, "-W", "error", "-W", dependency, str(path), *ARGUMENTS.get(path.name, [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2


def test_the_tour_runs_and_its_pictures_are_stored(tmp_path: Path) -> None:
    """Jupyter is not needed: a notebook is JSON, whose code cells run in order in one namespace."""
    stored = EXAMPLES / "tour.ipynb"
    assert stored.stat().st_size < 300_000
    fresh = Path(shutil.copy(stored, tmp_path))
    command = [sys.executable, "-W", "error", str(EXAMPLES / "run_notebook.py"), str(fresh)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, now = (json.loads(path.read_text(encoding="utf-8")) for path in (stored, fresh))
    assert {**before, "cells": []} == {**now, "cells": []}
    assert (now["nbformat"], now["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in now["cells"]}) == len(now["cells"])
    pictures = 0
    for old, new in zip(before["cells"], now["cells"], strict=True):
        assert {**old, "outputs": []} == {**new, "outputs": []}  # numbers of execution too
        if new["cell_type"] == "code":
            assert (
                [one["output_type"] for one in old["outputs"]] == [one["output_type"] for one in new["outputs"]] != []
            )
            pictures += sum("image/png" in one.get("data", {}) for one in old["outputs"])
    assert pictures >= 3


def test_what_run_folders_know_is_collected(data_folder: Path, tmp_path: Path) -> None:
    config = load_config("tiny")
    config = replace(config, data=replace(config.data, path=str(data_folder)))
    config = replace(config, train=replace(config.train, max_steps=2, snapshot_first_tokens=1))
    off = replace(config, model=replace(config.model, regions=()))
    assert train(config, tmp_path / "run")
    assert train(off, tmp_path / "control")
    script = EXAMPLES / "reproduction" / "collect.py"
    folders = ["run", "--control", "control", "--release", "run", "--out", "out"]
    command = [sys.executable, "-W", "error", str(script), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    rows = json.loads((tmp_path / "out" / "training.json").read_text(encoding="utf-8"))["rows"]
    runs = [row["run"] for row in rows]
    assert runs == ["looped"] * runs.count("looped") + ["release (annealed)"] + ["control"] * runs.count("control") + [
        "control (annealed)"
    ]
    assert min(runs.count("looped"), runs.count("control")) >= 1
    last = [row for row in rows if row["run"] == "looped"][-1]
    snapshot = tmp_path / "out" / "snapshots" / f"tokens-{last['tokens']:010d}.json"
    # The same weights, measured when they were written and now: bf16 as committed against float32 as trained.
    written, measured = (json.loads(p.read_text()) for p in (snapshot, snapshot.with_name("release.json")))
    assert written["tokens_seen"] == measured["tokens_seen"] == last["tokens"]
    for name, region in written["regions"].items():
        assert measured["regions"][name]["step_norm_mean"][:3] == pytest.approx(region["step_norm_mean"][:3], rel=0.02)
