"""Certify a threshold for each step: what halts early is as safe as what halts late, on live runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from haltkit.calibration import Certificate
from haltkit.calibration.conditional import NEVER, Asked, propose
from haltkit.calibration.testing import fixed_sequence
from haltkit.comparison.live import Live, Ran, halts_together
from haltkit.comparison.settings import Candidate, Sweeps
from haltkit.comparison.thresholds import patience_of
from haltkit.protocol import Granularity, granularity_of
from haltkit.recording.replay import scores
from haltkit.setting import Setting
from haltkit.specs import Spec, packed
from haltkit.stepwise import StepTaus

__all__ = ["certify_by_step", "spec_by_step"]

GRID = 101  # thresholds that are tried at each step
DIGITS = 3  # of a threshold that is picked

Floats = NDArray[np.float64]


def spec_by_step(candidate: Candidate, sweeps: Sweeps) -> Spec:
    """The policy whose thresholds are to be found.

    Raises:
        ValueError: several regions, a combination, no ``tau``, or one that is given; or full depth is a single step.
    """
    regions = sweeps.subject.regions
    if sweeps.look.full_depth < 2:
        raise ValueError("full depth is one step, and nothing can halt before it: run more steps")
    if len(regions) > 1:
        raise ValueError(
            f"thresholds by step are for one region, and this model has {', '.join(regions)}: what halts early in one "
            "may halt late in another; use thresholds by region"
        )
    (part,) = sweeps.parts(candidate).values()
    if not isinstance(part, Spec) or part.parts or not part.open:
        raise ValueError(
            f"thresholds by step are found for a policy with an open tau, such as norm; {candidate.name!r} has none: "
            "give a policy without its tau"
        )
    return part


def certify_by_step(
    spec: Spec,
    sweeps: Sweeps,
    halves: tuple[Sequence[Any], Sequence[Any]],
    live_on: Callable[[Sequence[Any]], Live],
    asked: Asked,
    on_setting: Callable[[Setting], None],
) -> tuple[Certificate, Ran | None, Live]:
    """The first half proposes a threshold per step, the second half tests them from the last step down.

    The proposal uses scores of recordings at full depth and losses of runs at every fixed depth, which are those of
    halting there where units do not see each other. What is promised does not depend on that: each configuration of the
    test is run live, and its steps and losses are those of that run.

    Args:
        spec: of :func:`spec_by_step`.
        sweeps: on the subject.
        halves: samples that propose, and samples that test.
        live_on: runs full depth on samples.
        asked: what is to be promised.
        on_setting: told of every setting before it is run.

    Returns:
        the certificate, the last run that passed, and what ran it.

    Raises:
        ValueError: rows that halt one by one have no losses of their own, or are not as many in each sequence; or
            losses that the method does not fit.
    """
    regions, full_depth = sweeps.subject.regions, sweeps.look.full_depth
    granularity = granularity_of(spec.with_key("tau", "1").build())

    def run(live: Live, setting: Setting) -> Ran:
        on_setting(setting)
        return live.run(setting)

    first = live_on(halves[0])
    first.losses(first.full, granularity)  # refuses before anything else is run
    seen = _scores(spec, sweeps, first, granularity)
    depths = [Setting.of(depth, regions) for depth in range(1, full_depth)]
    lost = np.stack([first.losses(run(first, depth), granularity) for depth in depths], -1)
    proposed = propose(seen, lost, _grid(seen, sweeps.taus), asked)

    second = live_on(halves[1])
    asked = replace(
        asked,
        unit=second.unit(halts_together(granularity)),
        loss=second.risk if granularity == "token" else second.loss,
    )
    units = np.random.default_rng(asked.seed).permutation(len(second.losses(second.full, granularity)))
    tested: list[tuple[Ran, NDArray[np.int64], Floats, float]] = []

    def tests() -> Iterator[float]:
        for start in range(full_depth - 1, 0, -1):
            if proposed[start - 1] > NEVER:  # elsewhere nothing new can halt
                policy = spec.with_key("tau_by_step", _from_step(proposed, start, patience_of(spec))).build()
                ran = run(second, Setting.of(policy, regions).named(str(spec)))
                steps, losses = second.steps(ran, granularity)[units], second.losses(ran, granularity)[units]
                tested.append((ran.summary(), steps, losses, asked.worst(steps, losses, start, full_depth)))
                yield tested[-1][3]

    passed = fixed_sequence(tests(), asked.delta)
    labels = [packed(ran.setting.policies)[0] for ran, *_ in tested] or [str(second.full.setting.text)]
    if not tested:
        full = second.losses(second.full, granularity)
        return asked.certificate(labels, 0, np.full(full.shape, full_depth), full, 1.0, full_depth - 1), None, second
    ran, steps, losses, worst = tested[max(passed, 1) - 1]
    certificate = asked.certificate(labels, passed, steps, losses, worst, full_depth - 1)
    return certificate, ran if passed else None, second


def _from_step(proposed: Floats, start: int, patience: int) -> StepTaus:
    """The proposal from step ``start`` on.

    A score counts for the halt at its own step and, with patience p, at the p - 1 steps after it, so its threshold is
    the largest of theirs.
    """
    taus = np.where(np.arange(1, len(proposed) + 1) >= start, np.maximum(proposed, 0.0), 0.0)
    return StepTaus.of_steps([float(taus[step : step + patience].max()) for step in range(len(taus))])


def _scores(spec: Spec, sweeps: Sweeps, live: Live, granularity: Granularity) -> Floats:
    """What decides whether each row of each unit halts at each step before the last, ``(units, R, K - 1)``.

    With patience p that is the largest of the last p scores; infinite at steps where ``min_steps`` and ``check_every``
    let nothing halt.
    """
    judge, patience = spec.with_key("tau", "1").build(), patience_of(spec)
    first, every = int(spec.get("min_steps") or 0), int(spec.get("check_every") or 1)
    barred = torch.tensor([k < first or k % every > 0 for k in range(1, sweeps.look.full_depth)])
    (name,) = sweeps.subject.regions
    found = []
    for number, sample in enumerate(live.samples):
        region = sweeps.subject.record(sweeps.subject.inputs(sample), sweeps.look.full_depth).regions[name]
        seen = scores(judge, region, readout=sweeps.readout)
        if granularity == "token":
            seen = seen.masked_fill(~region.present, torch.inf)  # padding never halts
        last = (
            torch.cat([seen.new_full((patience - 1, *seen.shape[1:]), torch.inf), seen]).unfold(0, patience, 1).amax(-1)
        )
        rows = torch.stack([live.rows_of(number, one, granularity) for one in last[:-1]], -1)
        found.append(rows.masked_fill(barred.to(rows.device), torch.inf))
    return torch.cat(found).double().cpu().numpy()


def _grid(seen: Floats, taus: str | Sequence[float]) -> Floats:
    """Thresholds to choose from, ascending: those that were asked for, or quantiles of the scores, rounded up."""
    if not isinstance(taus, str):
        return np.sort(np.asarray(taus, dtype=np.float64))
    usable = seen[np.isfinite(seen) & (seen > 0)]
    if not len(usable):
        return np.zeros(0)
    picked = np.quantile(usable, np.linspace(0, 1, GRID))
    digit = 10.0 ** (np.floor(np.log10(picked)) - DIGITS + 1)
    return np.unique([float(f"{tau:.{DIGITS - 1}e}") for tau in np.ceil(picked / digit) * digit])
