"""The measures of a run: its held-out loss, and the reduced loop statistics of a snapshot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from haltkit.models.checkpoint import build_model
from haltkit.models.gpt.diagnosing import loop_statistics
from haltkit.models.gpt.files import load_weights
from haltkit.models.text.data import TokenData
from haltkit.models.training.runs import Run
from haltkit.models.training.step import autocast

__all__ = ["STATISTICS_FILE", "STATISTICS_WINDOWS", "evaluate", "snapshot_statistics"]

STATISTICS_FILE = "statistics.json"
STATISTICS_WINDOWS = 8


@torch.no_grad()
def evaluate(run: Run, held_out: TokenData) -> dict[str, float]:
    """Collective: held-out loss at each of ``eval_loops``, on windows spread evenly over the split."""
    train, processes = run.config.train, run.processes
    windows = held_out.spread(train.eval_batches * train.batch_size)
    batches = torch.split(windows, max(1, train.batch_size // processes.world))
    counts = train.eval_loops if run.model.regions else train.eval_loops[:1]
    sums = torch.zeros(len(counts), dtype=torch.float64)
    for first in range(0, len(batches), processes.world):
        mine = first + processes.rank
        # FSDP needs every process in every forward: one without a batch computes one that does not count.
        batch = batches[mine if mine < len(batches) else 0]
        weight = len(batch) if mine < len(batches) else 0
        for i, count in enumerate(counts):
            with autocast(run.config, processes.device):
                loss = _unsynchronized(run)(batch.to(processes.device), count if run.model.regions else {})
            sums[i] += weight * float(loss)
    if run.sharded:
        run.objective.reshard()  # type: ignore[operator]  # FSDP waits for a backward with it, and would go on with these very weights
    sums = processes.sum(sums) / len(windows)
    return {str(count): float(sums[min(i, len(counts) - 1)]) for i, count in enumerate(train.eval_loops)}


def _unsynchronized(run: Run) -> Any:
    """The objective without DDP around it, which would prepare for a backward that never comes."""
    wrapped = run.objective
    return wrapped.module if isinstance(wrapped, torch.nn.parallel.DistributedDataParallel) else wrapped


def snapshot_statistics(run: Run, weights: dict[str, Tensor], held_out: TokenData) -> dict[str, Any]:
    """Reduced loop statistics of the current weights, on a few held-out windows, in float32."""
    model = build_model(run.config.model)  # a plain one: hooks added to a compiled module do not fire
    load_weights(model, {name: weight.cpu() for name, weight in weights.items()})
    device = run.processes.device
    statistics = loop_statistics(model.eval().to(device), held_out.spread(STATISTICS_WINDOWS)[:, :-1].to(device))
    return {"tokens_seen": run.tokens, "steps": run.step, **statistics}
