"""Training on several processes: the same run as on one, and checkpoints that any number of processes resumes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from haltkit.models.checkpoint import load_checkpoint
from haltkit.models.config import ConfigError, to_dict
from haltkit.models.training.config import RunConfig, load_config
from haltkit.models.training.distributed import Processes
from haltkit.models.training.export import export
from haltkit.models.training.loop import train
from haltkit.models.training.runs import RunError, checkpoints
from haltkit.models.weights import CheckpointError, read_tensors

pytestmark = pytest.mark.slow

STEPS, STOP = 20, 10
# Stopped on two processes; the engine and the number of processes that took it up again.
RESUMED = [
    "ddp-stopped-ddp-1",
    "ddp-stopped-ddp-3",
    "ddp-stopped-fsdp-3",
    "fsdp-stopped-fsdp-1",
    "fsdp-stopped-fsdp-3",
    "fsdp-stopped-ddp-1",
    "fsdp-stopped-ddp-3",
]


@pytest.fixture(scope="module")
def config(data_folder: Path) -> RunConfig:
    """Four rows do not divide by three; accumulation, clipping and a norm above the limit are all in play."""
    loaded = load_config("tiny")
    return replace(
        loaded,
        data=replace(loaded.data, path=str(data_folder)),
        optim=replace(loaded.optim, schedule="wsd", warmup_steps=3, grad_clip=0.5, eps=1e-6),
        train=replace(
            loaded.train,
            max_steps=STEPS,
            grad_accumulation=2,
            eval_every=10,
            checkpoint_every=10,
            eval_loops=(1, 4),
            snapshot_first_tokens=10**9,
        ),
    )


def job(config: RunConfig, out: Path, processes: int, **more: Any) -> dict[str, Any]:
    return {"config": to_dict(config), "out": str(out), "processes": processes, **more}


def gang(jobs: list[dict[str, Any]], folder: Path) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).parent.parent / "gang.py"), str(folder / "jobs.json")]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of this file: straight on 1, 2 and 3 processes, and stopped on 2 to be resumed on 1 and 3."""
    folder = tmp_path_factory.mktemp("runs")
    sharded = replace(config, train=replace(config.train, strategy="fsdp"))
    compiled = replace(config, train=replace(config.train, compile=True))
    gang(
        [
            job(config, folder / "one", 1),
            job(config, folder / "ddp-2", 2),
            job(config, folder / "ddp-3", 3),
            job(sharded, folder / "fsdp-2", 2),
            job(config, folder / "ddp-stopped", 2, stop_at=STOP),
            job(sharded, folder / "fsdp-stopped", 2, stop_at=STOP),
            # aot_eager: what compiling changes for DDP is where gradients come from, not who computes them.
            job(compiled, folder / "ddp-2-compiled", 2, backend="aot_eager"),
        ],
        folder,
    )
    again = []
    for name in RESUMED:
        source, strategy, processes = name.rsplit("-", 2)
        shutil.copytree(folder / source, folder / name)
        changed = replace(config, train=replace(config.train, strategy=strategy))
        again.append(job(changed, folder / name, int(processes), resume=True))
    gang(again, folder)
    return folder


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if e["kind"] == kind]


def samples(folder: Path) -> list[list[int]]:
    """Sample number and content of every window, in the run's order, from whichever process took it."""
    return sorted(json.loads(line) for file in folder.glob("samples-*") for line in file.read_text().splitlines())


@pytest.mark.parametrize("name", ["ddp-2", "ddp-3", "fsdp-2", "ddp-2-compiled", *RESUMED])
def test_the_run_does_not_depend_on_the_number_of_processes(runs: Path, name: str) -> None:
    for kind, keys in (("step", ("loss", "grad_norm", "lr", "tokens")), ("eval", ("losses",))):
        one, many = events(runs / "one", kind), events(runs / name, kind)
        assert [e["step"] for e in many] == [e["step"] for e in one]
        for key in keys:
            for a, b in zip(one, many, strict=True):
                assert b[key] == pytest.approx(a[key], rel=2e-5), (kind, key, a["step"])
    assert all(e["grad_norm"] > 0.5 for e in events(runs / "one", "step"))  # clipping had something to do
    one, many = load_checkpoint(runs / "one" / "final"), load_checkpoint(runs / name / "final")
    assert many.trained["tokens"] == one.trained["tokens"]
    for parameter, weight in one.model.state_dict().items():
        torch.testing.assert_close(many.model.state_dict()[parameter], weight, rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("name", ["ddp-2", "ddp-3", "fsdp-2", "ddp-2-compiled", *RESUMED])
def test_every_sample_is_seen_once_and_the_same_ones(runs: Path, name: str) -> None:
    seen = samples(runs / name)
    assert seen == samples(runs / "one")
    assert [number for number, _ in seen] == list(range(STEPS * 2 * 4))


def test_a_stream_saved_by_two_goes_on_with_one_and_with_three(
    config: RunConfig, documents: Path, tmp_path: Path
) -> None:
    streamed = replace(
        config,
        data=replace(config.data, stream=str(documents)),
        train=replace(config.train, max_steps=6, grad_accumulation=1, eval_every=100, checkpoint_every=100),
    )
    gang(
        [job(streamed, tmp_path / "one", 1), job(streamed, tmp_path / "stopped", 2, stop_at=3)],
        tmp_path,
    )
    for processes in (1, 3):
        shutil.copytree(tmp_path / "stopped", tmp_path / f"resumed-{processes}")
    gang([job(streamed, tmp_path / f"resumed-{processes}", processes, resume=True) for processes in (1, 3)], tmp_path)
    for processes in (1, 3):
        resumed = tmp_path / f"resumed-{processes}"
        assert samples(resumed) == samples(tmp_path / "one")
        assert len(samples(resumed)) == 6 * 4
        for a, b in zip(events(tmp_path / "one", "step"), events(resumed, "step"), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=2e-5)


def test_compiled_blocks_were_compiled(runs: Path) -> None:
    assert len((runs / "ddp-2-compiled" / "compiled").read_text().splitlines()) >= 2 * 5  # two processes, five layers
    assert not (runs / "ddp-2" / "compiled").exists()


def test_processes_share_the_work(runs: Path) -> None:
    counts = sorted(len(file.read_text().splitlines()) for file in (runs / "ddp-3").glob("samples-*"))
    assert counts == [STEPS * 2 * rows for rows in (1, 1, 2)]
    assert events(runs / "ddp-3", "start")[0]["processes"] == 3


def test_a_stop_asked_of_one_process_stops_all_and_says_which_signal(runs: Path) -> None:
    end = events(runs / "ddp-stopped", "end")[0]
    assert (end["step"], end["reason"], end["signal"]) == (STOP, "asked to stop", "SIGTERM")


def test_checkpoints_are_whole_or_in_shards_and_never_pickles(runs: Path) -> None:
    whole, sharded = (runs / name / "checkpoints" / f"step-{STOP:08d}" for name in ("ddp-stopped", "fsdp-stopped"))
    assert read_tensors(whole / "model.safetensors")
    assert len(list((sharded / "sharded").glob("*.safetensors"))) == 2
    kinds = {path.suffix for path in [*whole.rglob("*"), *sharded.rglob("*")] if path.is_file()}
    assert kinds == {".safetensors", ".json", ".tiktoken"}


@pytest.fixture(scope="module")
def shards(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside the same run in one process, checkpoints in shards, of steps 1 and 2; the second process could not write its part of the one of step 3."""
    folder = tmp_path_factory.mktemp("shards")
    short = replace(config.train, strategy="fsdp", checkpoint_every=1, eval_every=100)
    jobs = [
        job(replace(config, train=replace(short, max_steps=2)), folder / "whole", 1),
        job(replace(config, train=replace(short, max_steps=2)), folder / "run", 2),
        job(
            replace(config, train=replace(short, max_steps=4)),
            folder / "run",
            2,
            resume=True,
            file_limit=60_000,
            fails="WriteFailed",
        ),
    ]
    gang(jobs, folder)
    return folder / "run"


def test_a_process_that_cannot_write_stops_all_and_loses_nothing(shards: Path) -> None:
    for rank in range(2):
        reason = (shards / f"failed-{rank}").read_text()
        assert "cannot write step-00000003" in reason
        assert "(File too large); the last complete checkpoint is step-00000002" in reason
    assert sorted(p.name for p in (shards / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_in_shards_is_exported_by_one_process(shards: Path, tmp_path: Path) -> None:
    step = checkpoints(shards)[-1]
    with pytest.raises(CheckpointError, match=rf"in shards.*haltkit export {step} --out DIR"):
        load_checkpoint(step)
    assert export(shards, tmp_path / "out") == step  # the only one that was evaluated, so the best
    loaded, whole = load_checkpoint(tmp_path / "out"), load_checkpoint(shards.parent / "whole" / "final")
    assert (loaded.trained["steps"], loaded.trained["samples"]) == (2, 16)
    assert loaded.tokenizer.n_vocab == 320
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], weight, rtol=0.02, atol=1e-4)
    assert "library_name: haltkit" in (tmp_path / "out" / "README.md").read_text()


def test_a_damaged_shard_is_named_with_what_to_do(config: RunConfig, shards: Path) -> None:
    """On one process: what another number of processes reads is checked as well."""
    config = replace(config, train=replace(config.train, max_steps=3, eval_every=100))
    newest = checkpoints(shards)[-1]
    for file in sorted((newest / "sharded").iterdir()):
        content = file.read_bytes()
        for damaged, reason in (
            (None, f"no {file.name} in"),
            (content[:-100], f"{file.name} .*ends at byte"),
            (b"\xff" * 99 + content[99:], "cannot be read"),
        ):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(RunError, match=rf"step-0+2' is damaged \(.*{reason}.*Remove that folder to resume"):
                train(config, shards, resume=True)
            file.write_bytes(content)
    assert train(config, shards, resume=True)


def test_a_run_begun_from_another_is_made_once_for_all_processes(config: RunConfig, tmp_path: Path) -> None:
    short = replace(config, train=replace(config.train, max_steps=2, eval_every=100))
    longer = replace(short, train=replace(short.train, max_steps=4))
    (tmp_path / "longer.yaml").write_text(json.dumps(to_dict(longer)))
    first, annealed, taken_up = (tmp_path / name for name in ("first", "annealed", "taken-up"))
    gang(
        [
            job(short, first, 1),
            {
                "processes": 2,
                "command": ["train", "--anneal-from", str(first), "--anneal-steps", "2", "--out", str(annealed)],
            },
            {
                "processes": 2,
                "command": [
                    "train",
                    str(tmp_path / "longer.yaml"),
                    "--init-from",
                    str(first / "final"),
                    "--out",
                    str(taken_up),
                    "--auto-resume",
                ],
            },
        ],
        tmp_path,
    )
    for run in (annealed, taken_up):
        assert [e["processes"] for e in events(run, "start")] == [2]
        assert [e["step"] for e in events(run, "step")] == [3, 4]


def test_torchrun_is_the_launcher(config: RunConfig, tmp_path: Path) -> None:
    """The documented command; its output comes from the first process alone."""
    import yaml

    short = replace(config, train=replace(config.train, max_steps=2))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(short)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "haltkit.cli",
        "train",
        str(tmp_path / "run.yaml"),
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Done:") == 1
    assert events(tmp_path / "run", "start")[0]["processes"] == 2
    assert load_checkpoint(tmp_path / "run" / "final").trained["steps"] == 2


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_rows_are_shared_without_gaps(world: int) -> None:
    rows = [list(Processes(rank, world).rows(16)) for rank in range(world)]
    assert [row for own in rows for row in own] == list(range(16))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1
    with pytest.raises(ConfigError, match="cannot be shared by 17"):
        Processes(0, 17).rows(16)
