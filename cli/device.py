"""``--device``: where a checkpoint runs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

from haltkit.cli.options import among

if TYPE_CHECKING:
    import torch

__all__ = ["Device", "choose_device", "describe_device"]

Device = Annotated[str, among("auto|cpu|cuda[:N]", "Where to run; auto is CUDA if there is any.")]


def choose_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: an unknown device, or one that this machine lacks.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: allowed are auto, cpu, cuda and cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ValueError(f"--device {name}: this PyTorch finds no CUDA device; use cpu")
        if (device.index or 0) >= count:
            raise ValueError(f"--device {name}: there are {count}, counted from 0")
    return device


def describe_device(device: torch.device) -> str:
    """For tables: the device, and what of it matters for speed."""
    import torch

    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' * (threads > 1)}"
