"""What a writer of folders and of weights leaves alone, and who may read what it writes."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from haltkit import folders
from haltkit.files import FileError, usual_mode
from haltkit.folders import atomic_folder, settle
from haltkit.models.weights import read_tensors, save_tensors
from haltkit.recording.trajectory import RegionTrajectory, Trajectory


class Interrupted(Exception):
    pass


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder by its path, with its text."""
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    program = (
        "import os, signal; from pathlib import Path; from haltkit.folders import atomic_folder\n"
        "with atomic_folder(Path('out')) as inner:\n"
        "    (inner / 'a').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert tree(tmp_path)[".out.partial/a"] == "half"
    with atomic_folder(tmp_path / "out") as inner:
        assert not [*inner.iterdir()]
        (inner / "b").write_text("whole")
    assert tree(tmp_path) == {"out/b": "whole"}


@pytest.mark.parametrize("there", [".out.partial", ".out.retired"])
@pytest.mark.parametrize("exchange", [True, False])
def test_a_users_folder_of_such_a_name_is_not_touched(
    there: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    (tmp_path / there).mkdir()
    (tmp_path / there / "thesis").write_text("years of work")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    settle(tmp_path / "out")
    with pytest.raises(FileError, match=rf"\{there}.*move it"), atomic_folder(tmp_path / "out"):
        pass
    assert tree(tmp_path) == {"out/a": "old", f"{there}/thesis": "years of work"}


def test_a_replacement_that_was_interrupted_is_undone_also_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    path, replace = tmp_path / "out", os.replace
    with atomic_folder(path) as inner:
        (inner / "a").write_text("old")

    def once(source: Path, target: Path) -> None:
        if target == path:
            raise OSError("the disk is gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(OSError, match="gone"), atomic_folder(path) as inner:
        (inner / "a").write_text("new")
    monkeypatch.setattr(os, "replace", replace)
    assert not path.exists()
    settle(path)
    assert (path / "a").read_text() == "old"


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_of_tensors_have_the_mode_that_the_umask_says(umask: int, tmp_path: Path) -> None:
    save_tensors({"a": torch.ones(3)}, tmp_path / "weights.safetensors")
    zeros, steps = torch.zeros(2, 3), torch.ones(2, dtype=torch.int64)
    region = RegionTrajectory(torch.tensor([0, 1]), torch.stack([zeros, zeros]), {}, zeros, zeros, steps)
    Trajectory({"loop": region}).save(tmp_path / "recording.safetensors")
    for path in (tmp_path / "weights.safetensors", tmp_path / "recording.safetensors"):
        assert mode(path) == 0o666 & ~umask


def test_a_file_keeps_the_mode_that_its_owner_gave_it(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_tensors({"a": torch.ones(3)}, path)
    path.chmod(0o640)
    save_tensors({"a": torch.zeros(3)}, path)
    assert mode(path) == 0o640
    assert read_tensors(path)["a"].eq(0).all()


def test_a_writer_that_fails_leaves_no_new_file(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), usual_mode(tmp_path / "new"):
        raise Interrupted
    assert not (tmp_path / "new").exists()


# Processes that write at one place again and again, each all files with its own name in them.
WRITER = """
import sys
from pathlib import Path
from haltkit.files import write_text
from haltkit.folders import atomic_folder

kind, name, place = sys.argv[1], sys.argv[2], Path(sys.argv[3])
if kind == "card":
    from haltkit.card import Card
print("ready", flush=True)
sys.stdin.readline()
for _ in range(12):
    if kind == "card":
        Card(f"norm:tau={name}", about=name * 20).save(place)
    elif kind == "file":
        write_text(place, name * 100_000)
    else:
        with atomic_folder(place) as folder:
            for file in ("a", "b", "c"):
                (folder / file).write_text(name * 10_000)
"""


@pytest.mark.parametrize("kind", ["card", "file", "folder"])
def test_processes_that_write_at_one_place_leave_one_whole_result(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "out"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, kind, name, str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in "12"
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    ended = [(writer.communicate(timeout=60)[1], writer.returncode) for writer in writers]
    assert ended == [("", 0)] * 2
    text = "".join(tree(tmp_path).values())
    assert ("1" * 20 in text) is not ("2" * 20 in text)
    assert set(tree(tmp_path)) == {"card": {"out/card.yaml"}, "file": {"out"}}.get(kind, {"out/a", "out/b", "out/c"})


def test_a_reader_leaves_a_replacement_to_the_writer_that_is_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    path, replace = tmp_path / "out", os.replace
    with atomic_folder(path) as inner:
        (inner / "a").write_text("old")

    def read_between(source: Path, target: Path) -> None:
        if target == path:  # the old folder is away, and the new one not yet there
            settle(path)
            assert not path.exists()
        replace(source, target)

    monkeypatch.setattr(os, "replace", read_between)
    with atomic_folder(path) as inner:
        (inner / "a").write_text("new")
    assert tree(tmp_path) == {"out/a": "new"}
