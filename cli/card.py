"""``haltkit card``: a card as a section for a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from haltkit.cli.options import JsonPath
from haltkit.cli.terminal import check_writable, make_console, say, write_results


def card(
    path: Annotated[Path, typer.Argument(metavar="CARD", help="A card's file or folder.")],
    json_path: JsonPath = None,
) -> None:
    """Print what a card says in Markdown: the policy, what is promised of it, and on which model."""
    from haltkit.card import Card

    json_path = check_writable(json_path)
    found, console = Card.load(path), make_console(json_path)
    say(console, found.to_markdown().removesuffix("\n"))
    write_results(console, json_path, {name: value for name, value in vars(found).items() if name != "folder"})
