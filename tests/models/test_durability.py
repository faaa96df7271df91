"""What a run survives: kills, full and read-only disks, signals, losses that explode."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import tiny_run
from haltkit.models.config import to_dict
from haltkit.models.training import loop
from haltkit.models.training.config import RunConfig
from haltkit.models.training.distributed import join
from haltkit.models.training.loop import TrainingDiverged, train
from haltkit.models.training.runs import RunError, WriteFailed, checkpoints, restore
from haltkit.models.training.start import continue_from, new_run, open_feed
from haltkit.models.weights import read_tensors

pytestmark = pytest.mark.slow


@pytest.fixture
def config(data_folder: Path) -> RunConfig:
    return tiny_run(
        data_folder, max_steps=8, checkpoint_every=2, eval_every=100, eval_loops=(1,), snapshot_first_tokens=10**9
    )


def with_train(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if e["kind"] == kind]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(checkpoints(folder)[-1] / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_kills_at_random_and_at_every_step_of_a_replacement() -> None:
    """The short version; ``python tests/kill_training.py`` is the long one."""
    command = [sys.executable, str(Path(__file__).parent.parent / "kill_training.py"), "--kills", "9", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing lost" in done.stdout


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2.5 MB: room for two of the tiny model's checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(disk)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("full disk: there is no mount command here")
    if mounted.returncode:
        pytest.skip("full disk: this machine lets nobody mount a small tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_stops_the_run_and_loses_nothing(config: RunConfig, small_disk: Path, tmp_path: Path) -> None:
    train(config, tmp_path / "straight")
    run = small_disk / "run"
    with pytest.raises(WriteFailed, match=r"cannot write step-0+6 .*[Nn]o space.*complete checkpoint is step-0+4"):
        train(with_train(config, keep_checkpoints=3), run)
    assert names(run) == [f"step-{n:08d}" for n in (2, 4)]  # whole, no half of a third
    subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
    assert train(config, run, resume=True)
    assert same(weights(run), weights(tmp_path / "straight"))


def test_a_file_that_may_not_grow_is_the_same(config: RunConfig, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for a full disk where nothing can be mounted."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = tmp_path / "run"
    assert train(with_train(config, max_steps=2), run)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            WriteFailed, match=r"cannot write step-0+4 .*File too large.*complete checkpoint is step-0+2"
        ):
            train(config, run, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(run) == ["step-00000002"]
    assert train(config, run, resume=True)


def test_a_read_only_target_is_one_line(config: RunConfig, small_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    (tmp_path / "c.yaml").write_text(json.dumps(to_dict(config)))
    with pytest.raises(OSError, match="Read-only file system"):
        train(config, small_disk)
    done = command("train", tmp_path / "c.yaml", "--out", small_disk / "run")
    assert done.returncode == 2
    assert "Read-only file system" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(small_disk.iterdir())


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "haltkit.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def await_a_step(run: Path) -> None:
    for _ in range(6000):
        if (run / "log.jsonl").is_file() and events(run, "step"):
            return
        time.sleep(0.02)


def test_sigterm_saves_and_exits_with_143(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(to_dict(with_train(config, max_steps=10**6))))
    line = [sys.executable, "-m", "haltkit.cli", "train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]
    process = subprocess.Popen([*line, "--auto-resume"], stdout=subprocess.PIPE, text=True)
    await_a_step(tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Stopped and saved" in out
    end = events(tmp_path / "run", "end")[0]
    assert end["signal"] == "SIGTERM"
    assert checkpoints(tmp_path / "run")[-1].name == f"step-{end['step']:08d}"
    # The same command goes on.
    config = with_train(config, max_steps=end["step"] + 1)
    (tmp_path / "c.yaml").write_text(json.dumps(to_dict(config)))
    assert command("train", tmp_path / "c.yaml", "--out", tmp_path / "run", "--auto-resume").returncode == 0
    assert [e["step"] for e in events(tmp_path / "run", "start")] == [0, end["step"]]


def test_a_signal_to_the_whole_group_lets_a_streams_workers_finish_the_step(
    config: RunConfig, documents: Path, tmp_path: Path
) -> None:
    """As torchrun and schedulers send it: to the trainer and to the processes that read for it."""
    config = replace(config, data=replace(config.data, stream=str(documents), stream_workers=2))
    (tmp_path / "c.yaml").write_text(json.dumps(to_dict(with_train(config, max_steps=10**6))))
    line = [sys.executable, "-m", "haltkit.cli", "train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    await_a_step(tmp_path / "run")
    os.killpg(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    end = events(tmp_path / "run", "end")[0]
    assert checkpoints(tmp_path / "run")[-1].name == f"step-{end['step']:08d}"
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, 0)


def test_a_trainer_that_fails_ends_its_workers(config: RunConfig, documents: Path, tmp_path: Path) -> None:
    """Whoever still holds its feed: Python waits for its processes at the end."""
    (tmp_path / "c.json").write_text(
        json.dumps(to_dict(replace(config, data=replace(config.data, stream=str(documents)))))
    )
    program = (
        "import json; from haltkit.models.config import from_dict; "
        "from haltkit.models.training.config import RunConfig; from haltkit.models.training.distributed import Processes; "
        "from haltkit.models.training.start import open_feed; "
        f"loaded = from_dict(RunConfig, json.load(open({str(tmp_path / 'c.json')!r}))); "
        "feed = open_feed(loaded, Processes()); feed.take(0, range(2)); 1 / 0"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert "ZeroDivisionError" in done.stderr


def test_a_run_killed_before_its_first_checkpoint_starts_again(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / ".step-00000002.partial").mkdir(parents=True)
    (tmp_path / "run" / "log.jsonl").write_text('{"kind": "start", "step": 0}\n{"kind": "st')
    assert train(with_train(config, max_steps=2), tmp_path / "run")
    assert names(tmp_path / "run") == ["step-00000002"]
    assert len(events(tmp_path / "run", "start")) == 2  # every line can be read


def test_a_damaged_checkpoint_is_named_with_what_to_do(config: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(with_train(config, max_steps=4), run)
    newest = checkpoints(run)[-1]
    for name in ("model.safetensors", "optimizer.safetensors", "progress.json"):
        content = (newest / name).read_bytes()
        for damaged in (content[: len(content) // 2], b"", None):
            (newest / name).unlink(missing_ok=True)
            if damaged is not None:
                (newest / name).write_bytes(damaged)
            with pytest.raises(
                RunError, match=r"step-0+4' is damaged.*Remove that folder to resume from the one before"
            ):
                train(config, run, resume=True)
        (newest / name).write_bytes(content)
    assert train(config, run, resume=True)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_what_the_optimizer_resumes_with_is_where_its_parameters_are(config: RunConfig, tmp_path: Path) -> None:
    """The fused AdamW of a GPU wants the count of steps there too; the meta device stands in for one."""
    train(with_train(config, max_steps=2), tmp_path / "run")
    with join() as processes:
        run = new_run(config, tmp_path / "run", open_feed(config, processes), processes)
        run.model.to("meta")
        restore(run, checkpoints(tmp_path / "run")[-1])
    state = [run.optimizer.state[parameter] for parameter in run.model.parameters()]
    assert {key for moments in state for key in moments} == {"exp_avg", "exp_avg_sq", "step"}
    assert {value.device.type for moments in state for value in moments.values()} == {"meta"}


def test_old_checkpoints_go_and_the_best_stays(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {2: 5.0, 3: 4.0, 6: 4.5, 8: 4.6, 9: 4.7, 12: 4.8}
    monkeypatch.setattr(loop, "evaluate", lambda run, held_out: {"1": losses.get(run.step, 9.0)})
    config = with_train(config, max_steps=12, eval_every=1, checkpoint_every=2, keep_checkpoints=2)
    train(config, tmp_path / "run")
    # 3 is between checkpoints: the best is saved when it is found.
    assert names(tmp_path / "run") == ["step-00000003", "step-00000010", "step-00000012"]
    train(with_train(config, keep_every=4), tmp_path / "milestones")
    assert names(tmp_path / "milestones") == [f"step-{n:08d}" for n in (3, 4, 8, 10, 12)]
    losses[14] = 3.0
    train(with_train(config, max_steps=14), tmp_path / "run", resume=True)
    assert names(tmp_path / "run") == ["step-00000012", "step-00000014"]


def spoiled(monkeypatch: pytest.MonkeyPatch, bad: dict[int, float]) -> None:
    """Give the batches that begin at these samples a loss of their own."""
    real = loop.take_step

    def step(run: Any) -> tuple[float, float]:
        loss, norm = real(run)
        return bad.get(run.samples, loss), norm

    monkeypatch.setattr(loop, "take_step", step)


def test_a_bad_batch_is_skipped_if_the_config_says_so(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, {6: math.nan})  # the fourth step's
    assert train(with_train(config, on_nonfinite="skip"), tmp_path / "run")
    fault = events(tmp_path / "run", "fault")
    assert [(e["step"], e["fault"], e["action"], e["loss"]) for e in fault] == [(4, "not finite", "skip", None)]
    steps = events(tmp_path / "run", "step")
    assert [e["step"] for e in steps] == [1, 2, 3, 5, 6, 7, 8]
    assert steps[-1]["tokens"] == 7 * 2 * 32
    assert steps[-1]["samples"] == 8 * 2
    continue_from(tmp_path / "run" / "final", config, tmp_path / "taken-up")
    assert all(bool(torch.isfinite(w).all()) for w in weights(tmp_path / "run").values())


def test_a_rollback_goes_back_to_the_weights_and_on_with_the_data(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, {10: math.inf})  # the sixth step's; the last checkpoint is of step 4
    config = with_train(config, on_nonfinite="rollback", checkpoint_every=4)
    assert train(config, tmp_path / "run")
    steps = [(e["step"], e["samples"]) for e in events(tmp_path / "run", "step")]
    assert steps == [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (5, 14), (6, 16), (7, 18), (8, 20)]
    # Killed between the rollback and the next checkpoint, it comes to the same again.
    killed = tmp_path / "killed"
    train(with_train(config, max_steps=4), killed)
    assert train(config, killed, resume=True)
    assert same(weights(killed), weights(tmp_path / "run"))
    # Taken up from its weights it has still seen what it threw away; a shared checkpoint says so, too.
    final = tmp_path / "run" / "final"
    for name in ("own", "shared"):
        continue_from(final, with_train(config, max_steps=10), tmp_path / name)
        progress = json.loads((tmp_path / name / "checkpoints" / "step-00000008" / "progress.json").read_text())
        assert (progress["step"], progress["tokens"], progress["samples"]) == (8, 8 * 2 * 32, 20)
        (final / "progress.json").unlink(missing_ok=True)


def test_a_spike_is_measured_from_the_median_of_recent_losses(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_train(config, max_steps=12, spike_margin=1.0, on_spike="stop")
    spoiled(monkeypatch, {4: 50.0, 20: 7.0})  # too early to tell; then a real one at step 11
    with pytest.raises(TrainingDiverged, match=r"loss 7, .* at step 11: stopped; the last checkpoint is of step 10"):
        train(config, tmp_path / "run")
    assert train(with_train(config, on_spike="skip"), tmp_path / "run", resume=True)
    assert [e["action"] for e in events(tmp_path / "run", "fault")] == ["stop", "skip"]


def test_too_many_faults_stop_a_patient_run(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(monkeypatch, dict.fromkeys(range(4, 100), math.nan))
    for action, good in (("skip", 2), ("rollback", 2)):
        with pytest.raises(TrainingDiverged, match=rf"after 3 times {action}: stopped"):
            train(with_train(config, on_nonfinite=action, max_faults=3), tmp_path / action)
        assert len(events(tmp_path / action, "fault")) == 4
        assert checkpoints(tmp_path / action)[-1].name == f"step-{good + 2 * (action == 'skip'):08d}"
