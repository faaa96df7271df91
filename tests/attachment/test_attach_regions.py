"""Several loops in one foreign model, each with its policy: nested, and one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from cases import WIDTH, hrm_model, state_of
from haltkit.attachment import errors
from haltkit.attachment.description import Loop
from haltkit.attachment.saved import load, save
from haltkit.specs import parse_choice
from standins import InARow, Nested, with_config

IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
FIRST, SECOND = 9, 7


LOOPS = {"core": Loop(("core",)), "refine": Loop(("refine",))}


INSIDE = {
    "low": Loop(("low",), initial=None, reset_on=("high",)),
    "high": Loop(("low", "high"), initial=None),
}


@pytest.fixture
def x() -> Tensor:
    sizes = torch.logspace(-3, 1, 4).view(1, 4, 1)  # rows that settle at different steps
    return sizes * torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize(("first", "second"), list(itertools.product((1, 4, FIRST), (1, 3, SECOND))))
def test_loops_in_a_row_each_halt_at_their_own_depth(x: Tensor, first: int, second: int) -> None:
    model = InARow(WIDTH).eval()
    with haltkit.attach(model, f"core=fixed:steps={first};refine=fixed:steps={second}", loops=LOOPS) as session:
        halted = model(x)
    assert torch.equal(halted, model(x, first, second))
    assert session.steps["core"].eq(first).all()
    assert session.steps["refine"].eq(second).all()
    assert (session.tally["core"].computed, session.tally["core"].skipped) == (first, FIRST - first)
    assert (session.computed, session.skipped) == (first + second, FIRST + SECOND - first - second)


@torch.no_grad()
@pytest.mark.parametrize(("high", "low"), list(itertools.product((1, 3, 5), (1, 2, 4))))
def test_nested_loops_each_halt_at_their_own_depth(x: Tensor, high: int, low: int) -> None:
    model = Nested(WIDTH).eval()
    policies = {"high": f"fixed:steps={high}", "low": haltkit.policy("fixed", steps=low)}
    with haltkit.attach(model, policies, loops=INSIDE) as session:
        halted = model(x)
    assert torch.equal(halted, model(x, high, low))
    assert session.regions == ("high", "low")  # the outer one first, in whichever order they were given
    assert session.tally["low"].loops == high
    assert (session.tally["high"].computed, session.tally["low"].computed) == (high, high * low)


@torch.no_grad()
def test_each_region_is_judged_by_its_own_policy_as_in_loops_of_haltkit(x: Tensor) -> None:
    model, specs = InARow(WIDTH).eval(), {"core": "norm:tau=0.3", "refine": "accel:tau=0.02,granularity=sequence"}
    recorder = haltkit.Recorder()
    with haltkit.attach(model, specs, loops=LOOPS, observer=recorder) as session:
        out = model(x)
    core, refine, expected = by_hand(model, x, specs)
    assert torch.equal(session.steps["core"], core)
    assert torch.equal(session.steps["refine"], refine)
    assert len(core.unique()) > 1
    assert list(session.trajectory.regions) == ["core", "refine"]
    assert torch.equal(out, expected)


def by_hand(model: InARow, x: Tensor, specs: dict[str, str]) -> tuple[Tensor, Tensor, Tensor]:
    """Both loops by hand: the state is what the linear map gives, and the tanh is glue between its calls."""
    core = haltkit.run_loop(_with_glue(model.core), x, haltkit.policy(specs["core"]), max_steps=FIRST)
    x = model.between(torch.tanh(core.x))
    refine = haltkit.run_loop(_with_glue(model.refine), x, haltkit.policy(specs["refine"]), max_steps=SECOND)
    return core.steps, refine.steps, torch.tanh(refine.x)


def _with_glue(module: nn.Module) -> Callable[[Tensor], Tensor]:
    taken = 0

    def body(h: Tensor) -> Tensor:
        nonlocal taken
        taken += 1
        out: Tensor = module(h if taken == 1 else torch.tanh(h))
        return out

    return body


@torch.no_grad()
def test_verify_is_exact_for_each_region_and_for_all_together(x: Tensor) -> None:
    model = Nested(WIDTH).eval()

    def run_at(k: dict[str, int]) -> Tensor:
        return model(x, **k)

    for k in ({"high": 2}, {"low": 2}, {"high": 3, "low": 1}, {"high": 2, "low": 2}):
        report = haltkit.verify(model, lambda: model(x), k, run_at, loops=INSIDE)
        assert report.ok
        assert (report.k, report.loops, report.neutral, report.halted) == (k, {"high": 5, "low": 4}, 0, 0)
        assert all(report.drift[name] == 0 for name in k)
    with haltkit.attach(model, "norm:tau=1e-9", loops=INSIDE) as session:
        assert session.verify(lambda: model(x), 2, lambda k: model(x, k, k)).ok
        with pytest.raises(ValueError, match="k=4: the model runs 4"):
            session.verify(lambda: model(x), 4)
        with pytest.raises(ValueError, match="middle"):
            session.verify(lambda: model(x), {"middle": 2})
        wrong: tuple[Any, ...] = ("2", 2.5, {})
        for k in wrong:
            with pytest.raises(ValueError, match="a number of steps is expected"):
                session.verify(lambda: model(x), k)
        assert session.computed == 0  # a check is not a use
    for k in wrong:
        with pytest.raises(ValueError, match="a number of steps is expected"):
            haltkit.verify(model, lambda: model(x), k, loops=INSIDE)


@torch.no_grad()
def test_both_loops_of_hrm_text_by_name() -> None:
    torch.manual_seed(0)
    model = hrm_model()
    run = lambda: model(IDS, use_cache=False).logits  # noqa: E731

    def run_at(k: dict[str, int]) -> Tensor:
        names = {"high": "H_cycles", "low": "L_cycles"}
        return with_config(model.config, run, **{names[name]: depth for name, depth in k.items()})

    for high, low in itertools.product((1, 2, 3), (1, 2)):
        with haltkit.attach(model, f"high=fixed:steps={high};low=fixed:steps={low}") as session:
            halted = run()
        assert torch.equal(halted, run_at({"high": high, "low": low}))
        assert (session.tally["high"].computed, session.tally["low"].computed) == (high, high * low)
    for k in ({"high": 2}, {"low": 1}, {"high": 2, "low": 1}):
        report = haltkit.verify(model, run, k, run_at)
        assert (report.neutral, report.halted, report.ok) == (0, 0, True)
    with haltkit.attach(model, "low=fixed:steps=2") as session:  # the other runs as it is
        halted = run()
    assert torch.equal(halted, run_at({"low": 2}))
    assert session.regions == ("low",)


def test_regions_that_are_not_there_are_named() -> None:
    model = InARow(WIDTH).eval()
    before = state_of(model)
    for policy in ("core=norm:tau=1;middle=norm:tau=1", {"core": "norm:tau=1"}, {"loop": "norm:tau=1"}):
        with pytest.raises(ValueError, match="core, refine"):
            haltkit.attach(model, policy, loops=LOOPS)
    with pytest.raises(ValueError, match="regions are loop"):
        haltkit.attach(model, "core=norm:tau=1", body=["core"])
    with pytest.raises(errors.UnknownModule, match="'middle'"):
        haltkit.attach(model, "norm:tau=1", loops={**LOOPS, "middle": Loop(("middle",))})
    with pytest.raises(ValueError, match="they are one loop"):
        haltkit.attach(model, "norm:tau=1", loops={"a": Loop(("core",)), "b": Loop(("between", "core"))})
    with pytest.raises(ValueError, match="at least one region"):
        haltkit.attach(model, "norm:tau=1", loops={})
    with pytest.raises(ValueError, match="a name is made of"):
        haltkit.attach(model, "norm:tau=1", loops={"a;b": Loop(("core",))})
    with pytest.raises(ValueError, match="readouts for regions middle"):
        haltkit.attach(model, "norm:tau=1", loops=LOOPS, readout={"middle": model.core})
    assert state_of(model) == before


@torch.no_grad()
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_all_regions_are_taken_back(x: Tensor, error: type[BaseException] | None) -> None:
    model = Nested(WIDTH).eval()
    before, plain = state_of(model), model(x)
    broken = [error]

    def fail(*_: Any) -> None:
        if broken[0] is not None:
            raise broken[0]

    hook = model.high.register_forward_hook(fail)
    try:
        with haltkit.attach(model, "fixed:steps=2", loops=INSIDE):
            model(x)
    except (ValueError, KeyboardInterrupt):
        pass
    hook.remove()
    assert state_of(model) == before
    assert torch.equal(model(x), plain)


@torch.no_grad()
def test_observing_and_recording_nested_loops_keeps_the_newest_turn_of_the_inner_one(x: Tensor) -> None:
    model, recorder = Nested(WIDTH).eval(), haltkit.Recorder()
    seen: dict[str, list[Tensor]] = {"low": [], "high": []}
    hooks = [
        getattr(model, name).register_forward_hook(lambda _m, _a, out, name=name: seen[name].append(out))
        for name in seen
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    for policy in (None, "fixed:steps=1000"):
        with haltkit.attach(model, policy, loops=INSIDE, observer=recorder) as session:
            model(x)
            model(x)
        assert {name: int(steps.max()) for name, steps in session.steps.items()} == {"high": 5, "low": 4}
        for name, count in (("low", 4), ("high", 5)):
            states = session.trajectory[name].states
            assert states is not None
            assert torch.equal(states[1:], torch.stack(seen[name][-count:]))


@torch.no_grad()
def test_a_saved_choice_holds_several_loops(x: Tensor, tmp_path: Path) -> None:
    model, spec = InARow(WIDTH).eval(), "core=fixed:steps=3;refine=fixed:steps=2"
    save(tmp_path / "choice.yaml", spec, LOOPS)
    card, loops = load(tmp_path / "choice.yaml")
    assert (card.choice, loops) == (parse_choice(spec), LOOPS)
    with haltkit.attach(model, tmp_path / "choice.yaml"):
        halted = model(x)
    assert torch.equal(halted, model(x, 3, 2))
