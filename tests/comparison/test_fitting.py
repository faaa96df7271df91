"""Fitting a probe: on rows that a line separates it is the oracle, and what it learned is bound to its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from countdown import Count, Countdown, readout
from torch import Tensor, nn

import haltkit
from cases import run_command
from haltkit.card import Card
from haltkit.comparison.choice import save_fitted
from haltkit.comparison.fitting import Fitted, fit_probe
from haltkit.driving import Pass
from haltkit.policies import Probe
from haltkit.protocol import HaltingPolicy, LoopStep
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

    generator = torch.Generator().manual_seed(0)
    hops = torch.randint(1, 6, (count, 3, 4), generator=generator).float()
    given: dict[str, Any] = {
        "samples": list(torch.stack([hops, torch.zeros_like(hops)], -1)),
        "readout": readout,
        "logits": readout,
        "loss": lambda output, sample: (output[..., 1] < sample[..., 0]).float(),
        "full_depth": STEPS,
        "adaptive": adaptive,
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
    assert "loop/margin" not in found.weights.tensors
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
    with pytest.raises(ValueError, match="fitted on another model"):
        card.check(other)
    compared = haltkit.compare(subject, policies=[str(folder)], repeats=1)
    (row,) = (row for row in compared.rows if not row.fixed)
    assert row.regret["loop"].wasted < 0.1


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


def test_a_probe_of_another_loop_is_refused() -> None:
    probe = Probe(0.5, Weights({"core/state": torch.ones(2), "core/bias": torch.zeros(1)}))
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


def test_the_command_writes_a_card_that_compare_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = tmp_path / "card"
    assert run_command("fit", "chase", "--sequences", 32, "--batch", 4, "--level", 0.9, "--save", card) == 0
    out = capsys.readouterr().out
    assert "oracle" in out
    assert "Saved" in out
    assert Card.load(card).policy.startswith("probe:tau=")
    assert run_command("fit", "chase", "--level", 2) == 2
    assert "level" in capsys.readouterr().err
