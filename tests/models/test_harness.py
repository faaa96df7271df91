"""The lm-evaluation-harness itself, offline, on a small local task: models of transformers and haltkit's own."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cases import certificate_for, hrm_model, run_command
from haltkit.attachment import presets
from haltkit.card import Card
from haltkit.cli.main import app
from haltkit.identity import Identity
from haltkit.models.checkpoint import BUNDLED, Checkpoint, load_checkpoint

own = pytest.importorskip("haltkit.models.harness.own", reason="lm_eval is not installed")
registry = pytest.importorskip("lm_eval.api.registry")
LoopedLM = own.LoopedLM

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


def arguments_for(folder: Path, model: str, tasks: str, **keys: Any) -> list[str]:
    """Of the harness, in batches of 3; what has a comma is written as JSON."""
    given = {name: str(value) for name, value in {"pretrained": folder / "model", **keys}.items()}
    plain = ",".join(f"{name}={value}" for name, value in given.items())
    told = json.dumps(given) if any("," in value for value in given.values()) else plain
    arguments = ["run", "--model", model, "--tasks", tasks, "--device", "cpu", "--batch_size", "3"]
    return [*arguments, "--model_args", told, "--include_path", str(folder)]


def evaluated(folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, tasks: str, out: str, **keys: Any) -> Any:
    """The results JSON that the harness writes."""
    monkeypatch.setattr(sys, "argv", ["haltkit"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["lm-eval", *arguments_for(folder, model, tasks, **keys), "--output_path", str(folder / out)]
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
    assert {line["task"] for line in lines} == {"tiny_choice"}
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


@pytest.fixture(scope="module")
def mute(folder: Path) -> Path:
    """The folder of a model that predicts tokens and cannot generate."""
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

    class MuteConfig(PretrainedConfig):
        model_type = "mute"

    class Mute(PreTrainedModel):
        config_class = MuteConfig

        def __init__(self, config: MuteConfig) -> None:
            super().__init__(config)
            self.table = torch.nn.Embedding(50, 50)
            self.post_init()

        def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
            return SimpleNamespace(logits=self.table(input_ids))

    AutoConfig.register("mute", MuteConfig)
    AutoModelForCausalLM.register(MuteConfig, Mute)
    Mute(MuteConfig()).save_pretrained(folder / "mute")
    for path in (folder / "model").glob("tokenizer*"):
        shutil.copy(path, folder / "mute")
    return folder / "mute"


def refusal(folder: Path, monkeypatch: pytest.MonkeyPatch, tasks: str, **keys: Any) -> str:
    """The last line on standard error of a run that ends with exit code 2 and writes no results."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with contextlib.redirect_stderr(io.StringIO()) as told:
        code = run_command("lm-eval", *arguments_for(folder, "haltkit", tasks, **keys), "--output_path", folder / "bad")
    assert code == 2
    assert not list((folder / "bad").rglob("results_*.json"))
    return told.getvalue().splitlines()[-1]


@pytest.mark.parametrize(
    ("keys", "token"),
    [
        ({"policy": "norm:tau=0.1,granularity=batch"}, "batch_size=3"),
        ({"policy": "norm:tau=0.5,granularity=sequence", "pretrained": "text"}, "batch_size=3"),
        ({"max_steps": 3}, "policy="),
        ({"policy": "nonsense:tau=1"}, "nonsense"),
    ],
)
def test_bad_arguments_are_one_clear_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], token: str
) -> None:
    line = refusal(folder, monkeypatch, "tiny_choice", **keys)
    assert line.startswith("haltkit: ")
    assert token in line


def test_tasks_that_generate_are_refused_on_a_model_that_cannot(
    folder: Path, mute: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refusal(folder, monkeypatch, "tiny_generating", pretrained=mute)
    assert line.startswith("haltkit: tiny_generating")
    assert "Mute cannot" in line


def test_pooled_policies_are_refused_at_batches(folder: Path) -> None:
    from haltkit.models.harness.foreign import HaltedLM

    policy = "norm:tau=0.1,granularity=batch"
    with pytest.raises(ValueError, match="batch_size=2"):
        HaltedLM(pretrained=str(folder / "model"), device="cpu", policy=policy, batch_size=2)
    HaltedLM(pretrained=str(folder / "model"), device="cpu", policy=policy, batch_size=1)


def test_a_file_of_steps_is_refused_where_processes_would_write_over_each_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from haltkit.models.harness.foreign import HaltedLM

    monkeypatch.setattr(HaltedLM, "world_size", 2)
    with pytest.raises(ValueError, match="2 processes"):
        HaltedLM(pretrained=str(folder / "model"), device="cpu", steps=str(folder / "shared.jsonl"))


def test_a_card_describes_the_loop_of_a_model_without_a_preset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "PRESETS", {})
    body = ["model.L_module", "model.H_module"]
    loops = {"core": {"body": body, "scope": "model", "initial": None}}
    Card("fixed:steps=2", "HrmTextForCausalLM", ("core",), loops).save(folder / "card.yaml")
    keys = {"policy": folder / "card.yaml", "kv": "uniform"}
    found = evaluated(folder, monkeypatch, "haltkit", "tiny_choice,tiny_generating", "described", **keys)
    for part in ("context", "continuation"):
        assert found["config"]["haltkit"][part]["core"]["histogram"].keys() == {"2"}
    assert "no preset" in refusal(folder, monkeypatch, "tiny_choice", policy="fixed:steps=2")


def test_a_text_that_ends_before_others_of_its_batch_is_counted_to_its_end(folder: Path) -> None:
    from haltkit.models.harness.foreign import HaltedLM

    contexts = [document["question"] for document in documents(folder)]

    def continued(size: int, until: list[str]) -> tuple[list[str], Any]:
        how = {"policy": "norm:tau=0.05", "kv": "freeze", "batch_size": size, "device": "cpu"}
        model = HaltedLM(pretrained=str(folder / "model"), dtype="float64", **how)
        asked = {"max_gen_toks": 8, "until": until, "do_sample": False}
        made = model.generate_until([own_request(text, asked) for text in contexts])
        return made, model.get_model_info()["haltkit"]["continuation"]

    free, _ = continued(1, [])
    until = [free[0].split()[2]]
    alone, counted = continued(1, until)
    assert alone != free
    assert counted["loop"]["tokens"] < 8 * len(contexts)
    assert continued(3, until) == (alone, counted)


def test_a_cards_certificate_is_in_the_results(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    spec = "norm:tau=0.05"
    certificate = certificate_for(spec)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    identity = Identity.of(model, 3)
    Card(spec, type(model).__name__, ("loop",), identity=identity, certificate=certificate).save(folder / "card")
    keys = {"policy": folder / "card", "max_steps": 3}
    checked, check = list[Any](), Card.check
    monkeypatch.setattr(Card, "check", lambda *given, **more: (checked.append(given), check(*given, **more))[1])
    found = evaluated(folder, monkeypatch, "haltkit", "tiny_choice", "card", **keys)["config"]["haltkit"]
    assert found["standing"] == f"certified: {certificate.promise}"
    told = found["card"]
    assert len(checked) == 1  # it hashes all weights
    assert told["policy"] == spec
    assert told["identity"] == asdict(identity)
    assert told["certificate"] == {**asdict(certificate), "settings": [spec]}
    assert told["without"] == ""
    keys = {"policy": folder / "card", "max_steps": 2}
    said = refusal(folder, monkeypatch, "tiny_choice", **keys)
    assert "full depth" in said
    assert "without_certificate=True" in said
    assert "True and False" in refusal(folder, monkeypatch, "tiny_choice", without_certificate="maybe", **keys)
    found = evaluated(folder, monkeypatch, "haltkit", "tiny_choice", "without", without_certificate=True, **keys)
    told = found["config"]["haltkit"]
    assert told["standing"] == "used without its certificate (full depth 2 instead of 3): nothing is promised"
    assert told["standing"] in caplog.text
    assert (told["card"]["policy"], told["card"]["certificate"]) == (spec, None)
    assert told["policy"] == str(folder / "card")


# --- how lm-eval finds the model


def entry_point() -> EntryPoint:
    """The one that haltkit declares."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["lm_eval.models"].items()
    return EntryPoint(name, value, "lm_eval.models")


def test_the_entry_point_is_the_class_that_the_command_registers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = entry_point()
    evaluated(folder, monkeypatch, "haltkit", "tiny_choice", "registered")
    assert registry.model_registry.get(found.name) is found.load()


def test_the_harness_runs_the_model_through_its_entry_point(folder: Path) -> None:
    """As versions of lm-eval do that read entry points: the registry keeps one unloaded until it is asked for."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    registered = registry.Registry("model", base_cls=LM)
    registered.register("haltkit", target=entry_point())
    model = registered.get("haltkit").create_from_arg_obj(
        {"pretrained": str(folder / "model"), "policy": "fixed:steps=2"}, {"batch_size": 1, "device": "cpu"}
    )
    found = simple_evaluate(model, tasks=["tiny_choice"], task_manager=TaskManager(include_path=str(folder)))
    assert found["config"]["haltkit"]["context"]["loop"]["histogram"].keys() == {"2"}


@pytest.mark.skipif(not hasattr(registry, "load_plugins"), reason="this lm-eval reads no entry points")
def test_lm_evals_own_command_finds_the_model(folder: Path) -> None:
    arguments = arguments_for(folder, "haltkit", "tiny_choice", policy="fixed:steps=2")
    command = [sys.executable, "-m", "lm_eval", *arguments, "--output_path", str(folder / "command")]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    (written,) = (folder / "command").rglob("results_*.json")
    counted = json.loads(written.read_text(encoding="utf-8"))["config"]["haltkit"]["context"]
    assert counted["loop"]["histogram"].keys() == {"2"}


# --- haltkit's own text model


def documents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "data.json").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """What the harness loads, too, in float64: rounding cannot move a step count."""
    monkeypatch.setattr(own, "load_checkpoint", partial(load_checkpoint, dtype=torch.float64))
    return load_checkpoint(dtype=torch.float64)


def listen(monkeypatch: pytest.MonkeyPatch, method: str) -> list[tuple[Any, Any]]:
    """What the harness asks of the text model, and its answers."""
    seen: list[tuple[Any, Any]] = []
    asked = getattr(LoopedLM, method)

    def listening(self: LoopedLM, requests: Any, **named: Any) -> Any:
        answers = asked(self, requests, **named)
        seen.extend((request.args, answer) for request, answer in zip(requests, answers, strict=True))
        return answers

    monkeypatch.setattr(LoopedLM, method, listening)
    return seen


@torch.no_grad()
def log_p(text: Checkpoint, ids: list[int], depth: int) -> torch.Tensor:
    """By hand: row ``i`` is of the token after ``ids[i]``."""
    return text.model(torch.tensor([ids]), depth)[0].log_softmax(-1)


def own_request(*arguments: Any) -> Any:
    """As the harness hands one over."""
    return SimpleNamespace(args=arguments, task_name="task", doc_id=0, idx=0)


@pytest.mark.parametrize(("keys", "depth"), [({}, 12), ({"policy": "fixed:steps=32"}, 32)])
def test_likelihoods_of_the_text_model_are_those_of_its_logits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: Checkpoint, keys: dict[str, Any], depth: int
) -> None:
    seen = listen(monkeypatch, "loglikelihood")
    tasks = "tiny_choice,tiny_rolling"
    found = evaluated(folder, monkeypatch, "haltkit", tasks, f"own-{depth}", pretrained="text", **keys)
    assert len(seen) == 18
    encode = text.tokenizer.encode_ordinary
    for (context, continuation), (score, greedy) in seen:
        ids, border = encode(context + continuation), len(encode(context))
        rows = log_p(text, ids[:-1], depth)
        assert score == pytest.approx(sum(float(rows[i - 1, ids[i]]) for i in range(border, len(ids))), rel=1e-4)
        assert greedy == all(int(rows[i - 1].argmax()) == ids[i] for i in range(border, len(ids)))
    total, words = 0.0, 0
    for document in documents(folder):
        ids = encode(document["question"])
        rows = log_p(text, [text.tokenizer.eot_token, *ids[:-1]], depth)
        total += sum(float(rows[i, token]) for i, token in enumerate(ids))
        words += len(document["question"].split())
    perplexity = found["results"]["tiny_rolling"]["word_perplexity,none"]
    assert perplexity == pytest.approx(math.exp(-total / words), rel=1e-3)
    counted = found["config"]["haltkit"]
    assert counted["policy"] == keys.get("policy")
    for part in ("context", "continuation"):
        assert counted[part].keys() == text.model.regions.keys()
        assert all(one["histogram"].keys() == {str(depth)} for one in counted[part].values())


def test_a_long_text_is_scored_in_windows_of_the_context(text: Checkpoint) -> None:
    model = LoopedLM(policy="fixed:steps=2", batch_size=2)
    context, encode = text.config.block_size, text.tokenizer.encode_ordinary
    sample = (BUNDLED / "sample.txt").read_text(encoding="utf-8")
    sample = text.tokenizer.decode(encode(sample)[: context + context // 2])
    ids = encode(sample)
    assert context < len(ids) < 2 * context
    (found,) = model.loglikelihood_rolling([own_request(sample)])
    first = log_p(text, [text.tokenizer.eot_token, *ids[: context - 1]], 2)
    last = log_p(text, ids[-context - 1 : -1], 2)
    expected = sum(float(first[i, ids[i]]) for i in range(context))
    expected += sum(float(last[i - len(ids), ids[i]]) for i in range(context, len(ids)))
    assert found == pytest.approx(expected, rel=1e-5)
    counted = model.get_model_info()["haltkit"]["continuation"]
    assert all(one["tokens"] == len(ids) for one in counted.values())


def test_the_text_models_steps_are_told_by_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: Checkpoint
) -> None:
    steps, spec = folder / "own.jsonl", "norm:tau=0.5"
    keys = {"pretrained": "text", "policy": spec, "max_steps": 9, "steps": steps}
    found = evaluated(folder, monkeypatch, "haltkit", "tiny_choice", "own-steps", **keys)
    lines = [json.loads(line) for line in steps.read_text(encoding="utf-8").splitlines()]
    assert [(line["doc"], line["request"]) for line in lines] == [(d, choice) for d in range(6) for choice in range(3)]
    encode = text.tokenizer.encode_ordinary
    for line in lines:
        document = documents(folder)[line["doc"]]
        ids = encode(f"{document['question']} {document['choices'][line['request']]}")
        border = len(encode(document["question"])) - 1  # its last token predicts the continuation's first
        for name, taken in text.model.forward_adaptive(torch.tensor([ids[:-1]]), spec, max_loops=9).steps.items():
            assert line["context"][name] == taken[0, :border].tolist()
            assert line["continuation"][name] == taken[0, border:].tolist()
    told = found["config"]["haltkit"]
    assert (told["policy"], told["max_steps"]) == (spec, 9)
    for part in ("context", "continuation"):
        for name, counted in told[part].items():
            flat = [step for line in lines for step in line[part][name]]
            assert counted["tokens"] == len(flat) == sum(counted["outcomes"].values())
            assert counted["mean_steps"] == pytest.approx(sum(flat) / len(flat))


def test_the_text_model_generates_what_generate_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: Checkpoint
) -> None:
    seen, steps, spec = listen(monkeypatch, "generate_until"), folder / "generated.jsonl", "norm:tau=0.5"
    keys = {"pretrained": BUNDLED, "policy": spec, "steps": steps}
    evaluated(folder, monkeypatch, "haltkit", "tiny_generating", "generated", **keys)
    lines = [json.loads(line) for line in steps.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len(seen) == 6
    for line, ((context, _), answer) in zip(lines, seen, strict=True):
        alone = text.model.generate(
            [text.tokenizer.encode_ordinary(context)],
            spec,
            max_new_tokens=4,
            temperature=0,
            stop=[text.tokenizer.eot_token],
            vocabulary=text.tokenizer.n_vocab,
        )
        assert answer == text.tokenizer.decode(alone.tokens[0]).split("w3")[0]
        for name, taken in line["continuation"].items():
            assert taken == alone.steps[name][0][: len(taken)] != []


def test_generation_ends_where_the_task_says() -> None:
    def continued(until: list[str]) -> tuple[list[str], int]:
        model = LoopedLM(policy="fixed:steps=2", batch_size=2)
        asked = {"max_gen_toks": 8, "until": until}
        made = model.generate_until([own_request(prompt, asked) for prompt in ("The question", "It was")])
        return made, model.get_model_info()["haltkit"]["continuation"]["4"]["tokens"]

    free, all_tokens = continued([])
    until = free[0][len(free[0]) // 2 :][:2]
    cut, tokens = continued([until])
    assert cut == [one.split(until)[0] for one in free]
    assert cut[0] != free[0]
    assert tokens < all_tokens == 16


@pytest.mark.usefixtures("text")
def test_what_is_drawn_does_not_depend_on_the_batch_size() -> None:
    asked = {"max_gen_toks": 6, "until": [], "do_sample": True, "temperature": 1.5}
    requests = [own_request("The question", asked) for _ in range(3)]
    one, two = (LoopedLM(policy="fixed:steps=2", batch_size=size).generate_until(requests) for size in (1, 2))
    assert one == two
    assert len(set(one)) == 3


@pytest.mark.parametrize(
    ("keys", "token"),
    [
        ({"policy": "norm:tau=0.1,granularity=sequence", "batch_size": 2}, "batch_size=2"),
        ({"batch_size": "auto"}, "batch_size=auto"),
        ({"kv": "uniform"}, "kv"),
        ({"policy": "nonsense:tau=1"}, "nonsense"),
        ({"pretrained": BUNDLED / "chase"}, "reasoner"),
        ({"steps": "no/such/folder.jsonl"}, "no folder"),
    ],
)
def test_bad_arguments_of_the_text_model_are_one_clear_error(keys: dict[str, Any], token: str) -> None:
    from haltkit.models.harness import ByPretrained

    with pytest.raises(ValueError, match=token):
        ByPretrained.create_from_arg_obj({"pretrained": "text", **keys})


def test_a_pooled_policy_is_scored_one_request_at_a_time(text: Checkpoint) -> None:
    spec = "norm:tau=0.5,granularity=sequence"
    model = LoopedLM(policy=spec, batch_size=1)
    (score, _), _ = model.loglikelihood([own_request("The question", " of"), own_request("It was the", " time of")])
    ids = text.tokenizer.encode_ordinary("The question of")
    rows = text.model.forward_adaptive(torch.tensor([ids[:-1]]), spec).logits[0].log_softmax(-1)
    assert score == pytest.approx(float(rows[-1, ids[-1]]), rel=1e-4)


@pytest.mark.parametrize("asked", [{"max_gen_toks": 4096}, {"num_beams": 4}], ids=lambda asked: next(iter(asked)))
def test_what_the_text_model_cannot_generate_is_refused(asked: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(asked))):
        LoopedLM().generate_until([own_request("w", asked)])
