"""Does the promise hold, and is it worth something? 1,000 calibrations on a loop whose risk is known exactly.

    python examples/bench_calibration.py [--splits 1000]

The loop is synthetic. An instance is settled from step h on, with P(h) geometric at a pace of its sequence's own. Until
then the logarithm of its score is standard normal at every step, afterwards it is lower by 2. A policy halts it at the
first score below tau; halting before step h is wrong. So the risk of every tau and its mean steps follow from sums, and
each calibration can be held against the truth. The grid holds one tau whose risk is just above epsilon, where a
violation is likeliest. Two units: an instance, whose loss is 0 or 1, and a sequence of 32 instances of one pace, whose
loss is the share of its instances that halt too early.

Read the columns so: `violations` is the share of calibrations whose chosen tau has a true risk above epsilon; it may be
at most delta, plus three standard errors of the simulation. `saving` is the mean of steps saved by the chosen tau over
steps saved by the best tau in hindsight, and should be at least 0.7. Two rows show what goes wrong without the rules:
`plain`, the last tau with an observed risk of at most epsilon, and `tokens`, which counts the instances of a sequence
as if they were independent.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from haltkit.calibration import calibrate
from haltkit.calibration.conditional import NEVER, calibrate_by_step

DEPTH, LENGTH = 24, 32
PACES, SHARES = np.array([0.04, 0.5]), np.array([0.12, 0.88])  # of the geometric law: few sequences are hard
LEVELS = np.linspace(-4.0, 0.0, 41)  # ln tau, from the safest
DROP = 2.0
Floats = NDArray[np.float64]


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def depth_law() -> Floats:
    """P(h = 1..DEPTH), with what is deeper than full depth put there: nothing is lost by running to the end."""
    h = np.arange(1, DEPTH + 1)
    laws = np.array([p * (1 - p) ** (h - 1) for p in PACES])
    laws[:, -1] += 1 - laws.sum(1)
    law: Floats = SHARES @ laws
    return law


def truth(levels: Floats) -> tuple[Floats, Floats]:
    """By step from 1 to DEPTH, for thresholds by step: P(halts there) and P(halts there, and too early)."""
    law = depth_law()
    early = np.array([normal_cdf(level) for level in levels])
    late = np.array([normal_cdf(level + DROP) for level in levels])
    halts, wrong = np.zeros(DEPTH), np.zeros(DEPTH)
    for h, share in enumerate(law, 1):
        running = share
        for k in range(1, DEPTH):
            chance = early[k - 1] if k < h else late[k - 1]
            halts[k - 1] += running * chance
            wrong[k - 1] += running * chance * (k < h)
            running *= 1 - chance
        halts[DEPTH - 1] += running
    return halts, wrong


def draw(generator: np.random.Generator, sequences: int, length: int) -> tuple[Floats, NDArray[np.int64]]:
    """ln scores ``(sequences, length, DEPTH - 1)`` and settled steps ``(sequences, length)``."""
    pace = generator.choice(PACES, (sequences, 1), p=SHARES)
    h = np.minimum(generator.geometric(np.broadcast_to(pace, (sequences, length))), DEPTH)
    scores = generator.standard_normal((sequences, length, DEPTH - 1))
    scores -= DROP * (np.arange(1, DEPTH) >= h[..., None])
    return scores, h


def grid(epsilon: float) -> Floats:
    """The levels, with the one whose true risk is just above epsilon."""
    low, high = -8.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        above = truth(np.full(DEPTH, middle))[1].sum() > epsilon
        low, high = (low, middle) if above else (middle, high)
    return np.sort(np.append(LEVELS, high))


def too_early(scores: Floats, h: NDArray[np.int64], levels: Floats) -> Floats:
    """Whether each instance halts too early at each level: its least score before step h is below it."""
    before = np.where(np.arange(1, DEPTH) < h[..., None], scores, np.inf).min(-1)
    return (before[..., None] < levels).astype(np.float64)


@dataclass
class Row:
    name: str
    chosen: list[int | None]
    bounded: bool  # whether it promises a probability


def table(unit: str, units: int, epsilon: float, delta: float, rows: list[Row], risks: Floats, steps: Floats) -> None:
    saved = DEPTH - steps
    best = saved[risks <= epsilon].max()
    print(
        f"\nunit: {unit}; {units} units, epsilon {epsilon}, delta {delta}; best in hindsight: {DEPTH - best:.2f} steps"
    )
    print(f"{'method':34} {'violations':>10} {'allowed':>8} {'mean risk':>10} {'saving':>7} {'nothing':>8}")
    for row in rows:
        risk = np.array([0.0 if i is None else risks[i] for i in row.chosen])
        saving = np.array([0.0 if i is None else saved[i] for i in row.chosen]) / best
        allowed = delta + 3 * math.sqrt(delta * (1 - delta) / len(risk))
        nothing = np.mean([i is None for i in row.chosen])
        limit = f"{allowed:8.3f}" if row.bounded else "       -"
        broken = (risk > epsilon).mean()
        print(f"{row.name:34} {broken:10.3f} {limit} {risk.mean():10.4f} {saving.mean():7.3f} {nothing:8.3f}")


def plain(losses: Floats, epsilon: float) -> int | None:
    passed = np.flatnonzero(losses.mean(0) <= epsilon)
    return int(passed[-1]) if len(passed) else None


def marginal(splits: int, units: int, epsilon: float, delta: float, length: int) -> None:
    """All methods on the same draws."""
    levels = grid(epsilon)
    parts = [truth(np.full(DEPTH, level)) for level in levels]
    steps = np.array([(halts * np.arange(1, DEPTH + 1)).sum() for halts, _ in parts])
    risks = np.array([wrong.sum() for _, wrong in parts])
    certify: dict[str, tuple[bool, Callable[[Floats, Floats], int | None]]] = {}
    for method in ("binomial", "hoeffding-bentkus", "betting"):
        for correction in ("fixed-sequence", "holm", "bonferroni"):
            if (length == 1 or method != "binomial") and (correction == "fixed-sequence" or method == "betting"):
                certify[f"{method}, {correction}"] = (
                    True,
                    lambda losses, _, m=method, c=correction: (
                        calibrate(losses, epsilon=epsilon, delta=delta, method=m, correction=c).chosen
                    ),
                )
    certify["conformal (an expectation)"] = (
        False,
        lambda losses, _: calibrate(losses, epsilon=epsilon, method="conformal").chosen,
    )
    certify["plain (wrong)"] = (False, lambda losses, _: plain(losses, epsilon))
    if length > 1:
        certify["tokens (wrong)"] = (
            False,
            lambda _, tokens: calibrate(tokens, epsilon=epsilon, delta=delta, method="binomial").chosen,
        )
    rows = [Row(name, [], bounded) for name, (bounded, _) in certify.items()]
    for split in range(splits):
        tokens = too_early(*draw(np.random.default_rng((split, units, length)), units, length), levels)
        losses = tokens.mean(1)
        for row, (_, choose) in zip(rows, certify.values(), strict=True):
            row.chosen.append(choose(losses, tokens.reshape(-1, len(levels))))
    unit = "an instance" if length == 1 else f"a sequence of {length}"
    table(unit, units, epsilon, delta, rows, risks, steps)


def by_step(splits: int, units: int, epsilon: float, delta: float) -> None:
    """The risk among what halts by each step, for a threshold per step and for one threshold for all."""
    worst: dict[str, list[float]] = {"one threshold": [], "a threshold per step": []}
    saved: dict[str, list[float]] = {name: [] for name in worst}
    for split in range(splits):
        scores, h = draw(np.random.default_rng((split, units, 0)), units, 1)
        one = calibrate(too_early(scores, h, LEVELS)[:, 0], epsilon=epsilon, delta=delta, method="binomial").chosen
        wrong = (np.arange(1, DEPTH) < h).astype(np.float64)
        found = calibrate_by_step(scores[:, 0], wrong, LEVELS[::2], epsilon=epsilon, delta=delta, seed=split)
        levels = {
            "one threshold": np.full(DEPTH, NEVER if one is None else LEVELS[one]),
            "a threshold per step": np.array([NEVER if tau is None else tau for tau in (*found.thresholds, None)]),
        }
        for name, level in levels.items():
            halts, errors = (part[: DEPTH - 1].cumsum() for part in truth(level))
            worst[name].append(float((errors[halts > 0] / halts[halts > 0]).max(initial=0.0)))
            saved[name].append(DEPTH - float((truth(level)[0] * np.arange(1, DEPTH + 1)).sum()))
    allowed = delta + 3 * math.sqrt(delta * (1 - delta) / splits)
    print(f"\nthe risk among what halts by step t, for every t; {units} instances, epsilon {epsilon}, delta {delta}")
    print(f"{'':34} {'violations':>10} {'allowed':>8} {'worst risk':>10} {'steps saved':>12}")
    for name, risks in worst.items():
        limit = f"{allowed:8.3f}" if name != "one threshold" else "       -"
        broken = np.mean(np.array(risks) > epsilon)
        print(f"{name:34} {broken:10.3f} {limit} {np.mean(risks):10.4f} {np.mean(saved[name]):12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=1000)
    splits = parser.parse_args().splits
    start = time.perf_counter()
    marginal(splits, 500, 0.05, 0.1, 1)
    marginal(splits, 600, 0.02, 0.05, 1)
    marginal(splits, 300, 0.05, 0.1, LENGTH)
    by_step(max(1, splits // 5), 2000, 0.05, 0.1)
    print(f"\n{splits} calibrations each, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
