"""A wall clock that waits for accelerators."""

from __future__ import annotations

import time

import torch

__all__ = ["settled"]


def settled() -> float:
    """Seconds on a monotonic clock, once every accelerator that this process uses has done all it was given.

    An accelerator is handed its work and does it later: a clock read without waiting times the handing over.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(device):  # waiting for one that is not used would start it up
                torch.cuda.synchronize(device)
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()
    return time.perf_counter()
