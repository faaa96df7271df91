"""Results in the terminal: a comparison and the claims of a diagnosis, as tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from haltkit.cli.grid import Column, print_grid, print_wrapped

if TYPE_CHECKING:
    from rich.console import Console

    from haltkit.comparison import Comparison, Row
    from haltkit.diagnostics import Diagnosis

__all__ = ["comparison_title", "cost_of", "number_of", "print_claims", "print_comparison", "unit_of"]


def comparison_title(result: Comparison) -> str:
    """What was compared on what."""
    about = result.about
    text = about.get("text")
    return f"{about.get('model', 'model')}, {result.items:,} {result.item}s" + (f" of {text}" if text else "")


def cost_of(row: Row, item: str, name: str = "") -> str:
    """A setting, by its label or another name, and its time."""
    return f"{name or row.label}: {row.ms:.3f} ms/{item}, {row.speedup:.2f}x full depth"


def number_of(result: Comparison, value: float, sign: str = "") -> str:
    """A loss, or a difference of losses."""
    return f"{value:{sign}.4f}" if result.unit == "nats" else f"{value:{sign}.3g}"


def unit_of(result: Comparison) -> str:
    """Of a difference: the unit where there is one, else what is measured."""
    return f"of {result.metric}" if result.unit == "loss" else result.unit


def print_comparison(console: Console, result: Comparison) -> None:
    """The table, a row per setting; a narrow terminal gets fewer columns, or blocks."""
    from haltkit.comparison import within

    rows, middle = result.rows, result.conclusion().level
    delta, time = "delta (nats)" if result.unit == "nats" else "delta", f"ms/{result.item}"
    good = f"within {middle:g}"
    deltas = [number_of(result, row.delta, "+") for row in rows]
    errors = [number_of(result, row.delta_se) if math.isfinite(row.delta_se) else "?" for row in rows]
    times, spreads = [f"{row.ms:.3f}" for row in rows], [_spread(row) for row in rows]
    columns = [
        Column("setting", [row.label for row in rows], left=True),
        Column(result.metric, [number_of(result, row.loss) for row in rows], spare=result.metric),
        Column("PPL", ["" if row.perplexity is None else f"{row.perplexity:.1f}" for row in rows], spare="PPL"),
        Column(
            delta,
            [f"{value} ±{error}" for value, error in zip(deltas, errors, strict=True)],
            f"delta: {result.metric} above full depth ± its standard error",
            spare="standard errors",
            instead=Column(delta, deltas, f"delta: {result.metric} above full depth"),
        ),
        Column(
            "KL to full",
            ["" if row.kl_to_full is None else f"{row.kl_to_full:.1e}" for row in rows],
            spare="KL to full",
        ),
        Column(
            "agree",
            ["" if row.agreement is None else f"{row.agreement:.1%}" for row in rows],
            "agree: top prediction as at full depth",
            spare="agreement",
        ),
        Column(
            "steps",
            [" ".join(f"{row.steps[name]:.1f}" for name in result.regions) for row in rows],
            "steps: mean by region",
        ),
        Column(
            "halted",
            [f"{row.outcomes['CONVERGED']:.0%}" if row.outcomes else "" for row in rows],
            "halted: by the policy, not by the budget",
            spare="share halted",
        ),
        Column(
            time,
            [f"{value} ±{spread}" for value, spread in zip(times, spreads, strict=True)],
            f"{time}: wall clock, median of the repeats ± half their range",
            spare="spread of times",
            instead=Column(time, times, f"{time}: wall clock, median of the repeats"),
        ),
        Column("speed", [f"{row.speedup:.2f}x" for row in rows], "speed: times full depth"),
        Column(good, [within(row, middle) for row in rows], spare=good),
    ]
    about = result.about
    how = [f"batch {about['batch']}", about["mode"], about["execution"]] if "batch" in about else []
    where = [about[key] for key in ("device", "dtype") if about.get(key)]
    sparing = ("KL to full", "PPL", "spread of times", "share halted", result.metric, "standard errors", "agreement")
    print_grid(
        console,
        [column for column in columns if any(column.cells)],
        title=", ".join(map(str, [comparison_title(result), *how, *where])),
        sparing=(*sparing, good),
        breaks=[i for i in range(1, len(rows)) if rows[i].policy != rows[i - 1].policy],
    )


def _spread(row: Row) -> str:
    """Half the range of the repeats; one has none."""
    low, high = row.ms_spread
    return f"{(high - low) / 2:.3f}" if len(row.ms_repeats) > 1 else "?"


def print_claims(console: Console, diagnosis: Diagnosis) -> None:
    """The claims of the papers with what was measured; a narrow terminal gets a block per claim."""
    from rich.table import Table
    from rich.text import Text

    from haltkit.diagnostics.judgement import show_values

    title, wide = f"Claims, judged on {diagnosis.heading}", console.width >= 110
    table = Table(title=title, box=None, pad_edge=False, padding=(0, 1, 1, 0))
    table.add_column("", no_wrap=True)
    for heading in ("claim", "measured", "untrained"):
        table.add_column(heading, ratio=4)
    table.add_column("judgement", ratio=3)
    if not wide:
        print_wrapped(console, title, style="italic")
    for one in diagnosis.claims:
        reason = f" ({one.reason})" if one.reason else ""
        style = {"reproduced": "green", "not reproduced": "red"}.get(one.ruling, "yellow")
        claim, measured, untrained = f"{one.text} {one.paper}", show_values(one.measured), show_values(one.untrained)
        if wide:
            ruling = Text(one.ruling, style=style).append(reason, style="default")
            table.add_row(Text(one.name), Text(claim), Text(measured), Text(untrained), ruling)
            continue
        print_wrapped(console, f"{one.name} {claim}", style="bold")
        if measured:
            print_wrapped(console, f"  measured: {measured}")
        print_wrapped(console, f"  {one.ruling}{reason}", style=style)
    if wide:
        console.print(table)
    else:
        print_wrapped(console, "What the untrained model measures, and every rule: claims.md", style="dim")
