"""A reasoner as a subject: a test set of its task as samples, wrong answers as its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haltkit.driving import ByModules, Pass
from haltkit.kinds import per_row
from haltkit.loop import Execution
from haltkit.models.reasoner.checkpoint import load_reasoner
from haltkit.models.reasoner.model import LOOP, Reasoner
from haltkit.models.reasoner.task import Batch, Task
from haltkit.policies import Fixed
from haltkit.protocol import HaltingPolicy
from haltkit.setting import Depth
from haltkit.subject import Subject

__all__ = ["checkpoint_subject", "reasoner_subject", "sequences_of"]

FIXED_DEPTHS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 28, 32, 40)
TARGET_STEPS = (3, 4, 5, 6, 8, 10, 12)
# Shares of wrong answers above full depth's.
LEVELS = (0.001, 0.005, 0.02)


@dataclass(frozen=True)
class _Passes:
    """Passes over inputs ``(B, T, C)``; what comes out is the logits of the rows that are asked something."""

    model: Reasoner
    asked: Tensor  # (T,) bool
    execution: Execution

    def run(self, inputs: Tensor, steps: Any) -> Tensor:
        """At a fixed depth: a number of steps, or a mapping with the one region."""
        logits: Tensor = self.model(inputs, steps[LOOP] if isinstance(steps, Mapping) else steps)
        return logits[:, self.asked]

    def fixed(self, inputs: Tensor, depth: Depth) -> Tensor:
        """A fixed depth measures nothing and pays for nothing."""
        return self.run(inputs, depth.steps)

    def adaptive(self, inputs: Tensor, policies: Mapping[str, HaltingPolicy[Any]], budget: int) -> Pass:
        out = self.model.forward_adaptive(inputs, policies[LOOP], max_loops=budget, execution=self.execution)
        return Pass(out.logits[:, self.asked], out.steps, out.outcome)

    def by_row(self, inputs: Tensor, steps: Mapping[str, Tensor]) -> Pass:
        """Each row leaves after steps of its own."""
        each, most = per_row(steps[LOOP], inputs.shape[:2]), int(steps[LOOP].max())
        out = self.model.forward_adaptive(inputs, Fixed(most), max_loops=most, budget=each, execution=self.execution)
        return Pass(out.logits[:, self.asked], out.steps, out.outcome)


def reasoner_subject(
    model: Reasoner,
    task: Task,
    samples: Batch,
    *,
    name: str = "reasoner",
    batch: int = 64,
    max_loops: int = 32,
    execution: Execution = "compact",
    about: Mapping[str, Any] | None = None,
) -> Subject:
    """A reasoner as a subject: its loss is the share of wrong answers.

    Args:
        model: in evaluation mode.
        task: says what one answer is called and whether rows or whole sequences halt and are right or wrong.
        samples: sequences that ask the same rows, as a test set of the task.
        name: for tables and titles.
        batch: sequences per sample.
        max_loops: full depth, and the budget under a policy.
        execution: under a policy.
        about: what else is known of it, plain values.

    Raises:
        ValueError: sequences that ask different rows, or a batch that does not fit.
    """
    asked = samples.asked[0]
    if not bool((samples.asked == asked).all()):
        raise ValueError("these sequences ask different rows: compare them in groups that ask the same ones")
    count = len(samples.inputs)
    if not 1 <= batch <= count:
        raise ValueError(f"batch={batch} does not fit {count} sequences: lower it or give more")
    parts = [samples[slice(start, start + batch)] for start in range(0, count - batch + 1, batch)]
    passes = _Passes(model, asked, execution)

    def loss(logits: Tensor, sample: Batch) -> Tensor:
        wrong = logits.argmax(-1) != sample.labels[:, asked]  # (B, A)
        return (wrong.any(-1) if task.granularity == "sequence" else wrong).double()

    driver = ByModules(
        model,
        passes.run,
        model.loop_modules,
        inputs=_inputs,
        fixed=passes.fixed,
        adaptive=passes.adaptive,
        by_row=passes.by_row,
    )
    return Subject(
        model,
        driver,
        name=name,
        samples=parts,
        loss=loss,
        metric="wrong",
        unit="wrong",
        item=task.item,
        levels=LEVELS,
        logits=lambda output: output,
        tokens=task.words,
        readout=model.readout,
        labels=lambda sample: sample.labels,
        layers={},
        inputs=_inputs,
        full_depth=max_loops,
        granularity=task.granularity,
        fixed_depths=FIXED_DEPTHS,
        target_steps=TARGET_STEPS,
        kinds=task.kinds,
        about=about or {},
    )


def _inputs(sample: Batch) -> Tensor:
    """What of a sample the model is given, ``(B, T, C)``."""
    return sample.inputs


def sequences_of(task: Task, count: int, test_set: str | None = None, draw: int = 0) -> tuple[str, Batch]:
    """The name of a test set of a task and ``count`` sequences of it, the same ones at every call.

    Args:
        task: the task.
        count: how many sequences.
        test_set: its name; None: the task's first, which is like the last level of training.
        draw: another number draws other sequences alike, and so does another count.

    Raises:
        ValueError: an unknown test set.
    """
    sets = task.test_sets(count, seed=draw)
    chosen = next(iter(sets)) if test_set is None else test_set
    if chosen not in sets:
        raise ValueError(f"no test set {chosen!r} of {task.name}; there are {', '.join(sets)}")
    return chosen, sets[chosen]


def checkpoint_subject(
    folder: Path,
    *,
    name: str,
    device: torch.device | str = "cpu",
    max_loops: int | None = None,
    batch: int | None = None,
    execution: Execution = "compact",
    test_set: str | None = None,
    sequences: int | None = None,
    draw: int = 0,
) -> Subject:
    """A checkpoint folder of a reasoner as a subject, on a test set of its task.

    Args:
        folder: of the checkpoint.
        name: for tables and titles.
        device: where the model goes.
        max_loops: full depth; None: the task's.
        batch: sequences per sample; None: 64.
        execution: see :func:`reasoner_subject`.
        test_set: by name; None: the task's first, which is like the last level of training.
        sequences: how many; None: 128.
        draw: see :func:`sequences_of`.

    Raises:
        CheckpointError: the folder is no checkpoint, or a damaged one.
        ValueError: an unknown test set, or a batch that does not fit.
    """
    loaded = load_reasoner(folder, device=device)
    chosen, found = sequences_of(loaded.task, 128 if sequences is None else sequences, test_set, draw)
    full = max_loops or loaded.task.full_depth
    samples = Batch(*(_moved(part, device) for part in (found.inputs, found.labels, found.needed)))
    size = min(64, len(samples.inputs)) if batch is None else batch
    about = {
        "trained": dict(loaded.trained),
        "text": f"test set {chosen!r}" + (f", draw {draw}" if draw else ""),
        "max_loops": full,
        "batch": size,
        "mode": "forward",
        "execution": execution,
    }
    return reasoner_subject(
        loaded.model,
        loaded.task,
        samples,
        name=name,
        batch=size,
        max_loops=full,
        execution=execution,
        about=about,
    )


def _moved(part: Tensor, device: torch.device | str) -> Tensor:
    return part.to(device)
