"""What saved steps are worth: counted operations and break-even against closed forms, on own and attached models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import haltkit
from haltkit.comparison.settings import candidates
from haltkit.comparison.speed import Speed, break_even, counted, speeds
from haltkit.driving import Pass
from haltkit.subject import Subject

WIDTH, CLASSES, STEPS = 8, 5, 12
SHAPE = (2, 3)


class Looped(nn.Module):
    """A loop of matrix products between a first and a last one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.core = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, steps: int = STEPS) -> Tensor:
        x = self.first(x)
        for _ in range(steps):
            x = self.core(x)
        out: Tensor = self.head(x)
        return out


SAMPLES = list(torch.randn(2, *SHAPE, WIDTH, generator=torch.Generator().manual_seed(1)))


def own() -> Subject:
    model = Looped().eval()

    def run(x: Tensor, depth: int | Mapping[str, int]) -> Tensor:
        out: Tensor = model(x, depth if isinstance(depth, int) else depth["loop"])
        return out

    def adaptive(x: Tensor, policies: Mapping[str, Any], budget: int) -> Pass:
        result = haltkit.run_loop(model.core, model.first(x), policies["loop"], max_steps=budget)
        return Pass(model.head(result.x), {"loop": result.steps}, {"loop": result.outcome})

    return Subject.of_modules(
        model,
        run,
        {"loop": "core"},
        adaptive=adaptive,
        samples=SAMPLES,
        full_depth=STEPS,
        loss=lambda out, _: out.mean(-1),
    )


def attached() -> Subject:
    return Subject.attached(
        Looped().eval(), samples=SAMPLES, loss=lambda out, _: out.mean(-1), loop=haltkit.Loop(["core"])
    )


def work(steps: float) -> float:
    return 2 * 6 * WIDTH * (WIDTH + steps * WIDTH + CLASSES)


@pytest.mark.parametrize("subject", [own(), attached()], ids=["own", "attached"])
def test_operations_are_those_of_the_layers_that_run(subject: Subject) -> None:
    with torch.no_grad():
        found = counted(subject, subject.samples[0])
    for steps in (1.0, 2.5, 12.0):
        assert found({"loop": steps}) == work(steps)


@pytest.mark.parametrize("subject", [own(), attached()], ids=["own", "attached"])
def test_a_policy_is_told_by_its_steps_and_what_they_allow(subject: Subject) -> None:
    wanted = candidates(["norm:tau=1e9,min_steps=2", "norm:tau=1e-30", "fixed:steps=3"], subject)
    rows = speeds(subject, wanted, repeats=2)
    assert [row["steps"]["loop"] for row in rows] == [2, STEPS, 3]
    assert [row["bound"] for row in rows] == [work(STEPS) / work(k) for k in (2, STEPS, 3)]
    for row in rows:
        assert row["realised"] == row["speedup"] / row["bound"]
        assert row["ms"] > 0
        assert row["full_ms"] == rows[0]["full_ms"]


def test_thresholds_are_put_at_the_target_and_passes_are_counted() -> None:
    told: list[tuple[int, int]] = []
    rows = speeds(own(), candidates("norm", own()), target=4, repeats=1, on_tick=lambda *at: told.append(at))
    assert len(rows) == 1
    assert 2 <= rows[0]["steps"]["loop"] <= 8
    assert told == [(i, 5) for i in range(1, 6)]  # full depth, one step, the policy, and two bare loops


def test_a_loop_without_products_has_no_bound() -> None:
    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = self.core(x) / 2
            return x.mean()

    subject = Subject.attached(Halving().eval(), samples=SAMPLES, loop=haltkit.Loop(["core"]))
    with pytest.raises(ValueError, match="region 'loop' .* no matrix product"):
        speeds(subject, candidates("norm:tau=0.1", subject), repeats=1)


def test_deciding_is_what_a_policy_takes_beyond_a_bare_loop() -> None:
    """2.5 steps lie half way between bare loops of 2 and of 3."""
    times = {"full": [10.0], "p": [3.0], "p below": [2.0], "p above": [3.0]}
    found = Speed("p", {"loop": 2.5}).result(times, lambda steps: 1 + steps["loop"], 9)
    assert found["bound"] == 10 / 3.5
    assert found["over_bare_loop"] == pytest.approx(3.0 / 2.5 - 1)
    assert found["realised"] == pytest.approx((10 / 3) / (10 / 3.5))


@given(st.floats(0.01, 5), st.floats(0.01, 5), st.floats(0, 1), st.integers(2, 50))
def test_at_break_even_a_policy_takes_as_long_as_full_depth(rest: float, step: float, over: float, full: int) -> None:
    def bare(steps: float) -> float:
        return rest + step * steps

    even = break_even(bare(1) / bare(full), over, full)
    if even is None:
        assert bare(1) * (1 + over) >= bare(full) * (1 - 1e-12)
    else:
        assert 1 <= even <= full
        assert bare(even) * (1 + over) == pytest.approx(bare(full))


def test_deciding_for_nothing_pays_at_once_and_a_loop_that_costs_nothing_never() -> None:
    assert break_even(0.1, -0.1, 32) == 32
    assert break_even(1.0, 0.0, 32) is None
    assert break_even(1.2, -0.5, 32) is None
