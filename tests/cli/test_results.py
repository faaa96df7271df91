"""What every command that prints results has: ``--json``, and a progress line while it is at work."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import certificate_for, run_command, small_tokenizer, write_documents
from haltkit.card import Card
from haltkit.cli.main import app
from haltkit.identity import Identity
from haltkit.models.checkpoint import build_model
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.files import save_checkpoint
from haltkit.models.reasoner.checkpoint import bundled_reasoner
from haltkit.models.text.tokenizer import TOKENIZER_FILE, load_tokenizer, write_ranks

pytestmark = pytest.mark.slow

# Commands whose results are files or the harness's own.
WITHOUT = {"export", "lm-eval"}
SMALL = ["--max-loops", "6"]
TEXT = ["--tokens", "256", *SMALL]
# Command lines by command, of some seconds each; DIR is a folder with what they read.
LINES = {
    "bench": ["bench", "DIR/tiny", "--text", "DIR/text.txt", "--only", "overhead,layouts", "--repeats", "1", *SMALL],
    "calibrate": [
        "calibrate",
        "chase",
        "--sequences",
        "96",
        "--batch",
        "16",
        "--epsilon",
        "0.3",
        "--taus",
        "0.5",
        *SMALL,
    ],
    "card": ["card", "DIR/card.yaml"],
    "compare": ["compare", "--policies", "norm", "--taus", "1", "--repeats", "1", *TEXT],
    "diagnose": ["diagnose", "chase", "--tokens", "64", "--loops", "6", "--deep-tokens", "0", "--out", "DIR/found"],
    "doctor": ["doctor", "--device", "cpu"],
    "eval": ["eval", "--loops", "1,3", "--policy", "norm:tau=1", "--batch", "2", *TEXT],
    "fit": ["fit", "chase", "--sequences", "32", "--batch", "4", "--level", "0.9"],
    "generate": ["generate", "The question", "-n", "4"],
    "headroom": ["headroom", "chase", *SMALL],
    "policies": ["policies"],
    "prepare": ["prepare", "DIR/documents.jsonl", "--tokenizer", "DIR/bytes.tiktoken", "--out", "DIR/data"],
    "report": ["report", "DIR/found"],
    "solve": ["solve", "sudoku", "DIR/board.txt"],
    "train": ["train", "chase", "--dry-run"],
    "watch": ["watch", "chase", "--card", "DIR/certified", "--rate", "0.5", "--sequences", "12"],
}
QUICK = {"card", "policies"}  # nothing to wait for


@pytest.fixture(scope="module")
def folder(tiny_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results")
    small_tokenizer(path)
    write_documents(path / "documents.jsonl", 40)
    Card("norm:tau=0.25", "Net", ("loop",), about="by hand").save(path / "card.yaml")
    chase = bundled_reasoner("chase")
    identity = Identity.of(chase.model, chase.task.full_depth)
    certificate = replace(certificate_for("norm:tau=2"), loss="disagreement")
    Card("norm:tau=2", identity=identity, certificate=certificate).save(path / "certified")
    task = bundled_reasoner("sudoku").task
    (board,) = task.test_sets(1, seed=3)["mixed"].inputs
    (path / "board.txt").write_text("".join(task.words(board)), encoding="utf-8")
    (path / "text.txt").write_text("".join(f"Document {i} says {i * i}. " for i in range(60)), encoding="utf-8")
    torch.manual_seed(0)
    (path / "tiny").mkdir()
    save_checkpoint(path / "tiny", build_model(tiny_config), tiny_config, dtype=torch.float32, trained={})
    write_ranks(load_tokenizer(path / "bytes.tiktoken"), path / "tiny" / TOKENIZER_FILE)
    assert run_command(*line("diagnose", path)) == 0
    return path


def line(command: str, folder: Path) -> list[str]:
    return [word.replace("DIR", str(folder)) for word in LINES[command]]


def test_every_command_that_prints_results_writes_them_as_json() -> None:
    commands = {one.name: inspect.signature(one.callback).parameters for one in app.registered_commands if one.callback}
    with_json = {name for name, parameters in commands.items() if "json_path" in parameters}
    assert with_json == set(commands) - WITHOUT == set(LINES)


def numbers(value: Any) -> Iterator[float]:
    """All numbers in plain values, also those within text and the places in lists."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        yield from range(1, len(value) + 1)
        for one in value:
            yield from numbers(one)
    elif isinstance(value, str):
        for word in NUMBER.findall(value):
            yield float(word.replace(",", ""))
    elif isinstance(value, (int, float)):
        yield float(value)


NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])")
# Printed in another unit: percent, KiB, millions, milliseconds, minutes, hours.
UNITS = (1, 100, 1 / 1024, 1e-6, 1e3, 1 / 60, 1 / 3600)


def stands_for(word: str, value: float) -> bool:
    """Whether a printed number is this one, rounded."""
    mantissa, _, exponent = word.replace(",", "").partition("e")
    last = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return any(abs(float(word.replace(",", "")) - abs(value) * unit) <= 0.51 * last for unit in UNITS)


@pytest.mark.parametrize("command", LINES)
def test_what_is_written_is_what_is_printed(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run_command(*line(command, folder), "--json", tmp_path / "out.json") == 0
    shown = capsys.readouterr()
    said = f"results: {tmp_path / 'out.json'}" in shown.out
    assert said is (command != "generate")  # its standard output is the text alone
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    known = set(numbers(found))
    known |= {math.exp(value) for value in known if 0 < value < 20}  # perplexities
    assert "\x1b" not in shown.err
    text = (shown.out + shown.err).replace(str(tmp_path), "").replace(str(folder), "")
    printed = NUMBER.findall(text)
    assert printed
    missing = [word for word in printed if not any(stands_for(word, value) for value in known)]
    assert not missing, shown.out


@pytest.mark.parametrize("command", LINES)
def test_standard_output_is_json_alone_and_a_terminal_sees_progress(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich, standard error is a terminal
    assert run_command(*line(command, folder), "--json", "-") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)
    assert ("\x1b[?25l" in shown.err) is (command not in QUICK)  # the cursor is hidden while a line moves


def test_a_certified_card_is_what_other_commands_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = tmp_path / "card"
    assert run_command(*LINES["calibrate"], "--save", card) == 0
    certified = Card.load(card)
    assert certified.certificate is not None
    assert certified.measured is not None
    capsys.readouterr()
    assert run_command("card", card) == 0
    assert certified.certificate.promise in capsys.readouterr().out
    compare = ["compare", "chase", "--policies", card, "--repeats", "1", "--json", "-"]
    assert run_command(*compare, *SMALL) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    assert [row["promise"] for row in rows if row["spec"] == certified.policy] == [certified.certificate.promise]
    assert [one["promise"] for one in found["conclusion"]["certified"]] == [certified.certificate.promise]
    watch = ["watch", "chase", "--card", card, "--rate", "0.5", "--sequences", "24"]
    assert run_command(*watch) in (0, 1)  # the full depth is the card's, nobody needs to say it
    assert certified.certificate.risk in capsys.readouterr().out
    assert run_command(*compare, "--max-loops", "7") == 2  # another full depth
    assert "certificate is not about this model" in capsys.readouterr().err
