"""``haltkit export``: a checkpoint of a run as a folder to use and to share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from haltkit.cli.terminal import make_console, progress, say


def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder, for its best checkpoint, or one of those.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
) -> None:
    """Make a checkpoint folder (bf16 weights, tokenizer, model card) of a run's checkpoint, also of one in shards."""
    with progress("exporting"):
        from haltkit.models.training.export import export as write

        found = write(source.expanduser(), out.expanduser())
    say(make_console(), f"{out}: {found.name}, for haltkit eval, compare and generate")
