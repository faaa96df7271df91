"""Sharing checkpoints through huggingface_hub's mixin. Nothing is sent anywhere: the Hub is a mock here."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from haltkit.models.checkpoint import BUNDLED, build_model, load_checkpoint
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.text.tokenizer import load_tokenizer
from haltkit.models.weights import CheckpointError, read_tensors


@pytest.fixture
def model(tiny_config: ModelConfig, data_folder: Path) -> LoopedGPT:
    torch.manual_seed(1)
    model = build_model(tiny_config)
    model.tokenizer, model.trained = load_tokenizer(data_folder), {"tokens": 12}
    return model.eval()


def test_a_saved_model_comes_back_with_its_tokenizer_and_card(
    model: LoopedGPT, tiny_config: ModelConfig, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.tiktoken",
    ]
    again = LoopedGPT.from_pretrained(tmp_path / "m")
    tokens = torch.arange(20)[None]
    assert torch.equal(again(tokens, 3), model(tokens, 3))
    assert again.tokenizer is not None
    assert again.tokenizer.encode_ordinary("Document 3") == model.tokenizer.encode_ordinary("Document 3")
    assert again.trained == {"tokens": 12}
    assert "library_name: haltkit" in (tmp_path / "m" / "README.md").read_text()
    # It is a checkpoint like any other, and any other is one.
    assert load_checkpoint(tmp_path / "m").config == tiny_config
    assert LoopedGPT.from_pretrained(BUNDLED).trained["tokens"] > 0


def test_bf16_weights_stay_bf16_on_disk(model: LoopedGPT, tmp_path: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    assert {t.dtype for t in read_tensors(tmp_path / "m" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_model_without_a_tokenizer_says_what_to_do(tiny_config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"set model\.tokenizer first"):
        build_model(tiny_config).save_pretrained(tmp_path / "m")


def test_copies_are_models_of_their_own(model: LoopedGPT, tmp_path: Path) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.norm_f.weight.zero_()
    assert float(model.norm_f.weight.detach().sum()) > 0
    other.save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model"]["d_model"] == model.d_model


def test_push_sends_the_folder(model: LoopedGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a mock: no repository is made and nothing leaves this machine."""
    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            pass

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})()

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
            sent.update({"repo": repo_id, "files": sorted(p.name for p in Path(folder_path).iterdir())})
            return "https://example.invalid/commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model.push_to_hub("somebody/looped")
    assert sent == {
        "repo": "somebody/looped",
        "files": ["README.md", "config.json", "model.safetensors", "tokenizer.tiktoken"],
    }


def test_loading_from_the_hub_asks_for_no_code_and_no_pickles(
    model: LoopedGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "m")
    asked: list[Any] = []

    def snapshot(repo: str, **keys: Any) -> str:
        asked.append((repo, keys["revision"], keys["allow_patterns"]))
        return str(tmp_path / "m")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", lambda **_: str(tmp_path / "m" / "config.json"))
    again = LoopedGPT.from_pretrained("somebody/looped", revision="v1")
    assert torch.equal(again.wte.weight, model.wte.weight)
    assert asked == [("somebody/looped", "v1", ["config.json", "model.safetensors", "tokenizer.tiktoken", "README.md"])]


class Trap:
    """What a malicious pickle would do."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("the folder's code has run",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_refused_and_code_never_runs(model: LoopedGPT, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "m"
    model.save_pretrained(folder)
    (folder / "modeling.py").write_text("raise SystemExit('the folder's code has run')")
    (folder / name).write_bytes(pickle.dumps(Trap()))
    assert LoopedGPT.from_pretrained(folder).d_model == model.d_model  # beside safetensors it is not looked at
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=rf"weights in {name}: a pickle can run code.*refused.*model\.safetensors"
    ):
        LoopedGPT.from_pretrained(folder)
    shutil.copy(folder / name, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        LoopedGPT.from_pretrained(folder)


def test_every_difference_is_listed(model: LoopedGPT, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model.save_pretrained(tmp_path / "m")
    weights = read_tensors(tmp_path / "m" / "model.safetensors")
    weights["wpe.weight"] = torch.zeros(8, 32)
    weights["strange"] = weights.pop("norm_f.weight")
    save_file(weights, tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        LoopedGPT.from_pretrained(tmp_path / "m")
    for difference in (
        "missing norm_f.weight",
        "unexpected strange",
        "wpe.weight is (8, 32), the config says (32, 32)",
    ):
        assert difference in str(caught.value)
