"""What attaching costs, and what a halt from outside saves.

    python examples/bench_attach.py [--repeats 20]

The bare model and each attached one take turns within every repeat; ratios are medians of the repeats' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

import haltkit

LOOPS = 16


class Looped(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(LOOPS):
            x = self.body(x)
        return x


def clock(model: nn.Module, x: Tensor) -> float:
    started = time.perf_counter()
    model(x)
    return time.perf_counter() - started


@torch.no_grad()
def measure(name: str, body: nn.Module, x: Tensor, repeats: int) -> None:
    model = Looped(body).eval()
    specs: dict[str, str | None] = {
        "observing (no-op)": None,
        "never halts": f"fixed:steps={LOOPS}",
        "norm, never halts": "norm:tau=1e-30,granularity=batch",
        "accel, never halts": "accel:tau=1e-30,granularity=batch",
        "halts at 4 of 16": "fixed:steps=4",
    }
    times: dict[str, list[float]] = {name: [] for name in ("bare", *specs)}
    for repeat in range(repeats + 2):
        sample = {"bare": clock(model, x)}
        for label, spec in specs.items():
            with haltkit.attach(model, spec, body=["body"]):
                sample[label] = clock(model, x)
        if repeat >= 2:  # the first ones warm up
            for label, seconds in sample.items():
                times[label].append(seconds)
    print(f"{name}: bare {1e3 * statistics.median(times['bare']):.3f} ms")
    for label in specs:
        ratios = [a / b for a, b in zip(times[label], times["bare"], strict=True)]
        extra = [1e6 * (a - b) / LOOPS for a, b in zip(times[label], times["bare"], strict=True)]
        print(f"  {label:20} {statistics.median(ratios):6.3f} of bare, {statistics.median(extra):+9.1f} us a body call")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    measure("Linear(16), 1 row", nn.Linear(16, 16), torch.randn(1, 16), 10 * repeats)
    layer = nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
    measure("encoder layer, width 768, 64 rows", layer, torch.randn(1, 64, 768), repeats)


if __name__ == "__main__":
    main()
