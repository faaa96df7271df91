"""One sequence's path through depth and loop steps, in a plane."""

from __future__ import annotations

import torch
from torch import Tensor

from haltkit import signals
from haltkit.diagnostics.numbers import Numbers, rounded
from haltkit.diagnostics.pca import fit_pca
from haltkit.diagnostics.results import Cycle, Paths, Segment
from haltkit.diagnostics.survey.tokens import text_of
from haltkit.recording.layers import record_layers
from haltkit.subject import LayerStates, Subject

__all__ = ["survey_paths"]


@torch.no_grad()
def survey_paths(subject: Subject, window: Tensor, loops: int = 32, tokens: int = 6) -> Paths:
    """One sequence's states over depth and loop steps in the plane of their first two principal components.

    The plane is fitted to the union of the chosen tokens' states; each region with two or more layers adds the cycle
    of the last token, in a plane of its own.

    Args:
        window: inputs ``(T,)``.
        loops: the depth.
        tokens: how many positions, spread evenly.
    """
    positions = torch.linspace(0, len(window) - 1, min(tokens, len(window))).round().long()
    order = list(subject.depth) or list(subject.regions)
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
    return Paths(
        explained=tuple(rounded(v) for v in pca.explained),
        positions=tuple(positions.tolist()),
        text=text_of(subject, window[positions]),
        segments=tuple(
            Segment(name, looped, _points(pca.project(states).transpose(0, 1))) for name, looped, states in parts
        ),
        cycles=_cycles(subject, inside),
    )


def _cycles(subject: Subject, inside: LayerStates) -> dict[str, Cycle]:
    cycles = {}
    for name in subject.regions:
        paths = subject.layer_paths(name)
        if len(paths) < 2:
            continue
        layers = torch.stack([torch.stack(inside[path])[:, 0, -1] for path in paths], 1)  # (K, L, D)
        known = layers[layers.isfinite().all(-1)]
        if len(known) <= 2:
            continue  # two points fit any plane
        plane = fit_pca(known)
        cycles[name] = Cycle(tuple(paths), tuple(rounded(v) for v in plane.explained), _points(plane.project(layers)))
    return cycles


def _points(values: Tensor) -> tuple[tuple[Numbers, ...], ...]:
    return tuple(tuple(tuple(rounded(v, 4) for v in point) for point in row) for row in values)
