"""The honest cost of halting: what deciding costs, what retiring rows saves, and how much of it is theory.

Everything that is compared runs in turns (see :mod:`haltkit.timing`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from haltkit.comparison.settings import Candidate, Sweeps
from haltkit.loop import LoopRun
from haltkit.models.gpt.decoding import Decoded, Decoder
from haltkit.models.gpt.memory import CompactMemory, CompactRegionLoop, Rows
from haltkit.models.gpt.model import Block, LoopedGPT, Region
from haltkit.protocol import HaltingPolicy, LoopStep, Readout, Verdict, judge
from haltkit.registry import records
from haltkit.specs import Policies
from haltkit.specs import policy as build_policy
from haltkit.subject import Subject
from haltkit.timing import Times, clock, in_turns, milliseconds, ratio

__all__ = [
    "Scripted",
    "approximate_layouts",
    "break_even",
    "choose_policies",
    "decode_speed",
    "flops",
    "forward_speed",
    "full_depth_overhead",
    "policy_cost",
    "position_cost",
    "slowest_row",
]

ATTENTION_CALLS = 200
TARGET_STEP = 6  # where thresholds are put when none is given: deep enough for depths to differ


# What it costs in theory.


def flops(model: LoopedGPT, steps: Mapping[str, float], keys: float) -> float:
    """Floating-point operations of one token: matrix products and attention, those that do not loop included.

    Args:
        steps: mean body applications by region.
        keys: how many tokens it attends to.
    """
    d, total = model.d_model, 2.0 * model.d_model * model.vocab_size
    for name, layer in model.layers.items():
        blocks = layer.body.blocks if isinstance(layer, Region) else [layer]
        weights = sum(p.numel() for b in blocks for n, p in b.named_parameters() if p.ndim == 2)
        adapter = layer.body.adapter if isinstance(layer, Region) else None
        weights += 0 if adapter is None else adapter.weight.numel()
        total += steps.get(name, 1.0) * (2.0 * weights + len(blocks) * 4.0 * d * keys)
    return total


def choose_policies(subject: Subject, wanted: Sequence[Candidate]) -> dict[str, Policies]:
    """Policies ready to run, by name; one without a tau gets that at which a typical token takes ``TARGET_STEP`` steps.

    Raises:
        ValueError: a policy that does not decide token by token, or one whose scores give no threshold.
    """
    sweeps = Sweeps.on(replace(subject, target_steps=(TARGET_STEP,)), subject.look(), "auto")
    chosen: dict[str, Policies] = {}
    for candidate in wanted:
        for setting in sweeps.settings(candidate):
            if not setting.causal:
                raise ValueError(f"{setting.label!r} does not decide token by token, which is what is measured here")
            chosen[setting.text or setting.label] = setting.policies
    return chosen


# What deciding costs.


def _update(policy: HaltingPolicy[Any], state: Any, x: Tensor, x_prev: Tensor, active: Tensor, head: Readout) -> None:
    judge(policy, state, LoopStep(2, x, x_prev, active, head))


@torch.inference_mode()
def policy_cost(
    widths: Sequence[int],
    rows: Sequence[int],
    vocabulary: int,
    *,
    seconds: float,
    dtypes: Sequence[torch.dtype],
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """One update of each policy over one step of a body, a transformer layer, by width, rows and dtype."""
    results = []
    for dtype in dtypes:
        for width in widths:
            torch.manual_seed(0)
            body = Block(width, max(1, width // 64), 4, "branch").to(device, dtype)
            head = torch.nn.Linear(width, vocabulary, bias=False).to(device, dtype)
            for count in rows:
                # Sequences of 256: attention over thousands of keys would flatter every policy.
                shape = (max(1, count // 256), min(count, 256), width)
                x_prev = torch.randn(shape).to(device, dtype)
                x = body(x_prev)
                active = torch.ones(shape[:2], dtype=torch.bool, device=device)
                runs: dict[str, Callable[[], object]] = {"body": partial(body, x_prev)}
                for record in records():
                    if record.cost is None:
                        continue
                    name, policy = record.name, build_policy(f"{record.name}:{record.cost}")
                    # A state from the middle of a loop.
                    state, _ = judge(policy, policy.init(x_prev), LoopStep(1, x_prev, x, active, head))
                    runs[name] = partial(_update, policy, state, x, x_prev, active, head)
                once = sum(in_turns(runs, 1)[name][0] for name in runs)  # warms up, too
                times = in_turns(runs, max(3, min(50, int(seconds / once))))
                results.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "width": width,
                        "rows": count,
                        "body_ms": milliseconds(times["body"]),
                        "relative": {name: ratio(times, name, "body") for name in runs if name != "body"},
                    }
                )
    return results


# What retiring rows saves.


def _realised(
    model: LoopedGPT, times: Times, name: str, full: str, steps: Mapping[str, float], max_loops: int, keys: float
) -> dict[str, Any]:
    bound = flops(model, dict.fromkeys(model.regions, max_loops), keys) / flops(model, steps, keys)
    speedup = ratio(times, full, name)
    return {"steps": dict(steps), "bound": bound, "speedup": speedup, "realised": speedup / bound}


def _means(steps: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(taken.double().mean()) for name, taken in steps.items()}


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
    times = in_turns(runs, repeats)
    keys = (ids.shape[1] + 1) / 2
    return [
        {
            "mode": "forward",
            "batch": len(ids),
            "length": ids.shape[1],
            "spec": name,
            "full_ms_per_token": milliseconds(times["full"], ids.numel()),
            "ms_per_token": milliseconds(times[name], ids.numel()),
            **_realised(model, times, name, "full", _means(taken[name]), max_loops, keys),
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

    def full() -> None:
        bare.lengths = [start] * len(ids)
        for i in range(start, ids.shape[1]):
            bare.step_fixed(ids[:, i], dict.fromkeys(model.regions, max_loops))

    def run(name: str) -> None:
        decoder = decoders[name]
        decoder.lengths = [start] * len(ids)  # what is after it is written anew
        taken[name] = [decoder.step(ids[:, i]).steps for i in range(start, ids.shape[1])]

    runs: dict[str, Callable[[], object]] = {"full": full}
    runs |= {name: partial(run, name) for name in policies}
    for name in policies:
        run(name)
    times = in_turns(runs, repeats)
    means = {
        name: _means({region: torch.cat([step[region] for step in steps]) for region in model.regions})
        for name, steps in taken.items()
    }
    keys = start + (count + 1) / 2
    tokens = count * len(ids)
    return [
        {
            "mode": "decode",
            "batch": len(ids),
            "length": ids.shape[1],
            "spec": name,
            "full_ms_per_token": milliseconds(times["full"], tokens),
            "ms_per_token": milliseconds(times[name], tokens),
            **_realised(model, times, name, "full", means[name], max_loops, keys),
        }
        for name in policies
    ]


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
        "bound": flops(model, slowest, keys) / flops(model, _means(depths), keys),
        "steps": _means(depths),
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


# The cache.


def _attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    for _ in range(ATTENTION_CALLS):
        F.scaled_dot_product_attention(q, k, v)


@torch.inference_mode()
def position_cost(
    model: LoopedGPT, ids: Tensor, policy: Policies, places: Sequence[int], *, count: int, max_loops: int, repeats: int
) -> list[dict[str, float]]:
    """Time of a token by its position, and what of it is attention, timed alone: ``ids`` is ``(1, T)``."""
    heads = next(layer for layer in model.layers.values() if isinstance(layer, Block)).attn.n_head
    plain = sum(not isinstance(layer, Region) for layer in model.layers.values())
    runs: dict[str, Callable[[], object]] = {}
    applied: dict[int, float] = {}
    for place in places:
        decoder = Decoder(model, policy, max_loops=max_loops)
        decoder.prefill(ids[:, :place])

        def run(decoder: Decoder = decoder, place: int = place) -> list[Decoded]:
            decoder.lengths = [place]
            return [decoder.step(ids[:, i]) for i in range(place, place + count)]

        layers = sum(
            float(taken) * len(model.regions[name].body.blocks) for one in run() for name, taken in one.steps.items()
        )
        applied[place] = plain + layers / count
        device = ids.device
        q = torch.randn(1, heads, 1, model.d_model // heads, device=device)
        kv = torch.randn(1, place + count // 2, 2, heads, model.d_model // heads, device=device).permute(2, 0, 3, 1, 4)
        runs[f"token {place}"] = run
        runs[f"attention {place}"] = partial(_attention, q, *kv)
    times = in_turns(runs, repeats)
    return [
        {
            "position": place,
            "ms_per_token": milliseconds(times[f"token {place}"], count),
            "attention_ms": milliseconds(times[f"attention {place}"], ATTENTION_CALLS) * applied[place],
        }
        for place in places
    ]


@torch.inference_mode()
def approximate_layouts(
    model: LoopedGPT, window: Tensor, policy: Policies, layouts: Sequence[str], *, max_loops: int
) -> list[dict[str, Any]]:
    """What each layout takes and what it loses, teacher-forced token by token over a window ``(1, T + 1)``.

    The first layout is the reference. ``max_logit_error`` is the largest change of any logit, ``mean_logit_error``
    the mean over tokens of the largest.
    """
    ids, targets = window[:, :-1], window[0, 1:]
    results: list[dict[str, Any]] = []
    reference: Tensor | None = None
    for layout in layouts:
        decoder = Decoder(model, policy, layout=layout, max_loops=max_loops)
        seen = [decoder.prefill(ids[:, :1]), *(decoder.step(ids[:, i]) for i in range(1, ids.shape[1]))]
        logits = torch.cat([one.logits for one in seen])  # (T, V)
        ce = float(F.cross_entropy(logits, targets))
        reference = logits if reference is None else reference
        error = (logits - reference).abs().amax(-1)
        results.append(
            {
                "layout": layout,
                "bytes_per_token": decoder.nbytes() / ids.shape[1],
                "steps": _means({n: torch.cat([one.steps[n] for one in seen]) for n in model.regions}),
                "ce": ce,
                "ce_change": ce - (results[0]["ce"] if results else ce),
                "max_logit_error": float(error.max()),
                "mean_logit_error": float(error.mean()),
                "agreement": float((logits.argmax(-1) == reference.argmax(-1)).double().mean()),
            }
        )
    return results
