"""Live runs of a subject against its full depth: what each sequence lost, or each row and where it halted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from haltkit import timing
from haltkit.calibration.losses import Judged, Loss, lost
from haltkit.protocol import MOST, Granularity
from haltkit.setting import Setting
from haltkit.subject import Subject

__all__ = ["Live", "Ran", "Risk", "halts_together"]

Risk = Literal["disagreement", "loss-gap", "answer"]


def halts_together(granularity: Granularity) -> bool:
    """Whether whole batches halt: their sequences are not independent, so what halts as one counts as one unit."""
    return granularity in ("batch", "world")


class Seen(NamedTuple):
    """What is kept of a pass."""

    steps: Mapping[str, Tensor]
    judged: Judged

    @property
    def losses(self) -> Tensor:
        """Those that a subject always has."""
        assert self.judged.losses is not None
        return self.judged.losses


@dataclass(frozen=True)
class Ran:
    """A setting that was run on all samples, in so many seconds.

    Attributes:
        setting: what was run.
        seconds: of wall-clock time.
        steps: their mean by region.
        seen: what is known of each pass; empty in a summary.
    """

    setting: Setting
    seconds: float
    steps: Mapping[str, float]
    seen: Sequence[Seen]

    def summary(self) -> Ran:
        """The same without what was seen of each pass: many of them, kept between large temporaries, hold the heap."""
        return replace(self, seen=())


@dataclass(frozen=True)
class Live:
    """Runs settings on samples and says what they lost against full depth, or the labels. Make one with :meth:`of`.

    Attributes:
        subject: what is run.
        samples: what it is run on.
        risk: as in :func:`haltkit.comparison.certify.certify`.
        bound: the largest possible loss.
        full: the run at full depth.
    """

    subject: Subject
    samples: Sequence[Any]
    risk: Risk
    bound: float
    full: Ran

    @classmethod
    def of(cls, subject: Subject, samples: Sequence[Any], full_depth: int, risk: Risk, bound: float) -> Live:
        """Run full depth."""
        full = _run(subject, samples, Setting.of(full_depth, subject.regions))
        return cls(subject, samples, risk, bound, full)

    @property
    def loss(self) -> Loss:
        """What one sequence loses: the risk, of sequences that are right or wrong as a whole if they halt as one."""
        whole = self.risk == "disagreement" and self.subject.granularity == "sequence"
        return "disagreement-anywhere" if whole else self.risk

    def run(self, setting: Setting) -> Ran:
        """Run a setting on every sample."""
        return _run(self.subject, self.samples, setting)

    def unit(self, together: bool) -> str:
        """What one unit is: a sequence, or a batch where its sequences halt together."""
        return "batch" if together and any(len(seen.losses) > 1 for seen in self.full.seen) else "sequence"

    def ms(self, ran: Ran) -> float:
        """Wall-clock milliseconds per item of the subject."""
        return 1e3 * ran.seconds / sum(seen.losses.numel() for seen in self.full.seen)

    def by_unit(self, ran: Ran, together: bool) -> Tensor:
        """The loss of each sequence, or of each sample where its sequences halt together; in [0, bound]."""
        pairs = zip(ran.seen, self.full.seen, strict=True)
        each = (lost(self.loss, self.bound, seen.judged, full.judged) for seen, full in pairs)
        return torch.cat([one.mean(0, keepdim=True) if together else one for one in each]).cpu()

    def losses(self, ran: Ran, granularity: Granularity) -> NDArray[np.float64]:
        """What each row of each unit lost, ``(units, R)``.

        What halts as one is one row: a sample under ``batch``, a sequence under ``sequence``. Under ``token`` the rows
        are those that are asked something.

        Raises:
            ValueError: rows halt one by one, and sequences have different numbers of them.
        """
        if granularity != "token":
            return self.by_unit(ran, halts_together(granularity)).unsqueeze(1).numpy()
        each = [self._rows(*one) for one in zip(ran.seen, self.full.seen, strict=True)]
        if len(counts := sorted({rows.shape[1] for rows in each})) > 1:
            raise ValueError(
                f"sequences of {counts[0]} to {counts[-1]} rows halt row by row: thresholds by step need as many rows "
                "in each, or rows that halt as one; add granularity=sequence, or give sequences of one length"
            )
        return torch.cat(each).cpu().numpy()

    def steps(self, ran: Ran, granularity: Granularity) -> NDArray[np.int64]:
        """Where each row of each unit halted, ``(units, R)``, in the only region; padding never halts.

        Raises:
            ValueError: see :meth:`rows_of`.
        """
        every = [
            self.rows_of(number, steps, granularity)
            for number, (steps,) in enumerate(s.steps.values() for s in ran.seen)
        ]
        steps = torch.cat(every).cpu()
        return steps.masked_fill(steps == 0, MOST).numpy()

    def rows_of(self, number: int, values: Tensor, granularity: Granularity) -> Tensor:
        """From values of a sample's rows, ``(B, T)`` or ``(B,)``, to those of the rows of its units, ``(units, R)``.

        What halts as one has the largest of its values.

        Raises:
            ValueError: rows halt one by one, and the losses are not theirs.
        """
        values = values.reshape(len(values), -1)
        if granularity != "token":
            return values.amax(1, keepdim=True) if granularity == "sequence" else values.amax().reshape(1, 1)
        full, labels = self.full.seen[number], self.subject.labels
        shape = self._rows(full, full).shape
        if values.shape != shape and labels is not None:
            asked = labels(self.samples[number]).reshape(len(values), -1) >= 0
            if asked.shape == values.shape and bool((asked.sum(1) == shape[1]).all()):
                values = values[asked.to(values.device)].reshape(shape)
        if values.shape != shape:
            raise ValueError(
                f"{values.shape[1]} rows of a sequence halt one by one, and it has {shape[1]} losses: thresholds by "
                "step need a loss for each row that halts, or rows that halt as one; add granularity=sequence"
            )
        return values

    def _rows(self, seen: Seen, full: Seen) -> Tensor:
        """What each row lost, ``(B, R)`` in [0, bound]."""
        if self.risk == "disagreement":
            tops, known = seen.judged.tops, full.judged.tops
            assert tops is not None  # certify refuses a subject without logits
            assert known is not None
            return (tops != known).reshape(len(tops), -1).double()
        losses = seen.losses.double().reshape(len(seen.losses), -1)
        if self.risk == "loss-gap":
            losses = (losses - full.losses.double().reshape(losses.shape)).clamp(0.0, self.bound)
        return losses


def _run(subject: Subject, samples: Sequence[Any], setting: Setting) -> Ran:
    def all_samples() -> list[Seen]:
        kept = []
        with subject.using(setting) as run:
            for sample in samples:
                done = run(sample)
                kept.append(Seen(done.steps, subject.judged(done.output, sample)))
        return kept

    seconds, seen = timing.clock(all_samples)
    if setting.depth is not None:
        means = {name: float(steps) for name, steps in setting.depth.steps.items()}
    else:
        every = {name: torch.cat([one.steps[name].flatten() for one in seen]) for name in seen[0].steps}
        means = {name: float(steps.double().mean()) for name, steps in every.items()}
    return Ran(setting, seconds, means, seen)
