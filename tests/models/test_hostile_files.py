"""Checkpoints, run folders, prepared data and text that somebody damaged or named oddly: one line, nothing changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cases import run_command, small_tokenizer, with_train, write_documents
from haltkit.locks import FolderInUse, hold
from haltkit.models.checkpoint import build_model, load_checkpoint
from haltkit.models.config import ConfigError
from haltkit.models.text.data import MANIFEST, DataError, TokenData
from haltkit.models.text.holdout import held_out
from haltkit.models.text.prepare import prepare
from haltkit.models.text.source import resolve_source
from haltkit.models.text.tokenizer import TokenizerError
from haltkit.models.training.config import RunConfig, load_config
from haltkit.models.training.export import export
from haltkit.models.training.loop import train
from haltkit.models.training.runs import RunError, checkpoints, read_progress
from haltkit.models.weights import CHECKPOINT_CONFIG, CheckpointError, read_header

pytestmark = pytest.mark.slow

DEEP = "[" * 200_000 + "]" * 200_000


@pytest.fixture(scope="module")
def trained(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load_config("tiny")
    config = replace(loaded, data=replace(loaded.data, path=str(data_folder)))
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(with_train(config, max_steps=2, checkpoint_every=1, eval_batches=1, eval_every=1), folder)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [".", "./", "../final", "../final/", "..//final/.", "~/run/final", "../link"])
def test_a_checkpoint_is_found_however_its_path_is_written(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "link").symlink_to(run / "final")
    monkeypatch.chdir(run / "final")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_checkpoint(name).trained["steps"] == 2
    assert run_command("export", name, "--out", tmp_path / "out") == 0
    assert load_checkpoint(tmp_path / "out").trained["steps"] == 2


@pytest.mark.parametrize("name", [".", "./", "..", "~/run"])
def test_a_run_is_resumed_however_its_path_is_written(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run / "checkpoints" if name == ".." else run)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_command("train", "--resume", "--steps", "3", "--out", name) == 0
    assert checkpoints(run)[-1].name == "step-00000003"


ABSURD: dict[str, dict[str, Any]] = {
    "layers": {"n_layer": 10**9},
    "regions": {"n_layer": 10**9, "regions": ["1-1000000000"]},
    "width": {"d_model": 2 * 10**9},
    "vocabulary": {"vocab_size": 2 * 10**9},
    "context": {"block_size": 2 * 10**9},
    "mlp": {"mlp_ratio": 2 * 10**9},
    "beyond 64 bits": {"d_model": 10**30},
    "loops": {"mean_loops": 10**400},
    "width of all": {"d_model": 512, "n_head": 2},
    "a text": {"d_model": "wide"},
}


@pytest.mark.parametrize("name", ABSURD)
@pytest.mark.parametrize(
    "use", [load_checkpoint, lambda folder: export(folder, folder.parent / "out")], ids=["load", "export"]
)
def test_sizes_are_checked_against_the_weights_before_anything_is_built(
    name: str, use: Callable[[Path], Any], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run / "final" / CHECKPOINT_CONFIG
    values = json.loads(path.read_text())
    values["model"].update(ABSURD[name])
    path.write_text(json.dumps(values))
    monkeypatch.setattr("haltkit.models.training.export.build_model", lambda config: pytest.fail("built"))
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        use(run / "final")
    assert time.monotonic() - started < 20
    assert len(str(caught.value)) < 1500
    assert not (run / "out").exists()


def test_a_checkpoint_of_another_kind_of_model_is_refused_by_name(run: Path) -> None:
    path = run / "final" / CHECKPOINT_CONFIG
    values = json.loads(path.read_text())
    for wrong, message in (("reasoner", "of type 'reasoner'"), (None, "no text 'model_type'"), (3, "no text")):
        path.write_text(json.dumps({**values, "model_type": wrong}))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(run / "final")
    path.write_text(json.dumps({**values, "model_type": "reasoner"}))
    assert read_header(run / "final").model_type == "reasoner"


@pytest.mark.parametrize("content", [DEEP, '{"model": ' + DEEP + "}", "{", "[]", '{"model": 3}', "", "\ufffe"])
def test_a_damaged_header_is_one_line(content: str, run: Path) -> None:
    (run / "final" / CHECKPOINT_CONFIG).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(run / "final")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "content", [DEEP, "a: [", "", "- 1", "model: {d_model: 1e999}", "model: {n_layer: [1, 2]}", "train: 3", b"\xff"]
)
def test_resuming_over_a_broken_config_is_one_line_and_changes_nothing(
    content: str | bytes, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    if content == "":
        (run / "config.yaml").write_text("null")
    before = contents(run)
    assert run_command("train", "--resume", "--out", run) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "config.yaml" in error
    assert contents(run) == before


def test_a_yaml_bomb_is_not_printed(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join([*lines, "model: *a11"]).replace("a0:", "train:", 1))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("content", [DEEP, "{", "[]", "{}", '{"step": "x"}', '{"step": NaN}', None])
def test_damaged_progress_is_named(content: str | None, run: Path) -> None:
    newest = checkpoints(run)[-1]
    if content is None:
        (newest / "progress.json").unlink()
    else:
        (newest / "progress.json").write_text(content)
    with pytest.raises(RunError, match=f"{newest.name}' is damaged"):
        read_progress(newest)


def test_a_checkpoint_that_a_running_run_removed_is_not_called_damaged(run: Path) -> None:
    gone = run / "checkpoints" / "step-00000009"
    with pytest.raises(RunError, match="removes its old ones") as caught:
        read_progress(gone)
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        DEEP,
        "{",
        "[]",
        '{"splits": [], "tokenizer": {}}',
        '{"splits": {"train": {"shards": 3}}, "tokenizer": {"vocab_size": 3, "name": "x"}, "complete": true}',
        '{"splits": {"train": {"shards": [{"file": "../../etc/passwd", "tokens": 9}]}}, '
        '"tokenizer": {"vocab_size": 3, "name": "x"}, "complete": true}',
    ],
)
def test_a_damaged_manifest_is_one_line(content: str, data_folder: Path, documents: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data_folder, tmp_path / "data"))
    (folder / MANIFEST).write_text(content)
    before = contents(folder)
    with pytest.raises(DataError, match="manifest"):
        TokenData(folder, "train", 16)
    with pytest.raises(DataError, match="manifest"):
        prepare(resolve_source([str(documents)]), folder, train_vocab=320, holdout=0.1)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
@pytest.mark.parametrize("depth", [300, 200_000])
def test_deeply_nested_json_is_named_by_line(name: str, depth: int, tmp_path: Path) -> None:
    """In a process of its own: the reader of `datasets` would take this one with it."""
    line = '{"text": "x [[[ \\" [", "meta": ' + "[" * depth + "]" * depth + "}"
    good = '{"text": "' + "[" * 500 + '"}'  # brackets in a text are no nesting
    (tmp_path / name).write_text(f"{good}\n{line}\n" if name == "x.jsonl" else f"[{good}, {line}]")
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "haltkit.cli", "prepare", str(tmp_path / name), "--train-tokenizer", "257"]
    done = subprocess.run([*arguments, "--out", str(out)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2, done.stderr[-500:]
    where = "line 2: " if name == "x.jsonl" else ""
    assert done.stderr == f"haltkit: {name}, {where}nested more than 100 levels deep\n"
    assert not out.exists()
    if name == "x.jsonl":
        skipping = replace(resolve_source([str(tmp_path / name)]), skip_bad=True)
        assert [len(text) for text in skipping.texts("train")] == ([500, 9] if depth == 300 else [500, 0])


def test_several_bad_files_are_one_line(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.parquet").write_bytes(b"nothing" * number)
    arguments = [sys.executable, "-m", "haltkit.cli", "prepare", str(tmp_path), "--train-tokenizer", "257"]
    done = subprocess.run([*arguments, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "0.parquet" in done.stderr


@pytest.mark.parametrize("size", [-1, 0, 256, 2**20 + 1, 10**12, 10**30])
def test_absurd_vocabularies_are_refused_before_anything_is_read(
    size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_documents(tmp_path / "d.jsonl", 3)
    with pytest.raises(TokenizerError, match="vocabulary of"):
        prepare(resolve_source([str(path)]), tmp_path / "out", train_vocab=size)
    assert run_command("prepare", path, "--train-tokenizer", size, "--out", tmp_path / "out") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["missing-path", "./a/b", "/no/where", "a/b/c", "here/data", "~/x", "a/b.jsonl", "a*"])
def test_what_looks_like_a_path_asks_nothing_of_the_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()  # so here/data is a path
    with pytest.raises(DataError, match=f"no file or folder '{name}'".replace("*", r"\*")) as caught:
        resolve_source([name])
    assert ("hf:missing-path" in str(caught.value)) == (name == "missing-path")


@pytest.mark.parametrize("name", ["HuggingFaceFW/fineweb", "hf:imdb", "hf:owner/name"])
def test_a_dataset_is_what_the_user_called_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = resolve_source([name], "some-config")
    assert (source.name, source.files, source.config) == (name.removeprefix("hf:"), (), "some-config")
    with pytest.raises(DataError):
        resolve_source([name, "another"])
    with pytest.raises(DataError, match="needs the name"):
        resolve_source(["hf:"])


@pytest.mark.parametrize("name", ["validation-00000-of-00001", "val", "train", "valid_set", "test"])
def test_a_files_name_alone_does_not_decide_its_split(name: str, tmp_path: Path) -> None:
    path = write_documents(tmp_path / f"{name}.jsonl", 300)
    assert resolve_source([str(path)]).splits == ("train",)
    manifest = prepare(resolve_source([str(path)]), tmp_path / "out", train_vocab=300, holdout=0.1)
    assert manifest["splits"].keys() == {"train", "validation"}
    write_documents(tmp_path / "train-1.jsonl", 3)
    if name.startswith("val"):  # published together they are the splits that they are named after
        assert resolve_source([str(tmp_path)]).splits == ("train", "validation")


def texts(folder: Path, sizes: list[int]) -> Path:
    with (folder / "texts.jsonl").open("w") as file:
        for number, size in enumerate(sizes):
            file.write(json.dumps({"text": f"{number:06d}" + "x" * (size - 6)}) + "\n")
    return folder / "texts.jsonl"


@pytest.mark.parametrize(
    ("sizes", "low", "high"),
    [
        ([1000] * 400, 0.02, 0.1),  # 400 kB: a twentieth or 16,384, not the 1% of 4 documents
        ([20_000] * 50, 0.008, 0.05),
        ([100_000] * 12, 0.05, 0.09),  # too large for the share: one, and no more
        ([700_000, 700_000, 90_000], 0.05, 0.07),
        ([500_000, 500_000], 0, 0),  # half a text is not a share
        ([500_000], 0, 0),
        ([1500] * 4000, 0.008, 0.012),  # many documents: the hash alone
    ],
)
def test_a_usable_share_is_held_out_documents_permitting(
    sizes: list[int], low: float, high: float, tmp_path: Path
) -> None:
    source = resolve_source([str(texts(tmp_path, sizes))])
    manifest = prepare(source, tmp_path / "out", tokenizer=str(small_tokenizer(tmp_path)))
    tokens = {split: entry["tokens"] for split, entry in manifest["splits"].items()}
    assert sum(tokens.values()) == sum(sizes) + len(sizes)
    assert low <= tokens.get("validation", 0) / sum(tokens.values()) <= high
    assert tokens["train"] > 0
    # A stream leaves out the same ones: those of the share and those that the manifest lists.
    documents = [json.loads(line)["text"] for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    out = [text for text in documents if held_out(text, 0.01, manifest.get("held_out", ()))]
    assert sum(len(text) + 1 for text in out) == tokens.get("validation", 0)
    assert ("held_out" in manifest) == (any(not held_out(text, 0.01) for text in out))
    again = prepare(source, tmp_path / "again", tokenizer=str(small_tokenizer(tmp_path)))
    assert again == manifest


def test_the_command_says_how_much_is_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = small_tokenizer(tmp_path)
    for sizes, message in (([1000] * 400, "%)"), ([1000], "nothing is held out")):
        path, out = texts(tmp_path, sizes), tmp_path / f"out-{len(sizes)}"
        assert run_command("prepare", path, "--tokenizer", tokenizer, "--out", out) == 0
        assert message in next(line for line in capsys.readouterr().out.splitlines() if line.startswith("validation:"))


def test_two_preparations_in_one_folder_are_refused(documents: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = resolve_source([str(documents)])
    intruded = []

    def intrude(progress: Any) -> None:
        before = contents(out)
        with pytest.raises(FolderInUse, match=rf"haltkit prepare \(process {os.getpid()}"):
            prepare(source, out, train_vocab=300, holdout=0.1)
        assert contents(out) == before
        intruded.append(progress)

    prepare(source, out, train_vocab=300, holdout=0.1, on_progress=intrude)
    assert intruded
    assert not (out / ".haltkit-lock").exists()
    with hold(out, "haltkit prepare"), pytest.raises(FolderInUse):
        prepare(source, out, train_vocab=300, holdout=0.1)


@pytest.mark.parametrize("target", ["/dev/null", "fifo", "no/such/folder/e.json", "folder"])
def test_eval_checks_where_it_writes_before_it_measures(
    target: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    Path("folder").mkdir()
    monkeypatch.setattr("haltkit.models.gpt.evaluate.evaluate", lambda *_, **__: pytest.fail("measured"))
    mode = os.stat(target).st_mode if os.path.exists(target) else None
    assert run_command("eval", run / "final", "--loops", "1", "--json", target) == 2
    assert "cannot write" in capsys.readouterr().err
    assert (os.stat(target).st_mode if os.path.exists(target) else None) == mode


def test_a_config_can_be_loaded_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("train: {seed: 3}")
    assert load_config("~/c.yaml") == with_train(RunConfig(), seed=3)
    assert build_model(load_config("tiny").model).block_size == 32
