"""Every command that takes a policy takes a card, refuses it on another model, and says what stands behind it."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import certificate_for, run_command, small_tokenizer
from haltkit.card import Card
from haltkit.cli.main import app
from haltkit.cli.subjects import resolve
from haltkit.identity import Identity
from haltkit.models.checkpoint import build_model
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.files import save_checkpoint
from haltkit.models.reasoner.checkpoint import bundled_reasoner
from haltkit.models.text.tokenizer import TOKENIZER_FILE, load_tokenizer, write_ranks

pytestmark = pytest.mark.slow

SPEC, DEPTH = "norm:tau=0.5", 6
SMALL = ["--max-loops", str(DEPTH)]
# By command: with a card at CARD, for chase or for the text model in DIR; DIR is a folder with what they read.
LINES = {
    "bench": ["bench", "chase", "--policies", "CARD", "--repeats", "1", *SMALL],
    "calibrate": [
        "calibrate",
        "chase",
        "--policy",
        "CARD",
        "--batch",
        "8",
        "--sequences",
        "40",
        "--epsilon",
        "0.4",
        *SMALL,
    ],
    "compare": ["compare", "chase", "--policies", "accel:tau=1,CARD", "--repeats", "1", "--plot", "DIR/p.svg", *SMALL],
    "diagnose": [
        *("diagnose", "chase", "--policies", "CARD", "--tokens", "32", "--loops", str(DEPTH), "--deep-tokens", "0"),
        *("--out", "DIR/found"),
    ],
    "eval": ["eval", "chase", "--loops", "", "--policy", "CARD", "--batch", "64", *SMALL],
    "generate": ["generate", "Document", "--model", "DIR/tiny", "-n", "2", "--policy", "TEXTCARD", *SMALL],
    "solve": ["solve", "chase", "a>b b a?", "--policy", "CARD", *SMALL],
}
MORE = {
    "bench of text": [
        *("bench", "DIR/tiny", "--text", "DIR/text.txt", "--policies", "TEXTCARD", "--only", "slowest"),
        *("--repeats", "1", *SMALL),
    ],
    "prompts": ["generate", "--prompts", "DIR/lines.txt", "--model", "DIR/tiny", "-n", "2", "--policy", "TEXTCARD"],
    "draft": ["generate", "a", "--model", "DIR/tiny", "-n", "2", "--sampler", "speculative", "--draft", "TEXTCARD"],
}
MORE["prompts"] += SMALL
MORE["draft"] += SMALL
# Whose --policy names a kind of policy, and which takes the arguments of another program (tests/models/test_harness.py).
NONE, OTHER = {"fit"}, {"lm-eval"}
PHRASE = "used without its certificate (other weights): nothing is promised"
MARK = "(without its certificate)"


@pytest.fixture(scope="module")
def folder(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model, and cards: ``whole`` for the models as they are, ``other`` for others' weights."""
    path = tmp_path_factory.mktemp("cards")
    small_tokenizer(path)
    (path / "text.txt").write_text("".join(f"Document {i} says {i * i}. " for i in range(60)), encoding="utf-8")
    (path / "lines.txt").write_text("one\ntwo\n", encoding="utf-8")
    torch.manual_seed(0)
    (path / "tiny").mkdir()
    tiny = build_model(tiny_config)
    save_checkpoint(path / "tiny", tiny, tiny_config, dtype=torch.float32, trained={})
    write_ranks(load_tokenizer(path / "bytes.tiktoken"), path / "tiny" / TOKENIZER_FILE)
    chase: Any = bundled_reasoner("chase").model
    for name, model in {"CARD": chase, "TEXTCARD": tiny}.items():
        identity, told = Identity.of(model, DEPTH), (type(model).__name__, tuple(model.regions))
        for kind, known in {"whole": identity, "other": replace(identity, weights="0" * 64)}.items():
            card = Card(SPEC, *told, identity=known, certificate=certificate_for(SPEC))
            card.save(path / f"{kind}-{name}")
    return path


def line(command: str, folder: Path, kind: str | None) -> list[str]:
    """A command line with cards of a kind; None: with their policy as a spec."""

    def word(one: str) -> str:
        for name in ("TEXTCARD", "CARD"):
            if one.endswith(name):
                return one.replace(name, SPEC if kind is None else str(folder / f"{kind}-{name}"))
        return one.replace("DIR", str(folder))

    return [word(one) for one in {**LINES, **MORE}[command]]


def test_every_command_that_takes_a_policy_has_the_option() -> None:
    """Commands are found by what their options are called, or are said to be for."""
    takes, has = set(), set()
    for command in app.registered_commands:
        assert command.callback is not None
        for name, parameter in inspect.signature(command.callback, eval_str=True).parameters.items():
            about = " ".join(
                f"{getattr(one, 'help', '')} {getattr(one, 'metavar', '')}"
                for one in getattr(parameter.annotation, "__metadata__", ())
            )
            if name in ("policy", "policies") or "SPEC" in about or "a spec" in about or "saved choice" in about:
                takes.add(command.name)
            if name == "without_certificate":
                has.add(command.name)
    assert has == takes - NONE
    assert has == set(LINES)
    assert {command.name for command in app.registered_commands} >= NONE | OTHER


@pytest.mark.parametrize("command", [*LINES, *MORE])
def test_a_card_for_other_weights_is_refused_in_a_line_that_names_the_option(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to_json = [] if command == "prompts" else ["--json", tmp_path / "out.json"]
    assert run_command(*line(command, folder, "other"), *to_json) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "other weights" in said
    assert "--without-certificate" in said
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", [*LINES, *MORE])
def test_with_the_option_it_is_used_and_every_output_says_so(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    to_json = [] if command == "prompts" else ["--json", tmp_path / "out.json"]
    assert run_command(*line(command, folder, "other"), "--without-certificate", *to_json) == 0
    shown = capsys.readouterr()
    assert PHRASE in shown.out + shown.err
    written = shown.out if command == "prompts" else (tmp_path / "out.json").read_text(encoding="utf-8")
    assert PHRASE in written
    if command in ("compare", "eval", "bench", "bench of text"):  # the rows of their tables are the policies
        assert MARK in shown.out.replace(PHRASE, "")
    if command == "compare":
        assert MARK in (folder / "p.svg").read_text(encoding="utf-8")
        assert [MARK in row["label"] for row in json.loads(written)["rows"] if row["spec"] == SPEC] == [True]
    if command == "diagnose":
        assert MARK in (folder / "found" / "diagnose.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [*LINES, "bench of text", "prompts"])
def test_a_certified_card_is_used_and_every_output_says_what_is_promised(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    to_json = [] if command == "prompts" else ["--json", tmp_path / "out.json"]
    assert run_command(*line(command, folder, "whole"), *to_json) == 0
    shown = capsys.readouterr()
    written = shown.out if command == "prompts" else (tmp_path / "out.json").read_text(encoding="utf-8")
    promise = certificate_for(SPEC).promise
    said = (f"certified: {promise}" in shown.out + shown.err, promise in written)
    assert said == ((False, False) if command == "calibrate" else (True, True))  # which makes a promise of its own
    assert MARK not in shown.out


@pytest.mark.parametrize("command", LINES)
def test_the_option_is_refused_where_nothing_is_a_card(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(*line(command, folder, None), "--without-certificate") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "for cards" in said


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--layout", "last"], "--layout last"),
        (["--total-loops", "8"], "--total-loops"),
        (["--sampler", "wavefront"], "--sampler wavefront"),
    ],
)
def test_a_certified_card_is_not_used_for_another_function_of_its_model(
    more: list[str], named: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*line("generate", folder, "whole"), *more]
    assert run_command(*given) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert named in said
    assert "--without-certificate" in said
    assert run_command(*given, "--without-certificate") == 0
    assert "used without its certificate: nothing is promised" in capsys.readouterr().err


def test_a_certificate_says_where_its_policy_was_chosen_on_the_same_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card, small = tmp_path / "card", ["--sequences", "48", "--batch", "8", "--epsilon", "0.5", "--delta", "0.5", *SMALL]
    assert run_command("calibrate", "chase", "--policy", SPEC, *small, "--save", card) == 0
    assert "note:" not in capsys.readouterr().out
    assert run_command("calibrate", "chase", "--policy", card, *small) == 0
    assert "test set 'chains' too" in " ".join(capsys.readouterr().out.split())
    assert run_command("watch", "chase", "--card", card, "--sequences", "4", "--rate", "1") == 0
    assert "no new evidence" in " ".join(capsys.readouterr().out.split())
    assert run_command("calibrate", "chase", "--policy", card, *small, "--draw", "1") == 0
    assert "note:" not in capsys.readouterr().out
    assert run_command("watch", "chase", "--card", card, "--sequences", "4", "--rate", "1", "--draw", "1") == 0
    assert "note:" not in capsys.readouterr().out


def test_another_draw_has_other_sequences_and_is_for_reasoners(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"sequences": 8, "batch": 8, "draw": 0}
    first, again, other = (resolve("chase", {**options, "draw": draw}, {"batch"}).samples[0] for draw in (0, 0, 1))
    assert torch.equal(first.inputs, again.inputs)
    rows = {tuple(row.flatten().tolist()) for row in first.inputs}
    assert not any(tuple(row.flatten().tolist()) in rows for row in other.inputs)
    assert run_command("calibrate", "text", "--draw", "1") == 2
    assert "--draw" in capsys.readouterr().err
