"""``haltkit prepare``: from text to token shards."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from haltkit.cli.terminal import passing_bar


def prepare(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Parquet, JSONL or text files, folders or patterns; or a Hugging Face dataset: OWNER/NAME or hf:NAME. "
            "[default: HuggingFaceFW/fineweb]",
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
        typer.Option(
            metavar="stop|skip",
            help="What a document that cannot be read does; skipped ones are counted. Of damaged Parquet that is a row "
            "group.",
        ),
    ] = "stop",
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens a shard.")] = 16_000_000,
) -> None:
    """Tokenize text into memory-mapped shards. Run it again to resume after an interruption."""
    from rich.console import Console
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    from haltkit.models.text.prepare import Progress as Prepared
    from haltkit.models.text.prepare import prepare as run_preparation
    from haltkit.models.text.source import resolve_source

    if train_tokenizer is not None and tokenizer is not None:
        raise ValueError(f"--tokenizer {tokenizer} contradicts --train-tokenizer {train_tokenizer}: give one of them")
    if not sources:
        sources, config = ["HuggingFaceFW/fineweb"], config or "sample-10BT"
    if bad_documents not in ("stop", "skip"):
        raise ValueError(f"--bad-documents {bad_documents}: allowed are stop and skip")
    out = out.expanduser()
    source = replace(resolve_source(sources, config, column), skip_bad=bad_documents == "skip")
    # What the readers of `datasets` log beside the exception that they raise is said again in haltkit's one line.
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with passing_bar(console, *columns) as bar:
        task = bar.add_task(f"opening {source.name}")

        def show(progress: Prepared) -> None:
            bar.update(
                task,
                description=f"{progress.stage}: {progress.documents:,} documents, {progress.tokens:,} tokens in all",
            )

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
    vocabulary = manifest["tokenizer"]["vocab_size"]
    splits = manifest["splits"]
    total = sum(entry["tokens"] for entry in splits.values())
    for split, entry in splits.items():
        console.print(
            f"{split}: {entry['tokens']:,} tokens ({entry['tokens'] / total:.2%}), {entry['documents']:,} documents, "
            f"{len(entry['shards'])} shards"
        )
    if "validation" not in splits and holdout:
        console.print(
            "validation: nothing is held out, for documents are not divided and these are too few. Training needs "
            "some: give more documents, or two files of which one is named train... and the other validation...",
            soft_wrap=True,
        )
    for split, done in manifest["progress"].items():
        if left_out := [f"{done[kind]:,} {kind}" for kind in ("empty", "unreadable") if done.get(kind)]:
            console.print(f"{split}: left out {' and '.join(left_out)} documents")
    console.print(f"{out}: tokenizer {manifest['tokenizer']['name']}, vocabulary {vocabulary:,}", highlight=False)
