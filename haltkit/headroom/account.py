"""Headroom: what an oracle's depths save against the best fixed depth of the same quality."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from haltkit.headroom import oracles
from haltkit.headroom.clusters import ClusteredMean, sequence_of_rows
from haltkit.headroom.oracles import Definition

__all__ = ["Headroom", "HeadroomAccount"]


@dataclass(frozen=True)
class Headroom:
    """What was found in one region by one definition of the oracle.

    Attributes:
        region: its name.
        definition: of the oracle: ``stable``, ``eps-loss``, ``right`` or ``best``.
        sequences: how many were seen.
        rows: how many have an oracle depth.
        undefined: how many have none (``right``: full depth is wrong there). Nothing else counts them.
        histogram: ``histogram[k - 1]`` rows have depth k.
        quality: ``quality[k - 1]`` is the share of rows that could be stopped at step k without loss: those that agree
            with full depth, whose loss is close, that are right. For ``best``: those whose least loss comes there.
        losses: the mean loss at each step, if losses were given; empty otherwise.
        oracle_loss: the mean loss where the oracle halts, if losses were given.
        mean_depth: of the oracle.
        error: the standard error of ``mean_depth``, clustered by sequence; None with fewer than two sequences.
    """

    region: str
    definition: Definition
    sequences: int
    rows: int
    undefined: int
    histogram: tuple[int, ...]
    quality: tuple[float, ...]
    losses: tuple[float, ...]
    oracle_loss: float | None
    mean_depth: float
    error: float | None

    @property
    def full_depth(self) -> int:
        """K, the steps of full depth."""
        return len(self.histogram)

    def fixed_depth(self, level: float = 0.99) -> int:
        """The best fixed depth of the oracle's quality: the least at which a share ``level`` of rows loses nothing.

        A row that is settled at k and unsettled later counts where it is, so this is the depth's real quality. For
        ``best`` no fixed depth has the oracle's loss; the one of the least mean loss stands for it, whatever the level.

        Raises:
            ValueError: level outside (0, 1].
        """
        if not 0 < level <= 1:
            raise ValueError(f"level={level} is outside (0, 1]: it is a share of rows")
        if self.definition == "best":
            return self.losses.index(min(self.losses)) + 1
        return next(k for k, share in enumerate(self.quality, 1) if share >= level)

    def headroom(self, level: float = 0.99) -> float:
        """``1 - mean oracle depth / best fixed depth``: the share of steps that perfect halting saves.

        The oracle loses nothing on any row, the fixed depth on a share ``1 - level``, so this errs to the low side.
        Negative where the fixed depth is the better deal.
        """
        return 1 - self.mean_depth / self.fixed_depth(level)

    def ceiling(self, level: float = 0.99, lag: int = 0, overhead: float = 0.0) -> float:
        """How many times as fast as the best fixed depth a policy can be that halts ``lag`` steps after the oracle.

        Args:
            lag: steps between a row's settling and its halt: 1 for a rule that compares two steps, 2 with patience 2.
            overhead: the cost of deciding, as a share of a step.

        Returns:
            fixed depth over the mean of ``min(depth + lag, K) * (1 + overhead)``; 1 or less means halting cannot pay.
        """
        late = sum(min(k + lag, self.full_depth) * rows for k, rows in enumerate(self.histogram, 1)) / self.rows
        return self.fixed_depth(level) / (late * (1 + overhead))

    def to_json(self) -> str:
        """As JSON; :meth:`from_json` gives it back exactly."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Headroom:
        """What :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, or other fields.
        """
        try:
            found = dict(json.loads(text))
            lists = {name: tuple(found[name]) for name in ("histogram", "quality", "losses")}
            return cls(**{**found, **lists})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"this is not a saved headroom: {error}") from None


class HeadroomAccount:
    """Adds up oracle depths over text that comes in portions; what it keeps grows with K only.

    ::

        account = HeadroomAccount(steps=32, definition="stable")
        for predictions in recorded:          # (32, B, T)
            account.add(predictions=predictions)
        account.result().headroom(0.99)

    Args:
        steps: K, at which everything is recorded.
        definition: of the oracle.
        region: its name, for the record.
        epsilon: of ``eps-loss``, in the loss' unit.
        item_dims: trailing dimensions of predictions that make one answer together: 1 for the cells of a board.
    """

    def __init__(
        self,
        steps: int,
        definition: Definition = "stable",
        *,
        region: str = "loop",
        epsilon: float = 0.01,
        item_dims: int = 0,
    ) -> None:
        if definition not in get_args(Definition):
            raise ValueError(f"definition={definition!r}: allowed are {', '.join(get_args(Definition))}")
        if steps < 1 or not epsilon >= 0:
            raise ValueError(f"steps={steps}, epsilon={epsilon}: at least one step, and epsilon of at least 0")
        self.steps, self.definition, self.region = steps, definition, region
        self._epsilon, self._item_dims = epsilon, item_dims
        self._histogram = torch.zeros(steps + 1, dtype=torch.int64)
        self._good = torch.zeros(steps, dtype=torch.int64)
        self._depths = ClusteredMean()
        self._losses: Tensor | None = None
        self._oracle_loss = 0.0

    def add(
        self,
        *,
        predictions: Tensor | None = None,
        losses: Tensor | None = None,
        labels: Tensor | None = None,
        sequence: Tensor | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """Add a portion that contains only whole sequences.

        Args:
            predictions: top predictions, ``(K, rows..., item...)``; for ``stable`` and ``right``.
            losses: ``(K, rows...)``; for ``eps-loss`` and ``best``.
            labels: ``(rows..., item...)``; for ``right``.
            sequence: which sequence each row belongs to, ``(rows...)``; the leading dimension's index if not given.
            present: rows that count, ``(rows...)`` bool: False for padding.

        Returns:
            the oracle depths, ``(rows...)``; 0 where there is none.

        Raises:
            ValueError: what the definition needs is missing, or shapes that do not fit.
        """
        depths, good = self.judge(predictions, losses, labels)
        if len(good) != self.steps or (losses is not None and losses.shape != good.shape):
            raise ValueError(f"recorded arrays {tuple(good.shape)}: {self.steps} steps of the same rows are expected")
        if present is not None and present.shape != depths.shape:
            raise ValueError(f"a mask {tuple(present.shape)} for rows {tuple(depths.shape)}")
        if self._depths.count and (losses is None) != (self._losses is None):
            raise ValueError("losses for some portions and not for others: give them always or never")
        index = sequence_of_rows(depths.shape, sequence)
        counts = torch.ones_like(depths, dtype=torch.bool) if present is None else present
        chosen = (counts & (depths > 0)).flatten()
        flat = depths.flatten()
        if losses is not None:
            kept = losses.detach().flatten(1)[:, chosen].double()
            if not bool(kept.isfinite().all()):
                raise ValueError("a recorded loss is not finite: exclude rows whose loop diverged, with present=")
            total = kept.sum(1).cpu()
            self._losses = total if self._losses is None else self._losses + total
            self._oracle_loss += float(kept.gather(0, flat[chosen].unsqueeze(0) - 1).sum())
        self._histogram += torch.bincount(flat[counts.flatten()].cpu(), minlength=self.steps + 1)
        self._good += good.flatten(1)[:, chosen].sum(1).cpu()
        self._depths.add(flat[chosen].cpu(), index.cpu()[chosen.cpu()])
        return depths

    def judge(
        self, predictions: Tensor | None = None, losses: Tensor | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Oracle depths, ``(rows...)``, and whether each step would have done, ``(K, rows...)``, without adding them.

        Args and errors are those of :meth:`add`.
        """
        if self.definition in ("stable", "right"):
            if predictions is None:
                raise ValueError(f"the {self.definition} oracle needs predictions, recorded at every step")
            if self.definition == "stable":
                good = oracles.agrees(predictions, self._item_dims)
            elif labels is None:
                raise ValueError("the right oracle needs labels, and these data have none: use stable or eps-loss")
            else:
                good = oracles.right(predictions, labels, self._item_dims)
            return oracles.from_then_on(good), good
        if losses is None:
            raise ValueError(f"the {self.definition} oracle needs losses, recorded at every step")
        if self.definition == "eps-loss":
            good = oracles.close(losses, self._epsilon)
            return oracles.first(good), good
        depths = oracles.best_depths(losses)
        steps = torch.arange(1, len(losses) + 1, device=losses.device)
        return depths, depths == steps.view(-1, *[1] * depths.ndim)

    def result(self) -> Headroom:
        """What was found so far.

        Raises:
            ValueError: no row has an oracle depth.
        """
        rows = self._depths.count
        if not rows:
            raise ValueError("no row has an oracle depth: nothing was added, or full depth is right nowhere")
        known = self._losses is not None
        return Headroom(
            region=self.region,
            definition=self.definition,
            sequences=self._depths.clusters,
            rows=rows,
            undefined=int(self._histogram[0]),
            histogram=tuple(self._histogram[1:].tolist()),
            quality=tuple((self._good.double() / rows).tolist()),
            losses=tuple((self._losses / rows).tolist()) if self._losses is not None else (),
            oracle_loss=self._oracle_loss / rows if known else None,
            mean_depth=self._depths.mean,
            error=self._depths.error if self._depths.clusters > 1 else None,
        )
