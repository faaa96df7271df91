"""``haltkit export``: a checkpoint of a run as a folder to use and to share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder, for its best checkpoint, or one of those.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
) -> None:
    """Make a checkpoint folder (bf16 weights, tokenizer, model card) of a run's checkpoint, also of one in shards."""
    from rich.console import Console

    from haltkit.models.training.export import export as write

    found = write(source.expanduser(), out.expanduser())
    Console().print(f"{out}: {found.name}, for haltkit eval, compare and generate", highlight=False, soft_wrap=True)
