"""A wall clock that waits for accelerators."""

from __future__ import annotations

import time

import torch

__all__ = ["settled"]


def settled() -> float:
    """Seconds on a monotonic clock, once every CUDA device that this process uses, or MPS, has done all it was given.

    An accelerator is handed its work and does it later: a clock read without waiting times the handing over.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        count = torch.cuda.device_count()
        for device in range(count):
            # Waiting for one that is not used would start it up; asking takes longer than many a thing that is timed.
            if count == 1 or torch.cuda.memory_reserved(device):
                torch.cuda.synchronize(device)
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()
    return time.perf_counter()
