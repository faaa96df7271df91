"""The layers inside a loop: each visited once a step, each with a trajectory and a limit of its own.

Step signals are only comparable at one place of the cycle, so nothing here mixes layers but :func:`distinctness` and
:func:`are_distinct`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from haltkit import signals
from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.numbers import rounded
from haltkit.diagnostics.results import LayerCurves, Spread
from haltkit.diagnostics.streaming import Moments, Series

__all__ = [
    "LayerStatistics",
    "LayersSummary",
    "are_distinct",
    "distinctness",
    "layer_distances",
]

# Fixed points stay apart if the angle between them is still so much of what it was half way there, and so many
# roundings: where layers' shares vanish it halves as steps double, or ends in rounding.
LASTING, ROUNDINGS = 0.9, 100.0


def layer_distances(states: Tensor) -> dict[str, Tensor]:
    """How one layer's output moves over steps and how far it is from its own fixed point.

    Args:
        states: ``(K, ..., D)``, steps 1 .. K of one layer; the last stands for its fixed point.

    Returns:
        ``(K, ...)`` each: ``difference`` ``||x_t - x_{t-1}||`` and ``difference_cosine`` (NaN at t = 1), ``distance``
        ``||x_t - x*||``, ``distance_cosine`` ``cos(x_t, x*)``, and ``relative``, the distance over ``||x*||``.
    """
    last = states[-1]
    difference = torch.full(states.shape[:-1], torch.nan, dtype=signals.measured(states[:1]).dtype)
    turned = difference.clone()
    difference[1:] = signals.norm(signals.difference(states[1:], states[:-1]))
    turned[1:] = signals.cosine(states[1:], states[:-1])
    distance = signals.norm(signals.difference(states, last))
    return {
        "difference": difference,
        "difference_cosine": turned,
        "distance": distance,
        "distance_cosine": signals.cosine(states, last.expand_as(states)),
        "relative": distance / signals.norm(last),
    }


def distinctness(fixed_points: Sequence[Tensor]) -> Tensor:
    """Least cosine between the first layer's fixed point and every other layer's, ``(..., D)`` each to ``(...)``.

    1 if the cycle is degenerate, all layers resting at one point ([M], Fig. 6).

    Raises:
        DiagnosticError: fewer than two layers: there is no cycle.
    """
    if len(fixed_points) < 2:
        raise DiagnosticError("one layer has no cycle: distinctness needs at least two")
    return torch.stack([signals.cosine(fixed_points[0], other) for other in fixed_points[1:]]).amin(0)


def _apart(states: Sequence[Tensor]) -> Tensor:
    """Greatest distance between the first layer's direction and another's, ``(..., D)`` each to ``(...)``.

    ``2 (1 - cos)`` is its square; differences of directions are exact where the cosine has rounded to 1.
    """
    first, *others = (signals.measured(state) / signals.norm(state)[..., None] for state in states)
    return torch.stack([signals.norm(signals.difference(first, other)) for other in others]).amax(0)


def are_distinct(half_way: Sequence[Tensor], end: Sequence[Tensor]) -> Tensor:
    """Whether the layers rest at several points, not at one: ``(..., D)`` each to ``(...)``, bool.

    In a degenerate cycle, where every layer's share vanishes, the least cosine between the fixed points *tends* to 1
    ([M], Fig. 6); in one of small shares it stays near 1. No bound on the cosine tells these apart, its course does.

    Args:
        half_way, end: each layer's state at step K / 2, and at K, which stands for its fixed point.

    Raises:
        DiagnosticError: fewer than two layers: there is no cycle.
    """
    if len(end) < 2:
        raise DiagnosticError("one layer has no cycle: distinct fixed points need at least two")
    before, after = _apart(half_way), _apart(end)
    return (after >= LASTING * before) & (after > signals.rounding_floor(ROUNDINGS, end[0].dtype))


class LayersSummary(NamedTuple):
    """The layers of one region.

    ``least_cosine`` is :func:`distinctness` over tokens, ``distinct`` the share of tokens for which the layers' fixed
    points are; both None for one layer.
    """

    layers: dict[str, LayerCurves]
    least_cosine: Spread | None
    distinct: float | None


class LayerStatistics:
    """The layers of one region over any number of windows; memory does not grow with them."""

    def __init__(self) -> None:
        self._series: dict[str, dict[str, Series]] = {}
        self._cosine, self._distinct = Moments(), Moments()

    def add(self, states: Mapping[str, Sequence[Tensor]]) -> None:
        """Take one window's recording, as :func:`haltkit.recording.layers.record_layers` makes it."""
        half_way, ends = [], []
        for path, kept in states.items():
            if not kept:
                raise DiagnosticError(f"layer {path!r} never ran: is it inside the loop?")
            stacked = torch.stack(list(kept))
            for name, values in layer_distances(stacked).items():
                self._series.setdefault(path, {}).setdefault(name, Series()).add(values)
            half_way.append(stacked[len(stacked) // 2 - 1])
            ends.append(stacked[-1])
        if len(ends) > 1:
            self._cosine.add(distinctness(ends).reshape(1, -1))
            self._distinct.add(are_distinct(half_way, ends).reshape(1, -1))

    def summary(self) -> LayersSummary:
        """The statistics over all windows taken so far."""
        layers = {
            path: LayerCurves({name: one.summary() for name, one in series.items()})
            for path, series in self._series.items()
        }
        if not self._cosine.count.numel():
            return LayersSummary(layers, None, None)
        least = Spread(rounded(self._cosine.means()[0]), rounded(self._cosine.deviations()[0]))
        return LayersSummary(layers, least, rounded(self._distinct.means()[0]))
