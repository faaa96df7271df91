"""A monitored run: which units are checked, what the checks say and cost, and that the alarm keeps its promise."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import haltkit
from cases import certificate_for, run_command
from haltkit.calibration import Monitor, SpotChecks
from haltkit.calibration.losses import Judged, lost
from haltkit.calibration.monitor import checks_until_alarm
from haltkit.card import Card
from haltkit.identity import Identity
from haltkit.models.reasoner.checkpoint import load_reasoner
from haltkit.models.weights import BUNDLED
from haltkit.subject import Subject
from haltkit.watching import MonitoredRun, RiskExceeded, watch_subject

STEPS = 12
SPEC = "fixed:steps=3"
KNOWN = replace(certificate_for(SPEC), loss="disagreement")
OTHER = replace(KNOWN, settings=("fixed:steps=4",))  # from losses with the same hash, as where all are 0


class Counter(nn.Module):
    """Adds 1 at each step; the class of an entry is whether it has reached its own limit."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _Add()

    def forward(self, limits: Tensor, steps: int = STEPS) -> Tensor:
        x = torch.zeros_like(limits)
        for _ in range(steps):
            x = self.body(x)
        return torch.stack([limits - x, x - limits], -1)  # logits (B, T, 2)


class _Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.one


def _card(model: nn.Module, spec: str = SPEC, full_depth: int = STEPS, **more: Any) -> Card:
    certificate = replace(certificate_for(spec), loss="disagreement", **more)
    loops = {} if not isinstance(model, Counter) else {"loop": {"body": ["body"]}}
    return Card(spec, loops=loops, identity=Identity.of(model, full_depth), certificate=certificate)


@pytest.fixture
def counter(tmp_path: Path) -> tuple[Counter, Path]:
    model = Counter().eval()
    _card(model).save(tmp_path / "card")
    return model, tmp_path / "card"


def _limits(count: int, late: float, seed: int = 0) -> list[Tensor]:
    """Calls of one sequence of 4 entries, which settle at step 2, and with this probability at step 6."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.where(torch.rand(count, 1, 4, generator=generator) < late, 5.5, 1.5))


class _Coins:
    """Units that are run in no time: a sample is a number in [0, 1), and halting loses 1 where it is below the risk."""

    def __init__(self, risk: float) -> None:
        self.risk = risk

    def halted(self, sample: float) -> float:
        return sample

    def steps(self) -> tuple[float, float]:
        return 3.0, float(STEPS)

    def loss(self, output: float, sample: float) -> float:
        return float(sample < self.risk)


def _alarms(risk: float, epsilon: float, delta: float, units: int, runs: int) -> list[int | None]:
    """For each run with every other unit checked, the spot checks until the alarm; None: it did not go off."""
    found, certificate = [], replace(certificate_for(SPEC), epsilon=epsilon, delta=delta)
    for seed, draws in enumerate(np.random.default_rng(1).random((runs, units))):
        run = MonitoredRun(_Coins(risk), SpotChecks.of(certificate, 0.5, seed), lambda checks: None)
        for draw in draws:
            if not run.alarm:
                run(float(draw))
        found.append(run.checks.monitor.checks if run.alarm else None)
    return found


@pytest.mark.slow
def test_a_live_loop_at_the_certified_risk_raises_false_alarms_no_more_often_than_delta() -> None:
    """1,000 short runs, looked at after every check; three standard errors of their number."""
    delta, runs = 0.2, 1000
    found = _alarms(0.25, 0.25, delta, units=100, runs=runs)
    share = sum(one is not None for one in found) / runs
    assert 0 < share <= delta + 3 * math.sqrt(delta * (1 - delta) / runs)


@pytest.mark.slow
def test_three_times_the_certified_risk_raises_the_alarm_about_when_it_is_expected() -> None:
    expected = checks_until_alarm(0.3, 0.1, 0.05)
    found = _alarms(0.3, 0.1, 0.05, units=int(20 * expected), runs=40)
    assert None not in found
    assert float(np.mean([one for one in found if one is not None])) < 2 * expected


def test_a_risk_below_the_certified_one_raises_no_alarm() -> None:
    assert _alarms(0.02, 0.2, 0.05, units=100, runs=5) == [None] * 5


@given(st.integers(0, 2**63 - 1), st.floats(0.05, 0.95))
def test_units_are_picked_by_seed_and_number_alone_at_the_rate(seed: int, rate: float) -> None:
    checks = SpotChecks(Monitor(0.1, 0.05), rate, seed)
    other = SpotChecks(Monitor(0.3, 0.2), rate, seed)
    picked = []
    for number in range(200):
        assert checks.due == other.due
        picked.append(checks.due)
        checks = checks.checked(1.0, 2.0, 0.0) if checks.due else checks.passed(1.0)
        other = other.checked(9.0, 9.0, 1.0) if other.due else other.passed(float(number))
    assert abs(sum(picked) - 200 * rate) <= 6 * math.sqrt(200 * rate * (1 - rate)) + 1


def test_other_contents_are_checked_at_the_same_places(counter: tuple[Counter, Path]) -> None:
    model, folder = counter
    picked = []
    for late in (0.0, 1.0):
        with haltkit.attach(model, folder) as session:
            run, places = haltkit.watch(session, rate=0.3, on_alarm=lambda checks: None), []
            for number, sample in enumerate(_limits(40, late)):
                before = run.checks.monitor.checks
                run(sample)
                places += [number] * (run.checks.monitor.checks - before)
                if run.alarm:
                    break
        picked.append(places)
    assert len(picked[1]) < len(picked[0])
    assert picked[0][: len(picked[1])] == picked[1] != []


@given(st.lists(st.floats(0, 1), max_size=40), st.integers(0, 40))
def test_spot_checks_that_were_stored_go_on_as_if_nothing_had_happened(losses: list[float], cut: int) -> None:
    def fed(checks: SpotChecks, some: list[float]) -> SpotChecks:
        for loss in some:
            checks = checks.checked(loss, 12.0, loss) if checks.due else checks.passed(3.0)
        return checks

    begun = SpotChecks(Monitor(0.1, 0.05), 0.5, 7, "abc")
    stored = fed(begun, losses[:cut]).to_json()
    assert fed(SpotChecks.from_json(stored), losses[cut:]) == fed(begun, losses)


def test_a_run_that_is_resumed_ends_as_one_that_was_not(counter: tuple[Counter, Path]) -> None:
    model, folder = counter
    samples = _limits(40, 0.05)
    with haltkit.attach(model, folder) as session:
        whole = haltkit.watch(session, rate=0.5, seed=3)
        for sample in samples:
            whole(sample)
        first = haltkit.watch(session, rate=0.5, seed=3)
        for sample in samples[:17]:
            first(sample)
    with haltkit.attach(model, folder) as session:
        second = haltkit.watch(session, resume=SpotChecks.from_json(first.checks.to_json()))
        for sample in samples[17:]:
            second(sample)
    assert second.checks == whole.checks
    assert 0 < whole.checks.monitor.checks < 40


def test_a_subject_and_a_session_see_the_same(counter: tuple[Counter, Path]) -> None:
    model, folder = counter
    subject = Subject.attached(
        model, loop=haltkit.Loop(["body"]), run_at=model, loss=lambda *_: 0.0, logits=lambda out: out
    )
    of_subject = watch_subject(subject, Card.load(folder), rate=0.5)
    samples = _limits(30, 0.02)
    with haltkit.attach(model, folder) as session:
        of_session = haltkit.watch(session, rate=0.5)
        outputs = [of_session(sample) for sample in samples]
    assert all(torch.equal(output, of_subject(sample).output) for output, sample in zip(outputs, samples, strict=True))
    assert of_subject.checks == of_session.checks
    assert of_subject.checks.monitor.checks > 5


@pytest.mark.parametrize("budget", [None, 8])
def test_the_cost_that_is_told_is_that_of_the_steps_that_ran(tmp_path: Path, budget: int | None) -> None:
    model, full = Counter().eval(), budget or STEPS
    _card(model, full_depth=full).save(tmp_path / "card")
    samples = _limits(60, 0.0)
    with haltkit.attach(model, tmp_path / "card", max_steps=budget, check=False) as session:
        run = haltkit.watch(session, rate=0.4)
        for sample in samples:
            assert torch.equal(run(sample), model(sample, 3))  # what is served is the halted run, checked or not
        computed = model.body.calls - 60 * 3  # of the calls above to compare with
    checked = run.checks.monitor.checks
    assert 10 < checked < 40
    assert run.checks.mean_steps == 3
    assert computed == 60 * 3 + checked * full
    assert run.checks.cost == pytest.approx(checked * full / 60)
    assert run.checks.expected_cost == pytest.approx(0.4 * full)


def test_full_depth_is_the_budget_where_there_is_one() -> None:
    """Not the model's own depth: entries that settle between the two lose nothing."""
    model = Counter().eval()
    sample = torch.full((1, 4), 9.5)
    with haltkit.attach(model, "fixed:steps=3", body=["body"], max_steps=8) as session:
        with session.at_full_depth():
            assert torch.equal(model(sample), torch.stack([sample - 8, 8 - sample], -1))
        assert session.tally["loop"].loops == 0
    with haltkit.attach(model, "fixed:steps=3", body=["body"]) as session:
        with session.at_full_depth():
            assert torch.equal(model(sample), torch.stack([sample - STEPS, STEPS - sample], -1))
        model(sample)


def test_the_alarm_calls_back_once_and_detaching_there_means_full_depth(counter: tuple[Counter, Path]) -> None:
    model, folder = counter
    told: list[SpotChecks] = []
    sample = torch.full((1, 4), 5.5)
    with haltkit.attach(model, folder) as session:
        run = haltkit.watch(session, rate=1.0, on_alarm=lambda checks: (told.append(checks), session.detach()))
        while not run.alarm:
            assert torch.equal(run(sample), torch.stack([sample - 3, 3 - sample], -1))
        at_alarm = run.checks
        assert torch.equal(run(sample), torch.stack([sample - STEPS, STEPS - sample], -1))
    assert told == [at_alarm] == [run.checks]


def test_without_a_callback_the_alarm_is_an_error_from_then_on(counter: tuple[Counter, Path]) -> None:
    model, folder = counter
    with haltkit.attach(model, folder) as session:
        run = haltkit.watch(session, rate=1.0)
        with pytest.raises(RiskExceeded) as raised:
            for _ in range(100):
                run(torch.full((1, 4), 5.5))
        assert raised.value.checks == run.checks
        calls = model.body.calls
        with pytest.raises(RiskExceeded):
            run(torch.full((1, 4), 1.5))
        assert model.body.calls == calls


def test_a_call_of_several_sequences_loses_their_mean(counter: tuple[Counter, Path]) -> None:
    model, folder = counter
    with haltkit.attach(model, folder) as session:
        run = haltkit.watch(session, rate=1.0, run=lambda pair: model(torch.cat(pair)))
        run((torch.full((1, 4), 5.5), torch.full((3, 4), 1.5)))
    assert run.checks.monitor.risk == 0.25
    assert (run.checks.units, run.checks.mean_steps) == (1, 3)


@pytest.mark.parametrize(("about", "expected"), [("loss-gap", 0.5), ("answer", 1.0), ("disagreement-anywhere", 1.0)])
def test_other_losses_are_those_of_the_certificate(tmp_path: Path, about: str, expected: float) -> None:
    model = Counter().eval()
    _card(model).save(tmp_path / "card")
    card = _card(model)
    assert card.certificate is not None
    card = replace(card, certificate=replace(card.certificate, loss=about))
    card.save(tmp_path / "other")
    limits = torch.tensor([[1.5, 1.5, 1.5, 5.5]])
    with haltkit.attach(model, tmp_path / "other") as session:
        # Halted, an entry is at 3, and at full depth at 12.
        run = haltkit.watch(
            session, rate=1.0, loss=lambda out, sample: 1.0 if float((out[..., 1] + sample).mean()) < 6 else 0.5
        )
        run(limits)
    assert run.checks.monitor.risk == expected


def test_spot_checks_say_in_a_line_what_is_known() -> None:
    checks = SpotChecks(Monitor(0.05, 0.1), rate=0.5)
    assert str(checks.passed(3)) == "0 of 1 units checked, so nothing is known about the risk"
    checks = checks.passed(3).checked(3, 12, 0.0).checked(3, 12, 1.0)
    assert str(checks).startswith("2 of 3 units checked, mean loss 0.5 where 0.05 is certified, no alarm (p-value ")
    for _ in range(20):
        checks = checks.checked(3, 12, 1.0)
    assert "ALARM" in str(checks)


def test_losses_are_told_apart() -> None:
    halted = Judged(torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([[1, 2], [3, 4]]))
    full = Judged(torch.tensor([[0.0, 0.2], [1.0, 1.0]]), torch.tensor([[1, 0], [3, 4]]))
    assert lost("disagreement", 1.0, halted, full).tolist() == [0.5, 0.0]
    assert lost("disagreement-anywhere", 1.0, halted, full).tolist() == [1.0, 0.0]
    assert lost("answer", 1.0, halted, full).tolist() == [0.5, 0.5]
    assert lost("loss-gap", 0.3, halted, full).tolist() == [0.3, 0.0]
    for loss, halted_alone in (("disagreement", Judged()), ("answer", Judged()), ("harm", halted)):
        with pytest.raises(ValueError, match=loss):
            lost(loss, 1.0, halted_alone, full)  # type: ignore[arg-type]


# --- the interval


def test_predictions_of_other_shapes_are_not_compared() -> None:
    """A text that ends earlier may broadcast against another: that is no loss of 0."""
    one, many = Judged(tops=torch.zeros(1, 1)), Judged(tops=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="cannot be compared"):
        lost("disagreement", 1.0, one, many)


def test_the_interval_ends_where_the_mixture_of_bets_reaches_its_level() -> None:
    losses, level = [0.0, 0.3, 1.0, 0.0, 0.0, 0.7], 0.9
    monitor = Monitor(0.1, 0.05)
    for loss in losses:
        monitor = monitor.update(loss)
    low, high = monitor.interval(level)
    angles = (np.arange(200_000) + 0.5) / 200_000 * math.pi / 2
    others = np.sin(angles) ** 2  # of the arcsine law
    for edge in (low, high):
        bets = math.prod((others / edge) ** x * ((1 - others) / (1 - edge)) ** (1 - x) for x in losses)
        assert float(np.mean(bets)) == pytest.approx(1 / (1 - level), rel=1e-3)
    assert 0 < low < monitor.risk < high < 1


@pytest.mark.slow
@pytest.mark.parametrize("binary", [True, False])
def test_the_interval_has_the_risk_in_it_at_all_moments(binary: bool) -> None:
    generator, risk, level, runs = np.random.default_rng(0), 0.3, 0.8, 200
    missed = 0
    for _ in range(runs):
        monitor = Monitor(0.1, 0.05)
        for draw in generator.random(60) < risk if binary else generator.beta(0.3, 0.7, 60):
            monitor = monitor.update(float(draw))
            low, high = monitor.interval(level)
            if not low <= risk <= high:
                missed += 1
                break
    assert missed / runs <= 0.2 + 3 * math.sqrt(0.2 * 0.8 / runs)


def test_intervals_of_extremes_and_of_other_ranges() -> None:
    safe, lost_all, wide = Monitor(0.1, 0.05), Monitor(0.1, 0.05), Monitor(0.4, 0.05, loss_bound=4.0)
    for _ in range(10):
        safe, lost_all, wide = safe.update(0.0), lost_all.update(1.0), wide.update(0.0)
    assert safe.interval()[0] == 0
    assert lost_all.interval()[1] == 1
    assert safe.interval()[1] == pytest.approx(1 - lost_all.interval()[0])
    assert wide.interval()[1] == pytest.approx(4 * safe.interval()[1])
    assert safe.interval(0.5)[1] < safe.interval(0.99)[1]


# --- bad input


@pytest.mark.parametrize(
    ("given_to_watch", "said"),
    [
        ({}, "rate="),
        ({"rate": 0.0}, "without spot checks"),
        ({"rate": 1.5}, "rate"),
        ({"rate": 0.1, "seed": -1}, "seed"),
        ({"rate": 0.1, "delta": 0.0}, "delta"),
        ({"rate": 0.1, "resume": SpotChecks(Monitor(0.05, 0.1), 0.1, 0, "0" * 63 + "1")}, "another certificate"),
        ({"rate": 0.1, "resume": SpotChecks.of(replace(OTHER, epsilon=0.06), 0.1)}, "another certificate"),
        ({"rate": 0.1, "resume": SpotChecks.of(OTHER, 0.1)}, "another certificate"),
        ({"rate": 0.1, "resume": SpotChecks.of(KNOWN, 0.2)}, "rate"),
        ({"delta": 0.5, "resume": SpotChecks.of(KNOWN, 0.1)}, "delta"),
    ],
)
def test_a_run_that_cannot_be_monitored_is_refused(
    counter: tuple[Counter, Path], given_to_watch: dict[str, Any], said: str
) -> None:
    model, folder = counter
    with haltkit.attach(model, folder) as session:
        with pytest.raises(ValueError, match=said):
            haltkit.watch(session, **given_to_watch)
        model(torch.ones(1, 4))


def test_a_setting_without_a_certificate_is_nothing_to_watch(tmp_path: Path) -> None:
    model = Counter().eval()
    with haltkit.attach(model, SPEC, body=["body"]) as session:
        model(torch.ones(1, 4))
        with pytest.raises(ValueError, match="nothing to watch"):
            haltkit.watch(session, rate=0.1)
    subject = Subject.attached(model, loop=haltkit.Loop(["body"]), loss=lambda *_: 0.0)
    with pytest.raises(ValueError, match="nothing to watch"):
        watch_subject(subject, Card(SPEC), rate=0.1)
    with pytest.raises(ValueError, match="no logits"):
        watch_subject(subject, _card(model), rate=0.1)
    for about, said in (("", "does not say"), ("answer", "labels")):
        certificate = replace(certificate_for(SPEC), loss=about)
        with pytest.raises(ValueError, match=said):
            watch_subject(subject, replace(_card(model), certificate=certificate), rate=0.1)
    with pytest.raises(ValueError, match="not about this model"):
        watch_subject(
            replace(subject, logits=lambda out: out, samples=[torch.ones(1, 4)]), _card(model, full_depth=5), rate=0.1
        )


def test_a_certificate_about_losses_needs_the_loss(tmp_path: Path) -> None:
    model = Counter().eval()
    card = _card(model)
    assert card.certificate is not None
    replace(card, certificate=replace(card.certificate, loss="loss-gap")).save(tmp_path / "card")
    with haltkit.attach(model, tmp_path / "card") as session:
        model(torch.ones(1, 4))
        with pytest.raises(ValueError, match="loss="):
            haltkit.watch(session, rate=0.1)


def _damaged() -> Iterator[str]:
    known = json.loads(SpotChecks(Monitor(0.1, 0.05), 0.5).to_json())
    for name, value in (
        ("kind", "certificate"),
        ("version", 2),
        ("rate", "often"),
        ("rate", 0),
        ("units", 1.5),
        ("units", -1),
        ("seed", True),
        ("steps", -1),
        ("monitor", 5),
        ("extra", None),
        ("unknown", 1),
    ):
        yield json.dumps({**known, name: value})
    for name, value in (
        ("checks", 3),
        ("total", 9),
        ("log_wealths", [0.0]),
        ("log_wealths", ["0"] * 12),
        ("peak", -1),
        ("delta", 2),
        ("epsilon", "small"),
    ):
        yield json.dumps({**known, "monitor": {**known["monitor"], name: value}})
    yield "["
    yield "[]"
    yield json.dumps({name: value for name, value in known.items() if name != "rate"})


@pytest.mark.parametrize("text", list(_damaged()))
def test_what_is_stored_is_checked_when_it_is_read(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        SpotChecks.from_json(text)


# --- the command


@pytest.fixture(scope="module")
def chase_cards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cards for chase: one that halts late, and one that halts at once, whose certificate is not true."""
    loaded = load_reasoner(BUNDLED / "chase")
    folder = tmp_path_factory.mktemp("cards")
    for name, spec in (("late", "norm:tau=0.05"), ("hasty", "fixed:steps=1")):
        _card(loaded.model, spec, loaded.task.full_depth).save(folder / name)
    return folder


def _watched(out: Path, *arguments: Any) -> tuple[int, dict[str, Any]]:
    code = run_command("watch", "chase", *arguments, "--json", out)
    return code, json.loads(out.read_text())


def test_the_command_says_what_was_seen_and_goes_on_where_it_ended(
    chase_cards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, state = tmp_path / "out.json", tmp_path / "state.json"
    asked = ["--card", chase_cards / "late", "--rate", 0.5]
    code, found = _watched(out, *asked, "--sequences", 20)
    assert code == 0
    printed = capsys.readouterr().out
    assert "no alarm" in printed
    assert "20 calls" in printed
    assert (found["calls"], found["risk"], found["alarm"]) == (20, 0.0, False)
    assert 0 < found["checks"] < 20
    assert found["cost"] == pytest.approx(48 * found["checks"] / 20)
    assert found["expected_cost"] == pytest.approx(24)
    assert found["interval"][0] == 0
    for _ in range(2):
        again = ["--sequences", 10, "--state", state] + ([] if state.exists() else ["--rate", 0.5])
        code, found = _watched(out, "--card", chase_cards / "late", *again)
    assert (code, found["calls"]) == (0, 20)
    assert SpotChecks.from_json(state.read_text()).units == 20
    assert run_command("watch", "chase", *asked, "--state", state) == 2
    assert "--rate" in capsys.readouterr().err


def test_the_alarm_ends_the_command_with_its_own_code(
    chase_cards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = _watched(tmp_path / "out.json", "--card", chase_cards / "hasty", "--rate", 1, "--test-set", "long")
    assert code == 1
    assert found["alarm"]
    assert found["calls"] < 40
    assert "ALARM" in capsys.readouterr().out
    assert found["p_value"] <= 0.1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate", "0"], "spot checks"),
        (["--rate", "0.0001", "--sequences", "3"], "nothing is known about the risk"),
        (["--rate", "0.1", "--delta", "1"], "delta"),
        (["--test-set", "moon"], "moon"),
        (["--text", "a.txt"], "--text"),
    ],
)
def test_what_cannot_be_watched_is_one_line(
    chase_cards: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str, tmp_path: Path
) -> None:
    state = tmp_path / "state.json"
    assert run_command("watch", "chase", "--card", chase_cards / "late", "--state", state, *arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "--without-certificate" not in error  # watch has no such option
    assert len(error.splitlines()) == 1
    assert not state.exists()


def test_cards_and_states_that_are_none_are_one_line(
    chase_cards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Card("norm:tau=1").save(tmp_path / "plain.yaml")
    batches = _card(load_reasoner(BUNDLED / "chase").model, "norm:tau=1", 48, unit="batch")
    batches.save(tmp_path / "batches")
    (tmp_path / "state.json").write_text("{}")
    late = chase_cards / "late"
    other = load_reasoner(BUNDLED / "chase").model
    with torch.no_grad():
        next(other.parameters()).add_(1)
    _card(other, "norm:tau=1", 48).save(tmp_path / "other")
    for arguments, said in (
        (["chase", "--card", tmp_path / "other"], "other weights"),
        (["chase", "--card", tmp_path / "plain.yaml"], "no certificate"),
        (["chase", "--card", tmp_path / "batches"], "--batch"),
        (["sudoku", "--card", late], "card"),
        (["chase", "--card", late, "--state", tmp_path / "state.json"], "--state"),
        (["chase"], "--card"),
    ):
        assert run_command("watch", *arguments) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "--without-certificate" not in error
        assert len(error.splitlines()) == 1
