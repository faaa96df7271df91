"""The lm-evaluation-harness itself, offline, on a small local task."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cases import hrm_model, needs
from haltkit.cli.main import app

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # the harness warns as it likes

WORDS = ["[UNK]", "[EOS]", *(f"w{i}" for i in range(48))]
CHOICE = """task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
ROLLING = """task: tiny_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
GENERATING = """task: tiny_generating
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{max_gen_toks: 4, until: ["w3"]}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny HRM-text with a tokenizer, and tasks."""
    needs("lm_eval")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    hrm_model().save_pretrained(path / "model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[EOS]", pad_token="[EOS]", unk_token="[UNK]")
    fast.save_pretrained(path / "model")
    data = path / "data.json"
    with data.open("w", encoding="utf-8") as file:
        for i in range(6):
            question = " ".join(f"w{(7 * i + 3 * j) % 48}" for j in range(3 + i))
            choices = [f"w{(i + j) % 48}" + " w5 w6" * (j % 2) for j in range(3)]
            file.write(json.dumps({"question": question, "choices": choices, "answer": i % 3}) + "\n")
    for name, text in {"choice": CHOICE, "rolling": ROLLING, "generating": GENERATING}.items():
        (path / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    return path


def evaluated(folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, tasks: str, out: str, **keys: Any) -> Any:
    """The results JSON that the harness writes."""
    monkeypatch.setattr(sys, "argv", ["haltkit"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = {"pretrained": folder / "model", **keys}
    arguments = ["lm-eval", "run", "--model", model, "--tasks", tasks, "--device", "cpu", "--batch_size", "3"]
    arguments += ["--model_args", ",".join(f"{name}={value}" for name, value in given.items())]
    arguments += ["--include_path", str(folder), "--output_path", str(folder / out)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (written,) = (folder / out).rglob("results_*.json")
    return json.loads(written.read_text(encoding="utf-8"))


def test_at_full_fixed_depth_scores_are_those_of_hflm_to_the_last_digit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = "tiny_choice,tiny_rolling,tiny_generating"
    expected = evaluated(folder, monkeypatch, "hf", tasks, "hf")
    for name, keys in {"own": {}, "fixed": {"policy": "fixed:steps=4"}}.items():
        found = evaluated(folder, monkeypatch, "haltkit", tasks, name, **keys)
        assert found["results"] == expected["results"]
    counted = found["config"]["haltkit"]
    assert counted["policy"] == "fixed:steps=4"
    assert counted["context"]["loop"]["histogram"].keys() == {"4"}


def test_steps_are_told_by_request_with_context_and_continuation_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = folder / "steps.jsonl"
    found = evaluated(
        folder, monkeypatch, "haltkit", "tiny_choice", "adaptive", policy="norm:tau=0.05", max_steps=3, steps=steps
    )
    lines = [json.loads(line) for line in steps.read_text(encoding="utf-8").splitlines()]
    assert [(line["doc"], line["request"]) for line in lines] == [
        (doc, choice) for doc in range(6) for choice in range(3)
    ]
    for line in lines:
        assert len(line["context"]["loop"]) == 3 + line["doc"] - 1  # its last token predicts the continuation's first
        assert len(line["continuation"]["loop"]) == (3 if line["request"] == 1 else 1)
    for part in ("context", "continuation"):
        counted = found["config"]["haltkit"][part]["loop"]
        flat = [step for line in lines for step in line[part]["loop"]]
        assert counted["tokens"] == len(flat) == sum(counted["outcomes"].values())
        assert counted["mean_steps"] == pytest.approx(sum(flat) / len(flat))
        assert set(counted["outcomes"]) <= {"converged", "budget"}
    assert len(found["config"]["haltkit"]["context"]["loop"]["histogram"]) > 1


def test_steps_of_a_request_are_those_of_a_pass_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import haltkit

    steps = folder / "alone.jsonl"
    spec = "norm:tau=0.05"
    evaluated(folder, monkeypatch, "haltkit", "tiny_choice", "alone", policy=spec, steps=steps)
    lines = [json.loads(line) for line in steps.read_text(encoding="utf-8").splitlines()]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    documents = [json.loads(line) for line in (folder / "data.json").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        document = documents[line["doc"]]
        text = f"{document['question']} {document['choices'][line['request']]}"
        ids = torch.tensor([[WORDS.index(word) for word in text.split()]])[:, :-1]
        with haltkit.attach(model, spec) as session, torch.no_grad():
            model(ids)
        assert line["context"]["loop"] + line["continuation"]["loop"] == session.steps["loop"][0].tolist()


@pytest.mark.parametrize(
    ("keys", "token"),
    [
        ({"policy": "norm:tau=0.1;granularity=batch"}, "norm"),
        ({"max_steps": 3}, "policy="),
        ({"policy": "nonsense:tau=1"}, "nonsense"),
    ],
)
def test_bad_arguments_are_one_clear_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], token: str
) -> None:
    with pytest.raises(ValueError, match=token):
        evaluated(folder, monkeypatch, "haltkit", "tiny_choice", "bad", **keys)


def test_pooled_policies_are_refused_at_batches(folder: Path) -> None:
    from haltkit.models.harness import HaltedLM

    policy = "norm:tau=0.1,granularity=batch"
    with pytest.raises(ValueError, match="batch_size=2"):
        HaltedLM(pretrained=str(folder / "model"), device="cpu", policy=policy, batch_size=2)
    HaltedLM(pretrained=str(folder / "model"), device="cpu", policy=policy, batch_size=1)
