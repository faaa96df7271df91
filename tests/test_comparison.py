"""The comparison engine on settings whose cost and quality are known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import haltkit
from haltkit.comparison import (
    Comparison,
    Observation,
    Row,
    Setting,
    compare,
    depth_label,
    findings,
    observed_taus,
    sweep_spread,
    within,
)
from haltkit.offline import scores
from haltkit.plots import plot_comparison
from haltkit.recorder import Recorder
from haltkit.registry import parse_spec_list, policy_for_regions
from haltkit.sweep import depth_settings, sweep_settings
from haltkit.trajectory import RegionTrajectory

SETTINGS = [
    Setting("fixed", "fixed:steps=8", loops=8),
    Setting("fixed", "fixed:steps=1", loops=1),
    Setting("norm", "norm:tau=0.1", 0.1),
]
COST = {"fixed:steps=8": 0.008, "fixed:steps=1": 0.001, "norm:tau=0.1": 0.003}
LOSS = {"fixed:steps=8": 2.0, "fixed:steps=1": 2.5, "norm:tau=0.1": 2.003}


NOW = [0.0]  # the clock of these tests: a real one would tell how busy the machine is


def run(setting: Setting, window: int) -> str:
    NOW[0] += COST[setting.spec]
    return setting.spec


def observe(setting: Setting, output: str, window: int) -> Observation:
    """Two sequences of four tokens over three classes; one token in eight of depth 1 has another top token."""
    logits = torch.tensor([2.0, 1.0, 0.0]).repeat(2, 4, 1)
    if output == "fixed:steps=1":
        logits[0, 0] = torch.tensor([1.0, 2.0, 0.0])
    wobble = torch.tensor([[0.001], [-0.001]]) * (window + 1) * (output == "norm:tau=0.1")
    losses = torch.full((2, 4), LOSS[output]) + wobble
    steps = {"4": torch.tensor([[3.0] * 4, [5.0] * 4])} if output == "norm:tau=0.1" else {}
    outcome = {"4": torch.tensor([[1] * 4, [2] * 4], dtype=torch.int8)} if steps else {}
    return Observation(logits, losses, steps, outcome)


@pytest.fixture(scope="module")
def result() -> Comparison:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("haltkit.comparison.settled", lambda: NOW[0])
        return compare(run, observe, SETTINGS, [0, 1, 2], timed=2, repeats=3)


def test_quality_is_what_was_observed(result: Comparison) -> None:
    full, one, norm = result.rows
    assert (result.tokens, result.sequences, result.timed_tokens) == (24, 6, 16)
    assert (full.ce, full.delta_ce, full.delta_ce_se, full.agreement, full.kl_to_full) == (2, 0, 0, 1, 0)
    assert full.ppl == pytest.approx(math.exp(2))
    assert (one.ce, one.delta_ce) == (2.5, 0.5)
    assert one.agreement == pytest.approx(7 / 8)
    p = torch.tensor([2.0, 1.0, 0.0]).softmax(0)
    q = torch.tensor([1.0, 2.0, 0.0]).softmax(0)
    assert one.kl_to_full == pytest.approx(float((p * (p / q).log()).sum()) / 8, rel=1e-5)
    # Deltas of the sequences: 0.003 +- 0.001, 0.002, 0.003.
    deltas = torch.tensor([0.004, 0.002, 0.005, 0.001, 0.006, 0.0], dtype=torch.float64)
    assert norm.delta_ce == pytest.approx(0.003, abs=1e-6)
    assert norm.delta_ce_se == pytest.approx(float(deltas.std()) / math.sqrt(6), rel=1e-3)
    assert norm.steps == {"4": 4.0}
    assert norm.outcomes == {"CONVERGED": 0.5, "BUDGET": 0.5, "NONFINITE": 0.0}


def test_time_is_wall_clock(result: Comparison) -> None:
    for row in result.rows:
        assert len(row.ms_repeats) == 3
        assert row.ms_per_token == pytest.approx(1e3 * COST[row.spec] / 8)
        assert row.ms_spread == (min(row.ms_repeats), max(row.ms_repeats))
    assert result.rows[0].speedup == 1
    assert result.rows[1].speedup == pytest.approx(8)


def test_the_conclusion_is_the_frontiers(result: Comparison) -> None:
    found = {(f.kind, f.level): f for f in findings(result.rows)}
    norm = found["ce", 0.01]
    assert norm.policy == "norm"
    assert norm.best is not None
    assert norm.fixed is not None
    assert norm.best.spec == "norm:tau=0.1"
    assert norm.fixed.spec == "fixed:steps=8"
    assert norm.verdict == "faster"
    assert found["ce", 0.001].best is None  # 0.003 above full depth
    assert found["ce", 0.001].verdict is None


def test_a_judgement_needs_two_standard_errors(result: Comparison) -> None:
    row = result.rows[2]

    def judge(delta: float, se: float) -> str:
        return within(replace(row, delta_ce=delta, delta_ce_se=se, kl_to_full=0.1), 0.01)

    assert judge(0.005, 0.0024) == "yes"
    assert judge(0.005, 0.0026) == "cannot tell"
    assert judge(0.02, 0.0049) == "no"
    assert judge(0.02, 0.0051) == "cannot tell"
    assert judge(-0.5, 0.2) == "yes"
    assert judge(0.0, math.inf) == "cannot tell"
    good = replace(row, agreement=0.97, agreement_se=0.009)
    assert within(good, 0.95, "agreement") == "yes"
    assert within(good, 0.96, "agreement") == "cannot tell"
    assert within(good, 0.99, "agreement") == "no"


def test_faster_means_in_every_repeat(result: Comparison) -> None:
    def verdict(mine: tuple[float, ...], fixed: tuple[float, ...]) -> str | None:
        rows = [
            replace(result.rows[0], ms_repeats=fixed, ms_per_token=sorted(fixed)[1]),
            replace(result.rows[0], policy="p", spec="p", ms_repeats=mine, ms_per_token=sorted(mine)[1]),
        ]
        return findings(rows)[0].verdict

    assert verdict((1, 1, 1), (2, 2, 2)) == "faster"
    assert verdict((3, 3, 3), (2, 2, 2)) == "slower"
    assert verdict((1, 1, 3), (2, 2, 2)) == "no clear difference"


def test_one_measurement_is_no_verdict_and_full_depth_is_within_itself(result: Comparison) -> None:
    rows = [
        replace(result.rows[0], ms_repeats=(2.0,), delta_ce_se=math.inf),
        replace(result.rows[0], policy="p", spec="p", ms_repeats=(1.0,), delta_ce_se=math.inf),
    ]
    assert within(rows[0], 0.001) == "yes"
    assert findings(rows)[0].verdict == "no clear difference"


def test_every_repeat_begins_at_another_setting() -> None:
    order: list[str] = []

    def noting(setting: Setting, window: int) -> str:
        order.append(setting.spec)
        return setting.spec

    compare(noting, observe, SETTINGS, [0], timed=1, repeats=3)
    first = [order[i] for i in (0, 3, 6)]
    assert len(set(first)) == 3


def test_spread_over_a_sweep(result: Comparison) -> None:
    assert sweep_spread(result.rows, "norm") is None
    rows: list[Row] = [replace(result.rows[2], ce=ce, tau=t) for ce, t in ((2.0, 0.1), (2.4, 1.0), (1.9, 0.01))]
    assert sweep_spread(rows, "norm") == pytest.approx(0.5)


@given(st.sampled_from(["norm", "accel", "norm-rel", "speed"]), st.integers(0, 100))
def test_observed_thresholds_halt_a_typical_row_at_about_their_target(name: str, seed: int) -> None:
    x0 = torch.randn(41, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    recorder = Recorder()
    body = lambda x: 0.7 * x  # noqa: E731
    haltkit.run_loop(body, x0, haltkit.policy("fixed:steps=20"), max_steps=20, observer=recorder, name="map")
    seen = scores(haltkit.policy(name, tau=1), recorder.trajectory["map"])
    patience = 2 if name == "accel" else 1
    for target in (4, 6, 10):
        (tau,) = observed_taus(seen, patience, [target])
        steps = haltkit.run_loop(body, x0, haltkit.policy(name, tau=tau), max_steps=20).steps
        if name == "norm-rel":  # a constant 0.3 at every step: any threshold above it halts at once
            assert int(steps.median()) == 1
        else:
            assert int(steps.median()) == target


def test_observed_thresholds_leave_out_what_was_not_observed() -> None:
    assert observed_taus(torch.full((5, 3), math.inf)) == []
    assert observed_taus(torch.zeros(5, 3)) == []
    assert observed_taus(torch.ones(3, 3), 1, [4]) == []


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_plot_is_drawn(result: Comparison, tmp_path: Path, suffix: str) -> None:
    plot_comparison(result.rows, tmp_path / f"p.{suffix}", "title")
    assert (tmp_path / f"p.{suffix}").stat().st_size > 5000


def test_what_compare_refuses() -> None:
    with pytest.raises(ValueError, match="at least one"):
        compare(run, observe, [], [0])
    with pytest.raises(ValueError, match="at least one"):
        compare(run, observe, SETTINGS, [])


def shrinking(rates: Sequence[float]) -> dict[str, RegionTrajectory]:
    """Loops ``x_k = rate^k x_0`` from rows of norm 1, by region: the norm of step k is ``(1 - rate) rate^(k-1)``."""
    recorder = Recorder()
    for number, rate in enumerate(rates):
        x0 = torch.tensor([[0.6, 0.8], [-1.0, 0.0]], dtype=torch.float64)
        haltkit.run_loop(
            lambda x, rate=rate: rate * x, x0, haltkit.policy("fixed:steps=20"), max_steps=20, observer=recorder,
            name=str(number),
        )  # fmt: skip
    return dict(recorder.trajectory.regions)


def first_below(tau: float, rate: float) -> int:
    return next(k for k in range(1, 21) if (1 - rate) * rate ** (k - 1) < tau)


def test_policies_suggest_a_depth_for_each_region() -> None:
    rates = (0.3, 0.8)
    taus = (0.1, 0.05, 0.01)
    settings = [Setting("fixed", "fixed:steps=20", loops=20)]
    settings += [Setting("norm", f"norm:tau={tau}", tau) for tau in taus]
    suggested = depth_settings(settings, shrinking(rates), None)
    expected = [{"0": first_below(tau, 0.3), "1": first_below(tau, 0.8)} for tau in taus]
    assert [setting.loops for setting in suggested] == expected
    assert expected[0]["0"] != expected[0]["1"]
    assert {setting.policy for setting in suggested} == {"fixed"}
    label = depth_label(suggested[0].spec)
    assert label == f"{expected[0]['0']} {expected[0]['1']}"
    built = policy_for_regions(suggested[0].spec, ["0", "1"])
    assert [built[name].steps for name in ("0", "1")] == list(expected[0].values())


def test_suggested_depths_are_new_few_and_shallow() -> None:
    one = shrinking((0.8,))
    many = [Setting("norm", f"norm:tau={tau}", tau) for tau in (0.15, 0.1, 0.08, 0.06, 0.05, 0.03, 0.02, 0.01)]
    depths = [first_below(setting.tau or 0, 0.8) for setting in many]
    known = Setting("fixed", f"fixed:steps={depths[1]}", loops=depths[1])
    suggested = depth_settings([known, *many], one, None)
    assert [setting.loops for setting in suggested] == [depths[0], *depths[2:7]]
    assert [setting.spec for setting in suggested] == [f"fixed:steps={setting.loops}" for setting in suggested]
    assert depth_settings([known], one, None) == []


class Shrink(torch.nn.Module):
    def forward(self, x: torch.Tensor, rate: float) -> torch.Tensor:
        return rate * x


class Breaking(torch.nn.Module):
    """Twenty loops of ``0.8 x``, whose fourth gives NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Shrink()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k in range(1, 21):
            x = self.body(x, math.nan if k == 4 else 0.8)
        return x


def test_thresholds_are_picked_where_one_recording_stops_being_finite() -> None:
    model, sound = Breaking(), shrinking((0.8,))["0"]
    with haltkit.record(model, {"broken": "body"}) as recording:
        model(torch.ones(2, 2, dtype=torch.float64))
    broken = recording.trajectory["broken"]
    seen = scores(haltkit.policy("norm:tau=1"), broken)
    assert len(seen) == len(broken.recorded) - 1
    assert seen[1:2].isfinite().all()
    assert (seen[4:] == math.inf).all()
    assert sweep_settings(parse_spec_list("norm"), "auto", lambda: [sound, broken], None)
