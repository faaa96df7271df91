"""Figures, drawn with matplotlib, legible in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from haltkit.comparison import Row, depth_label

__all__ = ["plot_comparison"]

_MARKERS = "osD^vP*X"
_LINES = ("-", "--", "-.", ":")


def plot_comparison(
    rows: Sequence[Row],
    path: str | Path,
    title: str = "",
    fmt: str | None = None,
    metric: str = "CE",
    item: str = "token",
    band: float = 0.01,
) -> None:
    """The frontier, and latency, perplexity and cross-entropy against tau (arXiv 2509.23314, Figure 4).

    Args:
        rows: of a comparison, full depth first.
        path: where to.
        title: stands above the figure.
        fmt: png, svg or pdf; None goes by the path's suffix.
        metric, item: what ``ce`` is a mean of, and over what; perplexity is drawn where rows have one.
        band: the loss above full depth that is shaded, in the metric's unit.
    """
    from matplotlib.figure import Figure

    with_ppl = rows[0].ppl is not None
    figure = Figure(figsize=(11, 8) if with_ppl else (13, 4.2), layout="constrained")
    panels = list(figure.subplots(*((2, 2) if with_ppl else (1, 3))).flat)
    frontier, latency, entropy = panels[0], panels[1], panels[-1]
    named = "cross-entropy (nats per token)" if metric == "CE" else metric
    names = list(dict.fromkeys(row.policy for row in rows if row.policy != "fixed"))
    styles = {
        name: {"marker": _MARKERS[i % 8], "linestyle": _LINES[i % 4], "color": f"C{i}"} for i, name in enumerate(names)
    }
    _frontier(frontier, rows, names, styles, metric, item, band)
    for axes, key, label in (
        (latency, "ms_per_token", f"time (ms per {item})"),
        *([(panels[2], "ppl", "perplexity")] if with_ppl else []),
        (entropy, "ce", named),
    ):
        for name in names:
            swept = sorted(
                (row for row in rows if row.policy == name and row.tau is not None), key=lambda r: r.tau or 0
            )
            if swept:
                axes.plot([r.tau for r in swept], [getattr(r, key) for r in swept], label=name, **styles[name])
        axes.axhline(getattr(rows[0], key), color="0.5", linewidth=1, label="full depth")
        axes.set(xscale="log", xlabel="threshold tau (each policy on its own scale)", ylabel=label)
        axes.ticklabel_format(axis="y", useOffset=False)
        if key != "ms_per_token":  # the band at least, or noise fills the panel
            full = getattr(rows[0], key)
            margin = 0.01 * full if key == "ppl" else band
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, full - margin), max(high, full + margin))
    latency.set_ylim(bottom=0)
    latency.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150, format=fmt)


def _frontier(
    axes: Any,
    rows: Sequence[Row],
    names: Sequence[str],
    styles: dict[str, dict[str, Any]],
    metric: str,
    item: str,
    band: float,
) -> None:
    """Quality lost against time; the difference may be zero or negative, so the scale is linear near zero."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    for by_region, label, look in (
        (False, "fixed depth", {"marker": "s", "linestyle": "-"}),
        (True, "fixed depth for each region", {"marker": "v", "linestyle": ":"}),
    ):
        fixed = [row for row in rows if row.policy == "fixed" and (" " in depth_label(row.spec)) == by_region]
        fixed.sort(key=lambda row: row.ms_per_token)
        if fixed:
            axes.plot(
                [row.ms_per_token for row in fixed],
                [row.delta_ce for row in fixed],
                color="0.35", markerfacecolor="white", label=label, **look,
            )  # fmt: skip
        for row in () if by_region else fixed:  # close together: the table has their depths
            axes.annotate(
                depth_label(row.spec), (row.ms_per_token, row.delta_ce), xytext=(4, 5), textcoords="offset points",
                fontsize=8, color="0.35",
            )  # fmt: skip
    for name in names:
        own = sorted((row for row in rows if row.policy == name), key=lambda row: row.ms_per_token)
        axes.errorbar(
            [row.ms_per_token for row in own],
            [row.delta_ce for row in own],
            yerr=[min(2 * row.delta_ce_se, 1e6) for row in own],
            capsize=2, label=name, **styles[name],
        )  # fmt: skip
    within = f"within {band:g}{' nats' if metric == 'CE' else ''}"
    axes.axhspan(-band, band, color="0.9", zorder=0, label=within)
    axes.set_yscale("symlog", linthresh=band or 0.01)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    lost = "cross-entropy above full depth (nats)" if metric == "CE" else f"{metric} above full depth"
    axes.set(xlabel=f"time (ms per {item})", ylabel=lost, title="frontier")
    axes.legend(frameon=False)
