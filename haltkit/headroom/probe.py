"""A small logistic probe: how much more than one signal the features of a step know about whether a row has settled."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from haltkit.headroom.clusters import sequence_of_rows
from haltkit.headroom.predictability import Auc, auc

__all__ = ["LogisticProbe", "ProbeAccount", "fit_logistic", "probe_by_step", "split_by_sequence"]

MOST_KEPT = 2**24  # numbers of one region: 64 MB
NEWTON = 5  # steps that give a probe its direction, which is all that an area under the curve depends on


@dataclass(frozen=True, eq=False)
class LogisticProbe:
    """``P(settled) = sigmoid(weight . features + bias)``.

    Attributes:
        weight: ``(F,)`` float64, for features as they are (their standardization is folded in).
        bias: ``()`` float64.
    """

    weight: Tensor
    bias: Tensor

    def logit(self, features: Tensor) -> Tensor:
        """``(..., F)`` to ``(...)``; above 0 the probe says settled."""
        return features.to(self.weight.dtype) @ self.weight + self.bias


def split_by_sequence(sequence: Tensor, share: float = 0.5, seed: int = 0) -> Tensor:
    """A mask of rows for fitting, ``(N,)`` to ``(N,)`` bool: whole sequences, never some rows of one.

    Args:
        sequence: of each row.
        share: of the sequences that are for fitting; at least one is, and at least one is not.

    Raises:
        ValueError: fewer than two sequences, or a share outside (0, 1).
    """
    names, index = torch.unique(sequence, return_inverse=True)
    if len(names) < 2 or not 0 < share < 1:
        raise ValueError(f"{len(names)} sequences with a share of {share} for fitting: two at least, and in (0, 1)")
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    count = min(max(1, round(share * len(names))), len(names) - 1)
    chosen = torch.zeros(len(names), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen[index]


def fit_logistic(features: Tensor, target: Tensor, ridge: float = 1e-3, steps: int = 100) -> LogisticProbe:
    """Fit by Newton's method: the mean log-loss plus ``ridge / 2`` times the squared weights of standardized features.

    Args:
        features: ``(N, F)``; computed with in float64.
        target: ``(N,)`` bool.
        ridge: above 0, so that the optimum is unique also where the classes can be separated.
        steps: the most steps of Newton's method; few are enough.

    Raises:
        ValueError: shapes that do not fit, a feature that is not finite, a target of one kind only, ridge not above 0.
    """
    if features.ndim != 2 or target.shape != features.shape[:1]:
        raise ValueError(f"features {tuple(features.shape)} and target {tuple(target.shape)}: (N, F) and (N,)")
    if not ridge > 0:
        raise ValueError(f"ridge={ridge} must be above 0")
    if not bool(features.isfinite().all()):
        raise ValueError("a feature is not finite: exclude rows where a signal is not defined yet")
    y = target.double().cpu()
    if not 0 < float(y.sum()) < len(y):
        raise ValueError("every row of the target is the same: there is nothing to tell apart")
    x = features.detach().double().cpu()
    mean, spread = x.mean(0), x.std(0, correction=0)
    x = (x - mean) / torch.where(spread > 0, spread, 1.0)
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    penalty = torch.full((x.shape[1],), ridge, dtype=torch.float64)
    penalty[-1] = 1e-9  # the bias is free, but for what keeps the system solvable
    w = torch.zeros(x.shape[1], dtype=torch.float64)
    w[-1] = (y.mean() / (1 - y.mean())).log()
    best = _objective(x, y, w, penalty)
    for _ in range(steps):
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (p - y) / len(y) + penalty * w
        if float(gradient.abs().max()) < 1e-10:
            break
        hessian = (x * (p * (1 - p)).unsqueeze(1)).T @ x / len(y) + torch.diag(penalty)
        direction = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while (found := _objective(x, y, w - size * direction, penalty)) > best and size > 1e-6:
            size /= 2
        if not found < best:
            break  # at the optimum, to rounding
        w, best = w - size * direction, found
    weight = w[:-1] / torch.where(spread > 0, spread, 1.0)
    return LogisticProbe(weight, w[-1] - weight @ mean)


def _objective(x: Tensor, y: Tensor, w: Tensor, penalty: Tensor) -> float:
    loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y)
    return float(loss + 0.5 * (penalty * w * w).sum())


def probe_by_step(
    features: Tensor,
    depths: Tensor,
    sequence: Tensor | None = None,
    *,
    ridge: float = 1e-3,
    steps: int = 100,
    seed: int = 0,
) -> tuple[Auc, ...]:
    """How well a probe of its own per step tells what has settled, on sequences that it was not fitted on.

    Args:
        features: ``(K, rows..., F)``; rows with a feature that is not finite are not used at that step.
        depths: the oracle's, ``(rows...)``; rows of depth 0 are not used.
        sequence: of each row, ``(rows...)``; the leading dimension's index if not given. Half of the sequences fit.
        ridge, steps: see :func:`fit_logistic`.
        seed: of the halves.

    Returns:
        the area under the curve at steps 1 to K; NaN where one of the halves has rows of one kind only.

    Raises:
        ValueError: shapes that do not fit, or fewer than two sequences.
    """
    if features.shape[1:-1] != depths.shape:
        raise ValueError(f"features {tuple(features.shape)} for rows {tuple(depths.shape)}")
    index = sequence_of_rows(depths.shape, sequence).cpu()
    fits = split_by_sequence(index, 0.5, seed)
    flat = depths.flatten().cpu()
    areas = []
    for k, step in enumerate(features, 1):
        rows = step.detach().cpu().reshape(-1, step.shape[-1])
        known = (flat > 0) & rows.isfinite().all(-1)
        settled = flat <= k
        train, test = known & fits, known & ~fits
        if settled[train].all() or not settled[train].any():
            areas.append(Auc(math.nan, math.nan))
            continue
        probe = fit_logistic(rows[train], settled[train], ridge, steps)
        areas.append(auc(-probe.logit(rows[test]), settled[test], index[test]))
    return tuple(areas)


class ProbeAccount:
    """Judges a probe per step over text that comes in portions, by the first sequences: memory is bounded.

    Args:
        most: numbers that are kept at most, features of all rows at all steps; but two sequences are kept in any case.
    """

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most = most
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sequences = self._steps = 0

    def add(self, features: Tensor, depths: Tensor) -> None:
        """Add a portion that contains only whole sequences, the leading dimension of its rows.

        Args:
            features: ``(K, rows..., F)``.
            depths: the oracle's, ``(rows...)``; rows of depth 0 are not used.
        """
        self._steps = len(features)
        index = sequence_of_rows(depths.shape, None)
        if not len(index):
            return
        count = int(index.max()) + 1
        room = max(2, self._most // (features.numel() // count)) - self._sequences
        kept = index < room
        if room > 0:
            rows = features.detach().reshape(self._steps, len(index), -1)[:, kept].cpu()
            self._parts.append((rows, depths.flatten()[kept].cpu(), index[kept] + self._sequences))
            self._sequences += min(room, count)

    def result(self) -> tuple[Auc, ...]:
        """The area under the curve at steps 1 to K, as :func:`probe_by_step` gives it; NaN of a single sequence."""
        if self._sequences < 2:
            return (Auc(math.nan, math.nan),) * self._steps
        features, depths, sequence = zip(*self._parts, strict=True)
        return probe_by_step(torch.cat(features, 1), torch.cat(depths), torch.cat(sequence), steps=NEWTON)
