"""The oracle's definitions on recordings: against loops written by hand, and what they ask of the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cases import run_command
from haltkit.comparison.oracle import Oracle, Readings, gain_cut, readings, taught
from haltkit.comparison.possible import possible
from haltkit.recording.trajectory import RegionTrajectory
from haltkit.subject import Subject

K, CLASSES = 5, 3
DEFINITIONS = ["stable", "eps-loss", "right", "best"]


def of_states(states: Tensor, steps: Tensor, outcome: Tensor | None = None) -> RegionTrajectory:
    return RegionTrajectory(torch.arange(len(states)), states, {}, states[0], states[-1], steps, outcome)


def recorded(seed: int) -> tuple[Readings, Tensor]:
    """Two sequences of four rows whose states are logits; some rows are asked nothing, and one is not there."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randint(-2, 3, (K + 1, 2, 4, CLASSES), generator=generator).float()
    labels = torch.randint(0, CLASSES, (2, 4), generator=generator)
    labels[0, 1] = -100
    outcome = torch.full((2, 4), 2, dtype=torch.int8)
    outcome[1, 3] = 0
    region = of_states(states, torch.full((2, 4), K) * (outcome > 0), outcome)
    return readings(region, lambda x: x, labels), states[1:]


def depth_by_hand(definition: str, logits: Tensor, label: int, epsilon: float) -> int:
    """Of one row, ``(K, V)``."""
    tops = [int(step.argmax()) for step in logits]
    losses = [float(-step.log_softmax(-1)[label]) for step in logits]
    if definition == "eps-loss":
        return next(k for k in range(1, K + 1) if losses[k - 1] <= losses[-1] + epsilon)
    if definition == "best":
        return losses.index(min(losses)) + 1
    wanted = tops[-1] if definition == "stable" else label
    return next((k for k in range(1, K + 1) if all(top == wanted for top in tops[k - 1 :])), 0)


@pytest.mark.parametrize("definition", DEFINITIONS)
@given(st.integers(0, 2**31), st.sampled_from([0.001, 0.3, 2.1]))
def test_a_depth_is_that_of_the_definition_written_out(definition: Any, seed: int, epsilon: float) -> None:
    read, logits = recorded(seed)
    oracle = Oracle(definition, epsilon if definition == "eps-loss" else None)
    settled, depths = oracle.settled(read)
    for b in range(2):
        for t in range(4):
            if not bool(read.asked[b, t]):
                assert depths[b, t] == 0
                continue
            label = int(read.labels[b, t]) if read.labels is not None else 0
            assert int(depths[b, t]) == depth_by_hand(definition, logits[:, b, t], label, epsilon)
            if definition != "eps-loss" and depths[b, t] > 0:
                assert settled[:, b, t].tolist() == [k >= int(depths[b, t]) for k in range(1, K + 1)]
            elif depths[b, t] > 0:
                assert int(settled[:, b, t].int().argmax()) + 1 == int(depths[b, t])


@given(st.integers(0, 2**31))
def test_a_sequence_is_right_with_its_last_row_and_loses_the_mean_of_its_rows(seed: int) -> None:
    read, logits = recorded(seed)
    assert read.labels is not None
    assert read.losses is not None
    for b in range(2):
        rows = [t for t in range(4) if bool(read.asked[b, t])]
        alone = [depth_by_hand("right", logits[:, b, t], int(read.labels[b, t]), 0) for t in rows]
        assert int(Oracle("right").settled(read, whole=True)[1][b]) == (max(alone) if min(alone) else 0)
        means = [float(sum(read.losses[k, b, t] for t in rows) / len(rows)) for k in range(K)]
        best = int(Oracle("best").settled(read, whole=True)[1][b])
        assert means[best - 1] == pytest.approx(min(means), abs=1e-5)


@given(st.integers(0, 2**31))
def test_rows_without_a_label_are_taught_to_halt_when_they_are_stable(seed: int) -> None:
    read, logits = recorded(seed)
    _, depths = taught(Oracle("right"), read)
    assert int(depths[0, 1]) == depth_by_hand("stable", logits[:, 0, 1], 0, 0)
    assert depths[1, 3] == 0  # it is not there
    asked = read.asked
    assert torch.equal(depths[asked], Oracle("right").settled(read)[1][asked])


@given(st.lists(st.sampled_from([-0.5, 0.0, 0.001, 0.002, 0.01, 0.5, 3.0]), min_size=1, max_size=400))
def test_99_percent_of_all_gain_is_above_the_cut_and_not_above_the_next(gains: list[float]) -> None:
    losses = torch.tensor([gains, [0.0] * len(gains)], dtype=torch.float64).unsqueeze(1)  # (2, 1, T)
    cut = gain_cut(iter([(losses, torch.ones(1, len(gains), dtype=torch.bool))]))
    positive = [gain for gain in gains if gain > 0]
    kept = lambda at: sum(gain for gain in positive if gain > at) >= 0.99 * sum(positive) - 1e-12  # noqa: E731
    assert kept(cut)
    above = sorted({gain for gain in positive if gain > cut})
    assert not above or not kept(above[0])


def test_labels_of_other_rows_or_classes_are_refused() -> None:
    region = of_states(torch.zeros(3, 1, 2, CLASSES), torch.full((1, 2), 2))
    for labels, message in ((torch.zeros(1, 3).long(), "one per row"), (torch.tensor([[0, 3]]), "3 classes")):
        with pytest.raises(ValueError, match=message):
            readings(region, lambda x: x, labels)


def test_an_unknown_definition_and_a_negative_epsilon_are_refused() -> None:
    with pytest.raises(ValueError, match="allowed are stable, eps-loss, right, best"):
        Oracle("wrong")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 0"):
        Oracle("eps-loss", -1.0)


class _Step(torch.nn.Module):
    """The next line of a script, whatever it is given."""

    def __init__(self, script: Tensor) -> None:
        super().__init__()
        self.script, self.next = script, 0

    def forward(self, x: Tensor) -> Tensor:
        self.next += 1
        return self.script[self.next - 1].clone()


class _Script(torch.nn.Module):
    def __init__(self, script: Tensor) -> None:
        super().__init__()
        self.step = _Step(script)

    def forward(self, x: Tensor, steps: int) -> Tensor:
        self.step.next = 0
        for _ in range(steps):
            x = self.step(x)
        return x


def scripted(**more: Any) -> Subject:
    """Three rows that predict 0 1 1, 1 0 0 and 1 1 1 at steps 1 to 3."""
    classes = torch.tensor([[0, 1, 1], [1, 0, 1], [1, 0, 1]])
    model = _Script(torch.nn.functional.one_hot(classes, 2).float().unsqueeze(1))  # (K, 1, 3, 2)
    given: dict[str, Any] = {"samples": [torch.zeros(1, 3, 2)], "readout": lambda x: x, "full_depth": 3}
    return Subject.of_modules(model, lambda x, steps: model(x, steps), {"loop": "step"}, **(given | more))


def test_headroom_by_each_definition() -> None:
    labelled = scripted(labels=lambda _: torch.tensor([[1, 1, -1]]))
    definitions: list[Any] = ["right", "eps-loss", "best"]
    found = {name: possible(labelled, Oracle(name))["loop"].headroom for name in definitions}
    assert found["right"].histogram == (0, 1, 0)
    assert found["right"].undefined == 1  # full depth is wrong there
    assert found["eps-loss"].histogram == (1, 1, 0)
    assert found["best"].histogram == (1, 1, 0)
    assert found["best"].losses[0] == pytest.approx(found["best"].losses[1])
    assert possible(scripted())["loop"].headroom.histogram == (1, 2, 0)
    boards = possible(scripted(granularity="sequence", labels=lambda _: torch.tensor([[1, 0, -1]])), Oracle("right"))
    assert boards["loop"].headroom.histogram == (0, 1, 0)
    with pytest.raises(ValueError, match="no row has an oracle depth"):
        possible(scripted(labels=lambda _: torch.tensor([[0, -1, -1]])), Oracle("right"))
    with pytest.raises(ValueError, match="right needs labels, and the data of model have none"):
        possible(scripted(), Oracle("right"))


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_the_command_names_the_oracle(definition: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "h.json"
    asked = ("--max-loops", 12, "--oracle", definition, "--batch", 64, "--level", 0.995, "--json", path)
    assert run_command("headroom", "chase", *asked) == 0
    out, found = capsys.readouterr().out, json.loads(path.read_text())
    assert f"at full depth 12, {definition} oracle" in out
    assert ("99.5% of which lose nothing" in out) == (definition != "best")
    assert ("within 0.01 nats" in out) == (definition == "eps-loss")
    assert found["epsilon"] == (0.01 if definition == "eps-loss" else None)
    assert found["regions"]["loop"]["definition"] == definition
    assert ("rows have no oracle depth" in out) == (definition == "right")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--oracle", "wrong"), "allowed are stable, eps-loss, right, best"),
        (("--epsilon", "0.1"), "--epsilon is for eps-loss"),
    ],
)
def test_what_cannot_be_asked_of_headroom_is_one_line(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("headroom", "chase", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
