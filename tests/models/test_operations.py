"""What people expect of a training command: dry runs, logs, evaluation of what came out."""

from __future__ import annotations

import json
import math
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cases import run_command, tiny_run
from haltkit.models.checkpoint import BUNDLED, build_model, load_checkpoint
from haltkit.models.config import ConfigError
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.cost import saved_bytes, step_flops
from haltkit.models.gpt.draws import TrainingNoise
from haltkit.models.gpt.evaluate import evaluate
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.training import loop
from haltkit.models.training.config import RunConfig
from haltkit.models.training.forecast import forecast, training_flops
from haltkit.models.training.loop import train

pytestmark = pytest.mark.slow


@pytest.fixture
def config(data_folder: Path) -> RunConfig:
    return tiny_run(data_folder, max_steps=3, snapshot_first_tokens=10**9)


@pytest.mark.parametrize("depth", [None, 2])
def test_operations_are_those_that_torch_counts(tiny_config: ModelConfig, depth: int | None) -> None:
    model = build_model(tiny_config)
    tokens, length = torch.zeros(2, tiny_config.block_size, dtype=torch.long), tiny_config.block_size
    loops = {"2": 3, "3-4": 5}
    with FlopCounterMode(display=False) as forward:
        loss = model.readout(model.hidden(tokens, loops, backprop_depth=depth)).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    spent = step_flops(tiny_config, loops, depth)
    # Attention here computes the whole square of scores, of which the model needs half: 4 T D / 2 more a block.
    # Steps without gradients use the fused attention, which the counter does not know.
    once, half = 2, 2 * length * tiny_config.d_model
    blocks = once + 3 * 1 + 5 * 2
    if depth is None:
        assert forward.get_total_flops() == (spent.forward + half * blocks) * tokens.numel()
    kept = once + min(3, depth or 3) * 1 + min(5, depth or 5) * 2
    counted = backward.get_total_flops()
    # The first layer's input is an embedding: everything upstream of it has a gradient too, so nothing is left out.
    assert counted == pytest.approx((spent.backward + 2 * half * kept) * tokens.numel(), rel=0.02)


def test_a_runs_operations_are_the_mean_over_its_own_draws(config: RunConfig) -> None:
    from haltkit.models.gpt.draws import loop_count

    spent = training_flops(config)
    steps = []
    for step in range(3):
        loops = {name: loop_count(4, 0.5, seed=0, step=step, micro_step=0, region=name) for name in ("2", "3-4")}
        steps.append(step_flops(config.model, loops, 3).total)
    assert spent.total == pytest.approx(sum(steps) / 3)


def kept_bytes(model: LoopedGPT, loops: int, depth: int, recompute: bool = False) -> int:
    with saved_bytes(model.parameters()) as kept:
        model.hidden(torch.zeros(2, 32, dtype=torch.long), loops, backprop_depth=depth, recompute=recompute)
    return kept.value


def test_memory_grows_with_the_backprop_depth_and_not_with_the_loops(tiny_config: ModelConfig) -> None:
    model = build_model(tiny_config)
    few, many = kept_bytes(model, 4, 3), kept_bytes(model, 40, 3)
    assert many == few
    steps = [kept_bytes(model, 20, depth) for depth in (2, 4, 8)]
    # Each further step of gradients keeps as much as the one before it.
    assert steps[2] - steps[1] == pytest.approx(2 * (steps[1] - steps[0]), rel=0.05)
    assert kept_bytes(model, 20, 8, recompute=True) < 0.3 * steps[2]


@pytest.mark.parametrize("noise", ["initial", "every_step"])
def test_recomputed_steps_give_the_same_gradients(tiny_config: ModelConfig, noise: Any) -> None:
    torch.manual_seed(3)
    model = build_model(replace(tiny_config, noise=noise)).double()
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        model.hidden(
            torch.arange(32)[None], 6, noise=TrainingNoise(0, [5]), backprop_depth=4, recompute=recompute
        ).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-10) for name in gradients[0])


def test_a_run_with_recomputed_steps_is_the_same_run(config: RunConfig, tmp_path: Path) -> None:
    losses = []
    for recompute in (False, True):
        changed = replace(config, train=replace(config.train, recompute_steps=recompute))
        train(changed, tmp_path / str(recompute))
        log = map(json.loads, (tmp_path / str(recompute) / "log.jsonl").read_text().splitlines())
        losses.append([event["loss"] for event in log if event["kind"] == "step"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_dry_run_tells_and_writes_nothing(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = forecast(config)
    model = build_model(config.model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.state == 16 * found.parameters
    assert found.effective_depth == 2 + 3 * 4
    assert found.tokens == 3 * 2 * 32
    assert found.seconds > 0
    assert found.activations > 0
    monkeypatch.setenv("COLUMNS", "140")
    code = run_command("train", "tiny", "--data", config.data.path, "--out", tmp_path / "run", "--dry-run")
    out = capsys.readouterr().out
    assert code == 0
    for word in ("parameters", "effective depth", "operations per token", "memory", "activations", "tokens/s"):
        assert word in out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_an_anneal_writes_nothing_either(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config, tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    anneal = ["train", "--anneal-from", tmp_path / "run", "--anneal-steps", "4", "--out", tmp_path / "out"]
    assert run_command(*anneal, "--dry-run") == 0
    assert "7 steps" in capsys.readouterr().out  # the 3 of the run and those of the anneal
    assert sorted(tmp_path.rglob("*")) == before


def test_a_runs_checkpoints_are_evaluated_and_the_best_is_exported(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {1: 3.0, 2: 2.0, 3: 2.5}
    monkeypatch.setattr(loop, "evaluate", lambda run, held_out: {"1": losses[run.step]})
    train(replace(config, train=replace(config.train, eval_every=1)), tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert run_command("export", tmp_path / "run", "--out", tmp_path / "best") == 0
    assert "step-00000002" in capsys.readouterr().out
    results = []
    for folder in (step, tmp_path / "best", tmp_path / "run" / "final"):
        data = ["--data", config.data.path, "--json", tmp_path / "e.json"]
        assert run_command("eval", folder, "--loops", "2", "--tokens", "64", *data) == 0
        found = json.loads((tmp_path / "e.json").read_text())
        results.append((found["trained"]["steps"], found["results"][0]["loss"]))
        assert folder == step or "library_name: haltkit" in (folder / "README.md").read_text()
    assert [steps for steps, _ in results] == [2, 2, 3]
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-3)  # bf16
    assert run_command("export", step, "--out", tmp_path / "best") == 2
    assert "exists already" in capsys.readouterr().err


def test_the_log_says_what_the_run_was_made_of(config: RunConfig, tmp_path: Path) -> None:
    train(config, tmp_path / "run")
    start = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert start["versions"]["torch"] == torch.__version__
    assert start["versions"]["haltkit"]
    assert start["seed"] == 0
    progress = json.loads((tmp_path / "run" / "checkpoints" / "step-00000003" / "progress.json").read_text())
    assert progress["versions"] == start["versions"]
    assert (progress["samples"], progress["tokens"], progress["data"]["kind"]) == (6, 192, "shards")


def test_weights_and_biases_is_asked_only_where_the_config_says_so(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the package, which is optional and sends what it gets to a server."""
    named = replace(config, train=replace(config.train, wandb_project="halting"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="needs wandb: pip install wandb"):
        train(named, tmp_path / "a")
    calls: list[Any] = []
    fake: Any = types.ModuleType("wandb")
    fake.init = lambda **keys: calls.append(keys) or fake
    fake.log = lambda numbers, step: calls.append((step, sorted(numbers)))
    fake.finish = lambda: calls.append("finish")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train(named, tmp_path / "run")
    assert (calls[0]["project"], calls[0]["name"], calls[0]["config"]["train"]["seed"]) == ("halting", "run", 0)
    keys = ["train/grad_norm", "train/loss", "train/lr", "train/tokens_per_second"]
    assert calls[1:4] == [(1, keys), (2, keys), (3, keys)]
    assert calls[-1] == "finish"
    # A resumed run is the same one there; one in another folder of that name is not.
    train(replace(named, train=replace(named.train, max_steps=4)), tmp_path / "run", resume=True)
    train(named, tmp_path / "elsewhere" / "run")
    first, resumed, other = (call["id"] for call in calls if isinstance(call, dict))
    assert first == resumed != other


def test_tensorboard_forgets_what_a_resumed_run_takes_again(config: RunConfig, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    config = replace(config, train=replace(config.train, checkpoint_every=1, keep_checkpoints=3))
    train(config, run)
    for step in (2, 3):  # as if killed after step 1 was saved
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    train(config, run, resume=True)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3]


def test_evaluation_agrees_with_the_definition() -> None:
    """Every token counts once, whatever the batches; a policy that never halts is the budget's loop count."""
    loaded = load_checkpoint()
    torch.manual_seed(0)
    windows = torch.randint(0, 8192, (3, 33))
    whole = evaluate(loaded.model, [windows], 3)
    parts = evaluate(loaded.model, [windows[:2], windows[2:]], 3)
    logits = loaded.model(windows[:, :-1], 3).detach()
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert whole.loss == pytest.approx(float(wanted), rel=1e-5)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert whole.steps == {"4": 3, "5-6": 3, "7": 3}
    halted = evaluate(loaded.model, [windows], "norm:tau=1e-9", max_loops=3)
    assert halted.loss == pytest.approx(whole.loss, rel=1e-5)
    assert halted.steps == whole.steps
    assert max(evaluate(loaded.model, [windows], "norm:tau=1e9", max_loops=3).steps.values()) == 1


def test_the_eval_command(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    path = tmp_path / "e.json"
    arguments = ["--loops", "1,2", "--policy", "norm:tau=2", "--tokens", "512", "--json", path]
    assert run_command("eval", *arguments) == 0
    out = capsys.readouterr().out
    results = json.loads(path.read_text())["results"]
    assert [r["setting"] for r in results] == ["1 loop", "2 loops", "norm:tau=2"]
    for result in results:
        assert f"{result['loss']:.4f}" in out
        assert f"{math.exp(result['loss']):.1f}" in out
    for bad, message in (
        (["--loops", "0"], "'0' is not a positive number"),
        (["--loops", ""], "nothing to evaluate"),
        (["--policy", "nrom:tau=1"], "nrom"),
        (["--data", data_folder], f"prepare it with --tokenizer {BUNDLED}"),
        ([tmp_path / "nothing"], "is not a checkpoint"),
    ):
        assert run_command("eval", *bad) == 2
        assert message in capsys.readouterr().err
