"""What a user sees of the command line itself: completion, and a sign of life at once."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from haltkit.cli import terminal
from haltkit.cli.main import app


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("haltkit comp", {"compare"}),
        ("haltkit compare c", {"chase"}),
        ("haltkit compare --pol", {"--policies"}),
        ("haltkit compare --mode ", {"forward", "decode"}),
        ("haltkit compare --taus p", {"paper"}),
        ("haltkit eval --dev", {"--device"}),
        ("haltkit eval --device c", {"cpu", "cuda"}),
        ("haltkit generate --layout ", {"depth-indexed", "last"}),
    ],
)
def test_the_shell_completes_commands_models_options_and_values(typed: str, offered: set[str]) -> None:
    words = typed.split(" ")
    env = {"_HALTKIT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    done = CliRunner().invoke(app, prog_name="haltkit", env=env)
    assert set(done.output.split()) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_completion_script_for_every_shell(shell: str) -> None:
    done = CliRunner().invoke(app, prog_name="haltkit", env={"_HALTKIT_COMPLETE": f"source_{shell}"})
    assert f"complete_{shell}" in done.output


def test_a_line_moves_while_torch_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    imported: list[str] = []
    monkeypatch.setenv("FORCE_COLOR", "1")  # for rich, standard error is a terminal
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(terminal, "import_module", imported.append)
    assert terminal.starting(lambda: 7)() == 7
    assert imported == ["torch"]
    assert "starting" in capsys.readouterr().err
