"""Surveys: run a model over windows of text and gather the diagnostics, in memory that does not grow with the text.

Each survey returns plain values for JSON. Ctrl-C ends one early: what was gathered is kept and marked ``partial``.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import haltkit
from haltkit import signals
from haltkit.diagnostics.attention import (
    attention_numbers,
    capture_attention,
    frobenius_distances,
    residual_compression,
)
from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.geometry import BoundaryStatistics, RegionStatistics, distances, first_below, nonfinite_rows
from haltkit.diagnostics.layers import LayerStatistics, record_layers
from haltkit.diagnostics.limits import SHARE, TOLERANCE, Limit, Measure, classify_limits, limit_counts, norm_growth
from haltkit.diagnostics.pca import fit_pca
from haltkit.diagnostics.streaming import Moments, Series, rounded
from haltkit.diagnostics.subject import Subject
from haltkit.trajectory import RegionTrajectory

__all__ = [
    "DEEP_LOOPS",
    "SMALL_STEP",
    "survey_attention",
    "survey_geometry",
    "survey_layers_once",
    "survey_limits",
    "survey_paths",
    "survey_tokens",
]

# [M]: the state after 128 recurrences stands for the fixed point.
DEEP_LOOPS = 128
# A step of under a hundredth of the state is small; whether the state is near its limit then is another question.
SMALL_STEP = 0.01
Tick = Callable[[], None]
R = TypeVar("R")


def _each(windows: Tensor, use: Callable[[Tensor], None], tick: Tick | None) -> bool:
    """Use windows one at a time; whether all of them were."""
    if not len(windows):
        raise DiagnosticError("there is no window of text to run on")
    try:
        for window in windows:
            use(window[None])
            if tick is not None:
                tick()
    except KeyboardInterrupt:
        return False
    return True


def survey_geometry(subject: Subject, windows: Tensor, loops: int = 32, tick: Tick | None = None) -> dict[str, Any]:
    """The geometry of every region at a fixed depth, and the DLR at every boundary.

    Args:
        windows: inputs ``(N, T)``.
        tick: told after each window.

    Returns:
        ``{"loops", "tokens", "partial", "regions": {name: RegionStatistics}, "dlr": {"a -> b": {convention: ...}}}``.
    """
    regions = {name: RegionStatistics() for name in subject.regions}
    pairs = list(itertools.pairwise(subject.regions))
    boundaries = {pair: BoundaryStatistics() for pair in pairs}

    def use(window: Tensor) -> None:
        trajectory = subject.record(window, loops)
        for name, statistics in regions.items():
            statistics.add(trajectory[name])
        for (a, b), boundary in boundaries.items():
            boundary.add(trajectory[a], trajectory[b])

    whole = _each(windows, use, tick)
    seen = {name: statistics for name, statistics in regions.items() if statistics.tokens}
    return {
        "loops": loops,
        "tokens": min((s.tokens for s in regions.values()), default=0),
        "partial": not whole,
        "regions": {name: statistics.summary() for name, statistics in seen.items()},
        "dlr": {f"{a} -> {b}": boundary.summary() for (a, b), boundary in boundaries.items()},
    }


class _Limits:
    """The long run of one region, over windows."""

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = layers
        self.distance, self.relative = Series(), Series()
        self.counts: dict[Measure, Counter[str]] = {"cosine": Counter(), "distance": Counter()}
        self.layer_counts: dict[str, Counter[str]] = {path: Counter() for path in layers}
        self.periods: Counter[int] = Counter()
        self.inside = LayerStatistics()
        self.small, self.settled, self.growth = Moments(), Moments(), Moments()
        self.nonfinite = 0

    def add(self, region: RegionTrajectory, layers: Mapping[str, list[Tensor]]) -> None:
        states = region._consecutive_states()[1:]
        found = distances(region)
        sizes = signals.norm(region.last)
        self.nonfinite += nonfinite_rows(region)
        self.distance.add(found)
        self.relative.add(found / sizes)
        self.growth.add(norm_growth(states).reshape(1, -1))
        self.settled.add(first_below(found / sizes, TOLERANCE).reshape(1, -1))
        for measure, counter in self.counts.items():
            kind, periods = classify_limits(states, measure=measure)
            counter.update(limit_counts(kind))
            if measure == "cosine":
                self.periods.update(periods[kind == Limit.ORBIT].tolist())
        for path, kept in layers.items():
            self.layer_counts[path].update(limit_counts(classify_limits(torch.stack(kept))[0]))
        self.small.add(_distance_at_small_step(region, found).reshape(1, -1))
        if layers:
            self.inside.add(layers)

    def summary(self) -> dict[str, Any]:
        number: Callable[[Moments], dict[str, Any]] = lambda m: {  # noqa: E731
            "mean": rounded(m.means()[0]), "std": rounded(m.deviations()[0]), "tokens": int(m.count[0]),
        }  # fmt: skip
        return {
            **self.distance.summary("distance"),
            **self.relative.summary("relative_distance"),
            "nonfinite": self.nonfinite,
            "limits": {measure: dict(counter) for measure, counter in self.counts.items()},
            "periods": {str(period): count for period, count in sorted(self.periods.items())},
            "settled_at": number(self.settled),
            "norm_growth": number(self.growth),
            "distance_over_small_step": number(self.small),
            "layer_limits": {path: dict(counter) for path, counter in self.layer_counts.items()},
            **self.inside.summary(),
        }


def _distance_at_small_step(region: RegionTrajectory, found: Tensor) -> Tensor:
    """``||x_k - x*|| / ||d_k||`` at each row's first small step; NaN where no step is small. ``(...)``."""
    steps, sizes = region.step_norms(), region.state_norms()
    small = steps < SMALL_STEP * sizes
    first = small.int().argmax(0, keepdim=True)
    ratio = (found / steps).gather(0, first)[0]
    return torch.where(small.any(0), ratio, torch.nan)


def survey_limits(
    subject: Subject, windows: Tensor, loops: int = DEEP_LOOPS, tick: Tick | None = None
) -> dict[str, Any]:
    """Where each region's loop ends: distance to x*, limit types, and the same for each layer inside.

    States of one window are in memory at a time.

    Returns:
        ``{"loops", "tokens", "partial", "tolerance", "share", "regions": {name: ...}}``.
    """
    gathered = {name: _Limits(subject.layer_paths(name)) for name in subject.regions}
    tokens = 0

    def use(window: Tensor) -> None:
        nonlocal tokens
        trajectory, layers = subject.with_layers(window, loops)
        for name, one in gathered.items():
            one.add(trajectory[name], {path: layers[path] for path in one.layers})
        tokens += window.numel()

    whole = _each(windows, use, tick)
    return {
        "loops": loops,
        "tokens": tokens,
        "partial": not whole,
        "tolerance": TOLERANCE,
        "share": SHARE,
        "small_step": SMALL_STEP,
        "regions": {name: one.summary() for name, one in gathered.items()} if tokens else {},
    }


class _Attention:
    """Attention and states of some layers over one pass at a time, summed over windows."""

    NAMES = ("concentration", "sink_rate", "mixing", "compression")

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = list(layers)
        self.frobenius: Tensor | None = None
        self.moved: Tensor | None = None  # (recurrence - 1, layer)
        self.sums: Tensor | None = None  # (statistic, recurrence, layer)
        self.windows = 0

    def add(self, matrices: Mapping[str, list[Tensor]], states: Mapping[str, list[Tensor]], loops: int) -> None:
        numbers = torch.zeros(len(self.NAMES), loops, len(self.layers), dtype=torch.float64)
        ordered: list[Tensor] = []
        for t, (i, path) in itertools.product(range(loops), enumerate(self.layers)):
            matrix = matrices[path][t][0]  # (H, T, T)
            ordered.append(matrix)
            found = attention_numbers(matrix)
            found["compression"] = float(residual_compression(states[path][t][0]))
            numbers[:, t, i] = torch.tensor([found[name] for name in self.NAMES])
        visited = torch.stack([torch.stack(states[path]) for path in self.layers], 1)  # (recurrence, layer, 1, T, D)
        moved = signals.norm(signals.difference(visited[1:], visited[:-1])).flatten(2).mean(-1).double()
        self.moved = moved if self.moved is None else self.moved + moved
        distances = frobenius_distances(ordered)
        self.frobenius = distances if self.frobenius is None else self.frobenius + distances
        self.sums = numbers if self.sums is None else self.sums + numbers
        self.windows += 1

    def summary(self) -> dict[str, Any]:
        """``frobenius`` over (recurrence, layer) pairs, recurrence by recurrence; the others ``[recurrence][layer]``.

        Of a layer's attention ``successive`` is the change from the recurrence before and ``to_last`` the distance to
        the last one's, which stands for its limit's; ``moved`` is the mean norm of the change of its states.
        """
        assert self.frobenius is not None
        assert self.moved is not None
        assert self.sums is not None
        frobenius, sums = self.frobenius / self.windows, self.sums / self.windows
        width, n = len(self.layers), len(frobenius)
        later = torch.arange(width, n)
        successive = frobenius[later, later - width].view(-1, width)  # the same layer, one recurrence apart
        every = torch.arange(n)
        to_last = frobenius[every, n - width + every % width].view(-1, width)
        return {
            "layers": self.layers,
            "frobenius": [[rounded(v, 3) for v in row] for row in frobenius],
            "successive": [[rounded(v, 4) for v in row] for row in successive],
            "to_last": [[rounded(v, 4) for v in row] for row in to_last],
            "moved": [[rounded(v, 4) for v in row] for row in self.moved / self.windows],
            # Settled passes differ in late digits, and correlations of their profiles see those.
            "profiles": {
                name: [[rounded(v, 7) for v in row] for row in sums[i]] for i, name in enumerate(self.NAMES)
            },
        }  # fmt: skip


def survey_attention(
    subject: Subject, windows: Tensor, loops: int = 16, tokens: int = 128, tick: Tick | None = None
) -> dict[str, Any]:
    """Realised attention of each layer inside each region: how it settles, and what stage of inference it looks like.

    Args:
        tokens: windows are cut to so many: a matrix grows with the square of it.

    Returns:
        ``{"loops", "windows", "partial", "unseen", "regions": {name: ...}}``; ``unseen`` names the regions whose
        layers are not known, or whose attention is not ``scaled_dot_product_attention``.
    """
    known = {name: subject.layer_paths(name) for name in subject.regions if subject.layer_paths(name)}
    gathered = {name: _Attention(paths) for name, paths in known.items()}
    every = [path for paths in known.values() for path in paths]
    unseen = [name for name in subject.regions if name not in known]

    def use(window: Tensor) -> None:
        matrices, states, iterations = _watch(subject.model, every, lambda: subject.at_depth(window[:, :tokens], loops))
        for name, one in gathered.items():
            if any(len(matrices[path]) < loops for path in one.layers):
                if name not in unseen:
                    unseen.append(name)
                continue
            one.add(
                {path: subject.by_recurrence(path, matrices[path], loops, loops) for path in one.layers},
                {path: subject.by_recurrence(path, states[path], loops, iterations) for path in one.layers},
                loops,
            )

    whole = _each(windows, use, tick) if known else True
    return {
        "loops": loops,
        "windows": max((one.windows for one in gathered.values()), default=0),
        "tokens": min(tokens, windows.shape[1]),
        "partial": not whole,
        "unseen": unseen,
        "regions": {name: one.summary() for name, one in gathered.items() if one.windows},
    }


def _watch(
    model: nn.Module, paths: Sequence[str], run: Callable[[], R]
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]], R]:
    matrices: dict[str, list[Tensor]] = {path: [] for path in paths}
    with (
        torch.no_grad(),
        record_layers(model, paths) as states,
        capture_attention(model, paths, lambda path, a: matrices[path].append(a)),
    ):
        result = run()
    return matrices, states, result


def survey_layers_once(
    model: nn.Module, layers: Sequence[str], run: Callable[[Tensor], object], windows: Tensor, tokens: int = 128
) -> dict[str, Any]:
    """The profile over depth of a model without loops: the control that stages of inference are compared with.

    Raises:
        DiagnosticError: a layer whose attention is not ``scaled_dot_product_attention``.
    """
    gathered = _Attention(layers)
    for window in windows:
        matrices, states, _ = _watch(model, layers, lambda window=window: run(window[None, :tokens]))  # type: ignore[misc]
        missing = [path for path in layers if not matrices[path]]
        if missing:
            raise DiagnosticError(f"the attention of {missing[0]!r} cannot be seen: it is written out by hand")
        gathered.add(matrices, states, 1)
    summary = gathered.summary()
    return {"layers": summary["layers"], "profiles": {name: rows[0] for name, rows in summary["profiles"].items()}}


@torch.no_grad()
def survey_paths(subject: Subject, window: Tensor, loops: int = 32, tokens: int = 6) -> dict[str, Any]:
    """One sequence's states over depth and loop steps in the plane of their first two principal components.

    The plane is fitted to the union of the chosen tokens' states; each region with two or more layers adds the cycle
    of the last token, in a plane of its own.

    Args:
        window: inputs ``(T,)``.
        tokens: how many positions, spread evenly.

    Returns:
        ``{"explained", "positions", "text", "segments": [{"name", "loop", "points": [token][k][2]}], "cycles": ...}``.
    """
    positions = torch.linspace(0, len(window) - 1, min(tokens, len(window))).round().long()
    order = list(subject.depth) or subject.regions
    once = [name for name in order if name not in subject.regions]
    with record_layers(subject.model, once) as kept:
        trajectory, inside = subject.with_layers(window[None], loops)
    parts = []
    for name in order:
        looped = name in subject.regions
        states = trajectory[name]._consecutive_states() if looped else torch.stack(kept[name])
        parts.append((name, looped, signals.measured(states[:, 0, positions])))  # (K, tokens, D)
    union = torch.cat([states.flatten(0, 1) for _, _, states in parts])
    pca = fit_pca(union[union.isfinite().all(-1)])
    cycles = {}
    for name in subject.regions:
        paths = subject.layer_paths(name)
        if len(paths) > 1:
            layers = torch.stack([torch.stack(inside[p])[:, 0, -1] for p in paths], 1)
            known = layers[layers.isfinite().all(-1)]  # of (K, L, D)
            if len(known) <= 2:
                continue  # no plane goes through so few
            plane = fit_pca(known)
            cycles[name] = {
                "layers": list(paths),
                "explained": [rounded(v) for v in plane.explained],
                "points": _points(plane.project(layers)),
            }
    return {
        "explained": [rounded(v) for v in pca.explained],
        "positions": positions.tolist(),
        "text": _text(subject, window[positions]),
        "segments": [
            {"name": name, "loop": looped, "points": _points(pca.project(states).transpose(0, 1))}
            for name, looped, states in parts
        ],
        "cycles": cycles,
    }


def _points(values: Tensor) -> list[Any]:
    return [[[rounded(v, 4) for v in point] for point in row] for row in values]


def _text(subject: Subject, ids: Tensor) -> list[str]:
    return subject.tokens(ids) if subject.tokens is not None else [str(int(i)) for i in ids]


@torch.no_grad()
def survey_tokens(subject: Subject, window: Tensor, policies: Sequence[str], loops: int = 32) -> dict[str, Any]:
    """One window token by token: the steps each took under each policy, and its signals over the loop.

    Args:
        window: inputs ``(T,)``.
        policies: specs; one that looks at logits is left out where the subject has no readout.

    Returns:
        ``{"text", "loops", "curves": {region: {signal: [token][k]}}, "steps": {spec: {region: [token]}}, "how",
        "left_out"}``; ``how`` is ``native`` or ``replayed`` (exact only where rows do not look at each other).
    """
    trajectory = subject.record(window[None], loops)
    curves, steps, left_out = {}, {}, {}
    for name, region in trajectory.regions.items():
        found = {
            "step_norm": region.step_norms(),
            "acceleration": region.accelerations(),
            "cosine": region.step_angles(),
        }
        curves[name] = {
            key: [[rounded(v, 3) for v in row] for row in values.flatten(1).T] for key, values in found.items()
        }  # fmt: skip
    for spec in policies:
        try:
            if subject.halted is not None:
                taken = subject.halted(window[None], spec, loops)
            else:
                policy = haltkit.policy(spec)
                readout = subject.readout and haltkit.readout_of_recordings(subject.readout, subject.model)
                taken = {n: haltkit.replay(policy, r, readout=readout).steps for n, r in trajectory.regions.items()}
        except ValueError as error:
            left_out[spec] = str(error)
            continue
        steps[spec] = {name: [int(v) for v in values.flatten()] for name, values in taken.items()}
    return {
        "text": _text(subject, window),
        "loops": loops,
        "curves": curves,
        "steps": steps,
        "how": "replayed" if subject.halted is None else "native",
        "left_out": left_out,
    }
