"""Timing side by side: a wall clock that waits for accelerators, and turns in which everything is timed.

What is compared runs in turns within each repeat, so that a machine that slows down slows all sides; ratios are
medians over the repeats of the ratio within one.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

__all__ = ["Times", "clock", "in_turns", "machine", "milliseconds", "ratio", "settled", "turns"]

T = TypeVar("T")
Times = dict[str, list[float]]


def settled() -> float:
    """Seconds on a monotonic clock, once every CUDA device that this process uses, or MPS, has done all it was given.

    An accelerator is handed its work and does it later: a clock read without waiting times the handing over.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        count = torch.cuda.device_count()
        for device in range(count):
            # Synchronizing an unused device would create a context on it, and querying it costs more than short
            # measurements.
            if count == 1 or torch.cuda.memory_reserved(device):
                torch.cuda.synchronize(device)
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()
    return time.perf_counter()


def clock(call: Callable[[], T]) -> tuple[float, T]:
    """Seconds that a call took, and what it returned."""
    started = settled()
    result = call()
    return settled() - started, result


def turns(count: int, repeats: int) -> Iterator[tuple[int, ...]]:
    """The order of ``count`` runs in each repeat: each begins with another run, so that none is always first."""
    order = tuple(range(count))
    for number in range(repeats):
        shift = number * max(1, count // 3) % count
        yield (*order[shift:], *order[:shift])


def in_turns(
    runs: Mapping[str, Callable[[], object]], repeats: int, before: Callable[[], object] = lambda: None
) -> Times:
    """Seconds of every run in each repeat, all of them in turn; ``before`` is called before each and is not timed."""
    names = list(runs)
    times: Times = {name: [] for name in names}
    for order in turns(len(names), repeats):
        for index in order:
            before()
            times[names[index]].append(clock(runs[names[index]])[0])
    return times


def ratio(times: Times, above: str, below: str) -> float:
    """Median over the repeats of one run's time over another's."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def milliseconds(seconds: Sequence[float], items: int = 1) -> float:
    """Median time per item."""
    return 1e3 * statistics.median(seconds) / items


def machine() -> str:
    """What figures were measured on: the processor's name and how many cores may be used."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
        name += " with AMX" if "amx_bf16" in flags else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"
