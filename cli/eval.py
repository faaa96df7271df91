"""``haltkit eval``: held-out loss of a checkpoint at any loop count or policy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from haltkit.cli.device import Device, choose_device


def evaluate(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder. [default: the bundled one]", show_default=False)
    ] = None,
    loops: Annotated[
        str, typer.Option(metavar="LIST", help="Loop counts, the same in every region; empty for none.")
    ] = "1,4,12,32",
    policy: Annotated[
        list[str] | None, typer.Option(metavar="SPEC", help="A policy with its tau; may be given several times.")
    ] = None,
    max_loops: Annotated[int, typer.Option(min=1, help="A policy's budget in each region.")] = 32,
    data: Annotated[
        Path | None, typer.Option(help="Folder made by 'haltkit prepare' with the checkpoint's tokenizer.")
    ] = None,
    split: Annotated[str, typer.Option(help="The split of --data.")] = "validation",
    text: Annotated[
        Path | None, typer.Option(help="Text file instead. [default: the bundled held-out sample]", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to evaluate on.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a batch.")] = 8,
    device: Device = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON.")] = None,
) -> None:
    """Held-out loss of a checkpoint at fixed loop counts and under halting policies."""
    import torch
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from haltkit.models import comparing
    from haltkit.models.checkpoint import BUNDLED, load_checkpoint
    from haltkit.models.data import DataError, TokenData
    from haltkit.models.evaluate import evaluate as measure
    from haltkit.models.files import write_json
    from haltkit.registry import policy_for_regions

    if data is not None and text is not None:
        raise ValueError(f"--data {data} and --text {text}: give one of them")
    settings: list[int | str] = [*_counts(loops), *(policy or [])]
    if not settings:
        raise ValueError("nothing to evaluate: give --loops or --policy")
    loaded = load_checkpoint(checkpoint or BUNDLED, device=choose_device(device))
    regions = list(loaded.model.regions)
    if not regions and policy:
        raise ValueError(f"{str(checkpoint)!r} is a model without looped regions: there is nothing to halt")
    for spec in policy or []:
        policy_for_regions(spec, regions)  # a mistake shows before anything is computed
    if data is not None:
        shards = TokenData(data, split, loaded.config.block_size)
        if shards.vocab_size != loaded.tokenizer.n_vocab:
            raise DataError(
                f"{str(data)!r} was prepared with {shards.vocab_size} tokens, the checkpoint's tokenizer has "
                f"{loaded.tokenizer.n_vocab}: prepare it with --tokenizer {checkpoint or BUNDLED}"
            )
        windows = shards.spread(max(1, tokens // loaded.config.block_size)).to(loaded.model.wte.weight.device)
        source = f"{data}, {split}"
    else:
        windows = comparing.text_windows(loaded, text or comparing.SAMPLE, tokens)
        source = str(text) if text else "bundled sample"
    batches = torch.split(windows, batch)

    table = Table(
        title=f"{checkpoint or 'bundled checkpoint'}, {windows[:, 1:].numel():,} tokens of {source}", box=None,
        pad_edge=False, padding=(0, 2, 0, 0), title_justify="left",
    )  # fmt: skip
    table.add_column("setting", overflow="fold")
    for heading in ("CE (nats)", "PPL", *(f"steps {name}" for name in regions)):
        table.add_column(heading, justify="right", no_wrap=True)
    results = []
    for setting in settings if regions else settings[:1]:
        found = measure(loaded.model, batches, setting, max_loops)
        label = (
            setting if isinstance(setting, str) else f"{setting} loop{'s' * (setting > 1)}" if regions else "no loops"
        )
        results.append({"setting": label, "loss": found.loss, "steps": found.steps})
        table.add_row(
            Text(label), f"{found.loss:.4f}", f"{math.exp(found.loss):.1f}", *(f"{n:.1f}" for n in found.steps.values())
        )
    Console().print(table)
    if json_path is not None:
        about = {"checkpoint": str(checkpoint or "bundled"), "text": source, "tokens": windows[:, 1:].numel()}
        write_json(json_path, {**about, "max_loops": max_loops, "trained": loaded.trained, "results": results})


def _counts(loops: str) -> list[int]:
    counts = []
    for item in filter(None, loops.split(",")):
        if not item.strip().isdigit() or int(item) < 1:
            raise ValueError(f"--loops {loops}: {item!r} is not a positive number")
        counts.append(int(item))
    return counts
