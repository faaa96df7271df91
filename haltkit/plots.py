"""Figures, drawn with matplotlib, legible in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from haltkit.comparison import Row

__all__ = ["plot_comparison"]

_MARKERS = "osD^vP*X"
_LINES = ("-", "--", "-.", ":")


def plot_comparison(rows: Sequence[Row], path: str | Path, title: str = "", fmt: str | None = None) -> None:
    """The frontier, and latency, perplexity and cross-entropy against tau (arXiv 2509.23314, Figure 4).

    Args:
        rows: of a comparison, full depth first.
        path: where to.
        title: stands above the figure.
        fmt: png, svg or pdf; None goes by the path's suffix.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    frontier, latency, perplexity, entropy = figure.subplots(2, 2).flat
    names = list(dict.fromkeys(row.policy for row in rows if row.policy != "fixed"))
    styles = {
        name: {"marker": _MARKERS[i % 8], "linestyle": _LINES[i % 4], "color": f"C{i}"} for i, name in enumerate(names)
    }
    _frontier(frontier, rows, names, styles)
    for axes, key, label in (
        (latency, "ms_per_token", "time (ms per token)"),
        (perplexity, "ppl", "perplexity"),
        (entropy, "ce", "cross-entropy (nats per token)"),
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
        if key != "ms_per_token":  # a hundredth of a nat at least, or noise fills the panel
            full, margin = getattr(rows[0], key), 0.01 * (rows[0].ppl if key == "ppl" else 1.0)
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, full - margin), max(high, full + margin))
    latency.set_ylim(bottom=0)
    latency.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150, format=fmt)


def _frontier(axes: Any, rows: Sequence[Row], names: Sequence[str], styles: dict[str, dict[str, Any]]) -> None:
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
    axes.axhspan(-0.01, 0.01, color="0.9", zorder=0, label="within 0.01 nats")
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="time (ms per token)", ylabel="cross-entropy above full depth (nats)", title="frontier")
    axes.legend(frameon=False)
