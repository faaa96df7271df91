"""How good a reasoner is, step by step: accuracy, agreement with full depth, and when rows settle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from haltkit.models.reasoner.model import LOOP, Reasoner
from haltkit.models.reasoner.task import Batch
from haltkit.protocol import HaltingPolicy
from haltkit.recording.recorder import Record, Recorder
from haltkit.recording.replay import scores
from haltkit.registry import record_of
from haltkit.specs import Spec, parse_spec

__all__ = [
    "Curve",
    "Halting",
    "curve",
    "fewest_steps",
    "frontier",
    "measure",
    "predictions",
    "settled_after",
    "steps_by_need",
]


@torch.no_grad()
def predictions(model: Reasoner, batch: Batch, steps: int, *, chunk: int = 64) -> Tensor:
    """Each row's class after every step, ``(steps, B, T)`` int64; ``chunk`` sequences at a time, none halting."""
    found = []
    for start in range(0, len(batch.inputs), chunk):
        e = model.embed(batch.inputs[start : start + chunk])
        x, seen = model.initial_state(e), []
        for _ in range(steps):
            x = model.step(x, e)
            seen.append(model.readout(x).argmax(-1))
        found.append(torch.stack(seen))
    return torch.cat(found, 1)


@torch.no_grad()
def steps_by_need(
    model: Reasoner, batch: Batch, policy: str | HaltingPolicy[Any], *, max_loops: int = 48, chunk: int = 64
) -> dict[int, tuple[float, float, float]]:
    """How many steps rows take, by how many they need: the mean, and the 10th and 90th percentile.

    Live, row by row; only rows that are asked something count.

    Args:
        model: in evaluation mode.
        batch: sequences whose ``needed`` says what their rows need.
        policy: judges rows.
        max_loops: budget of each row.
        chunk: sequences at a time.
    """
    taken = []
    for start in range(0, len(batch.inputs), chunk):
        out = model.forward_adaptive(batch.inputs[start : start + chunk], policy, max_loops=max_loops)
        taken.append(out.steps[LOOP])
    steps = torch.cat(taken)[batch.asked].double()
    needed = batch.needed[batch.asked]
    found = {}
    for need in sorted(set(needed.tolist())):
        of = steps[needed == need]
        low, high = torch.quantile(of, torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
        found[int(need)] = (float(of.mean()), low, high)
    return found


@dataclass(frozen=True)
class Curve:
    """Accuracy by steps; entry ``k - 1`` is after step ``k``.

    Attributes:
        rows: share of rows asked that are right.
        sequences: share of sequences all of whose rows are right (for sudoku: boards solved).
        agreement: share of rows asked whose class is that of the last step.
        sequences_agree: share of sequences all of whose rows agree with the last step.
    """

    rows: tuple[float, ...]
    sequences: tuple[float, ...]
    agreement: tuple[float, ...]
    sequences_agree: tuple[float, ...]


def curve(predicted: Tensor, batch: Batch, full: int | None = None) -> Curve:
    """Of :func:`predictions`, ``(K, B, T)``; ``full``: the step that agreement is with, None: the last."""
    asked = batch.asked
    right = (predicted == batch.labels) | ~asked
    same = (predicted == predicted[(full or len(predicted)) - 1]) | ~asked

    def by_row(flags: Tensor) -> tuple[float, ...]:
        return tuple(flags[:, asked].double().mean(1).tolist())

    def by_sequence(flags: Tensor) -> tuple[float, ...]:
        return tuple(flags.all(-1).double().mean(1).tolist())

    return Curve(by_row(right), by_sequence(right), by_row(same), by_sequence(same))


def settled_after(predicted: Tensor) -> Tensor:
    """The step from which on each row's class is its last one, ``(B, T)`` int64: an oracle's number of steps."""
    differs = predicted != predicted[-1]
    at = torch.arange(1, len(predicted) + 1, device=predicted.device).view(-1, *[1] * (predicted.ndim - 1))
    return (differs * at).amax(0) + 1


def fewest_steps(shares: Sequence[float], least: float) -> int | None:
    """The first number of steps from which on a share stays at least ``least``; None: it never does."""
    fewest = None
    for steps in range(len(shares), 0, -1):
        if shares[steps - 1] < least:
            break
        fewest = steps
    return fewest


@dataclass(frozen=True)
class Halting:
    """A policy at one threshold, judged on recorded states.

    Attributes:
        policy: its spec.
        steps: mean steps of rows asked.
        accuracy: share of rows asked that are right when they halt.
        agreement: share whose class then is the one at full depth.
        solved: share of sequences all of whose rows are right.
        sequences_agree: share of sequences all of whose rows agree with full depth.
    """

    policy: str
    steps: float
    accuracy: float
    agreement: float
    solved: float
    sequences_agree: float


@torch.no_grad()
def frontier(
    model: Reasoner, batch: Batch, specs: Sequence[str], full: int, *, granularity: str = "token", taus: int = 48
) -> dict[str, list[Halting]]:
    """Policies over thresholds, judged on one recording of ``full`` steps; each spec is given without its ``tau``.

    Live halting differs a little from this: a row that has halted shows others its last keys and values.

    Args:
        granularity: ``token``: each row halts for itself; ``sequence``: when its greatest score is below ``tau``.
        taus: thresholds tried, evenly spaced among the scores that there are.
    """
    recorder = Recorder(Record(max_bytes=2**34))
    model.forward_adaptive(batch.inputs, f"fixed:steps={full}", max_loops=full, observer=recorder)
    recorded = recorder.trajectory[LOOP]
    assert recorded.states is not None
    predicted = torch.stack([model.readout(x).argmax(-1) for x in recorded.states[1:]])  # (K, B, T)
    found: dict[str, list[Halting]] = {}
    for text in specs:
        spec = parse_spec(text)
        seen = scores(spec.with_key("tau", "1").build(), recorded, readout=model.readout).double()  # (K, B, T)
        written = spec.get("patience")
        patience = int(written) if written is not None else record_of(spec.name).patience
        if granularity == "sequence":
            seen = seen.amax(-1, keepdim=True).expand_as(seen)
        if patience > 1:
            hits = seen.unfold(0, patience, 1).amax(-1)
            seen = torch.cat([torch.full_like(seen[: patience - 1], torch.inf), hits])
        finite = seen[seen.isfinite() & (seen > 0)].sort().values
        tried = sorted(set(finite[torch.linspace(0, len(finite) - 1, taus).long()].tolist()))
        found[text] = [_halting(spec.with_key("tau", f"{tau:.4g}"), seen < tau, predicted, batch) for tau in tried]
    return found


def _halting(spec: Spec, hits: Tensor, predicted: Tensor, batch: Batch) -> Halting:
    """Of rows that halt at their first hit, ``(K, B, T)`` bool, or at the last step."""
    last = len(hits)
    at = torch.arange(1, last + 1).view(-1, 1, 1)
    steps = torch.where(hits, at, last).amin(0)  # (B, T)
    answers = predicted.gather(0, (steps - 1).unsqueeze(0))[0]
    asked = batch.asked
    right = answers == batch.labels
    return Halting(
        str(spec),
        float(steps[asked].double().mean()),
        float(right[asked].double().mean()),
        float((answers == predicted[-1])[asked].double().mean()),
        float((right | ~asked).all(-1).double().mean()),
        float(((answers == predicted[-1]) | ~asked).all(-1).double().mean()),
    )


POLICIES = ("norm", "kl", "accel")
LEVELS = (0.995, 0.999)


def measure(
    model: Reasoner,
    batch: Batch,
    trained: int,
    *,
    full: int | None = None,
    granularity: str = "token",
    recorded: int = 64,
) -> dict[str, Any]:
    """All that a model card says of one test set, as plain values.

    Args:
        trained: the most steps that training took; accuracy is followed to four times as many.
        full: the depth that agreement is with, at most four times ``trained``; None: ``trained``.
        granularity: of halting; with ``sequence`` agreement is that of whole sequences.
        recorded: sequences that policies are judged on.
    """
    asked, last, full = batch.asked, 4 * trained, full or trained
    predicted = predictions(model, batch, last)
    shares = curve(predicted, batch, full)
    at = [k for k in sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, trained, 2 * trained, 3 * trained, last}) if k <= last]
    best = max(shares.rows)
    found: dict[str, Any] = {
        "full_depth": full,
        "sequences": len(batch.inputs),
        "rows": int(asked.sum()),
        "accuracy": {str(k): round(shares.rows[k - 1], 5) for k in at},
        "whole_sequences": {str(k): round(shares.sequences[k - 1], 5) for k in at},
        "best": {"accuracy": round(best, 5), "steps": shares.rows.index(best) + 1},
        "lost_at_four_times": round(best - shares.rows[-1], 5),
        "oracle_steps": round(float(settled_after(predicted[:full])[asked].double().mean()), 3),
    }
    agreement = shares.sequences_agree if granularity == "sequence" else shares.agreement
    found["fixed"] = {
        str(level): {"steps": (k := fewest_steps(agreement[:full], level)), "accuracy": shares.rows[(k or 1) - 1]}
        for level in LEVELS
    }
    settled, right = settled_after(predicted[:full]), predicted[full - 1] == batch.labels
    found["by_needed"] = {
        str(needed): {
            "rows": int(of.sum()),
            "accuracy": round(float(right[of].double().mean()), 5),
            "settled_after": round(float(settled[of].double().mean()), 3),
        }
        for needed in sorted(set(batch.needed[asked].tolist()))
        for of in (asked & (batch.needed == needed),)
    }
    part = batch[:recorded]
    same = curve(predicted[:full, :recorded], part)
    goals = same.sequences if granularity == "sequence" else same.rows
    found["policies"] = {}
    for text, points in frontier(model, part, POLICIES, full, granularity=granularity).items():
        for level in LEVELS:
            enough = [
                point
                for point in points
                if (point.sequences_agree if granularity == "sequence" else point.agreement) >= level
            ]
            if enough:
                least = min(enough, key=lambda point: point.steps)
                goal = least.solved if granularity == "sequence" else least.accuracy
                # The least fixed depth that is as right on the same sequences; None: no depth is.
                as_right = next((k for k, share in enumerate(goals, 1) if share >= goal - 1e-12), None)
                found["policies"][f"{text} at {level}"] = {**asdict(least), "fixed_as_right": as_right}
    return found
