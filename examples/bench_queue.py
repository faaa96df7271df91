"""What a queue saves where items need different numbers of steps.

    python examples/bench_queue.py [--items 192] [--slots 64] [--repeats 3] [--deepest 16]

The body is one transformer layer over instances of 81 rows. Each instance needs a number of steps drawn evenly from 1
to 16. Four ways to run them take turns within each repeat; items per second, and by how much the queue is faster (the
median of the repeats' ratios):

    fixed     batches: every instance takes the greatest number of steps, without a policy
    slowest   run_loop, masked: a batch runs until its slowest instance has halted
    compact   run_loop, compact: halted instances leave, and the batch shrinks until the next one begins
    queue     run_queue: the next instance takes the slot of one that has halted

The last three judge every step by the same policy; a drawn budget ends each instance, so that all do the same work.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

import haltkit
from haltkit.timing import settled

POLICY = "norm:tau=1e-12,granularity=sequence"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=192)
    parser.add_argument("--slots", type=int, default=64, help="of the queue; also the size of a batch")
    parser.add_argument("--rows", type=int, default=81, help="of an instance")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--deepest", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    heads = max(1, options.width // 32)
    layer = nn.TransformerEncoderLayer(
        options.width, heads, 4 * options.width, dropout=0.0, batch_first=True, norm_first=True
    )
    layer = layer.to(options.device).eval()
    shape = (options.rows, options.width)
    states = torch.randn(options.items, *shape, device=options.device)
    depths = torch.randint(1, options.deepest + 1, (options.items,))
    numbers: list[int] = depths.tolist()
    policy = haltkit.policy(POLICY)

    def flat(x: Tensor) -> Tensor:  # what compact execution hands a function
        out: Tensor = layer(x.view(-1, *shape))
        return out.view(x.shape)

    def fixed() -> None:
        for x in states.split(options.slots):
            for _ in range(options.deepest):
                x = layer(x)

    def batches(execution: haltkit.loop.Execution) -> int:
        steps = 0
        allowed = depths.to(options.device).unsqueeze(-1).expand(-1, options.rows)
        for x, budget in zip(states.split(options.slots), allowed.split(options.slots), strict=True):
            result = haltkit.run_loop(
                layer if execution == "masked" else flat,
                x,
                policy,
                max_steps=options.deepest,
                budget=budget,
                execution=execution,
            )
            steps += int(result.steps[:, 0].sum())
        return steps

    def queue() -> int:
        items = (haltkit.QueueItem(x, budget=n) for x, n in zip(states, numbers, strict=True))
        results = haltkit.run_queue(layer, items, policy, options.slots, max_steps=options.deepest)
        return sum(int(result.steps[0]) for result in results)

    runs: dict[str, Callable[[], object]] = {
        "fixed": fixed,
        "slowest": lambda: batches("masked"),
        "compact": lambda: batches("compact"),
        "queue": queue,
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.repeats):
        names = list(runs)
        for name in names[number % 4 :] + names[: number % 4]:
            started = settled()
            steps = runs[name]()
            times[name].append(settled() - started)
            if steps != sum(numbers) and name != "fixed":
                raise SystemExit(f"{name} took {steps} steps; {sum(numbers)} were drawn")
    mean = sum(numbers) / options.items
    print(f"{options.items} instances of {shape}, {options.slots} slots, {mean:.2f} steps on average")
    for name, seconds in times.items():
        rate = options.items / statistics.median(seconds)
        gain = statistics.median(a / b for a, b in zip(seconds, times["queue"], strict=True))
        print(f"  {name:8} {rate:8.1f} items per second   queue is {gain:.2f} times as fast")


if __name__ == "__main__":
    main()
