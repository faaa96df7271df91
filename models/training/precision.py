"""Which precision a run computes in: bf16 where the hardware multiplies it, float32 elsewhere.

A processor without bf16 arithmetic converts every number before it multiplies, and a bf16 matrix product then takes
tens of times as long as a float32 one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from haltkit.timing import settled

__all__ = ["Choice", "bf16_slowdown", "choose_precision", "has_bf16"]

SIZE, REPEATS = 256, 3  # of the matrix products that are timed: 60 ms in all where bf16 is slowest
TOO_SLOW = 1.5


@dataclass(frozen=True)
class Choice:
    """The precision that a run computes in, and why.

    Attributes:
        warning: whether the reason is one against the choice: bf16 was asked for where it is slow.
    """

    precision: Literal["float32", "bf16"]
    reason: str
    warning: bool = False


def has_bf16(device: torch.device) -> bool | None:
    """Whether the device says that it multiplies bf16 numbers in hardware; None where it cannot be asked."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return None
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        words = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
        return bool(words & {"amx_bf16", "avx512_bf16", "bf16"})  # the last one is Arm's
    asked: list[Callable[[], bool] | None] = [
        getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    ]
    answers = [ask() for ask in asked if ask is not None]
    return True if any(answers) else None


@functools.cache
def bf16_slowdown(device: torch.device) -> float:
    """How many times as long a bf16 matrix product takes as a float32 one, measured once per process."""
    fastest = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(SIZE, SIZE, dtype=dtype, device=device)
        times = []
        for _ in range(1 + REPEATS):  # the first one warms up
            started = settled()
            torch.mm(a, a)
            times.append(settled() - started)
        fastest[dtype] = min(times[1:])
    return fastest[torch.bfloat16] / fastest[torch.float32]


def choose_precision(asked: Literal["auto", "float32", "bf16"], device: torch.device) -> Choice:
    """What ``train.precision`` means on this device.

    ``auto`` is bf16 where the device has bf16 arithmetic and PyTorch uses it, which one small product of each kind
    shows; float32 elsewhere.
    """
    if asked == "float32":
        return Choice("float32", "as the config says")
    name = "this GPU" if device.type == "cuda" else "this processor"
    hardware = has_bf16(device)
    slowdown = 1.0 if device.type == "cuda" and hardware else bf16_slowdown(device)
    times = f"{slowdown:.0f}" if slowdown >= 10 else f"{slowdown:.2g}"
    measured = f"a bf16 matrix product takes {times} times as long here as a float32 one"
    if hardware is not False and slowdown < TOO_SLOW:
        return Choice("bf16", f"{name} multiplies bf16 in hardware" if asked == "auto" else "as the config says")
    why = f"{name} has no bf16 arithmetic" if hardware is False else f"PyTorch does not use bf16 arithmetic on {name}"
    if asked == "auto":
        return Choice("float32", f"{why}: {measured}")
    return Choice("bf16", f"as the config says, but {why}: {measured}. Set train.precision to auto", warning=True)
