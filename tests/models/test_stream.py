"""Text at scale: streams with a position, damaged shards, documents that nobody expects."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cases import write_documents
from haltkit.models.config import ConfigError
from haltkit.models.text.config import DataConfig
from haltkit.models.text.data import MANIFEST, DataError, TokenData, alone
from haltkit.models.text.prepare import prepare
from haltkit.models.text.source import Unreadable, resolve_source
from haltkit.models.text.stream import START, StreamFeed
from haltkit.models.text.tokenizer import encode, load_tokenizer
from haltkit.models.training.config import RunConfig, load_config
from haltkit.models.training.loop import train
from haltkit.models.training.runs import RunError, checkpoints
from haltkit.models.training.start import continue_from

pytestmark = pytest.mark.slow

LANES, LENGTH = 3, 32


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files for three lanes: some of datasets' splits are by document."""
    folder = tmp_path_factory.mktemp("texts")
    write_documents(folder / "all.jsonl", 61)
    lines = (folder / "all.jsonl").read_text().splitlines(keepends=True)
    (folder / "all.jsonl").unlink()
    for i in range(4):
        (folder / f"train-{i}.jsonl").write_text("".join(lines[i::4]) + '{"text": "", "id": -1}\n')
    return folder


@pytest.fixture(scope="module")
def settings(texts: Path, data_folder: Path) -> DataConfig:
    return DataConfig(path=str(data_folder), stream=str(texts), stream_workers=0)


def feed(settings: DataConfig, rows: range = range(LANES), lanes: int = LANES) -> StreamFeed:
    return StreamFeed(settings, lanes, LENGTH, rows)


def draw(stream: StreamFeed, count: int) -> list[Any]:
    return [stream.take(0, sorted(stream.positions)).tolist() for _ in range(count)]


def test_every_document_of_the_training_split_comes_once_an_epoch(settings: DataConfig, texts: Path) -> None:
    """Lanes together give the stream's documents in windows that overlap by one token, held-out ones left out."""
    stream = feed(settings)
    encoding = stream.text.encoding
    manifest = json.loads((Path(settings.path) / MANIFEST).read_text())
    from haltkit.models.text.holdout import held_out

    found: list[str] = []
    for lane in range(LANES):
        ids: list[int] = []
        for window, after in stream.text.windows(lane, START):
            ids += window[1:].tolist() if ids else window.tolist()
            if after["epoch"] == 1 and after["document"] > 3:
                break
        found.append(encoding.decode(ids))
    documents = [json.loads(line)["text"] for file in texts.iterdir() for line in file.read_text().splitlines()]
    kept = [text for text in documents if text and not held_out(text, manifest["settings"]["holdout"])]
    assert 0 < len(kept) < 61
    for text in kept:
        assert sum(part.count(text + "<|endoftext|>") for part in found) in (1, 2)  # 2: in the next epoch again
    for text in set(documents) - set(kept) - {""}:
        assert not any(text + "<|endoftext|>" in part for part in found)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where tests are given one core
@pytest.mark.parametrize("stop", [1, 9, 40])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_gives_what_it_would_have_given(settings: DataConfig, stop: int, workers: int) -> None:
    straight = draw(feed(settings), stop + 30)  # into the second epoch
    first = feed(replace(settings, stream_workers=workers))
    assert draw(first, stop) == straight[:stop]
    position = json.loads(json.dumps(first.position(alone)))
    again = feed(replace(settings, stream_workers=workers))
    again.seek(position)
    assert draw(again, 30) == straight[stop:]


def test_lanes_do_not_care_which_process_reads_them(settings: DataConfig) -> None:
    together = draw(feed(settings), 12)
    parts = [feed(settings, rows) for rows in (range(1), range(1, 3))]
    assert [a + b for a, b in zip(draw(parts[0], 12), draw(parts[1], 12), strict=True)] == together


def test_another_stream_is_refused_with_the_reason(settings: DataConfig) -> None:
    position = feed(settings).position(alone)
    with pytest.raises(DataError, match=r"lanes 3, here 4.*keep data\.stream, .*train\.batch_size"):
        feed(settings, range(4), lanes=4).seek(position)
    with pytest.raises(DataError, match="has no document: give more text"):
        draw(feed(settings, range(60, 90), lanes=90), 1)


@pytest.mark.parametrize("changed", ["stream_column", "bad_documents", "files", "tokenizer", "holdout"])
def test_a_position_says_all_that_decides_what_comes_next(
    settings: DataConfig, texts: Path, documents: Path, tmp_path: Path, changed: str
) -> None:
    here = replace(settings, stream=str(shutil.copytree(texts, tmp_path / "texts")))
    position = json.loads(json.dumps(feed(here).position(alone)))
    before_there_was_more = {key: position[key] for key in ("kind", "stream", "lanes", "length", "positions")}
    feed(here).seek(before_there_was_more)
    if changed == "stream_column":
        here = replace(here, stream_column="body")
    elif changed == "bad_documents":
        here = replace(here, bad_documents="skip")
        with pytest.raises(DataError, match="bad_documents stop, here skip"):
            feed(here).seek(before_there_was_more)
    elif changed == "files":
        with (tmp_path / "texts" / "train-0.jsonl").open("a") as file:
            file.write('{"text": "One more."}\n')
    else:
        other = {"tokenizer": {"train_vocab": 300}, "holdout": {"train_vocab": 320, "holdout": 0.2}}[changed]
        prepare(resolve_source([str(documents)]), tmp_path / "other", **{"holdout": 0.1, **other})
        here = replace(here, path=str(tmp_path / "other"))
    with pytest.raises(DataError, match=f"written over another stream .{changed} "):
        feed(here).seek(position)


def test_a_dataset_on_the_hub_can_be_pinned(settings: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the Hub, which cannot be reached from a test."""
    import datasets

    asked: list[Any] = []

    def load_dataset(*args: Any, **keys: Any) -> Any:
        asked.append((args, keys))
        texts = [f"Document {i} says {keys.get('revision', 'newest')}. " * 9 for i in range(40)]
        return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    newest = replace(settings, stream="some/corpus", stream_config="part")
    pinned = replace(newest, stream_revision="0a1b2c")
    stream = feed(pinned)
    assert "0a1b2c" in stream.text.encoding.decode(draw(stream, 1)[0][0])
    assert asked[-1] == (("some/corpus", "part"), {"split": "train", "streaming": True, "revision": "0a1b2c"})
    feed(pinned).seek(stream.position(alone))
    with pytest.raises(DataError, match="another stream .stream_revision 0a1b2c, here "):
        feed(newest).seek(stream.position(alone))
    draw(feed(newest), 1)
    assert "revision" not in asked[-1][1]
    for local in (settings.stream, f"{settings.stream}/*.jsonl"):
        with pytest.raises(DataError, match="stream_revision is of a dataset on the Hub, and .* names files"):
            feed(replace(settings, stream=local, stream_revision="0a1b2c"))
    with pytest.raises(ConfigError, match="name that in data.stream"):
        DataConfig(path=settings.path, stream_revision="0a1b2c")


@pytest.fixture
def damaged_texts(texts: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(texts, tmp_path / "damaged"))
    with (folder / "train-2.jsonl").open("ab") as file:
        file.write(b'{"text": "ab\xff"}\n{"text": "Document 99 is read again."}\n')
    return folder


def test_a_worker_says_in_a_line_what_it_cannot_read(settings: DataConfig, damaged_texts: Path) -> None:
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"train-2\.jsonl, line 17, byte [\d,]+: 0xff is not UTF-8") as caught:
            draw(feed(replace(settings, stream=str(damaged_texts), stream_workers=workers)), 100)
        assert "\n" not in str(caught.value)
        assert "Traceback" not in str(caught.value)


def test_a_stream_leaves_out_what_it_cannot_read_and_counts_it(settings: DataConfig, damaged_texts: Path) -> None:
    settings = replace(settings, stream=str(damaged_texts), bad_documents="skip")
    straight, half = feed(settings), feed(settings)
    windows = draw(straight, 60)
    assert draw(half, 25) == windows[:25]
    again = feed(replace(settings, stream_workers=1))
    again.seek(json.loads(json.dumps(half.position(alone))))
    assert draw(again, 35) == windows[25:]
    # It is in one lane only, once an epoch.
    counted = [reader.position(alone)["unreadable"] for reader in (straight, again)]
    assert counted[0] == counted[1] >= 2


def test_a_run_on_a_stream_resumes_bit_for_bit(settings: DataConfig, tmp_path: Path) -> None:
    loaded = load_config("tiny")
    config = replace(
        loaded,
        data=settings,
        optim=replace(loaded.optim, schedule="wsd"),
        train=replace(loaded.train, max_steps=6, batch_size=3, snapshot_first_tokens=10**9),
    )
    train(config, tmp_path / "straight")
    half = replace(config, train=replace(config.train, max_steps=3))
    train(half, tmp_path / "resumed")
    train(config, tmp_path / "resumed", resume=True)
    events = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("straight", "resumed")
    ]
    losses = [[event["loss"] for event in found if event["kind"] == "step"] for found in events]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert [event["unreadable"] for event in events[0] if event["kind"] == "checkpoint"] == [0, 0]
    # From weights alone it goes on where the stream was; and says so where that is not known.
    longer = replace(config, train=replace(config.train, max_steps=8))
    final = tmp_path / "straight" / "final"
    continue_from(final, longer, tmp_path / "taken-up")
    first, last = (
        json.loads((checkpoints(tmp_path / name)[-1] / "progress.json").read_text())
        for name in ("taken-up", "straight")
    )
    assert (first["data"], first["samples"]) == (last["data"], 18)
    (final / "progress.json").unlink()
    with pytest.raises(RunError, match="does not say where in a stream it was.*leave data.stream empty"):
        continue_from(final, longer, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.fixture
def shards(data_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(data_folder, tmp_path / "data"))


def first_shard(folder: Path) -> Path:
    return folder / "train-00000.npy"


def read_all(folder: Path) -> None:
    data = TokenData(folder, "train", 32)
    for index in range(len(data)):
        data.window(index)


@pytest.fixture
def config(shards: Path) -> RunConfig:
    loaded = load_config("tiny")
    return replace(loaded, data=replace(loaded.data, path=str(shards)))


def test_a_flipped_bit_is_found_and_placed(shards: Path) -> None:
    read_all(shards)
    content = bytearray(first_shard(shards).read_bytes())
    content[5000] ^= 1
    first_shard(shards).write_bytes(content)
    with pytest.raises(
        DataError, match=r"train-00000\.npy in .* is corrupt at byte 128 \(token 0\): the checksum of 524,288"
    ):
        read_all(shards)


def test_a_token_that_does_not_exist_is_found_where_there_are_no_checksums(shards: Path, config: RunConfig) -> None:
    manifest = json.loads((shards / MANIFEST).read_text())
    for entry in manifest["splits"]["train"]["shards"]:
        del entry["crc32"]  # as older versions wrote it
    (shards / MANIFEST).write_text(json.dumps(manifest))
    read_all(shards)
    tokens = np.load(first_shard(shards))
    tokens[1000] = 65000
    np.save(first_shard(shards), tokens)
    with pytest.raises(DataError, match=r"corrupt at byte 2,128 \(token 1,000\): token 65000, the vocabulary has 320"):
        read_all(shards)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), r"train-00000\.npy in .* is missing"),
        (
            lambda p: p.write_bytes(p.read_bytes()[:-10]),
            r"train-00000\.npy in .* ends at byte [\d,]+, it should at [\d,]+",
        ),
        (lambda p: p.write_bytes(b""), r"train-00000\.npy in .* cannot be read: its first bytes"),
        (lambda p: p.write_bytes(b"pickle" + p.read_bytes()[6:]), r"cannot be read: its first bytes"),
        (lambda p: np.save(p, np.zeros((3, 4))), r"float64 of shape \(3, 4\)"),
    ],
    ids=["missing", "cut off", "empty", "another file", "another array"],
)
def test_a_shard_that_is_not_right_is_named(shards: Path, config: RunConfig, damage: Any, message: str) -> None:
    damage(first_shard(shards))
    with pytest.raises(DataError, match=message):
        train(config, shards.parent / "run")


def test_other_data_are_refused_on_resuming(shards: Path, config: RunConfig, documents: Path, tmp_path: Path) -> None:
    config = replace(config, train=replace(config.train, max_steps=1))
    train(config, tmp_path / "run")
    prepare(resolve_source([str(documents)]), tmp_path / "other", train_vocab=320, holdout=0.2)
    other = replace(config, data=replace(config.data, path=str(tmp_path / "other")))
    with pytest.raises(DataError, match=r"written over other training data \(fingerprint .*anneal from it with --data"):
        train(replace(other, train=replace(config.train, max_steps=2)), tmp_path / "run", resume=True)


LONG = {
    "one word of a million letters": "a" * 10**6,
    "a million spaces": " " * 10**6,
    "a million line ends and a word": "\n" * 10**6 + "word",
    "every kind of space": " \t\n\u00a0\u2003" * 200_000,
    "a million words' characters": "word and " * 111_112,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG.keys())
def test_a_document_of_a_million_characters_is_a_document(data_folder: Path, text: str) -> None:
    encoding = load_tokenizer(data_folder)
    ids = encode(encoding, text)
    assert encoding.decode(ids) == text
    short = text[:9000] + "x"
    assert encode(encoding, short) == encoding.encode_ordinary(short)


def odd_documents(folder: Path) -> Path:
    good = [
        json.dumps({"text": f"Document {i} is a good one, with words enough to count. " * 5}).encode()
        for i in range(60)
    ]
    odd = [json.dumps({"text": text}).encode() for text in ("", " " * 10**6, "a" * 10**6)]
    (folder / "a.jsonl").write_bytes(b"\n".join([*good, *odd]) + b"\n")
    return folder / "a.jsonl"


def test_empty_and_endless_documents_are_prepared(tmp_path: Path) -> None:
    manifest = prepare(resolve_source([str(odd_documents(tmp_path))]), tmp_path / "out", train_vocab=300, holdout=0)
    assert manifest["progress"]["train"] == {"documents": 63, "empty": 1, "unreadable": 0}
    read_all(tmp_path / "out")


BAD = {
    "invalid UTF-8": (b'{"text": "ab\xff"}', r"a\.jsonl, line 64, byte [\d,]+: 0xff is not UTF-8"),
    "half a line": (b'{"text": "ab', r"a\.jsonl, line 64, byte [\d,]+: Invalid control character"),
    "no text": (b'{"text": null}', "document 63: column 'text' contains NoneType"),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD.keys())
def test_an_unreadable_document_stops_with_its_place_or_is_counted(tmp_path: Path, line: bytes, message: str) -> None:
    path = odd_documents(tmp_path)
    before = path.read_bytes()
    path.write_bytes(before + line + b"\n" + before)
    source = resolve_source([str(path)])
    with pytest.raises(DataError, match=message):
        prepare(source, tmp_path / "out", train_vocab=300, holdout=0)
    if "byte" in message:
        with pytest.raises(DataError) as caught:
            list(source.texts("train"))
        place = int(str(caught.value).split("byte ")[1].split(":")[0].replace(",", ""))
        assert len(before) <= place <= len(before) + len(line)
    manifest = prepare(replace(source, skip_bad=True), tmp_path / "skipped", train_vocab=300, holdout=0)
    assert manifest["progress"]["train"] == {"documents": 127, "empty": 2, "unreadable": 1}


def test_damaged_parquet_and_text_files_are_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rng = np.random.default_rng(0)
    texts = [str(rng.integers(10**9, size=40).tolist()) for _ in range(400)]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "b.parquet", row_group_size=100, compression="gzip")
    content = bytearray((tmp_path / "b.parquet").read_bytes())
    third = parquet.ParquetFile(tmp_path / "b.parquet").metadata.row_group(2).column(0).data_page_offset
    content[third - 5000 : third - 2500] = bytes(2500)
    (tmp_path / "b.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"b\.parquet, byte [\d,]+ \(row group 2\)"):
        list(resolve_source([str(tmp_path / "b.parquet")]).texts("train"))
    tolerant = replace(resolve_source([str(tmp_path / "b.parquet")]), skip_bad=True)
    assert list(tolerant.texts("train")) == [*texts[:200], *[""] * 100, *texts[300:]]
    assert [isinstance(text, Unreadable) for text in tolerant.texts("train", skip=199)][:2] == [False, True]
    with pytest.raises(DataError, match="no column 'body' in b.parquet; there are: text"):
        list(replace(tolerant, column="body").texts("train"))
    (tmp_path / "c.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"c\.parquet.*bytes\)"):
        list(resolve_source([str(tmp_path / "c.parquet")]).texts("train"))
    assert list(replace(resolve_source([str(tmp_path / "c.parquet")]), skip_bad=True).texts("train")) == [""]
    (tmp_path / "e.json").write_text('{"text": "abc"}')
    with pytest.raises(DataError, match=r"^e\.json: .*\.jsonl"):
        list(replace(resolve_source([str(tmp_path / "e.json")]), skip_bad=True).texts("train"))
    (tmp_path / "d.txt").write_bytes(b"abc \xff")
    with pytest.raises(DataError, match=r"d\.txt, byte 4: 0xff is not UTF-8"):
        list(resolve_source([str(tmp_path / "d.txt")]).texts("train"))
