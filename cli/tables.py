"""Results in the terminal: a comparison as a table with its conclusion in words, and the claims of a diagnosis."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from haltkit.comparison import Comparison, Finding, Row
    from haltkit.diagnostics import Diagnosis

__all__ = ["comparison_title", "cost_of", "print_claims", "print_comparison", "print_conclusion"]


def comparison_title(result: Comparison) -> str:
    """What was compared on what."""
    about = result.about
    text = about.get("text")
    return f"{about.get('model', 'model')}, {result.items:,} {result.item}s" + (f" of {text}" if text else "")


def cost_of(row: Row, item: str) -> str:
    """A setting and its time."""
    return f"{row.label}: {row.ms:.3f} ms/{item}, {row.speedup:.2f}x full depth"


def _number(result: Comparison, value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if result.unit == "nats" else f"{value:{sign}.3g}"


def _unit(result: Comparison) -> str:
    """Of a difference: the unit where there is one, else what is measured."""
    return f"of {result.metric}" if result.unit == "loss" else result.unit


def print_comparison(console: Console, result: Comparison) -> None:
    """The table, a row per setting; a narrow terminal gets fewer columns."""
    from rich.table import Table
    from rich.text import Text

    wide = console.width >= 110
    middle = result.conclusion().level
    headings = {
        "loss": result.metric,
        "ppl": "PPL",
        "delta": "delta (nats)" if result.unit == "nats" else "delta",
        "kl": "KL to full",
        "agree": "agree",
        "steps": "steps",
        "halted": "halted",
        "ms": f"ms/{result.item}",
        "speed": "speed",
        "within": f"within {middle:g}",
    }
    dropped = set() if wide else {"ppl", "kl", "halted", "within"}
    if console.width < 80:
        dropped |= {"loss", "agree"}
    first = result.rows[0]
    if first.perplexity is None:
        dropped.add("ppl")
    if first.kl_to_full is None:
        dropped |= {"kl", "agree"}
    shown = [key for key in headings if key not in dropped]
    spread, error = (" and half their range", " with its standard error") if wide else ("", "")
    notes = {
        "ms": f"ms/{result.item}: median of the repeats{spread}, wall clock",
        "delta": f"delta: {result.metric} above full depth{error}",
        "agree": "agree: top prediction as at full depth",
        "steps": "steps: mean by region",
        "halted": "halted: by the policy, not by the budget",
    }
    about = result.about
    how = [f"batch {about['batch']}", about["mode"], about["execution"]] if "batch" in about else []
    where = [about[key] for key in ("device", "dtype") if about.get(key)]
    table = Table(
        title=", ".join(map(str, [comparison_title(result), *how, *where])),
        caption="; ".join(text for key, text in notes.items() if key in shown),
        box=None,
        pad_edge=False,
        padding=(0, 1),
    )
    table.add_column("setting", overflow="fold", min_width=16)
    for key in shown:
        table.add_column(headings[key], justify="right", no_wrap=True)
    previous = None
    for row in result.rows:
        if previous is not None and row.policy != previous:
            table.add_section()
            table.add_row()
        previous = row.policy
        cells = _cells(result, row, wide, middle)
        table.add_row(Text(row.label), *(cells[key] for key in shown))
    console.print(table)


def _cells(result: Comparison, row: Row, wide: bool, middle: float) -> dict[str, str]:
    from haltkit.comparison import within

    se = _number(result, row.delta_se) if math.isfinite(row.delta_se) else "?"
    delta = _number(result, row.delta, "+")
    spread = (row.ms_spread[1] - row.ms_spread[0]) / 2
    return {
        "loss": _number(result, row.loss),
        "ppl": "" if row.perplexity is None else f"{row.perplexity:.1f}",
        "delta": f"{delta} ±{se}" if wide else delta,
        "kl": "" if row.kl_to_full is None else f"{row.kl_to_full:.1e}",
        "agree": "" if row.agreement is None else f"{row.agreement:.1%}",
        "steps": " ".join(f"{row.steps[name]:.1f}" for name in result.regions),
        "halted": f"{row.outcomes['CONVERGED']:.0%}" if row.outcomes else "",
        "ms": f"{row.ms:.3f} ±{spread:.3f}" if wide else f"{row.ms:.3f}",
        "speed": f"{row.speedup:.2f}x",
        "within": within(row, middle),
    }


def print_conclusion(console: Console, result: Comparison) -> None:
    """The conclusion from the rows, in words."""
    from rich.text import Text

    from haltkit.comparison import sweep_spread

    def say(line: str = "") -> None:
        console.print(Text(line), soft_wrap=False)

    concluded, item, unit = result.conclusion(), result.item, _unit(result)
    if item == "token" and not all(row.causal for row in result.rows):
        say()
        say(
            "Non-causal: policies here decide for a whole sequence or batch, so when a token stops depends on later "
            "ones. Their quality is not what decoding token by token would give."
        )
    say()
    if not concluded.findings:
        return
    say("Conclusion, from the frontier (fastest setting of at least this quality, against the best fixed depth)")
    quality = None
    for finding in concluded.findings:
        if (finding.kind, finding.level) != quality:
            quality = (finding.kind, finding.level)
            goal = f"within {finding.level:g} {unit}" if finding.kind == "loss" else f"agreement {finding.level:g}"
            best = finding.fixed
            say(f"  {goal}: " + (f"{best.label}, {best.ms:.3f} ms/{item}" if best else _NO_DEPTH))
        say(f"    {_said(finding, item)}")
    names = dict.fromkeys(finding.policy for finding in concluded.findings)
    spreads = {name: sweep_spread(result.rows, name) for name in names}
    swept = [f"{name} {_number(result, spread)}" for name, spread in spreads.items() if spread is not None]
    if swept:
        metric = "Cross-entropy" if result.metric == "CE" else result.metric
        say(f"{metric}, greatest minus least over a policy's thresholds (how much tuning it needs):")
        say("  " + ", ".join(swept))
    if concluded.undecided:
        say(
            f"Within {concluded.level:g} {unit} nothing can be concluded: only full depth is that good for sure on so "
            f"few {item}s. Compare on more of them."
        )
    if concluded.fixed_serves_best and concluded.fixed is not None:
        say(f"Within {concluded.level:g} {unit} a fixed depth serves best here: {concluded.fixed.spec}")
    if concluded.winner is not None:
        winner = concluded.winner
        said = f"ready to paste: {winner.spec}" if winner.spec is not None else winner.label
        console.print(Text(f"Fastest policy within {concluded.level:g} {unit}, {said}"), soft_wrap=True)


_NO_DEPTH = "no fixed depth is that good for sure"


def _said(finding: Finding, item: str) -> str:
    if finding.best is None:
        return f"{finding.policy}: no setting is that good for sure on these {item}s"
    return cost_of(finding.best, item) + (f", {finding.against_fixed}" if finding.against_fixed else "")


def print_claims(console: Console, diagnosis: Diagnosis) -> None:
    """The claims of the papers with what was measured; a narrow terminal gets fewer columns."""
    from rich.table import Table
    from rich.text import Text

    from haltkit.diagnostics.judgement import show_values

    table = Table(title=f"Claims, judged on {diagnosis.heading}", box=None, pad_edge=False, padding=(0, 1, 1, 0))
    wide = console.width >= 110
    if not wide:
        table.caption = "what the untrained model measures, and every rule: claims.md"
    table.add_column("", no_wrap=True)
    table.add_column("claim", ratio=4)
    table.add_column("measured", ratio=4)
    if wide:
        table.add_column("untrained", ratio=4)
    table.add_column("judgement", ratio=3)
    for one in diagnosis.claims:
        ruling = Text(one.ruling, style={"reproduced": "green", "not reproduced": "red"}.get(one.ruling, "yellow"))
        if one.reason:
            ruling.append(f" ({one.reason})", style="default")
        cells = [Text(one.name), Text(f"{one.text} {one.paper}"), Text(show_values(one.measured))]
        table.add_row(*cells, *([Text(show_values(one.untrained))] if wide else []), ruling)
    console.print(table)
