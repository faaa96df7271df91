"""Attention inside the loops, and over the depth of a model without loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from haltkit import signals
from haltkit.diagnostics.attention import (
    attention_numbers,
    capture_attention,
    frobenius_distances,
    residual_compression,
)
from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.numbers import Numbers, rounded
from haltkit.diagnostics.results import Attention, Control, RegionAttention
from haltkit.diagnostics.survey.windows import Tick, each_window
from haltkit.recording.layers import record_layers
from haltkit.subject import Subject

__all__ = ["survey_attention", "survey_layers_once"]

R = TypeVar("R")


class _Attention:
    """Attention and states of some layers over one pass at a time, summed over windows."""

    NAMES = ("concentration", "sink_rate", "mixing", "compression")

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = list(layers)
        self.frobenius: Tensor | None = None
        self.moved: Tensor | None = None  # (step - 1, layer)
        self.sums: Tensor | None = None  # (statistic, step, layer)
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
        visited = torch.stack([torch.stack(states[path]) for path in self.layers], 1)  # (step, layer, 1, T, D)
        moved = signals.norm(signals.difference(visited[1:], visited[:-1])).flatten(2).mean(-1).double()
        self.moved = moved if self.moved is None else self.moved + moved
        distances = frobenius_distances(ordered)
        self.frobenius = distances if self.frobenius is None else self.frobenius + distances
        self.sums = numbers if self.sums is None else self.sums + numbers
        self.windows += 1

    def summary(self) -> RegionAttention:
        """The means over the windows; there must have been one."""
        if self.frobenius is None or self.moved is None or self.sums is None:
            raise DiagnosticError("attention was captured in no window")
        frobenius, sums = self.frobenius / self.windows, self.sums / self.windows
        width, n = len(self.layers), len(frobenius)
        later = torch.arange(width, n)
        successive = frobenius[later, later - width].view(-1, width)  # the same layer, one step apart
        every = torch.arange(n)
        to_last = frobenius[every, n - width + every % width].view(-1, width)
        return RegionAttention(
            layers=tuple(self.layers),
            frobenius=_table(frobenius, 3),
            successive=_table(successive, 4),
            to_last=_table(to_last, 4),
            moved=_table(self.moved / self.windows, 4),
            # Settled passes differ in late digits, and correlations of their profiles see those.
            profiles={name: _table(sums[i], 7) for i, name in enumerate(self.NAMES)},
        )


def _table(values: Tensor, digits: int) -> tuple[Numbers, ...]:
    return tuple(tuple(rounded(v, digits) for v in row) for row in values)


def survey_attention(
    subject: Subject, windows: Tensor, loops: int = 16, tokens: int = 128, tick: Tick | None = None
) -> Attention:
    """Realised attention of each layer inside each region: how it settles, and what stage of inference it looks like.

    A region is ``unseen`` if its layers are not known, or its attention is not ``scaled_dot_product_attention``.

    Args:
        windows: inputs ``(N, T)``.
        loops: the depth.
        tokens: windows are cut to this length: a matrix grows with the square of it.
        tick: told after each window.
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
                {path: subject.by_step(path, matrices[path], loops, loops) for path in one.layers},
                {path: subject.by_step(path, states[path], loops, iterations) for path in one.layers},
                loops,
            )

    whole = each_window(windows, use, tick) if known else True
    return Attention(
        loops,
        max((one.windows for one in gathered.values()), default=0),
        min(tokens, windows.shape[1]),
        not whole,
        tuple(unseen),
        {name: one.summary() for name, one in gathered.items() if one.windows},
    )


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
    model: nn.Module,
    layers: Sequence[str],
    run: Callable[[Tensor], object],
    windows: Tensor,
    *,
    tokens: int = 128,
    tokens_seen: int | None = None,
) -> Control:
    """The profile over depth of a model without loops: the control that stages of inference are compared with.

    Args:
        layers: their paths, bottom to top.
        run: one forward pass of inputs ``(1, T)``.
        windows: inputs ``(N, T)``.
        tokens: windows are cut to this length.
        tokens_seen: by the model in its training.

    Raises:
        DiagnosticError: a layer whose attention is not ``scaled_dot_product_attention``.
    """
    gathered = _Attention(layers)
    for window in windows:
        inputs = window[None, :tokens]
        matrices, states, _ = _watch(model, layers, partial(run, inputs))
        missing = [path for path in layers if not matrices[path]]
        if missing:
            raise DiagnosticError(f"the attention of {missing[0]!r} cannot be seen: it is written out by hand")
        gathered.add(matrices, states, 1)
    summary = gathered.summary()
    profiles = {name: rows[0] for name, rows in summary.profiles.items()}
    return Control(summary.layers, profiles, tokens_seen)
