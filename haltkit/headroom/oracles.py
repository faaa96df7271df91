"""Oracle depths: the step at which each row could have halted, known only once the loop has run to full depth.

Everything is recorded at steps 1 to K, step by step in the first dimension; the other leading dimensions are the rows.
A depth of 0 means that no step qualifies.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "Definition",
    "agrees",
    "best_depths",
    "close",
    "eps_loss_depths",
    "first",
    "from_then_on",
    "right",
    "right_depths",
    "stable_depths",
]

Definition = Literal["stable", "eps-loss", "right", "best"]


def from_then_on(qualifies: Tensor) -> Tensor:
    """The least k such that all of k, k + 1, ..., K qualify, ``(K, ...)`` bool to ``(...)`` int64; 0 if K does not."""
    _check_steps(qualifies)
    lasting = qualifies.flip(0).cummin(0).values.sum(0)
    return torch.where(lasting > 0, len(qualifies) - lasting + 1, 0)


def first(qualifies: Tensor) -> Tensor:
    """The least k that qualifies, ``(K, ...)`` bool to ``(...)`` int64; 0 if none does."""
    _check_steps(qualifies)
    return torch.where(qualifies.any(0), qualifies.int().argmax(0) + 1, 0)


def agrees(predictions: Tensor, item_dims: int = 0) -> Tensor:
    """Whether the answer at each step is that of full depth, ``(K, rows..., item...)`` to ``(K, rows...)`` bool.

    Args:
        predictions: top predictions, such as token ids.
        item_dims: how many trailing dimensions make one answer together: 1 for the cells of a board, 0 for tokens.

    Raises:
        ValueError: no step, or as many dimensions of an answer as there are dimensions.
    """
    _check_steps(predictions)
    return right(predictions, predictions[-1], item_dims)


def right(predictions: Tensor, labels: Tensor, item_dims: int = 0) -> Tensor:
    """Whether the answer at each step is the label, ``(K, rows..., item...)`` and ``(rows..., item...)`` to bool."""
    _check_steps(predictions)
    if labels.shape != predictions.shape[1:]:
        raise ValueError(f"labels {tuple(labels.shape)} for predictions of rows {tuple(predictions.shape[1:])}")
    if not 0 <= item_dims < predictions.ndim:
        raise ValueError(f"item_dims={item_dims} for predictions of {predictions.ndim - 1} dimensions behind the steps")
    same = predictions == labels
    return same.flatten(same.ndim - item_dims).all(-1) if item_dims else same


def close(losses: Tensor, epsilon: float) -> Tensor:
    """Whether the loss at each step is at most epsilon above that of full depth, ``(K, rows...)`` to bool."""
    _check_steps(losses)
    return losses <= losses[-1] + epsilon


def stable_depths(predictions: Tensor, item_dims: int = 0) -> Tensor:
    """*stable*: the least k from which the answer is that of full depth at every step to the end."""
    return from_then_on(agrees(predictions, item_dims))


def eps_loss_depths(losses: Tensor, epsilon: float) -> Tensor:
    """*eps-loss*: the least k whose loss is at most epsilon above that of full depth.

    It may be above again later: an oracle halts there anyway.
    """
    return first(close(losses, epsilon))


def right_depths(predictions: Tensor, labels: Tensor, item_dims: int = 0) -> Tensor:
    """*right*: the least k from which the label is right to the end; 0 where full depth is wrong."""
    return from_then_on(right(predictions, labels, item_dims))


def best_depths(losses: Tensor) -> Tensor:
    """*best*: the first step of the least loss; 0 where no loss is finite."""
    _check_steps(losses)
    known = losses.masked_fill(~losses.isfinite(), torch.inf)
    return torch.where(known.amin(0) < torch.inf, known.argmin(0) + 1, 0)


def _check_steps(recorded: Tensor) -> None:
    if recorded.ndim < 1 or not len(recorded):
        raise ValueError(f"recorded arrays of shape {tuple(recorded.shape)}: (K, rows...) with at least one step")
