"""What a run computes in and what it needs: settled, said and recorded before the first step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import events, run_command, with_train
from haltkit.locks import FolderInUse, hold
from haltkit.models.checkpoint import build_model
from haltkit.models.config import ConfigError
from haltkit.models.gpt.cost import saved_bytes
from haltkit.models.gpt.draws import TrainingNoise
from haltkit.models.training import memory, precision
from haltkit.models.training.config import RunConfig, load_config
from haltkit.models.training.distributed import Objective, Processes
from haltkit.models.training.forecast import Stage, forecast
from haltkit.models.training.loop import train
from haltkit.models.training.memory import activation_bytes, check_memory, parameter_count
from haltkit.models.training.precision import bf16_slowdown, choose_precision
from haltkit.models.training.start import read_run_config
from haltkit.models.training.step import autocast, head_loss

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture
def config(data_folder: Path) -> RunConfig:
    loaded = load_config("tiny")
    loaded = replace(loaded, data=replace(loaded.data, path=str(data_folder)))
    return with_train(loaded, max_steps=2, checkpoint_every=1, eval_batches=1, precision="auto")


def pretend(monkeypatch: pytest.MonkeyPatch, hardware: bool | None, slowdown: float) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda device: hardware)
    monkeypatch.setattr(precision, "bf16_slowdown", lambda device: slowdown)


@pytest.mark.parametrize(
    ("hardware", "slowdown", "auto"),
    [
        (True, 0.5, "bf16"),
        (True, 30.0, "float32"),
        (False, 60.0, "float32"),
        (False, 0.9, "float32"),
        (None, 0.7, "bf16"),
        (None, 20.0, "float32"),
    ],
)
def test_auto_is_bf16_where_the_hardware_has_it_and_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, hardware: bool | None, slowdown: float, auto: str
) -> None:
    pretend(monkeypatch, hardware, slowdown)
    assert choose_precision("auto", CPU).precision == auto
    assert choose_precision("float32", CPU).precision == "float32"
    asked = choose_precision("bf16", CPU)
    assert (asked.precision, asked.warning) == ("bf16", auto == "float32")
    if asked.warning:
        assert f"takes {slowdown:.2g} times as long" in asked.reason


def test_what_auto_came_to_is_said_recorded_and_kept(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    pretend(monkeypatch, False, 50.0)
    assert train(with_train(config, max_steps=1), run)
    assert events(run, "start")[0]["precision"] == "float32"
    assert "50 times as long" in events(run, "start")[0]["precision_reason"]
    assert read_run_config(run).train.precision == "float32"
    pretend(monkeypatch, True, 0.5)  # moved to a better machine: the same numbers all the same
    assert train(config, run, resume=True)
    assert events(run, "start")[1]["precision"] == "float32"
    # A run of before it was recorded in the checkpoint has it in its config.
    newest = sorted((run / "checkpoints").iterdir())[-1] / "progress.json"
    progress = json.loads(newest.read_text())
    assert progress.pop("precision") == "float32"
    newest.write_text(json.dumps(progress))
    assert train(with_train(config, max_steps=3), run, resume=True)
    assert events(run, "start")[2]["precision"] == "float32"
    assert train(config, tmp_path / "new")
    assert events(tmp_path / "new", "start")[0]["precision"] == "bf16"


def test_shipped_configs_leave_the_precision_to_the_machine() -> None:
    for name in ("paper", "small", "small-control", "small-one-region"):
        assert load_config(name).train.precision == "auto"


def test_no_step_is_taken_before_the_precision_is_settled(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="settled"):
        autocast(config, CPU)


def test_the_slowdown_is_that_of_the_library_not_of_the_flags() -> None:
    """oneDNN held to AVX2 stands in for a processor without bf16: the flags are those of this machine."""
    program = (
        "import torch; from haltkit.models.training.precision import *; cpu = torch.device('cpu'); "
        "print(bf16_slowdown(cpu), choose_precision('auto', cpu).precision)"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    slowdown, chosen = done.stdout.split()
    if float(slowdown) < precision.TOO_SLOW:
        pytest.skip("oneDNN cannot be held to AVX2 here")
    assert chosen == "float32"
    assert time.monotonic() - started < 60
    assert 0.01 < bf16_slowdown(CPU) < 1000


def test_the_command_says_the_precision_in_one_line(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(
        f"train: {{precision: bf16, max_steps: 1, compile: false}}\ndata: "
        f"{{path: {config.data.path}}}\nmodel: {{vocab_size: 512, block_size: 16, "
        f"n_layer: 1, n_head: 1, d_model: 8, regions: []}}\n"
    )
    pretend(monkeypatch, False, 14.0)
    assert run_command("train", tmp_path / "c.yaml", "--out", tmp_path / "run") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "precision" in line]
    assert len(lines) == 1
    assert lines[0].startswith("Warning: precision bf16: as the config says, but this processor has no bf16")
    assert "14 times as long" in lines[0]


def test_a_forecast_gives_an_estimate_before_it_compiles(config: RunConfig) -> None:
    stages: list[Stage] = []
    found = forecast(config, on_stage=stages.append)
    assert [stage.done for stage in stages] == [0, 0, 1, 2, 3]
    assert stages[0].seconds is None
    assert all(stage.seconds is not None and stage.seconds > 0 for stage in stages[1:])
    assert found.seconds > 0


@pytest.mark.parametrize("name", ["tiny", "small", "small-control", "small-one-region"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_memory_estimate_is_a_lower_bound(name: str, recompute: bool) -> None:
    loaded = with_train(load_config(name), precision="float32", recompute_steps=recompute, batch_size=1)
    model = build_model(loaded.model)
    assert parameter_count(loaded.model) == sum(p.numel() for p in model.parameters())
    windows = torch.zeros(1, loaded.model.block_size + 1, dtype=torch.long)
    with saved_bytes(model.parameters()) as kept:
        Objective(model, head_loss, head_loss)(
            windows,
            dict.fromkeys(model.regions, loaded.model.mean_loops),
            TrainingNoise(0, range(1)),
            loaded.train.backprop_depth,
            recompute,
        )
    assert kept.value / 3 < activation_bytes(loaded, 1) < kept.value


def test_a_run_that_cannot_fit_is_refused_before_anything_is_built(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**9)
    monkeypatch.setattr("haltkit.models.training.start.build_model", lambda config: pytest.fail("built"))
    absurd: dict[str, tuple[RunConfig, str]] = {
        "batch": (with_train(config, batch_size=10**9), r"at least .* TB.*lower train\.batch_size"),
        "width": (replace(config, model=replace(config.model, d_model=10**7)), "choose a smaller model"),
        "layers": (replace(config, model=replace(config.model, n_layer=10**9)), "choose a smaller model"),
    }
    for changed, message in absurd.values():
        for start in (lambda c: train(c, tmp_path / "run"), forecast):
            with pytest.raises(ConfigError, match=message):
                start(changed)
    assert not (tmp_path / "run").exists()
    check_memory(config, Processes())


def test_what_fits_is_never_refused_by_a_system_that_does_not_say(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    check_memory(with_train(config, batch_size=10**9), Processes())
    monkeypatch.undo()
    available = memory.available_bytes(CPU)
    assert available is None or available > 10**6


def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(config: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    refused: list[str] = []

    def intrude(event: Any) -> None:
        if event["kind"] == "step":
            before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
            for resume in (False, True):
                with pytest.raises((FolderInUse, ValueError)) as caught:
                    train(config, run, resume=resume)
                refused.append(str(caught.value))
            after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
            assert after.keys() == before.keys()
            for path, now in after.items():
                # A thread of the run itself writes TensorBoard's events, whenever it comes to it; it only appends.
                events_of_run = path.parent.name == "tensorboard"
                assert now.startswith(before[path]) if events_of_run else now == before[path], path

    assert train(config, run, on_event=intrude)
    assert f"in use by haltkit train (process {os.getpid()} on" in refused[0]
    assert not [message for message in refused if "emove" in message or "damaged" in message]
    assert train(with_train(config, max_steps=3), run, resume=True)


def test_a_file_system_without_locks_is_said_in_the_log(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("haltkit.locks._lock", lambda folder, what: None)
    assert train(config, tmp_path / "run")
    assert events(tmp_path / "run", "start")[0]["locked"] is False


def test_the_train_command_names_the_holder_in_one_line(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hold(tmp_path / "run", "haltkit train"):
        arguments = ["train", "tiny", "--data", config.data.path, "--out", tmp_path / "run"]
        assert run_command(*arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert f"process {os.getpid()}" in error
