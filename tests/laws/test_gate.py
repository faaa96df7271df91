"""``gate``: its rules on gates with known answers, where the gate is found, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import haltkit
from cases import write_gate
from haltkit.policies import Gate
from haltkit.protocol import Heads, LoopStep
from haltkit.recording.recorder import Recorder
from haltkit.specs import spec_of
from haltkit.weights import Weights, WeightsMisfit
from maps import readout, wiggle

seeds = st.integers(0, 2**31)


def constant(logit: float) -> Heads:
    return Heads(None, lambda x: torch.full_like(x[..., 0], logit))


def steps_of(spec: str, heads: Any, x0: Tensor | None = None, budget: int = 60) -> Tensor:
    x0 = torch.ones(1, 3, dtype=torch.float64) if x0 is None else x0
    return haltkit.run_loop(wiggle, x0, spec, max_steps=budget, readout=heads).steps


@given(st.floats(-3, 3), st.floats(0.02, 0.9))
def test_a_constant_gate_halts_where_the_closed_form_says(logit: float, tau: float) -> None:
    exits = 1 / (1 + math.exp(-logit))
    expected = {
        "probability": 1 if 1 - exits < tau else math.inf,
        "cumulative": math.log(tau) / math.log(1 - exits),
        "sum": (1 - tau) / exits,
    }
    for rule, at in expected.items():
        if rule != "probability" and abs(at - round(at)) < 1e-6:
            continue  # equality, where rounding decides
        steps = int(steps_of(f"gate:tau={tau},rule={rule}", constant(logit)))
        assert steps == min(60, at if math.isinf(at) else math.ceil(at))


@given(seeds, st.floats(0.05, 0.95))
def test_cumulative_is_the_first_step_at_which_the_exit_distribution_has_passed(seed: int, q: float) -> None:
    """The distribution written out as PonderNet and Ouro do, added up step by step."""
    x0 = 3 * torch.randn(7, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    steps = steps_of(f"gate:tau={1 - q},rule=cumulative", readout, x0, 20)
    for row in range(7):
        x, going, passed, expected = x0[row], 1.0, 0.0, 20
        for k in range(1, 21):
            x = wiggle(x)
            exits = float(torch.sigmoid(readout.gate(x)))
            passed += exits * going
            going *= 1 - exits
            if passed > q:
                expected = k
                break
        assert int(steps[row]) == expected


def test_a_head_that_is_above_zero_halts_at_one_half() -> None:
    gate = lambda x: x[..., 0] - 0.5  # noqa: E731
    x0 = torch.tensor([[0.2, 0.0, 0.0], [0.4, 0.0, 0.0]], dtype=torch.float64)
    result = haltkit.run_loop(lambda x: x + 0.1, x0, "gate:tau=0.5", max_steps=9, readout=Heads(None, gate))
    assert result.steps.tolist() == [4, 2]  # the first step above 0.5, past rounding at 0.5 itself


def test_a_gate_goes_wherever_a_readout_goes() -> None:
    """Recordings, a queue, compact execution and both heads in one policy."""
    x0 = 3 * torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spec = "any(gate:tau=0.2,rule=cumulative|margin:tau=0.02)"
    plain = steps_of(spec, readout, x0, 20)
    assert len(set(plain.tolist())) > 2
    compact = haltkit.run_loop(wiggle, x0, spec, max_steps=20, readout=readout, execution="compact")
    assert torch.equal(compact.steps, plain)
    found = {
        r.index: r.steps for r in haltkit.run_queue(wiggle, list(x0), spec, slots=3, max_steps=20, readout=readout)
    }
    assert [int(found[i]) for i in range(9)] == plain.tolist()
    recorder = Recorder()
    haltkit.run_loop(wiggle, x0, "fixed:steps=20", max_steps=20, observer=recorder)
    carried = haltkit.readout_of_recordings(readout, torch.nn.Linear(1, 1))
    assert torch.equal(haltkit.replay(spec, recorder.trajectory["loop"], readout=carried).steps, plain)


def test_each_head_is_read_at_most_once_a_step() -> None:
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        return lambda x: (calls.append(name), function(x))[1]

    heads = Heads(counted("logits", readout.logits), counted("gate", readout.gate))
    spec = "all(gate:tau=1e-9|gate:tau=1e-9,rule=sum|kl:tau=1e-30|margin:tau=1e-9)"
    x0 = torch.ones(2, 6, dtype=torch.float64)
    haltkit.run_loop(wiggle, x0, spec, max_steps=5, readout=heads)
    assert sorted(calls) == ["gate"] * 5 + ["logits"] * 5
    calls.clear()
    list(haltkit.run_queue(wiggle, list(x0), spec, slots=2, max_steps=5, readout=heads))
    assert sorted(calls) == ["gate"] * 5 + ["logits"] * 5


def test_a_fitted_gate_needs_no_head_and_is_another_policy_than_the_models_own() -> None:
    x = torch.randn(5, 6, dtype=torch.float64)
    path = write_gate(6)
    policy: Any = haltkit.policy(f"gate:tau=0.3,weights={path}")
    _, (score, halt) = policy.update(None, LoopStep(1, x, x, torch.ones(5, dtype=torch.bool)))
    known = Weights.load(path).tensors
    expected = torch.sigmoid(-(x @ known["loop/state"].double() + known["loop/bias"].double()))
    torch.testing.assert_close(score, expected)
    assert torch.equal(halt, score < 0.3)
    assert policy != Gate(0.3)
    for one in (policy, Gate(0.3, "sum")):
        assert spec_of(one).build() == one


@pytest.mark.parametrize("given", [None, readout.logits])
def test_a_gate_that_the_model_has_not_is_one_clear_line(given: Any) -> None:
    with pytest.raises(ValueError, match="a gate that the model has not") as caught:
        steps_of("gate:tau=0.5", given)
    assert "\n" not in str(caught.value)


def test_a_gate_without_logits_and_one_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="looks at logits"):
        steps_of("margin:tau=0.5", constant(0.0))
    with pytest.raises(ValueError, match="no logits"):
        constant(0.0)(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"one logit per row, \(1,\)"):
        steps_of("gate:tau=0.5", Heads(None, lambda x: x))
    with pytest.raises(ValueError, match=r"squeeze\(-1\)"):  # what a Linear(D, 1) gives
        steps_of("gate:tau=0.5", Heads(None, lambda x: x.sum(-1, keepdim=True)))


@pytest.mark.parametrize(
    ("spec", "message"), [("gate:tau=1.5", "probability"), ("gate:tau=0", "positive"), ("gate:tau=1,rule=x", "allowed")]
)
def test_an_impossible_gate_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        haltkit.policy(spec)
    with pytest.raises(ValueError, match="rule='never'"):
        Gate(0.5, "never")  # type: ignore[arg-type]


def test_weights_of_another_region_or_policy_are_refused(tmp_path: Path) -> None:
    weights = Weights({"core/state": torch.ones(3), "core/bias": torch.zeros(1)})
    with pytest.raises(WeightsMisfit, match=r"fitted for core, and this loop is 'loop'"):
        haltkit.run_loop(wiggle, torch.ones(1, 3), Gate(0.5, weights=weights))
    with pytest.raises(WeightsMisfit, match="gate's weights: 'core/step' is unknown"):
        Gate(0.5, weights=Weights({**weights.tensors, "core/step": torch.zeros(1)}))
