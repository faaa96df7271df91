"""The figure of a comparison, drawn with matplotlib, legible in grey."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from haltkit.comparison import Comparison, Row
from haltkit.reporting.style import LINES, MARKERS

__all__ = ["draw_frontier", "plot_comparison", "styles_of"]

Styles = Mapping[str, dict[str, Any]]
MARK = 7  # width of a marker in points: labels keep off it


def plot_comparison(result: Comparison, path: str | Path, title: str = "", fmt: str | None = None) -> None:
    """The frontier, and latency, perplexity and loss against tau (arXiv 2509.23314, Figure 4).

    Args:
        result: the comparison. Perplexity is drawn where its rows have one; the middle one of its levels is shaded.
        path: where to.
        title: stands above the figure.
        fmt: png, svg or pdf; None goes by the path's suffix.
    """
    from matplotlib.figure import Figure

    with_ppl = result.rows[0].perplexity is not None
    figure = Figure(figsize=(11, 8) if with_ppl else (13, 4.2), layout="constrained")
    panels = list(figure.subplots(*((2, 2) if with_ppl else (1, 3))).flat)
    styles = styles_of(result.policies)
    named = "cross-entropy (nats per token)" if result.metric == "CE" else result.metric
    _sweep(panels[1], result, styles, "ms", f"time (ms per {result.item})")
    if with_ppl:
        _sweep(panels[2], result, styles, "perplexity", "perplexity")
    _sweep(panels[-1], result, styles, "loss", named)
    panels[1].set_ylim(bottom=0)
    panels[1].legend(frameon=False)
    figure.suptitle(title)
    draw_frontier(panels[0], result, styles)  # last: its labels go by where things are in the figure
    figure.savefig(path, dpi=150, format=fmt)


def styles_of(names: Iterable[str]) -> Styles:
    """How each policy is drawn, the same wherever the names come in the same order."""
    return {
        name: {"marker": MARKERS[i % 8], "linestyle": LINES[i % 4], "color": f"C{i}"}
        for i, name in enumerate(dict.fromkeys(names))
    }


def _sweep(axes: Any, result: Comparison, styles: Styles, key: str, label: str) -> None:
    """One number of every row against its threshold, with full depth as a line."""
    full: float = getattr(result.rows[0], key)
    for name, style in styles.items():
        swept = [row for row in result.rows if row.policy == name and row.tau is not None and not row.fixed]
        swept.sort(key=lambda row: row.tau or 0)
        if swept:
            axes.plot([row.tau for row in swept], [getattr(row, key) for row in swept], label=name, **style)
    axes.axhline(full, color="0.5", linewidth=1, label="full depth")
    axes.set(xscale="log", xlabel="threshold tau (each policy on its own scale)", ylabel=label)
    axes.ticklabel_format(axis="y", useOffset=False)
    if key != "ms":  # the band at least, or noise fills the panel
        margin = 0.01 * full if key == "perplexity" else _band(result)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, full - margin), max(high, full + margin))


def _band(result: Comparison) -> float:
    return result.conclusion().level


def draw_frontier(axes: Any, result: Comparison, styles: Styles) -> None:
    """Quality lost against time; the difference may be zero or negative, so the scale is linear near zero.

    Fixed depths are labelled where there is room, so draw the other axes of the figure first.
    """
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, ScalarFormatter

    rows, band = result.rows, _band(result)
    same = [row for row in rows if row.depth is not None and len(set(row.depth.values())) == 1]
    differing = [row for row in rows if row.depth is not None and len(set(row.depth.values())) > 1]
    _depths(axes, same, "fixed depth", marker="s", linestyle="-")
    _depths(axes, differing, "fixed depth for each region", marker="v", linestyle=":")
    by_kind = [row for row in rows if row.decided == "kind"]
    _depths(axes, by_kind, f"fixed depth by {result.about.get('kinds', 'kind of row')}", marker="^", linestyle="-.")
    _depths(axes, [row for row in rows if row.oracle], "oracle: needs full depth", marker="*", linestyle="none")
    for name in result.policies:
        style = styles[name]
        own = sorted((row for row in rows if row.policy == name and not row.fixed), key=lambda row: row.ms)
        axes.errorbar(
            [row.ms for row in own],
            [row.delta for row in own],
            yerr=[2 * row.delta_se if math.isfinite(row.delta_se) else math.nan for row in own],
            capsize=2,
            label=name,
            **style,
        )
    nats = " nats" if result.unit == "nats" else ""
    axes.axhspan(-band, band, color="0.9", zorder=0, label=f"within {band:g}{nats}")
    axes.set_yscale("symlog", linthresh=band or 0.01)
    axes.margins(0.07, 0.1)  # room for the labels
    axes.yaxis.set_major_locator(FixedLocator(_ticks(axes.get_ylim(), band or 0.01)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    lost = "cross-entropy above full depth (nats)" if result.metric == "CE" else f"{result.metric} above full depth"
    axes.set(xlabel=f"time (ms per {result.item})", ylabel=lost, title="frontier")
    axes.legend(edgecolor="none", framealpha=0.9)
    # Those that differ by region are close together: the table has their depths.
    named = {str(next(iter((row.depth or {}).values()))): (row.ms, row.delta) for row in same}
    _label(axes, named, [(row.ms, row.delta) for row in rows])


def _ticks(limits: tuple[float, float], linear: float) -> list[float]:
    """Zero, and the powers of ten outside the linear part of the scale."""
    first, most = math.ceil(math.log10(linear)), max(map(abs, limits))
    powers = [10.0**k for k in range(first, first + 12) if 10.0**k <= most]
    return [0.0, *powers, *(-power for power in powers if -power >= limits[0])]


def _label(axes: Any, named: Mapping[str, tuple[float, float]], points: Sequence[tuple[float, float]]) -> None:
    """Write each name beside its point, inside the axes and on nothing else, or not at all; the ends come first."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # from here on it is known where things are
    inside, mark = axes.get_window_extent(), MARK * axes.figure.dpi / 72
    marks = [Bbox.from_bounds(x - mark / 2, y - mark / 2, mark, mark) for x, y in axes.transData.transform(points)]
    taken = [*marks, axes.get_legend().get_window_extent()]
    names = list(named)
    for name in dict.fromkeys([*names[-1:], *names[:1], *names]):
        for across, up in ((4, 5), (-4, 5), (4, -5), (-4, -5)):
            label = axes.annotate(
                name,
                named[name],
                xytext=(across, up),
                textcoords="offset points",
                fontsize=8,
                color="0.35",
                ha="left" if across > 0 else "right",
                va="bottom" if up > 0 else "top",
            )
            box = label.get_window_extent()
            within = Bbox.intersection(inside, box)
            if within is not None and within.bounds == box.bounds and not box.count_overlaps(taken):
                taken.append(box.padded(2))
                break
            label.remove()


def _depths(axes: Any, rows: list[Row], label: str, **look: str) -> None:
    """Depths that no policy decides, joined in the order of their time."""
    rows.sort(key=lambda row: row.ms)
    if rows:
        times, lost = [row.ms for row in rows], [row.delta for row in rows]
        axes.plot(times, lost, color="0.35", markerfacecolor="white", label=label, **look)
