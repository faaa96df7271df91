"""Reasoners: halting in a bidirectional layer, training that resumes bit for bit, checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from haltkit import run_loop
from haltkit.models.config import ConfigError
from haltkit.models.reasoner.checkpoint import load_reasoner, save_reasoner
from haltkit.models.reasoner.config import (
    SHIPPED,
    LayerConfig,
    RateConfig,
    ReasonerConfig,
    RecipeConfig,
    build_reasoner,
    config_from_dict,
    load_reasoner_config,
)
from haltkit.models.reasoner.measure import (
    curve,
    fewest_steps,
    frontier,
    measure,
    predictions,
    settled_after,
    steps_by_need,
)
from haltkit.models.reasoner.model import LOOP, Reasoner
from haltkit.models.reasoner.step import learning_rate
from haltkit.models.reasoner.task import make_task
from haltkit.models.reasoner.train import train_reasoner
from haltkit.models.training.runs import RunError
from haltkit.models.weights import CheckpointError
from haltkit.specs import policy

pytestmark = pytest.mark.slow

SMALL = {"names": 12, "nodes": 6, "first_nodes": 4, "longest": 8, "depths": [1, 2, 3], "least_batch": 4, "rows": 16}
POLICIES = [
    "fixed:steps=3",
    "norm:tau=1.0",
    "norm:tau=0.5,patience=2",
    "kl:tau=1e-3",
    "accel:tau=0.8",
    "norm:tau=1.0,granularity=sequence",
    "kl:tau=1e-2,granularity=batch",
]


def tiny() -> Reasoner:
    torch.manual_seed(0)
    return build_reasoner(make_task("chase", SMALL), LayerConfig(d_model=16, n_head=2)).double().eval()


def by_hand(model: Reasoner, inputs: Tensor, depths: Tensor) -> Tensor:
    """States ``(B, T, D)`` of rows that halt at ``depths``, ``(B, T)``, row by row from the words of the semantics."""
    block = model.region.body.blocks[0]
    heads, width = block.attn.n_head, model.d_model // block.attn.n_head
    e = model.embed(inputs)
    start = model.initial_state(e)
    out = torch.empty_like(e)
    for b in range(len(inputs)):
        rows = range(inputs.shape[1])
        x = [start[b, i] for i in rows]
        kv: list[Tensor] = [torch.empty(0) for _ in rows]
        for k in range(1, int(depths[b].max()) + 1):
            live = [i for i in rows if k <= int(depths[b, i])]
            h = {i: model.region.body.adapter(torch.cat([x[i], e[b, i]])) for i in live}
            queries = {}
            for i in live:
                q, key, value = block.attn.qkv(block.n1(h[i])).chunk(3)
                queries[i], kv[i] = q, torch.stack([key, value])
            for i in live:
                read = []
                for head in range(heads):
                    at = slice(head * width, (head + 1) * width)
                    scores = torch.stack([queries[i][at] @ kv[j][0][at] for j in rows]) / width**0.5
                    read.append(scores.softmax(0) @ torch.stack([kv[j][1][at] for j in rows]))
                one = h[i] + block.n2(block.attn.proj(torch.cat(read)))
                one = one + block.n4(block.mlp(block.n3(one)))
                x[i] = model.region.body.norm(one)
        out[b] = torch.stack(x)
    return out


class AtDepths:
    """Halts each row at a given step."""

    def __init__(self, depths: Tensor) -> None:
        self.depths = depths

    def init(self, x0: Tensor) -> Tensor:
        return self.depths.reshape(x0.shape[:-1])

    def update(self, state: Tensor, step: object) -> tuple[Tensor, object]:
        from haltkit.protocol import LoopStep, Verdict

        assert isinstance(step, LoopStep)
        return state, Verdict(state.double(), state <= step.k)


@torch.no_grad()
def test_both_executions_are_the_semantics_written_out() -> None:
    model = tiny()
    inputs = make_task("chase", SMALL).test_sets(3, 1)["chains"].inputs
    depths = torch.randint(1, 6, inputs.shape[:2], generator=torch.Generator().manual_seed(3))
    expected = by_hand(model, inputs, depths)
    e = model.embed(inputs)
    for body, execution in ((model.masked_body(e), "masked"), (model.compact_body(e), "compact")):
        result = run_loop(body, model.initial_state(e), AtDepths(depths), max_steps=8, execution=execution)
        assert torch.equal(result.steps, depths)
        torch.testing.assert_close(result.x, expected, rtol=0, atol=1e-12)


@given(spec=st.sampled_from(POLICIES), seed=st.integers(0, 99), count=st.integers(1, 5), padded=st.booleans())
@settings(max_examples=40)
def test_masked_and_compact_execution_are_the_same_function(spec: str, seed: int, count: int, padded: bool) -> None:
    model = tiny()
    inputs = make_task("chase", SMALL).test_sets(count, seed)["chains"].inputs
    rows = None
    if padded:
        lengths = torch.randint(1, inputs.shape[1] + 1, (count, 1), generator=torch.Generator().manual_seed(seed))
        rows = torch.arange(inputs.shape[1]) < lengths
    masked = model.forward_adaptive(inputs, spec, rows=rows, max_loops=12)
    compact = model.forward_adaptive(inputs, spec, rows=rows, max_loops=12, execution="compact")
    assert torch.equal(masked.steps[LOOP], compact.steps[LOOP])
    assert torch.equal(masked.outcome[LOOP], compact.outcome[LOOP])
    real = slice(None) if rows is None else rows
    torch.testing.assert_close(masked.logits[real], compact.logits[real], rtol=0, atol=1e-10)


@torch.no_grad()
def test_padding_is_never_seen() -> None:
    model = tiny()
    inputs = make_task("chase", SMALL).test_sets(1, 5)["chains"].inputs
    alone = model.forward_adaptive(inputs, "norm:tau=0.5", max_loops=10)
    padded = torch.cat([inputs, inputs[:, :3]], 1)
    rows = torch.arange(padded.shape[1])[None] < inputs.shape[1]
    for execution in ("masked", "compact"):
        out = model.forward_adaptive(padded, "norm:tau=0.5", rows=rows, max_loops=10, execution=execution)
        torch.testing.assert_close(out.logits[rows], alone.logits[0], rtol=0, atol=1e-12)
        assert torch.equal(out.steps[LOOP][rows], alone.steps[LOOP][0])
    torch.testing.assert_close(model(padded, 4, rows)[rows], model(inputs, 4)[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_row_that_is_not_finite_is_hidden_from_the_others_in_every_execution() -> None:
    model = tiny()
    inputs = make_task("chase", SMALL).test_sets(2, 6)["chains"].inputs
    e = model.embed(inputs)
    e[0, 2] = torch.inf
    results = [
        run_loop(body, model.initial_state(e), policy("fixed:steps=4"), execution=execution)
        for body, execution in ((model.masked_body(e), "masked"), (model.compact_body(e), "compact"))
    ]
    rows = torch.ones(inputs.shape[:2], dtype=torch.bool)
    rows[0, 2] = False
    without = run_loop(
        model.masked_body(model.embed(inputs), rows), model.initial_state(e), policy("fixed:steps=4"), rows=rows
    )
    for result in results:
        assert bool(result.x.isfinite().all())
        assert int(result.outcome[0, 2]) == 3
        torch.testing.assert_close(result.x[rows], without.x[rows], rtol=0, atol=1e-12)


def run_config(**train: object) -> ReasonerConfig:
    config = ReasonerConfig("chase", dict(SMALL), LayerConfig(d_model=16, n_head=2), RateConfig(warmup_steps=2))
    return replace(
        config,
        train=replace(RecipeConfig(max_steps=12, save_every=5, log_every=3, examine_every=2, level_steps=2), **train),
    )


def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path) -> None:
    config = run_config(mastered=0.0)
    assert train_reasoner(config, tmp_path / "whole")
    stops = iter([False] * 6 + [True])
    assert not train_reasoner(config, tmp_path / "parts", should_stop=lambda: next(stops))
    assert train_reasoner(config, tmp_path / "parts", resume=True)
    for name in ("checkpoint/state.safetensors", "final/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    trained = [json.loads((tmp_path / run / "final/config.json").read_text())["trained"] for run in ("whole", "parts")]
    assert {**trained[0], "seconds": 0} == {**trained[1], "seconds": 0}
    assert trained[0]["depth"] == 3  # nothing had to be mastered


def test_training_learns_and_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    events: list[dict[str, float]] = []
    train_reasoner(run_config(max_steps=60, precision="float32"), tmp_path / "run", on_event=events.append)
    assert torch.equal(before, torch.random.get_rng_state())
    assert [event["step"] for event in events] == list(range(2, 60, 3))
    assert sum(e["loss"] for e in events[-5:]) < 0.8 * sum(e["loss"] for e in events[:5])
    assert events[-1]["seconds_left"] == 0


def test_folders_that_cannot_be_trained_in_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no checkpoint"):
        train_reasoner(run_config(), tmp_path / "none", resume=True)
    train_reasoner(run_config(max_steps=1), tmp_path / "run")
    with pytest.raises(RunError, match="a run already"):
        train_reasoner(run_config(), tmp_path / "run")
    wider = replace(run_config(), model=LayerConfig(d_model=32, n_head=2))
    with pytest.raises(RunError, match="does not fit its config"):
        train_reasoner(wider, tmp_path / "run", resume=True)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"step": "two"}', '{"step": -1}', '{"level": 99}', '{"more": 1}'])
def test_damaged_progress_is_refused(tmp_path: Path, damage: str) -> None:
    train_reasoner(run_config(max_steps=1), tmp_path)
    (tmp_path / "checkpoint/progress.json").write_text(damage)
    with pytest.raises(RunError, match="does not fit its config"):
        train_reasoner(run_config(max_steps=2), tmp_path, resume=True)


@given(step=st.integers(0, 99))
def test_the_rate_rises_holds_and_falls(step: int) -> None:
    rate = RateConfig(lr=1.0, warmup_steps=10, decay_share=0.2, min_lr_ratio=0.05)
    expected = min((step + 1) / 10, 1.0, max(0.05, (100 - step) / 20))
    assert learning_rate(step, 100, rate) == pytest.approx(expected)


def test_checkpoints_come_back_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    model = tiny().float()
    save_reasoner(tmp_path, model.state_dict(), run_config(), {"steps": 1})
    loaded = load_reasoner(tmp_path)
    assert loaded.trained == {"steps": 1}
    assert loaded.task == make_task("chase", SMALL)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.model.state_dict()[name])
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "looped_gpt"}, "not a reasoner"),
        ({"model_type": "haltkit-riddles"}, "unknown task 'riddles'"),
        ({"model": {**config["model"], "d_model": 32}}, "do not match the config"),
        ({"model": {**config["model"], "task": {"nodes": 99}}}, "must hold"),
        ({"model": {**config["model"], "task": 3}}, "task=3: dict expected"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=message):
            load_reasoner(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_reasoner(tmp_path / "nowhere")


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_shipped_configs_load(name: str) -> None:
    config = load_reasoner_config(name)
    task = make_task(config.task, config.settings)
    assert task.name == config.task == name.partition("-")[0]


def test_bad_configs_are_refused() -> None:
    with pytest.raises(ConfigError, match="shipped with haltkit: chase"):
        load_reasoner_config("chess")
    for values, message in (
        ({}, "says which task"),
        ({"task": "chase", "settings": 3}, "a mapping"),
        ({"task": "chase", "model": {"d_model": 10, "n_head": 4}}, "not a multiple"),
        ({"task": "chase", "train": {"max_stepz": 4}}, "did you mean max_steps"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_from_dict(values)
    with pytest.raises(ConfigError, match="there is no module"):
        make_task("no.such.module")


@torch.no_grad()
def test_measures_are_what_they_say() -> None:
    model = tiny()
    batch = make_task("chase", SMALL).test_sets(5, 2)["chains"]
    predicted = predictions(model, batch, 6, chunk=2)
    for k in (1, 4, 6):
        assert torch.equal(predicted[k - 1], model(batch.inputs, k).argmax(-1))
    found = curve(predicted, batch)
    assert found.agreement[-1] == found.sequences_agree[-1] == 1
    assert found.rows[3] == pytest.approx(float((predicted[3] == batch.labels)[batch.asked].double().mean()))
    settled = settled_after(predicted)
    for b in range(5):
        for t in range(predicted.shape[2]):
            k = int(settled[b, t])
            assert (predicted[k - 1 :, b, t] == predicted[-1, b, t]).all()
            assert k == 1 or predicted[k - 2, b, t] != predicted[-1, b, t]
    assert fewest_steps([0.1, 0.9, 0.5, 0.9, 1.0], 0.9) == 4
    assert fewest_steps([0.1, 0.2], 0.9) is None


def test_inputs_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, T, 3\)"):
        tiny().embed(torch.zeros(1, 4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="do not fit the model's 16 positions"):
        tiny().embed(torch.zeros(1, 17, 3, dtype=torch.int64))


def test_measurement_judges_policies_as_the_loop_does() -> None:
    model = tiny()
    batch = make_task("chase", SMALL).test_sets(3, 4)["chains"]
    points = frontier(model, batch, ["norm", "accel"], 8, taus=5)
    for point in (points["norm"][2], points["accel"][2]):
        # In a batch whose rows halt together nothing differs from recorded states: one sequence, halted as one.
        recorded = frontier(model, batch[:1], [point.policy.partition(":")[0]], 8, granularity="sequence", taus=4)
        for one in next(iter(recorded.values())):
            live = model.forward_adaptive(batch.inputs[:1], f"{one.policy},granularity=sequence,pool=max", max_loops=8)
            assert abs(float(live.steps[LOOP].double().mean()) - one.steps) <= 1  # tau is written with four digits
    found = measure(model, batch, 6, recorded=2)
    assert set(found["fixed"]) == {"0.995", "0.999"}
    assert sum(part["rows"] for part in found["by_needed"].values()) == found["rows"] == int(batch.asked.sum())
    json.dumps(found, allow_nan=False)


def test_steps_by_need_are_those_of_the_rows_that_need_them() -> None:
    model, batch = tiny(), make_task("chase", SMALL).test_sets(3, 4)["chains"]
    found = steps_by_need(model, batch, "norm:tau=0.3", max_loops=6, chunk=2)
    steps = model.forward_adaptive(batch.inputs, "norm:tau=0.3", max_loops=6).steps["loop"]
    assert set(found) == set(batch.needed[batch.asked].tolist())
    for need, (mean, low, high) in found.items():
        own = steps[batch.asked & (batch.needed == need)].double()
        assert mean == pytest.approx(float(own.mean()))
        assert float(own.min()) <= low <= high <= float(own.max())
