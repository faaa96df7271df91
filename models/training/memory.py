"""What memory a run needs at least, estimated from its config alone, so that nothing is built that cannot fit."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from haltkit.models.config import ConfigError
from haltkit.models.gpt.config import ModelConfig, region_span
from haltkit.models.training.config import RunConfig
from haltkit.models.training.distributed import Processes

__all__ = ["activation_bytes", "available_bytes", "check_memory", "parameter_count"]


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the model, without building it."""
    d, hidden = config.d_model, config.mlp_ratio * config.d_model
    block = 4 * d * d + 2 * d * hidden + 4 * d
    regions = len(config.regions) * ((2 * d * d if config.injection != "never" else 0) + (d if config.exit_norm else 0))
    return (config.vocab_size + config.block_size) * d + config.n_layer * block + regions + d


def activation_bytes(config: RunConfig, rows: int) -> int:
    """Bytes that one micro-step keeps for its backward pass, at least, for a number of rows of the batch.

    Each application of a block keeps the inputs of its four products and of its norms; the head keeps two tensors of
    ``(rows, T, V)`` in float32. Only the last ``backprop_depth`` steps of a region keep anything; recomputing keeps one
    state per step.
    """
    model, train = config.model, config.train
    number = 2 if train.precision == "bf16" else 4
    tokens = rows * model.block_size
    block = tokens * (8 + 2 * model.mlp_ratio) * model.d_model * number
    spans = [region_span(name) for name in model.regions]
    looped = sum(last - first + 1 for first, last in spans)
    steps = min(train.backprop_depth, model.mean_loops)
    loops = len(spans) * steps * tokens * model.d_model * 4 if train.recompute_steps else looped * steps * block
    return (model.n_layer - looped) * block + loops + 2 * tokens * model.vocab_size * 4


def available_bytes(device: torch.device) -> int | None:
    """Memory that a new allocation can get on the device; None where the system does not say.

    On Linux what the kernel calls available, within the limit of the control group (a container's).
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # PyTorch's own reserve
        return torch.cuda.mem_get_info(device)[0] + kept
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = meminfo.read_text(encoding="ascii", errors="replace").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        used = Path("/sys/fs/cgroup/memory.current")
        found.append(int(text) - (int(used.read_text(encoding="ascii")) if used.is_file() else 0))
    return min(found) if found else None


def check_memory(config: RunConfig, processes: Processes) -> None:
    """Refuse a run that cannot fit, before anything is built or swapped out.

    The estimate is a lower bound, so that no run which fits is refused.

    Raises:
        ConfigError: the estimate is above what is available; it says what to change.
    """
    available = available_bytes(processes.device)
    if available is None:
        return
    beside = 1  # processes that share this memory
    if processes.device.type == "cpu" and processes.world > 1:
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    rows = len(processes.rows(config.train.batch_size))
    shards = processes.world if config.train.strategy == "fsdp" else 1
    state = 4 * 4 * parameter_count(config.model) // shards  # weights, gradients and two moments
    activations = activation_bytes(config, rows)
    if beside * (state + activations) <= available:
        return
    advice = (
        f"lower train.batch_size (now {config.train.batch_size}) and raise train.grad_accumulation instead, or set "
        "train.recompute_steps"
        if state < activations
        else "choose a smaller model"
    )
    raise ConfigError(
        f"this run needs at least {_size(beside * (state + activations))} of memory ({_size(beside * state)} for "
        f"weights, gradients and moments, {_size(beside * activations)} for the activations of one micro-step), and "
        f"{_size(available)} are free on {processes.device.type}: {advice}"
    )


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count:,.0f} TB"
