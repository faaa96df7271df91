"""A policy against full depth and against a bare loop of as many steps: in a forward pass, and token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from haltkit.comparison.speed import Speed
from haltkit.models.gpt.bench.work import flops, means
from haltkit.models.gpt.decoding import Decoder
from haltkit.models.gpt.model import LoopedGPT
from haltkit.specs import Policies
from haltkit.timing import in_turns, milliseconds

__all__ = ["decode_speed", "forward_speed"]


@torch.inference_mode()
def forward_speed(
    model: LoopedGPT, ids: Tensor, policies: Mapping[str, Policies], *, max_loops: int, repeats: int
) -> list[dict[str, Any]]:
    """Compact teacher-forced passes over ``(B, T)`` against the plain model at full depth."""
    taken: dict[str, Mapping[str, Tensor]] = {}

    def run(name: str) -> None:
        taken[name] = model.forward_adaptive(ids, policies[name], max_loops=max_loops, execution="compact").steps

    runs: dict[str, Callable[[], object]] = {"full": lambda: model(ids, max_loops)}
    runs |= {name: partial(run, name) for name in policies}
    for name in policies:
        run(name)
    speeds = {name: Speed(name, means(taken[name])) for name in policies}
    for speed in speeds.values():
        runs |= speed.bare(partial(model, ids))
    times = in_turns(runs, repeats)
    work = partial(flops, model, keys=(ids.shape[1] + 1) / 2)
    return [
        {
            "mode": "forward",
            "batch": len(ids),
            "length": ids.shape[1],
            "spec": name,
            "full_ms_per_token": milliseconds(times["full"], ids.numel()),
            "ms_per_token": milliseconds(times[name], ids.numel()),
            **speeds[name].result(times, work, max_loops),
        }
        for name in policies
    ]


@torch.inference_mode()
def decode_speed(
    model: LoopedGPT, ids: Tensor, policies: Mapping[str, Policies], *, start: int, max_loops: int, repeats: int
) -> list[dict[str, Any]]:
    """Cached decoding of the tokens of ``(B, T)`` from ``start`` on, against cached decoding at full depth."""
    count = ids.shape[1] - start
    taken: dict[str, list[Mapping[str, Tensor]]] = {}
    decoders = {name: Decoder(model, one, max_loops=max_loops) for name, one in policies.items()}
    bare = Decoder(model, f"fixed:steps={max_loops}", max_loops=max_loops)
    for decoder in (bare, *decoders.values()):
        decoder.prefill(ids[:, :start])

    def fixed(loops: Mapping[str, int]) -> None:
        bare.lengths = [start] * len(ids)
        for i in range(start, ids.shape[1]):
            bare.step_fixed(ids[:, i], loops)

    def run(name: str) -> None:
        decoder = decoders[name]
        decoder.lengths = [start] * len(ids)  # what is after it is written anew
        taken[name] = [decoder.step(ids[:, i]).steps for i in range(start, ids.shape[1])]

    runs: dict[str, Callable[[], object]] = {"full": partial(fixed, dict.fromkeys(model.regions, max_loops))}
    runs |= {name: partial(run, name) for name in policies}
    speeds: dict[str, Speed] = {}
    for name in policies:
        run(name)
        steps = {region: torch.cat([step[region] for step in taken[name]]) for region in model.regions}
        speeds[name] = Speed(name, means(steps))
        runs |= speeds[name].bare(fixed)
    times = in_turns(runs, repeats)
    work = partial(flops, model, keys=start + (count + 1) / 2)
    tokens = count * len(ids)
    return [
        {
            "mode": "decode",
            "batch": len(ids),
            "length": ids.shape[1],
            "spec": name,
            "full_ms_per_token": milliseconds(times["full"], tokens),
            "ms_per_token": milliseconds(times[name], tokens),
            **speeds[name].result(times, work, max_loops),
        }
        for name in policies
    ]
