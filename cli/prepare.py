"""``haltkit prepare``: from text to token shards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer


def prepare(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="A Hugging Face dataset, or Parquet, JSONL or text files, folders or patterns. "
            "[default: HuggingFaceFW/fineweb]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the shards and their manifest.")] = Path("data"),
    config: Annotated[
        str | None,
        typer.Option(help="The dataset's configuration. [default: sample-10BT for FineWeb]", show_default=False),
    ] = None,
    column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
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
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after so many tokens.")] = None,
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
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from haltkit.models import prepare as preparing

    if train_tokenizer is not None and tokenizer is not None:
        raise ValueError(f"--tokenizer {tokenizer} contradicts --train-tokenizer {train_tokenizer}: give one of them")
    if not sources:
        sources, config = ["HuggingFaceFW/fineweb"], config or "sample-10BT"
    if bad_documents not in ("stop", "skip"):
        raise ValueError(f"--bad-documents {bad_documents}: allowed are stop and skip")
    source = replace(preparing.resolve_source(sources, config, column), skip_bad=bad_documents == "skip")
    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"opening {source.name}")

        def show(progress: preparing.Progress) -> None:
            bar.update(
                task,
                description=f"{progress.stage}: {progress.documents:,} documents, {progress.tokens:,} tokens in all",
            )

        manifest = preparing.prepare(
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
    for split, entry in manifest["splits"].items():
        console.print(
            f"{split}: {entry['tokens']:,} tokens, {entry['documents']:,} documents, {len(entry['shards'])} shards"
        )
    for split, done in manifest["progress"].items():
        if left_out := [f"{done[kind]:,} {kind}" for kind in ("empty", "unreadable") if done.get(kind)]:
            console.print(f"{split}: left out {' and '.join(left_out)} documents")
    console.print(f"{out}: tokenizer {manifest['tokenizer']['name']}, vocabulary {vocabulary:,}", highlight=False)
