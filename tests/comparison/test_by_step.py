"""Thresholds by step and by region, certified on live runs of models whose risk at every step is known."""

from __future__ import annotations

from collections.abc import Mapping
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
from cases import run_command
from haltkit.calibration.conditional import NEVER, Asked, evidence, halting_steps
from haltkit.card import Card
from haltkit.comparison.by_region import joint_path
from haltkit.comparison.certify import Certified, certify
from haltkit.comparison.choice import save_certified
from haltkit.comparison.live import Live
from haltkit.comparison.settings import Sweeps, candidates
from haltkit.driving import Pass
from haltkit.models.reasoner.config import LayerConfig, build_reasoner
from haltkit.models.reasoner.subject import reasoner_subject, sequences_of
from haltkit.models.reasoner.task import make_task
from haltkit.protocol import HaltingPolicy, LoopStep
from haltkit.recording.replay import scores
from haltkit.setting import Setting
from haltkit.specs import spec_of
from haltkit.stepwise import StepTaus, TauByStep
from haltkit.subject import Subject
from haltkit.watching import watch_subject

STEPS = 8
SLOW = 1 / 64


class Settle(nn.Module):
    """A row ``(h, c, y)`` takes long steps up to step c, short ones after it, and predicts class 1 from step h on."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h, c, y = x.unbind(-1)
        return torch.stack([h, c, torch.where(y < c, y + 1, y + SLOW)], -1)


def _readout(x: Tensor) -> Tensor:
    h, c, y = x.unbind(-1)
    settled = torch.where(y < c, y, c + (y - c) / SLOW) - h + 0.5
    return torch.stack([-settled, settled], -1)


class Model(nn.Module):
    def __init__(self, regions: int = 1) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(Settle() for _ in range(regions))


def _subject(right: Tensor, calm: Tensor, *, size: int = 16, lying: bool = False, **more: Any) -> Subject:
    """Of sequences ``(N, T)`` whose rows are right from steps ``right`` on, and calm after ``calm``.

    Args:
        lying: rows are right at every fixed depth, whatever a live run says of them.
    """
    model = Model().eval()

    def run(x: Tensor, depth: int | Mapping[str, int]) -> Tensor:
        for _ in range(depth if isinstance(depth, int) else depth["loop"]):
            x = model.bodies[0](x)
        return torch.cat([torch.zeros_like(x[..., :1]), x[..., 1:]], -1) if lying else x

    def adaptive(x: Tensor, policies: Mapping[str, HaltingPolicy[Any]], budget: int) -> Pass:
        result = haltkit.run_loop(model.bodies[0], x, policies["loop"], max_steps=budget, readout=_readout)
        return Pass(result.x, {"loop": result.steps}, {"loop": result.outcome})

    rows = torch.stack([right.double(), calm.double(), torch.zeros(right.shape, dtype=torch.float64)], -1)
    given: dict[str, Any] = {
        "samples": list(rows.split(size)),
        "readout": _readout,
        "logits": _readout,
        "loss": lambda output, sample: (_readout(output)[..., 0] > 0).double(),
        "unit": "wrong",
        "full_depth": STEPS,
        "granularity": "sequence",
        "adaptive": adaptive,
    }
    return Subject.of_modules(model, run, {"loop": "bodies.0"}, **(given | more))


def _deceptive(units: int, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Steps ``(units, rows)``: one unit in eight calms down at step 1, and a sixth of these is right at step 7 only.

    So of all units 1/48 is wrong where every unit halts as soon as it is calm, and of those that halt by step 2 one in
    six.
    """
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(units)[torch.randperm(units, generator=generator)] % 48
    calm = torch.where(kind < 6, 1, 4)
    right = torch.where(kind == 0, 7, calm)
    return right.unsqueeze(1).expand(-1, rows), calm.unsqueeze(1).expand(-1, rows)


EPSILON = 0.05


def _risks(subject: Subject, setting: Setting) -> dict[int, float]:
    """Among the rows that halt by each step, the share whose prediction is another than at full depth."""
    wrong, steps = [], []
    for sample in subject.samples:
        done = subject.run(sample, setting)
        full = _readout(subject.run(sample, STEPS).output).argmax(-1)
        wrong.append((_readout(done.output).argmax(-1) != full).flatten())
        steps.append(done.steps["loop"].flatten())
    taken, lost = torch.cat(steps), torch.cat(wrong).double()
    return {k: float(lost[taken <= k].mean()) for k in range(1, STEPS + 1) if bool((taken <= k).any())}


@pytest.fixture(scope="module")
def population() -> Subject:
    return _subject(*_deceptive(48 * 40))


@pytest.fixture(scope="module")
def certified(population: Subject) -> Certified:
    return certify(population, "norm", epsilon=EPSILON, delta=0.1, by="step")


def test_what_halts_early_is_safe_by_step_where_a_single_threshold_hides_it(
    population: Subject, certified: Certified
) -> None:
    plain = certify(population, "norm", epsilon=EPSILON, delta=0.1)
    assert plain.setting is not None
    assert certified.setting is not None
    risks = _risks(population, plain.setting)
    assert risks[STEPS] == pytest.approx(1 / 48)
    assert risks[2] == pytest.approx(1 / 6)  # the plain certificate promises nothing about these
    safe = _risks(population, certified.setting)
    assert max(safe.values()) <= EPSILON
    assert certified.steps["loop"] < STEPS - 2  # all halt as soon as the late ones are calm
    assert certified.certificate.correction == "by-step"
    assert "halt by step t" in certified.certificate.promise


def test_a_proposal_from_losses_that_are_not_those_of_live_runs_costs_steps_and_never_the_promise() -> None:
    subject = _subject(*_deceptive(48 * 40), lying=True)
    found = certify(subject, "norm", epsilon=EPSILON, delta=0.1, by="step")
    assert found.setting is not None
    assert len(found.certificate.settings) > found.certificate.chosen + 1  # what was proposed next did not pass
    assert max(_risks(subject, found.setting).values()) <= EPSILON


@pytest.mark.parametrize(("policy", "late"), [("norm", 0), ("norm:patience=2", 1)])
def test_where_nothing_deceives_what_is_calm_early_halts_early(policy: str, late: int) -> None:
    _, calm = _deceptive(48 * 20)
    found = certify(_subject(calm, calm), policy, epsilon=0.1, delta=0.2, by="step")
    assert found.setting is not None
    assert found.steps["loop"] <= 5 * 7 / 8 + 2 / 8 + late + 0.01  # one step after each is calm
    assert found.certificate.empirical_risk == 0


def test_rows_that_halt_one_by_one_are_safe_by_step_too() -> None:
    """In each sequence some rows calm down early, and a sixth of them too early."""
    right, calm = (steps.reshape(-1, 48) for steps in _deceptive(48 * 600, 1))
    subject = _subject(right, calm, size=20, granularity="token")
    found = certify(subject, "norm", epsilon=EPSILON, delta=0.1, by="step")
    assert found.setting is not None
    assert max(_risks(subject, found.setting).values()) <= EPSILON
    assert found.steps["loop"] < STEPS - 2
    assert found.certificate.units == 300  # sequences, not rows
    assert "rows of a new sequence" in found.certificate.promise
    plain = certify(subject, "norm", epsilon=EPSILON, delta=0.1)
    assert plain.setting is not None
    assert _risks(subject, plain.setting)[2] > 2 * EPSILON


def test_batches_that_halt_together_are_one_unit() -> None:
    _, calm = _deceptive(48 * 30)
    found = certify(_subject(calm, calm, size=4), "norm:granularity=batch", epsilon=0.1, delta=0.2, by="step")
    assert (found.certificate.units, found.certificate.unit) == (180, "batch")


def test_what_is_certified_by_step_can_be_watched(population: Subject, certified: Certified, tmp_path: Path) -> None:
    """The risk of all is at most epsilon too, and spot checks are about it."""
    save_certified(tmp_path / "card", certified, population, "made up rows")
    run = watch_subject(population, Card.load(tmp_path / "card"), rate=1.0)
    for sample in population.samples[:20]:
        run(sample)
    assert run.checks.monitor.checks == 20
    assert not run.alarm


@pytest.mark.parametrize("more", ["min_steps=3", "check_every=2", "check_every=3,patience=2"])
def test_steps_at_which_nothing_may_halt_are_not_proposed(more: str) -> None:
    _, calm = _deceptive(48 * 20)
    plain = certify(_subject(calm, calm), f"norm:{more},tau=0.5", epsilon=0.1, delta=0.2)
    found = certify(_subject(calm, calm), f"norm:{more}", epsilon=0.1, delta=0.2, by="step")
    assert found.setting is not None
    assert plain.setting is not None
    assert len(found.certificate.settings) == found.certificate.chosen + 1  # no test that nothing can pass
    assert found.steps["loop"] == pytest.approx(plain.steps["loop"], abs=0.05)


def test_rows_that_halt_one_by_one_are_watched_by_the_loss_that_was_certified() -> None:
    """Where sequences are right or wrong as a whole, rows that halt alone are promised their share."""
    _, calm = (steps.reshape(-1, 48) for steps in _deceptive(48 * 200, 1))
    for policy, loss in (("norm:granularity=token", "disagreement"), ("norm", "disagreement-anywhere")):
        found = certify(_subject(calm, calm, size=20), policy, epsilon=0.1, delta=0.2, by="step")
        assert found.setting is not None
        assert found.certificate.loss == loss


def test_too_few_units_certify_nothing_and_say_how_many_are_needed() -> None:
    found = certify(_subject(*_deceptive(96)), "norm", epsilon=0.01, delta=0.05, by="step")
    assert found.setting is None
    assert "308" in found.certificate.reason


def test_a_card_with_thresholds_by_step_is_taken_everywhere(
    population: Subject, certified: Certified, tmp_path: Path
) -> None:
    save_certified(tmp_path / "card", certified, population, "made up rows")
    card = Card.load(tmp_path / "card")
    assert card.certificate == certified.certificate
    assert "tau_by_step=" in card.policy
    assert certified.setting is not None
    assert card.policies(["loop"]) == certified.setting.policies
    compared = haltkit.compare(
        Subject(**{**vars(population), "samples": population.samples[:4]}),
        policies=[str(tmp_path / "card"), "norm:tau=0.1"],
        repeats=1,
    )
    row = next(row for row in compared.rows if row.promise)
    assert row.steps["loop"] == pytest.approx(certified.steps["loop"], abs=0.5)
    model = _Looping()
    with haltkit.attach(model, card.policy, loop=haltkit.Loop(["bodies.0"])) as session:
        model(population.samples[0])
    expected = population.run(population.samples[0], certified.setting).steps["loop"].amax()
    assert session.tally["loop"].computed == expected


class _Looping(Model):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(STEPS):
            x = self.bodies[0](x)
        return x


thresholds = st.lists(st.sampled_from([None, 0.3, 0.6, 1.0, 1.7, 3.0]), min_size=5, max_size=5).filter(any)


@given(thresholds)
def test_sequences_that_do_not_see_each_other_halt_and_end_as_at_a_fixed_depth(taus: list[float | None]) -> None:
    """Their scores in a recording, and their outputs at fixed depths, are those of a live run in compact execution."""
    subject, recorded, outputs = _reasoner()
    policy = haltkit.policy(
        f"norm-rel:granularity=sequence,tau_by_step={StepTaus.of_steps([t and t / 4 for t in taus])}"
    )
    done = subject.run(subject.samples[0], Setting.of(policy, subject.regions))
    (steps,) = done.steps.values()
    predicted = halting_steps(recorded, np.array([NEVER if tau is None else tau / 4 for tau in taus]))
    assert steps[:, 0].tolist() == predicted.tolist()
    for number, step in enumerate(predicted):
        torch.testing.assert_close(done.output[number], outputs[step - 1][number], rtol=1e-9, atol=1e-9)


_KNOWN: list[Any] = []


def _reasoner() -> tuple[Subject, Any, list[Tensor]]:
    """A small model in float64, the scores of its sequences at steps 1 to 5, and what it says at depths 1 to 6."""
    if not _KNOWN:
        torch.manual_seed(0)
        task = make_task("sudoku", {})
        model = build_reasoner(task, LayerConfig(d_model=16, n_head=2)).double().eval()
        subject = reasoner_subject(model, task, sequences_of(task, 12)[1], batch=12, max_loops=6)
        sample = subject.samples[0]
        region = next(iter(subject.record(subject.inputs(sample), 6).regions.values()))
        seen = scores("norm-rel:tau=1,granularity=sequence", region)[:-1, :, 0].T
        _KNOWN.extend([subject, seen.double().numpy(), [subject.run(sample, k).output for k in range(1, 7)]])
    return _KNOWN[0], _KNOWN[1], _KNOWN[2]


@given(st.integers(0, 2**31), st.integers(1, 4), st.floats(0.01, 0.9))
def test_evidence_is_above_epsilon_exactly_where_the_rows_that_halted_lose_more(
    seed: int, rows: int, epsilon: float
) -> None:
    generator = np.random.default_rng(seed)
    steps, losses = generator.integers(1, 5, (30, rows)), generator.random((30, rows))
    found = evidence(steps, losses, 2, epsilon)
    halted = steps <= 2
    assert ((found >= 0) & (found <= 1)).all()
    if halted.any() and abs(excess := losses[halted].mean() - epsilon) > 1e-9:
        assert (found.mean() > epsilon) == (excess > 0)


def test_nothing_halted_is_no_evidence_of_safety() -> None:
    for rows in (1, 3):
        steps, losses = np.full((50, rows), 9), np.zeros((50, rows))
        assert Asked(0.1, 0.1, "betting").p_value(steps, losses, 4) == 1.0


# --- the policy


@given(thresholds)
def test_thresholds_by_step_come_back_from_their_text(taus: list[float | None]) -> None:
    by_step = StepTaus.of_steps(taus)
    assert StepTaus.of_text(str(by_step)) == by_step
    score = torch.zeros(())
    assert [by_step.at(k, score) for k in range(1, 6)] == [NEVER if tau is None else tau for tau in taus]
    assert by_step.at(500, score) == (NEVER if taus[-1] is None else taus[-1])  # the last holds for ever
    together = by_step.at(torch.arange(1, 6), score)
    assert isinstance(together, Tensor)
    assert together.tolist() == pytest.approx([NEVER if tau is None else tau for tau in taus])
    policy = haltkit.policy(f"accel:granularity=sequence,min_steps=2,tau_by_step={by_step}")
    assert spec_of(policy).build() == policy


def test_one_threshold_from_the_first_step_on_is_the_policy_itself() -> None:
    subject = _subject(*_deceptive(48))
    for keys in ("", ",patience=2", ",granularity=sequence"):
        one, other = (subject.run(subject.samples[0], f"norm:{tau}{keys}") for tau in ("tau=0.5", "tau_by_step=0.5@1"))
        assert torch.equal(one.steps["loop"], other.steps["loop"])


def test_rows_that_began_at_different_steps_have_thresholds_of_their_own() -> None:
    policy = TauByStep(haltkit.policies.StepNorm(2.0), StepTaus(((2, 1.0), (4, 2.0))))
    x = torch.full((4, 1), 0.0)
    step = LoopStep(torch.tensor([1, 2, 4, 9]), x + 1.5, x, torch.ones(4, dtype=torch.bool))
    assert policy.update(None, step)[1].halt.tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("norm:tau=1,tau_by_step=1@2", "drop one"),
        ("stable:tau_by_step=1@2", "has no tau"),
        ("norm:tau_by_step=1", "TAU@STEP"),
        ("norm:tau_by_step=1@0", "at least 1"),
        ("norm:tau_by_step=0@3", "never halt"),
        ("norm:tau_by_step=1@3/2@3", "ascend"),
        ("norm:tau_by_step=nan@3", "finite"),
        ("gate:tau_by_step=1@3/2@4", "above 1"),
        ("any(norm:tau=1|accel:tau=1):tau_by_step=1@2", "no key"),
    ],
)
def test_thresholds_by_step_that_make_no_sense_are_refused(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        haltkit.policy(spec)


@pytest.mark.parametrize(
    ("more", "asked", "said"),
    [
        ({}, {"policy": "norm:tau=0.1"}, "open tau"),
        ({}, {"policy": "stable"}, "open tau"),
        ({}, {"policy": "any(norm|accel)"}, "open tau"),
        ({}, {"method": "conformal"}, "p-values"),
        ({}, {"by": "token"}, "step, region"),
        ({"full_depth": 1}, {}, "one step"),
        ({"loss": lambda out, _: (_readout(out)[..., 0] > 0).any(-1).double()}, {"risk": "answer"}, "granularity=seq"),
    ],
)
def test_what_cannot_be_certified_by_step_is_refused(
    more: Mapping[str, Any], asked: Mapping[str, Any], said: str
) -> None:
    subject = _subject(*_deceptive(96), granularity="token", **more)
    with pytest.raises(ValueError, match=said):
        certify(subject, **{"policy": "norm", "epsilon": 0.05, "delta": 0.1, "by": "step", **asked})


def test_rows_of_sequences_of_different_lengths_are_no_units_of_one_kind() -> None:
    _, calm = _deceptive(96)
    subject = _subject(calm, calm, size=8, granularity="token")
    ragged = replace(subject, samples=[x[:, : 1 + number % 2] for number, x in enumerate(subject.samples)])
    with pytest.raises(ValueError, match="1 to 2 rows.*granularity=sequence"):
        certify(ragged, "norm", epsilon=0.2, delta=0.2, by="step")
    assert certify(ragged, "norm:granularity=sequence", epsilon=0.2, delta=0.2, by="step").certificate.units == 48


def test_thresholds_by_step_are_for_one_region() -> None:
    with pytest.raises(ValueError, match="this model has a, b"):
        certify(_two_regions(40), "norm", epsilon=0.05, delta=0.1, by="step")


# --- by region


def _two_regions(units: int = 400) -> Subject:
    """Rows that are right as soon as they are calm in the second region, and from step 7 on, for one in three, in the first.

    They calm down at steps 1 to 6, in each region for itself.
    """
    model = Model(2).eval()

    def through(x: Tensor, k: int, run: Any) -> Tensor:
        return run(model.bodies[k], torch.stack([x[..., 2 * k], x[..., 2 * k + 1], torch.zeros_like(x[..., 0])], -1))

    def both(x: Tensor, runs: Any) -> Tensor:
        return torch.minimum(*(_readout(through(x, k, run))[..., 1] for k, run in enumerate(runs)))

    def run(x: Tensor, depth: int | Mapping[str, int]) -> Tensor:
        steps = [depth, depth] if isinstance(depth, int) else [depth["a"], depth["b"]]

        def fixed(count: int) -> Any:
            def go(body: nn.Module, x: Tensor) -> Tensor:
                for _ in range(count):
                    x = body(x)
                return x

            return go

        return both(x, map(fixed, steps))

    def adaptive(x: Tensor, policies: Mapping[str, HaltingPolicy[Any]], budget: int) -> Pass:
        steps: dict[str, Tensor] = {}

        def halting(name: str) -> Any:
            def go(body: Any, x: Tensor) -> Tensor:
                result = haltkit.run_loop(body, x, policies[name], max_steps=budget, readout=_readout)
                steps[name] = result.steps
                return result.x

            return go

        return Pass(both(x, map(halting, "ab")), steps)

    generator = torch.Generator().manual_seed(0)
    calm = torch.randint(1, 7, (2, units, 1), generator=generator)
    late = torch.where(torch.arange(units).unsqueeze(1) % 3 == 0, 7, calm[1])
    samples = torch.stack([late, calm[1], calm[0], calm[0]], -1).double()
    settled = lambda out: torch.stack([-out, out], -1)  # noqa: E731
    return Subject.of_modules(
        model,
        run,
        {"a": "bodies.0", "b": "bodies.1"},
        samples=list(samples.split(10)),
        readout=_readout,
        logits=settled,
        loss=lambda out, _: (out < 0).double(),
        full_depth=STEPS,
        adaptive=adaptive,
    )


def test_a_joint_budget_goes_where_steps_are_cheap() -> None:
    """In the first region no threshold is safe, so all of the saving is in the second; one for both certifies none."""
    subject = _two_regions()
    found = certify(subject, "norm", epsilon=0.05, delta=0.1, by="region", taus=[1e-3, 0.5])
    assert found.setting is not None
    assert found.steps["a"] == STEPS
    assert found.steps["b"] < 5
    assert found.certificate.units == 350  # the first eighth found the path
    even = certify(subject, {"a": "norm", "b": "norm"}, epsilon=0.05, delta=0.1, taus=[1e-3, 0.5])
    assert even.setting is not None
    assert even.steps == {"a": STEPS, "b": STEPS}


def test_a_path_begins_with_all_regions_at_their_safest_and_spends_steps_only_for_savings() -> None:
    subject = _two_regions(80)
    look = Subject(**{**vars(subject), "samples": subject.samples[:1]}).look()
    sweeps = Sweeps.on(subject, look, [1e-3, 0.5, 0.6])
    live = Live.of(subject, subject.samples, STEPS, "disagreement", 1.0)
    ran: list[Setting] = []
    path = joint_path(candidates("norm", subject)[0], sweeps, live, ran.append)
    assert len(ran) == 6  # three thresholds, two regions
    steps = [live.run(setting).steps for setting in path]
    assert steps[0] == {"a": STEPS, "b": STEPS}
    totals = [sum(one.values()) for one in steps]
    assert totals == sorted(totals, reverse=True)
    assert len(path) == 3  # 0.5 and 0.6 halt the same rows


def test_thresholds_by_region_keep_a_part_that_is_given() -> None:
    found = certify(
        _two_regions(), {"a": "norm", "b": "norm:tau=0.5"}, epsilon=0.2, delta=0.1, by="region", taus=[1e-3, 0.5]
    )
    assert found.setting is not None
    assert spec_of(found.setting.policies["b"]).get("tau") == "0.5"


def test_the_command_refuses_what_it_cannot_do_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--by", "token"], ["--by", "step", "--policy", "norm:tau=1"]):
        asked = ["calibrate", "chase", "--sequences", "16", "--batch", "8", "--max-loops", "4", *options]
        assert run_command(*asked) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_command_calibrates_by_step(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--sequences", "48", "--batch", "8", "--max-loops", "6", "--epsilon", "0.3", "--delta", "0.3"]
    assert run_command("calibrate", "chase", "--policy", "norm", "--by", "step", *asked) == 0
    assert "unit sequence" in capsys.readouterr().out
