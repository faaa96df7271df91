"""What retiring rows saves, and what it costs where none can be retired."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from haltkit.loop import LoopRun
from haltkit.models.gpt.bench.work import flops, means
from haltkit.models.gpt.memory import CompactMemory, CompactRegionLoop, Rows
from haltkit.models.gpt.model import LoopedGPT
from haltkit.protocol import LoopStep, Verdict
from haltkit.specs import Policies
from haltkit.specs import policy as build_policy
from haltkit.timing import clock, in_turns, ratio

__all__ = ["Scripted", "break_even", "full_depth_overhead", "slowest_row"]


@torch.inference_mode()
def full_depth_overhead(model: LoopedGPT, ids: Tensor, *, loops: int, repeats: int) -> dict[str, float]:
    """What compact execution adds where nothing halts early: to a bare loop, with no policy and with ``accel``."""
    compact = {"compact": f"fixed:steps={loops}", "compact, accel": "accel:tau=1e-30"}
    runs: dict[str, Callable[[], object]] = {"bare": lambda: model(ids, loops)}
    runs |= {
        name: partial(model.forward_adaptive, ids, spec, max_loops=loops, execution="compact")
        for name, spec in compact.items()
    }
    in_turns(runs, 1)
    times = in_turns(runs, repeats)
    return {"rows": ids.numel(), "loops": loops, **{name: ratio(times, name, "bare") - 1 for name in compact}}


@dataclass(frozen=True)
class Scripted:
    """Halts every row at a depth drawn beforehand, evenly from 1 to ``deepest``: known depths that surely differ."""

    deepest: int
    seed: int = 0

    def init(self, x0: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)  # in the rows' order, in whatever shape they come
        return torch.randint(1, self.deepest + 1, x0.shape[:-1], generator=generator).to(x0.device)

    def update(self, state: Tensor, step: LoopStep) -> tuple[Tensor, Verdict]:
        left = state - step.k
        return state, Verdict(left.to(torch.float32), left <= 0)


@torch.inference_mode()
def slowest_row(
    model: LoopedGPT, ids: Tensor, name: str, policy: Policies, *, max_loops: int, repeats: int
) -> dict[str, Any]:
    """Compact execution against iterating all tokens until the slowest is done.

    ``bare`` does that with no policy at all, ``masked`` with it; step counts of masked and compact are equal.
    """
    depths = model.forward_adaptive(ids, policy, max_loops=max_loops, execution="compact").steps
    slowest = {name: int(taken.max()) for name, taken in depths.items()}
    runs: dict[str, Callable[[], object]] = {
        "bare": lambda: model(ids, slowest),
        "masked": lambda: model.forward_adaptive(ids, policy, max_loops=max_loops),
        "compact": lambda: model.forward_adaptive(ids, policy, max_loops=max_loops, execution="compact"),
    }
    in_turns(runs, 1)
    times = in_turns(runs, repeats)
    keys = (ids.shape[1] + 1) / 2
    return {
        "batch": len(ids),
        "length": ids.shape[1],
        "spec": name,
        "bound": flops(model, slowest, keys) / flops(model, means(depths), keys),
        "steps": means(depths),
        "slowest": slowest,
        "tokens_per_second": ids.numel() / statistics.median(times["compact"]),
        "over_bare": ratio(times, "bare", "compact"),
        "over_masked": ratio(times, "masked", "compact"),
    }


def _retire(body: CompactRegionLoop, run: LoopRun, active: Tensor) -> None:
    """Retire what is not active, and take a step."""
    run.rows.active, run.rows.running = active, int(active.sum())
    kept = run.retire(at_once=True)
    if kept is not None:
        body.select(kept)
    body.step(run.x, 2, run.active)


@torch.inference_mode()
def break_even(model: LoopedGPT, rows: Sequence[int], shares: Sequence[float], *, repeats: int) -> list[dict[str, Any]]:
    """The share of halted rows from which retiring them pays within one step, by rows computed.

    ``at``: the smallest such share among those tried; None: none of them.
    """
    name, region = next(iter(model.regions.items()))
    device = model.wte.weight.device
    length = min(256, model.block_size)
    policy = build_policy("accel:tau=1e-30")
    results = []
    for count in rows:
        t = min(count, length)
        b = count // t
        e = torch.randn(b, t, model.d_model, device=device)

        def prepare(b: int = b, t: int = t, e: Tensor = e) -> tuple[CompactRegionLoop, LoopRun]:
            """A loop after its first step."""
            present = Rows(b, t)
            memories = [CompactMemory(present) for _ in region.body.blocks]
            positions = torch.arange(t, device=device).repeat(b)
            body = CompactRegionLoop(region, e.flatten(0, 1), positions, model.noise, present, memories)
            run = LoopRun(policy, region.initial_state(e, model.noise), execution="compact", name=name)
            run.advance_if_sound(body.step(run.x, 1, run.active), body.finite_probe())
            return body, run

        found = None
        body, run = prepare()
        body.step(run.x, 2, run.active)
        for share in shares:
            stay, go = [], []
            for _ in range(repeats):
                body, run = prepare()
                stay.append(clock(partial(body.step, run.x, 2, run.active))[0])
                body, run = prepare()
                active = torch.randperm(b * t, generator=torch.Generator().manual_seed(0)) >= round(share * b * t)
                active = active.to(device)
                go.append(clock(partial(_retire, body, run, active))[0])
            if statistics.median(g / s for g, s in zip(go, stay, strict=True)) < 1:
                found = share
                break
        results.append({"rows": b * t, "at": found})
    return results
