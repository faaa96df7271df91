"""What judging a million rows costs beside a body that does next to nothing.

    python examples/bench_rows.py [--rows 1000000] [--width 64] [--steps 8] [--repeats 5] [--threads 1]

The body multiplies the state by a number, so it reads the state once and writes it once. Judging a step norm reads the
new state and the old one; acceleration also reads the last step and writes the new one. Where the state is far larger
than the processor's caches, memory traffic is all there is: at best norm takes 2 times the bare loop's time and accel 3
times, less what the bare loop spends on getting fresh memory at every step.

The loops take turns within each repeat; the ratio is the median of the repeats' ratios. Memory is the greatest resident
size of a process of its own for each loop, above what it had with the initial state alone, in states.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import haltkit
from haltkit.timing import in_turns, milliseconds, ratio

SPECS = ("norm:tau=1e-9", "accel:tau=1e-9")


@torch.no_grad()  # in inference mode tensors count no versions, so that a loop copies its state to watch it
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # one loop, and its memory
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x0 = torch.randn(options.rows, options.width)

    def body(x: Tensor) -> Tensor:
        return x * 0.9

    def bare() -> None:
        x = x0
        for _ in range(options.steps):
            x = body(x)

    def judged(spec: str) -> Callable[[], object]:
        policy = haltkit.policy(spec)
        return lambda: haltkit.run_loop(body, x0, policy, max_steps=options.steps)

    runs: dict[str, Callable[[], object]] = {"bare": bare, **{spec: judged(spec) for spec in SPECS}}
    if options.alone:
        before = _peak()
        runs[options.alone]()
        print((_peak() - before) / (x0.numel() * x0.element_size()))
        return
    in_turns(runs, 1)  # warms up
    times = in_turns(runs, options.repeats)
    print(f"{options.rows:,} rows of width {options.width}, {options.steps} steps, {options.threads} threads")
    for name, seconds in times.items():
        each = milliseconds(seconds, options.steps)
        again = [sys.executable, __file__, "--alone", name]
        again += [f"--{key}={getattr(options, key)}" for key in ("rows", "width", "steps", "threads")]
        states = float(subprocess.run(again, capture_output=True, check=True, text=True).stdout)
        share = ratio(times, name, "bare")
        print(f"  {name:14} {each:8.1f} ms per step   {share:.2f} of the bare loop   {states:.1f} states of memory")


def _peak() -> int:
    """Greatest resident size of this process in bytes; from ``getrusage`` a new process would have its parent's too."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size


if __name__ == "__main__":
    main()
