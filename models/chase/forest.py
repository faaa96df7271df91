"""A forest that a user wrote: reading it, and showing the answers that a model gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from haltkit.models.chase.trees import encode
from haltkit.models.reasoner.task import Batch, from_numpy

__all__ = ["Forest", "NotAForest", "make_forest", "path", "read_forest"]


class NotAForest(ValueError):
    """Parents that go round in a circle, which is ``circle``: its first node comes last, too."""

    def __init__(self, circle: Sequence[int]) -> None:
        super().__init__(f"not a forest: {' -> '.join(map(str, circle))} is a cycle")
        self.circle = tuple(circle)


@dataclass(frozen=True, eq=False)
class Forest:
    """One forest that a user wrote: the batch of one sequence, and what its rows are.

    Attributes:
        batch: one sequence; row ``i`` is the edge of ``nodes[i]``, row ``N + i`` the query for it.
        nodes: names in the order given.
        parents: each name's parent.
        words: what the names are called; empty: by their numbers.
        queries: the nodes to show, by name; empty: all.
        note: nothing is odd about a forest that can be read.
    """

    batch: Batch
    nodes: tuple[int, ...]
    parents: Mapping[int, int]
    words: tuple[str, ...] = ()
    queries: tuple[int, ...] = ()
    note: str = ""

    def right(self, answers: Sequence[int]) -> bool:
        """Whether every answer that is shown is the root of its node."""
        asked = self.queries or self.nodes
        return all(answer == path(self.parents, node)[-1] for node, answer in self._answers(answers) if node in asked)

    def show(self, answers: Sequence[int], steps: Sequence[int] | None = None) -> str:
        """A line per query: the node, the root, and the steps that it took."""
        lines = []
        for place, (node, answer) in enumerate(self._answers(answers)):
            if node in (self.queries or self.nodes):
                hops = len(path(self.parents, node)) - 1
                cost = "" if steps is None else f"  in {steps[place]} steps ({hops} hop{'s' * (hops != 1)})"
                lines.append(f"{self._word(node)}: {self._word(answer)}{cost}")
        return "\n".join(lines)

    def _answers(self, answers: Sequence[int]) -> list[tuple[int, int]]:
        return list(zip(self.nodes, answers, strict=True))

    def _word(self, name: int) -> str:
        """A name that no node has is one that the model has made up."""
        return self.words[name] if name < len(self.words) else f"#{name}"


def path(parents: Mapping[int, int], node: int) -> list[int]:
    """From a node to its root, both included."""
    nodes = [node]
    while parents[nodes[-1]] != nodes[-1]:
        nodes.append(parents[nodes[-1]])
    return nodes


def make_forest(parents: Mapping[int, int], names: int, longest: int) -> Forest:
    """A given forest: each node's parent by name, ``0 .. names - 1``; a root is its own parent.

    Raises:
        ValueError: no node, too many, a name that there is not, a parent that is no node, or a cycle.
    """
    nodes = tuple(parents)
    if not nodes:
        raise ValueError("an empty forest: give at least one node")
    if len(nodes) > longest:
        raise ValueError(f"{len(nodes)} nodes: the model takes at most {longest}")
    for name in (*nodes, *parents.values()):
        if not isinstance(name, int) or not 0 <= name < names:
            raise ValueError(f"unknown name {name!r}: names are the numbers 0 to {names - 1}")
    places = {name: place for place, name in enumerate(nodes)}
    for node, parent in parents.items():
        if parent not in places:
            raise ValueError(f"node {node} points to {parent}, which is no node of the forest")
    for node in nodes:
        visited = [node]
        while parents[visited[-1]] != visited[-1]:
            following = parents[visited[-1]]
            if following in visited:
                raise NotAForest([*visited[visited.index(following) :], following])
            visited.append(following)
    in_order = np.arange(len(nodes))[None]
    above = np.array([[places[parents[name]] for name in nodes]])
    return Forest(from_numpy(*encode(above, np.array([nodes]), in_order, in_order)), nodes, dict(parents))


def read_forest(text: str, names: int, longest: int) -> Forest:
    """A forest as text: ``a>b`` for the edge from a to b, ``r`` for a root, ``a?`` for a query.

    Names are any words without ``>`` and ``?``. Without a query, every node is asked for.

    Raises:
        ValueError: an item that is none of these, a node given twice, a name that is no node, too many nodes, or a
            cycle.
    """
    parents: dict[str, str] = {}
    queries: list[str] = []
    for item in text.split():
        if item.endswith("?") and len(item) > 1:
            queries.append(item[:-1])
            continue
        node, arrow, parent = item.partition(">")
        if not node or (arrow and not parent) or ">" in parent or "?" in item:
            raise ValueError(f"{item!r} is no part of a forest: write a>b for an edge, r for a root, a? for a query")
        if node in parents:
            raise ValueError(f"{node!r} has two parents, {parents[node]!r} and {parent or node!r}")
        parents[node] = parent or node
    for name in (*parents.values(), *queries):
        if name not in parents:
            raise ValueError(f"unknown name {name!r}: write {name} for a root, or {name}>b")
    if len(parents) > longest:
        raise ValueError(f"{len(parents)} nodes: the model takes at most {longest}")
    words = tuple(parents)
    numbers = {word: number for number, word in enumerate(words)}
    try:
        forest = make_forest({numbers[node]: numbers[parent] for node, parent in parents.items()}, names, longest)
    except NotAForest as error:
        circle = " -> ".join(words[node] for node in error.circle)
        raise ValueError(f"not a forest: {circle} is a cycle") from None
    return replace(forest, words=words, queries=tuple(numbers[name] for name in queries))
