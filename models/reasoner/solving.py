"""Solving problems that a user wrote: over a queue where instances halt as a whole, one by one where rows do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from haltkit.loop import Execution, LoopObserver, Outcome
from haltkit.models.reasoner.checkpoint import ReasonerCheckpoint
from haltkit.models.reasoner.model import Reasoner
from haltkit.models.reasoner.task import Problem
from haltkit.protocol import HaltingPolicy
from haltkit.queue import run_queue
from haltkit.slots import QueueItem

__all__ = ["Solved", "solve", "watch"]


@dataclass(frozen=True)
class Solved:
    """What a model made of a problem.

    Attributes:
        problem: as it was read.
        answers: a class for each row that is asked something.
        steps: how many steps each of these rows took.
        outcome: how each of these rows ended.
    """

    problem: Problem
    answers: tuple[int, ...]
    steps: tuple[int, ...]
    outcome: tuple[Outcome, ...]

    @property
    def right(self) -> bool:
        """Whether the answers are right."""
        return self.problem.right(self.answers)

    def show(self) -> str:
        """The answers as text, with the steps where rows halt one by one."""
        return self.problem.show(self.answers, self.steps)


def solve(
    checkpoint: ReasonerCheckpoint,
    problems: Iterable[Problem],
    policy: HaltingPolicy[Any],
    *,
    max_loops: int | None = None,
    slots: int = 64,
) -> Iterator[Solved]:
    """Solve problems in their order.

    Where the task halts whole instances, a problem that has halted is retired and the next one takes its slot
    (:func:`haltkit.run_queue`). Where rows halt one by one, rows that have halted are retired.

    Args:
        checkpoint: the model and its task.
        problems: as the task reads them; any iterable, read as slots become free.
        policy: judges rows, or with ``granularity=sequence`` instances.
        max_loops: budget of each row; None: the task's full depth.
        slots: how many problems run at a time.

    Raises:
        ValueError: a budget or a number of slots below 1, or a policy that cannot halt instances one by one.
    """
    budget = checkpoint.task.full_depth if max_loops is None else max_loops
    if checkpoint.task.granularity == "token":
        return (_alone(checkpoint.model, problem, policy, budget) for problem in problems)
    return _queued(checkpoint.model, problems, policy, budget, slots)


def _alone(
    model: Reasoner,
    problem: Problem,
    policy: HaltingPolicy[Any],
    max_loops: int,
    execution: Execution = "compact",
    observer: LoopObserver | None = None,
) -> Solved:
    out = model.forward_adaptive(
        problem.batch.inputs, policy, max_loops=max_loops, execution=execution, observer=observer
    )
    (steps,), (outcome,) = out.steps.values(), out.outcome.values()
    return _solved(problem, out.logits[0], steps[0], outcome[0])


def _queued(
    model: Reasoner, problems: Iterable[Problem], policy: HaltingPolicy[Any], max_loops: int, slots: int
) -> Iterator[Solved]:
    waiting: dict[int, Problem] = {}

    @torch.no_grad()
    def prepare(numbered: tuple[int, Problem]) -> QueueItem:
        number, problem = numbered
        waiting[number] = problem
        e = model.embed(problem.batch.inputs)
        return QueueItem(model.initial_state(e)[0], e[0])

    results = run_queue(
        lambda x, e: model.step(x, e),
        enumerate(problems),
        policy,
        slots,
        max_steps=max_loops,
        readout=model.readout,
        prepare=prepare,
    )
    for result in results:
        if result.error is not None:
            raise result.error
        yield _solved(waiting.pop(result.index), model.readout(result.x), result.steps, result.outcome)


def _solved(problem: Problem, logits: Tensor, steps: Tensor, outcome: Tensor) -> Solved:
    asked = problem.batch.asked[0]
    return Solved(
        problem,
        tuple(logits.argmax(-1)[asked].tolist()),
        tuple(steps[asked].tolist()),
        tuple(Outcome(int(one)) for one in outcome[asked]),
    )


def watch(
    checkpoint: ReasonerCheckpoint,
    problem: Problem,
    policy: HaltingPolicy[Any],
    on_step: Callable[[int, tuple[int, ...]], None],
    *,
    max_loops: int | None = None,
) -> Solved:
    """Solve one problem, and tell of every step: its number, and the answers after it."""
    model = checkpoint.model
    asked = problem.batch.asked[0]

    class Watcher:
        def begin(self, name: str, x0: Tensor) -> None: ...

        def step(self, name: str, k: int, x: Tensor) -> None:
            on_step(k, tuple(model.readout(x[0]).argmax(-1)[asked].tolist()))

        def end(self, name: str, steps: Tensor, outcome: Tensor) -> None: ...

    budget = checkpoint.task.full_depth if max_loops is None else max_loops
    return _alone(model, problem, policy, budget, execution="masked", observer=Watcher())
