"""``haltkit policies``: what can be written in a spec."""

from __future__ import annotations

import dataclasses
import typing


def policies() -> None:
    """List the halting policies: formula, scale of the signal, keys and defaults."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from haltkit import registry

    console = Console()

    def listing(title: str, entries: typing.Iterable[tuple[str, typing.Iterable[str]]]) -> None:
        console.print(Text(title, style="bold"))
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True, style="bold cyan")
        grid.add_column(overflow="fold")
        for name, lines in entries:
            for label, line in zip((f"  {name}", "", ""), lines, strict=False):
                grid.add_row(label, Text(line))
        console.print(grid)
        console.print()

    listing("Policies: a row halts when its signal is below tau", ((n, _describe(n)) for n in registry.known_names()))
    listing(
        "Keys that every policy takes, fixed excepted",
        ((key, (meaning,)) for key, meaning in registry.WRAPPER_KEYS.items()),
    )
    listing(
        "Combinations, and policies of your own",
        (
            ("any(a|b)", ("halts when one of them does",)),
            ("all(a|b)", ("halts when all do at the same step",)),
            ("r=a;s=b", ("region r by policy a, region s by policy b",)),
            ("pkg.mod:Class", ("a frozen dataclass of yours; installed packages may add names of their own",)),
        ),
    )
    console.print(Text("tau has no default, because each model has a scale of its own: haltkit compare finds one."))


def _describe(name: str) -> tuple[str, str, str]:
    """Formula, scale and keys of one policy."""
    from haltkit import registry

    cls = registry.policy_class(name)
    hints = typing.get_type_hints(cls)
    keys = []
    for field in dataclasses.fields(cls):
        allowed = "|".join(map(str, typing.get_args(hints[field.name])))
        default = "required" if field.default is dataclasses.MISSING else str(field.default)
        keys.append(f"{field.name} ({default}{f', of {allowed}' if allowed else ''})")
    if getattr(cls, "patience", 1) != 1:
        keys.append(f"patience ({cls.patience})")
    formula = getattr(cls, "formula", "") or (cls.__doc__ or "").strip().split("\n")[0]
    return formula, f"scale: {getattr(cls, 'scale', 'its own')}", f"keys: {', '.join(keys)}"
