"""What a comparison concludes, in the terminal: the answer first, then one table that fits a screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from haltkit.cli.grid import Column, print_grid, print_wrapped
from haltkit.cli.tables import cost_of, number_of, unit_of

if TYPE_CHECKING:
    from rich.console import Console

    from haltkit.comparison import Comparison, Conclusion, Finding, Row

__all__ = ["print_conclusion"]

# What is said of a policy against the best fixed depth: in a cell of the table, and in words.
SAID = {
    "faster": ("faster", "faster than the fixed depth"),
    "slower": ("slower", "slower than the fixed depth"),
    "no clear difference": ("same", "no clear difference to the fixed depth"),
    "cannot tell": ("?", "faster or slower than the fixed depth: cannot tell"),
}


def print_conclusion(console: Console, result: Comparison) -> None:
    """The answer at the middle level in words, then the fastest settings at every quality as a table."""
    concluded = result.conclusion()
    if result.item == "token" and not all(row.causal for row in result.rows):
        console.print()
        print_wrapped(
            console,
            "Non-causal: policies here decide for a whole sequence or batch, so when a token stops depends on later "
            "ones. Their quality is not what decoding token by token would give.",
        )
    console.print()
    if not concluded.findings:
        return
    _print_answer(console, result, concluded)
    _print_fastest(console, result, concluded)
    _print_remarks(console, result, concluded)


def _print_answer(console: Console, result: Comparison, concluded: Conclusion) -> None:
    """What is fastest within the middle level."""
    from rich.text import Text

    fixed, winner, item = concluded.fixed, concluded.winner, result.item
    within = f"Conclusion: within {concluded.level:g} {unit_of(result)}"
    if concluded.undecided:
        print_wrapped(
            console,
            f"{within} nothing can be concluded: only full depth is that good for sure on so few {item}s. Compare on "
            "more of them.",
        )
    elif concluded.fixed_serves_best and fixed is not None:
        serves = fixed.spec or fixed.label  # depths by kind have no spec
        print_wrapped(console, f"{within} a fixed depth serves best here: {serves}")
    else:
        best = "no fixed depth is good for sure" if fixed is None else f"the best is {cost_of(fixed, item)}"
        print_wrapped(console, f"{within}, of fixed depths {best}")
    if winner is None:
        print_wrapped(console, "  no policy is that good for sure")
        return
    against = next(f.against_fixed for f in concluded.findings if _at_level(f, concluded) and f.best is winner)
    verdict = "" if against is None else f"; {SAID[against][1]}"
    print_wrapped(console, f"  the fastest policy is {cost_of(winner, item)}{verdict}")
    if winner.spec is not None:
        promised = f" ({winner.standing})" if winner.standing else ""
        console.print(Text(f"  ready to paste: {winner.spec}{promised}"), soft_wrap=True)


def _at_level(finding: Finding, concluded: Conclusion) -> bool:
    return finding.kind == "loss" and finding.level == concluded.level


def _print_fastest(console: Console, result: Comparison, concluded: Conclusion) -> None:
    """A row per policy, a column per quality; a narrow terminal keeps the middle level's."""
    by_quality: dict[tuple[str, float], list[Finding]] = {}
    for finding in concluded.findings:
        by_quality.setdefault((finding.kind, finding.level), []).append(finding)
    heads = [found[0] for found in by_quality.values()]  # what holds for the quality stands in all of its findings
    by_kind = any(one.one_depth is not one.fixed for one in heads)
    oracle = any(one.oracle is not None for one in heads)
    names = list(dict.fromkeys(finding.policy for finding in concluded.findings))
    labels = ["fixed depth", *["one for all rows"] * by_kind, *names, *["oracle"] * oracle]
    columns = [Column("", labels, _notes(concluded, oracle), left=True)]
    for (kind, level), found in by_quality.items():
        cells = [
            _cell(found[0].fixed),
            *[_cell(found[0].one_depth)] * by_kind,
            *(_cell(one.best, "" if one.against_fixed is None else SAID[one.against_fixed][0]) for one in found),
            *[_cell(found[0].oracle)] * oracle,
        ]
        heading = f"within {level:g}" if kind == "loss" else f"agreement {level:g}"
        columns.append(Column(heading, cells, spare="" if _at_level(found[0], concluded) else heading))
    console.print()
    print_grid(
        console,
        columns,
        title=f"ms/{result.item} of the fastest setting that is this good for sure",
        sparing=[column.spare for column in columns if column.spare],
    )


def _cell(row: Row | None, verdict: str = "") -> str:
    """A setting without the name of its policy, which the table's first column has, its time and a verdict."""
    if row is None:
        return "-"
    setting = row.label.removeprefix(row.policy).strip()
    time = f"{setting}: {row.ms:.3f}" if setting else f"{row.ms:.3f}"
    return f"{time} {verdict}".rstrip()


def _notes(concluded: Conclusion, oracle: bool) -> str:
    """What the cells mean, as far as they are there."""
    verdicts = {finding.against_fixed for finding in concluded.findings}
    known = {
        "-: none is": any(f.best is None or f.fixed is None for f in concluded.findings),
        "faster, slower: than the fixed depth, in every repeat": not verdicts.isdisjoint({"faster", "slower"}),
        "same: no clear difference": "no clear difference" in verdicts,
        "oracle: needs full depth first, so nobody can use it": oracle,
    }
    return "; ".join(note for note, there in known.items() if there)


def _print_remarks(console: Console, result: Comparison, concluded: Conclusion) -> None:
    from haltkit.comparison import sweep_spread

    if any(finding.against_fixed == "cannot tell" for finding in concluded.findings):
        print_wrapped(
            console,
            "One repeat gives no error of the time, so which is faster cannot be told (?): measure with --repeats 3.",
        )
    if "kinds" in result.about and all(row.decided != "kind" for row in result.rows):
        kinds = result.about["kinds"]
        print_wrapped(console, f"Fixed depths by {kinds} do not help: one depth for all takes the fewest steps.")
    names = dict.fromkeys(finding.policy for finding in concluded.findings)
    spreads = {name: sweep_spread(result.rows, name) for name in names}
    swept = [f"{name} {number_of(result, spread)}" for name, spread in spreads.items() if spread is not None]
    if swept:
        metric = "Cross-entropy" if result.metric == "CE" else result.metric
        print_wrapped(
            console,
            f"{metric}, greatest minus least over a policy's thresholds (how much tuning it needs): {', '.join(swept)}",
        )
