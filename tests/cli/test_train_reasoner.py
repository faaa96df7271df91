"""``haltkit train`` on a reasoner's config: a run that can be stopped, resumed and used, and what is refused."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from cases import run_command
from haltkit.models.reasoner import train as training
from haltkit.models.reasoner.checkpoint import load_reasoner

CONFIG = """\
task: chase
settings: {names: 20, nodes: 10, first_nodes: 5, longest: 16, depths: [1, 2, 4], rows: 64, least_batch: 4}
model: {d_model: 16, n_head: 2}
train: {max_steps: 8, log_every: 2, save_every: 4, examine_every: 2, level_steps: 2, mastered: 0.0, precision: float32}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def test_a_run_that_is_stopped_by_a_signal_goes_on_to_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, config: Path
) -> None:
    assert run_command("train", config, "--out", tmp_path / "whole") == 0
    real, count = training.take_step, 0

    def interrupted(run: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run)

    monkeypatch.setattr(training, "take_step", interrupted)
    assert run_command("train", config, "--out", tmp_path / "parts") == 143
    assert "--resume" in capsys.readouterr().out
    assert run_command("train", "--resume", "--out", tmp_path / "parts") == 0
    weights = [(tmp_path / run / "final" / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert weights[0] == weights[1]
    assert load_reasoner(tmp_path / "parts" / "final").trained["steps"] == 8


@pytest.mark.parametrize(("full_from", "said"), [(1, "no checkpoint yet"), (5, "complete checkpoint is checkpoint")])
def test_a_full_disk_is_one_line_and_loses_no_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    config: Path,
    full_from: int,
    said: str,
) -> None:
    """RLIMIT_FSIZE stands in for the full disk: no file grows beyond 4 kB from an optimizer step on."""
    assert run_command("train", config, "--out", tmp_path / "whole") == 0
    run, real, count = tmp_path / "run", training.take_step, 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(of: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == full_from:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, before[1]))
        return real(of)

    capsys.readouterr()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(training, "take_step", filling)
            assert run_command("train", config, "--out", run) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert run_command("train", config, "--out", run, "--auto-resume") == 0
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (tmp_path / "whole", run)]
    assert weights[0] == weights[1]


def test_a_dry_run_writes_nothing(tmp_path: Path, config: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert run_command("train", config, "--out", tmp_path / "run", "--dry-run") == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, config: Path) -> None:
    assert run_command("train", config, "--out", tmp_path / "run") == 0
    (tmp_path / "odd.yaml").write_text("task: riddles\n", encoding="utf-8")
    capsys.readouterr()
    for args, token in (
        ((config, "--out", tmp_path / "run"), "a run already"),
        ((config, "--out", tmp_path / "new", "--resume"), "no checkpoint"),
        ((config, "--out", tmp_path / "new", "--data", tmp_path), "--data"),
        ((config, "--out", tmp_path / "new", "--init-from", tmp_path), "--init-from"),
        ((config, "--out", tmp_path / "odd.yaml"), "not a folder"),
        (("nosuch", "--out", tmp_path / "new"), "chase"),
        ((tmp_path / "odd.yaml", "--out", tmp_path / "new"), "riddles"),
    ):
        assert run_command("train", *args) == 2, args
        said = capsys.readouterr()
        assert token in said.err
        assert len(said.err.splitlines()) == 1
        assert said.out == ""
        assert not (tmp_path / "new").exists()
