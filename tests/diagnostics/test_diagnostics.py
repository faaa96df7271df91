"""Every diagnostic against a map, a matrix or a model whose answer is known in closed form."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import haltkit
from haltkit import signals
from haltkit.attachment import Loop
from haltkit.diagnostics import (
    BoundaryStatistics,
    Case,
    Diagnosis,
    DiagnosticError,
    LayerStatistics,
    Limit,
    Plan,
    RegionStatistics,
    Survey,
    are_distinct,
    classify_limits,
    contraction_rates,
    curvatures,
    distances,
    distinctness,
    first_below,
    fit_pca,
    judge,
    layer_distances,
    match_stages,
    run_plan,
    survey_attention,
    survey_geometry,
    survey_limits,
    survey_paths,
    survey_tokens,
    turning_angles,
)
from haltkit.diagnostics import attention as att
from haltkit.diagnostics.limits import errors_to_last, limit_counts, norm_growth
from haltkit.diagnostics.numbers import numbers
from haltkit.diagnostics.stages import profile_correlation, resample
from haltkit.diagnostics.streaming import LogHistogram, Median, Moments, Series
from haltkit.recording.layers import record_layers
from haltkit.recording.recorder import Record, Recorder
from haltkit.recording.trajectory import RegionTrajectory, TrajectoryError, delta_loop_ratios
from haltkit.reporting.figures import FIGURES
from haltkit.subject import Subject
from maps import contraction, diverger, orbit, rotation, slider, wiggle

Step = Callable[[Tensor], Tensor]


def recorded(step: Step, x0: Tensor, steps: int = 20, spec: Record | None = None, policy: str = "") -> RegionTrajectory:
    recorder = Recorder(spec or Record())
    chosen = haltkit.policy(policy or f"fixed:steps={steps}")
    haltkit.run_loop(step, x0, chosen, max_steps=steps, observer=recorder, name="map")
    return recorder.trajectory["map"]


def turn(degrees: float, rate: float = 1.0) -> Step:
    angle = math.radians(degrees)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
    return lambda x: rate * x @ matrix.T


# --- geometry


def test_a_circle_has_the_curvature_of_its_radius_and_a_line_none() -> None:
    region = recorded(rotation(radius=2.0).step, rotation(radius=2.0).start)
    found = curvatures(region)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1:], torch.tensor([0.5, 1.0]).double().expand(19, 2))
    line = recorded(slider().step, slider().start)
    assert curvatures(line)[1:].abs().max() < 1e-12
    there_and_back = recorded(orbit().step, orbit().start)
    assert curvatures(there_and_back)[1:].isnan().all()


def test_curvature_of_a_small_turn_survives_float32() -> None:
    d = torch.tensor([math.cos(1e-3), math.sin(1e-3)])
    found = float(signals.curvature(d, torch.tensor([1.0, 0.0])))
    assert found == pytest.approx(2 * math.sin(1e-3) / (2 * math.cos(5e-4)), rel=1e-4)


def test_on_a_shrinking_spiral_the_turn_is_constant_and_the_curvature_grows_by_its_rate() -> None:
    region = recorded(turn(30, 0.8), torch.tensor([[1.0, 0.0]]).double())
    torch.testing.assert_close(turning_angles(region)[1:], torch.full((19, 1), 30.0).double())
    bend = curvatures(region)[1:]
    torch.testing.assert_close(bend[1:] / bend[:-1], torch.full((18, 1), 1 / 0.8).double())
    torch.testing.assert_close(contraction_rates(region.step_norms()), torch.tensor([0.8]).double())


def test_distance_to_the_limit_of_a_contraction() -> None:
    region = recorded(contraction(0.5).step, contraction(0.5).start, steps=10)
    zero = torch.zeros(2, 2).double()
    expected = torch.tensor([[5.0 * 0.5**k, 0.5 * 0.5**k] for k in range(1, 11)]).double()
    torch.testing.assert_close(distances(region, zero), expected)
    assert distances(region)[-1].abs().max() == 0


def test_contraction_rates_stop_at_the_floor() -> None:
    norms = torch.tensor([100.0, 8.0, 4.0, 2.0, 1e-7, 1.1e-7, 1e-7])[:, None]
    assert float(contraction_rates(norms, floor=1e-6)) == pytest.approx(0.5)
    assert contraction_rates(norms, floor=50.0).isnan().all()
    assert contraction_rates(norms[:2]).isnan().all()


def test_first_below_wants_it_to_last() -> None:
    values = torch.tensor([[1.0, 5.0], [0.1, 5.0], [2.0, 5.0], [0.1, 5.0], [0.1, 5.0]])
    assert first_below(values, 0.5).tolist() == [4, 6]
    nan = torch.nan
    halted = torch.tensor([[nan, 1.0, 5.0], [nan, 0.1, 5.0], [nan, nan, nan]])
    assert first_below(halted, 0.5).tolist() == [4, 2, 4]  # what has no value never settled


def test_rounding_floor_is_what_a_rounding_moves() -> None:
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float32):
        moved = signals.norm(signals.difference(x.to(dtype).double(), x))
        floor = signals.rounding_floor(signals.norm(x), dtype)
        assert (moved <= floor).all()
        assert (moved >= floor / 10).all()


def test_region_statistics_are_those_of_all_rows_together() -> None:
    starts = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, parts = RegionStatistics(), RegionStatistics()
    whole.add(recorded(wiggle, starts))
    for start in starts:
        parts.add(recorded(wiggle, start))
    a, b = whole.summary(), parts.summary()
    assert a.tokens == b.tokens == 12
    for signal in a.curves:
        assert np.allclose(a.mean(signal), b.mean(signal), rtol=1e-4, equal_nan=True), signal
        assert np.allclose(a.std(signal), b.std(signal), rtol=1e-4, equal_nan=True), signal
    assert np.allclose(numbers(a.cosine_of_means), numbers(b.cosine_of_means), rtol=1e-4, equal_nan=True)
    region = recorded(wiggle, starts)
    assert a.mean("step_norm") == pytest.approx(region.step_norms().flatten(1).mean(1).tolist(), rel=1e-4)
    assert a.std("step_norm") == pytest.approx(region.step_norms().flatten(1).std(1, correction=0).tolist(), rel=1e-3)
    assert a.curves["step_norm"].se[0] is None  # one window: the error is not known
    assert numbers(b.curves["step_norm"].se)[0] > 0


def test_mean_of_cosines_is_not_the_cosine_of_means() -> None:
    turns = turn(20)
    both_ways: Step = lambda x: torch.stack([turns(x[0]), turns(x[1] * torch.tensor([1, -1])) * torch.tensor([1, -1])])  # noqa: E731
    statistics = RegionStatistics()
    statistics.add(recorded(both_ways, torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double(), steps=4))
    found = statistics.summary()
    assert found.mean("cosine")[1:] == pytest.approx([math.cos(math.radians(20))] * 3, rel=1e-4)
    assert found.cosine_of_means[1:] == pytest.approx([1.0] * 3)  # their mean moves along a line


def test_statistics_of_statistics_and_of_halted_rows() -> None:
    x0 = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states, reduced = RegionStatistics(), RegionStatistics()
    states.add(recorded(wiggle, x0, policy="norm:tau=0.3"))
    reduced.add(recorded(wiggle, x0, spec=Record(what="statistics"), policy="norm:tau=0.3"))
    a, b = states.summary(), reduced.summary()
    assert "curvature" not in b.curves
    for signal in ("step_norm", "cosine", "acceleration"):
        assert np.allclose(a.mean(signal), b.mean(signal), rtol=1e-4, equal_nan=True), signal
        assert np.allclose(a.std(signal), b.std(signal), rtol=1e-4, equal_nan=True), signal


def test_another_depth_and_one_step_are_refused() -> None:
    statistics = RegionStatistics()
    statistics.add(recorded(wiggle, torch.ones(2, 6), steps=8))
    with pytest.raises(DiagnosticError, match="record all at one depth"):
        statistics.add(recorded(wiggle, torch.ones(2, 6), steps=9))
    with pytest.raises(DiagnosticError, match="at least two loops"):
        RegionStatistics().add(recorded(wiggle, torch.ones(2, 6), steps=1))


def test_dlr_in_every_convention_is_the_jump_over_the_mean_step() -> None:
    before = recorded(slider(0.25).step, slider().start, steps=4)  # steps of 0.25, ends at start + 1
    after = recorded(contraction(0.5).step, before.last + torch.tensor([3.0, 4.0]).double(), steps=2)
    boundary = BoundaryStatistics()
    boundary.add(before, after)
    found = boundary.summary()
    assert found["noise"].mean == pytest.approx(5 / 0.25)
    assert found["noise without d_1"].median == pytest.approx(20)
    net = (after.last - before.last).norm(dim=-1).mean() / 0.25
    assert found["net"].mean == pytest.approx(float(net), rel=1e-4)
    assert found["noise"].std == pytest.approx(0, abs=1e-9)


def test_rows_that_stop_being_finite_are_counted_and_are_no_halted_rows() -> None:
    start = torch.tensor([[1e30, 1.0], [1.0, 1.0]])
    over = recorded(lambda x: torch.where(x > 1e20, x * 1e10, 0.5 * x), start, steps=6)
    plain = recorded(contraction().step, contraction().start, steps=6)
    statistics = RegionStatistics()
    statistics.add(over)
    statistics.add(plain)
    assert (statistics.summary().nonfinite, statistics.summary().tokens) == (1, 4)
    without_outcome = replace(over, outcome=None, last=over.last * torch.tensor([[torch.inf], [1.0]]))
    again = RegionStatistics()
    again.add(without_outcome)
    assert again.summary().nonfinite == 1
    found = delta_loop_ratios(over, plain)["noise"]
    assert found.isnan().tolist() == [True, False]
    rows = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    halted = recorded(wiggle, rows, policy="norm:tau=0.3")
    with pytest.raises(TrajectoryError, match="no policy"):
        delta_loop_ratios(halted, halted)


class Grow(nn.Module):
    """Overflows where the first entry is positive, halves elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[..., :1] > 0, torch.inf, 0.5 * x)


def test_a_model_that_overflows_is_told_of_and_drawn_as_far_as_it_goes() -> None:
    model = Looped(Core(Grow(), Grow()))
    subject = Subject.of_modules(model, model, {"core": "core"}, layers={"core": ("core.layers.0", "core.layers.1")})
    tokens = torch.tensor([[1, -1, 2, -2, -3, 3]])
    parts = dict(run_plan(subject, tokens, Plan(loops=24, deep_loops=32, policies=())))
    assert parts["geometry"].regions["core"].nonfinite == 3
    limits = parts["limits"].regions["core"]
    assert limits.nonfinite == 3
    assert limits.settled_at.mean > 16  # three that never do, and three on the way to zero
    diagnosis = Diagnosis(trained=Survey(**parts))
    json.dumps(diagnosis.to_json(), allow_nan=False)
    assert FIGURES["figure1-paths"](diagnosis) is not None
    assert {judgement.ruling for judgement in judge(diagnosis)} == {"cannot tell at this scale"}


def test_rows_of_an_attached_model_that_overflow_are_counted() -> None:
    model = Native()
    model.a = Grow()
    subject = Subject.attached(model, loop=Loop(body=("a", "b")))
    tokens = torch.tensor([[1, -1, 2, -9, -8, 3]])
    found = survey_geometry(subject, tokens, loops=10).regions["loop"]
    assert found.nonfinite is not None
    assert 3 <= found.nonfinite < 6


# --- streaming


def test_moments_in_portions_equal_numpy_and_leave_out_what_is_not_finite() -> None:
    values = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)) + 1000
    values[0, :10] = torch.nan
    values[1, 5] = torch.inf
    values[2] = torch.nan
    moments = Moments()
    for part in values.split([1, 30, 9, 60], 1):
        moments.add(part)
    masked = values.double().masked_fill(~values.isfinite(), torch.nan).numpy()
    assert np.allclose(moments.means()[:2], np.nanmean(masked[:2], 1))
    assert np.allclose(moments.deviations()[:2], np.nanstd(masked[:2], 1))
    assert moments.means()[2].isnan()
    assert moments.count.tolist() == [90, 99, 0]


def test_the_error_of_a_mean_is_between_windows() -> None:
    series = Series()
    for mean in (1.0, 2.0, 3.0):
        series.add(torch.full((2, 50), mean))
    assert series.summary().se[0] == pytest.approx(1 / math.sqrt(3))
    assert series.summary().mean == (2.0, 2.0)


def test_quantiles_to_a_percent() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).exp()
    histogram = LogHistogram()
    for part in values.split(999):
        histogram.add(part)
    for q in (0.1, 0.5, 0.9):
        assert histogram.quantile(q) == pytest.approx(float(values.quantile(q)), rel=0.02)
    assert math.isnan(LogHistogram().quantile(0.5))


@pytest.mark.parametrize("kept", [Median.KEPT, 5000])
def test_a_median_is_exact_of_few_and_close_of_many(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Median, "KEPT", kept)
    values = torch.randn(9_999, generator=torch.Generator().manual_seed(0)).exp()
    median = Median()
    for part in [*values.split(998), torch.tensor([torch.nan, torch.inf])]:
        median.add(part)
    few = len(values) <= kept
    assert median.value() == pytest.approx(float(values.median()), rel=1e-6 if few else 0.02)
    assert sum(part.numel() for part in median._kept) == (len(values) if few else 0)
    assert math.isnan(Median().value())


# --- limits


def states_of(step: Step, x0: Tensor, count: int = 128) -> Tensor:
    found = []
    for _ in range(count):
        x0 = step(x0)
        found.append(x0)
    return torch.stack(found)


def test_limit_types_of_known_maps() -> None:
    def limit(step: Step, x0: Tensor, measure: str = "cosine") -> tuple[Limit, int]:
        kind, period = classify_limits(states_of(step, x0), measure=measure)
        return Limit(int(kind[0])), int(period[0])

    away = lambda x: 0.5 * x + torch.tensor([1.0, 2.0]).double()  # noqa: E731
    start = torch.tensor([[1.0, 0.5]]).double()
    for measure in ("cosine", "distance"):
        assert limit(away, start, measure) == (Limit.FIXED_POINT, 0)
        assert limit(orbit().step, orbit().start, measure) == (Limit.ORBIT, 2)
        assert limit(turn(72), start, measure) == (Limit.ORBIT, 5)
        assert limit(turn(40), start, measure) == (Limit.ORBIT, 9)
        assert limit(turn(1), start, measure) == (Limit.SLIDER, 0)
    assert limit(diverger(1.2).step, diverger().start, "distance") == (Limit.SLIDER, 0)
    # A direction is all that a cosine sees: one that grows along a line rests.
    assert limit(diverger().step, diverger().start, "cosine") == (Limit.FIXED_POINT, 0)


@pytest.mark.parametrize("period", [2, 3, 5, 19, 20, 26, 28, 30, 31, 40, 50])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_period_of_an_orbit(period: int, noise: float) -> None:
    start = torch.tensor([[1.0, 0.5]]).double()
    states = states_of(turn(360 / period), start, 128 if period < 32 else 256)
    states = states + noise * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    kind, found = classify_limits(states)
    assert Limit(int(kind[0])) == Limit.ORBIT
    assert int(found[0]) == pytest.approx(period, abs=0 if noise == 0 else 1)


def test_a_norm_that_grows_is_seen() -> None:
    start = torch.tensor([[1.0, 0.5]]).double()
    assert float(norm_growth(states_of(lambda x: x + start, start, 64))) == pytest.approx(65 / 33)
    assert float(norm_growth(states_of(turn(40), start))) == pytest.approx(1)


def test_noise_has_no_limit_and_neither_has_nan() -> None:
    noise = torch.randn(128, 20, 64, generator=torch.Generator().manual_seed(0))
    kind, _ = classify_limits(noise)
    assert limit_counts(kind) == {"unknown": 20, "fixed point": 0, "orbit": 0, "slider": 0}
    broken = torch.ones(128, 1, 4)
    broken[100] = torch.nan
    assert int(classify_limits(broken)[0]) == Limit.UNKNOWN
    with pytest.raises(DiagnosticError, match="too few"):
        classify_limits(noise[:8])
    with pytest.raises(ValueError, match="allowed are"):
        errors_to_last(noise, "angle")


# --- layers


class Halve(nn.Module):
    """``x / 2 + shift``."""

    def __init__(self, shift: list[float]) -> None:
        super().__init__()
        self.shift = nn.Buffer(torch.tensor(shift).double())

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + self.shift


class Core(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Looped(nn.Module):
    """Tokens ``(B, T)`` in, states out; loops ``core``."""

    def __init__(self, core: nn.Module, width: int = 2) -> None:
        super().__init__()
        self.core, self.width = core, width

    def forward(self, tokens: Tensor, loops: int) -> Tensor:
        x = torch.stack([torch.sin(tokens.double() * (i + 1)) for i in range(self.width)], -1)
        for _ in range(loops):
            x = self.core(x)
        return x


U, V = [1.0, 0.0], [0.0, 3.0]
TOKENS = torch.arange(1, 13).view(2, 6)


def cycle() -> Subject:
    model = Looped(Core(Halve(U), Halve(V)))
    layers = {"core": ("core.layers.0", "core.layers.1")}
    return Subject.of_modules(model, model, {"core": "core"}, layers=layers)


def test_each_layer_of_a_cycle_has_its_own_fixed_point() -> None:
    subject = cycle()
    with record_layers(subject.model, subject.layer_paths("core")) as kept:
        subject.at_depth(TOKENS, 60)
    # x = (x / 2 + U) / 2 + V after the second layer, and half of that plus U after the first.
    second = (0.5 * torch.tensor(U) + torch.tensor(V)).double() / 0.75
    first = 0.5 * second + torch.tensor(U).double()
    for path, point in zip(kept, (first, second), strict=True):
        torch.testing.assert_close(kept[path][-1], point.expand(2, 6, 2))
        found = layer_distances(torch.stack(kept[path]))
        torch.testing.assert_close(found["distance"][5] / found["distance"][4], torch.full((2, 6), 0.25).double())
        torch.testing.assert_close(found["difference"][5] / found["difference"][4], torch.full((2, 6), 0.25).double())
        assert found["difference"][0].isnan().all()
        assert found["distance_cosine"][-1].min() > 1 - 1e-9
    statistics = LayerStatistics()
    statistics.add(kept)
    expected = float(torch.cosine_similarity(first, second, dim=0))
    least = statistics.summary().least_cosine
    assert least is not None
    assert least.mean == pytest.approx(expected, rel=1e-4)
    assert statistics.summary().distinct == 1


def test_a_degenerate_cycle_and_one_layer() -> None:
    point = torch.randn(3, 4)
    torch.testing.assert_close(distinctness([point, 2 * point, point]), torch.ones(3))
    with pytest.raises(DiagnosticError, match="no cycle"):
        distinctness([point])
    with pytest.raises(DiagnosticError, match="no cycle"):
        are_distinct([point], [point])


def two_layers(first: Step, second: Step, x: Tensor, loops: int) -> tuple[list[Tensor], list[Tensor]]:
    """Both layers' states half way and at the end."""
    states = []
    for _ in range(loops):
        y = first(x)
        x = second(y)
        states.append([y, x])
    return states[loops // 2 - 1], states[-1]


def test_fixed_points_are_distinct_if_what_layers_add_does_not_vanish() -> None:
    start = torch.tensor([[1.0, 2.0, -1.0]])
    small = torch.tensor([0.0, 0.01, 0.0])

    # At one point a hundredth of the way apart: the cosine is above any bound that [M]'s figures suggest, and stays.
    half, end = two_layers(lambda x: 0.5 * x + 0.5 * start + small, lambda x: x - small, start, 128)
    assert float(distinctness(end)) > 0.99999
    assert are_distinct(half, end).tolist() == [True]
    # Each layer moves the state by half as much every time, to one point.
    target = torch.tensor([[3.0, -1.0, 2.0]])
    half, end = two_layers(lambda x: x + 0.1 * (target - x), lambda x: x + 0.1 * (target - x), start, 32)
    assert are_distinct(half, end).tolist() == [False]
    # The same until nothing but rounding is left, which does not shrink.
    half, end = two_layers(lambda x: x + 0.1 * (target - x), lambda x: target + 1.1 * (x - target) * 0.9, start, 512)
    assert are_distinct(half, end).tolist() == [False]
    # Layers that add what they always add, to a state that grows without bound: their share vanishes as 1 / t.
    half, end = two_layers(lambda x: x + target, lambda x: x + target.roll(1), start, 128)
    assert float(distinctness(end)) > 0.9999
    assert are_distinct(half, end).tolist() == [False]


def test_layers_that_are_not_there_or_too_large_are_refused() -> None:
    subject = cycle()
    with pytest.raises(TrajectoryError, match=r"no module 'nope'"), record_layers(subject.model, ["nope"]):
        pass
    with pytest.raises(TrajectoryError, match="would exceed"), record_layers(subject.model, ["core"], 100):
        subject.at_depth(TOKENS, 60)
    assert not subject.model.core._forward_hooks


class Native(nn.Module):
    """A foreign model whose depth is its own business: twelve loops over two layers."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.twice = Halve(U), Halve(V), twice

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.stack([tokens.double(), -tokens.double()], -1)
        for _ in range(12):
            x = self.b(self.a(x))
            x = self.b(x) if self.twice else x
        return x


def test_a_module_called_twice_an_iteration_counts_once() -> None:
    model = Native(twice=True)
    loop = Loop(body=("a", "b"), period=2)
    subject = Subject.attached(model, loop=loop)
    trajectory, layers = subject.with_layers(TOKENS, 5)
    states = trajectory["loop"].states
    assert states is not None
    torch.testing.assert_close(torch.stack(layers["b"]), states[1:])
    torch.testing.assert_close(layers["a"][3], 0.5 * states[3] + model.a.shift)


@pytest.mark.parametrize("loops", [4, 5, 6, 12])
def test_replayed_calls_of_an_attached_model_are_no_recurrences(loops: int) -> None:
    model = Native()
    subject = Subject.attached(model, loop=Loop(body=("a", "b")))
    trajectory, layers = subject.with_layers(TOKENS, loops)
    states = trajectory["loop"].states
    assert states is not None
    x = states[0]
    for k in range(loops):
        torch.testing.assert_close(layers["a"][k], 0.5 * x + model.a.shift)
        x = 0.5 * layers["a"][k] + model.b.shift
        torch.testing.assert_close(layers["b"][k], x)
        torch.testing.assert_close(states[k + 1], x)
    assert {path: len(kept) for path, kept in layers.items()} == {"a": loops, "b": loops}


# --- attention


def test_attention_statistics_of_known_matrices() -> None:
    t = 16
    uniform = torch.full((3, t, t), 1 / t)
    one = torch.zeros(3, t, t)
    one[:, :, 4] = 1
    assert att.column_concentration(uniform).abs().max() < 1e-6
    assert att.mixing_score(uniform).tolist() == pytest.approx([math.log(t)] * 3)
    assert float(att.sink_rate(uniform)) == 0
    assert att.column_concentration(one).tolist() == [1, 1, 1]
    assert att.mixing_score(one).tolist() == [0, 0, 0]
    assert float(att.sink_rate(torch.cat([one[:1], uniform]))) == pytest.approx(0.25)
    with pytest.raises(DiagnosticError, match="longer window"):
        att.column_concentration(torch.ones(1, 1, 1))


def test_attention_and_states_that_overflow_have_no_numbers_and_are_no_error() -> None:
    model = Looped(Core(Grow(), Attends()))
    subject = Subject.of_modules(model, model, {"core": "core"}, layers={"core": ("core.layers.1",)})
    found = survey_attention(subject, TOKENS, loops=12).regions["core"]
    assert found.profiles["compression"][-1] == (None,)
    assert found.successive[-1] == (None,)
    geometry = survey_geometry(subject, TOKENS, loops=12).regions["core"]  # not a number from a step on, in all rows
    assert geometry.nonfinite == TOKENS.numel()


def test_residual_compression_counts_directions() -> None:
    assert float(att.residual_compression(7 * torch.eye(8, 32))) == pytest.approx(math.log(8))
    assert float(att.residual_compression(torch.ones(8, 32))) == pytest.approx(0, abs=1e-9)


def test_frobenius_distances_equal_the_obvious_ones() -> None:
    matrices = [torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    found = att.frobenius_distances(matrices)
    for i, a in enumerate(matrices):
        for j, b in enumerate(matrices):
            assert float(found[i, j]) == pytest.approx(float((a - b).flatten(1).norm(dim=1).mean()), abs=1e-6)


class Attends(nn.Module):
    def __init__(self, **how: bool) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None]
        return 0.5 * x + 0.5 * F.scaled_dot_product_attention(q, q, q, **self.how)[:, 0]


def test_attention_is_seen_as_it_is_used() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8, generator=generator) for _ in range(3))
    mask = torch.rand(6, 6, generator=generator) > 0.3
    mask[:, 0] = True
    cases = [{}, {"is_causal": True}, {"scale": 0.7}, {"attn_mask": mask}, {"attn_mask": mask.float() * 3}]
    for case in cases:
        found = att.attention_matrix(q, k, **case) @ v
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, **case))
    grouped = att.attention_matrix(q, k[:, :2], enable_gqa=True) @ v[:, :2].repeat_interleave(2, 1)
    torch.testing.assert_close(grouped, F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True))
    model = Core(Attends(), Attends(is_causal=True))
    seen: list[tuple[str, Tensor]] = []
    with att.capture_attention(model, ["layers.0", "layers.1"], lambda path, a: seen.append((path, a))):
        model(torch.randn(1, 5, 4))
    assert [path for path, _ in seen] == ["layers.0", "layers.1"]
    torch.testing.assert_close(seen[1][1].sum(-1), torch.ones(1, 1, 5))
    assert seen[1][1].triu(1).abs().max() == 0
    model(torch.randn(1, 5, 4))
    assert len(seen) == 2


def test_attention_settles_with_the_states_and_shows_the_cycle() -> None:
    model = Looped(Core(Halve(U), Attends(), Halve(V), Attends(is_causal=True)))
    paths = tuple(f"core.layers.{i}" for i in range(4))
    subject = Subject.of_modules(model, model, {"core": "core"}, layers={"core": (paths[1], paths[3])})
    found = survey_attention(subject, TOKENS, loops=12)
    region = found.regions["core"]
    frobenius = torch.tensor(region.frobenius)
    assert frobenius.shape == (24, 24)
    late = frobenius[-8:, -8:]  # stripes: the same layer agrees, the other does not
    assert late[0::2, 0::2].max() < 1e-2 < 0.1 < late[0::2, 1::2].min()
    successive = [numbers(row) for row in region.successive]
    assert successive[-1][0] < 0.1 * successive[0][0]
    assert successive[0][0] == pytest.approx(float(frobenius[0, 2]), rel=1e-2)
    assert len(region.profiles["mixing"]) == 12
    last = region.to_last
    assert (len(last), last[-1]) == (12, (0, 0))
    assert last[3][1] == pytest.approx(float(frobenius[2 * 3 + 1, 2 * 11 + 1]), rel=1e-2)
    _, layers = subject.with_layers(TOKENS, 12)
    moved = [float((layers[path][5] - layers[path][4]).norm(dim=-1).mean()) for path in (paths[1], paths[3])]
    assert region.moved[4] == pytest.approx(moved, rel=1e-3)
    # Two windows' passes agree to four digits long before they are the same.
    assert len(str(region.profiles["mixing"][0][0])) > 6
    blind = Subject.of_modules(model, model, {"core": "core"}, layers={"core": paths})
    assert survey_attention(blind, TOKENS, loops=3).unseen == ("core",)  # Halve does not attend


# --- stages and PCA


def test_profiles_correlate_with_themselves_and_shuffled_ones_do_not() -> None:
    control = [0.1, 0.5, 0.9, 1.0, 0.8, 0.6, 0.5, 0.4, 0.2, 0.1, 0.3, 0.9]
    assert profile_correlation(control, control) == pytest.approx(1)
    assert profile_correlation(control, [-v for v in control]) == pytest.approx(-1)
    assert resample(control, 12) == pytest.approx(control)
    assert resample([0.0, 1.0], 4) == pytest.approx([0.0, 0.25, 0.75, 1.0])
    block = resample(control, 6)
    match = match_stages(block, control)
    assert match.beats_chance
    assert abs(match.shuffled_mean) < 0.1
    orders = [np.random.default_rng(i).permutation(control).tolist() for i in range(2000)]
    by_hand = [profile_correlation(block, order) for order in orders]
    assert match.shuffled_high == pytest.approx(np.quantile(by_hand, 0.95), abs=0.05)
    assert not match_stages([-v for v in block], control).beats_chance
    assert not match_stages([1.0, 1.0, 1.0], control).beats_chance  # flat: no correlation at all
    with pytest.raises(DiagnosticError, match="at least three"):
        match_stages([1.0, 2.0], control)


@pytest.mark.parametrize("rows", [400, 5])
def test_pca_finds_the_axes_of_an_ellipse(rows: int) -> None:
    angle = torch.arange(rows) * 2 * math.pi / rows
    directions = torch.linalg.qr(torch.randn(50, 2, generator=torch.Generator().manual_seed(0))).Q.T
    points = 3 * angle.cos()[:, None] * directions[0] + angle.sin()[:, None] * directions[1] + 7
    pca = fit_pca(points)
    assert pca.explained.tolist() == pytest.approx([0.9, 0.1], abs=1e-4)
    assert abs(float(pca.components[0].float() @ directions[0])) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close((pca.project(points) @ pca.components + pca.mean).float(), points, atol=1e-4, rtol=1e-4)
    with pytest.raises(DiagnosticError, match="all the same"):
        fit_pca(torch.ones(10, 4))
    with pytest.raises(DiagnosticError, match="no 2 components"):
        fit_pca(points[:2])


# --- surveys


def test_surveys_of_a_cycle_say_what_is_known_of_it() -> None:
    subject = cycle()
    geometry = survey_geometry(subject, TOKENS, loops=10).regions["core"]
    assert geometry.contraction is not None
    assert geometry.contraction.mean == pytest.approx(0.25, rel=1e-4)
    assert geometry.mean("cosine")[1:] == pytest.approx([1.0] * 9, rel=1e-4)
    deep = survey_limits(subject, TOKENS, loops=32).regions["core"]
    assert deep.limits["cosine"]["fixed point"] == 12
    assert deep.limits["distance"]["fixed point"] == 12
    # d_k = 0.75 * 4 / 3 ... : the distance left after a step of a contraction by r is r / (1 - r) of the step
    assert deep.distance_over_small_step.mean == pytest.approx(0.25 / 0.75, rel=1e-3)
    assert deep.distinct == 1
    paths = survey_paths(subject, TOKENS[0], loops=10, tokens=3)
    assert sum(numbers(paths.explained)) == pytest.approx(1, abs=1e-4)
    assert [len(segment.points) for segment in paths.segments] == [3]
    assert len(paths.segments[0].points[0]) == 11
    assert len(paths.cycles["core"].points) == 10


def test_tokens_take_the_steps_of_the_replay() -> None:
    subject = cycle()
    found = survey_tokens(subject, TOKENS[0], ["norm:tau=0.1", "kl:tau=0.1"], loops=10)
    steps = found.steps["norm:tau=0.1"]["core"]
    norms = found.curves["core"]["step_norm"]
    assert steps == tuple(next(k for k, n in enumerate(numbers(row), 1) if n < 0.1) for row in norms)
    assert "readout" in found.left_out["kl:tau=0.1"]
    assert found.how == "replayed"


def test_an_interrupted_survey_keeps_what_it_has() -> None:
    subject, ticks = cycle(), 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1
        if ticks == 2:
            raise KeyboardInterrupt

    found = survey_geometry(subject, torch.cat([TOKENS, TOKENS]), loops=4, tick=tick)
    assert found.partial
    assert found.tokens == 12


def test_memory_of_a_survey_does_not_grow_with_the_text() -> None:
    statistics, sizes = RegionStatistics(), []
    for count in (2, 40):
        for i in range(count):
            statistics.add(recorded(wiggle, torch.randn(50, 6, generator=torch.Generator().manual_seed(i)), steps=8))
        kept = [s._tokens.count.nbytes for s in statistics._series.values()]
        sizes.append((sum(kept), statistics._mean_steps.nbytes))
    assert sizes[0] == sizes[1]


def test_what_cannot_be_asked_is_one_clear_line() -> None:
    model = Looped(Core(Halve(U)))
    with pytest.raises(DiagnosticError, match=r"shape \(12,\)"):
        Case(cycle(), TOKENS.flatten())
    with pytest.raises(DiagnosticError, match="no looped region"):
        Case(Subject.of_modules(model, model, {}), TOKENS)
    stubborn = Subject.of_modules(model, lambda tokens, loops: model(tokens, 3), {"core": "core"})
    with pytest.raises(TrajectoryError, match="ran 3 steps when asked for 5"):
        survey_geometry(stubborn, TOKENS, loops=5)
    with pytest.raises(DiagnosticError, match="no window"):
        survey_geometry(stubborn, TOKENS[:0], loops=3)
    outside = Subject.of_modules(model, model, {"core": "core"}, layers={"core": ("",)})
    with pytest.raises(TrajectoryError, match="run inside the loop"):
        survey_limits(outside, TOKENS, loops=20)
    bare = Subject.of_modules(model, model, {"core": "core"}, samples=[3])
    with pytest.raises(DiagnosticError, match="no samples whose inputs are tensors"):
        Case.of(bare)
    ragged = Subject.of_modules(model, model, {"core": "core"}, samples=[TOKENS, TOKENS[:, :3]])
    with pytest.raises(DiagnosticError, match="different lengths"):
        Case.of(ragged)
    assert Case.of(Subject.of_modules(model, model, {"core": "core"}, samples=TOKENS[:, None])).inputs.equal(TOKENS)
