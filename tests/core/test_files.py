"""Where results may be written, how a file that a user has edited is read, and one writer per folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import haltkit
from cases import run_command
from haltkit.card import Card
from haltkit.files import FileError, atomic_path, check_output, parse_json, read_json, read_yaml, write_json, write_text
from haltkit.folders import atomic_folder, settle
from haltkit.locks import LOCK_FILE, FolderInUse, hold
from haltkit.models.checkpoint import BUNDLED
from haltkit.policies.probe import FEATURES, Probe
from haltkit.specs import packed


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def listening(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(folder / "socket"))
    return folder / "socket"


def linked(folder: Path, target: Path) -> Path:
    (folder / "link").symlink_to(target)
    return folder / "link"


REFUSED = {
    "a folder": (lambda folder: folder, "it is a folder"),
    "a device": (lambda folder: Path("/dev/null"), "not a regular file"),
    "a FIFO": (fifo, "not a regular file"),
    "a socket": (listening, "not a regular file"),
    "a link to a FIFO": (lambda folder: linked(folder, fifo(folder)), "not a regular file"),
    "a link into nowhere": (lambda folder: linked(folder, folder / "no" / "x"), "no folder"),
    "a missing folder": (lambda folder: folder / "no" / "x.json", "no folder"),
    "below a file": (lambda folder: Path(__file__) / "x.json", "is not a folder"),
    "a link to itself": (lambda folder: linked(folder, folder / "link"), "link"),
}


def mode(path: Path) -> int | None:
    return path.lstat().st_mode if path.is_symlink() or path.exists() else None


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("writer", [check_output, lambda path: write_json(path, 1)], ids=["check", "write"])
def test_only_regular_files_in_existing_folders_are_written(case: str, writer: Any, tmp_path: Path) -> None:
    path, message = REFUSED[case][0](tmp_path), REFUSED[case][1]
    before = mode(path), sorted(tmp_path.rglob("*"))
    with pytest.raises(FileError, match=message):
        writer(path)
    assert (mode(path), sorted(tmp_path.rglob("*"))) == before


def test_names_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="too long"):
        check_output(tmp_path / ("x" * 250))  # itself short enough, but not what is written beside it
    with pytest.raises(FileError, match=r"cannot write"):
        check_output(tmp_path / ("x" * 5000))
    with pytest.raises(FileError, match=r"must end in \.png, \.svg"):
        check_output(tmp_path / "x.jpg", ("png", "svg"))
    assert check_output(None) is None
    assert check_output(tmp_path / "X.PNG", ("png",)) == tmp_path / "X.PNG"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output("~/x.json") == tmp_path / "x.json"
    with pytest.raises(FileError):
        check_output("~nobody-of-this-name/x.json")


def test_a_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, how: False)  # root may write everywhere
    with pytest.raises(FileError, match="permission denied"):
        check_output(tmp_path / "x.json")


def test_a_dash_is_standard_output(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert check_output("-") == Path("-")
    write_json(Path("-"), {"a": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    with pytest.raises(FileError, match="must end in"):
        check_output("-", ("png",))


def test_a_file_is_replaced_whole_with_its_links_and_permissions(tmp_path: Path) -> None:
    path, link = tmp_path / "x", tmp_path / "link"
    path.write_text("old")
    path.chmod(0o600)
    link.symlink_to(path)
    with pytest.raises(ZeroDivisionError), atomic_path(link) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    write_text(link, "new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", 0o600)
    assert link.is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "x"]


DAMAGED = {
    "cut off": ('{"a": [1, 2', "is not JSON"),
    "empty": ("", "is not JSON"),
    "deeply nested": ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
    "NaN": ('{"a": NaN}', "contains NaN"),
    "infinite": ('{"a": -Infinity}', "-Infinity"),
    "beyond floats": ('{"a": 1e999}', "1e999"),
    "beyond digits": ('{"a": ' + "9" * 5000 + "}", "cannot be read"),
    "a list": ("[1]", "a mapping at its top level, not a list"),
    "null": ("null", "a mapping at its top level"),
    "not UTF-8": (b'{"a": "\xff"}', "not UTF-8"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_json_is_one_line_that_names_the_file(name: str, tmp_path: Path) -> None:
    content, message = DAMAGED[name]
    (tmp_path / "x.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError, match=message) as caught:
        read_json(tmp_path / "x.json", "the manifest", dict)
    assert str(tmp_path / "x.json") in str(caught.value)
    assert str(caught.value).startswith("the manifest")
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_what_is_not_a_file_is_not_read(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "no", "no file"), (tmp_path, "regular"), (fifo(tmp_path), "regular")):
        for read in (read_json, read_yaml):
            with pytest.raises(FileError, match=message):
                read(path, "the card", dict)


def test_damaged_yaml_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for content, message in (
        ("a: [", "not valid YAML"),
        ("[" * 50_000, "nested too deeply|not valid YAML"),
        ("!!python/object/apply:os.system [true]", "not valid YAML"),
        ("- 1", "a mapping"),
        ("", "a mapping"),
        ("a: 2020-99-99", "not valid YAML"),
    ):
        path.write_text(content)
        with pytest.raises(FileError, match=message) as caught:
            read_yaml(path, "the card", dict)
        assert "\n" not in str(caught.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_good_json_is_read_as_it_was_written(value: Any) -> None:
    assert parse_json(json.dumps({"a": value}), "x", dict) == {"a": value}


@given(st.text() | st.binary().map(lambda b: b.decode("latin-1")))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(FileError):
        assert isinstance(parse_json(text, "x", dict), dict)


def test_folders_named_by_dots_and_links_are_settled_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for name in (".", "./", "..", "/", f"{folder}/", str(tmp_path / "link"), "../real/."):
        settle(Path(name))
    for name in (".", "../real"):
        (tmp_path / ".real.retired").mkdir()  # what a kill in the middle of replacing the folder left
        (tmp_path / ".real.writing").touch()
        settle(Path(name))
        assert not (tmp_path / ".real.retired").exists()
    with atomic_folder(tmp_path / "link") as partial:
        (partial / "a").write_text("new")
    assert (folder / "a").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_a_held_folder_names_its_holder_and_is_free_afterwards(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with hold(folder, "haltkit train") as held:
        assert held
        with pytest.raises(FolderInUse, match=rf"in use by haltkit train \(process {os.getpid()} on ") as caught:
            hold(folder, "haltkit train").__enter__()
        assert "remove" not in str(caught.value)
    assert not (tmp_path / "a").exists()  # nothing was written, so nothing is left
    with hold(folder, "haltkit prepare"):
        (folder / "x").touch()
    assert [p.name for p in folder.iterdir()] == ["x"]


HOLDER = """
import os, sys, time
from pathlib import Path
from haltkit.locks import hold
with hold(Path(sys.argv[1]), "haltkit train"):
    reading, writing = os.pipe()
    if not os.fork():
        os.close(1)  # only the parent says anything
        os.write(writing, b"x")
        time.sleep(60)
    os.read(reading, 1)  # the child has come to life
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_ends_with_a_killed_process_even_where_its_children_live_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(FolderInUse, match=f"process {process.pid}"), hold(tmp_path, "haltkit train"):
            pytest.fail("two writers")
        process.kill()
        process.wait()
        assert (tmp_path / LOCK_FILE).exists()
        with hold(tmp_path, "haltkit train") as held:
            assert held
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def test_two_writers_are_never_in_a_folder_together(tmp_path: Path) -> None:
    """Many threads take and give back one lock: the file that is removed at the end must not let two in."""
    inside, worst, taken = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, worst, taken
        while taken < 100:  # however often the threads are in each other's way
            try:
                with hold(tmp_path, "haltkit train"):
                    with guard:
                        inside, taken = inside + 1, taken + 1
                        worst = max(worst, inside)
                    with guard:
                        inside -= 1
            except FolderInUse:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == 1


def test_a_lock_on_a_file_that_was_just_removed_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder before removes the file at its end, maybe between another's opening and locking it."""
    import fcntl

    real, path = fcntl.flock, tmp_path / LOCK_FILE
    calls = []

    def flock(descriptor: int, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:
            path.unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold(tmp_path, "haltkit train"):
        assert path.exists()
        with pytest.raises(FolderInUse):
            hold(tmp_path, "haltkit train").__enter__()


def test_a_file_system_without_locks_is_said_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def unsupported(descriptor: int, how: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with hold(tmp_path, "haltkit train") as held:
        assert not held
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("a: 1\nb: {c: 2, c: 3}\n", "'c' is given twice"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        (
            "a: &a0 [x, x]\nb: &a1 [*a0, *a0]\n"
            + "".join(f"c{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(2, 60)),
            "alias",
        ),
    ],
)
def test_yaml_that_says_a_thing_twice_is_refused_at_once(tmp_path: Path, text: str, token: str) -> None:
    (tmp_path / "file.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(FileError, match=token):
        read_yaml(tmp_path / "file.yaml", "the config", dict)


@pytest.mark.parametrize(
    ("arguments", "token"),
    [
        (["headroom", "chase", "--max-loops", "99999999999999999999"], "max-loops"),
        (["calibrate", "chase", "--sequences", "99999999999999999999"], "sequences"),
        (["calibrate", "chase", "--policy", "kl:tau=x"], "a number is expected"),
        (["fit", "chase", "--save", "no-such-folder/card"], "there is no folder"),
        (["calibrate", "chase", "--save", "no-such-folder/card"], "there is no folder"),
        (["fit", "chase", "--save", "x" * 250], "too long"),
        (["fit", "chase", "--seed", "99999999999999999999999"], "--seed"),
        (["calibrate", "chase", "--seed", "-1"], "--seed"),
        (["calibrate", "chase", "--method", "guess"], "conformal"),
        (["fit", "chase", "--sequences", "4"], "--batch"),
    ],
)
def test_absurd_numbers_and_places_are_one_line(
    arguments: list[str],
    token: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(*arguments) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert token in said.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("beside", [".card.partial", ".card.retired", "card"])
def test_a_card_is_not_written_where_somebodys_files_are(beside: str, tmp_path: Path) -> None:
    (tmp_path / beside).mkdir()
    (tmp_path / beside / "thesis.txt").touch()
    for write in (Card.check_folder, Card("norm:tau=1").save):
        with pytest.raises(ValueError, match="is no card: move it" if beside == "card" else "not haltkit's.*move it"):
            write(tmp_path / "card")
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["thesis.txt"]
    (tmp_path / ".card.writing").touch()
    (tmp_path / beside / "thesis.txt").rename(tmp_path / beside / "weights.safetensors")  # as a killed writer leaves it
    Card("norm:tau=1").save(tmp_path / "card")
    assert [path.name for path in tmp_path.rglob("*")] == ["card", "card.yaml"]


def test_a_folder_that_takes_no_new_names_is_seen_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(path: Path) -> None:
        raise OSError(errno.ENOENT, "as in /proc")

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(FileError, match="as in /proc"):
        Card.check_folder(tmp_path / "card")


def test_all_files_of_a_card_have_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        weights = haltkit.Weights({f"loop/{name}": torch.ones(1) for name in ("state", "bias", *FEATURES)})
        text, files = packed({"loop": Probe(0.5, weights)})
        Card(text).save(tmp_path / "card", files)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "card").iterdir()} == {0o640}


def test_an_impossible_size_in_a_reasoners_config_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "chase"
    shutil.copytree(BUNDLED / "chase", folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"d_model": 64', '"d_model": 1000000000'))
    assert run_command("headroom", folder) == 2
    assert "impossible size" in capsys.readouterr().err


def test_weights_of_a_policy_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    haltkit.Weights({"w": torch.tensor([1.0, torch.nan])}).save(path)
    with pytest.raises(ValueError, match="not finite"):
        haltkit.Weights.load(path)
