"""What a run would cost: a few real steps, and operations counted over the loop counts that it will draw."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from haltkit.models.checkpoint import build_model
from haltkit.models.gpt.cost import Spent, saved_bytes, step_flops
from haltkit.models.gpt.draws import TrainingNoise
from haltkit.models.training.config import RunConfig
from haltkit.models.training.distributed import Objective, join, local
from haltkit.models.training.memory import check_memory
from haltkit.models.training.start import new_run, open_feed, settle_precision
from haltkit.models.training.step import autocast, draw_loops, head_loss, take_step
from haltkit.timing import settled

__all__ = ["Forecast", "Stage", "forecast", "training_flops"]

AVERAGED_STEPS = 2000


@dataclass(frozen=True)
class Forecast:
    """What a run would be, from its config and a few real steps.

    Attributes:
        effective_depth: layers a token passes at the mean loop count.
        flops: operations per token, mean over the run's own loop draws.
        activations: bytes that one micro-step of this process keeps for its backward pass; grows with the batch, the
            length and ``backprop_depth``, not with the number of loops.
        state: bytes of weights, gradients and optimizer moments in this process.
        peak: bytes of the whole process at its peak so far.
        seconds: one step (not the first, which compiles), scaled from the probe's operations to those of the mean step.
    """

    parameters: int
    effective_depth: int
    flops: Spent
    activations: int
    state: int
    peak: int
    seconds: float
    tokens_per_step: int
    tokens: int
    checkpoint: int


@dataclass(frozen=True)
class Stage:
    """How far a forecast has come.

    Attributes:
        doing: in words.
        done: steps taken, of ``of``.
        seconds: one step of the run, by a first estimate from one row of the batch, not compiled; None before that.
    """

    doing: str
    done: int
    of: int
    seconds: float | None = None


def forecast(config: RunConfig, steps: int = 3, on_stage: Callable[[Stage], None] | None = None) -> Forecast:
    """Take ``steps`` real steps on the run's own data and write nothing.

    Args:
        config: with ``train.precision`` settled; ``auto`` is settled here.
        on_stage: is called at every stage. A first estimate comes within seconds, from one row of the batch.

    Raises:
        ConfigError, DataError: as :func:`~haltkit.models.training.loop.train`.
    """
    report = on_stage or (lambda stage: None)
    with join() as processes:
        config, _ = settle_precision(config, processes)
        check_memory(config, processes)
        feed = open_feed(config, processes)
        report(Stage("a first estimate, from one row of the batch", 0, steps))
        first = _first_estimate(config, processes.device) / processes.world
        report(Stage("compiling" if config.train.compile else "the forward pass", 0, steps, first))
        run = new_run(config, Path(), feed, processes)
        with saved_bytes(run.model.parameters()) as kept:
            rows = processes.rows(config.train.batch_size)
            batch = torch.from_numpy(run.feed.take(0, rows)).to(processes.device)
            loops = dict.fromkeys(run.model.regions, config.model.mean_loops)
            with autocast(run.config, processes.device):
                loss = run.objective(
                    batch,
                    loops,
                    TrainingNoise(config.train.seed, rows),
                    config.train.backprop_depth,
                    config.train.recompute_steps,
                )
        loss.backward()
        run.optimizer.zero_grad(set_to_none=True)
        counts = [0.0, 0.0]
        for number in range(steps):
            started = settled()
            take_step(run)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)
            counts[0] += settled() - started
            for micro_step in range(config.train.grad_accumulation):
                drawn = draw_loops(config, number, micro_step)
                spent = step_flops(config.model, drawn, config.train.backprop_depth)
                counts[1] += spent.total * config.train.batch_size * config.model.block_size
            run.step += 1
            run.samples += run.samples_per_step
            report(Stage(f"step {number + 1} of {steps}", number + 1, steps, first))
        flops = training_flops(config)
        parameters = sum(local(p).numel() for p in run.model.parameters())
        whole = sum(p.numel() for p in run.model.parameters())
        return Forecast(
            parameters=whole,
            effective_depth=run.model.effective_depth,
            flops=flops,
            activations=kept.value,
            state=4 * 4 * parameters,
            peak=_peak(processes.device),
            seconds=counts[0] / counts[1] * flops.total * run.tokens_per_step,
            tokens_per_step=run.tokens_per_step,
            tokens=run.tokens_per_step * config.train.max_steps,
            checkpoint=3 * 4 * whole,
        )


def _first_estimate(config: RunConfig, device: torch.device) -> float:
    """Seconds of a whole step in one process, from one row of the batch: forward and backward, not compiled."""
    torch.manual_seed(config.train.seed)
    model = build_model(config.model).to(device)
    objective = Objective(model, head_loss, head_loss)
    train, loops = config.train, dict.fromkeys(model.regions, config.model.mean_loops)
    # Any tokens will do, and a stream's position must stay where it is.
    tokens = torch.zeros(1, config.model.block_size + 1, dtype=torch.long, device=device)
    seconds = 0.0
    for counts in (dict.fromkeys(loops, 1), loops):  # one step per region warms up
        started = settled()
        with autocast(config, device):
            loss = objective(
                tokens, counts, TrainingNoise(train.seed, range(1)), train.backprop_depth, train.recompute_steps
            )
        loss.backward()
        seconds = settled() - started
    mean = training_flops(config).total / step_flops(config.model, loops, train.backprop_depth).total
    return seconds * mean * train.batch_size * train.grad_accumulation


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def training_flops(config: RunConfig) -> Spent:
    """Operations per token, mean over the loop counts that the run's first steps draw (2,000 of them at most)."""
    steps = min(AVERAGED_STEPS, config.train.max_steps) if config.model.regions else 1
    spent = [step_flops(config.model, draw_loops(config, s, 0), config.train.backprop_depth) for s in range(steps)]
    return Spent(sum(s.forward for s in spent) / steps, sum(s.backward for s in spent) / steps)
