"""``gate`` from the command line: refused where the model has no exit head, used where the subject's preset finds one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import haltkit
from cases import run_command
from standins import OuroForCausalLM

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "command",
    [
        ["compare", "--policies", "gate"],
        ["compare", "--policies", "gate:tau=0.5,rule=cumulative"],
        ["eval", "--policy", "gate:tau=0.5"],
        ["bench", "--policies", "gate:tau=0.5"],
        ["calibrate", "--policy", "gate", "--epsilon", "0.1", "--delta", "0.1"],
    ],
    ids=lambda command: " ".join(command[:3]),
)
@pytest.mark.parametrize("model", ["text", "chase"])
def test_a_gate_that_the_model_has_not_is_one_line_and_nothing_is_measured(
    command: list[str], model: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = command
    saved = tmp_path / "card"
    more = ["--save", str(saved)] if name in ("compare", "calibrate") else []
    assert run_command(name, checkpoint if model == "text" else model, *options, *more) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert lines[-1].startswith("haltkit: ")
    assert "a gate that the model has not" in lines[-1]
    assert not [line for line in out.splitlines() if line.strip()]
    assert not saved.exists()


def ouro_subject() -> haltkit.Subject:
    """Single tokens, each to be said again, for a stand-in for Ouro."""
    torch.manual_seed(0)
    model = OuroForCausalLM().eval()
    torch.nn.init.normal_(model.model.early_exit_gate.weight, std=0.6)
    ids = torch.randint(0, 50, (24, 1, 1), generator=torch.Generator().manual_seed(0))

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")

    return haltkit.Subject.attached(
        model, lambda ids: model(ids).logits, samples=list(ids), loss=loss, logits=lambda out: out, full_depth=6
    )


def test_a_gate_that_the_preset_has_found_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    place = f"{__name__}:{ouro_subject.__name__}"
    asked = ("--policies", "gate:rule=cumulative", "--taus", "0.1,0.3,0.6", "--json", file)
    assert run_command("compare", place, *asked) == 0, capsys.readouterr().err
    rows = json.loads(file.read_text())["rows"]
    found = {row["tau"]: sum(row["steps"].values()) for row in rows if "gate" in str(row["spec"])}
    subject = ouro_subject()
    model = subject.model
    for tau, steps in found.items():
        with torch.no_grad():
            own = [model.exit_steps(model.model(ids)[2], 1 - tau) for ids in subject.samples]
        assert steps == pytest.approx(float(torch.stack(own).double().mean()))
    assert len(set(found.values())) == 3
