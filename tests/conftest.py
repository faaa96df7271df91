"""Shared fixtures: a tiny model, tiny data, and the hypothesis profiles."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from haltkit.models.checkpoint import build_model
from haltkit.models.config import ModelConfig, load_config
from haltkit.models.gpt import LoopedGPT
from haltkit.models.prepare import prepare, resolve_source

settings.register_profile("default", max_examples=30, deadline=None)
settings.register_profile(
    "ci", max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_is_left_switched() -> Iterator[None]:
    """No test, and nothing that it calls, leaves gradients or inference mode other than they were."""
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def write_documents(path: Path, count: int = 400) -> Path:
    """JSONL documents whose words repeat, so that a few steps of training show in the loss."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            text = f"Document {i} says that {i % 7} and {i % 5} make {i % 7 + i % 5}. " * (2 + i % 4)
            file.write(json.dumps({"text": text, "id": i}) + "\n")
    return path


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("text") / "documents.jsonl")


@pytest.fixture(scope="session")
def data_folder(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "tokens"
    prepare(resolve_source([str(documents)]), out, train_vocab=320, holdout=0.1)
    return out


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    return load_config("tiny").model


@pytest.fixture
def tiny_model(tiny_config: ModelConfig) -> LoopedGPT:
    """Untrained, in float64: rounding cannot move a step count."""
    torch.manual_seed(0)
    return build_model(tiny_config).double().eval()
