"""Files do not get code imported unless the user allows it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import haltkit
from cases import run_command
from haltkit import registry
from haltkit.card import Card
from haltkit.comparison.settings import candidates
from haltkit.models.reasoner.checkpoint import load_reasoner
from haltkit.models.reasoner.config import load_reasoner_config
from haltkit.models.weights import BUNDLED
from haltkit.protocol import LoopStep, Verdict
from haltkit.trust import CodeRefused

MODULE = """\
import pathlib
from haltkit.models.chase.task import make_task
from haltkit.policies import StepNorm as Own

pathlib.Path(__file__).with_suffix(".ran").touch()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """A module ``own.code`` that leaves a mark when it is imported; returns whether it was."""
    package = tmp_path / "own"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "code.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("own", "own.code"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return (package / "code.ran").exists


def card(folder: Path, policy: str) -> str:
    path = folder / "card.yaml"
    path.write_text(f"policy: '{policy}'\n", encoding="utf-8")
    return str(path)


def checkpoint(folder: Path) -> Path:
    """The bundled chase model under a task of the user's own."""
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(BUNDLED / "chase" / "model.safetensors")
    config = json.loads((BUNDLED / "chase" / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "haltkit-own.code"}), encoding="utf-8")
    return folder


def config(folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text("task: own.code\n", encoding="utf-8")
    return path


READERS: dict[str, Callable[[Path], object]] = {
    "card": lambda folder: Card.load(card(folder, "own.code:Own:tau=1")).policies(["loop"]),
    "card with regions": lambda folder: Card.load(card(folder, "a=norm:tau=1;b=own.code:Own:tau=1")),
    "card of a combination": lambda folder: Card.load(card(folder, "any(norm:tau=1|own.code:Own:tau=1)")),
    "card for attach": lambda folder: haltkit.attach(
        torch.nn.Sequential(torch.nn.Linear(2, 2)), card(folder, "own.code:Own:tau=1"), body=["0"]
    ),
    "card for compare": lambda folder: candidates(card(folder, "own.code:Own:tau=1"), cast(Any, None)),
    "checkpoint": lambda folder: load_reasoner(checkpoint(folder / "checkpoint")),
    "config": lambda folder: load_reasoner_config(config(folder)),
}


@pytest.mark.parametrize("kind", READERS)
def test_code_that_a_file_names_is_not_imported(kind: str, tmp_path: Path, own: Callable[[], bool]) -> None:
    with pytest.raises(CodeRefused, match="--allow-code"):
        READERS[kind](tmp_path)
    assert not own()


@pytest.mark.parametrize("kind", ["card", "checkpoint", "config"])
def test_code_that_a_file_names_is_imported_where_it_is_allowed(
    kind: str, tmp_path: Path, own: Callable[[], bool]
) -> None:
    with haltkit.allow_code():
        READERS[kind](tmp_path)
    assert own()


def test_code_that_the_user_types_is_imported(own: Callable[[], bool]) -> None:
    haltkit.policy("own.code:Own:tau=1")
    assert own()


def test_the_command_line_has_one_opt_in(
    tmp_path: Path, own: Callable[[], bool], capsys: pytest.CaptureFixture[str]
) -> None:
    solve = ("solve", "chase", "a>b b", "--policy", card(tmp_path, "own.code:Own:tau=1"))
    assert run_command(*solve) == 2
    assert "own.code:Own" in capsys.readouterr().err
    assert not own()
    assert run_command("--allow-code", *solve) == 0
    assert own()


@dataclass(frozen=True)
class Registered:
    tau: float

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: LoopStep) -> tuple[None, Verdict]:
        return None, Verdict(step.x[..., 0] < self.tau, step.x[..., 0])


def test_a_class_that_is_registered_needs_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TABLE", registry._Table(dict(registry._TABLE.rows)))
    haltkit.register("registered-here")(Registered)
    found = Card.load(card(tmp_path, f"{Registered.__module__}:Registered:tau=1")).policies(["loop"])
    assert found["loop"] == Registered(1.0)
