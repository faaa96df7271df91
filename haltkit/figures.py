"""The papers' figures from what ``haltkit diagnose`` found, drawn with matplotlib, legible in grey.

[P] is arXiv 2509.23314, [M] arXiv 2604.11791. Each function returns a figure, or None where the results lack what it
shows; :func:`draw_figures` writes those that there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["FIGURES", "draw_figures"]

Results = Mapping[str, Any]
_MARKERS = "osD^vP*X"
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 2)))
CONVENTIONS = ("noise", "noise without d_1", "injected", "injected without d_1", "net", "net without d_1")


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [math.nan if v is None else float(v) for v in values]


def _part(results: Results, model: str, part: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = ((results.get("models") or {}).get(model) or {}).get(part) or {}
    return found


def _checkpoints(results: Results) -> list[Mapping[str, Any]]:
    return sorted(results.get("checkpoints") or [], key=lambda one: float(one["tokens_seen"]))


def _count(tokens: float) -> str:
    return f"{tokens / 1e6:.3g}M" if tokens >= 1e6 else f"{tokens / 1e3:.3g}k"


def _grid(rows: int, columns: int, width: float = 3.4, height: float = 2.9) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, width * columns), height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _drawable(points: Sequence[Sequence[float | None]]) -> list[Sequence[float]]:
    """Points whose coordinates are known: a state that is not finite has none."""
    return [[x, y] for x, y in points if x is not None and y is not None]


def paths(results: Results) -> Any:
    """[P] Figure 1: one sequence's states over depth and loop steps; loops lighter to darker; and a close look."""
    found = _part(results, "trained", "paths")
    if not found:
        return None
    from matplotlib import colormaps

    figure, axes = _grid(1, 2, 5.2, 4.6)
    whole, close = axes[0]
    loops = [s for s in found["segments"] if s["loop"]]
    maps = ["Blues", "Oranges", "Greens", "Purples", "Reds", "Greys"]
    late: Sequence[Sequence[float]] = []
    close_up = None
    for token, position in enumerate(found["positions"]):
        stream = [point for segment in found["segments"] for point in _drawable(segment["points"][token])]
        if not stream:
            continue
        for panel in (whole, close):
            panel.plot(*zip(*stream, strict=True), color="0.8", linewidth=0.6, zorder=1)
        for i, segment in enumerate(loops):
            points = _drawable(segment["points"][token])
            if not points:
                continue
            shades = colormaps[maps[i % len(maps)]](
                [0.25 + 0.7 * k / max(1, len(points) - 1) for k in range(len(points))]
            )
            for panel in (whole, close):
                panel.scatter(
                    *zip(*points, strict=True), c=shades, s=14, marker=_MARKERS[i % 8], zorder=2, linewidths=0
                )
            if i == len(loops) - 1:
                late, close_up = points[1:] or points, position  # of the last token that has any
        end = stream[-1]
        whole.annotate(
            f"{position}", end, fontsize=7, color="0.3", xytext=(3, 3), textcoords="offset points",
        )  # fmt: skip
    for i, segment in enumerate(loops):
        whole.scatter(
            [], [], color=colormaps[maps[i % len(maps)]](0.8), marker=_MARKERS[i % 8], label=f"region {segment['name']}"
        )
    if not late:  # nothing of it is finite
        return None
    xs, ys = zip(*late, strict=True)
    for low, high, limit in ((min(xs), max(xs), close.set_xlim), (min(ys), max(ys), close.set_ylim)):
        margin = 0.25 * (high - low) + 1e-9
        limit(low - margin, high + margin)
    first, second = found["explained"]
    names = {"xlabel": f"component 1 ({first:.0%} of the variance)", "ylabel": f"component 2 ({second:.0%})"}
    whole.set(title="states over depth and loop steps, by position", **names)
    close.set(title=f"closer: region {loops[-1]['name']}, position {close_up}", **names)
    whole.indicate_inset_zoom(close, edgecolor="0.4")
    figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def dlr(results: Results) -> Any:
    """[P] Figure 2: DLR at each boundary across checkpoints, all conventions, with the untrained control."""
    trained, untrained = (_part(results, m, "geometry").get("dlr") or {} for m in ("trained", "untrained"))
    if not any(trained.values()):
        return None
    checkpoints = _checkpoints(results)
    figure, axes = _grid(1, len(trained), 5.2, 4.2)
    for panel, (boundary, found) in zip(axes[0], trained.items(), strict=True):
        names = [name for name in CONVENTIONS if name in found]
        xs = [0, *range(1, len(checkpoints) + 1), len(checkpoints) + 1]
        for i, name in enumerate(names):
            control = untrained.get(boundary, {}).get(name, {}).get("mean")
            middle = [one["dlr"].get(boundary, {}).get(name, {}).get("mean") for one in checkpoints]
            ys = _numbers([control, *middle, found[name]["mean"]])
            panel.plot(xs, ys, marker=_MARKERS[i], linestyle=_LINES[i // 2], color=f"C{i // 2}",
                       markerfacecolor="white" if i % 2 else f"C{i // 2}", label=name, markersize=5)  # fmt: skip
        panel.axhline(1, color="0.5", linewidth=1)
        about = results.get("about") or {}
        last = f"this model\n{_count(about['tokens_seen'])}" if about.get("tokens_seen") else "this model"
        labels = ["untrained", *(_count(one["tokens_seen"]) for one in checkpoints), last]
        panel.set_xticks(xs, labels, rotation=60, ha="right", fontsize=8)
        panel.set(yscale="log", title=f"boundary {boundary}", ylabel="DLR (mean over tokens)", xlabel="tokens seen")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def _over_training(results: Results, signals: Sequence[tuple[str, str, bool]], last: int | None = None) -> Any:
    """Signals by region over loop steps, a line a checkpoint from light to dark, this model with its band."""
    geometry = _part(results, "trained", "geometry")
    if not geometry.get("regions"):
        return None
    regions = geometry["regions"]
    control = _part(results, "untrained", "geometry").get("regions") or {}
    checkpoints = _checkpoints(results)
    figure, axes = _grid(len(signals), len(regions))
    for row, (signal, label, logarithmic) in zip(axes, signals, strict=True):
        for panel, (name, region) in zip(row, regions.items(), strict=True):
            ends = (0, len(checkpoints) - 1)
            for i, one in enumerate(checkpoints):
                if name in one["regions"]:
                    ys = _numbers(one["regions"][name][f"{signal}_mean"])[:last]
                    shade = f"{0.85 - 0.55 * (i + 1) / (len(checkpoints) + 1):.2f}"
                    panel.plot(range(1, len(ys) + 1), ys, color=shade, linewidth=1,
                               label=_count(one["tokens_seen"]) if i in ends else None)  # fmt: skip
            ys, spread = (_numbers(region[f"{signal}_{kind}"])[:last] for kind in ("mean", "std"))
            ks = range(1, len(ys) + 1)
            panel.plot(ks, ys, color="black", linewidth=1.6, label="this model")
            low = [max(y - s, y / 10) if logarithmic else y - s for y, s in zip(ys, spread, strict=True)]
            panel.fill_between(
                ks, low, [y + s for y, s in zip(ys, spread, strict=True)], color="black", alpha=0.15, linewidth=0
            )
            if name in control:
                ys = _numbers(control[name][f"{signal}_mean"])[:last]
                panel.plot(range(1, len(ys) + 1), ys, color="black", linestyle=":", label="untrained")
            if logarithmic:
                panel.set_yscale("log")
                if region.get("floor"):
                    panel.axhline(region["floor"], color="0.5", linewidth=0.8, linestyle="--", label="float floor")
            elif signal == "cosine":
                if region.get("cosine_of_means"):
                    ys = _numbers(region["cosine_of_means"])[:last]
                    panel.plot(range(1, len(ys) + 1), ys, color="black", linestyle="--", linewidth=0.9,
                               label="cosine of mean steps")  # fmt: skip
                panel.set_ylim(-1.05, 1.05)
                panel.axhspan(0.5, 0.65, color="0.9", zorder=0, label="0.5-0.65 ([P])")
                panel.axhline(0, color="0.6", linewidth=0.6)
            panel.set(title=f"region {name}", xlabel="loop step k", ylabel=label)
    for row in axes:
        row[-1].legend(frameon=False, fontsize=7)
    return figure


def steps(results: Results) -> Any:
    """[P] Figure 3: step norms and step angles, mean over tokens with one standard deviation, across checkpoints."""
    return _over_training(results, [("step_norm", "‖d_k‖", True), ("cosine", "cos(d_k, d_{k-1})", False)])


def angles(results: Results) -> Any:
    """[P] Figure 5: cos(d_k, d_{k-1}) over 30 loops across checkpoints."""
    return _over_training(results, [("cosine", "cos(d_k, d_{k-1})", False)], 30)


def bends(results: Results) -> Any:
    """Curvature and turning angle of the path, trained and untrained, where steps are above the float floor."""
    regions = _part(results, "trained", "geometry").get("regions") or {}
    regions = {name: region for name, region in regions.items() if "curvature_mean" in region}
    if not regions:
        return None
    figure, axes = _grid(2, len(regions))
    for column, name in enumerate(regions):
        for model, style in (("trained", "-"), ("untrained", ":")):
            region = (_part(results, model, "geometry").get("regions") or {}).get(name)
            if region is None:
                continue
            floor = 10 * float(region.get("floor") or 0)
            above = [k for k, norm in enumerate(_numbers(region["step_norm_mean"]), 1) if k > 1 and norm > floor]
            for row, signal in enumerate(("curvature", "turn")):
                ys = _numbers(region[f"{signal}_mean"])
                axes[row][column].plot(above, [ys[k - 1] for k in above], style, color="black", marker=".", label=model)
        axes[0][column].set(yscale="log", title=f"region {name}", xlabel="loop step k", ylabel="curvature (1 / length)")
        axes[1][column].set(ylim=(0, 180), xlabel="loop step k", ylabel="turn between steps (degrees)")
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


def limits(results: Results) -> Any:
    """Distance to x*, the state after many loops, beside the step norm; and the limit types of tokens."""
    found = _part(results, "trained", "limits")
    if not found.get("regions"):
        return None
    control = _part(results, "untrained", "limits").get("regions") or {}
    figure, axes = _grid(1, len(found["regions"]), height=3.2)
    for panel, (name, region) in zip(axes[0], found["regions"].items(), strict=True):
        for one, style, label in ((region, "-", "trained"), (control.get(name), ":", "untrained")):
            if one is not None:
                ys = _numbers(one["relative_distance_mean"])[:-1]  # the last is zero by definition
                panel.plot(range(1, len(ys) + 1), ys, style, color="black", label=label)
        counts = region["limits"]["cosine"]
        total = max(1, sum(counts.values()))
        types = ", ".join(f"{kind} {count / total:.1%}" for kind, count in counts.items() if count)
        panel.set(
            xscale="log", yscale="log", xlabel="loop step k", ylabel="‖x_k - x*‖ / ‖x*‖",
            title=f"region {name}\n{types}",
        )  # fmt: skip
        panel.title.set_fontsize(9)
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


def attention(results: Results) -> Any:
    """[M] Figure 2: distance between the attention matrices of all (recurrence, layer) pairs, and how it settles."""
    found = _part(results, "trained", "attention").get("regions") or {}
    if not found:
        return None
    control = _part(results, "untrained", "attention").get("regions") or {}
    figure, axes = _grid(2, len(found), height=3.4)
    for column, (name, region) in enumerate(found.items()):
        image = axes[0][column].imshow(_rows(region["frobenius"]), cmap="gray_r", interpolation="nearest")
        figure.colorbar(image, ax=axes[0][column], label="Frobenius distance")
        layers = len(region["layers"])
        many = f" ({layers} layers)" if layers > 1 else ""
        axes[0][column].set(title=f"region {name}{many}", xlabel="recurrence, layer by layer", ylabel="the same")
        for one, style, label in ((region, "-", "trained"), (control.get(name), ":", "untrained")):
            if one is not None:
                for i, ys in enumerate(zip(*_rows(one["successive"]), strict=True)):
                    axes[1][column].plot(range(2, len(ys) + 2), ys, style, color=f"{0.5 * i / max(1, layers - 1):.2f}",
                                         label=label if i == 0 else None)  # fmt: skip
        axes[1][column].set(yscale="log", xlabel="recurrence", ylabel="change of attention (Frobenius)")
    axes[1][0].legend(frameon=False, fontsize=8)
    return figure


def layers(results: Results) -> Any:
    """[M] Figures 3 and 4: how each layer inside moves, and how far it is from its own limit, attention included."""
    found = _part(results, "trained", "limits").get("regions") or {}
    found = {name: region for name, region in found.items() if region.get("layers")}
    if not found:
        return None
    labels = ("‖x_t - x_{t-1}‖", "‖x_t - x*‖ / ‖x*‖", "attention: distance\nto the last one's")
    figure, axes = _grid(len(labels), len(found))
    for model, style in (("trained", "-"), ("untrained", ":")):
        inside = _part(results, model, "limits").get("regions") or {}
        attention = _part(results, model, "attention").get("regions") or {}
        for column, name in enumerate(found):
            states = (inside.get(name) or {}).get("layers") or {}
            curves = [[one[f"{key}_mean"] for one in states.values()] for key in ("difference", "relative")]
            curves.append([list(ys) for ys in zip(*attention.get(name, {}).get("to_last", ()), strict=True)])
            for panel, lines in zip(axes[:, column], curves, strict=True):
                for i, ys in enumerate(lines):
                    label = model if len(lines) == 1 else f"layer {i + 1}, {model}"
                    # What is zero, as the last distance is by definition, has no place on these axes.
                    known = [(t, y) for t, y in enumerate(ys, 1) if y]
                    panel.plot(*zip(*known, strict=True) if known else ([], []), linestyle=style,
                               color=f"{0.7 * i / max(1, len(lines) - 1):.2f}", label=label)  # fmt: skip
    for row, label in zip(axes, labels, strict=True):
        for panel, name in zip(row, found, strict=True):
            panel.set(xscale="log", yscale="log", xlabel="recurrence t", ylabel=label, title=f"region {name}")
    for panel in axes[0]:
        panel.legend(frameon=False, fontsize=7)
    return figure


def _rows(rows: Sequence[Sequence[float | None]]) -> list[list[float]]:
    return [_numbers(row) for row in rows]


PROFILES = {
    "concentration": "column-sum concentration",
    "sink_rate": "sink rate",
    "mixing": "mixing score (nats)",
    "compression": "residual entropy (nats)",
}


def stages(results: Results) -> Any:
    """[M]: the profile over the layers of each pass, beside a feed-forward control's over its depth."""
    found = _part(results, "trained", "attention").get("regions") or {}
    control = (results.get("control") or {}).get("profiles")
    if not found:
        return None
    figure, axes = _grid(len(PROFILES), len(found), height=2.4)
    for column, (name, region) in enumerate(found.items()):
        layers, passes = len(region["layers"]), len(region["profiles"]["mixing"])
        for row, (key, label) in enumerate(PROFILES.items()):
            panel = axes[row][column]
            rows = _rows(region["profiles"][key])
            if layers == 1:  # one layer has no profile over depth: show it over recurrences
                panel.plot(range(1, passes + 1), [r[0] for r in rows], color="black")
                panel.set(xlabel="recurrence")
            else:
                at = [(i + 0.5) / layers for i in range(layers)]
                for t, ys in enumerate(rows):
                    panel.plot(at, ys, color=f"{0.8 - 0.7 * t / max(1, passes - 1):.2f}", marker=".", linewidth=0.9,
                               label=f"pass {t + 1}" if t in (0, passes - 1) else None)  # fmt: skip
                if control is not None:
                    ys = _numbers(control[key])
                    panel.plot([(i + 0.5) / len(ys) for i in range(len(ys))], ys, "--", color="C3", label="loops off")
                panel.set(xlabel="relative depth", xlim=(0, 1))
            panel.set(ylabel=label, title=f"region {name}" if row == 0 else "")
        if layers > 1:
            axes[0][column].legend(frameon=False, fontsize=7)
    return figure


def cycles(results: Results) -> Any:
    """[M] Figure 5: the last token's states at all layers and recurrences, in the plane of two components."""
    found = _part(results, "trained", "paths").get("cycles") or {}
    if not found:
        return None
    control = _part(results, "untrained", "paths").get("cycles") or {}
    models = [("trained", found)] + ([("untrained", control)] if control else [])
    figure, axes = _grid(len(models), len(found), 4.6, 3.8)
    for row, (model, regions) in zip(axes, models, strict=True):
        for panel, (name, cycle) in zip(row, regions.items(), strict=True):
            recurrences = [one for one in cycle["points"] if len(_drawable(one)) == len(one)]
            stream = [point for recurrence in recurrences for point in recurrence]
            panel.plot(*zip(*stream, strict=True), color="0.8", linewidth=0.7, zorder=1)
            passes = len(recurrences)
            for i in range(len(cycle["layers"])):
                own = [recurrence[i] for recurrence in recurrences]
                shades = [f"{0.8 - 0.8 * t / passes:.2f}" for t in range(passes)]
                panel.scatter(*zip(*own, strict=True), c=shades, marker=_MARKERS[i % 8], s=18, zorder=2)
                panel.scatter([], [], color="black", marker=_MARKERS[i % 8], label=f"layer {i + 1}")
            first, second = cycle["explained"]
            panel.set(
                xlabel=f"component 1 ({first:.0%})", ylabel=f"component 2 ({second:.0%})",
                title=f"region {name}, {model}",
            )  # fmt: skip
            panel.legend(frameon=False, fontsize=7)
    return figure


def grid(results: Results) -> Any:
    """What governs the cycle: the limit type of untrained blocks over norm placement, injection and layers."""
    cells = results.get("grid")
    if not cells:
        return None
    norms, injections, layers = (list(dict.fromkeys(c[key] for c in cells)) for key in ("norm", "injection", "layers"))
    figure, axes = _grid(1, len(injections), 4.6, 0.9 + 0.8 * len(norms))
    for panel, injection in zip(axes[0], injections, strict=True):
        values = [[math.nan] * len(layers) for _ in norms]  # a grid that was cut short lacks some
        for cell in cells:
            if cell["injection"] != injection:
                continue
            i, j = norms.index(cell["norm"]), layers.index(cell["layers"])
            values[i][j] = cell["fixed"]["cosine"]
            kind = cell["limit"].replace(", ", ",\n").replace(" fixed", "\nfixed")
            numbers = f"{cell['fixed']['cosine']:.0%} fixed, norm x{cell['growth']:.2f}"
            least = "" if cell["least_cosine"] is None else f"\ncos {cell['least_cosine']:.4f}"
            panel.text(j, i, f"{kind}\n{numbers}{least}", ha="center", va="center", fontsize=6)
        panel.imshow(values, cmap="gray", vmin=-1.8, vmax=1, aspect="auto")
        panel.set_xticks(range(len(layers)), [f"{k} layer{'s' * (k > 1)}" for k in layers])
        panel.set_yticks(range(len(norms)), norms)
        panel.set(title=f"input injected: {injection.replace('_', ' ')}")
    return figure


FIGURES: Mapping[str, Callable[[Results], Any]] = {
    "figure1-paths": paths,
    "figure2-dlr": dlr,
    "figure3-steps": steps,
    "figure5-angles": angles,
    "curvature": bends,
    "limits": limits,
    "layers": layers,
    "attention": attention,
    "stages": stages,
    "cycles": cycles,
    "grid": grid,
}


def draw_figures(results: Results, folder: Path, fmt: str = "png") -> list[Path]:
    """Write every figure that the results hold something for; partial results say so in the figure.

    Returns:
        the files written.
    """
    written = []
    for name, draw in FIGURES.items():
        figure = draw(results)
        if figure is None:
            continue
        if results.get("partial"):
            figure.suptitle("partial: interrupted", fontsize=9, color="0.4")
        path = folder / f"{name}.{fmt}"
        figure.savefig(path, dpi=120, format=fmt)
        written.append(path)
    return written
