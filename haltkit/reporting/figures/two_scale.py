"""[P]'s figures (arXiv 2509.23314): paths, DLR, steps and angles across training, and how paths bend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from haltkit.diagnostics.diagnosis import Diagnosis
from haltkit.diagnostics.numbers import numbers
from haltkit.diagnostics.results import RegionGeometry, Snapshot
from haltkit.reporting.style import LABELS, LINES, MARKERS, MODELS, drawable, panels, region_title, short_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["angles", "bends", "dlr", "paths", "steps"]

CONVENTIONS = ("noise", "noise without d_1", "injected", "injected without d_1", "net", "net without d_1")
_MAPS = ("Blues", "Oranges", "Greens", "Purples", "Reds", "Greys")


def paths(diagnosis: Diagnosis) -> Figure | None:
    """[P] Figure 1: one sequence's states over depth and loop steps; loops lighter to darker; and a close look."""
    found = diagnosis.trained.paths
    loops = [segment for segment in found.segments if segment.loop]
    streams = {
        token: [point for segment in found.segments for point in drawable(segment.points[token])]
        for token in range(len(found.positions))
    }
    if not any(streams.values()) or not any(drawable(points) for points in loops[-1].points):
        return None
    from matplotlib import colormaps

    figure, axes = panels(1, 2, 5.2, 4.6)
    whole, close = axes[0]
    late: list[Sequence[float]] = []
    close_up = 0
    for token, position in enumerate(found.positions):
        stream = streams[token]
        if not stream:
            continue
        for panel in (whole, close):
            panel.plot(*zip(*stream, strict=True), color="0.8", linewidth=0.6, zorder=1)
        for i, segment in enumerate(loops):
            points = drawable(segment.points[token])
            if not points:
                continue
            shades = colormaps[_MAPS[i % 6]]([0.25 + 0.7 * k / max(1, len(points) - 1) for k in range(len(points))])
            for panel in (whole, close):
                panel.scatter(*zip(*points, strict=True), c=shades, s=14, marker=MARKERS[i % 8], zorder=2, linewidths=0)
            if i == len(loops) - 1:
                late, close_up = points[1:] or points, position  # of the last token that has any
        whole.annotate(f"{position}", stream[-1], fontsize=7, color="0.3", xytext=(3, 3), textcoords="offset points")
    for i, segment in enumerate(loops):
        colour = colormaps[_MAPS[i % 6]](0.8)
        whole.scatter([], [], color=colour, marker=MARKERS[i % 8], label=region_title(segment.name))
    xs, ys = zip(*late, strict=True)
    for low, high, limit in ((min(xs), max(xs), close.set_xlim), (min(ys), max(ys), close.set_ylim)):
        margin = 0.25 * (high - low) + 1e-9
        limit(low - margin, high + margin)
    first, second = numbers(found.explained)
    along = f"component 1 ({first:.0%} of the variance)"
    whole.set(title="states over depth and loop steps, by position", xlabel=along, ylabel=f"component 2 ({second:.0%})")
    close.set(title=region_title(loops[-1].name, f", position {close_up}, closer", 24), xlabel=along)
    whole.indicate_inset_zoom(close, edgecolor="0.4")
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def dlr(diagnosis: Diagnosis) -> Figure | None:
    """[P] Figure 2: DLR at each boundary across snapshots, all conventions, with the untrained control."""
    trained, untrained = diagnosis.trained.geometry.dlr, diagnosis.untrained.geometry.dlr
    if not any(trained.values()):
        return None
    snapshots = diagnosis.snapshots
    seen = diagnosis.tokens_seen
    labels = [
        *(["untrained"] if untrained else []),
        *(short_count(one.tokens_seen) for one in snapshots),
        f"this model\n{short_count(seen)}" if seen else "this model",
    ]
    figure, axes = panels(1, len(trained), 5.2, 4.2)
    for panel, (boundary, found) in zip(axes[0], trained.items(), strict=True):
        series = [*([untrained] if untrained else []), *(one.dlr for one in snapshots), trained]
        for i, name in enumerate(CONVENTIONS):
            if name not in found:
                continue
            ratios = [one.get(boundary, {}).get(name) for one in series]
            ys = numbers([None if ratio is None else ratio.mean for ratio in ratios])
            panel.plot(
                range(len(ys)),
                ys,
                marker=MARKERS[i],
                linestyle=LINES[i // 2],
                color=f"C{i // 2}",
                markerfacecolor="white" if i % 2 else f"C{i // 2}",
                label=name,
                markersize=5,
            )
        panel.axhline(1, color="0.5", linewidth=1)
        panel.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
        panel.set(yscale="log", title=f"boundary {boundary}", ylabel="DLR (mean over tokens)", xlabel="tokens seen")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6 if len(trained) > 1 else 3, frameon=False, fontsize=8)
    return figure


def steps(diagnosis: Diagnosis) -> Figure | None:
    """[P] Figure 3: step norms and step angles, mean over tokens with one standard deviation, across snapshots."""
    return _over_training(diagnosis, ["step_norm", "cosine"])


def angles(diagnosis: Diagnosis) -> Figure | None:
    """[P] Figure 5: cos(d_k, d_{k-1}) over 30 loops across snapshots."""
    return _over_training(diagnosis, ["cosine"], 30)


def _over_training(diagnosis: Diagnosis, signals: Sequence[str], last: int | None = None) -> Figure | None:
    """Signals by region over loop steps, one line per snapshot from light to dark, this model with its band."""
    regions = diagnosis.trained.geometry.regions
    if not regions:
        return None
    figure, axes = panels(len(signals), len(regions))
    for row, signal in zip(axes, signals, strict=True):
        for panel, (name, region) in zip(row, regions.items(), strict=True):
            _draw_snapshots(panel, diagnosis.snapshots, name, signal, last)
            _draw_band(panel, region, signal, last)
            if name in diagnosis.untrained.geometry.regions:
                ys = diagnosis.untrained.geometry.regions[name].mean(signal)[:last]
                panel.plot(range(1, len(ys) + 1), ys, color="black", linestyle=":", label="untrained")
            if signal == "step_norm":
                panel.set_yscale("log")
                if region.floor:
                    panel.axhline(region.floor, color="0.5", linewidth=0.8, linestyle="--", label="float floor")
            else:
                _draw_cosine_of_means(panel, region, last)
            panel.set(title=region_title(name), xlabel="loop step k", ylabel=LABELS[signal])
        handles = row[-1].get_legend_handles_labels()
        row[-1].legend(*handles, frameon=False, fontsize=7)
    return figure


def _draw_snapshots(panel: Any, snapshots: Sequence[Snapshot], name: str, signal: str, last: int | None) -> None:
    ends = (0, len(snapshots) - 1)
    for i, one in enumerate(snapshots):
        if name in one.regions:
            ys = one.regions[name].mean(signal)[:last]
            shade = f"{0.85 - 0.55 * (i + 1) / (len(snapshots) + 1):.2f}"
            label = short_count(one.tokens_seen) if i in ends else None
            panel.plot(range(1, len(ys) + 1), ys, color=shade, linewidth=1, label=label)


def _draw_band(panel: Any, region: RegionGeometry, signal: str, last: int | None) -> None:
    ys, spread = region.mean(signal)[:last], region.std(signal)[:last]
    ks = range(1, len(ys) + 1)
    panel.plot(ks, ys, color="black", linewidth=1.6, label="this model")
    # On a logarithmic axis a band down to zero would have no end.
    low = [max(y - s, y / 10) if signal == "step_norm" else y - s for y, s in zip(ys, spread, strict=True)]
    high = [y + s for y, s in zip(ys, spread, strict=True)]
    panel.fill_between(ks, low, high, color="black", alpha=0.15, linewidth=0)


def _draw_cosine_of_means(panel: Any, region: RegionGeometry, last: int | None) -> None:
    ys = numbers(region.cosine_of_means)[:last]
    if ys:
        panel.plot(
            range(1, len(ys) + 1), ys, color="black", linestyle="--", linewidth=0.9, label="cosine of mean steps"
        )
    panel.set_ylim(-1.05, 1.05)
    panel.axhspan(0.5, 0.65, color="0.9", zorder=0, label="0.5-0.65 ([P])")
    panel.axhline(0, color="0.6", linewidth=0.6)


def bends(diagnosis: Diagnosis) -> Figure | None:
    """Curvature and turning angle of the path, trained and untrained, where steps are above the float floor."""
    names = [name for name, region in diagnosis.trained.geometry.regions.items() if "curvature" in region.curves]
    if not names:
        return None
    figure, axes = panels(2, len(names))
    for column, name in enumerate(names):
        for model, survey in diagnosis.models.items():
            region = survey.geometry.regions.get(name)
            if region is None:
                continue
            floor = 10 * (region.floor or 0)
            above = [k for k, norm in enumerate(region.mean("step_norm"), 1) if k > 1 and norm > floor]
            for row, signal in enumerate(("curvature", "turn")):
                ys = region.mean(signal)
                axes[row][column].plot(
                    above, [ys[k - 1] for k in above], MODELS[model], color="black", marker=".", label=model
                )
        axes[0][column].set(
            yscale="log", title=region_title(name), xlabel="loop step k", ylabel="curvature (1 / length)"
        )
        axes[1][column].set(ylim=(0, 180), xlabel="loop step k", ylabel="turn between steps (degrees)")
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure
