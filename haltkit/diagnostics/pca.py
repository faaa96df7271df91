"""Principal components of a set of states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from haltkit import signals
from haltkit.diagnostics.errors import DiagnosticError

__all__ = ["PCA", "fit_pca"]


@dataclass(frozen=True)
class PCA:
    """A plane (or more) through states.

    Attributes:
        mean: ``(D,)``.
        components: orthonormal rows, ``(C, D)``, by falling variance; the largest entry of each is positive.
        explained: share of the whole variance along each, ``(C,)``.
    """

    mean: Tensor
    components: Tensor
    explained: Tensor

    def project(self, states: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., C)``."""
        return (signals.measured(states).to(self.mean) - self.mean) @ self.components.T


def fit_pca(states: Tensor, components: int = 2) -> PCA:
    """PCA of states ``(..., D)``, all rows together.

    Raises:
        DiagnosticError: fewer rows than components and one more, or states that are all the same.
    """
    points = signals.measured(states).double().flatten(0, -2)
    if min(len(points) - 1, points.shape[-1]) < components:
        raise DiagnosticError(f"{len(points)} states of width {points.shape[-1]} have no {components} components")
    mean = points.mean(0)
    centred = points - mean
    total = centred.square().sum()
    if not total > 0:
        raise DiagnosticError("these states are all the same: they have no principal components")
    rows = centred.shape[0] > centred.shape[1]  # the smaller of the two products has the same spectrum
    values, vectors = torch.linalg.eigh(centred.T @ centred if rows else centred @ centred.T)
    values, vectors = values.flip(0)[:components], vectors.flip(1)[:, :components]
    axes = vectors.T if rows else (vectors.T @ centred) / values.clamp_min(1e-300).sqrt()[:, None]
    sign = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    return PCA(mean, axes * sign, values.clamp_min(0) / total)
