"""Reduced statistics of a model's loops: what figures across training need, in a few kilobytes."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

import haltkit
from haltkit import signals
from haltkit.models.gpt import LoopedGPT
from haltkit.trajectory import RegionTrajectory, delta_loop_ratios

__all__ = ["loop_statistics"]


@torch.no_grad()
def loop_statistics(model: LoopedGPT, windows: Tensor, loops: int = 32) -> dict[str, Any]:
    """How each region moves over a fixed number of loops, pooled over all tokens.

    Args:
        model: not compiled (hooks added to a compiled module do not fire), in float32 or float64.
        windows: inputs ``(N, T)``, taken one at a time.
        loops: the fixed depth.

    Returns:
        ``{"loops", "tokens", "regions": {name: {statistic: [k = 1 .. K]}}, "dlr": {"a -> b": {convention: ...}}}``.
        Means and standard deviations are over tokens; ``cosine_of_means`` is the cosine of the mean steps. What is
        not defined at k = 1 is null.
    """
    parts: dict[str, dict[str, list[Tensor]]] = {}
    means: dict[str, list[Tensor]] = {}
    ratios: dict[str, dict[str, list[Tensor]]] = {}
    for window in windows:
        with haltkit.record(model) as recording:
            model(window[None], loops)
        regions = recording.trajectory.regions
        for name, region in regions.items():
            for key, values in _series(region).items():
                parts.setdefault(name, {}).setdefault(key, []).append(values.flatten(1))
            means.setdefault(name, []).append(region.differences().flatten(1, -2).mean(1))
        for (a, before), (b, after) in itertools.pairwise(regions.items()):
            for convention, ratio in delta_loop_ratios(before, after).items():
                ratios.setdefault(f"{a} -> {b}", {}).setdefault(convention, []).append(ratio.flatten())
    return {
        "loops": loops,
        "tokens": windows.numel(),
        "regions": {name: _reduce(series, torch.stack(means[name]).mean(0)) for name, series in parts.items()},
        "dlr": {
            boundary: {
                convention: {"mean": _round(torch.cat(found).mean()), "median": _round(torch.cat(found).median())}
                for convention, found in conventions.items()
            }
            for boundary, conventions in ratios.items()
        },
    }


def _series(region: RegionTrajectory) -> dict[str, Tensor]:
    return {
        "step_norm": region.step_norms(),
        "acceleration": region.accelerations(),
        "cosine": region.step_angles(),
        "state_norm": region.state_norms(),
        "distance_to_last": signals.norm(signals.difference(region._consecutive_states()[1:], region.last)),
    }


def _reduce(series: dict[str, list[Tensor]], mean_steps: Tensor) -> dict[str, list[float | None]]:
    """Mean and standard deviation over tokens of each statistic, step by step."""
    reduced: dict[str, list[float | None]] = {}
    for key, found in series.items():
        values = torch.cat(found, 1)  # (K, tokens)
        reduced[f"{key}_mean"] = [_round(v) for v in values.nanmean(1)]
        spread = (values - values.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
        reduced[f"{key}_std"] = [_round(v) for v in spread]
    cosines = signals.step_angle(mean_steps[1:], mean_steps[:-1])
    reduced["cosine_of_means"] = [None, *(_round(v) for v in cosines)]
    return reduced


def _round(value: Tensor) -> float | None:
    number = float(value)
    return float(f"{number:.4g}") if abs(number) < float("inf") else None
