"""Fitting a probe: on rows that a line separates it is the oracle, and what it learned is bound to its model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from countdown import Count, Countdown, readout
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import haltkit
from cases import run_command
from haltkit.card import Card
from haltkit.comparison.certify import certify
from haltkit.comparison.choice import save_certified, save_fitted, save_winner
from haltkit.comparison.fitting import Fitted, fit_gate, fit_probe, fit_table, linear
from haltkit.comparison.fitting import fitted as fitted_module
from haltkit.comparison.fitting.fitted import Fitting
from haltkit.comparison.fitting.hidden import HiddenProbe, fit_hidden
from haltkit.comparison.fitting.table import shrunk_depths
from haltkit.comparison.measure import measure
from haltkit.comparison.oracle import Oracle
from haltkit.driving import Pass
from haltkit.headroom import LogisticProbe, fit_logistic
from haltkit.identity import Identity
from haltkit.kinds import Kinds, per_row
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.gpt.subject import gpt_subject
from haltkit.policies import Fixed, Gate, Probe, Table
from haltkit.policies.probe import FEATURES, features
from haltkit.protocol import HaltingPolicy, LoopStep, granularity_of
from haltkit.subject import Subject
from haltkit.weights import Weights, WeightsMisfit

STEPS = 8


def _subject(count: int = 16, **more: Any) -> Subject:
    model = Countdown().eval()

    def run(inputs: Tensor, depth: int | Mapping[str, int]) -> Tensor:
        return model(inputs, depth if isinstance(depth, int) else depth["loop"])

    def adaptive(inputs: Tensor, policies: Mapping[str, HaltingPolicy[Any]], budget: int) -> Pass:
        result = haltkit.run_loop(model.body, inputs, policies["loop"], max_steps=budget, readout=readout)
        return Pass(result.x * model.scale, {"loop": result.steps}, {"loop": result.outcome})

    def by_row(inputs: Tensor, steps: Mapping[str, Tensor]) -> Pass:
        most = int(steps["loop"].max())
        each = per_row(steps["loop"], inputs.shape[:-1])
        result = haltkit.run_loop(model.body, inputs, Fixed(most), max_steps=most, budget=each)
        return Pass(result.x * model.scale, {"loop": result.steps}, {"loop": result.outcome})

    generator = torch.Generator().manual_seed(0)
    hops = torch.randint(1, 6, (count, 3, 4), generator=generator).float()
    given: dict[str, Any] = {
        "samples": list(torch.stack([hops, torch.zeros_like(hops)], -1)),
        "readout": readout,
        "logits": readout,
        "loss": lambda output, sample: (output[..., 1] < sample[..., 0]).float(),
        "full_depth": STEPS,
        "adaptive": adaptive,
        "by_row": by_row,
        "labels": lambda sample: torch.ones(sample.shape[:-1], dtype=torch.int64),
        "kinds": Kinds(lambda sample: sample[..., 0].long(), what="hops"),
    }
    return Subject.of_modules(model, run, {"loop": "body"}, **(given | more))


@pytest.fixture(scope="module")
def fitted() -> tuple[Subject, Fitted]:
    subject = _subject()
    return subject, fit_probe(subject, level=0.99)


def test_on_rows_that_a_line_separates_a_probe_halts_where_the_oracle_does(fitted: tuple[Subject, Fitted]) -> None:
    _, found = fitted
    missed = found.row.regret["loop"]
    assert found.row.agreement == 1
    assert missed.early == 0
    assert missed.wasted < 0.05
    assert found.aucs["loop"].value == 1
    assert found.headroom["loop"].headroom.rows == 4 * 12  # a quarter of 16 samples of 12 rows


def test_without_the_margin_a_probe_needs_noreadout() -> None:
    found = fit_probe(_subject(), level=0.99, margin=False)
    assert found.weights.tensors["loop/margin"] == 0
    x = torch.tensor([[2.0, 0.0]])
    haltkit.run_loop(Count(), x, found.policies()["loop"], max_steps=STEPS)


def test_where_whole_sequences_halt_none_does_before_its_last_row() -> None:
    found = fit_probe(_subject(24, granularity="sequence"), level=0.99)
    assert found.row.regret["loop"].early == 0
    assert found.row.regret["loop"].wasted < 1  # a rule that compares two steps wastes one at least


def test_a_card_gives_the_probe_back_and_refuses_another_model(fitted: tuple[Subject, Fitted], tmp_path: Path) -> None:
    subject, found = fitted
    folder = tmp_path / "a card"  # a space, which no spec can say
    save_fitted(folder, found, subject, "numbers")
    assert {one.name for one in folder.iterdir()} == {"card.yaml", "weights.safetensors"}
    card = Card.load(folder)
    card.check(subject.model, subject.regions, STEPS)
    x = subject.samples[0]
    policies = card.policies(["loop"]), found.policies()
    first, second = (haltkit.run_loop(Count(), x, one["loop"], max_steps=8, readout=readout) for one in policies)
    assert torch.equal(first.steps, second.steps)
    other = Countdown()
    nn.init.constant_(other.scale, 2.0)
    with pytest.raises(ValueError, match="for another model"):
        card.check(other)
    compared = haltkit.compare(subject, policies=[str(folder)], repeats=1)
    (row,) = (row for row in compared.rows if row.policy.endswith("card"))
    assert row.regret["loop"].wasted < 0.1


@pytest.fixture
def card(fitted: tuple[Subject, Fitted], tmp_path: Path) -> Path:
    save_fitted(tmp_path / "a card", fitted[1], fitted[0], "numbers")
    return tmp_path / "a card"


def test_a_card_is_about_the_weights_beside_it_and_no_others(card: Path) -> None:
    path, weights = card / "card.yaml", card / "weights.safetensors"
    written, own = path.read_text(), weights.read_bytes()
    Weights({name: one + 1e-3 for name, one in Weights.load(weights).tensors.items()}).save(weights)
    with pytest.raises(ValueError, match="other weights"):
        Card.load(card)
    weights.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        Card.load(card)
    weights.write_bytes(own)
    path.write_text("".join(line for line in written.splitlines(True) if "weights.safetensors: " not in line))
    with pytest.raises(ValueError, match="does not say which weights"):
        Card.load(card)


def test_a_loaded_card_is_saved_with_its_weights_and_its_identity(card: Path) -> None:
    Card.load(card).save(card.parent / "copy")
    assert Card.load(card.parent / "copy") == Card.load(card)
    with pytest.raises(ValueError, match="its own beside it"):
        Card("probe:tau=0.1,weights=elsewhere/w.safetensors").save(card.parent / "no")
    assert not (card.parent / "no").exists()


def test_a_policy_with_weights_is_certified_and_chosen_into_cards_that_work(
    fitted: tuple[Subject, Fitted], card: Path
) -> None:
    subject, folder = fitted[0], card.parent
    found = certify(subject, str(card), epsilon=0.2, delta=0.1)
    save_certified(folder / "certified", found, subject, "numbers")
    result = haltkit.compare(subject, policies=[str(folder / "certified")], repeats=1)
    save_winner(folder / "chosen", result, subject, "numbers")
    for name in ("certified", "chosen"):
        again = Card.load(folder / name)
        assert again.policy == Card.load(card).policy
        assert again.identity == Identity.of(subject.model, STEPS)
        assert again.policies(["loop"]) == Card.load(card).policies(["loop"])
        assert (again.certificate is not None) == (name == "certified")
    with pytest.raises(ValueError, match="compare again"):
        save_winner(folder / "no", haltkit.Comparison.from_json(result.to_json()), subject, "numbers")


def test_a_card_for_one_model_stays_so_when_it_is_saved_again(fitted: tuple[Subject, Fitted], tmp_path: Path) -> None:
    subject = fitted[0]
    bound, free = tmp_path / "bound.yaml", tmp_path / "free.yaml"
    Card("norm:tau=0.1").save(free)
    Card("norm:tau=0.1", identity=Identity.of(subject.model, STEPS)).save(bound)
    for path in (bound, free):
        save_winner(path, haltkit.compare(subject, policies=[str(path)], repeats=1), subject, "numbers")
        assert (Card.load(path).identity is not None) == (path == bound)


def test_a_card_that_says_it_is_certified_needs_its_certificate(fitted: tuple[Subject, Fitted], tmp_path: Path) -> None:
    subject, found = fitted
    save_fitted(tmp_path / "card", found, subject, "numbers")
    path = tmp_path / "card" / "card.yaml"
    path.write_text(path.read_text() + "certified: true\n")
    with pytest.raises(ValueError, match="not beside it"):
        Card.load(path)


def test_the_score_is_the_logistic_function_of_features_written_by_hand() -> None:
    x_prev, x, before = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind(0)
    values = {"state": torch.arange(4.0), "bias": torch.tensor([0.3])}
    values |= {name: torch.tensor([w]) for name, w in {"size": 0.5, "cosine": -2.0, "step": 1.5, "margin": 0.7}.items()}
    probe = Probe(0.5, Weights({f"core/{name}": value.double() for name, value in values.items()}))
    step = LoopStep(3, x, x_prev, torch.ones(5, dtype=torch.bool), lambda state: state[..., :3], region="core")
    _, (score, halt) = probe.update(before, step)
    for row in range(5):
        d = x[row] - x_prev[row]
        p = torch.softmax(x[row, :3], 0).sort(descending=True).values
        cosine = float(d @ before[row] / (d.norm() * before[row].norm()))
        logit = float(x[row] @ torch.arange(4.0).double()) + 0.3 + 0.5 * float((d.norm() / x[row].norm()).log())
        logit += -2.0 * cosine + 1.5 * float(torch.tensor(3.0).log()) + 0.7 * float(p[0] - p[1])
        assert float(score[row]) == pytest.approx(float(torch.sigmoid(torch.tensor(-logit))), rel=1e-5)
        assert bool(halt[row]) == (float(score[row]) < 0.5)


def test_a_hidden_layer_adds_its_output_to_the_logit() -> None:
    generator = torch.Generator().manual_seed(1)
    x_prev, x, before = torch.randn(3, 5, 4, dtype=torch.float64, generator=generator).unbind(0)
    values = {"state": torch.arange(4.0), "bias": torch.ones(1), **{name: torch.full((1,), 0.5) for name in FEATURES}}
    layer, bias, out = (torch.randn(*size, generator=generator) for size in ((3, 8), (3,), (3,)))
    layer[:, 4] = values["size"][0] = 0  # nothing looks at the step's size
    step = LoopStep(3, x, x_prev, torch.ones(5, dtype=torch.bool), lambda state: state[..., :3], region="core")
    more = {"hidden": layer, "hidden_bias": bias, "out": out}
    with_layer, without = (
        Probe(0.5, Weights({f"core/{name}": value.double() for name, value in one.items()}))
        for one in (values | more, values)
    )
    assert with_layer.used["core"] == FEATURES[1:]
    given = torch.cat([x, features(step, before)], -1).double()
    for row in range(5):
        inner = torch.tensor([float(layer[unit].double() @ given[row]) + float(bias[unit]) for unit in range(3)])
        gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        scores = [probe.update(before, step)[1].score[row].double() for probe in (with_layer, without)]
        logits = [float((1 - score).log() - score.log()) for score in scores]
        assert logits[0] - logits[1] == pytest.approx(float(gelu @ out), abs=1e-5)


@given(st.integers(0, 1000))
@settings(max_examples=3, deadline=None)
def test_a_hidden_layer_tells_apart_what_no_line_does_and_never_less(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(800, 3, generator=generator) * torch.tensor([1.0, 100.0, 0.01]) + 5
    far = (f[:, 0] - 5).abs() > 0.7
    start = fit_logistic(f, far, 1e-5)
    found = fit_hidden(f, far, start, 8, generator)

    def loss(probe: LogisticProbe | HiddenProbe) -> float:
        return float(binary_cross_entropy_with_logits(probe.logit(f), far.double()))

    assert loss(start) > 0.6
    assert loss(found) < 0.2
    again = fit_hidden(f, far, start, 8, torch.Generator().manual_seed(seed))
    other = fit_hidden(f, far, start, 8, torch.Generator().manual_seed(seed))
    assert torch.equal(again.hidden, other.hidden)  # the generator is all the chance there is


@pytest.mark.parametrize("lag", [1, 2])
def test_a_probe_that_is_taught_late_is_sure_of_a_row_so_many_steps_after_it_has_settled(lag: int) -> None:
    """At even odds: the threshold that is chosen may make up for it, where rows do not read each other."""
    subject = _subject(24)
    found = fit_probe(subject, level=0.99, lag=lag)
    assert found.lag == lag
    assert found.aucs["loop"].value == 1
    x = torch.cat(list(subject.samples))
    steps = haltkit.run_loop(Count(), x, replace(_probe(found), tau=0.5), max_steps=STEPS, readout=readout).steps
    assert torch.equal(steps, x[..., 0].long() + lag)


def test_a_gate_that_is_taught_late_is_less_sure_of_rows_that_have_just_settled() -> None:
    """The state of such a row does not move any more, so that a gate cannot tell for how long it has stood still."""
    settled = torch.tensor([3.0, 3.0])
    at_once, late = (fit_gate(_subject(24), level=0.5, target=Oracle("stable"), lag=lag).weights for lag in (0, 1))
    sure, less = (float(w.tensors["loop/state"] @ settled + w.tensors["loop/bias"]) for w in (at_once, late))
    assert sure > less + 1


def _probe(found: Fitted) -> Probe:
    policy = found.policies()["loop"]
    assert isinstance(policy, Probe)
    return policy


def test_a_probe_with_a_hidden_layer_halts_without_lag_and_its_card_gives_it_back(tmp_path: Path) -> None:
    subject = _subject(24)
    found = fit_probe(subject, level=0.99, hidden=8)
    assert (found.hidden, found.row.agreement) == (8, 1)
    assert found.row.regret["loop"].early == 0
    assert found.row.regret["loop"].wasted < 0.5  # a rule that compares two steps wastes one at least
    assert found.weights.tensors["loop/hidden"].shape == (8, 2 + len(FEATURES))
    save_fitted(tmp_path / "card", found, subject, "numbers")
    again = Card.load(tmp_path / "card").policies(["loop"])["loop"]
    x = subject.samples[0]
    first, second = (
        haltkit.run_loop(Count(), x, one, max_steps=8, readout=readout) for one in (again, found.policies()["loop"])
    )
    assert torch.equal(first.steps, second.steps)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lag": -1}, "lag=-1 is below 0"),
        ({"hidden": -1}, "hidden=-1 is below 0"),
        ({"lag": STEPS}, f"lag={STEPS} with {STEPS} steps"),
    ],
)
def test_lags_and_layers_that_cannot_be_are_refused(more: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_probe(_subject(), **more)  # type: ignore[arg-type]


@given(st.floats(0.05, 0.95))
@settings(max_examples=5, deadline=None)
def test_the_threshold_comes_close_to_the_most_eager_one_that_holds(part: float) -> None:
    """Whatever the most eager threshold is, no candidate between the chosen one and it would have been far."""
    rounds: list[list[float]] = []
    limit = 0.0

    def try_live(_: Fitting, candidates: Any, oracles: Any) -> list[float]:
        nonlocal limit
        taus = [one["loop"].tau for one in candidates]
        if not rounds:  # the first look: between the two that are furthest apart
            at = max(range(len(taus) - 1), key=lambda i: taus[i + 1] / taus[i])
            limit = taus[at] ** (1 - part) * taus[at + 1] ** part
        rounds.append(taus)
        return [float(tau <= limit) for tau in taus]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fitting, "try_live", try_live)
        patch.setattr("haltkit.comparison.fitting.linear._threshold", lambda _, share: float(f"{1 - share:.3g}"))
        tau = fit_probe(_subject(), level=0.9).taus["loop"]
    coarse = max(b / a for a, b in pairwise(rounds[0]))
    assert tau <= limit
    assert limit / tau <= coarse ** (1 / 6) * 1.02  # thresholds are rounded


@pytest.mark.parametrize("fit", [fit_probe, fit_gate])
def test_what_was_read_of_a_recording_is_what_the_readout_says_at_each_step(
    fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow way reads margins again, for learning and for judging: the same weights and thresholds, bit for bit."""
    fast = fit(_subject(24))
    monkeypatch.setattr(linear, "_Read", lambda policy, margins: policy)
    slow = fit(_subject(24))
    assert fast.taus == slow.taus
    assert fast.aucs == slow.aucs
    assert fast.weights.tensors.keys() == slow.weights.tensors.keys()
    assert all(torch.equal(one, slow.weights.tensors[name]) for name, one in fast.weights.tensors.items())


@pytest.mark.parametrize("margin", [True, False])
def test_a_recording_is_read_once(margin: bool) -> None:
    """Each state's logits are computed once, whether or not the probe sees the margin."""
    read: list[tuple[int, ...]] = []

    def counted(x: Tensor) -> Tensor:
        read.append(tuple(x.shape))
        return readout(x)

    fitting = Fitting.of(_subject(8, readout=counted), 0.99, 0)
    kind = linear._Kind("probe", FEATURES if margin else FEATURES[:-1], FEATURES, Probe)
    tensors, _ = linear._learn(fitting, kind, Oracle())
    assert len(read) == 4 * STEPS
    linear._judge(fitting, fitting.choose, kind, Oracle(), Weights(tensors))
    assert len(read) == (4 + 2) * STEPS


def test_the_cut_of_a_gain_reads_the_last_region_alone(tiny_model: LoopedGPT) -> None:
    """An inner region's readout costs as much as the last one's and says nothing of the model's loss."""
    subject = gpt_subject(tiny_model, torch.zeros(8, 9, dtype=torch.long), max_loops=STEPS)
    read: list[int] = []

    def counted(x: Tensor) -> Tensor:
        read.append(1)
        return tiny_model.readout(x)

    assert len(subject.regions) > 1
    with torch.no_grad():
        linear._gain_cut(Fitting.of(replace(subject, readout=counted), 0.99, 0), Oracle("eps-loss"))
    assert len(read) == 4 * STEPS


def test_a_margin_that_is_known_is_not_read_again() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    step = LoopStep(1, x, x, torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="no readout"):
        step.margin  # noqa: B018
    step.margin = torch.full((5,), 0.25)
    assert step.margin.tolist() == [0.25] * 5


def _tensors(region: str) -> dict[str, Tensor]:
    """What a probe of states of width 2 needs; it looks at the state alone."""
    return {f"{region}/state": torch.ones(2)} | {f"{region}/{name}": torch.zeros(1) for name in ("bias", *FEATURES)}


def _layer() -> dict[str, Tensor]:
    """A hidden layer of three units beside them."""
    return {"loop/hidden": torch.ones(3, 6), "loop/hidden_bias": torch.ones(3), "loop/out": torch.ones(3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loop/step": None}, "'loop/step' is missing"),
        ({"loop/size": None, "loop/sise": torch.ones(1)}, "'loop/sise' is unknown|'loop/size' is missing"),
        ({"size": torch.ones(1)}, "a probe's weights"),
        ({"loop/state": torch.ones(2, 2)}, r"'loop/state' is \(2, 2\)"),
        ({"loop/bias": torch.ones(2)}, r"'loop/bias' is \(2,\)"),
        ({"loop/margin": torch.ones(1).to(torch.float8_e4m3fn)}, "float8"),
        ({"loop/margin": torch.ones(1) * 1j}, "complex64"),
        ({"loop/margin": torch.ones(1, dtype=torch.int64)}, "int64"),
        ({"loop/out": torch.ones(3)}, "'loop/hidden' is missing"),
        ({"loop/out": torch.ones(3), "loop/hidden": torch.ones(3, 6)}, "'loop/hidden_bias' is missing"),
        (_layer() | {"loop/hidden": torch.ones(3, 5)}, r"'loop/hidden' is \(3, 5\)"),
        (_layer() | {"loop/hidden_bias": torch.ones(2)}, r"'loop/hidden_bias' is \(2,\)"),
        (_layer() | {"loop/out": torch.ones(3, dtype=torch.int64)}, "int64"),
    ],
)
def test_what_are_no_weights_of_a_probe_is_refused_in_one_line(
    change: dict[str, Tensor | None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {name: one for name, one in (_tensors("loop") | change).items() if one is not None}
    save_file(tensors, tmp_path / "w.safetensors")
    spec = f"probe:tau=0.5,weights={tmp_path / 'w.safetensors'}"
    with pytest.raises(ValueError, match=message):
        haltkit.policy(spec)
    assert run_command("solve", "chase", "0>1 1>1 0?", "--policy", spec) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_probe_of_another_loop_is_refused() -> None:
    probe = Probe(0.5, Weights(_tensors("core")))
    with pytest.raises(WeightsMisfit, match="core"):
        haltkit.run_loop(Count(), torch.ones(1, 2), probe, max_steps=2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"samples": [torch.ones(1, 1, 2)] * 3}, "at least 4"),
        ({"readout": None}, "readout"),
        ({"logits": None}, "logits"),
        ({"samples": [torch.tensor([[[1.0, 0.0]]])] * 8}, "nothing can be learned"),
    ],
)
def test_what_cannot_be_fitted_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_probe(_subject(**more))


@pytest.mark.parametrize("target", [None, Oracle("eps-loss", 0.1), Oracle("right"), Oracle("best"), Oracle("stable")])
def test_a_gate_learns_from_the_state_alone_when_further_steps_save_nothing(target: Oracle | None) -> None:
    """A linear function of the state, count - hops, says so exactly, whichever way that is put."""
    subject = _subject(24)
    found = fit_gate(subject, level=0.99, target=target)
    assert isinstance(found.policies()["loop"], Gate)
    assert set(found.weights.tensors) == {"loop/state", "loop/bias"}
    missed = found.row.regret["loop"]
    assert (found.row.agreement, missed.early) == (1, 0)
    assert missed.wasted < 0.05
    assert found.aucs["loop"].value == 1
    hops, count = found.weights.tensors["loop/state"].tolist()
    assert hops < 0 < count
    if target is None:
        assert found.target == Oracle("eps-loss", 0.0)  # a step too few costs nats, so that nothing less is to be cut


def test_a_gate_for_whole_sequences_waits_for_the_last_row(tmp_path: Path) -> None:
    subject = _subject(24, granularity="sequence")
    found = fit_gate(subject, level=0.99)
    assert found.row.regret["loop"].early == 0
    save_fitted(tmp_path / "card", found, subject, "numbers")
    assert Card.load(tmp_path / "card").policies(["loop"]) == found.policies()


def test_rows_that_are_asked_nothing_are_taught_by_their_own_prediction() -> None:
    """Queries alone have labels; the others must halt all the same."""
    asked = torch.tensor([1, 1, -100, -100])
    labels = lambda sample: asked.expand(sample.shape[:-1])  # noqa: E731
    found = fit_gate(_subject(24, labels=labels), level=0.99)
    assert found.row.regret["loop"].wasted < 0.05
    assert found.row.steps["loop"] < 4


def test_a_table_of_kinds_that_say_everything_is_the_oracle(tmp_path: Path) -> None:
    subject = _subject(24)
    found = fit_table(subject, level=0.99)
    assert found.weights.tensors["loop/depths"].tolist()[1:] == [1, 2, 3, 4, 5]
    assert found.row.agreement == 1
    assert found.row.regret["loop"].wasted == found.row.regret["loop"].early == 0
    assert not found.aucs
    save_fitted(tmp_path / "card", found, subject, "numbers")
    policies = Card.load(tmp_path / "card").policies(["loop"])
    assert isinstance(policies["loop"], Table)
    compared = haltkit.compare(subject, policies=[str(tmp_path / "card")], repeats=1)
    (row,) = (row for row in compared.rows if row.policy.endswith("card"))
    assert row.regret["loop"].wasted == 0


def test_a_table_of_kinds_that_say_nothing_is_a_fixed_depth() -> None:
    found = fit_table(_subject(24, kinds=Kinds(lambda sample: torch.zeros(sample.shape[:-1]).long())), level=0.99)
    (depth,) = found.weights.tensors["loop/depths"].tolist()
    assert depth == found.row.steps["loop"] == 5


def test_a_table_for_whole_sequences_goes_by_the_kind_of_the_sequence() -> None:
    most = Kinds(lambda sample: sample[..., 0].flatten(1).amax(-1).long())
    found = fit_table(_subject(32, granularity="sequence", kinds=most), level=0.9)
    assert found.row.regret["loop"].early == 0
    assert found.row.regret["loop"].wasted < 0.5
    with pytest.raises(ValueError, match=r"kinds of sequences \(B,\)"):
        fit_table(_subject(24, granularity="sequence"))


@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_a_candidate_is_worth_its_quality_less_one_standard_error(granularity: Any) -> None:
    fitting = Fitting.of(_subject(40, granularity=granularity), 0.9, 0)
    hops = torch.cat([sample[..., 0] for sample in fitting.choose.samples])
    right = (hops <= 4).double() if granularity == "token" else (hops <= 4).all(-1, keepdim=True).double()
    each = right.mean(-1)
    oracles = [{"loop": sample[..., 0].amax(-1).long()} for sample in fitting.choose.samples]
    (found,) = fitting.try_live([{"loop": Fixed(4)}], oracles if granularity == "sequence" else [])
    assert 0 < float(each.mean()) < 1
    assert found == pytest.approx(float(each.mean() - each.std() / len(each) ** 0.5))


def test_candidates_behind_the_first_that_falls_short_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds from safe to eager: a few are run at a time, and the same ones are chosen as if all were."""
    ran: list[int] = []

    def counted(subject: Subject, settings: Sequence[Any], **more: Any) -> Any:
        ran.append(len(settings) - 1)  # the first is full depth
        return measure(subject, settings, **more)

    monkeypatch.setattr(fitted_module, "measure", counted)
    fitting = Fitting.of(_subject(40), 0.9, 0)
    depths = [STEPS, 5, 3, *range(3, 20)]
    qualities = list(
        takewhile(lambda quality: quality >= 0.9, fitting.try_live([{"loop": Fixed(k)} for k in depths], []))
    )
    assert len(qualities) == 2
    assert ran == [8]


def test_where_the_safest_thresholds_fall_short_it_is_their_quality_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Fitting, "try_live", lambda *_: iter([0.5, 0.9, 1.0]))
    with pytest.raises(ValueError, match=r"not even the safest .*the safest has 0\.5000"):
        fit_probe(_subject(), level=0.99)


def test_a_single_sequence_cannot_choose() -> None:
    samples = [torch.tensor([[[1.0 + i, 0.0], [3.0, 0.0]]]) for i in range(4)]
    with pytest.raises(ValueError, match="a single sequence chooses"):
        fit_probe(_subject(samples=samples), level=0.5)


def test_a_model_that_is_halted_from_outside_gets_a_probe_that_halts_its_batches() -> None:
    model, ours = Countdown().eval(), _subject(24)
    subject = Subject.attached(
        model,
        lambda sample: model(sample, STEPS),
        haltkit.Loop(["body"]),
        run_at=model,
        readout=readout,
        samples=ours.samples,
        loss=ours.loss,
        logits=readout,
        full_depth=STEPS,
    )
    found = fit_probe(subject, level=0.99)
    assert granularity_of(found.policies()["loop"]) == "batch"
    assert found.row.agreement == 1
    assert found.row.steps["loop"] <= 5  # as the last row of a batch, where full depth is 8


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9)), min_size=1, max_size=60),
    st.floats(0.05, 1.0),
    st.floats(0.5, 100),
)
def test_depths_are_quantiles_that_lean_on_their_region(
    rows: list[tuple[int, int]], share: float, strength: float
) -> None:
    def quantile(depths: list[int]) -> int:
        return next(k for k in range(1, 10) if sum(d <= k for d in depths) >= share * len(depths))

    overall = quantile([depth for _, depth in rows])
    table, other = shrunk_depths(*torch.tensor(rows).unbind(-1), share, strength)
    assert other == overall
    for kind, depth in enumerate(table.tolist()):
        own = [d for one, d in rows if one == kind]
        exact = (len(own) * quantile(own) + strength * overall) / (len(own) + strength) if own else overall
        assert abs(depth - exact) <= 0.5 + 1e-9


@pytest.mark.parametrize("fit", [fit_probe, fit_gate, fit_table])
def test_labels_asked_for_that_the_data_lack_are_refused(fit: Any) -> None:
    subject = _subject(labels=None)
    with pytest.raises(ValueError, match="right needs labels, and the data of model have none"):
        fit(subject, target=Oracle("right"))


def test_labels_that_no_row_gets_right_are_nothing_to_learn_from() -> None:
    subject = _subject(labels=lambda sample: torch.zeros(sample.shape[:-1], dtype=torch.int64))
    for fit in (fit_probe, fit_gate, fit_table):
        with pytest.raises(ValueError, match="no row has a depth by right"):
            fit(subject, target=Oracle("right"))


def test_the_command_times_what_a_user_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masked execution computes rows that have halted, so a card's milliseconds would say nothing of the policy."""
    asked: list[Any] = []

    def resolve(model: Any, options: Mapping[str, Any], *_: Any) -> Subject:
        asked.append(options["execution"])
        raise ValueError("enough")

    monkeypatch.setattr("haltkit.cli.fit.resolve", resolve)
    assert run_command("fit", "chase") == 2
    assert asked == ["compact"]


def test_the_command_says_when_the_text_is_shorter_than_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fit that fails is judged by how much it learned from, so that is said before it begins."""
    text = tmp_path / "short.txt"
    text.write_text("word after word " * 400)
    monkeypatch.setattr("haltkit.cli.fit._fitted", lambda *_, **__: 1 / 0)
    asked = ("fit", "text", "--text", text, "--max-loops", 2, "--sequences")
    with pytest.raises(ZeroDivisionError):
        run_command(*asked, 512)
    assert re.search(r"has (\d+) sequences, not 512", capsys.readouterr().out)
    with pytest.raises(ZeroDivisionError):
        run_command(*asked, 4)
    assert "not 4" not in capsys.readouterr().out


def test_a_table_without_kinds_is_refused() -> None:
    with pytest.raises(ValueError, match="does not say its rows' kinds"):
        fit_table(_subject(kinds=None))


@pytest.mark.parametrize(("policy", "model", "sequences"), [("gate", "chase", 32), ("table", "text", 8)])
def test_the_command_fits_gates_and_tables(
    policy: str, model: str, sequences: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card, few = tmp_path / "card", ("--max-loops", 6)
    asked = ("--sequences", sequences, "--batch", sequences // 8, "--level", 0.8, *few, "--policy", policy)
    assert run_command("fit", model, *asked, "--save", card, "--json", tmp_path / "f.json") == 0
    assert Card.load(card).policy.startswith(f"{policy}:")
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["policy"] == policy
    assert found["target"]["definition"] == ("eps-loss" if policy == "gate" else "stable")
    text = ("--tokens", 256) if model == "text" else ()
    assert run_command("compare", model, "--policies", card, *few, *text, "--repeats", 1) == 0
    assert "card" in capsys.readouterr().out
    assert run_command("generate", "of", "-n", 2, "--policy", card) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--policy", "prob"), "allowed are probe, gate, table"),
        (("--policy", "table", "--no-margin"), "--no-margin is for a probe"),
        (("--target", "wrong"), "allowed are stable, eps-loss, right, best"),
        (("--epsilon", "0.1"), "--epsilon is for eps-loss"),
        (("--policy", "gate", "--hidden", "4"), "--hidden is for a probe"),
        (("--policy", "table", "--lag", "1"), "--lag is for a probe or a gate"),
        (("--max-loops", "6", "--sequences", "8", "--batch", "2", "--lag", "6"), "lag=6 with 6 steps"),
    ],
)
def test_what_cannot_be_asked_of_fit_is_one_line(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("fit", "chase", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_command_writes_a_card_that_compare_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = tmp_path / "card"
    more = ("--lag", 1, "--hidden", 8, "--save", card)
    assert run_command("fit", "chase", "--sequences", 32, "--batch", 4, "--level", 0.9, *more) == 0
    out = capsys.readouterr().out
    assert "Taught stable, 1 step late" in out
    assert "oracle" in out
    assert "Saved" in out
    assert Card.load(card).policy.startswith("probe:tau=")
    assert run_command("compare", "chase", "--policies", card, "--save", tmp_path / "best.yaml") == 2
    assert "name a folder" in capsys.readouterr().err
    assert run_command("fit", "chase", "--level", 2) == 2
    assert "level" in capsys.readouterr().err
