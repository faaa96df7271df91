"""Shared fixtures: a tiny model, tiny data, and the hypothesis profiles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from cases import write_documents
from haltkit.models.checkpoint import build_model
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.files import save_checkpoint
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.text.prepare import prepare
from haltkit.models.text.source import resolve_source
from haltkit.models.text.tokenizer import TOKENIZER_FILE, load_tokenizer, write_ranks
from haltkit.models.training.config import load_config

settings.register_profile("default", max_examples=30, deadline=None)
settings.register_profile(
    "ci", max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("quick", max_examples=8, deadline=None)
settings.register_profile("fuzz", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nothing_is_left_switched() -> Iterator[None]:
    """No test, and nothing that it calls, leaves gradients or inference mode other than they were."""
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


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


@pytest.fixture(scope="module")
def checkpoint(tiny_config: ModelConfig, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model with the test data's tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    save_checkpoint(folder, build_model(tiny_config), tiny_config, dtype=torch.float32, trained={})
    write_ranks(load_tokenizer(data_folder), folder / TOKENIZER_FILE)
    return folder


@pytest.fixture
def tiny_model(tiny_config: ModelConfig) -> LoopedGPT:
    """Untrained, in float64: rounding cannot move a step count."""
    torch.manual_seed(0)
    return build_model(tiny_config).double().eval()
