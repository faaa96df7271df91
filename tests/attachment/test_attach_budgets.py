"""Budgets of several loops: each one's own, by region, and one for all loops of a call together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from cases import hrm_model, state_of
from haltkit.attachment.description import Loop
from haltkit.attachment.errors import BatchNotFound
from standins import DrawnFromState, InARow, Nested, with_config

WIDTH, FIRST, SECOND, HIGH, LOW = 8, 9, 7, 5, 4
ROWS = {"core": Loop(("core",)), "refine": Loop(("refine",))}
NESTED = {"high": Loop(("low", "high"), initial=None), "low": Loop(("low",), initial=None, reset_on=("high",))}
NEVER = "fixed:steps=1000"
BUDGET = haltkit.Outcome.BUDGET


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def in_a_row() -> nn.Module:
    return InARow(WIDTH).double().eval()


def nested() -> nn.Module:
    return Nested(WIDTH).double().eval()


def by_hand(model: nn.Module, x: Tensor, lows: list[int]) -> Tensor:
    """The nested model, whose inner loop takes these numbers of steps."""
    z = torch.zeros_like(x)
    for low in lows:
        for _ in range(low):
            z = torch.tanh(model.low(z + x))
        x = torch.tanh(model.high(z + x))
    return x


@torch.no_grad()
@pytest.mark.parametrize("budgets", [{"core": 4}, {"refine": 2}, {"core": 3, "refine": 6}, {"core": 30}, {}], ids=str)
def test_each_region_stops_at_its_own_budget(x: Tensor, budgets: Mapping[str, int]) -> None:
    model = in_a_row()
    with haltkit.attach(model, NEVER, loops=ROWS, max_steps=budgets) as session:
        out = model(x)
    steps = {"core": min(FIRST, budgets.get("core", FIRST)), "refine": min(SECOND, budgets.get("refine", SECOND))}
    assert torch.equal(out, model(x, *steps.values()))
    assert {name: session.steps[name].unique().tolist() for name in steps} == {n: [k] for n, k in steps.items()}
    assert all(outcome.eq(BUDGET).all() for outcome in session.outcome.values())


@torch.no_grad()
@pytest.mark.parametrize(("high", "low"), list(itertools.product((1, 3), (1, 2, 9))))
def test_an_inner_loop_has_its_own_budget_in_every_turn(x: Tensor, high: int, low: int) -> None:
    model = nested()
    with haltkit.attach(model, NEVER, loops=NESTED, max_steps={"high": high, "low": low}) as session:
        out = model(x)
    assert torch.equal(out, model(x, high, min(low, LOW)))
    assert session.tally["low"].computed == high * min(low, LOW)


@torch.no_grad()
@pytest.mark.parametrize("total", range(2, 19))
def test_loops_in_a_row_keep_a_step_for_those_to_come(x: Tensor, total: int) -> None:
    model = in_a_row()
    with haltkit.attach(model, NEVER, loops=ROWS, total_steps=total) as session:
        out = model(x)
    first = min(FIRST, total - 1)
    second = min(SECOND, total - first)
    assert torch.equal(out, model(x, first, second))
    assert session.computed == first + second <= total
    assert session.steps["core"].eq(first).all()
    assert session.steps["refine"].eq(second).all()


def turns(total: int) -> list[int]:
    """Inner steps of each turn of the nested model: one step more only if there is room for what must run then."""
    lows: list[int] = []
    taken = 0
    while len(lows) < HIGH and (not lows or taken + 2 <= total):
        low = min(LOW, total - taken - 1)
        lows.append(low)
        taken += 1 + low
    return lows


@torch.no_grad()
@pytest.mark.parametrize("execution", ["masked", "compact"])
@pytest.mark.parametrize("total", range(2, 28))
def test_an_outer_step_and_those_inside_it_count_together(x: Tensor, total: int, execution: Any) -> None:
    model = nested()
    with haltkit.attach(model, NEVER, loops=NESTED, total_steps=total, execution=execution) as session:
        out = model(x)
    lows = turns(total)
    left = total < HIGH * (1 + LOW) and total % (1 + LOW) == 1  # no room for an outer step and one inside it
    assert session.computed == len(lows) + sum(lows) == min(total, HIGH * (1 + LOW)) - left
    assert torch.equal(out, by_hand(model, x, lows))
    assert session.steps["high"].eq(len(lows)).all()
    assert session.steps["low"].eq(lows[-1]).all()
    assert session.outcome["high"].eq(BUDGET).all()


@torch.no_grad()
@pytest.mark.parametrize("total", [2, 5, 8, 9, 12, 15])
@pytest.mark.parametrize("model", [in_a_row, nested])
def test_entries_spend_a_joint_budget_each_as_alone(x: Tensor, model: Any, total: int) -> None:
    loops = ROWS if model is in_a_row else NESTED
    model, policies = model(), dict(zip(loops, (DrawnFromState(7), DrawnFromState(5)), strict=True))
    x = torch.randn(12, 3, WIDTH, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    alone, steps, outcomes = [], dict[str, list[Tensor]](), dict[str, list[Tensor]]()
    for entry in x.split(1):
        with haltkit.attach(model, policies, loops=loops, total_steps=total) as session:
            alone.append(model(entry))
        assert session.computed <= total
        for name in loops:
            steps.setdefault(name, []).append(session.steps[name])
            outcomes.setdefault(name, []).append(session.outcome[name])
    with haltkit.attach(model, policies, loops=loops, total_steps=total, execution="compact") as session:
        for _ in range(3):
            torch.testing.assert_close(model(x), torch.cat(alone), rtol=0, atol=1e-12)
            for name in loops:
                assert torch.equal(session.steps[name], torch.cat(steps[name]))
                assert torch.equal(session.outcome[name], torch.cat(outcomes[name]))


@torch.no_grad()
def test_a_joint_budget_stops_entries_that_have_spent_theirs_and_no_others(x: Tensor) -> None:
    """The first entry's first loop ends early, so it has more left for the second."""

    class Early:
        def init(self, x0: Tensor) -> None:
            return None

        def update(self, state: None, step: haltkit.LoopStep) -> tuple[None, haltkit.Verdict]:
            halt = torch.zeros_like(step.x[..., 0], dtype=torch.bool)
            halt[0] = step.k >= 2
            return None, haltkit.Verdict((~halt).float(), halt)

    model = in_a_row()
    for execution in ("masked", "compact"):
        policies = {"core": Early(), "refine": NEVER}
        with haltkit.attach(model, policies, loops=ROWS, total_steps=8, execution=execution) as session:
            model(x)
        assert session.steps["core"][:, 0].tolist() == [2, 7, 7, 7, 7]
        assert session.steps["refine"][:, 0].tolist() == [6, 1, 1, 1, 1]


@torch.no_grad()
def test_each_call_of_the_model_has_the_whole_budget(x: Tensor) -> None:
    model = in_a_row()
    with haltkit.attach(model, NEVER, loops=ROWS, total_steps=6) as session:
        for _ in range(3):
            model(x)
    assert session.computed == 3 * 6


class Scopes(nn.Module):
    """Two loops, each in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = in_a_row(), in_a_row()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x, second=0), second=0)
        return out


@torch.no_grad()
def test_a_call_of_the_model_is_one_call_also_where_loops_have_scopes_of_their_own(x: Tensor) -> None:
    model = Scopes()
    loops = {"one": Loop(("one.core",), scope="one"), "two": Loop(("two.core",), scope="two")}
    before = state_of(model)
    with haltkit.attach(model, NEVER, loops=loops, total_steps=12) as session:
        model(x)
        assert {name: int(steps.max()) for name, steps in session.steps.items()} == {"one": 9, "two": 3}
        model.one(x)  # a call of a scope by itself is a call, too
        assert int(session.steps["one"].max()) == 9
    assert state_of(model) == before


@torch.no_grad()
def test_both_budgets_hold(x: Tensor) -> None:
    model = nested()
    with haltkit.attach(model, NEVER, loops=NESTED, max_steps={"low": 2}, total_steps=8) as session:
        out = model(x)
    assert torch.equal(out, by_hand(model, x, [2, 2, 1]))
    assert session.computed == 8


@torch.no_grad()
def test_a_joint_budget_on_hrm_text() -> None:
    torch.manual_seed(0)
    model = hrm_model()  # four turns of three steps and one
    ids = torch.randint(0, 50, (2, 7))
    run = lambda: model(ids, use_cache=False).logits  # noqa: E731
    for total, cycles in ((8, 2), (12, 3), (16, 4)):
        with haltkit.attach(model, f"high={NEVER};low={NEVER}", total_steps=total) as session:
            out = run()
        assert torch.equal(out, with_config(model.config, run, H_cycles=cycles))
        assert session.computed == total


@torch.no_grad()
def test_a_session_with_a_budget_verifies_deeper_halts(x: Tensor) -> None:
    model = nested()
    with haltkit.attach(model, NEVER, loops=NESTED, max_steps=1, total_steps=2) as session:
        report = session.verify(lambda: model(x), {"high": 3, "low": 2}, lambda k: model(x, **k))
    assert report.ok
    assert report.loops == {"high": HIGH, "low": LOW}


@torch.no_grad()
def test_loops_that_count_entries_otherwise_have_no_joint_budget(x: Tensor) -> None:
    class Folded(InARow):
        def forward(self, x: Tensor, first: int = FIRST, second: int = SECOND) -> Tensor:
            for _ in range(first):
                x = torch.tanh(self.core(x))
            x = x.flatten(0, 1)
            for _ in range(second):
                x = torch.tanh(self.refine(x))
            return x

    model = Folded(WIDTH).double()
    with (
        haltkit.attach(model, "core=norm:tau=0.1;refine=norm:tau=0.1", loops=ROWS, total_steps=8),
        pytest.raises(BatchNotFound, match="max_steps="),
    ):
        model(x)


@pytest.mark.parametrize(
    ("budgets", "token"),
    [
        ({"total_steps": 1}, "core, refine take at least 2"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"total_steps": 2.5}, "total_steps=2.5"),
        ({"max_steps": {"core": 0}}, r"max_steps\['core'\]=0"),
        ({"max_steps": {"middle": 3}}, "middle; the regions are core, refine"),
    ],
    ids=str,
)
def test_budgets_that_cannot_be_are_refused(budgets: dict[str, Any], token: str) -> None:
    model = in_a_row()
    before = state_of(model)
    with pytest.raises(ValueError, match=token):
        haltkit.attach(model, NEVER, loops=ROWS, **budgets)
    assert state_of(model) == before
