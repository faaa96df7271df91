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

from cases import events, last_tensors, with_train
from haltkit.models.checkpoint import BUNDLED, build_model, load_checkpoint
from haltkit.models.config import ConfigError
from haltkit.models.gpt.draws import TrainingNoise, loop_count
from haltkit.models.gpt.files import load_weights
from haltkit.models.text.data import TokenData
from haltkit.models.text.prepare import prepare
from haltkit.models.text.source import resolve_source
from haltkit.models.text.tokenizer import TOKENIZER_FILE
from haltkit.models.training import loop
from haltkit.models.training.config import CONFIG_DIR, OptimConfig, RunConfig, load_config
from haltkit.models.training.loop import TrainingDiverged, train
from haltkit.models.training.runs import RunError, checkpoints
from haltkit.models.training.start import anneal, continue_from
from haltkit.models.training.step import learning_rate
from haltkit.models.weights import CheckpointError, read_tensors

pytestmark = pytest.mark.slow


@pytest.fixture
def config(data_folder: Path) -> RunConfig:
    loaded = load_config("tiny")
    return replace(loaded, data=replace(loaded.data, path=str(data_folder)))


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


def literal_step(config: RunConfig, model: Any, moments: dict[str, Any], step: int, data: TokenData) -> float:
    """One optimizer step of the recipe written out: every sample by itself, no accumulation, AdamW by hand."""
    settings, optim = config.train, config.optim
    names = dict(model.named_parameters())
    gradients = {name: torch.zeros_like(p) for name, p in names.items()}
    total, share = 0.0, settings.grad_accumulation * settings.batch_size
    for micro_step in range(settings.grad_accumulation):
        loops = {
            name: loop_count(
                model.mean_loops, settings.loop_sigma, seed=settings.seed, step=step, micro_step=micro_step, region=name
            )
            for name in model.regions
        }
        for i in range(settings.batch_size):
            number = (step * settings.grad_accumulation + micro_step) * settings.batch_size + i
            window = torch.from_numpy(data.sample(settings.seed, number))[None]
            noise, x = TrainingNoise(settings.seed, [number]), model.embed(window[:, :-1])
            for name, layer in model.layers.items():
                if name not in model.regions:
                    x = layer(x)
                    continue
                state, e = layer.initial_state(x, noise), x
                for k in range(1, loops[name] + 1):
                    with torch.set_grad_enabled(k > loops[name] - settings.backprop_depth):
                        state = layer.step(state, e, k, noise)
                x = layer.exit(state)
            loss = torch.nn.functional.cross_entropy(model.readout(x)[0], window[0, 1:]) / share
            for name, g in zip(names, torch.autograd.grad(loss, list(names.values())), strict=True):
                gradients[name] += g
            total += float(loss.detach())
    norm = float(sum(g.square().sum() for g in gradients.values()) ** 0.5)
    scale = min(1.0, optim.grad_clip / (norm + 1e-6))
    rate = learning_rate(step, settings.max_steps, optim)
    with torch.no_grad():
        for name, p in names.items():
            g = gradients[name] * scale
            m, v = moments.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            m, v = optim.betas[0] * m + (1 - optim.betas[0]) * g, optim.betas[1] * v + (1 - optim.betas[1]) * g**2
            moments[name] = (m, v)
            p *= 1 - rate * (optim.weight_decay if p.ndim >= 2 else 0.0)
            corrected = [moment / (1 - beta ** (step + 1)) for moment, beta in zip((m, v), optim.betas, strict=True)]
            p -= rate * corrected[0] / (corrected[1].sqrt() + optim.eps)
    return total


def test_training_is_the_recipe_written_out(config: RunConfig, tmp_path: Path) -> None:
    """Loop draws, truncation, accumulation, clipping, decay groups: against a literal step, sample by sample."""
    config = with_train(config, max_steps=3, batch_size=2, grad_accumulation=2, backprop_depth=2)
    config = replace(config, optim=replace(config.optim, grad_clip=0.3, weight_decay=0.5, warmup_steps=0, eps=1e-4))
    assert train(config, tmp_path / "run")
    torch.manual_seed(config.train.seed)
    model, moments = build_model(config.model), {}
    data = TokenData(Path(config.data.path), "train", config.model.block_size)
    losses = [literal_step(config, model, moments, step, data) for step in range(3)]
    logged = events(tmp_path / "run", "step")
    assert [e["loss"] for e in logged] == pytest.approx(losses, rel=1e-5)
    assert all(e["grad_norm"] > 0.3 for e in logged)  # clipping had something to do
    weights = last_tensors(tmp_path / "run")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-4, atol=2e-6)


def test_mixed_precision_is_what_the_config_says(config: RunConfig, tmp_path: Path) -> None:
    losses = {}
    for precision in ("float32", "bf16"):
        train(with_train(config, max_steps=1, precision=precision), tmp_path / precision)
        losses[precision] = events(tmp_path / precision, "step")[0]["loss"]
    assert losses["bf16"] == pytest.approx(losses["float32"], abs=0.05)
    assert losses["bf16"] != losses["float32"]


def test_evaluation_windows_are_spread_over_the_split(config: RunConfig) -> None:
    held_out = TokenData(Path(config.data.path), "validation", 32)
    chosen = held_out.spread(4)
    assert torch.equal(chosen[0], torch.from_numpy(held_out.window(0)))
    assert torch.equal(chosen[-1], torch.from_numpy(held_out.window(len(held_out) - 1)))
    assert len({tuple(window.tolist()) for window in chosen}) == 4


def test_a_tokenizer_given_by_file_travels_with_the_checkpoint(
    documents: Path, data_folder: Path, tmp_path: Path
) -> None:
    prepare(resolve_source([str(documents)]), tmp_path / "data", tokenizer=str(data_folder), holdout=0.1)
    loaded = load_config("tiny")
    config = with_train(replace(loaded, data=replace(loaded.data, path=str(tmp_path / "data"))), max_steps=1)
    train(config, tmp_path / "run")
    final = load_checkpoint(tmp_path / "run" / "final")
    assert final.tokenizer.n_vocab == 320
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    assert load_checkpoint(checkpoint).tokenizer.n_vocab == 320
    (checkpoint / TOKENIZER_FILE).unlink()
    with pytest.raises(CheckpointError, match="put the tokenizer beside"):
        load_checkpoint(checkpoint)


def test_extending_a_run_renews_its_final_checkpoint(config: RunConfig, tmp_path: Path) -> None:
    for steps in (2, 4):
        train(with_train(config, max_steps=steps), tmp_path / "run", resume=steps > 2)
        assert load_checkpoint(tmp_path / "run" / "final").trained["steps"] == steps


def test_weights_that_are_not_finite_are_never_saved(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.take_step

    def spoil(run: Any) -> tuple[float, float]:
        result = real(run)
        if run.step == 6:
            with torch.no_grad():
                run.model.norm_f.weight[0] = torch.nan
        return result

    monkeypatch.setattr(loop, "take_step", spoil)
    with pytest.raises(TrainingDiverged, match="weights are not finite after step 7.*of step 5"):
        train(config, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]


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
    config = replace(config, optim=replace(config.optim, schedule="wsd", warmup_steps=0, min_lr_ratio=0.1))
    train(config, tmp_path / "run")
    before = last_tensors(tmp_path / "run")
    annealed = anneal(tmp_path / "run", tmp_path / "annealed", 4)
    assert train(annealed, tmp_path / "annealed", resume=True)
    rates = [e["lr"] for e in events(tmp_path / "annealed", "step")]
    assert rates == pytest.approx([config.optim.lr * (0.1 + 0.9 * left / 4) for left in (4, 3, 2, 1)])
    after = last_tensors(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(RunError, match="exists already"):
        anneal(tmp_path / "run", tmp_path / "annealed", 4)
    with pytest.raises(ValueError, match="haltkit prepare"):
        anneal(tmp_path / "run", tmp_path / "other", 4, data=tmp_path / "nowhere")
    assert not (tmp_path / "other").exists()
    # A rate that has fallen already is not raised again.
    again = anneal(tmp_path / "annealed", tmp_path / "again", 2)
    reached = learning_rate(10, annealed.train.max_steps, annealed.optim)
    assert learning_rate(10, again.train.max_steps, again.optim) == pytest.approx(reached)


def test_a_lost_run_goes_on_from_its_weights(config: RunConfig, tmp_path: Path) -> None:
    """Fresh optimizer, a warmup from zero to where the schedule is, and the samples that would have come next."""
    config = replace(config, optim=replace(config.optim, schedule="cosine", warmup_steps=3))
    train(with_train(config, max_steps=5), tmp_path / "lost")
    longer = with_train(config, max_steps=12)
    taken_up = continue_from(tmp_path / "lost" / "final", longer, tmp_path / "new")
    exported = load_checkpoint(tmp_path / "lost" / "final").model.state_dict()
    first = last_tensors(tmp_path / "new")
    assert all(torch.equal(first[name], weight) for name, weight in exported.items())
    assert not any("/exp_avg" in name for name in first)
    assert train(taken_up, tmp_path / "new", resume=True)
    steps = events(tmp_path / "new", "step")
    assert [e["step"] for e in steps] == list(range(6, 13))
    assert [e["tokens"] for e in steps] == [128 * e["step"] for e in steps]
    straight = [learning_rate(step, 12, config.optim) for step in range(5, 12)]
    target = straight[3]
    assert [e["lr"] for e in steps] == pytest.approx([target / 3, target * 2 / 3, target, *straight[3:]])
    with pytest.raises(RunError, match="exists already"):
        continue_from(tmp_path / "lost" / "final", longer, tmp_path / "new")
    # A checkpoint of the run itself will do; one from before samples were noted must have taken steps of one size.
    step = checkpoints(tmp_path / "lost")[-1]
    continue_from(step, longer, tmp_path / "step")
    (step / "progress.json").unlink()
    known = json.loads((step / "config.json").read_text())
    for forgotten, wrong, message in (("samples", 8, "steps are of"), ("steps", 4, "nothing to go on from")):
        del known["trained"][forgotten]
        (step / "config.json").write_text(json.dumps(known))
        if forgotten == "samples":
            continue_from(step, longer, tmp_path / "older")
        with pytest.raises(RunError, match=message):
            continue_from(step, with_train(longer, batch_size=wrong), tmp_path / "other")
    wider = replace(longer, model=replace(longer.model, d_model=64))
    with pytest.raises(CheckpointError, match=r"model\.d_model is"):
        continue_from(tmp_path / "lost" / "final", wider, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.take_step
    monkeypatch.setattr(loop, "take_step", lambda run: (math.nan, 1.0) if run.step == 7 else real(run))
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
    with pytest.raises(RunError, match="a run already"):
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
    with pytest.raises(ConfigError, match="shipped with haltkit: .*paper"):
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
    with pytest.raises(CheckpointError, match="is not JSON"):
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
