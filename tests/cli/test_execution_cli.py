"""generate, bench, and compare's modes on the command line; and what bench counts."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cases import run_command
from haltkit.cli.generate import _Writer
from haltkit.models.checkpoint import build_model, load_checkpoint
from haltkit.models.gpt import bench as benching
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.sampling import GenerationError
from haltkit.models.text.tokenizer import load_tokenizer
from haltkit.registry import records

pytestmark = pytest.mark.slow

PROMPT = "Document 1 "


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Document {i} says that {i * i} is a square. " for i in range(60)))
    return path


def test_generate_writes_the_continuation_and_tells_the_depth(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--checkpoint", checkpoint, "--policy", "norm:tau=0.1", "-n", 6, "--max-loops", 9]
    assert run_command("generate", PROMPT, *options, "--seed", 3) == 0
    plain = capsys.readouterr()
    assert "6 tokens" in plain.err
    assert "mean steps by region 2: " in plain.err
    assert "--max-new-tokens" in plain.err
    assert PROMPT not in plain.out  # a pipe gets the continuation alone
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert run_command("generate", "--file", tmp_path / "prompt.txt", *options, "--seed", 3) == 0
    assert capsys.readouterr().out == plain.out
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert run_command("generate", *options, "--seed", 3, "--show-depth") == 0
    shown = capsys.readouterr().out
    loaded = load_checkpoint(checkpoint)
    ids = loaded.tokenizer.encode_ordinary(PROMPT)
    made = loaded.model.generate(
        [ids],
        "norm:tau=0.1",
        max_new_tokens=6,
        seed=3,
        temperature=0.8,
        max_loops=9,
        stop=[loaded.tokenizer.eot_token],
        vocabulary=loaded.tokenizer.n_vocab,
    )
    assert max(made.tokens[0]) < loaded.tokenizer.n_vocab < loaded.config.vocab_size
    for two, pair in zip(made.steps["2"][0], made.steps["3-4"][0], strict=True):
        assert f"[{two} {pair}]" in shown
    assert shown.count("[") == 6
    assert "steps in region 2, 3-4" in shown


def test_generate_continues_every_line_of_a_file(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = [PROMPT, "says", "Document 7 says that", "is a square"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    options = ["--checkpoint", checkpoint, "--policy", "norm:tau=0.1", "-n", 6, "--max-loops", 9]
    assert run_command("generate", "--prompts", tmp_path / "prompts.txt", "--slots", 2, "--show-depth", *options) == 0
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    assert f"{sum(line['tokens'] for line in lines)} tokens" in shown.err
    for seed, line in enumerate(lines):
        assert run_command("generate", line["prompt"], "--seed", seed, *options) == 0
        assert capsys.readouterr().out == line["text"] + "\n"
        assert [len(steps) for steps in line["steps"].values()] == [line["tokens"]] * 2
    (tmp_path / "prompts.txt").write_text("one\n\nthree\n")
    assert run_command("generate", "--prompts", tmp_path / "prompts.txt", *options) == 2
    assert "line 2" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_what_is_generated_is_written_as_it_is_but_never_steers_a_terminal(data_folder: Path, terminal: bool) -> None:
    text = "a\tb\u00a0c\u3000d\u200de\r\n\x1b[31m\u202eé"
    tokenizer = load_tokenizer(data_folder)
    out = io.StringIO()
    writer = _Writer(Console(file=out, force_terminal=terminal, no_color=True, width=200), tokenizer, False)
    for token in tokenizer.encode_ordinary(text):
        writer.add(token, {})
    writer.close()
    written = out.getvalue()
    if not terminal:
        assert written == text + "\n"
    else:
        assert "\x1b" not in written
        assert "\u202e" not in written
        assert "\r" not in written
        assert "b\u00a0c\u3000d\u200de" in written


def test_generate_says_that_the_context_is_full(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoint", checkpoint, "--policy", "fixed:steps=1", "-n", 99, "--layout", "last", "--top-k", 5]
    assert run_command("generate", PROMPT, *options) == 0
    assert "the model's context of 32 tokens is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["x", "--file", "f"], "contradict each other"),
        (["--file", "no-such-file"], "no prompt file"),
        ([""], "the prompt is empty"),
        (["x", "--policy", "norm:tau=1,granularity=sequence"], "granularity=sequence cannot decode token by token"),
        (["x", "--policy", "2=norm:tau=1"], "the model's regions are 2, 3-4"),
        (["x", "--layout", "paged"], "known: depth-indexed (exact), last, modulo:M"),
        (["x", "--temperature", "-1"], "temperature=-1.0"),
        (["x", "--top-p", "2"], "top_p=2.0"),
        (["x", "--total-loops", "1"], "the model has 2 regions"),
        (["x", "--stop", "two tokens at least"], "must be one"),
        (["word " * 200], "context 32: shorten it"),
        (["x", "--policy", "fixed:steps=50"], "at least 50 steps and max_loops is 32"),
        (["x", "--sampler", "wavefront", "--commit", "fixed:steps=50"], "at least 50 steps and max_loops is 32"),
        (["x", "--prompts", "f"], "contradicts"),
        (["--prompts", "no-such-file"], "no prompts file"),
        (["x", "--slots", "2"], "--prompts"),
    ],
)
def test_generate_refuses_in_one_line(
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert run_command("generate", "--checkpoint", checkpoint, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bench_measures_every_part(
    checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """All but the policies' cost, whose bodies are of a size of their own."""
    parts = ("overhead", "forward", "decode", "slowest", "break-even", "position", "samplers", "layouts")
    args = [
        "--checkpoint",
        checkpoint,
        "--text",
        text,
        "--max-loops",
        8,
        "--repeats",
        1,
        "--policies",
        "norm,kl:tau=1e-6",
    ]
    done = run_command("bench", *args, "--only", ",".join(parts), "--json", tmp_path / "b.json")
    shown = capsys.readouterr()
    assert done == 0, shown.err
    measured = json.loads((tmp_path / "b.json").read_text())
    assert set(parts) < measured.keys()
    assert {"machine", "device", "torch", "dtype", "policies"} < measured.keys()
    assert [(row["batch"], row["spec"].partition(":")[0]) for row in measured["decode"]] == [
        (b, p) for b in (1, 8, 32) for p in ("norm", "kl")
    ]
    for row in measured["forward"] + measured["decode"]:
        assert row["realised"] == pytest.approx(row["speedup"] / row["bound"])
        assert row["bound"] > 1
        assert row["over_bare_loop"] > -1
        assert all(1 <= mean <= 8 for mean in row["steps"].values())
    scripted = measured["slowest"][-1]
    assert scripted["slowest"] == {"2": 8, "3-4": 8}
    assert scripted["bound"] > 1.2
    first, *rest = measured["samplers"]
    assert (first["sampler"], first["speedup"], first["same"]) == ("sequential", 1, 1)
    kinds = ["sequential", "speculative", "wavefront", "wavefront, verified"]
    assert [row["sampler"] for row in rest] == 2 * kinds
    for alone, drafts, _, waves in (rest[:4], rest[4:]):  # those that verify give the text of their policy alone
        assert alone["same"] == drafts["same"] == waves["same"]
    exact, *others = measured["layouts"]
    assert (exact["ce_change"], exact["max_logit_error"], exact["agreement"]) == (0, 0, 1)
    assert all(row["bytes_per_token"] < exact["bytes_per_token"] for row in others)
    assert measured["layouts"][1]["bytes_per_token"] == 5 * 2 * 32 * 4  # last: 5 layers, width 32, float32
    assert "realised" in shown.out


def test_the_bench_leaves_out_wavefronts_that_a_model_cannot_do(tiny_config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = build_model(replace(tiny_config, injection="first_step")).eval()
    how: dict[str, Any] = {"count": 4, "max_loops": 4, "repeats": 1}
    found = benching.sampler_speed(model, torch.arange(6), {"two": "fixed:steps=2"}, **how)
    assert [row["sampler"] for row in found] == ["sequential", "sequential", "speculative"]
    with pytest.raises(GenerationError, match="max_loops"):  # what no sampler can do is an error
        benching.sampler_speed(model, torch.arange(6), {"nine": "fixed:steps=9"}, **how)


def test_bench_refuses(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("bench", "--checkpoint", checkpoint, "--only", "speed") == 2
    assert "unknown part 'speed'; known: policies" in capsys.readouterr().err
    args = ["bench", "--checkpoint", checkpoint, "--policies", "norm:tau=1,granularity=batch"]
    assert run_command(*args) == 2
    assert "does not decide token by token" in capsys.readouterr().err


def test_bench_of_another_model_is_a_table_to_paste(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    args = ["--policies", "norm:tau=2,any(norm:tau=1|accel:tau=1)", "--max-loops", 6, "--repeats", 1]
    assert run_command("bench", "chase", *args, "--json", out) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(shown) == 4
    assert shown[1] == "|" + " --- |" * 9
    assert all(line.replace("\\|", "").count("|") == 10 for line in shown)  # a pipe in a spec is no column
    assert shown[0].startswith("| policy | steps | full depth, ms/answer |")
    measured = json.loads(out.read_text())
    assert {"machine", "repeats", "model"} < measured.keys()
    assert [row["spec"] for row in measured["policies"]] == ["norm:tau=2.0", "any(norm:tau=1.0|accel:tau=1.0)"]
    for row in measured["policies"]:
        assert row["bound"] >= 1
        assert row["realised"] == pytest.approx(row["speedup"] / row["bound"])


def test_bench_of_a_users_own_model_takes_policies_that_it_can_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine_to_bench.py").write_text(
        """
import torch, haltkit
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.core = torch.nn.Linear(8, 8)
    def forward(self, x):
        for _ in range(8):
            x = torch.tanh(self.core(x))
        return x
def subject():
    torch.manual_seed(0)
    return haltkit.Subject.attached(Net().eval(), samples=[torch.randn(4, 8)], loss=lambda y, _: y.mean(-1), loop=haltkit.Loop(["core"]))
"""
    )
    monkeypatch.chdir(tmp_path)
    assert run_command("bench", "mine_to_bench:subject", "--repeats", 1) == 0
    shown = capsys.readouterr().out
    assert "| `accel:" in shown
    assert "| `norm:" in shown
    for option in (["--only", "forward"], ["--max-loops", "4"]):
        assert run_command("bench", "mine_to_bench:subject", *option) == 2
        assert f"{option[0]} is for checkpoints" in capsys.readouterr().err
    assert run_command("bench", "chase", "--only", "forward") == 2
    assert "--only has no meaning for 'chase'" in capsys.readouterr().err


def test_the_policies_cost_is_relative_to_a_body() -> None:
    [row] = benching.policy_cost((64,), (8,), 100, seconds=0.01, dtypes=[torch.float32])
    assert set(row["relative"]) == {record.name for record in records() if record.cost is not None}
    assert {"norm", "kl", "accel"} < set(row["relative"])
    assert all(value > 0 for value in row["relative"].values())


def test_counted_operations_are_those_that_run(tiny_config: ModelConfig) -> None:
    model = build_model(tiny_config).eval()
    ids = torch.zeros(1, 16, dtype=torch.long)
    for loops in (1, 5):
        # Attention written out, which the counter knows.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(ids, loops)
        # The counter takes every key for every query, where a causal token sees half of them.
        mine = 16 * benching.flops(model, dict.fromkeys(model.regions, loops), 16)
        assert mine == pytest.approx(counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize("policies", ["norm:tau=0.1,accel:tau=0.1"])
def test_comparing_modes_and_executions_differ_in_time_alone(
    checkpoint: Path, text: Path, policies: str, tmp_path: Path
) -> None:
    results = []
    for mode, execution in (("forward", "masked"), ("forward", "compact"), ("decode", "compact")):
        args = ["--checkpoint", checkpoint, "--text", text, "--policies", policies, "--max-loops", 4, "--tokens", 64]
        args += ["--repeats", 1, "--mode", mode, "--execution", execution, "--json", tmp_path / "c.json"]
        assert run_command("compare", *args) == 0
        results.append(json.loads((tmp_path / "c.json").read_text()))
        assert (results[-1]["about"]["mode"], results[-1]["about"]["execution"]) == (mode, execution)
    forward, compact, decode = (result["rows"] for result in results)
    left_out = [row["label"] for row in forward[len(decode) :]]  # rows are not told their own depths token by token
    assert left_out
    assert all(label.startswith("oracle") for label in left_out)
    for one, other in ((forward, compact), (forward[: len(decode)], decode)):
        for a, b in zip(one, other, strict=True):
            assert a["spec"] == b["spec"]
            assert a["steps"] == pytest.approx(b["steps"], rel=0.01)
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)


def test_comparing_whole_sequences_says_that_they_are_not_causal(
    checkpoint: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--checkpoint", checkpoint, "--text", text, "--policies", "norm:tau=0.1", "--max-loops", 3, "--tokens", 64]
    assert run_command("compare", *args, "--repeats", 1, "--granularity", "sequence") == 0
    assert "Non-causal" in capsys.readouterr().out


GENERATE = ["generate", "The king", "--max-new-tokens", 8, "--temperature", 0, "--policy", "fixed:steps=3"]


def test_every_exact_sampler_writes_the_text_of_the_sequential_one(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for more in ([], ["--sampler", "speculative", "--ahead", 3], ["--sampler", "wavefront", "--verify", "--width", 4]):
        assert run_command(*GENERATE, *more) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert run_command(*GENERATE, "--sampler", "wavefront", "--commit", "norm:tau=1") == 0


@pytest.mark.parametrize(
    ("more", "token"),
    [
        (["--sampler", "wavefront", "--commit", "norm:tau=1,granularity=batch"], "granularity=token"),
        (["--sampler", "wavefront", "--width", 0], "width=0"),
        (["--sampler", "wavefront", "--layout", "modulo:4"], "layout"),
        (["--sampler", "wavefront", "--total-loops", 9], "total_loops"),
        (["--sampler", "speculative", "--layout", "last"], "layout"),
        (["--sampler", "speculative", "--ahead", 0], "ahead=0"),
        (["--sampler", "speculative", "--draft", "kl"], "tau"),
        (["--verify"], "wavefront"),
        (["--width", 3], "wavefront"),
        (["--sampler", "beam"], "speculative"),
    ],
)
def test_samplers_and_settings_that_do_not_go_together_are_one_line(
    more: list[object], token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(*GENERATE, *more) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert token in said.err
