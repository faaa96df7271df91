"""The bundled model, attached: its own executions; and the same depths from outside, by tape replay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import haltkit
from haltkit.attachment import errors
from haltkit.attachment.description import Loop
from haltkit.card import Card
from haltkit.identity import Identity
from haltkit.models.checkpoint import build_model
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.reasoner.config import LayerConfig, build_reasoner
from haltkit.models.reasoner.task import make_task
from haltkit.models.training.config import load_config

BUDGET = 9


@pytest.fixture
def model() -> LoopedGPT:
    torch.manual_seed(0)
    return build_model(load_config("tiny").model).eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_an_empty_batch_passes_through(model: LoopedGPT) -> None:
    for ids in (torch.zeros(0, 5, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)):
        with haltkit.attach(model, "norm:tau=3") as session:
            assert model(ids).shape == (*ids.shape, model.readout(torch.zeros(model.d_model)).shape[-1])
        assert all(steps.shape == ids.shape for steps in session.steps.values())
        assert "empty" in session.summary()


@torch.no_grad()
@pytest.mark.parametrize("spec", ["norm:tau=3", "accel:tau=4", "kl:tau=1e-2", "norm-rel:tau=0.4,min_steps=3"])
def test_attached_from_outside_it_equals_its_native_policies_for_a_batch(
    model: LoopedGPT, tokens: Tensor, spec: str
) -> None:
    """Same steps, same logits: tape replay over each region's body against ``forward_adaptive``."""
    spec += ",granularity=batch"
    native = model.forward_adaptive(tokens, spec, max_loops=BUDGET)
    loops = {name: Loop((f"layers.{name}.body",)) for name in model.regions}
    with haltkit.attach(model, spec, loops=loops, readout=model.readout) as session:
        logits = model(tokens, BUDGET)
    assert torch.equal(logits, native.logits)
    for name in model.regions:
        assert torch.equal(session.steps[name], native.steps[name])
        assert torch.equal(session.outcome[name], native.outcome[name])
    assert min(int(steps.min()) for steps in native.steps.values()) < BUDGET


@torch.no_grad()
@pytest.mark.parametrize("spec", ["norm:tau=3", "2=norm:tau=3;3-4=accel:tau=4", "kl:tau=1e-2,granularity=sequence"])
def test_the_preset_takes_the_native_path_token_by_token(model: LoopedGPT, tokens: Tensor, spec: str) -> None:
    native = model.forward_adaptive(tokens, spec, max_loops={"2": 5, "3-4": BUDGET})
    with haltkit.attach(model, spec, observer=haltkit.Recorder()) as session:
        logits = model(tokens, {"2": 5, "3-4": BUDGET})
        assert torch.equal(logits, native.logits)
        assert all(torch.equal(session.steps[name], native.steps[name]) for name in model.regions)
        assert all(torch.equal(session.outcome[name], native.outcome[name]) for name in model.regions)
        assert set(session.trajectory.regions) == set(model.regions)
        assert "iterations" in session.summary()
    assert type(model) is LoopedGPT
    assert torch.equal(model(tokens, BUDGET), build_and_run(tokens))


def build_and_run(tokens: Tensor) -> Tensor:
    torch.manual_seed(0)
    return build_model(load_config("tiny").model).eval()(tokens, BUDGET)


@torch.no_grad()
def test_verify_on_the_native_path(model: LoopedGPT, tokens: Tensor) -> None:
    with haltkit.attach(model, "norm:tau=3") as session:
        report = session.verify(lambda: model(tokens, BUDGET), 4, lambda k: model(tokens, k))
        assert (report.k, report.loops) == (dict.fromkeys(model.regions, 4), dict.fromkeys(model.regions, BUDGET))
        assert report.neutral < 1e-5
        assert report.halted is not None
        assert report.halted < 1e-5
        with pytest.raises(ValueError, match="no loop has run"):
            _ = haltkit.attach(build_model(load_config("tiny").model), "norm:tau=1").steps


def test_what_the_native_path_refuses(model: LoopedGPT, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="region"):
        haltkit.attach(model, "9=norm:tau=1")
    assert type(model) is LoopedGPT
    with pytest.raises(ValueError, match=r"use haltkit\.record"):
        haltkit.attach(model, None)
    for how in ({"max_steps": 3}, {"execution": "compact"}, {"readout": model.readout}):
        with pytest.raises(ValueError, match=f"halts itself: leave out {next(iter(how))}"):
            haltkit.attach(model, "norm:tau=1", **how)
    with haltkit.attach(model, "norm:tau=1"):
        with pytest.raises(errors.GradientLost, match="no_grad"):
            model(tokens)
        with pytest.raises(errors.AlreadyAttached):
            haltkit.attach(model, "norm:tau=1")
    assert type(model) is LoopedGPT


@torch.no_grad()
def test_a_card_refuses_a_call_of_another_budget(model: LoopedGPT, tokens: Tensor, tmp_path: Path) -> None:
    Card("norm:tau=3", identity=Identity.of(model, BUDGET)).save(tmp_path / "card.yaml")
    with haltkit.attach(model, tmp_path / "card.yaml") as session:
        for loops in (BUDGET + 1, {"2": BUDGET, "3-4": 1}):
            with pytest.raises(ValueError, match="full depth"):
                model(tokens, loops)
        with pytest.raises(ValueError, match="no loop has run"):
            _ = session.steps
        model(tokens, BUDGET)
    model(tokens, BUDGET + 1)


@torch.no_grad()
def test_a_reasoner_halts_itself(tmp_path: Path) -> None:
    model = build_reasoner(make_task("chase", {}), LayerConfig(d_model=8, n_head=2)).eval()
    inputs = torch.randint(0, 2, (2, 5, len(model.columns)), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    native = model.forward_adaptive(inputs, "norm:tau=1.5", max_loops=BUDGET, rows=rows)
    Card("norm:tau=1.5", identity=Identity.of(model, BUDGET)).save(tmp_path / "card.yaml")
    with haltkit.attach(model, tmp_path / "card.yaml") as session:
        assert torch.equal(model(inputs, steps=BUDGET, rows=rows), native.logits)
        assert torch.equal(session.steps["loop"], native.steps["loop"])
        with pytest.raises(ValueError, match="full depth"):
            model(inputs, BUDGET - 1)
    assert session.steps["loop"].unique().numel() > 1
    with haltkit.attach(model, "norm:tau=1.5") as session:
        report = session.verify(lambda: model(inputs, BUDGET), 4, lambda k: model(inputs, k))
        assert report.neutral < 1e-5
        assert report.halted is not None
        assert report.halted < 1e-5
