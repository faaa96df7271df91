"""Training: the schedule, durable resumption, a clean stop, and that it learns."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from haltkit.models import train as training
from haltkit.models.checkpoint import BUNDLED, CheckpointError, load_checkpoint, load_weights, read_tensors
from haltkit.models.config import CONFIG_DIR, ConfigError, OptimConfig, RunConfig, load_config
from haltkit.models.train import RunError, TrainingDiverged, anneal, learning_rate, train


@pytest.fixture
def config(data_folder: Path) -> RunConfig:
    loaded = load_config("tiny")
    return replace(loaded, data=replace(loaded.data, path=str(data_folder)))


def with_train(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))


def last_tensors(folder: Path) -> dict[str, torch.Tensor]:
    latest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return {**read_tensors(latest / "model.safetensors"), **read_tensors(latest / "optimizer.safetensors")}


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIG_DIR.glob("*.yaml")))
def test_shipped_configs_load_and_describe_what_they_say(name: str) -> None:
    config = load_config(name)
    assert config == load_config(CONFIG_DIR / f"{name}.yaml")
    if name == "paper":
        assert (config.model.n_layer, config.model.n_head, config.model.d_model) == (12, 12, 768)
        tokens = config.train.max_steps * config.train.batch_size * config.model.block_size
        assert tokens == pytest.approx(300e6, rel=0.03)
    if name == "small-control":
        assert config.model.regions == ()
        assert replace(config, model=replace(config.model, regions=("4", "5-6", "7"))) == load_config("small")


@pytest.mark.parametrize(
    ("stop", "accumulate"), [(3, 1), (5, 1), (6, 2)], ids=["between checkpoints", "at a checkpoint", "accumulating"]
)
def test_resuming_continues_bit_for_bit(config: RunConfig, tmp_path: Path, stop: int, accumulate: int) -> None:
    config = with_train(config, max_steps=9, grad_accumulation=accumulate)
    assert train(config, tmp_path / "straight")

    def interrupt(event: Any) -> None:
        if event["kind"] == "step" and event["step"] == stop:
            signal.raise_signal(signal.SIGINT)

    assert not train(config, tmp_path / "resumed", on_event=interrupt)
    assert events(tmp_path / "resumed", "end")[-1]["reason"] == "asked to stop"
    assert train(config, tmp_path / "resumed", resume=True)
    straight, resumed = last_tensors(tmp_path / "straight"), last_tensors(tmp_path / "resumed")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    losses = [[e["loss"] for e in events(tmp_path / name, "step")] for name in ("straight", "resumed")]
    assert losses[0] == losses[1]
    assert [e["losses"] for e in events(tmp_path / "straight", "eval")] == [
        e["losses"] for e in events(tmp_path / "resumed", "eval")
    ]


def test_sigterm_saves_as_well_and_handlers_are_put_back(config: RunConfig, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert not train(
        config, tmp_path / "run", on_event=lambda e: e["step"] == 2 and os.kill(os.getpid(), signal.SIGTERM)
    )
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    assert signal.getsignal(signal.SIGTERM) is before


def test_it_learns_and_leaves_what_it_should(config: RunConfig, tmp_path: Path) -> None:
    config = with_train(config, max_steps=60, eval_every=60, checkpoint_every=20, batch_size=8)
    config = replace(config, optim=replace(config.optim, lr=1e-2))
    run = tmp_path / "run"
    assert train(config, run)
    losses = [e["loss"] for e in events(run, "step")]
    assert losses[0] == pytest.approx(math.log(512), abs=0.5)
    assert sum(losses[-5:]) / 5 < losses[0] - 2
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000040", "step-00000060"]
    snapshots = sorted(p.name for p in (run / "snapshots").iterdir())
    assert snapshots == ["tokens-0000001024", "tokens-0000002048", "tokens-0000004096", "tokens-0000008192"]
    for name in snapshots:
        path = run / "snapshots" / name / "statistics.json"
        assert path.stat().st_size < 20_000
        statistics = json.loads(path.read_text())
        assert statistics["tokens_seen"] == int(name.removeprefix("tokens-"))
        assert statistics["regions"].keys() == {"2", "3-4"}
        assert statistics["dlr"].keys() == {"2 -> 3-4"}
        assert len(statistics["regions"]["2"]["step_norm_mean"]) == statistics["loops"] == 32
        assert statistics["regions"]["2"]["cosine_mean"][0] is None
    assert any((run / "tensorboard").iterdir())
    final = load_checkpoint(run / "final")
    assert final.trained["tokens"] == 60 * 8 * 32
    held_out = events(run, "eval")[-1]["losses"]
    assert final.trained["held_out_loss"] == held_out
    ids = torch.tensor([final.tokenizer.encode_ordinary("Document 12 says that 3 and 4 make")])
    assert final.model(ids).shape == (1, ids.shape[1], 512)


def test_annealing_goes_on_from_a_copy_and_leaves_the_run_alone(config: RunConfig, tmp_path: Path) -> None:
    config = with_train(config, max_steps=6)
    config = replace(config, optim=replace(config.optim, schedule="wsd", warmup_steps=0, min_lr_ratio=0.0))
    train(config, tmp_path / "run")
    before = last_tensors(tmp_path / "run")
    annealed = anneal(tmp_path / "run", tmp_path / "annealed", 4)
    assert train(annealed, tmp_path / "annealed", resume=True)
    rates = [e["lr"] for e in events(tmp_path / "annealed", "step")]
    assert rates == pytest.approx([config.optim.lr * left / 4 for left in (4, 3, 2, 1)])
    after = last_tensors(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(RunError, match="exists already"):
        anneal(tmp_path / "run", tmp_path / "annealed", 4)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training._step
    monkeypatch.setattr(training, "_step", lambda run, data: (math.nan, 1.0) if run.step == 7 else real(run, data))
    with pytest.raises(TrainingDiverged, match="step 8.*the last checkpoint is of step 5"):
        train(config, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    monkeypatch.undo()
    assert train(with_train(config, max_steps=8), tmp_path / "run", resume=True)


def test_the_rate_has_the_schedules_shape() -> None:
    cosine = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=10, schedule="cosine")
    rates = [learning_rate(step, 110, cosine) for step in range(110)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    wsd = OptimConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=10, schedule="wsd", decay_steps=20)
    rates = [learning_rate(step, 110, wsd) for step in range(111)]
    assert rates[10:91] == [1.0] * 81
    assert rates[100] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    held = replace(wsd, decay_steps=0)
    assert learning_rate(109, 110, held) == 1.0


def test_what_training_refuses(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path is empty"):
        train(replace(config, data=replace(config.data, path="")), tmp_path / "a")
    with pytest.raises(ValueError, match="haltkit prepare"):
        train(replace(config, data=replace(config.data, path=str(tmp_path))), tmp_path / "a")
    with pytest.raises(ValueError, match="vocab_size is 300"):
        train(replace(config, model=replace(config.model, vocab_size=300)), tmp_path / "a")
    with pytest.raises(RunError, match="no checkpoint"):
        train(config, tmp_path / "a", resume=True)
    assert not (tmp_path / "a").exists()
    train(with_train(config, max_steps=1), tmp_path / "b")
    with pytest.raises(RunError, match="holds a run already"):
        train(config, tmp_path / "b")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("model: {d_modle: 3}", "did you mean d_model"),
        ("modle: {}", "did you mean model"),
        ("model: {d_model: wide}", "int expected, got str"),
        ("model: {regions: 4}", "a list is expected"),
        ("model: {norm_placement: middle}", "allowed are residual, branch"),
        ("optim: {lr: 0}", "must be positive"),
        ("optim: {betas: [0.9]}", "exactly 2 entries"),
        ("train: {batch_size: 0}", "at least 1"),
        ("train: {compile: 3}", "bool expected"),
        ("- 1", "a mapping of fields"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_configs_say_what_is_wrong(tmp_path: Path, yaml: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml)
    with pytest.raises(ConfigError, match=message):
        load_config(path)
    with pytest.raises(ConfigError, match="shipped with haltkit: paper.yaml"):
        load_config("nothing")


def test_checkpoints_that_do_not_fit(config: RunConfig, tmp_path: Path) -> None:
    train(with_train(config, max_steps=1), tmp_path / "run")
    final = tmp_path / "run" / "final"
    loaded = load_checkpoint(final)
    weights = {**loaded.model.state_dict()}
    weights["more"] = weights.pop("norm_f.weight")
    with pytest.raises(CheckpointError, match=r"missing norm_f\.weight; unexpected more"):
        load_weights(loaded.model, weights)
    values = json.loads((final / "config.json").read_text())
    values["model"]["d_model"] = 64
    (final / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"is \(512, 32\), the config says \(512, 64\).* more"):
        load_checkpoint(final)
    values["model"]["d_modle"] = 64
    (final / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="did you mean d_model"):
        load_checkpoint(final)
    (final / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not a checkpoint's"):
        load_checkpoint(final)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_checkpoint(tmp_path)
    (final / "model.safetensors").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(final / "model.safetensors")


def test_the_bundled_checkpoint_loads_and_predicts_better_than_chance() -> None:
    loaded = load_checkpoint()
    text = (BUNDLED / "sample.txt").read_text(encoding="utf-8")
    ids = torch.tensor([loaded.tokenizer.encode_ordinary(text[:4000])[:257]])
    with torch.no_grad():
        logits = loaded.model(ids[:, :-1])
    loss = float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]))
    assert loss < 6.5  # a uniform guess is 9.0, unigrams are 7.2
    assert loaded.trained["tokens"] > 0
