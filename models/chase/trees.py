"""Forests as arrays of parents: drawing them, counting hops, and turning them into a model's inputs."""

from __future__ import annotations

import numpy as np

from haltkit.models.reasoner.task import IGNORED

__all__ = ["chains", "encode", "hops_and_roots", "trees"]


def chains(rng: np.random.Generator, count: int, nodes: int, ends: np.ndarray | float, deepest: int) -> np.ndarray:
    """Parents of ``count`` forests of chains, ``(count, nodes)``: each node goes on from the one before or is a root.

    Args:
        ends: probability that a node is a root, one for all or ``(count,)``; chains are then of geometric length.
        deepest: a node of this many hops is followed by a root.
    """
    starts = rng.random((count, nodes)) < np.broadcast_to(np.asarray(ends), (count,))[:, None]
    hops = np.zeros(count, dtype=np.int64)
    parents = np.zeros((count, nodes), dtype=np.int64)
    for node in range(1, nodes):
        root = starts[:, node] | (hops >= deepest)
        hops = np.where(root, 0, hops + 1)
        parents[:, node] = np.where(root, node, node - 1)
    return parents


def trees(rng: np.random.Generator, count: int, nodes: int) -> np.ndarray:
    """Parents of ``count`` random recursive trees, ``(count, nodes)``: a node hangs on any of those before it."""
    parents = np.zeros((count, nodes), dtype=np.int64)
    for node in range(1, nodes):
        parents[:, node] = rng.integers(0, node, count)
    return parents


def hops_and_roots(parents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hops to the root and the root itself, ``(count, nodes)`` each.

    Raises:
        ValueError: a cycle; it is named.
    """
    hops = np.zeros_like(parents)
    at = np.broadcast_to(np.arange(parents.shape[1]), parents.shape)
    for _ in range(parents.shape[1]):
        following = np.take_along_axis(parents, at, 1)
        moved = following != at
        if not moved.any():
            return hops, at
        hops, at = hops + moved, following
    forest = int(np.nonzero(moved.any(1))[0][0])
    start = int(at[forest, int(np.nonzero(moved[forest])[0][0])])
    cycle = [start]
    while (node := int(parents[forest, cycle[-1]])) != start:
        cycle.append(node)
    raise ValueError(f"not a forest: nodes {' -> '.join(map(str, [*cycle, start]))} go round in a circle")


def encode(
    parents: np.ndarray, names: np.ndarray, edge_order: np.ndarray, query_order: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Forests as inputs ``(B, 2N, 3)``, labels and needed steps ``(B, 2N)``; arguments are ``(B, N)`` each.

    Columns are source, target and query; 0 stands for none and ``name + 1`` for a name.
    """
    hops, roots = hops_and_roots(parents)
    batch, nodes = parents.shape

    def pick(values: np.ndarray, order: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, order, 1)

    inputs = np.zeros((batch, 2 * nodes, 3), dtype=np.int64)
    inputs[:, :nodes, 0] = pick(names, edge_order) + 1
    inputs[:, :nodes, 1] = pick(names, pick(parents, edge_order)) + 1
    inputs[:, nodes:, 2] = pick(names, query_order) + 1
    labels = np.full((batch, 2 * nodes), IGNORED, dtype=np.int64)
    labels[:, nodes:] = pick(names, pick(roots, query_order))
    needed = np.zeros((batch, 2 * nodes), dtype=np.int64)
    needed[:, nodes:] = pick(hops, query_order)
    return inputs, labels, needed
