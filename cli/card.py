"""``haltkit card``: a card as a section for a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def card(path: Annotated[Path, typer.Argument(metavar="CARD", help="A card's file or folder.")]) -> None:
    """Print what a card says in Markdown: the policy, what is promised of it, and on which model."""
    from haltkit.card import Card

    print(Card.load(path).to_markdown(), end="")
