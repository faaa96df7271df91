"""What one policy update costs beside one application of a loop body.

    python examples/bench_policy_cost.py [--rows 512] [--width 768] [--repeats 30]

The body is one transformer layer of the bundled model's kind. Body and updates take turns within each repeat, so a
machine that slows down slows both; the ratio is the median of the repeats' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import haltkit
from haltkit.models.gpt.model import Block
from haltkit.protocol import LoopStep

SPECS = ["norm:tau=1e-9", "norm-rel:tau=1e-9", "accel:tau=1e-9", "accel-rel:tau=1e-9", "speed:tau=1e-9", "kl:tau=1e-12"]


def clock(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=8192, help="of the readout that kl pays for")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    body = Block(options.width, max(1, options.width // 64), 4, "branch")
    head = torch.nn.Linear(options.width, options.vocabulary, bias=False)
    x_prev = torch.randn(1, options.rows, options.width)
    x = body(x_prev)
    active = torch.ones(1, options.rows, dtype=torch.bool)

    policies = {spec.partition(":")[0]: haltkit.policy(spec) for spec in SPECS}
    states = {}
    for name, policy in policies.items():  # a state from the middle of a loop
        states[name], _ = policy.update(policy.init(x_prev), LoopStep(1, x_prev, x, active, head))
    times: dict[str, list[float]] = {name: [] for name in ("body", *policies)}
    for repeat in range(options.repeats + 3):
        sample = {"body": clock(lambda: body(x_prev))}
        for name, policy in policies.items():
            step = LoopStep(2, x, x_prev, active, head)
            sample[name] = clock(lambda policy=policy, name=name, step=step: policy.update(states[name], step))
        if repeat >= 3:  # the first ones warm up
            for name, seconds in sample.items():
                times[name].append(seconds)

    print(f"{options.rows} rows of width {options.width}, float32, {torch.get_num_threads()} threads")
    print(f"{'body (one layer)':18} {1e3 * statistics.median(times['body']):8.3f} ms")
    for name in policies:
        ratios = [mine / base for mine, base in zip(times[name], times["body"], strict=True)]
        print(f"{name:18} {1e3 * statistics.median(times[name]):8.3f} ms  {statistics.median(ratios):7.1%} of the body")


if __name__ == "__main__":
    main()
