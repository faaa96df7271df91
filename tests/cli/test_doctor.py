"""``haltkit doctor``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from haltkit.cli import doctor
from haltkit.cli.main import app
from haltkit.subject import Subject


def test_a_sound_installation_passes_and_is_written_down(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["checks"].keys() == {"text", "chase", "sudoku"}
    assert all(check["passed"] for check in found["checks"].values())
    assert found["versions"]["torch"]
    assert "self-check sudoku: passed" in done.output


def test_a_failed_check_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Subject, sample: object, setting: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Subject, "run", broken)
    done = CliRunner().invoke(app, ["doctor", "--device", "cpu"])
    assert done.exit_code == 1
    assert "no such kernel" in done.output


def test_what_is_missing_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"lm-eval": None, "matplotlib": None}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, "1.5"))
    monkeypatch.setattr(doctor, "_check", lambda name, device: {"passed": True, "found": "as it should"})
    lines = CliRunner().invoke(app, ["doctor", "--device", "cpu"]).output.splitlines()
    assert "lm-eval: missing lm-eval: pip install 'haltkit[eval]'" in lines
    assert "figures and pages: missing matplotlib: pip install haltkit" in lines
    assert "models of transformers: ready (transformers 1.5)" in lines
