"""The comparison engine on settings whose cost and quality are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import haltkit
from haltkit.comparison import Comparison, Row, conclude, sweep_spread, within
from haltkit.comparison.measure import measure
from haltkit.comparison.settings import Candidate, Sweeps, candidates, suggested_depths
from haltkit.comparison.thresholds import observed_taus, tau_at_step, tau_within
from haltkit.driving import Look, Pass
from haltkit.recording.recorder import Recorder
from haltkit.recording.replay import scores
from haltkit.recording.trajectory import RegionTrajectory
from haltkit.registry import PolicyRecord, records
from haltkit.reporting.frontier import plot_comparison
from haltkit.reporting.overview import Needs, plot_overview
from haltkit.setting import Depth, Setting
from haltkit.specs import parse_spec
from haltkit.subject import Subject

REGIONS = ("4",)
SETTINGS = [
    Setting(Depth({"4": 8})),
    Setting(Depth({"4": 1})),
    Setting.of("norm:tau=0.1", REGIONS).named("norm", 0.1),
]
COST = {"fixed:steps=8": 0.008, "fixed:steps=1": 0.001, "norm:tau=0.1": 0.003}
LOSS = {"fixed:steps=8": 2.0, "fixed:steps=1": 2.5, "norm:tau=0.1": 2.003}
NOW = [0.0]  # the clock of these tests: a real one would tell how busy the machine is


class Scripted:
    """A driver whose passes cost and lose what the tables say, on samples that are numbers."""

    regions, native, described = REGIONS, True, {}

    def __init__(self) -> None:
        self.order: list[str] = []

    @contextmanager
    def using(self, setting: Setting, full_depth: int) -> Iterator[Callable[[int], Pass]]:
        text = str(setting.text)

        def run(sample: int) -> Pass:
            NOW[0] += COST[text]
            self.order.append(text)
            if setting.depth is not None:
                return Pass(text)
            steps, outcome = torch.tensor([[3.0] * 4, [5.0] * 4]), torch.tensor([[1] * 4, [2] * 4], dtype=torch.int8)
            return Pass(text, {"4": steps}, {"4": outcome})

        yield run


def scripted(samples: Sequence[int]) -> Subject:
    """Two sequences of four tokens over three classes; one token in eight of depth 1 has another top token."""

    def logits(output: str) -> Tensor:
        found = torch.tensor([2.0, 1.0, 0.0]).repeat(2, 4, 1)
        if output == "fixed:steps=1":
            found[0, 0] = torch.tensor([1.0, 2.0, 0.0])
        return found

    def loss(output: str, sample: int) -> Tensor:
        wobble = torch.tensor([[0.001], [-0.001]]) * (sample + 1) * (output == "norm:tau=0.1")
        return torch.full((2, 4), LOSS[output]) + wobble

    driver: Any = Scripted()
    return Subject(
        nn.Identity(), driver, samples=samples, loss=loss, logits=logits, metric="CE", unit="nats", item="token"
    )


@pytest.fixture(scope="module")
def result() -> Comparison:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("haltkit.timing.settled", lambda: NOW[0])
        return measure(scripted([0, 1, 2]), SETTINGS, timed=2, repeats=3)


def test_quality_is_what_was_observed(result: Comparison) -> None:
    full, one, norm = result.rows
    assert (result.items, result.sequences, result.timed_items) == (24, 6, 16)
    assert (full.loss, full.delta, full.delta_se, full.agreement, full.kl_to_full) == (2, 0, 0, 1, 0)
    assert full.perplexity == pytest.approx(math.exp(2))
    assert (one.loss, one.delta) == (2.5, 0.5)
    assert one.agreement == pytest.approx(7 / 8)
    p = torch.tensor([2.0, 1.0, 0.0]).softmax(0)
    q = torch.tensor([1.0, 2.0, 0.0]).softmax(0)
    assert one.kl_to_full == pytest.approx(float((p * (p / q).log()).sum()) / 8, rel=1e-5)
    # Deltas of the sequences: 0.003 +- 0.001, 0.002, 0.003.
    deltas = torch.tensor([0.004, 0.002, 0.005, 0.001, 0.006, 0.0], dtype=torch.float64)
    assert norm.delta == pytest.approx(0.003, abs=1e-6)
    assert norm.delta_se == pytest.approx(float(deltas.std()) / math.sqrt(6), rel=1e-3)
    assert norm.steps == {"4": 4.0}
    assert norm.outcomes == {"CONVERGED": 0.5, "BUDGET": 0.5, "NONFINITE": 0.0}


def test_time_is_wall_clock(result: Comparison) -> None:
    for row in result.rows:
        assert len(row.ms_repeats) == 3
        assert row.ms == pytest.approx(1e3 * COST[str(row.spec)] / 8)
        assert row.ms_spread == (min(row.ms_repeats), max(row.ms_repeats))
    assert result.rows[0].speedup == 1
    assert result.rows[1].speedup == pytest.approx(8)


def test_the_conclusion_is_the_frontiers(result: Comparison) -> None:
    found = {(f.kind, f.level): f for f in result.conclusion().findings}
    norm = found["loss", 0.01]
    assert norm.policy == "norm"
    assert norm.best is not None
    assert norm.fixed is not None
    assert norm.best.spec == "norm:tau=0.1"
    assert norm.fixed.spec == "fixed:steps=8"
    assert norm.against_fixed == "faster"
    assert found["loss", 0.001].best is None  # 0.003 above full depth
    assert found["loss", 0.001].against_fixed is None


def test_a_judgement_needs_two_standard_errors(result: Comparison) -> None:
    row = result.rows[2]

    def judge(delta: float, se: float) -> str:
        return within(replace(row, delta=delta, delta_se=se, kl_to_full=0.1), 0.01)

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
            replace(result.rows[0], ms_repeats=fixed, ms=sorted(fixed)[1]),
            replace(
                result.rows[0], policy="p", spec="p", depth=None, decided="policy", ms_repeats=mine, ms=sorted(mine)[1]
            ),
        ]
        return conclude(rows, (0.01,)).findings[0].against_fixed

    assert verdict((1, 1, 1), (2, 2, 2)) == "faster"
    assert verdict((3, 3, 3), (2, 2, 2)) == "slower"
    assert verdict((1, 1, 3), (2, 2, 2)) == "no clear difference"


def test_one_measurement_is_no_verdict_and_full_depth_is_within_itself(result: Comparison) -> None:
    rows = [
        replace(result.rows[0], ms_repeats=(2.0,), delta_se=math.inf),
        replace(
            result.rows[0], policy="p", spec="p", depth=None, decided="policy", ms_repeats=(1.0,), delta_se=math.inf
        ),
    ]
    assert within(rows[0], 0.001) == "yes"
    assert conclude(rows, (0.01,)).findings[0].against_fixed == "cannot tell"
    assert not conclude(rows, (0.01,)).fixed_serves_best


def test_equal_levels_are_one_quality(result: Comparison) -> None:
    """Shares of a full depth that loses nothing are all 0."""
    once = conclude(result.rows, (0.0,))
    assert once.findings
    assert conclude(result.rows, (0.0, 0.0, 0.0)) == once


def test_every_repeat_begins_at_another_setting() -> None:
    subject = scripted([0])
    measure(subject, SETTINGS, timed=1, repeats=3)
    driver: Any = subject.driver
    order = driver.order
    first = [order[i] for i in (0, 3, 6)]
    assert len(set(first)) == 3


def test_spread_over_a_sweep(result: Comparison) -> None:
    assert sweep_spread(result.rows, "norm") is None
    rows: list[Row] = [replace(result.rows[2], loss=loss, tau=t) for loss, t in ((2.0, 0.1), (2.4, 1.0), (1.9, 0.01))]
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


@pytest.mark.parametrize("record", [one for one in records() if one.greatest_tau < math.inf], ids=lambda one: one.name)
def test_a_picked_threshold_is_one_that_the_policy_takes(record: PolicyRecord) -> None:
    """Of a gate that is shut, 1 - lambda is 1 to rounding, and a threshold rounded up would be 1.1."""
    assert tau_at_step(torch.ones(8, 3), 1, 4, record.greatest_tau) == record.greatest_tau
    assert tau_at_step(torch.full((8, 3), 0.9999), 1, 4, record.greatest_tau) == record.greatest_tau
    assert tau_at_step(torch.full((8, 3), 0.31), 1, 4, record.greatest_tau) == pytest.approx(0.32)


def test_only_gates_and_probes_have_a_greatest_threshold_and_the_registry_knows_it() -> None:
    for record in records():
        if "tau" not in record.fields or ("weights" in record.fields and record.name != "gate"):
            continue  # a probe has weights that must be there
        record.policy(tau=min(record.greatest_tau, 1e6))
        if record.greatest_tau < math.inf:
            with pytest.raises(ValueError, match="above"):
                record.policy(tau=record.greatest_tau * 1.01)


def test_observed_thresholds_leave_out_what_was_not_observed() -> None:
    assert observed_taus(torch.full((5, 3), math.inf)) == []
    assert observed_taus(torch.zeros(5, 3)) == []
    assert observed_taus(torch.ones(3, 3), 1, [4]) == []


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_plot_is_drawn(result: Comparison, tmp_path: Path, suffix: str) -> None:
    plot_comparison(result, tmp_path / f"p.{suffix}", "title")
    assert (tmp_path / f"p.{suffix}").stat().st_size > 5000


def test_what_compare_refuses() -> None:
    with pytest.raises(ValueError, match="at least one"):
        measure(scripted([0]), [])
    with pytest.raises(ValueError, match="at least one"):
        measure(scripted([]), SETTINGS)


def shrinking(rates: Sequence[float]) -> dict[str, RegionTrajectory]:
    """Loops ``x_k = rate^k x_0`` from rows of norm 1, by region: the norm of step k is ``(1 - rate) rate^(k-1)``."""
    recorder = Recorder()
    for number, rate in enumerate(rates):
        x0 = torch.tensor([[0.6, 0.8], [-1.0, 0.0]], dtype=torch.float64)
        haltkit.run_loop(
            lambda x, rate=rate: rate * x,
            x0,
            haltkit.policy("fixed:steps=20"),
            max_steps=20,
            observer=recorder,
            name=str(number),
        )
    return dict(recorder.trajectory.regions)


def first_below(tau: float, rate: float) -> int:
    return next(k for k in range(1, 21) if (1 - rate) * rate ** (k - 1) < tau)


def test_policies_suggest_a_depth_for_each_region() -> None:
    taus = (0.1, 0.05, 0.01)
    settings = [Setting.of(f"norm:tau={tau}", ("0", "1")) for tau in taus]
    suggested = suggested_depths(settings, shrinking((0.3, 0.8)), None)
    expected = [{"0": first_below(tau, 0.3), "1": first_below(tau, 0.8)} for tau in taus]
    assert [depth.steps for depth in suggested] == expected
    assert expected[0]["0"] != expected[0]["1"]
    assert suggested[0].label == f"{expected[0]['0']} {expected[0]['1']}"
    assert Setting.of(str(Setting(suggested[0]).text), ("0", "1")).depth == suggested[0]


def test_suggested_depths_are_new_few_and_shallow() -> None:
    one = shrinking((0.8,))
    taus = (0.15, 0.1, 0.08, 0.06, 0.05, 0.03, 0.02, 0.01)
    many = [Setting.of(f"norm:tau={tau}", ("0",)) for tau in taus]
    depths = [first_below(tau, 0.8) for tau in taus]
    suggested = suggested_depths(many, one, None, known=[Depth({"0": depths[1]})])
    assert [depth.same for depth in suggested] == [depths[0], *depths[2:7]]
    assert [Setting(depth).text for depth in suggested] == [f"fixed:steps={depth.same}" for depth in suggested]


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
    subject = scripted([0])
    sweeps = Sweeps.on(subject, Look([{"a": sound, "b": broken}], (), 20), "auto")
    assert sweeps.settings(Candidate("norm", {"": parse_spec("norm")}))


def on_two_regions(taus: str | Sequence[float], policies: Any) -> list[Setting]:
    driver: Any = Scripted()
    driver.regions = ("0", "1")
    subject = replace(scripted([0]), driver=driver, target_steps=(4, 8))
    sweeps = Sweeps.on(subject, Look([shrinking((0.3, 0.8))], (), 20), taus)
    return [setting for one in candidates(policies, subject) for setting in sweeps.settings(one)]


def test_a_policy_for_each_region_is_swept_by_thresholds_of_its_own() -> None:
    picked = on_two_regions("auto", "0=norm;1=norm:patience=2")
    recorded = shrinking((0.3, 0.8))
    assert len(picked) == 2
    for setting, target in zip(picked, (4, 8), strict=True):
        assert setting.tau is None
        assert setting.sweep == "0=norm;1=norm:patience=2"
        for region, trajectory in recorded.items():
            steps = haltkit.replay(setting.policies[region], trajectory).steps
            assert steps.tolist() == [target] * len(steps)
    one = on_two_regions([0.5], "0=norm;1=norm:tau=0.1")
    assert [setting.text for setting in one] == ["0=norm:tau=0.5;1=norm:tau=0.1"]
    assert one[0].tau == 0.5


def test_policies_are_compared_as_objects_too() -> None:
    policy = haltkit.policy("accel:tau=0.1,min_steps=3")
    [one] = on_two_regions("auto", [policy])
    assert one.policies == {"0": policy, "1": policy}
    [each] = on_two_regions("auto", [{"1": policy, "0": "fixed:steps=3"}])
    assert each.text == "0=fixed:steps=3;1=accel:tau=0.1,min_steps=3"
    assert each.depth is None
    [depth] = on_two_regions("auto", ["0=fixed:steps=3;1=fixed:steps=5"])
    assert depth.depth == Depth({"0": 3, "1": 5})
    with pytest.raises(ValueError, match="the model's regions are 0, 1"):
        on_two_regions("auto", "0=norm;2=norm")


numbers = st.floats(0.01, 100.0).map(lambda value: float(f"{value:.2g}"))  # few enough for equal ones to occur


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 2), st.floats(0.0, 2.0), st.data())
def test_the_largest_threshold_within_a_loss_is_found(k: int, n: int, patience: int, level: float, data: Any) -> None:
    """Against trying every threshold that makes a difference."""
    table = st.lists(numbers, min_size=k * n, max_size=k * n)
    seen = torch.tensor(data.draw(table), dtype=torch.float64).reshape(k, n)
    losses = torch.tensor(data.draw(table), dtype=torch.float64).reshape(k, n)

    def mean_loss(tau: float) -> float:
        total = 0.0
        for row in range(n):
            hits = 0
            for step in range(k):
                hits = hits + 1 if seen[step, row] < tau else 0
                if hits >= patience or step == k - 1:
                    total += float(losses[step, row])
                    break
        return total / n

    def halts(tau: float) -> bool:
        below = seen < tau
        return any(bool(below[i : i + patience].all(0).any()) for i in range(k - patience + 1))

    limit = float(losses[-1].mean()) + level
    found = tau_within(seen, losses, level, patience) if k >= patience else None
    values = sorted(set(seen.flatten().tolist()))
    tried = [math.sqrt(low * high) for low, high in zip(values, [*values[1:], 2 * values[-1]], strict=True)]
    good = [tau for tau in tried if mean_loss(tau) <= limit + 1e-9 and halts(tau)]
    if found is not None:
        assert mean_loss(found) <= limit + 1e-9
    if good:
        assert found is not None
        assert mean_loss(found) == pytest.approx(mean_loss(max(good)))


finite = st.floats(-1e6, 1e6)
names = st.sampled_from(["4", "5-6", "core"])
row_values = st.builds(
    Row,
    policy=st.text(max_size=9),
    spec=st.none() | st.text(max_size=9),
    tau=st.none() | finite,
    depth=st.none() | st.dictionaries(names, st.integers(1, 99)),
    loss=finite,
    unit=st.sampled_from(["nats", "loss"]),
    delta=finite,
    delta_se=finite | st.just(math.inf),
    agreement=st.just(0.5),
    agreement_se=st.just(0.1) | st.just(math.inf),
    kl_to_full=st.none() | finite,
    steps=st.dictionaries(names, finite),
    ms=finite,
    ms_spread=st.tuples(finite, finite),
    ms_repeats=st.lists(finite, min_size=1, max_size=3).map(tuple),
    speedup=finite,
    outcomes=st.dictionaries(st.sampled_from(["CONVERGED", "BUDGET"]), finite),
    causal=st.booleans(),
    label=st.text(max_size=9),
)
without_logits = row_values.map(lambda row: replace(row, agreement=None, agreement_se=None, kl_to_full=None))
comparisons = st.builds(
    Comparison,
    rows=st.lists(row_values | without_logits, min_size=1, max_size=3).map(tuple),
    items=st.integers(1, 10**6),
    sequences=st.integers(1, 10**6),
    timed_items=st.integers(1, 10**6),
    metric=st.text(max_size=9),
    item=st.text(max_size=9),
    levels=st.lists(finite, min_size=1, max_size=3).map(tuple),
    agreement_levels=st.lists(finite, max_size=2).map(tuple),
    about=st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.integers() | st.none()),
)


@given(comparisons)
def test_a_comparison_comes_back_from_its_json(result: Comparison) -> None:
    assert Comparison.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False))) == result


@pytest.mark.parametrize(
    ("change", "token"),
    [
        ({"version": 99}, "99"),
        ({"format": "haltkit-diagnose-2"}, "haltkit-diagnose-2"),
        ({"rows": []}, "no rows"),
        ({"rows": [{"policy": "norm"}]}, "spec"),
        ({"levels": 3}, "int"),
    ],
)
def test_results_of_another_kind_or_version_are_refused_by_name(
    result: Comparison, change: dict[str, Any], token: str
) -> None:
    with pytest.raises(ValueError, match=token):
        Comparison.from_json({**result.to_json(), **change})


def test_published_results_without_a_version_are_read() -> None:
    path = Path(__file__).parent.parent.parent / "examples" / "reproduction" / "compare.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    result = Comparison.from_json(values)
    if "version" not in values:
        first = values["rows"][0]
        assert (result.rows[0].loss, result.rows[0].ms) == (first["ce"], first["ms_per_token"])
        assert result.items == values["tokens"]
    assert result.rows[0].depth == dict.fromkeys(("4", "5-6", "7"), 32)
    assert result.unit == "nats"
    assert {row.policy for row in result.rows if not row.fixed} == {"accel", "kl", "norm"}
    assert Comparison.from_json(result.to_json()) == result


def test_the_overview_shows_steps_against_needs_beside_frontiers(result: Comparison, tmp_path: Path) -> None:
    needs = Needs("hops", {"norm": {0: (1.0, 1.0, 1.0), 3: (4.5, 4.0, 6.0)}}, fixed=8)
    plot_overview(needs, [("one", result), ("two", result)], tmp_path / "p.svg")
    drawn = (tmp_path / "p.svg").read_text(encoding="utf-8")
    assert drawn.startswith("<?xml")
    plot_overview(replace(needs, fixed=None), [("one", result)], tmp_path / "q.svg")
    assert len((tmp_path / "q.svg").read_bytes()) < len(drawn)


def test_levels_are_data(result: Comparison) -> None:
    """A level that no table knows of decides the winner."""
    assert (result.levels, result.conclusion().level) == ((0.001, 0.01, 0.05), 0.01)
    assert result.winner() is result.rows[2]
    strict = replace(result, levels=(1e-6, 1e-5, 1e-4))
    assert strict.winner() is None
    assert strict.conclusion().fixed is result.rows[0]
    assert strict.conclusion().fixed_serves_best
    assert not result.conclusion().fixed_serves_best


def test_nothing_is_concluded_where_only_full_depth_is_good_for_sure(result: Comparison) -> None:
    """Too few items: of every other setting it cannot be told, so no fixed depth is said to serve best."""
    unsure = replace(
        result, rows=(result.rows[0], *(replace(row, delta=0.001, delta_se=1.0) for row in result.rows[1:]))
    )
    assert unsure.conclusion().undecided
    assert unsure.conclusion().winner is None
    assert not unsure.conclusion().fixed_serves_best
    assert not result.conclusion().undecided
