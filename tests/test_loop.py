"""The loop: budget, outcomes, what is kept, rows that stop being finite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from maps import readout, wiggle
from torch import Tensor

import haltkit
from haltkit import Outcome

X0 = torch.tensor([[8.0, 0.0], [4.0, 0.0], [1.0, 0.0]], dtype=torch.float64)


def halve(x: Tensor) -> Tensor:
    return x / 2


def test_each_row_halts_at_its_own_step_and_keeps_its_state() -> None:
    result = haltkit.run_loop(halve, X0, haltkit.policy("norm:tau=1.5"), max_steps=10)
    # d_k = x_0 / 2^k: below 1.5 at step 3 (1.0), 2 (1.0) and 1 (0.5).
    assert result.steps.tolist() == [3, 2, 1]
    assert result.x[:, 0].tolist() == [1.0, 1.0, 0.5]
    assert result.outcome.tolist() == [Outcome.CONVERGED] * 3


def test_previous_keeps_the_state_before_the_halt_unless_there_is_none() -> None:
    result = haltkit.run_loop(halve, X0, haltkit.policy("norm:tau=1.5"), max_steps=10, keep="previous")
    assert result.steps.tolist() == [3, 2, 1]
    assert result.x[:, 0].tolist() == [2.0, 2.0, 0.5]  # the last halted at step 1: x_0 is not an answer


def test_the_budget_ends_a_row_as_such_and_previous_does_not_apply() -> None:
    for keep in ("current", "previous"):
        result = haltkit.run_loop(halve, X0, haltkit.policy("norm:tau=0.6"), max_steps=2, keep=keep)
        assert result.steps.tolist() == [2, 2, 1]
        assert result.outcome.tolist() == [Outcome.BUDGET, Outcome.BUDGET, Outcome.CONVERGED]
        assert result.x[:2, 0].tolist() == [2.0, 1.0]


def test_the_loop_stops_calling_the_body_when_every_row_has_halted() -> None:
    calls = []

    def body(x: Tensor) -> Tensor:
        calls.append(1)
        return halve(x)

    haltkit.run_loop(body, X0, haltkit.policy("fixed:steps=3"), max_steps=10)
    assert len(calls) == 3


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "spec", ["norm:tau=1e-3", "accel:tau=1e-3", "kl:tau=1e-6", "accel-rel:tau=1e-3", "fixed:steps=9"]
)
def test_a_row_that_stops_being_finite_is_reported_and_leaves_the_others_alone(poison: float, spec: str) -> None:
    x0 = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    k = 0

    def body(x: Tensor) -> Tensor:
        nonlocal k
        k += 1
        new = wiggle(x)
        if k == 4:
            new[2, 1] = poison
        return new

    result = haltkit.run_loop(body, x0, haltkit.policy(spec), max_steps=30, readout=readout)
    clean = haltkit.run_loop(wiggle, x0, haltkit.policy(spec), max_steps=30, readout=readout)
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(result.steps[others], clean.steps[others])
    assert torch.equal(result.x[others], clean.x[others])
    assert int(result.outcome[2]) == Outcome.NONFINITE
    assert int(result.steps[2]) == 4
    last_finite = wiggle(wiggle(wiggle(x0)))[2]
    assert torch.equal(result.x[2], last_finite)


def test_rows_that_are_not_finite_at_the_start_or_all_at_once() -> None:
    x0 = torch.full((2, 3), torch.nan)
    result = haltkit.run_loop(lambda x: x, x0, haltkit.policy("norm:tau=1"))
    assert result.outcome.tolist() == [Outcome.NONFINITE] * 2
    assert result.steps.tolist() == [1, 1]


def test_an_overflowing_row_is_not_converged() -> None:
    x0 = torch.tensor([[1e30, 1e30], [1.0, 1.0]])
    result = haltkit.run_loop(lambda x: x * torch.tensor([[1e30], [0.5]]), x0, haltkit.policy("norm:tau=1e-3"))
    assert result.outcome.tolist() == [Outcome.NONFINITE, Outcome.CONVERGED]


@given(st.integers(0, 3), st.integers(0, 5), st.sampled_from([(), (4,), (2, 3), (2, 2, 2)]))
def test_any_shape_of_rows(seed: int, tau_exponent: int, shape: tuple[int, ...]) -> None:
    x0 = torch.randn(*shape, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    policy = haltkit.policy("accel", tau=10.0**-tau_exponent)
    result = haltkit.run_loop(wiggle, x0, policy, max_steps=9)
    flat = haltkit.run_loop(wiggle, x0.reshape(-1, 6), policy, max_steps=9)
    assert result.steps.shape == result.outcome.shape == torch.Size(shape)
    assert torch.equal(result.steps.flatten(), flat.steps)
    assert torch.equal(result.x.reshape(-1, 6), flat.x)


def test_the_loop_does_not_write_into_its_input() -> None:
    x0, copy = X0.clone(), X0.clone()
    haltkit.run_loop(halve, x0, haltkit.policy("norm:tau=1.5"))
    assert torch.equal(x0, copy)


def test_what_the_loop_refuses() -> None:
    policy = haltkit.policy("norm:tau=1")
    with pytest.raises(ValueError, match="at least 1 step"):
        haltkit.run_loop(halve, X0, policy, max_steps=0)
    with pytest.raises(ValueError, match="rows has shape"):
        haltkit.run_loop(halve, X0, policy, rows=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="turned a state of shape"):
        haltkit.run_loop(lambda x: x[:1], X0, policy)
    with pytest.raises(ValueError, match="allowed are"):
        haltkit.run_loop(halve, X0, policy, keep="newest")  # type: ignore[arg-type]
