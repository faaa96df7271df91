"""Options and arguments that several commands share, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from haltkit.protocol import HaltingPolicy

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
    "among",
    "bundled_names",
    "check_policies",
    "chosen_model",
    "describe_dtype",
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
MOST_STEPS = 1_000_000
MaxLoops = Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Full depth: the budget of each region.")]
Repeats = Annotated[int, typer.Option(min=1, help="Interleaved timing repeats.")]
JsonPath = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Write the results as JSON; -: to standard output, and nothing else there."
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


def check_policies(text: str | None) -> bool:
    """Refuse a list of policies that cannot be read, before a model is.

    Returns:
        whether any of them has weights in a file.

    Raises:
        ValueError: a bad spec, or a card that is not there.
    """
    if text is None:
        return False
    from haltkit.attachment.saved import load_card
    from haltkit.card import is_card
    from haltkit.specs import files_of, parse_choice, parse_choices

    found = [load_card(item).choice if is_card(item) else parse_choice(item) for item in parse_choices(text)]
    return any(map(files_of, found))


def read_policies(
    text: str, model: nn.Module, regions: Sequence[str], full_depth: int
) -> dict[str, HaltingPolicy[Any]]:
    """The policy of each region: from a spec, ``region=spec;region=spec``, or the path of a saved choice.

    Raises:
        ValueError: a bad spec, an unknown region, or a card that is not there, is another model's, or whose certificate
            is about other weights, another dtype or another full depth.
    """
    from haltkit.attachment.saved import load_card
    from haltkit.card import is_card
    from haltkit.specs import policy_for_regions

    if not is_card(text):
        return policy_for_regions(text, regions)
    card = load_card(text)
    card.check(model, regions, full_depth)
    return card.policies(regions)


def describe_dtype(model: nn.Module) -> str:
    """The dtype of a model's weights by name; empty where it has none."""
    parameter: torch.nn.Parameter | None = next(model.parameters(), None)
    return "" if parameter is None else str(parameter.dtype).removeprefix("torch.")
