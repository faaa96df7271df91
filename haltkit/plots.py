"""Figures, drawn with matplotlib, legible in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from haltkit.comparison import Row

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
) -> None:
    """The frontier, and latency, perplexity and cross-entropy against tau (arXiv 2509.23314, Figure 4).

    Args:
        rows: of a comparison, full depth first.
        path: where to.
        title: stands above the figure.
        fmt: png, svg or pdf; None goes by the path's suffix.
        metric, item: what ``ce`` is a mean of, and over what; perplexity is drawn for cross-entropy only.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    frontier, latency, perplexity, entropy = figure.subplots(2, 2).flat
    named = "cross-entropy (nats per token)" if metric == "CE" else metric
    spread = 0.01 if metric == "CE" else 0.01 * abs(rows[0].ce)
    names = list(dict.fromkeys(row.policy for row in rows if row.policy != "fixed"))
    styles = {
        name: {"marker": _MARKERS[i % 8], "linestyle": _LINES[i % 4], "color": f"C{i}"} for i, name in enumerate(names)
    }
    _frontier(frontier, rows, names, styles, metric, item, spread)
    for axes, key, label in (
        (latency, "ms_per_token", f"time (ms per {item})"),
        (perplexity, "ppl", "perplexity"),
        (entropy, "ce", named),
    ):
        if key == "ppl" and rows[0].ppl is None:
            axes.set_axis_off()
            continue
        for name in names:
            swept = sorted(
                (row for row in rows if row.policy == name and row.tau is not None), key=lambda r: r.tau or 0
            )
            if swept:
                axes.plot([r.tau for r in swept], [getattr(r, key) for r in swept], label=name, **styles[name])
        axes.axhline(getattr(rows[0], key), color="0.5", linewidth=1, label="full depth")
        axes.set(xscale="log", xlabel="threshold tau (each policy on its own scale)", ylabel=label)
        axes.ticklabel_format(axis="y", useOffset=False)
        if key != "ms_per_token":  # a hundredth of a nat at least, or noise fills the panel
            full = getattr(rows[0], key)
            margin = 0.01 * full if key == "ppl" else spread
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
    spread: float,
) -> None:
    """Quality lost against time; the difference may be zero or negative, so the scale is linear near zero."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    fixed = sorted((row for row in rows if row.policy == "fixed"), key=lambda row: row.ms_per_token)
    axes.plot(
        [row.ms_per_token for row in fixed],
        [row.delta_ce for row in fixed],
        color="0.35", marker="s", markerfacecolor="white", label="fixed depth",
    )  # fmt: skip
    for row in fixed:
        axes.annotate(
            row.spec.removeprefix("fixed:steps="), (row.ms_per_token, row.delta_ce), xytext=(4, 5),
            textcoords="offset points", fontsize=8, color="0.35",
        )  # fmt: skip
    for name in names:
        own = sorted((row for row in rows if row.policy == name), key=lambda row: row.ms_per_token)
        axes.errorbar(
            [row.ms_per_token for row in own],
            [row.delta_ce for row in own],
            yerr=[min(2 * row.delta_ce_se, 1e6) for row in own],
            capsize=2, label=name, **styles[name],
        )  # fmt: skip
    within = "within 0.01 nats" if metric == "CE" else "within 1%"
    axes.axhspan(-spread, spread, color="0.9", zorder=0, label=within)
    axes.set_yscale("symlog", linthresh=spread or 0.01)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    lost = "cross-entropy above full depth (nats)" if metric == "CE" else f"{metric} above full depth"
    axes.set(xlabel=f"time (ms per {item})", ylabel=lost, title="frontier")
    axes.legend(frameon=False)
