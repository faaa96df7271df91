"""Options and arguments that several commands share, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from torch import nn

    from haltkit.card import Card
    from haltkit.protocol import HaltingPolicy
    from haltkit.standing import Standing

__all__ = [
    "MOST_STEPS",
    "Data",
    "JsonPath",
    "MaxLoops",
    "Model",
    "ModelOption",
    "OldCheckpoint",
    "OldModel",
    "Repeats",
    "Text",
    "WithoutCertificate",
    "among",
    "bundled_names",
    "check_waiver",
    "chosen_model",
    "describe_dtype",
    "given_policies",
    "have_weights",
    "read_policies",
    "read_thresholds",
    "seed_option",
]

_MODEL = (
    "A bundled model by name (text, chase, sudoku), a checkpoint folder, or pkg.mod:function returning a Subject. "
    "\\[default: text]"
)


def among(values: str, help: str) -> Any:
    """An option with these values, which the shell completes.

    Args:
        values: separated by ``|``, as help shows them; with a capital: whatever the word stands for.
        help: what the option is for.
    """
    named = [value for value in (one.partition("[")[0] for one in values.split("|")) if value.islower()]

    def offered(incomplete: str) -> list[str]:
        return [value for value in named if value.startswith(incomplete)]

    return typer.Option(metavar=values, help=help, autocompletion=offered, show_default="\\[default" not in help)


def seed_option(help: str) -> Any:
    """An option for a seed that every generator of random numbers takes."""
    return typer.Option(min=0, max=2**63 - 1, help=help)


def bundled_names(incomplete: str) -> list[str]:
    """The bundled models, for the shell's completion."""
    return [name for name in ("text", "chase", "sudoku") if name.startswith(incomplete)]


Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False, autocompletion=bundled_names)
]
ModelOption = Annotated[str | None, typer.Option("--model", metavar="MODEL", help=_MODEL, show_default=False)]
# What MODEL was called before: it keeps working.
OldCheckpoint = Annotated[
    str | None, typer.Option("--checkpoint", metavar="DIR", help="The same as MODEL.", hidden=True)
]
OldModel = Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The same as MODEL.", hidden=True)]
Text = Annotated[
    Path | None, typer.Option(help="Text file. \\[default: the bundled held-out sample]", show_default=False)
]
Data = Annotated[Path | None, typer.Option(help="Folder made by 'haltkit prepare' with the checkpoint's tokenizer.")]
Draw = Annotated[
    int,
    typer.Option(
        min=0, max=2**63 - 1, help="Other sequences of a reasoner's task, drawn alike; 0: those that all commands take."
    ),
]
MOST_STEPS = 1_000_000
MaxLoops = Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Full depth: the budget of each region.")]
Repeats = Annotated[int, typer.Option(min=1, help="Interleaved timing repeats.")]
JsonPath = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Write the results as JSON; -: to standard output, and nothing else there."
    ),
]
WithoutCertificate = Annotated[
    bool,
    typer.Option(
        "--without-certificate",
        help="Use cards also on other weights, another dtype or full depth than they are about: without their "
        "certificates, which every output then says.",
    ),
]


def chosen_model(model: str | None, checkpoint: str | None = None, old_model: str | None = None) -> str | None:
    """The model asked for, by its argument or by an option of old.

    Raises:
        ValueError: it is given more than once.
    """
    given = {"MODEL": model, "--checkpoint": checkpoint, "--model": old_model}
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} both name the model: give MODEL alone")
    return next(iter(named.values()), None)


def read_thresholds(taus: str) -> str | list[float]:
    """The thresholds of a sweep: ``paper``, ``auto``, ``both``, or numbers.

    Raises:
        ValueError: neither, or a number that is no threshold.
    """
    if taus in ("paper", "auto", "both"):
        return taus
    from haltkit.protocol import check_tau

    values = []
    for item in taus.split(","):
        try:
            values.append(float(item))
        except ValueError:
            raise ValueError(f"--taus {taus}: {item!r} is neither a number nor one of paper, auto, both") from None
        check_tau(values[-1])
    return values


def given_policies(text: str, without_certificate: bool) -> list[str | Card]:
    """The policies of a list, as far as they can be read before a model is: specs as they stand, and cards.

    Raises:
        ValueError: a bad spec, a card that cannot be read, or ``--without-certificate`` where nothing is a card.
    """
    from haltkit.attachment.saved import card_at
    from haltkit.specs import parse_choice, parse_choices

    given = [card_at(item, without_certificate) or item for item in parse_choices(text)]
    for item in given:
        if isinstance(item, str):
            parse_choice(item)
    check_waiver(without_certificate, parse_choices(text))
    return given


def check_waiver(without_certificate: bool, policies: Iterable[str | None]) -> None:
    """Refuse ``--without-certificate`` where it would be ignored.

    Raises:
        ValueError: none of the policies is a card.
    """
    from haltkit.card import is_card

    if without_certificate and not any(is_card(one) for one in policies if one is not None):
        raise ValueError("--without-certificate is for cards, and no policy here is one: leave it out")


def have_weights(given: Iterable[str | Card]) -> bool:
    """Whether any of the policies has weights in a file."""
    from haltkit.specs import files_of, parse_choice

    return any(files_of(parse_choice(item) if isinstance(item, str) else item.choice) for item in given)


def read_policies(
    text: str, model: nn.Module, regions: Sequence[str], full_depth: int, without_certificate: bool = False
) -> tuple[dict[str, HaltingPolicy[Any]], Standing]:
    """The policy of each region: from a spec, ``region=spec;region=spec``, or the path of a card.

    Returns:
        the policies, and what is promised of them or what they are used without.

    Raises:
        ValueError: a bad spec, an unknown region, or a card that is not there, is another model's, or whose certificate
            is about other weights, another dtype or another full depth, unless it is used without.
    """
    from haltkit.attachment.saved import card_at
    from haltkit.specs import policy_for_regions
    from haltkit.standing import PLAIN

    card = card_at(text, without_certificate)
    if card is None:
        return policy_for_regions(text, regions), PLAIN
    standing = card.check(model, regions, full_depth)
    return card.policies(regions), standing


def describe_dtype(model: nn.Module) -> str:
    """The dtype of a model's weights by name; empty where it has none."""
    parameter: torch.nn.Parameter | None = next(model.parameters(), None)
    return "" if parameter is None else str(parameter.dtype).removeprefix("torch.")
