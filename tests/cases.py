"""Cases that several test modules share: models, data and policies."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from haltkit.calibration.certificate import Certificate
from haltkit.cli import main as entry
from haltkit.models.training.config import RunConfig, load_config
from haltkit.models.weights import read_tensors
from haltkit.protocol import LoopStep, Verdict
from haltkit.registry import records
from haltkit.weights import Weights

WIDTH, STEPS = 8, 10


def run_command(*arguments: object) -> int:
    """The exit code of ``haltkit ARGUMENTS``, called as the console script does without paying for a new process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["haltkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            entry.run()
    return int(stop.value.code or 0)


def example_specs() -> dict[str, str]:
    """The specs that the laws are tested on: every registered policy with the examples of its record."""
    return {
        f"{record.name} {keys}" if number else record.name: f"{record.name}:{keys}"
        for record in records()
        for number, keys in enumerate(record.examples)
    }


def tiny_run(data: Path, **changes: Any) -> RunConfig:
    """The config ``tiny`` on prepared data, with batches of 2, and further fields of its ``train``."""
    loaded = load_config("tiny")
    train = replace(loaded.train, **{"batch_size": 2, "eval_batches": 1, **changes})
    return replace(loaded, data=replace(loaded.data, path=str(data)), train=train)


def write_probe(width: int) -> str:
    """A file with the weights of a probe for states of this width in the region ``loop``."""
    path = Path(tempfile.mkdtemp()) / "probe.safetensors"
    generator = torch.Generator().manual_seed(0)
    shapes = {"state": width, "bias": 1, "size": 1, "cosine": 1, "step": 1, "margin": 1}
    tensors = {f"loop/{name}": torch.randn(size, generator=generator) for name, size in shapes.items()}
    chosen = {"loop/size": -2.0, "loop/bias": -4.0, "loop/margin": 0.0}  # it does not look at the margin
    Weights({**tensors, **{name: torch.tensor([value]) for name, value in chosen.items()}}).save(path)
    return str(path)


def write_gate(width: int) -> str:
    """A file with the weights of a gate for states of this width in the region ``loop``."""
    path = Path(tempfile.mkdtemp()) / "gate.safetensors"
    state = torch.randn(width, generator=torch.Generator().manual_seed(0))
    Weights({"loop/state": state, "loop/bias": torch.tensor([-0.5])}).save(path)
    return str(path)


# Every registered policy under the examples of its record, and every wrapper.
SPECS = {
    **example_specs(),
    "patience": "norm:tau=0.2,patience=3",
    "min_steps": "accel:tau=0.5,min_steps=5",
    "check_every": "speed:tau=0.3,check_every=3",
    "tau_by_step": "norm:tau_by_step=0.1@2/0.3@4/0@6/0.2@7",
    "any": "any(accel:tau=0.02|norm-rel:tau=0.1)",
    "all": "all(accel:tau=0.2|norm:tau=0.1):min_steps=4",
}


def needs(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed")


def write_documents(path: Path, count: int = 400) -> Path:
    """JSONL documents whose words repeat, so that a few steps of training show in the loss."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            text = f"Document {i} says that {i % 7} and {i % 5} make {i % 7 + i % 5}. " * (2 + i % 4)
            file.write(json.dumps({"text": text, "id": i}) + "\n")
    return path


def small_tokenizer(folder: Path) -> Path:
    path = folder / "bytes.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256)))
    return path


def with_train(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))


def last_tensors(folder: Path) -> dict[str, torch.Tensor]:
    latest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return {**read_tensors(latest / "model.safetensors"), **read_tensors(latest / "optimizer.safetensors")}


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


@dataclass(frozen=True)
class Nervous:
    """A policy of a user's own: halts at once, unless told to be calm."""

    calm: bool = False
    mood: str = "uneasy"

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: LoopStep) -> tuple[None, Verdict]:
        score = torch.full_like(step.x[..., 0], float(self.calm))
        return None, Verdict(score, score < 0.5)


class Refiner(nn.Module):
    """The plain loop over one module; what happens between its calls is the argument ``glue``."""

    def __init__(self, glue: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        self.glue = glue

    def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
        for _ in range(n):
            x = self.core(x) if self.glue is None else self.glue(self.core, x)
        out: Tensor = self.head(x)
        return out

    def rollout(self, x: Tensor) -> Tensor:
        for _ in range(STEPS):
            x = self.core(x)
        return x


def state_of(model: nn.Module) -> list[Any]:
    return [
        (name, type(m), sorted(m.__dict__), list(m._forward_hooks), list(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


def hrm_model() -> Any:
    needs("transformers")
    pytest.importorskip("transformers.models.hrm_text", reason="this transformers has no HRM-text")
    from transformers import HrmTextConfig, HrmTextForCausalLM

    config = HrmTextConfig(
        vocab_size=50,
        hidden_size=32,
        num_layers_per_stack=1,
        num_attention_heads=4,
        intermediate_size=64,
        H_cycles=4,
        L_cycles=3,
    )
    return HrmTextForCausalLM(config).eval()


def certificate_for(spec: str) -> Certificate:
    """A promise about one setting."""
    return Certificate(
        risk="disagreement",
        epsilon=0.05,
        delta=0.1,
        method="betting",
        correction="fixed-sequence",
        promise="with probability 0.9 over the draw of the sequences, at most 5% of tokens disagree",
        unit="sequence",
        units=100,
        units_needed=60,
        settings=(spec,),
        chosen=0,
        empirical_risk=0.01,
        p_value=0.02,
        bound=0.04,
        loss_bound=1.0,
        data_hash="0" * 64,
        seed=0,
        reason="it passed",
    )


each_choice_of_the_recipe = pytest.mark.parametrize(
    "changes",
    [
        {"injection": "first_step"},
        {"injection": "never", "initial_state": "input"},
        {"initial_state": "zero"},
        {"noise": "every_step"},
        {"state_norm": False},
        {"exit_norm": True},
        {"norm_placement": "residual"},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
