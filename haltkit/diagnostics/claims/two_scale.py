"""The claims of "Two-Scale Latent Dynamics for Recurrent-Depth Transformers" (arXiv 2509.23314, [P]) about the loop.

Those about policies are in :mod:`haltkit.diagnostics.claims.two_scale_policies`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from haltkit.diagnostics.claims.rules import (
    ABOVE_FLOOR,
    Answer,
    Claim,
    Measured,
    by_region,
    cannot_tell,
    judged,
    mean_over,
    moving,
    seen_snapshots,
)
from haltkit.diagnostics.diagnosis import Diagnosis
from haltkit.diagnostics.judgement import NO, UNKNOWN, YES
from haltkit.diagnostics.numbers import number
from haltkit.diagnostics.results import RegionGeometry, Survey

__all__ = ["CLAIMS"]

# [P] trains on 300M tokens; a claim about late training is not refuted before a tenth of that.
LATE_TOKENS = 30_000_000
# A trend over training needs four snapshots, and this rank correlation with tokens seen.
SNAPSHOTS, TREND = 4, 0.5


def _both(
    diagnosis: Diagnosis, measure: Callable[[RegionGeometry], Measured | None]
) -> tuple[dict[str, Measured], dict[str, Measured]]:
    """A number for every region, trained and untrained."""
    trained, untrained = (by_region(m.geometry.regions, measure) for m in (diagnosis.trained, diagnosis.untrained))
    return trained, untrained


def _rank_correlation(values: Sequence[float]) -> float:
    """Spearman's, with the order of the values; ties share a rank."""
    a = np.array([np.mean([*np.flatnonzero(np.sort(values) == v)]) for v in values])
    b = np.arange(len(values), dtype=float)
    if a.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _falls_over_training(
    diagnosis: Diagnosis, measure: Callable[[RegionGeometry], float | None], least: float
) -> Answer:
    """Whether a number falls by ``least`` from the first to the last snapshot, in every region, as a trend."""
    snapshots = seen_snapshots(diagnosis)
    if len(snapshots) < SNAPSHOTS:
        return cannot_tell(
            f"{len(snapshots)} checkpoints of one run are here, {SNAPSHOTS} are needed: give a run folder"
        )
    measured: dict[str, Measured] = {}
    falls = []
    for name in snapshots[-1].regions:
        series = [measure(one.regions[name]) for one in snapshots if name in one.regions]
        known = [v for v in series if v is not None and math.isfinite(v)]
        if len(known) < SNAPSHOTS:
            continue
        measured[f"{name} first"], measured[f"{name} last"] = Measured(known[0]), Measured(known[-1])
        falls.append(known[-1] < known[0] - least and _rank_correlation(known) <= -TREND)
    if not falls:
        return cannot_tell("the number is not defined at enough checkpoints")
    pairs = {name: measure(region) for name, region in diagnosis.untrained.geometry.regions.items()}
    untrained = {name: Measured(v) for name, v in pairs.items() if v is not None and math.isfinite(v)}
    return Answer(YES if all(falls) else NO, measured, untrained, f"falls in {sum(falls)} of {len(falls)} regions")


def _steps_shrink(diagnosis: Diagnosis) -> Answer:
    def ratio(region: RegionGeometry) -> Measured | None:
        norms = region.mean("step_norm")
        return Measured(norms[9] / norms[0]) if len(norms) >= 10 and norms[0] > 0 else None

    trained, untrained = _both(diagnosis, ratio)
    if not trained:
        return cannot_tell("fewer than ten loops were run")
    return judged(lambda ratios: max(ratios) <= 0.1, trained, untrained)


def _cosines_settle(diagnosis: Diagnosis) -> Answer:
    trained, untrained = _both(diagnosis, lambda region: mean_over(region, "cosine", moving(region, 4, 12)))
    if not trained:
        return cannot_tell("no step from 4 to 12 is above the float floor")
    answer = judged(lambda cosines: all(0.5 <= c <= 0.65 for c in cosines), trained, untrained)
    seen = diagnosis.tokens_seen
    if answer.ruling == NO and seen < LATE_TOKENS:
        reason = f"{seen / 1e6:.1f}M tokens are not late in training ({LATE_TOKENS / 1e6:.0f}M)"
        return replace(answer, ruling=UNKNOWN, reason=reason)
    return answer


def _absolute_cosine(region: RegionGeometry) -> float | None:
    found = mean_over(region, "cosine", moving(region, 4, 12))
    return None if found is None else abs(found.value)


def _more_orthogonal(diagnosis: Diagnosis) -> Answer:
    return _falls_over_training(diagnosis, _absolute_cosine, 0.05)


def _norms_plateau(diagnosis: Diagnosis) -> Answer:
    def over_floor(region: RegionGeometry) -> Measured | None:
        norms = region.mean("step_norm")
        return Measured(norms[-1] / region.floor) if len(norms) >= 24 and region.floor else None

    def course(region: RegionGeometry) -> str:
        norms = region.mean("step_norm")
        earlier = norms[len(norms) * 3 // 4 - 1]
        if min(norms[-1], earlier) <= ABOVE_FLOOR * number(region.floor):  # of rounding, no ratio says anything
            return "steps reach the float floor"
        if norms[-1] > 0.1 * norms[0]:
            return "steps are not small at the last loop"
        ratio = norms[-1] / earlier
        return f"steps still {'shrink' if ratio < 1 else 'grow'} at the last loop" if not 0.8 <= ratio <= 1.25 else ""

    trained, untrained = _both(diagnosis, over_floor)
    if not trained:
        return cannot_tell("fewer than 24 loops were run, or there is no float floor")
    courses = dict.fromkeys(course(diagnosis.trained.geometry.regions[name]) for name in trained)
    return judged(lambda _: set(courses) == {""}, trained, untrained, ", ".join(c for c in courses if c))


def _constant_curvature(diagnosis: Diagnosis) -> Answer:
    def variation(region: RegionGeometry) -> Measured | None:
        if "curvature" not in region.curves:
            return None
        steps = moving(region, 3, 32)
        values = np.array(region.mean("curvature"))[steps]
        if len(steps) < 5 or not np.isfinite(values).all() or not values.mean() > 0:
            return None
        return Measured(float(values.std() / values.mean()))

    trained, untrained = _both(diagnosis, variation)
    if not trained:
        return cannot_tell("fewer than five steps are above the float floor, or the path is straight")
    return judged(lambda variations: max(variations) <= 0.25, trained, untrained)


def _shrinking(region: RegionGeometry) -> float | None:
    norms = region.mean("step_norm")
    steps = moving(region, 2, 8)
    if len(steps) < 2:
        return None
    return float((norms[steps[-1]] / norms[steps[0]]) ** (1 / (steps[-1] - steps[0])))


def _faster_decay(diagnosis: Diagnosis) -> Answer:
    return _falls_over_training(diagnosis, _shrinking, 0.02)


def _angle_spread(region: RegionGeometry) -> float | None:
    steps = moving(region, 2, 8)
    spreads = np.array(region.std("cosine"))[steps]
    return float(spreads.mean()) if len(spreads) and np.isfinite(spreads).all() else None


def _steadier_angles(diagnosis: Diagnosis) -> Answer:
    return _falls_over_training(diagnosis, _angle_spread, 0.01)


def _large_dlr(convention: str) -> Callable[[Diagnosis], Answer]:
    def ratios(survey: Survey) -> dict[str, Measured]:
        geometry = survey.geometry
        broken = any(region.nonfinite for region in geometry.regions.values())
        found = {boundary: by[convention] for boundary, by in geometry.dlr.items() if convention in by}
        return {
            boundary: Measured(math.nan if broken else number(ratio.mean), None if broken else ratio.std)
            for boundary, ratio in found.items()
        }

    def test(diagnosis: Diagnosis) -> Answer:
        measured = ratios(diagnosis.trained)
        if not measured:
            return cannot_tell("there is no boundary between two regions, or this convention was not recorded")
        earlier = seen_snapshots(diagnosis)
        of_earlier = [number(by[convention].mean) for one in earlier for by in one.dlr.values() if convention in by]
        least = min([v.value for v in measured.values()] + of_earlier)
        where = f"least over {len(earlier)} checkpoints and this model {least:.2g}" if earlier else "this model only"
        return judged(lambda own: min(own + of_earlier) >= 2, measured, ratios(diagnosis.untrained), where)

    return test


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "P1",
        "[P]",
        "Steps shrink within 5-10 loops",
        "mean ‖d_10‖ / mean ‖d_1‖",
        "at most 0.1 in every region",
        _steps_shrink,
    ),
    Claim(
        "P2",
        "[P]",
        "Consecutive steps settle at a cosine of 0.5-0.65 late in training",
        "mean cos(d_k, d_{k-1}), k = 4..12 above 10 float floors",
        f"0.5-0.65 in every region; otherwise cannot tell below {LATE_TOKENS / 1e6:.0f}M tokens",
        _cosines_settle,
    ),
    Claim(
        "P3",
        "[P]",
        "Steps become more orthogonal over training",
        "abs of P2's cosine, first and last checkpoint",
        f"falls by 0.05 in every region with a rank correlation of at most -{TREND}",
        _more_orthogonal,
    ),
    Claim(
        "P4",
        "[P]",
        "Step norms plateau at a small value that is not zero",
        "mean ‖d_K‖ over the float floor",
        "over 10, at most 0.1 of ‖d_1‖ and 0.8 to 1.25 times the value a quarter earlier, in every region",
        _norms_plateau,
    ),
    Claim(
        "P5",
        "[P]",
        "Curvature is nearly constant (a spiral)",
        "coefficient of variation of the mean curvature over k >= 3 above 10 float floors",
        "at most 0.25 in every region; cannot tell of a straight path",
        _constant_curvature,
    ),
    Claim(
        "P6",
        "[P]",
        "Steps decay faster in later checkpoints",
        "factor by which mean ‖d_k‖ shrinks a step, k = 2..8",
        f"falls by 0.02 in every region with a rank correlation of at most -{TREND}",
        _faster_decay,
    ),
    Claim(
        "P7",
        "[P]",
        "Angles are steadier in later checkpoints",
        "spread of the cosine over tokens, k = 2..8",
        f"falls by 0.01 in every region with a rank correlation of at most -{TREND}",
        _steadier_angles,
    ),
    *(
        Claim(
            f"P8 {convention}",
            "[P]",
            f"DLR is well above 1 at every boundary ({convention})",
            f"mean DLR, convention '{convention}'",
            "at least 2 at every boundary and checkpoint",
            _large_dlr(convention),
        )
        for convention in ("noise", "injected", "net", "net without d_1")
    ),
)
