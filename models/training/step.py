"""One optimizer step: its learning rate, its gradients over the global batch, and what can be wrong with it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from haltkit.models.config import ConfigError
from haltkit.models.gpt.draws import TrainingNoise, loop_count
from haltkit.models.gpt.model import LoopedGPT, Region
from haltkit.models.training.config import OptimConfig, RunConfig
from haltkit.models.training.distributed import local, synchronized
from haltkit.models.training.runs import Run

__all__ = [
    "adamw",
    "autocast",
    "compile_for_training",
    "draw_loops",
    "find_fault",
    "head_loss",
    "learning_rate",
    "take_step",
    "weights_are_finite",
]

SPIKE_HISTORY = 8  # losses before a median means anything


def learning_rate(step: int, max_steps: int, optim: OptimConfig) -> float:
    """The rate for step ``step`` (from 0): linear warmup, then the schedule's shape down to ``min_lr_ratio``.

    A run taken up again from weights alone (``rewarm_at``) also warms up from there to where its schedule is.
    """
    if 0 < optim.rewarm_at <= step < optim.rewarm_at + optim.warmup_steps:
        target = learning_rate(optim.rewarm_at + optim.warmup_steps, max_steps, optim)
        return target * (step - optim.rewarm_at + 1) / optim.warmup_steps
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    low = optim.lr * optim.min_lr_ratio
    if optim.schedule == "cosine":
        done = (step - optim.warmup_steps) / max(1, max_steps - optim.warmup_steps)
        return low + 0.5 * (1 + math.cos(math.pi * min(1.0, done))) * (optim.lr - low)
    left = (max_steps - step) / optim.decay_steps if optim.decay_steps else 1.0
    return low + min(1.0, max(0.0, left)) * (optim.lr - low)


def adamw(model: LoopedGPT, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW as nanoGPT groups it: matrices and embeddings decay, gains do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def head_loss(model: LoopedGPT, x: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the head on ``x``, ``(B, T, D)``, for targets ``(B, T)``."""
    return F.cross_entropy(model.readout(x).float().flatten(0, 1), targets.flatten())


def compile_for_training(model: LoopedGPT) -> Callable[[LoopedGPT, Tensor, Tensor], Tensor]:
    """Compile each layer and each region's whole step, in place (names stay), and the loss, which is returned."""
    torch._dynamo.config.recompile_limit = 64  # one graph a region, with and without gradients
    for layer in model.layers.values():
        (layer.body if isinstance(layer, Region) else layer).compile()
    return torch.compile(head_loss)


def find_fault(run: Run, loss: float, grad_norm: float) -> str | None:
    """What is wrong with a step, the same answer in every process."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return "not finite"
    margin = run.config.train.spike_margin
    if margin and len(run.recent) >= SPIKE_HISTORY and loss > statistics.median(run.recent) + margin:
        return "spike"
    return None


def weights_are_finite(run: Run) -> bool:
    """Whether every weight is finite; under a hundredth of a step's time."""
    parts = [part for p in run.model.parameters() if (part := local(p.detach())).numel()]
    extremes = [extreme for part in parts for extreme in torch.aminmax(part)]
    broken = bool(extremes) and not bool(torch.stack(extremes).isfinite().all())  # one look at the device for all
    return not (run.processes.greatest(int(broken)) if run.sharded else broken)


def autocast(config: RunConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context that a run's forward passes are computed in.

    Raises:
        ConfigError: ``train.precision`` is still ``auto``; see ``settle_precision``.
    """
    if config.train.precision == "auto":
        raise ConfigError("train.precision=auto has to be settled for a device before a step is taken")
    bf16 = config.train.precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


def draw_loops(config: RunConfig, step: int, micro_step: int) -> dict[str, int]:
    """Steps of each region in one micro-step: a function of the run's seed and these numbers."""
    train = config.train
    return {
        name: loop_count(
            config.model.mean_loops,
            train.loop_sigma,
            seed=train.seed,
            step=step,
            micro_step=micro_step,
            region=name,
        )
        for name in config.model.regions
    }


def take_step(run: Run) -> tuple[float, float]:
    """Gradients of one optimizer step, clipped; the global batch's mean loss and the gradient norm before clipping."""
    train, optim, model, processes = run.config.train, run.config.optim, run.model, run.processes
    rows = processes.rows(train.batch_size)
    share = len(rows) / train.batch_size
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, train.max_steps, optim)
    total = torch.zeros((), device=processes.device)
    for micro_step in range(train.grad_accumulation):
        first = run.samples + micro_step * train.batch_size
        batch = _to_device(torch.from_numpy(run.feed.take(first, rows)), processes.device)
        loops = draw_loops(run.config, run.step, micro_step)
        noise = TrainingNoise(train.seed, [first + row for row in rows])
        with synchronized(run.objective, micro_step == train.grad_accumulation - 1):
            with autocast(run.config, processes.device):
                loss = run.objective(batch, loops, noise, train.backprop_depth, train.recompute_steps)
            # The engines average over processes; processes may hold different numbers of rows.
            (loss * (share * processes.world / train.grad_accumulation)).backward()
        total += loss.detach().float() * (share / train.grad_accumulation)
    clip = optim.grad_clip or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    if hasattr(grad_norm, "full_tensor"):
        grad_norm = grad_norm.full_tensor()
    return float(processes.sum(total)), float(grad_norm)


def _to_device(batch: Tensor, device: torch.device) -> Tensor:
    """Without waiting for what the device is still busy with."""
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch
