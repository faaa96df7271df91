"""The loop: budget, outcomes, what is kept, rows that stop being finite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import haltkit
from haltkit import Outcome, parts, signals
from haltkit.loop import ChangedInPlace
from haltkit.policies import Fixed, Stable, StepNorm
from haltkit.recording.recorder import Recorder
from haltkit.recording.replay import scores
from haltkit.wrappers import AllOf, AnyOf, CheckEvery, MinSteps, Patience
from maps import readout, wiggle

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
    with pytest.raises(ValueError, match="max_steps=0"):
        haltkit.run_loop(halve, X0, policy, max_steps=0)
    with pytest.raises(ValueError, match="rows has shape"):
        haltkit.run_loop(halve, X0, policy, rows=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="turned a state of shape"):
        haltkit.run_loop(lambda x: x[:1], X0, policy)
    with pytest.raises(ValueError, match="allowed are"):
        haltkit.run_loop(halve, X0, policy, keep="newest")


@dataclass(frozen=True)
class Answers:
    """A policy that answers as a function of the step says."""

    answer: Callable[[haltkit.LoopStep], Any]

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: haltkit.LoopStep) -> tuple[None, Any]:
        return None, self.answer(step)


class Halved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.body(x / 2)
        return x


def attached(policy: Any, readout: Any, kv: Any = "refuse") -> None:
    with haltkit.attach(Halved(), policy, body=["body"], readout=readout, kv=kv) as session:
        session.model(X0)


def recorded(judged: Callable[..., object], policy: Any, readout: Any) -> None:
    recorder = Recorder()
    haltkit.run_loop(halve, X0, "fixed:steps=4", observer=recorder)
    judged(policy, recorder.trajectory["loop"], readout=readout)


MANY = torch.ones(2, parts.LARGE // 2)  # judged in parts
PATHS: dict[str, Callable[[Any, Any], object]] = {
    "masked": lambda policy, readout: haltkit.run_loop(halve, X0, policy, readout=readout),
    "compact": lambda policy, readout: haltkit.run_loop(halve, X0, policy, readout=readout, execution="compact"),
    "parts": lambda policy, readout: haltkit.run_loop(halve, MANY, policy, readout=readout),
    "queue": lambda policy, readout: list(haltkit.run_queue(halve, X0, policy, 2, readout=readout)),
    "attach": attached,
    "uniform": lambda policy, readout: attached(policy, readout, "uniform"),
    "replay": lambda policy, readout: recorded(haltkit.replay, policy, readout),
    "scores": lambda policy, readout: recorded(scores, policy, readout),
}
WRAPPED: dict[str, Callable[[Any], Any]] = {
    "bare": lambda policy: policy,
    "patience": lambda policy: Patience(policy, 2),
    "min_steps": lambda policy: MinSteps(policy, 1),
    "check_every": lambda policy: CheckEvery(policy, 1),
    "any": lambda policy: AnyOf((StepNorm(1.0), policy)),
    "all": lambda policy: AllOf((StepNorm(1.0), policy)),
}


def _never(step: haltkit.LoopStep, right: Tensor) -> Tensor:
    return step.step_norm < 0 if right else torch.zeros_like(step.step_norm)


BAD_ANSWERS: dict[str, Callable[[haltkit.LoopStep], Any]] = {
    "a float halt": lambda step: haltkit.Verdict(step.step_norm, (step.step_norm < 1).float()),
    "fields swapped": lambda step: haltkit.Verdict(step.step_norm < 1, step.step_norm),
    "one for all": lambda step: haltkit.Verdict(step.step_norm, (step.step_norm < 1).all()),
    "one score for all": lambda step: haltkit.Verdict(step.step_norm.mean(), step.step_norm < 1),
    "a plain tuple": lambda step: (step.step_norm, step.step_norm < 1),
    "numbers": lambda step: haltkit.Verdict(step.step_norm, cast(Tensor, True)),
    "nothing": lambda step: None,
    "a float halt later": lambda step: haltkit.Verdict(
        step.step_norm, _never(step, torch.as_tensor(step.k).max() == 1)
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("answer", BAD_ANSWERS)
def test_a_verdict_that_is_not_row_by_row_is_refused_wherever_it_is_given(path: str, answer: str) -> None:
    for wrapped in WRAPPED.values() if path == "masked" else [WRAPPED["bare"]]:
        with pytest.raises(ValueError, match=r"Answers( answers|\.update must)"):
            PATHS[path](wrapped(Answers(BAD_ANSWERS[answer])), None)


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
def test_logits_that_are_not_row_by_row_are_refused_wherever_they_are_read(path: str) -> None:
    readouts: list[Any] = [lambda x: x.sum(), lambda x: x[:1], lambda x: x.mean(0, keepdim=True), lambda x: (x,)]
    for wrong in readouts:
        for spec in ("kl:tau=1e-3", "stable:times=2"):
            with pytest.raises(ValueError, match="the readout turned states"):
                PATHS[path](haltkit.policy(spec), wrong)


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
def test_a_policy_may_be_given_as_its_text(path: str) -> None:
    PATHS[path]("norm:tau=1.5", None)
    with pytest.raises(ValueError, match="is none"):
        PATHS[path](StepNorm if path.startswith(("attach", "uniform")) else None, None)  # None observes


@pytest.mark.parametrize("execution", ["masked", "compact"])
@pytest.mark.parametrize(
    ("x0", "token"),
    [
        (X0.to(torch.complex64), "complex64"),
        (X0.long(), "int64"),
        (X0[:, :0], "D >= 1"),
        (torch.tensor(1.0), "D >= 1"),
        ([1.0, 2.0], "a list"),
    ],
    ids=["complex", "integers", "no width", "a number", "a list"],
)
def test_states_that_cannot_be_measured_are_refused(x0: Any, token: str, execution: Any) -> None:
    with pytest.raises(ValueError, match=token):
        haltkit.run_loop(lambda x: x, x0, "norm:tau=0.1", execution=execution)
    if isinstance(x0, Tensor):
        with pytest.raises(ValueError, match=token):
            list(haltkit.run_queue(lambda x: x, [x0], "norm:tau=0.1"))
    turned: list[Callable[[Tensor], Any]] = [lambda x: x * 1j, lambda x: x.long(), lambda x: (x,)]
    for body in turned:
        with pytest.raises(ValueError, match="the state of 'loop'"):
            haltkit.run_loop(body, X0, "norm:tau=0.1", execution=execution)


@pytest.mark.parametrize("value", ["3", 2.5, None, 10**30, -1, torch.tensor(2.5)], ids=str)
def test_counts_are_whole_numbers_in_range(value: Any) -> None:
    counted: list[tuple[str, Callable[[], object]]] = [
        ("max_steps", lambda: haltkit.run_loop(halve, X0, "norm:tau=1", max_steps=value)),
        ("max_steps", lambda: haltkit.run_queue(halve, X0, "norm:tau=1", max_steps=value)),
        ("slots", lambda: haltkit.run_queue(halve, X0, "norm:tau=1", value)),
        ("period", lambda: haltkit.Loop(["body"], period=value)),
        ("steps", lambda: Fixed(value)),
        ("times", lambda: Stable(value)),
        ("patience", lambda: Patience(StepNorm(1.0), value)),
        ("min_steps", lambda: MinSteps(StepNorm(1.0), value)),
        ("check_every", lambda: CheckEvery(StepNorm(1.0), value)),
    ]
    if value is not None:
        counted += [
            ("max_steps", lambda: haltkit.attach(Halved(), "norm:tau=1", body=["body"], max_steps=value)),
            ("ahead", lambda: haltkit.run_queue(halve, X0, "norm:tau=1", ahead=value)),
            ("budget", lambda: list(haltkit.run_queue(halve, [(X0, (), value)], "norm:tau=1"))),
        ]
    for name, call in counted:
        with pytest.raises(ValueError, match=f"{name}="):
            call()


@torch.no_grad()
@pytest.mark.parametrize(("x0", "token"), [(X0.to(torch.complex64), "complex64"), (X0[:, :0], "D >= 1")])
def test_states_that_cannot_be_measured_are_refused_in_a_model(x0: Tensor, token: str) -> None:
    model = Halved()
    with haltkit.attach(model, "speed:tau=0.1", body=["body"]), pytest.raises(ValueError, match=token):
        model(x0)


def test_a_budget_is_a_tensor_of_whole_numbers() -> None:
    bad: list[Any] = [torch.full((3,), 2.5), torch.ones(3, dtype=torch.bool), [2, 2, 2]]
    for budget in bad:
        with pytest.raises(ValueError, match="budget is"):
            haltkit.run_loop(halve, X0, "norm:tau=1", budget=budget)


IN_PLACE = {
    "mul_": lambda x: x.mul_(0.5),
    "iadd": lambda x: x.__iadd__(-0.5 * x),
    "out=x": lambda x: torch.mul(x, 0.5, out=x),
    "a view of it": lambda x: x.mul_(0.5)[:],
    "another tensor": lambda x: x.mul_(0.5) + 0.0,
    "its data": lambda x: x.data.mul_(0.5),
    "a row of it": lambda x: torch.cat([x[:1].mul_(0.5), x[1:] / 2]),
}


@pytest.mark.parametrize("execution", ["masked", "compact"])
@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_body_that_changes_its_state_in_place_is_refused(kind: str, execution: Any) -> None:
    with pytest.raises(ChangedInPlace, match=r"in place.*clone"):
        haltkit.run_loop(IN_PLACE[kind], X0.clone(), haltkit.policy("norm:tau=1e-2"), execution=execution)


def test_a_body_that_returns_its_own_buffer_at_every_step_is_refused() -> None:
    buffer = torch.empty_like(X0)
    with pytest.raises(ChangedInPlace):
        haltkit.run_loop(lambda x: torch.mul(x, 0.5, out=buffer), X0, haltkit.policy("norm:tau=1e-2"))


@pytest.mark.parametrize("execution", ["masked", "compact"])
@pytest.mark.parametrize("kind", IN_PLACE)
def test_in_inference_mode_where_no_versions_are_counted_an_in_place_body_is_right(kind: str, execution: Any) -> None:
    expected = haltkit.run_loop(halve, X0, haltkit.policy("norm:tau=1e-2"), max_steps=12, execution=execution)
    with torch.inference_mode():
        x0 = X0.clone()
        found = haltkit.run_loop(IN_PLACE[kind], x0, haltkit.policy("norm:tau=1e-2"), max_steps=12, execution=execution)
        assert torch.equal(found.steps, expected.steps)
        torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-15)


@pytest.mark.parametrize("body", [lambda x: x, lambda x: x[:], lambda x: x.view(3, 2), lambda x: x.detach()])
def test_a_body_that_returns_its_input_or_a_view_of_it_takes_a_step_of_zero(body: Any) -> None:
    result = haltkit.run_loop(body, X0, haltkit.policy("norm:tau=1e-2"))
    assert result.steps.tolist() == [1, 1, 1]
    assert torch.equal(result.x, X0)


def test_a_body_that_alternates_between_two_buffers_is_right() -> None:
    """Each state lives until the next one is judged, which is all that the loop asks."""
    buffers = [torch.empty_like(X0), torch.empty_like(X0)]
    count = 0

    def body(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return torch.mul(x, 0.5, out=buffers[count % 2])

    policy = haltkit.policy("all(norm:tau=1e-2|accel:tau=1e-2)")
    expected = haltkit.run_loop(halve, X0, policy, max_steps=20)
    assert torch.equal(haltkit.run_loop(body, X0, policy, max_steps=20).steps, expected.steps)


class Halving:
    """The least that a body needs for compact execution."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def step(self, x: Tensor, k: int, active: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return x / 2

    def select(self, kept: Tensor) -> None:
        self.sizes.append(-len(kept))


def test_a_compact_body_needs_step_and_select_only() -> None:
    x0 = 2.0 ** torch.arange(20).repeat(2, 1).T.double()
    body = Halving()
    result = haltkit.run_loop(body, x0, haltkit.policy("norm:tau=1"), execution="compact")
    assert torch.equal(result.steps, haltkit.run_loop(halve, x0, haltkit.policy("norm:tau=1")).steps)
    assert min(body.sizes) < 0


def test_a_body_with_half_of_the_guard_is_refused() -> None:
    class Probing(Halving):
        def finite_probe(self) -> Tensor | None:
            return None

    with pytest.raises(ValueError, match="needs both"):
        haltkit.run_loop(Probing(), X0, haltkit.policy("norm:tau=1"), execution="compact")


def test_a_freezing_body_is_told_which_rows_present_are_frozen() -> None:
    told: list[list[int] | None] = []

    class Freezing(Halving):
        def freeze(self, frozen: Tensor | None) -> None:
            told.append(None if frozen is None else frozen.tolist())

    haltkit.run_loop(Freezing(), X0, haltkit.policy("norm:tau=1.5"), execution="compact")
    assert told == [None, [2], [1, 2]]  # a handful is never retired, and the last to halt ends the loop


def test_a_step_knows_its_region_and_shares_one_softmax_per_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    real = signals.log_probabilities

    def counting(logits: Tensor, temperature: float = 1.0) -> Tensor:
        calls.append(temperature)
        return real(logits, temperature)

    monkeypatch.setattr(signals, "log_probabilities", counting)
    seen: list[str] = []

    class Named:
        def init(self, x0: Tensor) -> None:
            return None

        def update(self, state: None, step: haltkit.LoopStep) -> tuple[None, haltkit.Verdict]:
            seen.append(step.region)
            score = step.log_probabilities().amax(-1)
            return None, haltkit.Verdict(score, torch.zeros_like(score, dtype=torch.bool))

    x0 = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = (Named(), haltkit.policy("kl:tau=1e-9"), haltkit.policy("kl:tau=1e-9,temperature=2.0"))
    haltkit.run_loop(wiggle, x0, AnyOf(parts), max_steps=3, readout=readout, name="core")
    assert seen == ["core"] * 3
    assert calls == [1.0, 2.0] * 3


@pytest.mark.parametrize(
    "spec", ["norm:tau=0.3", "accel:tau=0.1", "accel-rel:tau=0.4", "all(norm:tau=0.3|speed:tau=0.1)"]
)
@pytest.mark.parametrize("execution", ["masked", "compact"])
@pytest.mark.parametrize("shape", [(50,), (3, 7, 5)])
def test_judging_in_parts_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, spec: str, execution: Any, shape: tuple[int, ...]
) -> None:
    x0 = torch.randn(*shape, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    budget = torch.randint(2, 12, shape, generator=torch.Generator().manual_seed(1))

    def poisoned(x: Tensor) -> Tensor:
        new = wiggle(x)
        return torch.where((x[..., :1] > 0.3) & (x[..., 1:2] > 0.3) & (new[..., :1] < 0.2), torch.nan, new)

    keys: dict[str, Any] = {"max_steps": 15, "budget": budget, "execution": execution}
    whole = haltkit.run_loop(poisoned, x0, haltkit.policy(spec), **keys)
    monkeypatch.setattr(parts, "LARGE", 1)
    monkeypatch.setattr(parts, "PART", 24)  # four rows
    found = haltkit.run_loop(poisoned, x0, haltkit.policy(spec), **keys)
    assert len(set(whole.outcome.flatten().tolist())) > 1
    assert torch.equal(whole.steps, found.steps)
    assert torch.equal(whole.outcome, found.outcome)
    assert torch.equal(whole.x, found.x)


def test_a_result_prints_its_rows_their_steps_and_their_outcomes_in_one_line() -> None:
    x0 = torch.tensor([[1.0], [64.0], [1.0]])
    norm, rows = haltkit.policy("norm:tau=0.1"), torch.tensor([True, True, False])
    result = haltkit.run_loop(lambda x: x / 2, x0, norm, max_steps=6, rows=rows)
    assert str(result) == "2 rows: 4 to 6 steps (mean 5.0); 1 CONVERGED, 1 BUDGET"
    assert str(haltkit.run_loop(lambda x: x / 2, x0[:0], norm)) == "no rows"
