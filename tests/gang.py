"""Runs training jobs, each on several gloo processes, in one program: torch is imported once and children are forked.

    python tests/gang.py JOBS.json

JOBS.json is a list of ``{"processes", "config", "out", "resume", "stop_at", "file_limit", "fails",
"backend"}``. Each job must
finish before the next begins. Every process writes the ids of the windows it trained on to ``OUT/samples-*.jsonl``.
``{"processes", "command"}`` is a command line of haltkit in every process instead.
With ``backend`` torch.compile uses that one, and ``OUT/compiled`` has a line a graph. With ``file_limit`` the last process may write no larger file; with ``fails``, the name of an error, every process must
end in it, and writes it to ``OUT/failed-RANK``.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # these are imported here so that no child has to
import torch.distributed as dist
import torch.distributed.checkpoint.hf_storage
import torch.distributed.fsdp
import torch.utils.tensorboard

from haltkit.cli import main as entry
from haltkit.models.config import from_dict
from haltkit.models.text.data import Feed, ShardFeed
from haltkit.models.text.stream import StreamFeed
from haltkit.models.training.config import RunConfig
from haltkit.models.training.loop import train

# OpenMP's threads do not survive a fork: a child that meets the parent's pool waits for ever. One thread makes no pool.
torch.set_num_threads(1)


def fork(work: Callable[[], None]) -> int:
    """Run ``work`` in a child and return its process id; the child ends with 0, or with 1 and a traceback."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def spread(processes: int, work: Callable[[], None], seconds: float = 240) -> None:
    """Run ``work`` in so many processes that find each other as under torchrun; all must succeed.

    The limit is for processes that wait for each other for ever, not for a busy machine.
    """
    # As torchrun's agent does: it holds the store itself, on a port that nobody can take in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def one(rank: int) -> None:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(store.port),
            TORCHELASTIC_USE_AGENT_STORE="True",
            TORCHELASTIC_RESTART_COUNT="0",
        )
        work()

    children = {fork(lambda rank=rank: one(rank)) for rank in range(processes)}
    deadline = time.monotonic() + seconds
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        children.discard(child)
        if status or time.monotonic() > deadline:
            for left in children:
                os.kill(left, signal.SIGKILL)
            raise SystemExit(f"a process failed with status {status}" if status else "the processes hang")
        time.sleep(0.002)


def watch_samples(config: RunConfig, out: Path) -> None:
    """Have every window that training takes written down: sample number and what is in it."""
    kind = StreamFeed if config.data.stream else ShardFeed
    take: Callable[..., Any] = kind.take
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"samples-{os.getpid()}.jsonl"

    def taking(feed: Feed, first: int, rows: Iterable[int]) -> Any:
        rows = list(rows)
        found = take(feed, first, rows)
        with path.open("a") as file:
            for row, window in zip(rows, found, strict=True):
                file.write(json.dumps([first + row, hash(window.tobytes())]) + "\n")
        return found

    kind.take = taking


def counting(name: str, out: Path) -> Callable[..., Any]:
    """A backend of torch.compile that leaves a line in ``OUT/compiled`` for every graph."""
    compiler = torch._dynamo.lookup_backend(name)

    def compiled(graph: Any, inputs: Any) -> Any:
        with (out / "compiled").open("a") as file:
            file.write(f"{len(inputs)}\n")
        return compiler(graph, inputs)

    return compiled


def command(arguments: list[str]) -> None:
    sys.argv = ["haltkit", *arguments]
    try:
        entry.run()
    except SystemExit as stop:
        if stop.code:
            raise


def run(job: dict[str, Any]) -> None:
    if "command" in job:
        spread(job["processes"], lambda: command(job["command"]))
        return
    config, out = from_dict(RunConfig, job["config"]), Path(job["out"])
    stop_at = job.get("stop_at")

    def work() -> None:
        if "backend" in job:
            torch.compile = functools.partial(torch.compile, backend=counting(job["backend"], out))
        watch_samples(config, out)
        rank = int(os.environ["RANK"])
        if "file_limit" in job and rank == job["processes"] - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
        error = None
        try:
            # Only the first process is asked to stop; all must.
            train(
                config,
                out,
                resume=job.get("resume", False),
                on_event=lambda e: (
                    e["kind"] == "step" and e["step"] == stop_at and os.kill(os.getpid(), signal.SIGTERM)
                ),
            )
        except Exception as caught:
            error = caught
            (out / f"failed-{rank}").write_text(str(error))
        if job.get("fails") != (error and type(error).__name__):
            raise error or SystemExit(f"no {job['fails']}")

    started = time.monotonic()
    spread(job["processes"], work)
    print(f"{out.name}: {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
