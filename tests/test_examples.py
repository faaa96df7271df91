"""Every example runs as its docstring says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = {
    "bench_attach.py": ["--repeats", "1"],
    "bench_training.py": ["--config", "tiny", "--eager", "--rounds", "1"],
    "bench_policy_cost.py": ["--rows", "16", "--width", "64", "--repeats", "2"],
}


# Needs the source of a model that is on no registry; its head says how to run it.
BY_HAND = {"check_huginn.py"}


@pytest.mark.parametrize(
    "path", sorted(p for p in EXAMPLES.glob("*.py") if p.name not in BY_HAND), ids=lambda path: path.name
)
def test_example(path: Path) -> None:
    command = [sys.executable, "-W", "error", str(path), *ARGUMENTS.get(path.name, [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
