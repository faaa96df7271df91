"""Certifying on live runs: on a model whose risk at every threshold is known, and the card that is written of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from cases import run_command
from haltkit import timing
from haltkit.card import Card, is_card
from haltkit.comparison.certify import certify
from haltkit.comparison.choice import save_certified
from haltkit.comparison.settings import candidates
from haltkit.identity import Identity
from haltkit.models.checkpoint import build_model
from haltkit.models.reasoner.config import LayerConfig, build_reasoner
from haltkit.models.reasoner.task import make_task
from haltkit.models.training.config import load_config
from haltkit.protocol import Heads
from haltkit.subject import Subject

STEPS = 8


class Approach(nn.Module):
    """A row ``(h, x)`` has x = 2^-k after step k and predicts class 1 from step h on."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _Halve()

    def forward(self, x: Tensor, steps: int = STEPS) -> Tensor:
        for _ in range(steps):
            x = self.body(x)
        return x


class _Halve(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[..., 0], x[..., 1] * self.factor], -1)


def _logits(x: Tensor) -> Tensor:
    settled = 1.5 * 2 ** -x[..., 0] - x[..., 1]
    return torch.stack([-settled, settled], -1)


def _subject(hops: Tensor, size: int = 1, **more: Any) -> Subject:
    """Of sequences ``(N, T)`` whose rows settle at the given steps, in samples of ``size``."""
    model = Approach().eval()
    inputs = torch.stack([hops.double(), torch.ones_like(hops).double()], -1)
    model.double()
    given: dict[str, Any] = {
        "samples": list(inputs.split(size)),
        "loss": lambda output, sample: (_logits(output)[..., 0] > 0).double(),
        "logits": _logits,
        "full_depth": STEPS,
        "unit": "wrong",
        **more,
    }
    return Subject.attached(model, loop=haltkit.Loop(["body"]), run_at=model, granularity="batch", **given)


def _hops(units: int, late: int) -> Tensor:
    """Sequences of 10 rows that settle at step 2, and in each ``late`` of them at step 5."""
    hops = torch.full((units, 10), 2)
    hops[:, :late] = 5
    return hops


# The step norm is 2^-k at step k: thresholds that halt at steps 7, 6, 5, 4 and 3.
TAUS = [1.5 * 2.0**-k for k in (7, 6, 5, 4, 3)]


@pytest.mark.parametrize("risk", ["disagreement", "loss-gap", "answer"])
def test_certifies_the_last_threshold_before_rows_are_lost(risk: Any) -> None:
    found = certify(_subject(_hops(151, 1)), "norm", risk=risk, epsilon=0.05, delta=0.1, taus=TAUS)
    assert found.setting is not None
    assert found.setting.tau == TAUS[2]
    assert found.steps == {"loop": 5.0}
    assert found.certificate.units == 150  # the first sample chose the thresholds
    assert found.certificate.empirical_risk == 0
    assert len(found.certificate.settings) == 4  # the first that failed is the last that was run


def test_a_risk_below_epsilon_is_accepted() -> None:
    found = certify(_subject(_hops(151, 1)), "norm", epsilon=0.2, delta=0.1, taus=TAUS)
    assert found.setting is not None
    assert found.setting.tau == TAUS[4]
    assert found.certificate.empirical_risk == pytest.approx(0.1)


def test_where_whole_sequences_count_one_row_loses_all() -> None:
    subject = _subject(_hops(151, 1))
    whole = Subject(**{**vars(subject), "granularity": "sequence"})
    one = certify(whole, "norm:granularity=batch", epsilon=0.2, delta=0.1, taus=TAUS)
    assert one.setting is not None
    assert one.setting.tau == TAUS[2]


def test_sequences_that_halt_together_are_one_unit() -> None:
    found = certify(_subject(_hops(100, 1), size=10), "norm", epsilon=0.2, delta=0.1, taus=TAUS)
    assert (found.certificate.units, found.certificate.unit) == (9, "batch")


def test_thresholds_are_found_without_being_told() -> None:
    found = certify(_subject(_hops(151, 1)), "norm", epsilon=0.05, delta=0.1)
    assert found.steps == {"loop": 5.0}


@pytest.mark.parametrize(("policy", "steps"), [("stable", 6.0), ({"loop": "norm"}, 5.0)])
def test_settings_without_a_single_threshold_are_tested_from_the_safest(policy: Any, steps: float) -> None:
    """Of ``stable`` the fewest times come first in a sweep, and of policies by region the earliest halts."""
    found = certify(_subject(_hops(151, 1), readout=_logits), policy, epsilon=0.05, delta=0.1)
    assert found.steps == {"loop": steps}
    assert found.certificate.empirical_risk == 0


def test_a_gate_alone_is_certified_without_headroom() -> None:
    heads = Heads(None, lambda x: 100 * (2**-4.5 - x[..., 1]))
    found = certify(_subject(_hops(151, 1), readout=heads), "gate:tau=0.5", epsilon=0.05, delta=0.1)
    assert found.steps == {"loop": 5.0}
    assert not found.headroom


def test_a_gate_that_is_shut_gets_a_threshold_that_it_takes() -> None:
    """One minus its probability is 1 to rounding: a threshold above that is none."""
    subject = _subject(_hops(151, 1), readout=Heads(None, lambda x: torch.full_like(x[..., 1], -60.0)))
    found = certify(subject, "gate", epsilon=0.05, delta=0.1)
    assert found.setting is not None
    assert (found.setting.tau, found.steps) == (1.0, {"loop": float(STEPS)})


@dataclass(frozen=True)
class _World:
    """All processes decide together, as in a process group of one."""

    policy: haltkit.HaltingPolicy[Any]
    granularity: str = "world"

    def init(self, x0: Tensor) -> Any:
        return self.policy.init(x0)

    def update(self, state: Any, step: haltkit.LoopStep) -> tuple[Any, haltkit.Verdict]:
        return self.policy.update(state, step)


@pytest.mark.parametrize("by", [None, "region"])
def test_what_halts_with_other_processes_halts_with_its_batch(by: Any) -> None:
    policy = _World(haltkit.policy("norm:tau=0.01,granularity=batch"))
    found = certify(_subject(_hops(100, 1), size=10), policy, epsilon=0.2, delta=0.2, by=by)
    assert (found.certificate.units, found.certificate.unit) == (9, "batch")


def test_too_few_units_say_how_many_are_needed() -> None:
    found = certify(_subject(_hops(80, 0)), "norm", epsilon=0.01, delta=0.05, taus=TAUS)
    assert found.setting is None
    assert "308" in found.certificate.reason


@pytest.mark.parametrize(
    ("more", "asked", "said"),
    [
        ({"logits": None}, {}, "logits"),
        ({"unit": "nats"}, {"risk": "answer"}, "labels"),
        ({}, {"risk": "harm"}, "loss-gap"),
        ({"samples": [torch.ones(5, 2)]}, {"method": "guess"}, "conformal"),  # before anything else
        ({}, {"seed": -1}, "seed"),
        ({}, {"policy": "norm,accel"}, "2 policies"),
        ({"samples": [torch.ones(5, 2)]}, {}, "at least two"),
    ],
)
def test_what_cannot_be_certified_is_refused(more: Mapping[str, Any], asked: Mapping[str, Any], said: str) -> None:
    given = {"policy": "norm", "epsilon": 0.05, "delta": 0.1, "taus": TAUS, **asked}
    with pytest.raises(ValueError, match=said):
        certify(_subject(_hops(100, 1), **more), **given)


@pytest.fixture
def certified(tmp_path: Path) -> tuple[Subject, Path]:
    subject = _subject(_hops(151, 1))
    found = certify(subject, "norm", epsilon=0.05, delta=0.1, taus=TAUS)
    save_certified(tmp_path / "card", found, subject, "made up rows")
    return subject, tmp_path / "card"


def test_a_card_gives_back_what_was_certified(certified: tuple[Subject, Path]) -> None:
    subject, folder = certified
    card = Card.load(folder)
    assert is_card(str(folder))
    assert card == Card.load(folder / "card.yaml")
    assert card.certificate is not None
    assert card.policy == card.certificate.setting
    assert card.identity == Identity.of(subject.model, STEPS)
    (candidate,) = candidates(str(folder), subject)
    assert not candidate.open
    with haltkit.attach(subject.model, folder) as session:
        subject.model(subject.samples[0])
    assert session.tally["loop"].computed == 5


def test_a_card_says_what_was_measured_on_which_machine(tmp_path: Path) -> None:
    subject = replace(_subject(_hops(151, 1)), readout=_logits)
    found = certify(subject, "norm", epsilon=0.05, delta=0.1, taus=TAUS)
    save_certified(tmp_path / "card", found, subject, "made up rows")
    measured = Card.load(tmp_path / "card").measured
    assert measured is not None
    assert (measured.machine, measured.item) == (timing.machine(), subject.item)
    assert found.ms is not None
    assert found.full_ms is not None
    assert measured.ms == pytest.approx(found.ms, rel=1e-3)
    assert found.time == found.ms / found.full_ms
    assert measured.steps == {"loop": 5.0}
    assert measured.oracle_steps == {"loop": pytest.approx(2.3)}  # nine rows settle at step 2, one at step 5
    assert (measured.fixed_depths, measured.level) == ({"loop": 5}, 0.95)  # the agreement that is promised


def test_the_fixed_depth_of_a_card_is_at_the_level_that_was_asked_for(tmp_path: Path) -> None:
    """One row in ten settles at step 5: at an agreement of 0.8 a fixed depth of 2 is enough."""
    subject = replace(_subject(_hops(151, 1)), readout=_logits)
    expected: dict[Any, tuple[float, int]] = {"disagreement": (0.8, 2), "loss-gap": (0.99, 5), "answer": (0.99, 5)}
    for risk, (level, depth) in expected.items():
        found = certify(subject, "norm", risk=risk, epsilon=0.2, delta=0.1, taus=TAUS)
        save_certified(tmp_path / risk, found, subject, "made up rows")
        measured = Card.load(tmp_path / risk).measured
        assert measured is not None
        assert (measured.level, measured.fixed_depths) == (level, {"loop": depth})


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        {"machine": "m", "item": "row", "ms": 1.0, "full_ms": 2.0},
        {"machine": "m", "item": "row", "ms": 0, "full_ms": 2.0, "steps": {}},
        {"machine": "m", "item": "row", "ms": 1.0, "full_ms": "fast", "steps": {}},
        {"machine": "m", "item": "row", "ms": 1.0, "full_ms": 2.0, "steps": {"loop": "few"}},
        {"machine": "m", "item": "row", "ms": 1.0, "full_ms": 2.0, "steps": {}, "certified": 1},
    ],
)
def test_a_card_with_other_figures_than_a_card_has_is_refused(tmp_path: Path, wrong: Any) -> None:
    (tmp_path / "card.yaml").write_text(json.dumps({"policy": "norm:tau=1", "measured": wrong}))
    with pytest.raises(ValueError, match=r"measured has|positive"):
        Card.load(tmp_path / "card.yaml")


def test_another_model_is_refused(certified: tuple[Subject, Path]) -> None:
    subject, folder = certified
    card = Card.load(folder)
    card.check(subject.model, full_depth=STEPS)
    card.check(subject.model)
    other = Approach().double()
    with torch.no_grad():
        other.body.factor.add_(0.1)
    wider = Approach().double()
    wider.register_buffer("extra", torch.ones(1))
    for model, depth, said in (
        (subject.model, STEPS + 1, "full depth"),
        (other, STEPS, "other weights"),
        (Approach(), STEPS, "dtype"),
        (wider, STEPS, "structure"),
    ):
        with pytest.raises(ValueError, match=said):
            card.check(model, full_depth=depth)
    with pytest.raises(ValueError, match="other weights"):
        haltkit.attach(other, folder)
    with pytest.raises(ValueError, match="full depth"):
        candidates(str(folder), Subject(**{**vars(subject), "full_depth": STEPS + 1}))


def test_a_card_whose_certificate_is_gone_or_edited_is_refused(certified: tuple[Subject, Path]) -> None:
    _, folder = certified
    path = folder / "certificate.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "chosen": 0}))
    with pytest.raises(ValueError, match="certificate for"):
        Card.load(folder)
    path.unlink()
    with pytest.raises(ValueError, match="not beside it"):
        Card.load(folder)


def test_what_was_certified_on_one_model_is_compared_and_certified_again_on_another(
    certified: tuple[Subject, Path], tmp_path: Path
) -> None:
    subject, folder = certified
    with torch.no_grad():
        subject.model.body.factor.sub_(0.01)
    card, said = Card.load(folder).without_certificate(), "(without its certificate)"
    with pytest.raises(ValueError, match="other weights"):
        haltkit.compare(subject, policies=[folder], repeats=1)
    compared = haltkit.compare(subject, policies=[card], repeats=1)
    (row,) = (row for row in compared.rows if row.decided == "policy")
    line = "used without its certificate (other weights): nothing is promised"
    assert (row.policy, row.label, row.standing) == (f"card {said}", f"{card.policy} {said}", line)
    assert haltkit.Comparison.from_json(compared.to_json()).rows[-1].standing == compared.rows[-1].standing
    found = certify(subject, card, epsilon=0.05, delta=0.1)
    assert (found.certificate.setting, str(found.standing)) == (card.policy, line)
    save_certified(tmp_path / "again", found, subject, "made up rows")
    again = Card.load(tmp_path / "again")
    assert again.check(subject.model, subject.regions, STEPS).promise == found.certificate.promise


def test_cards_of_one_name_are_compared_under_names_of_their_own(
    certified: tuple[Subject, Path], tmp_path: Path
) -> None:
    subject, folder = certified
    for place in ("a", "b", "a/norm"):
        (tmp_path / place).mkdir()
        Card.load(folder).save(tmp_path / place / folder.name)
    Card("norm:tau=0.3").save(tmp_path / "b" / "norm.yaml")
    a, b, c = (tmp_path / place / folder.name for place in ("a", "b", "a/norm"))
    waived = Card.load(c).without_certificate()
    given = [a, str(b), folder / "card.yaml", waived, waived, tmp_path / "b" / "norm.yaml", "norm"]
    told = [one.name for one in candidates(given, subject)]
    assert told == [
        str(a),
        str(b),
        str(folder),
        f"{c} (without its certificate)",
        f"{c} (without its certificate) (2)",
        str(tmp_path / "b" / "norm"),
        "norm",
    ]
    rows = haltkit.compare(subject, policies=[a, b], repeats=1).rows
    assert {row.policy for row in rows if row.decided == "policy"} == {str(a), str(b)}
    assert [one.name for one in candidates([a, "norm"], subject)] == ["card", "norm"]  # no clash, no path


def test_a_card_does_not_replace_what_is_none(certified: tuple[Subject, Path], tmp_path: Path) -> None:
    _, folder = certified
    Card.load(folder).save(folder)  # its own folder
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="no card"):
        Card.load(folder).save(tmp_path / "work")
    assert [entry.name for entry in (tmp_path / "work").iterdir()] == ["thesis.txt"]


def test_without_a_certified_setting_nothing_is_written(tmp_path: Path) -> None:
    subject = _subject(_hops(80, 0))
    found = certify(subject, "norm", epsilon=0.01, delta=0.05, taus=TAUS)
    with pytest.raises(ValueError, match="308"):
        save_certified(tmp_path / "card", found, subject, "made up rows")
    assert not (tmp_path / "card").exists()


def test_an_identity_does_not_depend_on_the_order_of_modules() -> None:
    model = Approach()
    first = Identity.of(model, 4)
    assert Identity.of_fields(first.fields()) == first
    assert first.differences(Identity.of(model.bfloat16(), 4)) == ["dtype bfloat16 instead of float32"]


def test_an_identity_tells_models_apart_that_differ_in_their_config_alone() -> None:
    one, *others = (
        build_reasoner(make_task("chase", {}), LayerConfig(d_model=8, **more))
        for more in ({"n_head": 4}, {"n_head": 2}, {"n_head": 4, "noise_seed": 1})
    )
    gpt, *gpts = (
        build_model(replace(load_config("tiny").model, **more)) for more in ({}, {"noise_seed": 1}, {"n_head": 1})
    )
    for known, unknown in ((one, others), (gpt, gpts)):
        same = copy.deepcopy(known)
        assert Identity.of(known, 4) == Identity.of(same, 4)
        for other in unknown:
            other.load_state_dict(known.state_dict())
            (difference,) = Identity.of(known, 4).differences(Identity.of(other, 4))
            assert "config" in difference


def test_of_a_transformers_config_only_what_the_function_depends_on_counts() -> None:
    class Config(dict[str, Any]):
        def to_dict(self) -> dict[str, Any]:
            return dict(self)

    def of(**config: Any) -> Identity:
        model = Approach()
        model.config = Config(config)
        return Identity.of(model, 4)

    assert of(heads=2, text={"_name_or_path": "a", "dtype": torch.float32}, transformers_version="5") == of(
        text={}, heads=2, use_cache=False
    )
    assert of(heads=2) != of(heads=4)
    assert of(text={"heads": 2}) != of(text={"heads": 4})
    assert of(heads=2) != Identity.of(Approach(), 4)


def test_a_folder_without_a_card_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cards").mkdir()
    (tmp_path / "norm").mkdir()
    assert not is_card("norm")
    assert not is_card("x" * 5000)
    assert run_command("solve", "chase", "0>1 1>1 0?", "--policy", "cards") == 2
    assert "cards/card.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--epsilon", "0"], "--epsilon 0.0 is outside (0, 1)"),
        (["--epsilon", "1"], "--epsilon 1.0 is outside (0, 1)"),
        (["--risk", "loss-gap", "--loss-bound", "0.2", "--epsilon", "0.3"], "--epsilon 0.3 is outside (0, 0.2)"),
        (["--delta", "0"], "--delta 0.0 is outside (0, 1)"),
        (["--delta", "1"], "--delta 1.0 is outside (0, 1)"),
    ],
)
def test_a_risk_or_a_probability_out_of_range_is_refused_before_there_is_a_model(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("calibrate", "nowhere:subject", *options, "--save", tmp_path / "card") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_card_prints_as_a_section_that_says_what_is_promised(
    certified: tuple[Subject, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = certified
    assert run_command("card", folder) == 0
    out = capsys.readouterr().out
    card = Card.load(folder)
    assert card.certificate is not None
    assert card.identity is not None
    for said in (card.policy, card.certificate.promise, card.identity.weights, card.certificate.data_hash, card.about):
        assert said in out
    assert card.measured is not None
    assert card.measured.machine not in card.about  # said once
    assert out.count(card.measured.machine) == 1
    assert str(card.measured) in out
    plain = folder.parent / "plain.yaml"
    Card("norm:tau=1").save(plain)
    assert run_command("card", plain) == 0
    assert "nothing is promised" in capsys.readouterr().out
    assert run_command("card", folder.parent / "nowhere.yaml") == 2
