"""What users hand over, damaged at random: a command ends with 0 or 2, says one line, and leaves every file as it was.

``make fuzz`` runs this for an hour, with other examples each time.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cases import run_command
from diagnoses import comparison, results
from haltkit.calibration import Certificate, calibrate
from haltkit.card import Card
from haltkit.cli.options import given_policies, read_thresholds
from haltkit.comparison import Comparison
from haltkit.diagnostics import Diagnosis
from haltkit.files import read_json
from haltkit.models.config import to_dict
from haltkit.models.reasoner.checkpoint import load_reasoner
from haltkit.models.reasoner.config import load_reasoner_config, plain
from haltkit.models.text.data import TokenData
from haltkit.models.training.config import load_config
from haltkit.models.weights import BUNDLED
from haltkit.specs import parse_spec

pytestmark = pytest.mark.slow
relaxed = settings(suppress_health_check=list(HealthCheck))

ODD = st.sampled_from(
    [
        None, True, -1, 0, 10**30, -(10**400), 1e308, float("nan"), float("inf"), "", "\0", "x" * 5000, "é\u2028", [], {},
        [[[[]]]], {"": {}}, "norm:tau=0.1", "../../etc/passwd", "no_such_module:Policy", "!!python/object:os.system",
    ]
)  # fmt: skip
SPECS = st.text(alphabet="normkl accel:tau=0.1e-9,;|()any&fixed{}[]\"'\\/\n\0é", max_size=60) | st.lists(
    st.sampled_from(
        ["norm", "kl", "accel", "any(", "all(", ")", "|", ":", "tau", "=", "1", "-1", "nan", "1e999", ",", ";", "loop="]
    ),
    max_size=14,
).map("".join)


def damage(draw: st.DrawFn, value: Any) -> Any:
    """The value with one place of it replaced, removed, doubled or buried deep."""
    value = copy.deepcopy(value)
    at: Any = value
    holders = []
    while isinstance(at, (dict, list)) and at:
        key = draw(st.sampled_from(sorted(at, key=str) if isinstance(at, dict) else range(len(at))))
        holders.append((at, key))
        at = at[key]
        if draw(st.booleans()):
            break
    if not holders:
        return draw(ODD)
    holder, key = holders[-1]
    match draw(st.sampled_from(["replace", "remove", "add", "bury"])):
        case "replace":
            holder[key] = draw(ODD)
        case "remove":
            del holder[key]
        case "add":
            new = draw(ODD)
            holder.append(new) if isinstance(holder, list) else holder.update({"unknown": new})
        case "bury":
            for _ in range(draw(st.sampled_from([3, 100]))):
                holder[key] = [holder[key]]
    return value


@st.composite
def scrambled(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes with a part cut out, overwritten or put in."""
    start = draw(st.integers(0, len(raw)))
    end = draw(st.integers(start, min(len(raw), start + 64)))
    return raw[:start] + draw(st.binary(max_size=12)) + raw[draw(st.sampled_from([start, end, len(raw)])) :]


@st.composite
def damaged(draw: st.DrawFn, value: Any, dump: Callable[[Any], str]) -> bytes:
    """A damaged file of the value: in its structure, in its bytes, or in both."""
    for _ in range(draw(st.integers(0, 2))):
        value = damage(draw, value)
    with suppress(RecursionError, ValueError):
        raw = dump(value).encode("utf-8", "surrogatepass")
        return draw(scrambled(raw)) if draw(st.booleans()) else raw
    return b"{"


def as_json(value: Any) -> str:
    return json.dumps(value)


def as_yaml(value: Any) -> str:
    return str(yaml.safe_dump(value))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuses_or_reads(folder: Path, read: Callable[[], object]) -> None:
    """Reading succeeds, or fails with a message made to be read; nothing in the folder changes."""
    before = contents(folder)
    assert refusal(read) != ""
    assert contents(folder) == before


def refusal(read: Callable[[], object]) -> str | None:
    """What a failure says; None: there was none. Anything else than an error for bad input is raised."""
    try:
        read()
    except (ValueError, OSError) as error:
        return str(error).strip()
    return None


def certificate() -> dict[str, Any]:
    losses = torch.rand(3, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.01
    found = calibrate(losses.T, settings=["a", "b", "c"], epsilon=0.05, delta=0.1)
    return dict(json.loads(found.to_json()))


READERS: Mapping[str, tuple[Any, Callable[[Any], str], Callable[[Path], object]]] = {
    "card": (
        {
            "policy": "loop=norm:tau=0.1",
            "model": "Reasoner",
            "regions": ["loop"],
            "loops": {"loop": {"body": ["core"]}},
        },
        as_yaml,
        lambda path: Card.load(path).policies(["loop"]),
    ),
    "comparison": (comparison(), as_json, lambda path: Comparison.from_json(read_json(path, "a comparison", dict))),
    "certificate": (certificate(), as_json, lambda path: Certificate.from_json(path.read_text(encoding="utf-8"))),
    "diagnosis": (results(), as_json, Diagnosis.load),
    "text config": (to_dict(load_config("tiny")), as_yaml, load_config),
    "reasoner config": (plain(dataclasses.asdict(load_reasoner_config("chase"))), as_yaml, load_reasoner_config),
}


@pytest.mark.parametrize("kind", READERS)
@relaxed
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(
    kind: str, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    value, dump, read = READERS[kind]
    folder = tmp_path_factory.mktemp("files")
    path = folder / ("file" + (".json" if dump is as_json else ".yaml"))
    path.write_bytes(data.draw(damaged(value, dump)))
    refuses_or_reads(folder, lambda: read(path))
    shutil.rmtree(folder)


@relaxed
@given(data=st.data())
def test_a_damaged_checkpoint_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = Path(shutil.copytree(BUNDLED / "chase", tmp_path_factory.mktemp("files") / "chase"))
    weights, config = folder / "model.safetensors", folder / "config.json"
    if data.draw(st.booleans()):
        header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
        raw = weights.read_bytes()
        weights.write_bytes(data.draw(scrambled(raw[:header])) + raw[header:])
    else:
        config.write_bytes(data.draw(damaged(json.loads(config.read_text()), as_json)))
    refuses_or_reads(folder, lambda: load_reasoner(folder))
    shutil.rmtree(folder)


@relaxed
@given(data=st.data())
def test_damaged_prepared_data_are_read_or_refused(
    data_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = Path(shutil.copytree(data_folder, tmp_path_factory.mktemp("files") / "data"))
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    raw = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(data.draw(damaged(json.loads(raw), as_json)))
    else:
        path.write_bytes(data.draw(scrambled(raw)))
    refuses_or_reads(folder, lambda: TokenData(folder, 32, "validation"))
    shutil.rmtree(folder)


@relaxed
@given(text=SPECS)
@example("any(" * 200 + "norm:tau=1" + ")" * 200)
def test_a_spec_is_refused_or_prints_as_it_reads(text: str) -> None:
    with suppress(ValueError):
        read_thresholds(text)
    assert refusal(lambda: given_policies(text, without_certificate=False)) != ""
    said = refusal(lambda: parse_spec(text).build())
    assert said is None or said
    if said is None:
        assert parse_spec(str(parse_spec(text))) == parse_spec(text)


@relaxed
@given(data=st.data())
def test_a_command_over_damaged_files_ends_with_0_or_2_and_one_line(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("files")
    diagnosis, card = folder / "diagnose.json", folder / "card.yaml"
    diagnosis.write_bytes(data.draw(damaged(results(), as_json)))
    card.write_bytes(data.draw(damaged({"policy": "norm:tau=3"}, as_yaml)))
    text = data.draw(st.text(alphabet="ab>? 123456.\n|x", max_size=80))
    arguments = data.draw(
        st.sampled_from(
            [
                ("report", folder, "--out", folder / "page.html"),
                ("solve", "chase", "a>b b", "--policy", card),
                ("solve", "chase", f"a>b b {text}"),
                ("solve", "sudoku", f"{text}"),
                ("solve", "sudoku", diagnosis),
            ]
        )
    )
    before = contents(folder)
    capsys.readouterr()
    code = run_command(*(argument if str(argument) != "-" else "--" for argument in arguments))
    said = capsys.readouterr().err
    assert code in (0, 2), said
    assert code == 0 or len([line for line in said.splitlines() if "several solutions" not in line]) == 1, said
    after = contents(folder)
    assert {path: raw for path, raw in after.items() if path.name != "page.html"} == before
    assert code == 0 or after == before
    shutil.rmtree(folder)
