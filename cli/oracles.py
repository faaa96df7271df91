"""What halting could save, and how far policies are from it, in the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

from haltkit.cli.grid import Column, print_grid, print_wrapped

if TYPE_CHECKING:
    from rich.console import Console

    from haltkit.comparison import Comparison, Row
    from haltkit.comparison.oracle import Oracle
    from haltkit.comparison.possible import Possible
    from haltkit.headroom import Auc, Definition

__all__ = ["LEVEL", "ORACLES", "describe_auc", "describe_headroom", "oracle_of", "print_headroom", "print_regret"]

# What --oracle and --target name: see haltkit.headroom.oracles.
ORACLES = ("stable", "eps-loss", "right", "best")

# The share of rows on which the fixed depth that headroom is measured against may lose nothing.
LEVEL = 0.99


def oracle_of(definition: str, epsilon: float | None) -> Oracle:
    """The oracle that the options name.

    Raises:
        ValueError: an unknown definition, or an epsilon for one that has none.
    """
    from haltkit.comparison.oracle import Oracle

    if epsilon is not None and definition != "eps-loss" and definition in ORACLES:
        raise ValueError(f"--epsilon is for eps-loss, and {definition} has none")
    return Oracle(cast("Definition", definition), epsilon)


def describe_auc(area: Auc, digits: int = 2) -> str:
    """An area under the curve with its standard error, as far as they are defined."""
    if math.isnan(area.value):
        return "not defined, for all rows have settled by then, or none has"
    if math.isnan(area.error):
        return f"{area.value:.{digits}f} (error not known: give more sequences)"
    return f"{area.value:.{digits}f} ± {area.error:.{digits}f}"


def describe_headroom(name: str, region: Possible, level: float = LEVEL) -> list[str]:
    """A region's headroom in three lines."""
    known, best = region.headroom, region.best_signal()
    error = "" if known.error is None else f" ± {known.error:.2f}"
    seen = ""
    if best is not None:
        seen = f"; at step {region.step} {best[0]} tells settled rows with AUC {describe_auc(best[1])}"
    lose = "that of the least loss" if known.definition == "best" else f"{100 * level:.6g}% of which lose nothing"
    missing = f"; {known.undefined:,} rows have no oracle depth" if known.undefined else ""
    return [
        f"{name}: oracle {known.mean_depth:.2f}{error} steps, best fixed depth {known.fixed_depth(level)} (on "
        f"{known.rows:,} rows, {lose}{missing})",
        f"  headroom {known.headroom(level):.0%}{seen}",
        f"  {region.conclusion(level)}",
    ]


def print_headroom(console: Console, result: Comparison) -> None:
    """What halting could save at best, before any policy."""
    print_wrapped(console, "Headroom: what an oracle would save that halts every row once its prediction is final")
    if not result.headroom:
        print_wrapped(console, f"  not known: {result.no_headroom}")
    for name, region in result.headroom.items():
        for line in describe_headroom(name, region):
            print_wrapped(console, f"  {line}")
    console.print()


def print_regret(console: Console, result: Comparison) -> None:
    """Each policy's fastest setting of the winner's quality against the oracle, and what is promised of settings."""
    concluded = result.conclusion()
    chosen = [f.best for f in concluded.findings if f.kind == "loss" and f.level == concluded.level and f.best]
    found = [(row.label, name, cells) for row in chosen for name, cells in _against(result, row)]
    if found:
        unit = result.unit if result.unit != "loss" else result.metric
        numbers = zip(*(cells for _, _, cells in found), strict=True)
        console.print()
        print_grid(
            console,
            [
                Column("setting", [label for label, _, _ in found], left=True),
                Column("region", [name for _, name, _ in found]),
                *(Column(name, cells, note) for (name, note), cells in zip(_NUMBERS.items(), numbers, strict=True)),
            ],
            title=f"Against the oracle, within {concluded.level:g} {unit}",
        )
    for row in result.rows:
        if row.standing:
            print_wrapped(console, f"{row.spec or row.label}: {row.standing}")


# What is told of a policy against the oracle, and what it means.
_NUMBERS = {
    "steps": "",
    "oracle": "",
    "wasted": "wasted: mean steps after the prediction was final",
    "early": "early: rows halted before that",
    "realised": "realised: share saved of the steps between the best fixed depth and the oracle",
}


def _against(result: Comparison, row: Row) -> list[tuple[str, list[str]]]:
    from haltkit.headroom import realised

    found = []
    for name, regret in row.regret.items():
        known = result.headroom[name].headroom
        share = realised(regret.steps, known, LEVEL)
        numbers = [f"{regret.steps:.1f}", f"{known.mean_depth:.1f}", f"{regret.wasted:.1f}", f"{regret.early:.1%}"]
        found.append((name, [*numbers, "" if share is None else f"{share:.0%}"]))
    return found
