"""What halting could save, and how far policies are from it, in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from haltkit.cli.grid import Column, print_grid, print_wrapped
from haltkit.cli.tables import cost_of
from haltkit.measured import LEVEL

if TYPE_CHECKING:
    from rich.console import Console

    from haltkit.comparison import Comparison
    from haltkit.comparison.against import AgainstOracle
    from haltkit.comparison.oracle import Oracle
    from haltkit.comparison.possible import Possible
    from haltkit.headroom import Auc, Definition

__all__ = ["ORACLES", "describe_auc", "describe_headroom", "oracle_of", "print_headroom", "print_regret"]

# What --oracle and --target name: see haltkit.headroom.oracles.
ORACLES = ("stable", "eps-loss", "right", "best")


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
        f"  headroom {round(known.headroom(level), 2) + 0.0:.0%}{seen}",  # no minus before a zero
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
    """Each policy's best setting against the oracle, and what is promised of settings."""
    found = result.against_oracle()
    if found:
        unit, level = result.unit if result.unit != "loss" else result.metric, result.conclusion().level
        columns = [
            Column("setting", [_setting(one) for one in found], _marks(found, f"{level:g} {unit}"), left=True),
            Column("region", [one.region for one in found]),
            Column("steps", [f"{one.steps:.1f}" for one in found]),
            Column("oracle", [f"{one.oracle:.1f}" for one in found]),
            Column(
                "fixed", [str(one.fixed) for one in found], f"fixed: the best fixed depth, {LEVEL:.0%} lose nothing"
            ),
            Column(
                "wasted", [f"{one.wasted:.1f}" for one in found], "wasted: mean steps after the prediction was final"
            ),
            Column("early", [f"{one.early:.1%}" for one in found], "early: rows halted before that"),
            Column(
                "realised",
                ["" if one.realised is None else f"{one.realised:.0%}" for one in found],
                "realised: share of the headroom, the steps from the fixed depth to the oracle, that is saved",
            ),
        ]
        console.print()
        print_grid(console, columns, title=f"Against the oracle: each policy's fastest setting within {level:g} {unit}")
    for row in result.rows:
        if row.standing:
            agrees = "" if row.agreement is None else f", agreement {row.agreement:.1%}"
            name = row.spec or row.label
            name += f" ({row.policy})" * (row.policy not in (row.spec, row.label))
            print_wrapped(console, f"{cost_of(row, result.item, name)}{agrees}; {row.standing}")


def _setting(one: AgainstOracle) -> str:
    return one.setting + " *" * (not one.good) + " +" * one.certified


def _marks(found: Sequence[AgainstOracle], level: str) -> str:
    """What the marks in the first column mean, of those that are there."""
    marks = {
        f"*: not within {level} for sure, so the policy's setting of the least loss": any(
            not one.good for one in found
        ),
        "+: certified, see below": any(one.certified for one in found),
    }
    return "; ".join(mark for mark, there in marks.items() if there)
