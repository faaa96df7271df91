"""Properties that every registered policy must have, and what each answers on maps with known answers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import haltkit
from cases import SPECS as CASES
from cases import write_gate, write_probe
from haltkit.loop import LoopResult
from haltkit.protocol import LoopStep, Verdict, map_state
from haltkit.recording.recorder import Recorder
from haltkit.recording.replay import scores
from maps import MAPS, contraction, diverger, orbit, readout, rotation, slider, wiggle

SPECS = {
    **CASES,
    "probe": f"probe:tau=0.3,weights={write_probe(6)}",
    "gate fitted": f"gate:tau=0.3,weights={write_gate(6)}",
    "gate fitted, cumulative": f"gate:tau=0.1,rule=cumulative,weights={write_gate(6)}",
}
THRESHOLDS = [name for name in SPECS if "tau" in SPECS[name] and name not in ("any", "all")]
every_policy = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
seeds = st.integers(0, 2**31)


def start(seed: int, rows: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-2, 1, rows, dtype=torch.float64).unsqueeze(-1)
    return sizes * torch.randn(rows, 6, generator=generator, dtype=torch.float64)


def run(spec: str, x0: Tensor, **keys: Any) -> LoopResult:
    return haltkit.run_loop(wiggle, x0, haltkit.policy(spec), max_steps=20, readout=readout, **keys)


@every_policy
@given(seeds, st.randoms(use_true_random=False))
def test_permuting_rows_permutes_the_result(spec: str, seed: int, random: Any) -> None:
    x0 = start(seed)
    order = list(range(len(x0)))
    random.shuffle(order)
    straight, shuffled = run(spec, x0), run(spec, x0[order])
    assert torch.equal(straight.steps[order], shuffled.steps)
    assert torch.equal(straight.x[order], shuffled.x)
    assert torch.equal(straight.outcome[order], shuffled.outcome)


@every_policy
@given(seeds, st.integers(0, 6))
def test_a_row_does_not_depend_on_other_rows(spec: str, seed: int, row: int) -> None:
    x0 = start(seed)
    together, alone = run(spec, x0), run(spec, x0[row : row + 1])
    assert together.steps[row] == alone.steps[0]
    torch.testing.assert_close(together.x[row], alone.x[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", THRESHOLDS)
@given(seeds, st.floats(0.01, 1.0))
def test_a_smaller_tau_never_halts_earlier(name: str, seed: int, factor: float) -> None:
    from dataclasses import replace

    from haltkit.specs import parse_spec

    spec = parse_spec(SPECS[name])
    smaller = replace(spec, keys=tuple((k, str(float(v) * factor)) if k == "tau" else (k, v) for k, v in spec.keys))
    x0 = start(seed)
    assert (run(str(smaller), x0).steps >= run(str(spec), x0).steps).all()


@every_policy
@given(seeds)
def test_live_run_equals_replay_on_independent_rows(spec: str, seed: int) -> None:
    x0 = start(seed)
    recorder = Recorder()
    haltkit.run_loop(wiggle, x0, haltkit.policy("fixed:steps=20"), max_steps=20, observer=recorder, name="loop")
    replayed = haltkit.replay(haltkit.policy(spec), recorder.trajectory["loop"], readout=readout)
    live = run(spec, x0)
    assert torch.equal(live.steps, replayed.steps)
    assert torch.equal(live.x, replayed.x)
    assert torch.equal(live.outcome, replayed.outcome)


@every_policy
@given(seeds)
def test_one_policy_object_serves_two_interleaved_loops(spec: str, seed: int) -> None:
    policy = haltkit.policy(spec)
    starts = [start(seed), 3 * start(seed + 1)]

    def answers(interleaved: bool) -> list[list[Verdict]]:
        collected: list[list[Verdict]] = [[], []]
        x, state = list(starts), [policy.init(x0) for x0 in starts]
        order = [(k, i) for k in range(1, 9) for i in (0, 1)]
        if not interleaved:
            order = sorted(order, key=lambda pair: pair[1])
        for k, i in order:
            new = wiggle(x[i])
            live = torch.ones(new.shape[:-1], dtype=torch.bool)
            state[i], verdict = policy.update(state[i], LoopStep(k, new, x[i], live, readout))
            x[i] = new
            collected[i].append(verdict)
        return collected

    for one, other in zip(answers(True), answers(False), strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.score, b.score)
            assert torch.equal(a.halt, b.halt)


@every_policy
@given(seeds)
def test_a_state_can_be_gathered_in_the_middle_of_a_loop(spec: str, seed: int) -> None:
    """What an executor that drops finished rows relies on: the state's leading dimensions are the rows."""
    policy = haltkit.policy(spec)
    x = start(seed)
    state, chosen = policy.init(x), torch.tensor([4, 0, 6])
    live = torch.ones(7, dtype=torch.bool)
    for k in range(1, 6):
        new = wiggle(x)
        state, _ = policy.update(state, LoopStep(k, new, x, live, readout))
        x = new
    gathered = map_state(lambda t: t[chosen], state)
    new = wiggle(x)
    _, whole = policy.update(state, LoopStep(6, new, x, live, readout))
    _, part = policy.update(gathered, LoopStep(6, new[chosen], x[chosen], live[chosen], readout))
    torch.testing.assert_close(part.score, whole.score[chosen])
    assert torch.equal(part.halt, whole.halt[chosen])


@pytest.mark.parametrize(
    "name", ["kl", "kl tau=1e-3,min_p=0.1", "accel", "accel-rel", "speed", "entropy", "stable", "settle"]
)
def test_a_signal_that_is_not_defined_yet_is_infinite(name: str) -> None:
    recorder = Recorder()
    haltkit.run_loop(wiggle, start(0), haltkit.policy("fixed:steps=3"), observer=recorder, name="loop")
    seen = scores(haltkit.policy(SPECS[name]), recorder.trajectory["loop"], readout=readout)
    assert (seen[0] == math.inf).all()
    assert seen[1:].isfinite().all()


@pytest.mark.parametrize("case", MAPS, ids=lambda case: case.name)
def test_step_norm_and_acceleration_halt_where_the_closed_form_says(case: Any) -> None:
    tau, budget = 0.3, 12
    norm = haltkit.run_loop(case.step, case.start, haltkit.policy("norm", tau=tau), max_steps=budget)
    below = [k for k in range(1, budget + 1) if case.step_norm(k) < tau]
    assert int(norm.steps[0]) == (below[0] if below else budget)
    accel = haltkit.run_loop(case.step, case.start, haltkit.policy("accel", tau=tau), max_steps=budget)
    twice = [k for k in range(3, budget + 1) if case.acceleration(k) < tau and case.acceleration(k - 1) < tau]
    assert int(accel.steps[0]) == (twice[0] if twice else budget)


def test_what_fools_which_signal() -> None:
    def outcome(case: Any, spec: str) -> int:
        return int(haltkit.run_loop(case.step, case.start, haltkit.policy(spec), max_steps=30).outcome[0])

    converged, budget = haltkit.Outcome.CONVERGED, haltkit.Outcome.BUDGET
    assert outcome(slider(), "accel:tau=1e-3") == converged  # a drift fools acceleration
    assert outcome(slider(), "norm:tau=1e-3") == budget
    assert outcome(slider(), "all(accel:tau=1e-3|norm:tau=1e-3)") == budget
    assert outcome(rotation(), "speed:tau=1e-3") == converged  # a rotation fools the change of step size
    assert outcome(rotation(), "accel:tau=1e-3") == budget
    assert outcome(rotation(), "accel-rel:tau=1e-2") == budget
    assert outcome(orbit(), "accel:tau=1e-3") == budget
    assert outcome(orbit(), "speed:tau=1e-3") == converged
    # The spiral in: the normalized form still sees the rotation when everything else has stopped.
    spiral = rotation()
    shrink = lambda x: 0.5 * spiral.step(x)  # noqa: E731
    run = lambda spec: haltkit.run_loop(shrink, spiral.start, haltkit.policy(spec), max_steps=22)  # noqa: E731
    assert int(run("accel:tau=1e-5").outcome[0]) == converged
    assert int(run("accel-rel:tau=1e-2").outcome[0]) == budget
    assert int(run("accel-rel:tau=1e-2,denominator=state").outcome[0]) == budget  # the state shrinks just as fast


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("cosine", [1.0, 0.6, -0.3])
def test_settle_halts_where_the_limit_is_as_near_as_tau_says(rate: float, cosine: float) -> None:
    """Of a spiral about the origin the distance to the limit is the state's norm, however slowly it shrinks."""
    turn = rotation(cosine).step
    start = torch.tensor([[4.0, 3.0]], dtype=torch.float64)
    result = haltkit.run_loop(lambda x: rate * turn(x), start, haltkit.policy("settle:tau=0.1"), max_steps=400)
    first = math.ceil(math.log(0.1 / 5) / math.log(rate))  # 5 * rate^k < 0.1, then once more
    assert int(result.outcome[0]) == haltkit.Outcome.CONVERGED
    assert abs(int(result.steps[0]) - (first + 1)) <= 1
    if rate > 0.9 and cosine == 1:  # the step norm is deceived by small steps
        norm = haltkit.run_loop(lambda x: rate * turn(x), start, haltkit.policy("norm:tau=0.1"), max_steps=400)
        assert int(norm.steps[0]) < int(result.steps[0]) / 2


def test_settle_waits_for_no_orbit_and_believes_no_drift() -> None:
    def ended(case: Any) -> tuple[int, int]:
        result = haltkit.run_loop(case.step, case.start, haltkit.policy("settle:tau=1e-3"), max_steps=30)
        return int(result.outcome[0]), int(result.steps[0])

    converged, budget = haltkit.Outcome.CONVERGED, haltkit.Outcome.BUDGET
    assert ended(rotation()) == (converged, 10)  # nine steps span eight areas, which is seen twice
    assert ended(orbit()) == (converged, 9)  # to and fro on a line: eight steps of one size, twice
    assert ended(slider()) == (budget, 30)
    assert ended(diverger()) == (budget, 30)
    assert ended(rotation(math.cos(math.radians(5))))[0] == budget  # too slow a turn to be told from a slider
    assert ended(contraction())[0] == converged


def ellipse(rate: float, degrees: float, axis: float, phase: float) -> tuple[Any, Tensor]:
    """A turn along an ellipse of axes 1 and ``axis`` that shrinks by ``rate`` per step, and a start on it."""
    squeeze = torch.diag(torch.tensor([1.0, axis], dtype=torch.float64))
    matrix = rate * squeeze @ turn_of(degrees) @ squeeze.inverse()
    start = squeeze @ torch.tensor([math.cos(phase), math.sin(phase)], dtype=torch.float64)
    return lambda x: x @ matrix.T, start.unsqueeze(0)


def turn_of(degrees: float) -> Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


@given(st.floats(21, 175), st.floats(1, 2), st.floats(0, math.pi))
def test_settle_waits_for_no_orbit_whose_steps_are_of_several_sizes(degrees: float, axis: float, phase: float) -> None:
    step, start = ellipse(1.0, degrees, axis, phase)
    result = haltkit.run_loop(step, start, haltkit.policy("settle:tau=1e-3"), max_steps=40)
    assert int(result.outcome[0]) == haltkit.Outcome.CONVERGED
    assert int(result.steps[0]) >= 10


@given(st.floats(0.8, 0.97), st.floats(0, 175), st.floats(1, 2), st.floats(0, math.pi))
def test_settle_takes_no_spiral_for_an_orbit(rate: float, degrees: float, axis: float, phase: float) -> None:
    """However elliptic it is, and slow: the same steps as where nothing is taken for an orbit."""
    step, start = ellipse(rate, degrees, axis, phase)
    with_orbits, without = (
        haltkit.run_loop(step, start, haltkit.policy(f"settle:tau=1e-2{keys}"), max_steps=400)
        for keys in ("", ",slack=0")
    )
    assert torch.equal(with_orbits.steps, without.steps)


def test_settle_halts_on_a_limit_cycle_once_it_is_reached() -> None:
    """Rows that come from inside and from outside, and the one that begins farthest away last."""

    def step(x: Tensor) -> Tensor:
        return x * (1 + 0.3 * (1 - x.square().sum(-1, keepdim=True))) @ turn_of(57).T

    start = torch.tensor([[0.01, 0.0], [0.3, 0.0], [1.5, 0.1]], dtype=torch.float64)
    result = haltkit.run_loop(step, start, haltkit.policy("settle:tau=1e-3"), max_steps=100)
    assert (result.outcome == haltkit.Outcome.CONVERGED).all()
    assert ((result.x.norm(dim=-1) - 1).abs() < 1e-3).all()
    assert result.steps[0] > result.steps[1]
    assert result.steps.max() < 35


@pytest.mark.parametrize("degrees", [25, 90, 144])
def test_settle_sees_an_orbit_through_noise_and_a_slider_too(degrees: float) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = lambda x: 0.03 * torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
    policy = haltkit.policy("settle:tau=1e-4")
    turn, start = turn_of(degrees), torch.ones(200, 2, dtype=torch.float64)
    size = math.sqrt(2) * 2 * math.sin(math.radians(degrees) / 2)
    around = haltkit.run_loop(lambda x: x @ turn.T + size * noise(x), start, policy, max_steps=60)
    assert (around.outcome == haltkit.Outcome.CONVERGED).double().mean() > 0.9
    drifting = haltkit.run_loop(lambda x: x + 1 + noise(x), start, policy, max_steps=60)
    assert (drifting.outcome == haltkit.Outcome.BUDGET).all()


@given(seeds, st.integers(1, 25))
def test_settle_takes_a_walk_along_a_chain_for_no_orbit(seed: int, length: int) -> None:
    """From node to node in turning steps of one size, until the end of the chain: two steps later it has settled."""
    nodes = torch.randn(length + 1, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    nodes /= nodes.norm(dim=-1, keepdim=True)

    def step(x: Tensor) -> Tensor:
        at = int((nodes - x).norm(dim=-1).argmin())
        return nodes[min(at + 1, length)].unsqueeze(0)

    result = haltkit.run_loop(step, nodes[:1], haltkit.policy("settle:tau=1e-3"), max_steps=60)
    assert int(result.steps[0]) == length + 2


def algorithm_1(step: Any, x: Tensor, tau: float, budget: int) -> tuple[Tensor, int]:
    """Algorithm 1 of arXiv 2509.23314 to the letter, for one row: the state returned, and body evaluations."""
    x0, delta_prev, hits, evaluations = x, None, 0, 0
    for _ in range(budget):
        x1 = step(x0)
        evaluations += 1
        delta = x1 - x0
        if delta_prev is not None:
            if float((delta - delta_prev).norm()) < tau:
                hits += 1
                if hits == 2:
                    break
            else:
                hits = 0
        delta_prev = delta
        x0 = x1
    return x0, evaluations


@given(seeds, st.floats(1e-4, 1.0))
def test_accel_that_keeps_the_previous_state_is_algorithm_1(seed: int, tau: float) -> None:
    x0 = start(seed)
    result = haltkit.run_loop(wiggle, x0, haltkit.policy("accel", tau=tau), max_steps=20, keep="previous")
    for row in range(len(x0)):
        x, evaluations = algorithm_1(wiggle, x0[row], tau, 20)
        assert int(result.steps[row]) == evaluations
        torch.testing.assert_close(result.x[row], x, rtol=0, atol=1e-14)


def test_wrappers_change_decisions_and_never_measurements() -> None:
    recorder = Recorder()
    haltkit.run_loop(wiggle, start(3), haltkit.policy("fixed:steps=12"), observer=recorder, name="loop")
    trajectory = recorder.trajectory["loop"]
    plain = scores(haltkit.policy("norm:tau=0.1"), trajectory)
    for keys in ("patience=3", "min_steps=6", "check_every=4", "patience=2,min_steps=5,check_every=3"):
        assert torch.equal(plain, scores(haltkit.policy(f"norm:tau=0.1,{keys}"), trajectory))


@given(seeds, st.integers(1, 4), st.integers(0, 9), st.integers(1, 5))
def test_wrappers_decide_as_their_definition_says(seed: int, patience: int, min_steps: int, every: int) -> None:
    """Patience counts every measured step, also those before min_steps and between checks."""
    tau, budget = 0.1, 20
    recorder = Recorder()
    x0 = start(seed)
    haltkit.run_loop(wiggle, x0, haltkit.policy("fixed:steps=20"), max_steps=20, observer=recorder, name="loop")
    below = scores(haltkit.policy("norm", tau=tau), recorder.trajectory["loop"]) < tau
    spec = f"norm:tau={tau},patience={patience},min_steps={min_steps},check_every={every}"
    steps = run(spec, x0).steps
    for row in range(len(x0)):
        run_length, expected = 0, budget
        for k in range(1, budget + 1):
            run_length = run_length + 1 if below[k - 1, row] else 0
            if run_length >= patience and k >= min_steps and k % every == 0:
                expected = k
                break
        assert int(steps[row]) == expected


def test_pooling_decides_for_a_sequence_and_leaves_others_alone() -> None:
    x0 = torch.stack([start(1), 100 * start(2)])  # (2, T, D)
    for reduce in ("mean", "max"):
        policy = haltkit.policy(f"norm:tau=0.1,granularity=sequence,pool={reduce}")
        result = haltkit.run_loop(wiggle, x0, policy, max_steps=40)
        assert all(len(set(row.tolist())) == 1 for row in result.steps)
        assert result.steps[0, 0] < result.steps[1, 0]
        alone = haltkit.run_loop(wiggle, x0[:1], policy, max_steps=40)
        assert torch.equal(alone.steps[0], result.steps[0])
    whole = haltkit.run_loop(wiggle, x0, haltkit.policy("norm:tau=0.1,granularity=batch"), max_steps=40)
    assert len(set(whole.steps.flatten().tolist())) == 1


def test_pooling_over_a_sequence_leaves_padding_and_broken_rows_out() -> None:
    x0 = torch.stack([start(1)])
    policy = haltkit.policy("norm:tau=0.1,granularity=sequence,pool=max")
    clean = haltkit.run_loop(wiggle, x0[:, :5], policy, max_steps=40)
    rows = torch.ones(1, 7, dtype=torch.bool)
    rows[:, 5:] = False
    padded = x0.clone()
    padded[:, 5:] = 1e9
    result = haltkit.run_loop(wiggle, padded, policy, max_steps=40, rows=rows)
    assert torch.equal(result.steps[:, :5], clean.steps)
    assert result.steps[:, 5:].eq(0).all()
    assert result.outcome[:, 5:].eq(haltkit.Outcome.ABSENT).all()
    assert torch.equal(result.x[:, 5:], padded[:, 5:])
    broken = x0.clone()
    broken[:, 5:] = torch.nan
    result = haltkit.run_loop(wiggle, broken, policy, max_steps=40)
    assert torch.equal(result.steps[:, :5], clean.steps)
    assert result.outcome[:, 5:].eq(haltkit.Outcome.NONFINITE).all()


def test_pooling_needs_a_sequence_and_a_threshold() -> None:
    with pytest.raises(ValueError, match=r"states \(\.\.\., T, D\)"):
        haltkit.run_loop(wiggle, start(0), haltkit.policy("norm:tau=0.1,granularity=sequence"))
    with pytest.raises(ValueError, match="no tau"):
        haltkit.policy("cases:Nervous:granularity=batch")


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["norm", "norm-rel", "kl", "accel", "accel-rel", "speed", "cosine", "entropy", "margin"]
)
def test_an_impossible_threshold_is_refused(name: str, tau: float) -> None:
    with pytest.raises(ValueError, match="positive, finite"):
        haltkit.policy(name, tau=tau)


def test_the_readout_runs_at_most_once_a_step_and_only_if_asked() -> None:
    calls = []

    def counting(x: Tensor) -> Tensor:
        calls.append(1)
        return readout(x)

    haltkit.run_loop(wiggle, start(0), haltkit.policy("norm:tau=1e-9"), max_steps=5, readout=counting)
    assert not calls
    both = "all(kl:tau=1e-30|kl:tau=1e-30,direction=previous_current)"
    haltkit.run_loop(wiggle, start(0), haltkit.policy(both), max_steps=5, readout=counting)
    assert len(calls) == 5
    with pytest.raises(ValueError, match="readout"):
        haltkit.run_loop(wiggle, start(0), haltkit.policy("kl:tau=1e-3"))


def test_contraction_halts_one_step_later_with_each_halving_of_tau() -> None:
    case = contraction(0.5)
    steps = [
        int(haltkit.run_loop(case.step, case.start, haltkit.policy("norm", tau=2.0**-e), max_steps=60).steps[0])
        for e in range(1, 20)
    ]
    assert steps == list(range(steps[0], steps[0] + 19))


@every_policy
@given(seeds)
def test_a_step_number_for_each_row_means_the_same_as_one_number(spec: str, seed: int) -> None:
    """What a queue relies on: rows of one batch may be at different steps."""
    policy = haltkit.policy(spec)
    x = start(seed)
    live = torch.ones(7, dtype=torch.bool)
    whole = each = policy.init(x)
    for k in range(1, 9):
        new = wiggle(x)
        whole, one = policy.update(whole, LoopStep(k, new, x, live, readout))
        each, other = policy.update(each, LoopStep(torch.full((7,), k), new, x, live, readout))
        assert torch.equal(one.score, other.score)
        assert torch.equal(one.halt, other.halt)
        x = new


@given(seeds, st.integers(1, 6))
def test_stable_halts_when_the_top_prediction_has_not_changed_so_many_times(seed: int, times: int) -> None:
    x = start(seed)
    tops = []
    for _ in range(20):
        x = wiggle(x)
        tops.append(readout(x).argmax(-1))
    steps = run(f"stable:times={times}", start(seed)).steps
    for row in range(len(x)):
        seen = [int(top[row]) for top in tops]
        expected = next((k for k in range(times + 1, 21) if len(set(seen[k - times - 1 : k])) == 1), 20)
        assert int(steps[row]) == expected


@given(seeds, st.integers(1, 5), st.integers(0, 3))
def test_stable_halts_no_earlier_for_a_larger_count_and_its_score_says_when(seed: int, times: int, more: int) -> None:
    assert (
        run(f"stable:times={times + more}", start(seed)).steps >= run(f"stable:times={times}", start(seed)).steps
    ).all()
    judge: Any = haltkit.policy(f"stable:times={times}")
    x, state = start(seed), judge.init(start(seed))
    for k in range(1, 12):
        new = wiggle(x)
        state, (score, halt) = judge.update(state, LoopStep(k, new, x, torch.ones(7, dtype=torch.bool), readout))
        assert torch.equal(halt, score < judge.tau)
        x = new


def test_stable_can_decide_for_a_whole_sequence() -> None:
    """With pool=max the sequence halts when its last row has been unchanged so often."""
    x0 = torch.stack([start(1), start(2)])
    alone = haltkit.run_loop(wiggle, x0, haltkit.policy("stable:times=2"), max_steps=30, readout=readout)
    pooled = haltkit.policy("stable:times=2,granularity=sequence,pool=max")
    together = haltkit.run_loop(wiggle, x0, pooled, max_steps=30, readout=readout)
    assert (together.steps >= alone.steps.amax(-1, keepdim=True)).all()
    assert all(len(set(row.tolist())) == 1 for row in together.steps)


def test_what_fools_cosine_entropy_and_margin() -> None:
    def outcome(case: Any, spec: str, readout: Any = None) -> int:
        policy = haltkit.policy(spec)
        return int(haltkit.run_loop(case.step, case.start, policy, max_steps=30, readout=readout).outcome[0])

    converged, budget = haltkit.Outcome.CONVERGED, haltkit.Outcome.BUDGET
    assert outcome(diverger(), "cosine:tau=1e-9") == converged  # a state that only grows
    assert outcome(diverger(), "norm-rel:tau=1e-2") == budget
    assert outcome(rotation(), "cosine:tau=0.1") == budget
    swap = lambda x: torch.cat([x, -x], -1)  # noqa: E731
    assert outcome(orbit(), "entropy:tau=1e-9", swap) == converged  # two predictions in turn, each as sure
    assert outcome(orbit(), "kl:tau=1e-2", swap) == budget
    assert outcome(orbit(), "stable:times=1", swap) == budget
    assert outcome(orbit(), "margin:tau=0.9", swap) == converged  # sure at once, and never settled


def test_margin_can_halt_at_the_first_step() -> None:
    sure = lambda x: torch.nn.functional.pad(9 + 0 * x[..., :1], (0, 2))  # noqa: E731
    result = haltkit.run_loop(wiggle, start(0), haltkit.policy("margin:tau=0.01"), max_steps=9, readout=sure)
    assert result.steps.tolist() == [1] * 7


@pytest.mark.parametrize(
    "spec",
    [
        "stable:times=0",
        "kl:tau=1,min_p=1",
        "kl:tau=1,min_p=-0.1",
        "entropy:tau=1,temperature=0",
        "margin:tau=1,temperature=-1",
    ],
)
def test_an_impossible_setting_of_a_prediction_policy_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"times|min_p|temperature"):
        haltkit.policy(spec)
