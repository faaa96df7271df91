"""One figure of what halting is for: steps taken against steps needed, beside the frontiers of two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from haltkit.comparison import Comparison
from haltkit.reporting.frontier import draw_frontier, styles_of

__all__ = ["Needs", "plot_overview"]


@dataclass(frozen=True)
class Needs:
    """Steps taken by rows that need different numbers of them.

    Attributes:
        what: names the need: ``"hops"``.
        taken: by policy, by need: the mean of the steps taken, and their 10th and 90th percentile.
        fixed: the fixed depth of the same quality, in steps; None: there is none.
    """

    what: str
    taken: Mapping[str, Mapping[int, tuple[float, float, float]]]
    fixed: int | None = None


def plot_overview(
    needs: Needs, comparisons: Sequence[tuple[str, Comparison]], path: str | Path, fmt: str | None = None
) -> None:
    """Steps taken against steps needed, then one frontier for each comparison.

    Args:
        needs: of a model whose rows say what they need, for the first panel.
        comparisons: a title for each, and the comparison.
        path: where to.
        fmt: png, svg or pdf; None goes by the path's suffix.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * (1 + len(comparisons)), 4.4), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(comparisons))
    styles = styles_of([name for _, result in comparisons for name in result.policies] + list(needs.taken))
    deepest = max(need for taken in needs.taken.values() for need in taken)
    for name, taken in needs.taken.items():
        steps = sorted(taken)
        means = [taken[need][0] for need in steps]
        first.plot(steps, means, markersize=4, label=name, **styles[name])
        low, high = ([taken[need][at] for need in steps] for at in (1, 2))
        first.fill_between(steps, low, high, color=styles[name]["color"], alpha=0.15, linewidth=0)
    first.plot([0, deepest], [1, deepest + 1], color="0.5", linewidth=1, label="least that can be right")
    if needs.fixed is not None:
        first.axhline(needs.fixed, color="0.35", linestyle="--", linewidth=1, label=f"best fixed depth ({needs.fixed})")
    first.set(xlabel=f"{needs.what} that a row needs", ylabel="steps taken", title="steps follow the need")
    first.set_ylim(bottom=0)
    first.legend(frameon=False)
    for axes, (title, result) in zip(others, comparisons, strict=True):
        draw_frontier(axes, result, styles)
        axes.set_title(title)
    figure.savefig(path, dpi=150, format=fmt)
