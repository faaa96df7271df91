"""The chase task: a forest of named nodes, each pointing to its parent; which root does each node lead to?

A sequence is the forest's edges in random order, one row an edge (its source and its target), and then one query for
each node in random order. A root points to itself. Names are a fresh random choice for every sequence, so that nothing
in the input tells how many hops a query takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor

from haltkit.kinds import Kinds
from haltkit.models.chase.forest import Forest, read_forest
from haltkit.models.chase.trees import chains, encode, trees
from haltkit.models.config import ConfigError, from_dict
from haltkit.models.reasoner.task import Batch, Level, from_numpy

__all__ = ["Chase", "ChaseSettings", "make_task"]


@dataclass(frozen=True)
class ChaseSettings:
    """What forests are drawn from.

    Attributes:
        names: how many names there are.
        nodes: nodes in a forest of the last level.
        first_nodes: nodes in a forest of the first levels.
        chain_ends: probabilities that a chain ends at a node, one drawn for each forest in training; the first one is
            the distribution of the test set.
        depths: greatest number of hops of each level.
        longest: nodes in the forests of the test set ``long``.
        most_steps: training draws no more steps than this.
        rows: a batch has about this many rows of queries, and at least ``least_batch`` sequences.
        least_batch: sequences.
    """

    names: int = 80
    nodes: int = 32
    first_nodes: int = 8
    chain_ends: tuple[float, ...] = (0.2, 0.05)
    depths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 31)
    longest: int = 64
    most_steps: int = 48
    rows: int = 1024
    least_batch: int = 64

    def __post_init__(self) -> None:
        if not 2 <= self.first_nodes <= self.nodes <= self.longest <= self.names:
            raise ConfigError(
                "task: 2 <= first_nodes <= nodes <= longest <= names must hold, got "
                f"{self.first_nodes}, {self.nodes}, {self.longest}, {self.names}"
            )
        if not self.depths or list(self.depths) != sorted(set(self.depths)) or self.depths[0] < 1:
            raise ConfigError(f"task.depths must rise from at least 1, got {self.depths}")
        if self.depths[-1] >= self.nodes or self.depths[-1] >= self.most_steps:
            raise ConfigError(f"task.depths: {self.depths[-1]} hops need more nodes and most_steps than that")
        if not self.chain_ends or not all(0 < p <= 1 for p in self.chain_ends):
            raise ConfigError(f"task.chain_ends must be probabilities above 0, got {self.chain_ends}")
        if self.rows < 1 or self.least_batch < 1:
            raise ConfigError("task.rows and task.least_batch must be at least 1")


@dataclass(frozen=True)
class Chase:
    """The task; see the module."""

    settings: ChaseSettings
    name: str = "chase"
    item: str = "answer"
    granularity: Literal["token", "sequence"] = "token"
    across: int = 8
    full_depth: int = 48  # twice the steps that nearly all queries need
    kinds: Kinds | None = field(default=Kinds(lambda batch: batch.asked.long(), ("edges", "queries")), repr=False)

    @property
    def columns(self) -> tuple[int, ...]:
        return (self.settings.names + 1,) * 3

    @property
    def classes(self) -> int:
        return self.settings.names

    @property
    def positions(self) -> int:
        return 2 * self.settings.longest

    @property
    def levels(self) -> Sequence[Level]:
        """One a depth: forests grow with it, and steps go well past the answer."""
        s = self.settings
        return tuple(
            Level(
                depth,
                (depth // 2 + 1, min(2 * depth + 4, s.most_steps)),
                max(s.least_batch, s.rows // self.nodes(depth)),
            )
            for depth in s.depths
        )

    def nodes(self, depth: int) -> int:
        """Nodes in a forest of the level of this depth."""
        s = self.settings
        return s.first_nodes if depth <= 3 else min(s.nodes, max(s.first_nodes, depth + 8))

    def sample(self, rng: np.random.Generator, level: int, count: int) -> Batch:
        depth = self.settings.depths[level]
        ends = rng.choice(np.asarray(self.settings.chain_ends), count)
        return self._named(rng, chains(rng, count, self.nodes(depth), ends, depth))

    def test_sets(self, count: int, seed: int) -> dict[str, Batch]:
        """``chains`` as in training, at its first probability; ``trees``; and ``long`` chains, of twice the nodes."""
        s = self.settings
        drawn = {}
        for number, name in enumerate(("chains", "trees", "long")):
            rng = np.random.default_rng([seed, 0x7E57, number])
            if name == "chains":
                parents = chains(rng, count, s.nodes, s.chain_ends[0], s.nodes)
            elif name == "trees":
                parents = trees(rng, count, s.nodes)
            else:
                parents = chains(rng, count, s.longest, s.chain_ends[0] / 2, s.longest)
            drawn[name] = self._named(rng, parents)
        return drawn

    def split(self, text: str) -> list[str]:
        """Forests of a text, one per line."""
        return [line for line in text.splitlines() if line.strip()]

    def read(self, text: str) -> Forest:
        """See :func:`~haltkit.models.chase.forest.read_forest`."""
        return read_forest(text, self.settings.names, self.settings.longest)

    def words(self, rows: Tensor) -> list[str]:
        """``a>b`` for the edge from a to b, and ``a?`` for the query for a."""
        return [f"{query - 1}?" if query else f"{source - 1}>{target - 1}" for source, target, query in rows.tolist()]

    def answer(self, label: int) -> str:
        """The name."""
        return str(label)

    def _named(self, rng: np.random.Generator, parents: np.ndarray) -> Batch:
        """With fresh names, edges and queries shuffled."""
        count, nodes = parents.shape

        def orders(of: int) -> np.ndarray:
            return rng.random((count, of)).argsort(1)[:, :nodes]

        return from_numpy(*encode(parents, orders(self.settings.names), orders(nodes), orders(nodes)))


def make_task(settings: dict[str, Any]) -> Chase:
    """The task with these settings.

    Raises:
        ConfigError: settings that do not work.
    """
    return Chase(from_dict(ChaseSettings, settings, "task"))
