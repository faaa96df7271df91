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
    table = Table(title="Policies", caption="tau has no default: each model has its own scale; see haltkit compare")
    for heading, ratio in (("name", 2), ("halts when it is below tau", 6), ("scale", 5), ("keys (defaults)", 5)):
        table.add_column(heading, ratio=ratio, overflow="fold")
    for name in registry.known_names():
        cls = registry.policy_class(name)
        hints = typing.get_type_hints(cls)
        keys = []
        for field in dataclasses.fields(cls):
            allowed = typing.get_args(hints[field.name])
            default = "required" if field.default is dataclasses.MISSING else str(field.default)
            keys.append(f"{field.name} ({default}{'' if not allowed else ' of ' + '|'.join(map(str, allowed))})")
        if getattr(cls, "patience", 1) != 1:
            keys.append(f"patience ({cls.patience})")
        formula = getattr(cls, "formula", "") or (cls.__doc__ or "").strip().split("\n")[0]
        table.add_row(*(Text(cell) for cell in (name, formula, getattr(cls, "scale", ""), ", ".join(keys))))
    console.print(table)

    shared = Table(title="Keys that every policy takes (fixed takes none)")
    shared.add_column("key")
    shared.add_column("what it does (default)", overflow="fold")
    for key, meaning in registry.WRAPPER_KEYS.items():
        shared.add_row(key, Text(meaning))
    console.print(shared)
    console.print(
        Text(
            "Write name:key=value,key=value; combine as any(a|b) and all(a|b); give each region its own as "
            "region=spec;region=spec; use a class of your own as pkg.mod:Class."
        )
    )
