"""``haltkit prepare``: from text to token shards."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from haltkit.cli.options import JsonPath, among
from haltkit.cli.terminal import check_writable, make_console, progress, say, write_results


def prepare(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE",
            help="Parquet, JSONL or text files, folders or patterns; or a Hugging Face dataset: OWNER/NAME or hf:NAME. "
            "\\[default: HuggingFaceFW/fineweb]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the shards and their manifest.")] = Path("data"),
    config: Annotated[
        str | None,
        typer.Option(help="The dataset's configuration. [default: sample-10BT for FineWeb]", show_default=False),
    ] = None,
    column: Annotated[str, typer.Option(help="Column that contains the text.")] = "text",
    tokenizer: Annotated[
        str | None,
        typer.Option(help="gpt2, a .tiktoken file, or a folder with one. [default: gpt2]", show_default=False),
    ] = None,
    train_tokenizer: Annotated[
        int | None, typer.Option(metavar="SIZE", help="Train a byte-level BPE with this vocabulary size instead.")
    ] = None,
    holdout: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of documents for validation, if the source has no such split.")
    ] = 0.01,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens to prepare.")] = None,
    bad_documents: Annotated[
        str,
        among(
            "stop|skip",
            "What a document that cannot be read does; skipped ones are counted. Of damaged Parquet that is a row "
            "group.",
        ),
    ] = "stop",
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens a shard.")] = 16_000_000,
    json_path: JsonPath = None,
) -> None:
    """Tokenize text into memory-mapped shards. Run it again to resume after an interruption."""
    from haltkit.models.text.prepare import Progress as Prepared
    from haltkit.models.text.prepare import prepare as run_preparation
    from haltkit.models.text.source import resolve_source

    if train_tokenizer is not None and tokenizer is not None:
        raise ValueError(f"--tokenizer {tokenizer} contradicts --train-tokenizer {train_tokenizer}: give one of them")
    if not sources:
        sources, config = ["HuggingFaceFW/fineweb"], config or "sample-10BT"
    if bad_documents not in ("stop", "skip"):
        raise ValueError(f"--bad-documents {bad_documents}: allowed are stop and skip")
    json_path = check_writable(json_path)
    out = out.expanduser()
    source = replace(resolve_source(sources, config, column), skip_bad=bad_documents == "skip")
    # What the readers of `datasets` log beside the exception that they raise is said again in haltkit's one line.
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    with progress(f"opening {source.name}") as tick:

        def show(at: Prepared) -> None:
            tick(description=f"{at.stage}: {at.documents:,} documents, {at.tokens:,} tokens in all")

        manifest = run_preparation(
            source,
            out,
            tokenizer=tokenizer or "gpt2",
            train_vocab=train_tokenizer,
            holdout=holdout,
            shard_tokens=shard_tokens,
            max_tokens=max_tokens,
            on_progress=show,
        )
    console, vocabulary = make_console(json_path), manifest["tokenizer"]["vocab_size"]
    splits = manifest["splits"]
    total = sum(entry["tokens"] for entry in splits.values())
    for split, entry in splits.items():
        say(
            console,
            f"{split}: {entry['tokens']:,} tokens ({entry['tokens'] / total:.2%}), {entry['documents']:,} documents, "
            f"{len(entry['shards'])} shards",
        )
    if "validation" not in splits and holdout:
        say(
            console,
            "validation: nothing is held out, for documents are not divided and these are too few. Training needs "
            "some: give more documents, or two files of which one is named train... and the other validation...",
        )
    left_out = {
        split: {kind: done[kind] for kind in ("empty", "unreadable") if done.get(kind)}
        for split, done in manifest["progress"].items()
    }
    for split, counts in left_out.items():
        if counts:
            say(console, f"{split}: left out {' and '.join(f'{n:,} {kind}' for kind, n in counts.items())} documents")
    say(console, f"{out}: tokenizer {manifest['tokenizer']['name']}, vocabulary {vocabulary:,}")
    counted = {
        split: {"tokens": entry["tokens"], "documents": entry["documents"], "shards": len(entry["shards"])}
        for split, entry in splits.items()
    }
    results = {"out": str(out), "tokenizer": manifest["tokenizer"], "splits": counted, "left_out": left_out}
    write_results(console, json_path, {**results, "shares": {s: e["tokens"] / total for s, e in splits.items()}})
