"""What a task is to the reasoner: columns, classes, levels of a curriculum, and a function that draws batches."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from haltkit.kinds import Kinds
from haltkit.models.config import ConfigError
from haltkit.trust import check_import

__all__ = ["IGNORED", "TASKS", "Batch", "Level", "Problem", "Task", "from_numpy", "make_task"]

IGNORED = -100  # the label of a row that is asked nothing


@dataclass(frozen=True)
class Batch:
    """``B`` sequences of ``T`` rows.

    Attributes:
        inputs: ``(B, T, C)`` int64; 0 stands for nothing.
        labels: ``(B, T)`` int64, ``IGNORED`` where a row is asked nothing.
        needed: how many steps a row's answer takes at least by the task's own count, ``(B, T)`` int64; training counts
            a row only after more than this many steps. 0 where the task has no count.
    """

    inputs: Tensor
    labels: Tensor
    needed: Tensor

    def __getitem__(self, part: slice) -> Batch:
        """Some of the sequences."""
        return replace(self, inputs=self.inputs[part], labels=self.labels[part], needed=self.needed[part])

    @property
    def asked(self) -> Tensor:
        """Which rows are asked something, ``(B, T)`` bool."""
        return self.labels != IGNORED


@dataclass(frozen=True)
class Level:
    """One level of a curriculum.

    Attributes:
        depth: the greatest ``needed`` in it. The level is mastered when rows that need this much are right.
        steps: least and greatest number of steps that training draws.
        batch: sequences in a batch.
    """

    depth: int
    steps: tuple[int, int]
    batch: int


class Problem(Protocol):
    """A problem that a user wrote.

    Attributes:
        batch: a batch of one sequence; its labels are the answers, as far as there is one answer.
        note: what a reader should know of it beforehand; empty where there is nothing.
    """

    @property
    def batch(self) -> Batch: ...

    @property
    def note(self) -> str: ...

    def right(self, answers: Sequence[int]) -> bool:
        """Whether these are right: a class for each row that is asked something."""
        ...

    def show(self, answers: Sequence[int], steps: Sequence[int] | None = None) -> str:
        """The answers as text; with ``steps``, how many each row took, where rows halt one by one."""
        ...


class Task(Protocol):
    """A task, with its settings; immutable.

    Attributes:
        name: of the task.
        item: what one answer is called.
        granularity: ``token``: each row halts and is right or wrong by itself; ``sequence``: whole sequences, which are
            right if every answer in them is.
        full_depth: steps after which nothing is expected to change any more: the default budget.
        columns: how many values each column of the input has, the 0 of nothing included.
        classes: how many answers there are.
        positions: rows in the longest sequence.
        levels: of the curriculum.
        across: rows per line where they are shown.
        kinds: tells the rows of a batch apart by what the input shows; None: they are all alike, or nothing shows.
    """

    name: str
    item: str
    granularity: Literal["token", "sequence"]
    full_depth: int
    columns: tuple[int, ...]
    classes: int
    positions: int
    levels: Sequence[Level]
    across: int
    kinds: Kinds | None

    def sample(self, rng: np.random.Generator, level: int, count: int) -> Batch:
        """``count`` sequences of a level of the curriculum; what they are depends on ``rng`` alone."""
        ...

    def test_sets(self, count: int, seed: int) -> dict[str, Batch]:
        """Test sets by name, ``count`` sequences each; the first is like the last level of training."""
        ...

    def words(self, rows: Tensor) -> list[str]:
        """What the rows of one sequence, ``(T, C)``, say, in a few characters each."""
        ...

    def answer(self, label: int) -> str:
        """What an answer says, in a few characters."""
        ...

    def split(self, text: str) -> list[str]:
        """The problems in a text, one by one."""
        ...

    def read(self, text: str) -> Problem:
        """A problem.

        Raises:
            ValueError: it cannot be read, or the model cannot take it.
        """
        ...


# Where each task's ``make_task(settings) -> Task`` is; of a task of your own write "pkg.mod" as its name.
TASKS = {"chase": "haltkit.models.chase.task", "sudoku": "haltkit.models.sudoku.task"}


def make_task(name: str, settings: Mapping[str, Any] | None = None) -> Task:
    """A task by name, with its settings (None: its defaults).

    Raises:
        ConfigError: an unknown task (the known ones are listed), or settings that it refuses.
        CodeRefused: a task of its own in a file, where the user has not allowed code.
    """
    where = TASKS.get(name, name if "." in name else None)
    if where is None:
        raise ConfigError(f"unknown task {name!r}; known: {', '.join(TASKS)}, or a module of your own, pkg.mod")
    if name not in TASKS:
        check_import(where)
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError:
        raise ConfigError(f"task {name!r}: there is no module {where}") from None
    return cast(Task, module.make_task(dict(settings or {})))


def from_numpy(inputs: np.ndarray, labels: np.ndarray, needed: np.ndarray) -> Batch:
    """A batch of arrays, as int64 tensors."""
    as_tensors = (torch.from_numpy(np.ascontiguousarray(part, dtype=np.int64)) for part in (inputs, labels, needed))
    return Batch(*as_tensors)
