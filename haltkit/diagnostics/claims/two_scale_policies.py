"""The claims of [P] (arXiv 2509.23314) about policies, judged on a comparison made beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from haltkit.comparison import Row
from haltkit.diagnostics.claims.rules import Answer, Claim, Measured, cannot_tell
from haltkit.diagnostics.diagnosis import Diagnosis
from haltkit.diagnostics.judgement import NO, UNKNOWN, YES

__all__ = ["CLAIMS"]

# "Flat" quality, in nats: the level that haltkit compare uses.
FLAT = 0.01
COMPARE = "haltkit compare, at thresholds 1e-5 .. 1e-2"


def _rows(diagnosis: Diagnosis, policy: str) -> list[Row]:
    """A policy's rows at the paper's thresholds, ascending."""
    rows = () if diagnosis.comparison is None else diagnosis.comparison.rows
    own = [(r.tau, r) for r in rows if r.policy == policy and r.tau is not None and 0.99e-5 < r.tau < 1.01e-2]
    return [row for _, row in sorted(own, key=lambda pair: pair[0])]


def _missing_sweep(diagnosis: Diagnosis, *policies: str) -> str | None:
    for policy in policies:
        if len(_rows(diagnosis, policy)) < 2:
            return f"no sweep of {policy} over the paper's thresholds: run haltkit compare with --json DIR/compare.json"
    return None


def _spread(rows: Sequence[Row]) -> float:
    return max(row.loss for row in rows) - min(row.loss for row in rows)


def _ratios(row: Row, other: Row) -> list[float]:
    """Time of one setting over another's, one ratio per repeat: repeats of a comparison ran side by side."""
    pairs = zip(*(r.ms_repeats or (r.ms,) for r in (row, other)), strict=False)
    return [own / others for own, others in pairs]


def _timed(ratios: Sequence[float], least: float, good: bool, measured: dict[str, Measured]) -> Answer:
    """Reproduced if ``good`` and every repeat says that a ratio of times is ``least`` or more; not if every one denies.

    Repeats that disagree tell of the machine, not of the policy.
    """
    if not good or max(ratios) < least:
        return Answer(NO, measured)
    if min(ratios) >= least:
        return Answer(YES, measured)
    return Answer(UNKNOWN, measured, {}, "the repeats' times disagree: compare again on an idle machine")


def _acceleration_faster(diagnosis: Diagnosis) -> Answer:
    if (missing := _missing_sweep(diagnosis, "accel")) is not None:
        return cannot_tell(missing)
    rows = _rows(diagnosis, "accel")
    ratios, spread = _ratios(rows[0], rows[-1]), _spread(rows)
    measured = {"time at 1e-5 over 1e-2": Measured(float(np.median(ratios))), "spread of CE": Measured(spread)}
    return _timed(ratios, 1.3, spread <= FLAT, measured)


def _kl_slow(diagnosis: Diagnosis) -> Answer:
    if (missing := _missing_sweep(diagnosis, "accel", "kl")) is not None:
        return cannot_tell(missing)
    kl, accel = _rows(diagnosis, "kl"), _rows(diagnosis, "accel")
    pairs = [_ratios(k, a) for k in kl for a in accel if k.tau == a.tau]
    if not pairs:
        return cannot_tell("kl and accel share no threshold")
    medians = [float(np.median(ratios)) for ratios in pairs]
    measured = {"time, kl over accel, least": Measured(min(medians)), "spread of CE": Measured(_spread(kl))}
    faster = any(max(ratios) < 1 for ratios in pairs)  # at one threshold, for sure
    return _timed([r for ratios in pairs for r in ratios], 1.0, not faster and _spread(kl) <= FLAT, measured)


def _norm_degrades(diagnosis: Diagnosis) -> Answer:
    if (missing := _missing_sweep(diagnosis, "norm")) is not None:
        return cannot_tell(missing)
    first, *others = _rows(diagnosis, "norm")
    loss = {f"CE at {row.tau:g} over {first.tau:g}": Measured(row.loss - first.loss) for row in others}
    return Answer(YES if list(loss.values())[-1].value >= FLAT else NO, loss)


def _less_tuning(diagnosis: Diagnosis) -> Answer:
    if (missing := _missing_sweep(diagnosis, "accel", "norm", "kl")) is not None:
        return cannot_tell(missing)
    spreads = {name: Measured(_spread(_rows(diagnosis, name))) for name in ("accel", "norm", "kl")}
    if max(v.value for v in spreads.values()) <= 0.001:
        return Answer(UNKNOWN, spreads, {}, "every policy is flat over this sweep: nothing needs tuning")
    best = min(spreads["norm"].value, spreads["kl"].value)
    return Answer(YES if spreads["accel"].value < best - 0.001 else NO, spreads)


def _kl_costs_more(diagnosis: Diagnosis) -> Answer:
    if (missing := _missing_sweep(diagnosis, "accel", "kl")) is not None:
        return cannot_tell(missing)

    def per_step(policy: str, repeat: int | None) -> float:
        times = [
            (row.ms if repeat is None else row.ms_repeats[repeat], sum(row.steps.values()))
            for row in _rows(diagnosis, policy)
        ]
        return float(np.median([ms / steps for ms, steps in times]))

    repeats = min(len(row.ms_repeats) for name in ("accel", "kl") for row in _rows(diagnosis, name))
    rounds: list[int | None] = list(range(repeats)) if repeats else [None]
    ratios = [per_step("kl", i) / per_step("accel", i) for i in rounds]
    return _timed(ratios, 1.2, True, {name: Measured(per_step(name, None)) for name in ("accel", "kl")})


def _gain(diagnosis: Diagnosis) -> Answer:
    missing = _missing_sweep(diagnosis, "accel", "norm", "kl")
    if diagnosis.comparison is None or missing is not None:
        return cannot_tell(missing or "there is no comparison")
    fastest: dict[str, Row] = {}
    for row in diagnosis.comparison.rows[1:]:
        if row.oracle:  # nobody can pick it, so it is no other policy
            continue
        if row.delta + 2 * row.delta_se <= FLAT and (row.policy not in fastest or row.ms < fastest[row.policy].ms):
            fastest[row.policy] = row
    others = [row for name, row in fastest.items() if name not in ("accel", "fixed")]
    if "accel" not in fastest or not others:
        return cannot_tell(f"no setting is surely within {FLAT} nats on so few tokens")
    other = min(others, key=lambda row: row.ms)
    ratios = _ratios(other, fastest["accel"])
    measured = {"time saved against the best other policy": Measured(1 - 1 / float(np.median(ratios)))}
    if "fixed" in fastest:
        against = _ratios(fastest["fixed"], fastest["accel"])
        measured["against the best fixed depth"] = Measured(1 - 1 / float(np.median(against)))
    return _timed(ratios, 1 / 0.9, True, measured)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "P9",
        "[P]",
        "Acceleration: 580 to 360 ms a token from tau 1e-5 to 1e-2, quality flat",
        COMPARE,
        f"time falls by a factor of 1.3 in every repeat, and CE varies by at most {FLAT} nats",
        _acceleration_faster,
    ),
    Claim(
        "P10",
        "[P]",
        "KL is flat but slow",
        COMPARE,
        f"slower than accel at every threshold and repeat, and CE varies by at most {FLAT} nats",
        _kl_slow,
    ),
    Claim(
        "P11",
        "[P]",
        "Step norm loses quality past 1e-3, sharply at 1e-2",
        COMPARE,
        f"CE at 1e-2 is {FLAT} nats above that at 1e-5",
        _norm_degrades,
    ),
    Claim(
        "P12",
        "[P]",
        "Acceleration needs less threshold tuning",
        "spread of CE over the same thresholds (nats)",
        "accel's is below the others' by 0.001; cannot tell if all are at most 0.001",
        _less_tuning,
    ),
    Claim(
        "P13",
        "[P]",
        "A step of acceleration costs O(d), one of KL O(V)",
        "ms a token and loop step",
        "kl at least 1.2 times accel in every repeat",
        _kl_costs_more,
    ),
    Claim(
        "P14",
        "[P]",
        "Acceleration saves 10-20%",
        "time of the fastest setting within 0.01 nats",
        "at least 10% less than the best other policy's in every repeat",
        _gain,
    ),
)
