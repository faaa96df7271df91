"""Kills data preparation, training and folder replacement again and again (SIGKILL), and checks what is left.

    python tests/kill_training.py [--kills 60] [--seed 0]

Three ways to kill: after a random time; while a folder is being written; and at the n-th operation on the file system
(every open, rename, removal below the run's folder), which finds the moments that random times miss. After each kill
every checkpoint that can be seen must load whole, and the work, started again as often as it takes, must end with the
very shards, weights and moments of an undisturbed run. The suite runs a short version; more kills, more moments.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cases import tiny_run, write_documents
from gang import fork
from haltkit import folders
from haltkit.folders import atomic_folder, settle
from haltkit.models.checkpoint import load_checkpoint
from haltkit.models.text.prepare import prepare
from haltkit.models.text.source import resolve_source
from haltkit.models.training.config import RunConfig
from haltkit.models.training.loop import train
from haltkit.models.training.runs import checkpoints
from haltkit.models.weights import read_tensors

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate"}
HOW = ("time", "write", "operation")


def die_at(number: int, folder: Path) -> None:
    """Kill this process at its ``number``-th operation on files below ``folder``."""
    left = number

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in OPERATIONS and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed(child: int) -> bool:
    """Wait for a child; whether it was killed. It must not have failed by itself."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0, "the work failed by itself: see its traceback above"
    return False


def kill_once(work: Callable[[], None], folder: Path, how: str, rng: random.Random, seconds: float) -> bool:
    """Start ``work`` in a child and kill it; True if it was killed before it was done."""
    at, delay, writes = rng.randint(1, 80), rng.uniform(0, seconds), rng.randint(1, 4)

    def mortal() -> None:
        if how == "operation":
            die_at(at, folder)
        work()

    child = fork(mortal)
    if how == "time":
        time.sleep(delay)
    elif how == "write":
        writing = False
        while writes and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            before, writing = writing, any(folder.rglob(".*.partial"))
            writes -= writing and not before
            time.sleep(0.0005)
        time.sleep(delay / seconds * 0.004)
    if how != "operation":
        os.kill(child, signal.SIGKILL)  # a zombie takes it without harm
    return killed(child)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    last = checkpoints(run)[-1]
    return {**read_tensors(last / "model.safetensors"), **read_tensors(last / "optimizer.safetensors")}


def look_at(run: Path, config: RunConfig) -> None:
    """Every checkpoint, snapshot and final that can be seen loads whole."""
    parameters = 45
    for path in checkpoints(run):
        weights, moments = read_tensors(path / "model.safetensors"), read_tensors(path / "optimizer.safetensors")
        step = json.loads((path / "progress.json").read_text())["step"]
        assert path.name == f"step-{step:08d}"
        assert (len(weights), len(moments)) == (parameters, 3 * parameters if step else 0), path
        assert all(bool((weight.abs() < torch.inf).all()) for weight in weights.values())
    for path in [*run.glob("snapshots/*"), *run.glob("final")]:
        if path.name.startswith("."):
            continue
        assert load_checkpoint(path).config == config.model


def kill_training(config: RunConfig, folder: Path, kills: int, rng: random.Random) -> collections.Counter[str]:
    """Kill runs until so many kills are counted; each run must end as the undisturbed one."""
    straight, count = folder / "straight", collections.Counter[str]()
    child = fork(lambda: train(config, straight) and None)
    started = time.monotonic()
    assert not killed(child)
    seconds, wanted = time.monotonic() - started, tensors(straight)
    for number in range(10**6):
        run = folder / f"run-{number}"
        for _ in range(200):
            how = HOW[sum(count.values()) % 3] if sum(count.values()) < kills else "never"
            resume = bool(checkpoints(run))
            work = lambda: train(config, run, resume=resume) and None  # noqa: E731, B023
            done = not (kill_once(work, run, how, rng, seconds * 0.7) if how != "never" else killed(fork(work)))
            look_at(run, config)
            if done:
                break
            count[f"training, {how}"] += 1
        assert done, "200 attempts and no end"
        found = tensors(run)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), f"{run}: other weights"
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert lines[-1] == {"kind": "end", "step": config.train.max_steps, "reason": "done"}
        assert not [*run.rglob(".*.partial"), *run.rglob(".*.retired")]
        if sum(count.values()) >= kills:
            return count
    raise AssertionError


def kill_preparation(source: Path, wanted: Path, folder: Path, kills: int, rng: random.Random) -> int:
    """The same for ``prepare``: the shards must be the undisturbed ones, byte by byte."""
    count = number = 0
    names = sorted(p.name for p in wanted.iterdir())
    while count < kills:
        number += 1
        out = folder / f"data-{number}"
        for _ in range(200):
            how = HOW[count % 3] if count < kills else "never"
            work = lambda: prepared(source, out)  # noqa: E731, B023
            if not (kill_once(work, out, how, rng, 0.5) if how != "never" else killed(fork(work))):
                break
            count += 1
        # What a killed writer left half-written is never read; a finished one replaces it.
        assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == names
        assert all((out / name).read_bytes() == (wanted / name).read_bytes() for name in names)
    return count


def prepared(source: Path, out: Path) -> None:
    prepare(resolve_source([str(source)]), out, train_vocab=300, holdout=0.1, shard_tokens=2000)


def kill_replacement(folder: Path, exchange: bool) -> int:
    """Replace a folder and die at the first, second, third ... operation: the old or the new one is always there."""
    path = folder / "replaced"

    def fill(text: str) -> None:
        with atomic_folder(path) as partial:
            (partial / "a").write_text(text)
            (partial / "b").write_text(text)

    def work(at: int) -> None:
        if not exchange:
            folders._exchange = lambda a, b: False  # as on a system that cannot
        die_at(at, folder)
        fill("new")

    for at in range(1, 100):
        fill("old")
        died = killed(fork(lambda at=at: work(at)))
        if not exchange:
            settle(path)  # what load_checkpoint does
        assert {(path / name).read_text() for name in ("a", "b")} in ({"old"}, {"new"}), at
        if not died:
            return at - 1
    raise AssertionError


def main(kills: int, seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    source = write_documents(folder / "documents.jsonl", 200)
    data = folder / "data"
    assert not killed(fork(lambda: prepared(source, data)))
    config = tiny_run(
        data,
        max_steps=12,
        checkpoint_every=2,
        eval_every=6,
        eval_loops=(1,),
        snapshot_first_tokens=300,
        snapshot_factor=10.0,
    )
    count = kill_training(config, folder, max(1, kills - kills // 4), rng)
    count["preparation"] = kill_preparation(source, data, folder, max(1, kills // 4), rng)
    count["replacing a folder, names exchanged"] = kill_replacement(folder / "a", exchange=True)
    count["replacing a folder, two renames"] = kill_replacement(folder / "b", exchange=False)
    for what, times in sorted(count.items()):
        print(f"{times:4d} kills: {what}")
    print(f"{sum(count.values()):4d} kills in all; nothing lost, nothing half-written, the same weights each time")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(arguments.kills, arguments.seed, Path(temporary))
