"""Observing a foreign loop: forward hooks, the model's output to the bit, every state."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from cases import STEPS, WIDTH, Refiner, certificate_for, state_of
from haltkit.attachment import errors
from haltkit.attachment.description import Loop
from haltkit.attachment.saved import load, save
from haltkit.card import Card
from haltkit.identity import Identity
from haltkit.specs import parse_choice


@pytest.fixture
def model() -> Refiner:
    return Refiner().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1))


def test_observing_overrides_nothing_and_changes_nothing(model: Refiner, x: Tensor) -> None:
    before, plain = state_of(model), model(x)
    expected = [x]
    for _ in range(STEPS):
        expected.append(model.core(expected[-1]))
    with haltkit.attach(model, None, body=["core"], observer=haltkit.Recorder()) as session:
        assert type(model.core) is nn.Linear
        out = model(x)
        assert torch.equal(out, plain)
        assert out.requires_grad
        assert torch.equal(session.trajectory["loop"].states, torch.stack(expected))
        assert (session.steps["loop"] == STEPS).all()
        assert (session.outcome["loop"] == haltkit.Outcome.BUDGET).all()
        model(x, 3)  # a new call, a new trajectory
        assert (session.steps["loop"] == 3).all()
        assert "13 computed, 0 skipped" in session.summary()
    assert state_of(model) == before


@torch.no_grad()
def test_nested_roles_scopes_and_failures_are_followed(x: Tensor) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, fail: bool = False) -> Tensor:
            for _ in range(3):
                for _ in range(4):
                    x = self.inner(x)
                if fail:
                    raise RuntimeError
                x = self.outer(x)
            return x

    model = Nested()
    with (
        haltkit.attach(model, None, Loop(("inner",), reset_on=("outer",))) as inner,
        haltkit.attach(model, None, Loop(("inner", "outer"))) as outer,
        haltkit.attach(model, None, Loop(("inner",), period=2, reset_on=("outer",))) as pairs,
    ):
        with pytest.raises(RuntimeError):
            model(x, fail=True)
        model(x)
        assert (inner.steps["loop"] == 4).all()
        assert (outer.steps["loop"] == 3).all()
        assert (pairs.steps["loop"] == 2).all()
        assert inner.computed == 12
        results: list[Any] = []
        threads = [threading.Thread(target=lambda: results.append(model(x))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert inner.computed == 12 * 5


@torch.no_grad()
def test_what_observing_cannot_see_is_said(model: Refiner, x: Tensor) -> None:
    with pytest.raises(ValueError, match="hooks only see calls of forward"):
        haltkit.attach(model, None, body=["core"], scope=":rollout")
    with pytest.raises(ValueError, match="observer="), haltkit.attach(model, None, body=["core"]) as session:
        model(x)
        _ = session.trajectory
    compiled = Refiner().eval()
    compiled.core.compile(backend="eager")
    model.core.forward = lambda x: x
    with pytest.raises(errors.BodyOutsideScope, match="no hook saw"), haltkit.attach(model, None, body=["head"]):
        Refiner.forward(_Headless(model), x)
        model.head.__class__ = _Silent
        model(x)


class _Silent(nn.Linear):
    """Code that does not run hooks, as a graph compiled before they came."""

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


class _Headless:
    def __init__(self, model: Refiner) -> None:
        self.core, self.head, self.glue = model.core, nn.Identity(), None


@torch.no_grad()
def test_the_newest_loop_is_kept_without_being_asked_for(
    model: Refiner, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_on: list[Tensor] = []
    with haltkit.attach(model, "norm:tau=0.3", body=["core"]) as session:
        model.core.register_forward_hook(lambda _module, _args, output: handed_on.append(output))
        with pytest.raises(ValueError, match="no loop has run"):
            _ = session.trajectory
        model(2 * x)
        handed_on.clear()
        model(x)
    with haltkit.attach(model, "norm:tau=0.3", body=["core"], observer=(copying := haltkit.Recorder())):
        model(x)
    kept, copied = session.trajectory["loop"], copying.trajectory["loop"]
    assert torch.equal(kept.states, copied.states)
    assert torch.equal(kept.steps, copied.steps)
    assert len(kept.steps.unique()) > 1

    handed_on[0].add_(1)
    with pytest.raises(ValueError, match="wrote over a state"):
        _ = session.trajectory
    monkeypatch.setattr("haltkit.attachment.kept.MAX_BYTES", 3 * x.nbytes)
    with haltkit.attach(model, "norm:tau=0.3", body=["core"]) as session:
        model(x)
    with pytest.raises(ValueError, match="more than 0 MiB"):
        _ = session.trajectory
    with torch.inference_mode(), haltkit.attach(model, "norm:tau=0.3", body=["core"]) as session:
        model(x)
    with pytest.raises(ValueError, match="inference_mode"):
        _ = session.trajectory


@torch.no_grad()
def test_autocast_measures_in_float32_and_gives_what_the_model_gives(model: Refiner, x: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        for k in (1, 4):
            with haltkit.attach(model, f"fixed:steps={k}", body=["core"]):
                halted = model(x)
            assert halted.dtype == torch.bfloat16
            assert torch.equal(halted, model(x, k))
        scores: list[Tensor] = []

        class Watching:
            def init(self, x0: Tensor) -> None:
                return None

            def update(self, state: None, step: haltkit.LoopStep) -> tuple[None, haltkit.Verdict]:
                scores.append(step.step_norm)
                return None, haltkit.Verdict(step.step_norm, torch.zeros_like(step.step_norm, dtype=torch.bool))

        with haltkit.attach(model, Watching(), body=["core"]):
            model(x)
    assert all(s.dtype == torch.float32 for s in scores)


@torch.no_grad()
def test_a_saved_choice_is_loaded_by_attach(model: Refiner, x: Tensor, tmp_path: Path) -> None:
    loop = Loop(("core",), initial=None, carry=("core", 0), on_halt={"core": "replay"}, scope="")
    save(tmp_path / "choice.yaml", "norm:tau=0.3,granularity=batch", loop, about="from a test\non two lines")
    card, loops = load(tmp_path / "choice.yaml")
    assert (card.choice, loops) == (parse_choice("norm:tau=0.3,granularity=batch"), {"loop": loop})
    with haltkit.attach(model, "norm:tau=0.3,granularity=batch", loop) as session:
        expected = model(x), session.steps["loop"]
    with haltkit.attach(model, tmp_path / "choice.yaml") as session:
        assert torch.equal(model(x), expected[0])
        assert torch.equal(session.steps["loop"], expected[1])
    save(tmp_path / "preset.yaml", "norm:tau=0.3")
    with pytest.raises(errors.AttachError, match="no preset"):
        haltkit.attach(model, tmp_path / "preset.yaml")
    with pytest.raises(ValueError, match=r"functions \(initial\)"):
        save(tmp_path / "no.yaml", "norm:tau=1", Loop(("core",), initial=lambda a, k: a[0]))
    assert not (tmp_path / "no.yaml").exists()


@torch.no_grad()
def test_a_card_for_one_full_depth_is_refused_at_another_budget(model: Refiner, x: Tensor, tmp_path: Path) -> None:
    path, spec, loops = tmp_path / "card", "norm:tau=0.3", {"loop": {"body": ["core"]}}
    identity = Identity.of(model, 6)
    Card(spec, loops=loops, identity=identity).save(path)
    for budget in (5, 7, {"loop": 5}):
        with pytest.raises(ValueError, match="full depth"):
            haltkit.attach(model, path, max_steps=budget)
    for given in ({"max_steps": 6}, {"max_steps": {"loop": 6}}, {"max_steps": 6, "total_steps": 3}):
        with haltkit.attach(model, path, **given):
            model(x)
    with haltkit.attach(model, path):  # of its own, the model runs as deep as it is told
        with pytest.raises(ValueError, match=f"full depth {STEPS} instead of 6"):
            model(x)
        for depth in (5, 6):
            model(x, depth)
    Card(spec, loops=loops, identity=identity, certificate=certificate_for(spec)).save(path)
    with pytest.raises(ValueError, match="total_steps=3: the card's certificate"):
        haltkit.attach(model, path, max_steps=6, total_steps=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "'policy: SPEC'"),
        ("policy: 3", "'policy: SPEC'"),
        ("policy: norm:tau=1\nfoo: 2", "'policy: SPEC'"),
        ("policy: 'norm:tau=1'\nloop: {bodies: [a]}", "not known \\(bodies\\); allowed are body, state"),
        ("policy: 'norm:tau=1'\nloop: {period: 2}", "names no body"),
        ("a: [", "YAML"),
    ],
)
def test_a_file_that_is_not_a_choice_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="no file"):
        load(tmp_path / "none.yaml")
