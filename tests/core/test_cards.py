"""Cards: what stands behind a policy on a model, versions, and cards that somebody made to do harm."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import haltkit
from cases import certificate_for, run_command
from haltkit.card import Card
from haltkit.cardfile import VERSION
from haltkit.identity import Identity
from haltkit.models.weights import BUNDLED
from haltkit.standing import Standing
from haltkit.weights import Weights

SPEC, DEPTH = "norm:tau=0.3", 6
LOOPS = {"loop": {"body": ["core"]}}


class Model(nn.Module):
    """Goes half the way to its input at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Linear(4, 4, bias=False)
        self.core.weight = nn.Parameter(torch.eye(4) / 2)

    def forward(self, x: Tensor, steps: int = DEPTH) -> Tensor:
        for _ in range(steps):
            x = self.core(x)
        return x


@pytest.fixture
def model() -> Model:
    return Model().eval()


def certified(model: Model) -> Card:
    identity = Identity.of(model, DEPTH)
    return Card(SPEC, "Model", loops=LOOPS, identity=identity, certificate=certificate_for(SPEC))


def fitted(folder: Path) -> Card:
    """A card with weights of a policy."""
    weights = {"weights.safetensors": Weights({"loop/depths": torch.ones(4)})}
    identity = Identity.of(Model(), DEPTH)
    Card("table:weights=weights.safetensors", "Model", loops=LOOPS, identity=identity).save(folder, weights)
    return Card.load(folder)


# --- with and without the certificate


@torch.no_grad()
def test_a_session_says_what_is_promised_or_what_the_card_is_used_without(model: Model, tmp_path: Path) -> None:
    certified(model).save(tmp_path / "card")
    promise, x = certificate_for(SPEC).promise, torch.ones(2, 4)
    with haltkit.attach(model, tmp_path / "card") as session:
        model(x)
    assert session.standing == Standing(promise, bound=True)
    assert f"certified: {promise}" in repr(session)
    assert session.summary().splitlines()[-1] == f"certified: {promise}"
    expected = session.steps["loop"]
    other = Model().eval()
    other.core.weight.mul_(1 + 1e-3)
    with pytest.raises(ValueError, match=r"other weights.*--without-certificate.*without_certificate\(\)"):
        haltkit.attach(other, tmp_path / "card")
    card = Card.load(tmp_path / "card").without_certificate()
    with haltkit.attach(other, card, max_steps=5, total_steps=5) as session:
        other(x, DEPTH + 3)
    assert torch.equal(session.steps["loop"], expected)
    line = "used without its certificate (other weights; full depth 5 instead of 6): nothing is promised"
    assert str(session.standing) == line
    assert line in repr(session)
    assert session.summary().splitlines()[-1] == line
    with haltkit.attach(other, card):  # which takes any depth
        other(x, DEPTH + 3)
    with haltkit.attach(model, SPEC, loops={"loop": haltkit.Loop(["core"])}) as session:
        model(x)
    assert not str(session.standing)
    assert "certif" not in repr(session) + session.summary()


def test_a_card_without_its_certificate_is_still_for_its_class_and_its_regions(model: Model) -> None:
    card = replace(certified(model), regions=("loop",)).without_certificate()
    assert card.certificate is None
    assert card.policies(["loop"]) == certified(model).policies(["loop"])
    assert card.check(model, ["loop"], DEPTH) == Standing.waived("its certificate")
    for other, regions in ((nn.Linear(1, 1), ["loop"]), (model, ["high", "low"])):
        with pytest.raises(ValueError, match="do not carry over"):
            card.check(other, regions)
    with pytest.raises(ValueError, match="without its certificate"):
        card.save("anywhere")
    assert "none, used without its certificate" in card.to_markdown()
    free = Card(SPEC)
    assert free.without_certificate() == free


def test_of_fitted_weights_it_is_said_that_they_are_of_another_model(model: Model, tmp_path: Path) -> None:
    card = fitted(tmp_path / "card")
    other = Model().double().eval()
    with pytest.raises(ValueError, match="for another model.*--without-certificate"):
        card.check(other)
    standing = card.without_certificate().check(other)
    assert standing.mark("probe") == "probe (without the check of its model)"
    assert str(standing) == (
        "used without the check of its model (dtype float64 instead of float32; its weights were fitted on another "
        "model): nothing is promised"
    )
    assert "fitted" not in str(card.without_certificate().check(Model()))


# --- versions


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump({"policy": SPEC, **changes}), encoding="utf-8")
    return path


def test_cards_say_their_version_and_older_ones_are_of_the_first(tmp_path: Path) -> None:
    Card(SPEC).save(tmp_path / "card.yaml")
    assert yaml.safe_load((tmp_path / "card.yaml").read_text())["version"] == VERSION == 1
    assert Card.load(tmp_path / "card.yaml") == Card.load(written(tmp_path)) == Card(SPEC)
    for name in ("chase", "sudoku"):  # these were written before there were versions
        assert Card.load(BUNDLED / name / "halting.yaml").policy


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "version 2: this haltkit reads version 1; upgrade it"),
        ({"version": 2, "monitor": {"rate": 0.1}}, "upgrade it"),  # before what it does not know
        ({"version": 0}, "version: 0"),
        ({"version": True}, "version: True"),
        ({"version": "1"}, "version: '1'"),
        ({"monitor": {}, "policy": SPEC}, "monitor"),
        ({"policy": "oracle-of-2030:tau=1"}, "oracle-of-2030"),
        ({"policy": 3}, "policy: SPEC"),
        ({"policy": {}}, "policy: SPEC"),
        ({"regions": "loop"}, "regions"),
        ({"about": 1}, "about"),
        ({"loop": 1}, "haltkit.Loop"),
        ({"loops": {"loop": 1}}, "haltkit.Loop"),
        ({"identity": 1}, "identity"),
        ({"certified": 1}, "certified"),
    ],
)
def test_what_this_version_does_not_know_is_refused_in_one_line(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(ValueError, match="card.yaml") as error:
        Card.load(path)
    assert said in str(error.value)
    assert run_command("card", path) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_certificate_of_a_later_version_is_refused(model: Model, tmp_path: Path) -> None:
    certified(model).save(tmp_path / "card")
    path = tmp_path / "card" / "certificate.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(ValueError, match="version 2.*upgrade"):
        Card.load(tmp_path / "card")


# --- cards made to do harm


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "/dev/zero", "sub/w.safetensors", ".."])
def test_a_card_names_files_in_its_own_folder_only(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    folder = tmp_path / "card"
    folder.mkdir()
    path = written(folder, policy=f"probe:tau=0.1,weights={name}", weights={name: "0" * 64})
    with pytest.raises(ValueError, match="in its own folder only"):
        Card.load(path)


@pytest.mark.parametrize("kind", ["device", "pipe", "socket", "folder", "dangling"])
def test_weights_are_a_regular_file_also_behind_a_link(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "w"
    if kind == "device":
        place.symlink_to("/dev/zero")  # which has no end
    elif kind == "pipe":
        os.mkfifo(place)  # which nobody writes
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(place))
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("nowhere")
    path = written(tmp_path, policy="probe:tau=0.1,weights=w", weights={"w": "0" * 64})
    with pytest.raises(ValueError, match="not a regular file|cannot be read"):
        Card.load(path)


def test_weights_behind_a_link_are_read(tmp_path: Path) -> None:
    """As in a download cache, where names of a folder are links to where the contents are."""
    fitted(tmp_path / "card")
    file = tmp_path / "card" / "weights.safetensors"
    file.rename(tmp_path / "blob")
    file.symlink_to(tmp_path / "blob")
    assert Card.load(tmp_path / "card").weights


HARM = [
    'policy: !!python/object/apply:os.system ["touch harmed"]',
    'policy: !!python/name:os.system ""',
    "policy: norm:tau=1\nabout: !!python/object/new:pathlib.Path [harmed]",
    "policy: &a norm:tau=1\nabout: *a",
    "policy: norm:tau=1\npolicy: kl:tau=1",
    "policy: norm:tau=1\nloops: " + "{a: " * 3000 + "1" + "}" * 3000,
    "policy: norm:tau=1\nidentity: {structure: a, weights: b, dtype: c, full_depth: 1" + "0" * 400 + "}",
    "policy: norm:tau=1\nidentity: {structure: a, weights: b, dtype: c, full_depth: .inf}",
    "policy: norm:tau=1\nidentity: {structure: a, weights: b, dtype: c, full_depth: 6, more: 1}",
    "policy: norm:tau=1\nmeasured: {machine: m, item: row, ms: .nan, full_ms: 1, steps: {}}",
    "policy: norm:tau=1\nmeasured: {machine: m, item: row, ms: 1, full_ms: 1, steps: {loop: .nan}}",
    "policy: norm:tau=1\nmeasured: {machine: m, item: row, ms: 1, full_ms: 1, steps: {loop: 1e999}}",
    "policy: norm:tau=1\nmeasured: {machine: m, item: row, ms: true, full_ms: 1, steps: {}}",
    'policy: "norm:tau=1"\nabout: "\\e[2Jnothing to see"',
    'policy: "norm:tau=1"\nmodel: "\\u202Eevil"',
    'policy: "norm:tau=1"\nregions: ["a\\rb"]',
    'policy: "norm:tau=\\e]0;1"',
    'policy: "norm:tau=1"\nmeasured: {machine: "\\e[1m", item: row, ms: 1, full_ms: 1, steps: {}}',
]


@pytest.mark.parametrize("text", HARM)
def test_a_card_made_to_do_harm_is_refused_in_one_harmless_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "card.yaml").write_text(text, encoding="utf-8")
    assert run_command("card", "card.yaml") == 2
    shown = capsys.readouterr()
    assert not shown.out
    (line,) = shown.err.splitlines()
    assert line.isprintable()
    assert [entry.name for entry in tmp_path.iterdir()] == ["card.yaml"]


@pytest.mark.parametrize("tau", ["nan", "inf", "-1", "1e999", "9" * 400])
def test_a_threshold_that_is_no_number_is_refused_before_anything_runs(
    tau: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, policy=f"norm:tau={tau}")
    with pytest.raises(ValueError, match="tau"):
        Card.load(path).policies(["loop"])
    assert run_command("solve", "chase", "a>b b", "--policy", path) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_certificate_cannot_steer_the_terminal_that_it_is_shown_on(model: Model, tmp_path: Path) -> None:
    certified(model).save(tmp_path / "card")
    path = tmp_path / "card" / "certificate.json"
    fields = json.loads(path.read_text())
    for changed in ({"promise": "\x1b[2Jall is well"}, {"settings": ["\x1b[1m"]}, {"risk": "a\u202eb"}):
        path.write_text(json.dumps({**fields, **changed}))
        with pytest.raises(ValueError, match="can be printed"):
            Card.load(tmp_path / "card")
