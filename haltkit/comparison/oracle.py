"""Which rows of a recording have settled at each step, by one of the definitions of the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from haltkit import signals
from haltkit.headroom import Definition, oracles
from haltkit.protocol import Readout
from haltkit.recording.trajectory import RegionTrajectory
from haltkit.subject import Subject

__all__ = ["EPSILON", "Oracle", "Readings", "gain_cut", "mean_of_asked", "readings", "taught"]

EPSILON = 0.01  # nats: what one of eps-loss is where nothing else is said
GAIN_KEPT = 0.99  # of the loss that further steps save


@dataclass(frozen=True)
class Readings:
    """What the readout says of one region's recording.

    Attributes:
        predictions: top predictions, ``(K, B, T)``.
        margins: of the two most probable classes, ``(K, B, T)``; None: they were not asked for.
        losses: cross-entropy with the labels in nats, ``(K, B, T)``; None: it was not asked for.
        labels: ``(B, T)``; None: as there.
        present: rows that are there, ``(B, T)`` bool.
        asked: those that, where labels were asked for, have one.
    """

    predictions: Tensor
    margins: Tensor | None
    losses: Tensor | None
    labels: Tensor | None
    present: Tensor
    asked: Tensor


def readings(
    region: RegionTrajectory, readout: Readout, labels: Tensor | None = None, *, margins: bool = False
) -> Readings:
    """Read a recording at every step.

    Args:
        region: with all of its states, ``(K + 1, B, T, D)``.
        readout: of recordings, from states to logits.
        labels: ``(B, T)`` int64, below 0 where a row is asked nothing; None: no losses.
        margins: whether they are wanted.

    Raises:
        ValueError: labels of other rows, or beyond the readout's classes.
    """
    assert region.states is not None  # Subject.record keeps states
    present = region.present
    if labels is not None:
        labels = labels.to(present.device)
        if labels.shape != present.shape:
            raise ValueError(f"labels {tuple(labels.shape)} for rows {tuple(present.shape)}: one per row is expected")
    tops, gaps, losses = [], [], []
    for state in region.states[1:]:
        logits = readout(state)
        tops.append(signals.top(logits))
        if labels is None and not margins:
            continue
        log_p = signals.log_probabilities(logits)
        if margins:
            gaps.append(signals.margin(log_p))
        if labels is not None:
            losses.append(_cross_entropy(log_p, labels))
    asked = present if labels is None else present & (labels >= 0)
    return Readings(
        torch.stack(tops),
        torch.stack(gaps) if gaps else None,
        torch.stack(losses) if losses else None,
        labels,
        present,
        asked,
    )


def _cross_entropy(log_p: Tensor, labels: Tensor) -> Tensor:
    """In nats, of each row; rows without a label get a number that means nothing."""
    if int(labels.max()) >= log_p.shape[-1]:
        raise ValueError(f"the label {int(labels.max())}, and the readout has {log_p.shape[-1]} classes")
    return -log_p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Oracle:
    """When a row has settled: what headroom is measured by, and what a probe, a gate or a table is taught.

    Attributes:
        definition: of the oracle. ``stable``: the top prediction does not change any more. ``eps-loss``: the loss at
            this step is at most ``epsilon`` above full depth's, so that the *marginal gain*, the loss that further
            steps would still save, is no more than that. ``right``: the label is right, to the end. ``best``: the step
            of the least loss is reached.
        epsilon: of ``eps-loss``, in nats. None: a probe and a gate take the greatest one such that 99% of all marginal
            gain on the samples that are learned from is in rows and steps that gain more (the cut of TaH2, arXiv
            2609.35748); a table takes 0.01.

    Raises:
        ValueError: an unknown definition, or an epsilon below 0.
    """

    definition: Definition = "stable"
    epsilon: float | None = None

    def __post_init__(self) -> None:
        if self.definition not in get_args(Definition):
            raise ValueError(f"oracle {self.definition!r}: allowed are {', '.join(get_args(Definition))}")
        if self.epsilon is not None and not self.epsilon >= 0:
            raise ValueError(f"epsilon={self.epsilon} must be at least 0: it is a loss in nats")

    def or_epsilon(self, epsilon: float) -> Oracle:
        """The same, with this epsilon where ``eps-loss`` says none."""
        return replace(self, epsilon=epsilon) if self.definition == "eps-loss" and self.epsilon is None else self

    @property
    def needs_labels(self) -> bool:
        """Whether it cannot be told without labels; ``eps-loss`` and ``best`` need them for their losses."""
        return self.definition != "stable"

    def labels(self, subject: Subject) -> Callable[[Any], Tensor | None]:
        """From a sample to the labels that the definition needs.

        Raises:
            ValueError: the subject has no labels.
        """
        if not self.needs_labels:
            return lambda _: None
        if subject.labels is None:
            raise ValueError(
                f"{self.definition} needs labels, and the data of {subject.name} have none: give the Subject labels=, "
                "or use stable"
            )
        return subject.labels

    def settled(self, read: Readings, whole: bool = False) -> tuple[Tensor, Tensor]:
        """Which rows have settled at each step, and from when on.

        Args:
            read: with labels and losses, for every definition but ``stable``.
            whole: whether a sequence settles as one: with the last of its rows, or by their mean loss.

        Returns:
            ``(K, B, T)`` bool and ``(B, T)`` int64, the oracle depths; ``(K, B)`` and ``(B,)`` of whole sequences. A
            depth is 0 where nothing is asked, or (``right``) full depth is wrong.
        """
        asked = read.asked
        if self.definition in ("stable", "right"):
            labels = read.predictions[-1] if self.definition == "stable" else read.labels
            assert labels is not None
            good = (read.predictions == labels) | ~asked
            good = good.all(-1) if whole else good
            depths = oracles.from_then_on(good)
        else:
            assert read.losses is not None
            losses = read.losses
            losses = mean_of_asked(losses, asked) if whole else losses
            if self.definition == "eps-loss":
                assert self.epsilon is not None
                good = oracles.close(losses, self.epsilon)
                depths = oracles.first(good)
            else:
                depths = oracles.best_depths(losses)
        if self.definition != "eps-loss":
            good = _steps(read.predictions, depths) >= depths
        known = asked.any(-1) if whole else asked
        return good, depths.masked_fill(~known, 0)


def taught(oracle: Oracle, read: Readings, whole: bool = False) -> tuple[Tensor, Tensor]:
    """As :meth:`Oracle.settled`, for every row that halts: what is asked nothing has settled when *stable*."""
    settled, depths = oracle.settled(read, whole)
    if whole or not oracle.needs_labels:
        return settled, depths
    rest = read.present & ~read.asked
    others, final = Oracle().settled(replace(read, asked=read.present))
    return torch.where(rest, others, settled), torch.where(rest, final, depths)


def mean_of_asked(losses: Tensor, asked: Tensor) -> Tensor:
    """The mean loss of each sequence over the rows that are asked something, ``(K, B, T)`` to ``(K, B)``; 0 of none."""
    return losses.masked_fill(~asked, 0).sum(-1) / asked.sum(-1).clamp_min(1)


def _steps(recorded: Tensor, rows: Tensor) -> Tensor:
    """1 to K in the first dimension, to be compared with something of the rows."""
    return torch.arange(1, len(recorded) + 1, device=rows.device).view(-1, *[1] * rows.ndim)


def gain_cut(losses: Iterator[tuple[Tensor, Tensor]]) -> float:
    """The greatest gain such that 99% of all marginal gain is in rows and steps that gain more.

    Args:
        losses: ``(K, B, T)`` and which rows count, ``(B, T)`` bool, portion by portion.

    Returns:
        in nats; 0 where the smallest gains alone are more than 1%, or no further step saves anything.
    """
    found = [(one - one[-1])[:-1][:, asked].flatten() for one, asked in losses]
    gains = torch.cat(found).double() if found else torch.zeros(0, dtype=torch.float64)
    values, count = torch.unique(gains[gains > 0], return_counts=True)
    upto = (values * count).cumsum(0)  # of all gains that are no larger
    small = upto <= (1 - GAIN_KEPT) * upto[-1] if len(upto) else upto.bool()
    return float(values[small].max()) if bool(small.any()) else 0.0
