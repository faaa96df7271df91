"""Does a policy find more than a depth for each region? The bundled model under policies and at their mean depths.

    python examples/bench_region_depths.py [--policies accel:tau=5.4,norm:tau=0.87] [--tokens 6144]

``haltkit compare`` holds policies against one fixed depth for all regions. A finer baseline is a fixed depth for each
region; which, a policy's own steps tell: their mean, rounded. Everything runs in turns on each window of the sample;
times are medians over windows, differences to full depth are paired, with one standard error.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import haltkit
from haltkit.models.checkpoint import load_checkpoint
from haltkit.models.comparing import SAMPLE, text_windows
from haltkit.models.gpt import AdaptiveOutput
from haltkit.protocol import HaltingPolicy
from haltkit.registry import parse_spec_list


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="accel:tau=5.4,norm:tau=0.87,norm:tau=0.17")
    parser.add_argument("--depths", default="4,5,6,8", help="the same in every region")
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--max-loops", type=int, default=32)
    options = parser.parse_args()
    loaded = load_checkpoint()
    model, windows = loaded.model, text_windows(loaded, SAMPLE, options.tokens)
    passes: dict[str, Callable[[Tensor], Tensor]] = {"full depth": lambda ids: model(ids, options.max_loops)}
    for depth in map(int, options.depths.split(",")):
        passes[f"fixed {depth}"] = lambda ids, depth=depth: model(ids, depth)  # type: ignore[misc]
    for spec in map(str, parse_spec_list(options.policies)):
        policy = haltkit.policy(spec)

        def halting(ids: Tensor, policy: HaltingPolicy[Any] = policy) -> AdaptiveOutput:
            return model.forward_adaptive(ids, policy, max_loops=options.max_loops, execution="compact")

        steps = halting(windows[:4, :-1]).steps
        depths = {name: max(1, round(float(taken.double().mean()))) for name, taken in steps.items()}
        passes[spec] = lambda ids, halting=halting: halting(ids).logits  # type: ignore[misc]
        passes[f"  its depths, {' '.join(map(str, depths.values()))}"] = lambda ids, depths=depths: model(ids, depths)  # type: ignore[misc]

    losses: dict[str, list[float]] = {name: [] for name in passes}
    agreement: dict[str, list[float]] = {name: [] for name in passes}
    times: dict[str, list[float]] = {name: [] for name in passes}
    for run in passes.values():
        run(windows[:1, :-1])  # warms up
    for window in torch.split(windows, 1):
        top = None
        for name, run in passes.items():
            started = time.perf_counter()
            logits = run(window[:, :-1])
            times[name].append(time.perf_counter() - started)
            losses[name].append(float(F.cross_entropy(logits[0], window[0, 1:])))
            chosen = logits.argmax(-1)
            top = chosen if top is None else top
            agreement[name].append(float((chosen == top).double().mean()))
    count = windows.shape[1] - 1
    print(f"{len(windows)} windows of {count} tokens, float32, {torch.get_num_threads()} threads")
    print(f"{'':28}{'CE above full depth':>22}{'agreement':>11}{'ms/token':>10}")
    for name in passes:
        extra = [a - b for a, b in zip(losses[name], losses["full depth"], strict=True)]
        error = statistics.stdev(extra) / len(extra) ** 0.5 if len(extra) > 1 else float("nan")
        print(
            f"{name:28}{statistics.mean(extra):+13.4f} ±{error:.4f} {statistics.mean(agreement[name]):10.1%}"
            f"{1e3 * statistics.median(times[name]) / count:10.3f}"
        )


if __name__ == "__main__":
    main()
