"""[M]'s figures (arXiv 2604.11791): limits, layers, attention, stages and cycles, and the grid of untrained blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from haltkit.diagnostics.diagnosis import Diagnosis
from haltkit.diagnostics.numbers import Numbers, numbers
from haltkit.diagnostics.results import Cell, LayerCurves
from haltkit.reporting.style import LABELS, MARKERS, MODELS, drawable, panels, region_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["attention", "cycles", "grid", "layers", "limits", "stages"]


def _table(rows: Sequence[Numbers]) -> list[list[float]]:
    return [numbers(row) for row in rows]


def limits(diagnosis: Diagnosis) -> Figure | None:
    """Distance to x*, the state after many loops; and the limit types of tokens."""
    found = diagnosis.trained.limits.regions
    if not found:
        return None
    figure, axes = panels(1, len(found), height=3.2)
    for panel, (name, region) in zip(axes[0], found.items(), strict=True):
        for model, survey in diagnosis.models.items():
            if name in survey.limits.regions:
                ys = survey.limits.regions[name].mean("relative_distance")[:-1]  # the last is zero by definition
                panel.plot(range(1, len(ys) + 1), ys, MODELS[model], color="black", label=model)
        counts = region.limits["cosine"]
        total = max(1, sum(counts.values()))
        types = ", ".join(f"{kind} {count / total:.1%}" for kind, count in counts.items() if count)
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="loop step k",
            ylabel=LABELS["relative"].replace("x_t", "x_k"),
            title=f"{region_title(name)}\n{types}",
        )
        panel.title.set_fontsize(9)
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


def attention(diagnosis: Diagnosis) -> Figure | None:
    """[M] Figure 2: distance between the attention matrices of all (step, layer) pairs, and how it settles."""
    found = diagnosis.trained.attention.regions
    if not found:
        return None
    from matplotlib.ticker import MaxNLocator

    figure, axes = panels(2, len(found), height=3.4)
    for column, (name, region) in enumerate(found.items()):
        image = axes[0][column].imshow(_table(region.frobenius), cmap="gray_r", interpolation="nearest", aspect="auto")
        figure.colorbar(image, ax=axes[0][column], label="Frobenius distance")
        count = len(region.layers)
        many = f" ({count} layers)" if count > 1 else ""
        axis = "step, layer by layer" if count > 1 else "step"
        axes[0][column].set(title=region_title(name, many), xlabel=axis, ylabel=axis)
        for ticks in (axes[0][column].xaxis, axes[0][column].yaxis):
            ticks.set_major_locator(MaxNLocator(integer=True))
        for model, survey in diagnosis.models.items():
            if name not in survey.attention.regions:
                continue
            for i, ys in enumerate(zip(*_table(survey.attention.regions[name].successive), strict=True)):
                axes[1][column].plot(
                    range(2, len(ys) + 2),
                    ys,
                    MODELS[model],
                    color=f"{0.5 * i / max(1, count - 1):.2f}",
                    label=model if i == 0 else None,
                )
        axes[1][column].set(yscale="log", xlabel="step", ylabel="change of attention (Frobenius)")
    axes[1][0].legend(frameon=False, fontsize=8)
    return figure


def layers(diagnosis: Diagnosis) -> Figure | None:
    """[M] Figures 3 and 4: how each layer inside moves, and how far it is from its own limit, attention included."""
    names = [name for name, region in diagnosis.trained.limits.regions.items() if region.layers]
    if not names:
        return None
    labels = (LABELS["difference"], LABELS["relative"], "attention: distance\nto the last one's")
    figure, axes = panels(len(labels), len(names))
    for model, survey in diagnosis.models.items():
        for column, name in enumerate(names):
            region = survey.limits.regions.get(name)
            states = list(region.layers.values()) if region is not None else []
            matrices = survey.attention.regions.get(name)
            last = [] if matrices is None else [list(ys) for ys in zip(*_table(matrices.to_last), strict=True)]
            curves = [_means(states, "difference"), _means(states, "relative"), last]
            for panel, lines in zip(axes[:, column], curves, strict=True):
                for i, ys in enumerate(lines):
                    # What is zero, as the last distance is by definition, has no place on these axes.
                    known = [(t, y) for t, y in enumerate(ys, 1) if y and math.isfinite(y)]
                    panel.plot(
                        *(zip(*known, strict=True) if known else ([], [])),
                        linestyle=MODELS[model],
                        color=f"{0.7 * i / max(1, len(lines) - 1):.2f}",
                        label=model if len(lines) == 1 else f"layer {i + 1}, {model}",
                    )
    for row, label in zip(axes, labels, strict=True):
        for panel, name in zip(row, names, strict=True):
            panel.set(xscale="log", yscale="log", xlabel="step t", ylabel=label, title=region_title(name))
    for panel in axes[0]:
        panel.legend(frameon=False, fontsize=7)
    return figure


def _means(states: Sequence[LayerCurves], signal: str) -> list[list[float]]:
    return [numbers(layer.curves[signal].mean) for layer in states]


PROFILES = {
    "concentration": "column-sum concentration",
    "sink_rate": "sink rate",
    "mixing": "mixing score (nats)",
    "compression": "residual entropy (nats)",
}


def stages(diagnosis: Diagnosis) -> Figure | None:
    """[M]: the profile over the layers of each pass, beside a feed-forward control's over its depth."""
    found = diagnosis.trained.attention.regions
    if not found:
        return None
    control = {} if diagnosis.control is None else diagnosis.control.profiles
    figure, axes = panels(len(PROFILES), len(found), height=2.4)
    for column, (name, region) in enumerate(found.items()):
        count = len(region.layers)
        for row, (key, label) in enumerate(PROFILES.items()):
            panel = axes[row][column]
            passes = _table(region.profiles[key])
            if count == 1:  # one layer has no profile over depth: show it over steps
                panel.plot(range(1, len(passes) + 1), [values[0] for values in passes], color="black")
                panel.set(xlabel="step")
            else:
                for t, ys in enumerate(passes):
                    panel.plot(
                        _middles(count),
                        ys,
                        color=f"{0.8 - 0.7 * t / max(1, len(passes) - 1):.2f}",
                        marker=".",
                        linewidth=0.9,
                        label=f"pass {t + 1}" if t in (0, len(passes) - 1) else None,
                    )
                if key in control:
                    panel.plot(_middles(len(control[key])), numbers(control[key]), "--", color="C3", label="loops off")
                panel.set(xlabel="relative depth", xlim=(0, 1))
            panel.set(ylabel=label, title=region_title(name) if row == 0 else "")
        if count > 1:
            axes[0][column].legend(frameon=False, fontsize=7)
    return figure


def _middles(count: int) -> list[float]:
    """Where each of so many layers stands in relative depth: at the middle of its share."""
    return [(i + 0.5) / count for i in range(count)]


def cycles(diagnosis: Diagnosis) -> Figure | None:
    """[M] Figure 5: the last token's states at all layers and steps, in the plane of two components."""
    models = {name: survey.paths.cycles for name, survey in diagnosis.models.items() if survey.paths.cycles}
    if "trained" not in models:
        return None
    figure, axes = panels(len(models), len(models["trained"]), 4.6, 3.8)
    for row, (model, regions) in zip(axes, models.items(), strict=True):
        for panel, name in zip(row, models["trained"], strict=True):
            if name not in regions:
                panel.set_axis_off()
                continue
            cycle = regions[name]
            recurrences = [one for one in cycle.points if len(drawable(one)) == len(one)]
            stream = [point for recurrence in recurrences for point in drawable(recurrence)]
            panel.plot(*zip(*stream, strict=True), color="0.8", linewidth=0.7, zorder=1)
            shades = [f"{0.8 - 0.8 * t / len(recurrences):.2f}" for t in range(len(recurrences))]
            for i in range(len(cycle.layers)):
                own = drawable([recurrence[i] for recurrence in recurrences])
                panel.scatter(*zip(*own, strict=True), c=shades, marker=MARKERS[i % 8], s=18, zorder=2)
                panel.scatter([], [], color="black", marker=MARKERS[i % 8], label=f"layer {i + 1}")
            first, second = numbers(cycle.explained)
            panel.set(
                xlabel=f"component 1 ({first:.0%})",
                ylabel=f"component 2 ({second:.0%})",
                title=region_title(name, f", {model}"),
            )
            panel.legend(frameon=False, fontsize=7)
    return figure


def grid(diagnosis: Diagnosis) -> Figure | None:
    """What governs the cycle: the limit type of untrained blocks over norm placement, injection and layers."""
    cells = diagnosis.grid
    if not cells:
        return None
    norms = list(dict.fromkeys(cell.norm for cell in cells))
    injections = list(dict.fromkeys(cell.injection for cell in cells))
    counts = list(dict.fromkeys(cell.layers for cell in cells))
    figure, axes = panels(1, len(injections), 4.6, 0.9 + len(norms))
    for panel, injection in zip(axes[0], injections, strict=True):
        values = [[math.nan] * len(counts) for _ in norms]  # a grid that was cut short lacks some
        for cell in cells:
            if cell.injection == injection:
                i, j = norms.index(cell.norm), counts.index(cell.layers)
                values[i][j] = numbers([cell.fixed["cosine"]])[0]
                panel.text(j, i, _cell_text(cell), ha="center", va="center", fontsize=7.5)
        panel.imshow(values, cmap="gray", vmin=-1.8, vmax=1, aspect="auto")
        panel.set_xticks(range(len(counts)), [f"{k} layer{'s' * (k > 1)}" for k in counts])
        panel.set_yticks(range(len(norms)), norms)
        panel.set(title=f"input injected: {injection.replace('_', ' ')}")
    return figure


def _cell_text(cell: Cell) -> str:
    kind = cell.limit.replace(", ", ",\n").replace(" fixed", "\nfixed")
    share, growth, least = cell.fixed["cosine"], cell.growth, cell.least_cosine
    numbers = [
        *([] if share is None else [f"{share:.0%} fixed"]),
        *([] if growth is None else [f"norm x{growth:.2f}"]),
        *([] if least is None else [f"cos {least:.4f}"]),
    ]
    return "\n".join([kind, *numbers])
