"""``haltkit policies``: what can be written in a spec."""

from __future__ import annotations

import dataclasses
import typing

from haltkit.cli.grid import print_wrapped
from haltkit.cli.options import JsonPath
from haltkit.cli.terminal import check_writable, make_console, write_results

if typing.TYPE_CHECKING:
    from haltkit.registry import PolicyRecord

NARROW = 60  # columns below which what is said of a name stands below it


def policies(json_path: JsonPath = None) -> None:
    """List the halting policies: formula, scale of the signal, keys and defaults, source."""
    from rich.table import Table
    from rich.text import Text

    from haltkit.registry import records
    from haltkit.specs import WRAPPER_KEYS

    json_path = check_writable(json_path)
    console = make_console(json_path)

    def listing(title: str, entries: typing.Iterable[tuple[str, typing.Iterable[str]]]) -> None:
        console.print(Text(title, style="bold"))
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True, style="bold cyan")
        grid.add_column(overflow="fold")
        for name, lines in entries:
            if console.width < NARROW:
                console.print(Text(f"  {name}", style="bold cyan"))
                for line in lines:
                    print_wrapped(console, f"    {line}")
                continue
            for label, line in zip((f"  {name}", *[""] * 9), lines, strict=False):
                grid.add_row(label, Text(line))
        if grid.row_count:
            console.print(grid)
        console.print()

    listing(
        "Policies: a row halts when its signal is below tau", ((record.name, _describe(record)) for record in records())
    )
    plain = [record.name for record in records() if not record.wrapped]
    listing(
        f"Keys that every policy takes, {', '.join(plain)} excepted",
        ((key, (meaning,)) for key, meaning in WRAPPER_KEYS.items()),
    )
    listing(
        "Combinations, and policies of your own",
        (
            ("any(a|b)", ("halts when one of them does",)),
            ("all(a|b)", ("halts when all do at the same step",)),
            ("r=a;s=b", ("region r by policy a, region s by policy b",)),
            ("pkg.mod:Class", ("a frozen dataclass of yours; haltkit.register gives it a name and a place here",)),
        ),
    )
    console.print(Text("tau has no default, because each model has a scale of its own: haltkit compare finds one."))
    found = {record.name: _values(record) for record in records()}
    write_results(console, json_path, {"policies": found, "keys": dict(WRAPPER_KEYS)})


def _keys(record: PolicyRecord) -> dict[str, str]:
    """What each key of a policy's specs may be."""
    from haltkit.weights import is_weights

    hints = typing.get_type_hints(record.policy)
    keys = {}
    for name, field in record.fields.items():
        if is_weights(hints[name]):
            required = "required" if field.default is dataclasses.MISSING else "optional"
            keys[name] = f"{required}, a safetensors file"
            continue
        allowed = "|".join(map(str, typing.get_args(hints[name])))
        default = "required" if field.default is dataclasses.MISSING else str(field.default)
        keys[name] = default + (f", of {allowed}" if allowed else "")
    if record.patience != 1:
        keys["patience"] = str(record.patience)
    return keys


def _values(record: PolicyRecord) -> dict[str, typing.Any]:
    """What the listing says, as plain values."""
    told = ("formula", "scale", "source", "wrapped", "swept", "needs_readout")
    return {**{name: getattr(record, name) for name in told}, "keys": _keys(record)}


def _describe(record: PolicyRecord) -> list[str]:
    """Formula, scale, keys and source of one policy, and what else its record says."""
    notes = ["swept by haltkit compare by default"] if record.swept else []
    notes += ["needs a readout from the state to logits"] if record.needs_readout else []
    return [
        record.formula,
        f"scale: {record.scale}",
        f"keys: {', '.join(f'{name} ({values})' for name, values in _keys(record).items())}",
        *([f"source: {record.source}"] if record.source else []),
        *([f"note: {'; '.join(notes)}"] if notes else []),
    ]
