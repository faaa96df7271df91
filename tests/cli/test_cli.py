"""The command line, through its real entry points."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cases import run_command
from haltkit.cli import main as entry
from haltkit.models.checkpoint import BUNDLED

pytestmark = pytest.mark.slow

HALTKIT = str(Path(sys.executable).parent / "haltkit")


def haltkit(*args: Any, cwd: Path | None = None, width: int | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **({"COLUMNS": str(width)} if width else {})}
    return subprocess.run([HALTKIT, *map(str, args)], capture_output=True, text=True, cwd=cwd, env=env, check=False)


@pytest.fixture(scope="module")
def trained(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder made by the real command."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    done = haltkit("train", "tiny", "--data", data_folder, "--out", run)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout
    assert "final" in done.stdout
    return run


def test_help_names_every_command() -> None:
    for done in (haltkit("--help"), haltkit()):
        assert done.returncode == 0
        for command in (
            "bench",
            "calibrate",
            "compare",
            "diagnose",
            "doctor",
            "eval",
            "export",
            "generate",
            "headroom",
            "lm-eval",
            "policies",
            "prepare",
            "report",
            "train",
        ):
            assert command in done.stdout
    assert haltkit("--version").stdout.startswith("haltkit 0.")


@pytest.mark.parametrize("width", [45, 60, 200])
def test_policies_lists_names_formulas_keys_and_scales(width: int) -> None:
    done = haltkit("policies", width=width)
    assert done.returncode == 0
    flat = "".join(done.stdout.split())
    for word in ("accel-rel", "||d_k-d_{k-1}||", "patience", "granularity", "required", "denominator", "nats"):
        assert word in flat, word
    assert max(map(len, done.stdout.splitlines())) <= width


def test_prepare_then_train_then_compare(documents: Path, trained: Path, tmp_path: Path) -> None:
    """The way of a user with text of their own, from nothing to a comparison."""
    done = haltkit("prepare", documents, "--out", tmp_path / "d", "--train-tokenizer", 300)
    assert done.returncode == 0, done.stderr
    assert "train: " in done.stdout
    text = tmp_path / "held-out.txt"
    text.write_text("Document 3 says that 1 and 2 make 3. " * 60)
    done = haltkit(
        "compare",
        trained / "final",
        "--text",
        text,
        "--policies",
        "accel,kl,norm,fixed:steps=3",
        "--max-loops",
        8,
        "--tokens",
        96,
        "--repeats",
        2,
        "--json",
        tmp_path / "c.json",
        "--plot",
        tmp_path / "c.svg",
    )
    assert done.returncode == 0, done.stderr
    for word in (
        "accel tau=1e-05",
        "kl tau=0.01",
        "norm tau=0.001",
        "fixed 3",
        "Conclusion",
        "ready to paste",
    ):
        assert word in done.stdout, word
    assert "Non-causal" not in done.stdout  # token by token unless told otherwise
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")
    written = json.loads((tmp_path / "c.json").read_text())
    assert {"model", "text", "device", "dtype", "max_loops"} <= written["about"].keys()
    assert (written["items"], written["item"], written["unit"]) == (96, "token", "nats")
    keys = {
        "policy",
        "spec",
        "tau",
        "depth",
        "loss",
        "unit",
        "delta",
        "delta_se",
        "agreement",
        "kl_to_full",
        "steps",
        "ms",
        "ms_spread",
        "speedup",
        "outcomes",
    }
    assert all(keys <= row.keys() for row in written["rows"])
    fixed = [row for row in written["rows"] if row["depth"] is not None]
    assert {row["policy"] for row in fixed} == {"fixed"}
    assert [row["spec"] for row in fixed[:5]] == [f"fixed:steps={n}" for n in (8, 1, 2, 3, 4)]
    for row in fixed[5:]:  # those that the policies suggest, by region where regions differ
        by_region = ";".join(f"{name}=fixed:steps={int(n)}" for name, n in row["steps"].items())
        assert row["spec"] == by_region or {row["spec"]} == {f"fixed:steps={int(n)}" for n in row["steps"].values()}
    assert all(row["tau"] is None for row in fixed)
    accel = [row for row in written["rows"] if row["policy"] == "accel"]
    assert {1e-5, 1e-4, 1e-3, 1e-2} < {row["tau"] for row in accel}  # the paper's and some observed ones
    for row in accel:
        assert row["steps"].keys() == {"2", "3-4"}
        assert sum(row["outcomes"].values()) == pytest.approx(1)
        assert "granularity" not in row["spec"]  # token by token is the default


def test_compare_at_thresholds_and_granularity_of_ones_own(trained: Path, tmp_path: Path) -> None:
    done = haltkit(
        "compare",
        "--checkpoint",
        trained / "final",
        "--policies",
        "norm,any(accel:tau=0.1|fixed:steps=3)",
        "--taus",
        "0.5,0.05",
        "--granularity",
        "token",
        "--max-loops",
        4,
        "--tokens",
        64,
        "--repeats",
        1,
        "--json",
        tmp_path / "c.json",
    )
    assert done.returncode == 0, done.stderr
    assert "Non-causal" not in done.stdout
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [row["tau"] for row in rows if row["policy"] == "norm"] == [0.05, 0.5]
    assert [row["spec"] for row in rows if row["decided"] == "policy"][-1] == "any(accel:tau=0.1|fixed:steps=3)"
    done = haltkit(
        "compare",
        trained / "final",
        "--policies",
        "any(accel:tau=0.1|fixed:steps=3)",
        "--granularity",
        "sequence",
        "--max-loops",
        4,
        "--tokens",
        64,
        "--repeats",
        1,
        "--json",
        tmp_path / "s.json",
    )
    assert "Non-causal" in done.stdout
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    last = [row for row in rows if row["decided"] == "policy"][-1]
    assert last["spec"] == "any(accel:tau=0.1,granularity=sequence|fixed:steps=3)"
    assert last["causal"] is False


def test_training_goes_on_where_it_was(data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert haltkit("train", "tiny", "--data", data_folder, "--out", run, "--steps", 3).returncode == 0
    done = haltkit("train", "--resume", "--out", run, "--steps", 6)
    assert done.returncode == 0, done.stderr
    assert "from step 3 to 6" in done.stdout
    done = haltkit("train", "--anneal-from", run, "--anneal-steps", 2, "--out", tmp_path / "annealed")
    assert done.returncode == 0, done.stderr
    assert "from step 6 to 8" in done.stdout


NO_REGIONS = "a model without looped regions"
BAD = [
    (["compare", "--policies", "acel"], "did you mean accel"),
    (["compare", "--policies", "norm:tua=1"], "has no key 'tua'"),
    (["compare", "--policies", ""], "empty item"),
    (["compare", "--policies", "norm", "--taus", "0"], "positive, finite"),
    (["compare", "--policies", "norm", "--taus", "nan"], "positive, finite"),
    (["compare", "--policies", "norm", "--taus", "1e-3,x"], "neither a number"),
    (["compare", "--policies", "norm:tau=-1"], "positive, finite"),
    (["compare", "--policies", "norm:granularity=token", "--granularity", "sequence"], "contradicts"),
    (["compare", "--granularity", "word"], "allowed are token, sequence, batch"),
    (["compare", "--mode", "word"], "allowed are forward, decode"),
    (["compare", "--execution", "word"], "allowed are masked, compact"),
    (["compare", "--mode", "decode", "--execution", "masked"], "nothing is masked"),
    (
        ["compare", "--mode", "decode", "--policies", "norm:tau=1,granularity=batch"],
        "granularity=token, or mode forward",
    ),
    (["compare", "--text", "no-such.txt"], "no text file 'no-such.txt'"),
    (["compare", "--text", "short.txt"], "too short"),
    (["compare", "--text", "empty.txt"], "too short"),
    (["compare", "--text", "binary.txt"], "not UTF-8"),
    (["compare", "--checkpoint", "nowhere"], "not a checkpoint"),
    (["compare", "--checkpoint", "mismatch"], "the config says"),
    (["compare", "--tokens", "0"], "--tokens"),
    (["compare", "--tokens", "many"], "--tokens"),
    (["compare", "--batch", "9", "--tokens", "600"], "batch=9"),
    (["compare", "--json", "missing/c.json"], "no folder"),
    (["compare", "--json", "c.png", "--plot", "c.png"], "the same file"),
    (["compare", "--policies", "any(accel|norm)"], "give each part a tau"),
    (["compare", "--policies", "accel,fixed:steps=9", "--max-loops", "4"], "deeper than full depth"),
    (["compare", "--policies", "accel", "--taus", "auto", "--max-loops", "2"], "no threshold for 'accel'"),
    (["prepare", "docs.jsonl", "nosuch", "--tokenizer", "bytes.tiktoken"], "no file or folder 'nosuch'"),
    (["prepare", "empty.txt", "--tokenizer", "bytes.tiktoken"], "no text"),
    (["compare", "--plot", "c.bmp"], ".png"),
    (["comprae"], "comprae"),
    (["train"], "no config"),
    (["train", "nothing.yaml"], "shipped with haltkit"),
    (["train", "bad.yaml"], "did you mean d_model"),
    (["train", "tiny", "--data", "nowhere"], "haltkit prepare"),
    (["train", "--resume", "--out", "nowhere"], "not a run folder"),
    (["prepare", "missing.parquet"], "no file"),
    (["prepare", "short.txt", "--tokenizer", "gpt9"], "no tokenizer"),
    (["prepare", "docs.jsonl", "--column", "body", "--tokenizer", "bytes.tiktoken"], "no column 'body'"),
    (["prepare", "docs.jsonl", "--tokenizer", "gpt2", "--train-tokenizer", "300"], "contradicts"),
]


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of things that are wrong, each in one way."""
    from cases import small_tokenizer

    folder = tmp_path_factory.mktemp("bad")
    (folder / "short.txt").write_text("too short")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "bad.yaml").write_text("model: {d_modle: 3}")
    (folder / "docs.jsonl").write_text('{"text": "one"}\n')
    small_tokenizer(folder)
    mismatch = folder / "mismatch"
    mismatch.mkdir()
    config = json.loads((BUNDLED / "config.json").read_text())
    config["model"]["d_model"] = 128
    (mismatch / "config.json").write_text(json.dumps(config))
    (mismatch / "model.safetensors").symlink_to(BUNDLED / "model.safetensors")
    return folder


@pytest.mark.parametrize(("args", "message"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input_is_one_line_and_code_2_and_leaves_nothing(
    args: list[str], message: str, playground: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(playground)
    before = sorted(playground.rglob("*"))
    assert run_command(*args) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert error.startswith("haltkit: ")
    assert sorted(playground.rglob("*")) == before


def test_a_model_without_regions_has_nothing_to_halt(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(
        "model: {vocab_size: 512, block_size: 32, n_layer: 2, n_head: 2, d_model: 32, regions: []}\n"
        f"data: {{path: {data_folder}}}\n"
        "train: {max_steps: 1, batch_size: 2, compile: false, eval_batches: 1}\n"
    )
    assert run_command("train", tmp_path / "c.yaml", "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert run_command("compare", "--checkpoint", tmp_path / "run" / "final") == 2
    assert NO_REGIONS in capsys.readouterr().err


def test_a_defect_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from haltkit.models.gpt import subject

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("defect")

    monkeypatch.setattr(subject, "load_checkpoint", broken)
    monkeypatch.setattr(sys, "argv", ["haltkit", "compare"])
    with pytest.raises(RuntimeError, match="defect"):
        entry.run()


def test_a_diverged_run_says_so_and_exits_with_1(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from haltkit.models.training import loop

    monkeypatch.setattr(loop, "take_step", lambda run: (float("inf"), 1.0))
    assert run_command("train", "tiny", "--data", data_folder, "--out", tmp_path / "run") == 1
    error = capsys.readouterr().err.strip()
    assert "step 1" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("haltkit comp", ["compare"]),
        ("haltkit compare --pol", ["--policies"]),
        ("haltkit headroom ch", ["chase"]),
    ],
)
def test_the_shell_completes_commands_options_and_models(words: str, completed: list[str]) -> None:
    env = {**os.environ, "_HALTKIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    found = subprocess.run([HALTKIT], capture_output=True, text=True, env=env, check=True)
    assert found.stdout.split() == completed
