"""A subject: one model seen by every tool, whichever way it is driven and whichever command asks."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import haltkit
from cases import Refiner, run_command
from haltkit.models.checkpoint import Checkpoint, build_model, load_checkpoint
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.files import save_checkpoint
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.gpt.subject import gpt_subject, text_windows
from haltkit.models.text.tokenizer import TOKENIZER_FILE, load_tokenizer, write_ranks
from haltkit.setting import Depth, Setting

TEXT = "".join(f"Document {i} says that {i * i} is a square. " for i in range(60))
POLICIES, TAUS = "norm,2=accel:tau=0.1;3-4=norm,fixed:steps=3", "auto"


@pytest.fixture(scope="module")
def folder(tiny_config: ModelConfig, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint with the test data's tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    save_checkpoint(folder, build_model(tiny_config), tiny_config, dtype=torch.float32, trained={})
    write_ranks(load_tokenizer(data_folder), folder / TOKENIZER_FILE)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def subject(loaded: Checkpoint, folder: Path) -> haltkit.Subject:
    return gpt_subject(loaded.model, text_windows(loaded, folder / "text.txt", 96), max_loops=6, name="tiny")


def made() -> haltkit.Subject:
    """For the command line: what MADE says."""
    return SUBJECTS[0]


SUBJECTS: list[haltkit.Subject] = []


def figures(rows: Any) -> list[tuple[Any, ...]]:
    """All of a comparison that is not time."""
    names = (
        "policy",
        "spec",
        "tau",
        "depth",
        "loss",
        "delta",
        "delta_se",
        "agreement",
        "kl_to_full",
        "steps",
        "causal",
    )
    plain = [row if isinstance(row, dict) else vars(row) for row in rows]
    return [tuple(row[name] for name in names) for row in plain]


def test_all_front_ends_of_compare_agree_on_one_model(
    subject: haltkit.Subject, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = haltkit.compare(subject, policies=POLICIES, taus=TAUS, repeats=1)
    expected = figures(result.rows)
    assert {row.policy for row in result.rows} == {"fixed", "norm", "2=accel;3-4=norm", "oracle"}
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "subjects_of_mine", sys.modules[__name__])
    SUBJECTS[:] = [subject]
    own = ["--text", "text.txt", "--tokens", 96, "--max-loops", 6]
    for model in ([folder, *own], ["--checkpoint", folder, *own], ["subjects_of_mine:made"]):
        asked = [*model, "--policies", POLICIES, "--taus", TAUS, "--repeats", 1, "--json", tmp_path / "c.json"]
        assert run_command("compare", *asked) == 0
        written = haltkit.Comparison.from_json(json.loads((tmp_path / "c.json").read_text()))
        assert figures(written.rows) == expected
    # And eval, which times nothing.
    settings = [row for row in result.rows if row.spec and not row.fixed]
    args = [arg for row in settings for arg in ("--policy", row.spec)]
    assert run_command("eval", folder, "--loops", "", *args, *own, "--json", tmp_path / "e.json") == 0
    found = json.loads((tmp_path / "e.json").read_text())["results"]
    for row, one in zip(settings, found, strict=True):
        assert one["loss"] == pytest.approx(row.loss, rel=1e-5)
        assert one["steps"] == pytest.approx(row.steps, rel=0.02)


def test_a_saved_choice_is_taken_by_every_command(
    folder: Path,
    loaded: Checkpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    card = tmp_path / "card.yaml"
    own = ["--text", folder / "text.txt", "--max-loops", 6]
    small = [*own, "--tokens", 64]
    policies = ["--policies", "2=norm:tau=1e-4;3-4=norm:tau=1e-5"]
    assert run_command("compare", folder, *small, *policies, "--repeats", 1, "--save", card) == 0
    spec = "2=norm:tau=0.0001;3-4=norm:tau=1e-05"
    assert spec in card.read_text()
    capsys.readouterr()
    assert run_command("compare", folder, *small, "--policies", card, "--repeats", 1) == 0
    assert spec in capsys.readouterr().out
    assert run_command("eval", folder, *small, "--loops", "", "--policy", card, "--json", tmp_path / "e") == 0
    assert json.loads((tmp_path / "e").read_text())["results"][0]["steps"].keys() == {"2", "3-4"}
    assert run_command("generate", "Document", "--model", folder, "--policy", card, "-n", 2) == 0
    bench = ["bench", folder, *own, "--policies", card, "--only", "forward", "--repeats", 1, "--json", tmp_path / "b"]
    assert run_command(*bench) == 0
    assert json.loads((tmp_path / "b").read_text())["policies"] == [spec]
    ids = torch.zeros(1, 8, dtype=torch.long)
    with torch.no_grad(), haltkit.attach(loaded.model, card) as session:
        loaded.model(ids)
    assert session.steps.keys() == {"2", "3-4"}
    # Another model's, by its class or its regions.
    capsys.readouterr()
    assert run_command("eval", "text", "--tokens", 64, "--policy", card) == 2
    assert "thresholds do not carry over" in capsys.readouterr().err
    with pytest.raises(ValueError, match="thresholds do not carry over"):
        haltkit.attach(Refiner(), card, body=["core"])


def test_a_native_subject_records_what_the_model_runs(subject: haltkit.Subject, loaded: Checkpoint) -> None:
    ids = subject.inputs(subject.samples[0])
    with torch.no_grad(), haltkit.record(loaded.model) as recording:
        loaded.model(ids, 4)
    trajectory, layers = subject.with_layers(ids, 4)
    assert list(trajectory.regions) == list(subject.regions) == ["2", "3-4"]
    for name, region in recording.trajectory.regions.items():
        assert region.states is not None
        found = trajectory[name].states
        assert found is not None
        assert torch.equal(found, region.states)
    assert {path: len(states) for path, states in layers.items()} == {
        "layers.2.body.blocks.0": 4,
        "layers.3-4.body.blocks.0": 4,
        "layers.3-4.body.blocks.1": 4,
    }
    assert subject.at_depth(ids, 3) == 3
    halted = subject.halted(ids, "norm:tau=0.05", 6)
    expected = loaded.model.forward_adaptive(ids, "norm:tau=0.05", max_loops=6).steps
    assert {name: steps.tolist() for name, steps in halted.items()} == {n: s[0].tolist() for n, s in expected.items()}


@torch.no_grad()
def test_a_pass_is_what_the_model_gives_at_that_setting(subject: haltkit.Subject, loaded: Checkpoint) -> None:
    window = subject.samples[0]
    model: LoopedGPT = loaded.model
    same = subject.run(window, 3)
    assert torch.equal(same.output, model(window[:, :-1], 3))
    assert (same.steps, same.outcome) == ({}, {})
    differing = subject.run(window, Depth({"2": 1, "3-4": 5}))
    assert torch.equal(differing.output, model(window[:, :-1], {"2": 1, "3-4": 5}))
    halted = subject.run(window, "2=norm:tau=0.1;3-4=fixed:steps=2")
    assert halted.steps["3-4"].unique().tolist() == [2]
    assert halted.steps["2"].shape == halted.outcome["2"].shape == window[:, :-1].shape
    decoding = gpt_subject(model, window, max_loops=6, mode="decode")
    token_by_token = decoding.run(window, Setting.of("norm:tau=0.1", subject.regions))
    assert token_by_token.output.shape == halted.output.shape
    with pytest.raises(ValueError, match="or mode forward"):
        decoding.run(window, "norm:tau=0.1,granularity=batch")


def test_an_attached_subject_records_halts_and_is_restored() -> None:
    model = Refiner().eval()
    x = torch.randn(2, 8)
    subject = haltkit.Subject.attached(model, loop=haltkit.Loop(["core"]), run_at=model, samples=[x])
    assert subject.regions == ("loop",)
    assert subject.granularity == "batch"
    trajectory = subject.record(x, 12)  # deeper than the model goes by itself
    assert trajectory["loop"].max_steps == 12
    states = trajectory["loop"].states
    assert states is not None
    expected = x
    for state in states[1:]:
        expected = model.core(expected)
        torch.testing.assert_close(state, expected)
    done = subject.run(x, "fixed:steps=4")
    assert torch.equal(done.output, model(x, 4))
    assert done.steps["loop"].tolist() == [4, 4]
    judged = subject.halted(x[None], "norm:tau=0.1", 10)
    with torch.no_grad(), haltkit.attach(model, "norm:tau=0.1", body=["core"]) as session:
        model(x[None])
    assert judged["loop"].tolist() == session.steps["loop"][0].tolist()
    assert not [name for name in vars(type(model)) if "haltkit" in name]
    driver: Any = subject.driver
    shallow = replace(subject, driver=replace(driver, run_at=None))
    with pytest.raises(ValueError, match="ran 10 steps when asked for 12"):
        shallow.record(x, 12)


def test_what_a_subject_cannot_do_is_said(loaded: Checkpoint, tiny_config: ModelConfig) -> None:
    plain = build_model(replace(tiny_config, regions=())).eval()
    with pytest.raises(ValueError, match="without looped regions"):
        haltkit.compare(gpt_subject(plain, torch.zeros(1, 9, dtype=torch.long)))
    with pytest.raises(ValueError, match="gpt_subject"):
        haltkit.Subject.attached(loaded.model)
    told = haltkit.Subject.of_modules(torch.nn.Identity(), lambda x, n: x, {"loop": ""}, samples=[torch.ones(1, 2)])
    with pytest.raises(ValueError, match="cannot halt itself"):
        told.run(torch.ones(1, 2), "norm:tau=1")
    with pytest.raises(ValueError, match="not both"):
        haltkit.Subject.attached(Refiner(), loop=haltkit.Loop(["core"]), loops={})
