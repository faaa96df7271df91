"""The claims of "A Mechanistic Analysis of Looped Reasoning Language Models" (arXiv 2604.11791, [M])."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from haltkit.diagnostics.claims.rules import Answer, Claim, Measured, cannot_tell, judged
from haltkit.diagnostics.diagnosis import Diagnosis
from haltkit.diagnostics.judgement import NO, UNKNOWN, YES
from haltkit.diagnostics.numbers import Numbers, number, numbers
from haltkit.diagnostics.results import Cell, RegionAttention, RegionLimits, Survey
from haltkit.diagnostics.stages import StageMatch, match_stages

__all__ = ["CLAIMS"]

# [M]'s small models saw 3.7B tokens; a model of fewer than this is too young to be spoken of beside them.
CYCLE_TOKENS = 2_000_000
SETTING = f"one region of >= 4 layers and {CYCLE_TOKENS / 1e6:.0f}M tokens"
AXES: tuple[Callable[[Cell], Any], ...] = (lambda c: c.norm, lambda c: c.injection, lambda c: c.layers)
AXIS_NAMES = ("norm", "injection", "layers")
NO_GRID = "the grid of untrained models was not run to its end: give --grid"
# [M]'s placements: pre-norm, Huginn's (residual) and Ouro's (branch+state).
SETTLE = ("pre, every_step", "residual, every_step", "pre, never")
WANDER = ("branch+state, every_step", "residual, never", "branch+state, never")


def _too_young(seen: float, who: str = "the model") -> str | None:
    """Why a model cannot speak for or against [M]'s trained ones, if it cannot."""
    if not seen:
        return f"how long {who} was trained is not known: {CYCLE_TOKENS / 1e6:.0f}M tokens are needed"
    if seen < CYCLE_TOKENS:
        return f"{who} has seen {seen / 1e6:.2g}M tokens, {CYCLE_TOKENS / 1e6:.0f}M are needed"
    return None


# --- trained models


def _cycle_region(survey: Survey, regions: Mapping[str, RegionLimits] | Mapping[str, RegionAttention]) -> str | None:
    """The region in [M]'s setting: the model's only one, of four or more layers seen in this part of the results."""
    alone = len(survey.geometry.regions or regions) == 1
    return next((name for name, region in regions.items() if alone and len(region.layers) >= 4), None)


def _other_setting(regions: Mapping[str, RegionLimits] | Mapping[str, RegionAttention], absent: str) -> str:
    if not regions:
        return absent
    shape = ", ".join(f"{name}: {max(1, len(region.layers))}" for name, region in regions.items())
    return f"[M] is about one region of four or more layers; layers by region here are {shape}"


def _fixed_share(counts: Mapping[str, int]) -> float:
    total = sum(counts.values())
    return counts.get("fixed point", 0) / total if total else math.nan


def _cycle_values(regions: Mapping[str, RegionLimits]) -> dict[str, Measured]:
    values = {}
    for name, region in regions.items():
        share = math.nan if region.nonfinite else _fixed_share(region.limits["cosine"])
        values[f"{name} at a fixed point"] = Measured(share)
        if region.least_cosine is not None:
            cosine = region.least_cosine
            values[f"{name} least cosine between layers"] = Measured(number(cosine.mean), cosine.std)
            values[f"{name} with distinct fixed points"] = Measured(number(region.distinct))
    return values


def _cyclic_fixed_points(diagnosis: Diagnosis) -> Answer:
    regions = diagnosis.trained.limits.regions
    everywhere, untrained = _cycle_values(regions), _cycle_values(diagnosis.untrained.limits.regions)
    name = _cycle_region(diagnosis.trained, regions)
    if name is None:
        reason = _other_setting(regions, "no long run (128 loops) was made")
        return Answer(UNKNOWN, everywhere, untrained, reason)
    if (young := _too_young(diagnosis.tokens_seen)) is not None:
        return Answer(UNKNOWN, everywhere, untrained, young)
    shares = [_fixed_share(counts) for counts in regions[name].layer_limits.values()]
    return judged(lambda _: min(*shares, number(regions[name].distinct)) >= 0.95, everywhere, untrained)


def _attention_settles(diagnosis: Diagnosis) -> Answer:
    def ratio(rows: Sequence[Numbers]) -> float | None:
        changes = np.array([numbers(row) for row in rows])  # (steps - 1, layers)
        return float((changes[7] / changes[0]).max()) if len(changes) >= 8 and (changes[0] > 0).all() else None

    def values(survey: Survey, rows: Callable[[RegionAttention], Sequence[Numbers]]) -> dict[str, Measured]:
        pairs = {name: ratio(rows(region)) for name, region in survey.attention.regions.items()}
        return {name: Measured(found) for name, found in pairs.items() if found is not None}

    def shown(survey: Survey) -> dict[str, Measured]:
        states = values(survey, lambda region: region.moved)
        attention = values(survey, lambda region: region.successive)
        return attention | {f"{name}, states": value for name, value in states.items()}

    regions = diagnosis.trained.attention.regions
    attention = values(diagnosis.trained, lambda region: region.successive)
    measured, untrained = shown(diagnosis.trained), shown(diagnosis.untrained)
    if not attention:
        return cannot_tell("attention was not seen, or over fewer than nine steps")
    if _cycle_region(diagnosis.trained, regions) is None:
        return Answer(UNKNOWN, measured, untrained, _other_setting(regions, "attention was not seen"))
    if (young := _too_young(diagnosis.tokens_seen)) is not None:
        return Answer(UNKNOWN, measured, untrained, young)
    return judged(lambda _: max(v.value for v in attention.values()) <= 0.1, measured, untrained)


def _stages_repeat(diagnosis: Diagnosis) -> Answer:
    control, regions = diagnosis.control, diagnosis.trained.attention.regions
    name = _cycle_region(diagnosis.trained, regions)
    if name is None:
        return cannot_tell(_other_setting(regions, "attention was not seen"))
    if control is None or not control.profiles:
        return cannot_tell("there is no feed-forward control of the same data: train small-control and give --control")
    flow = numbers(control.profiles["concentration"])

    def stages(survey: Survey) -> list[StageMatch]:
        region = survey.attention.regions.get(name)
        rows = () if region is None else region.profiles.get("concentration", ())
        return [match_stages(numbers(row), flow) for row in rows]

    # Once the loop has converged a pass is the last one again: not each counts, but the first and a typical one.
    def chosen(matches: list[StageMatch]) -> dict[str, StageMatch]:
        if not matches:
            return {}
        return {"first pass": matches[0], "median pass": sorted(matches, key=_by_correlation)[(len(matches) - 1) // 2]}

    def values(matches: Mapping[str, StageMatch]) -> dict[str, Measured]:
        shown = {}
        for which, match in matches.items():
            shown[which] = Measured(match.correlation)
            shown[f"{which}, 95% of shuffled"] = Measured(match.shuffled_high)
        return shown

    trained = chosen(stages(diagnosis.trained))
    measured, untrained = values(trained), values(chosen(stages(diagnosis.untrained)))
    for seen, who in ((diagnosis.tokens_seen, "the model"), (control.tokens_seen or 0, "the control")):
        if (young := _too_young(seen, who)) is not None:
            return Answer(UNKNOWN, measured, untrained, young)
    return judged(lambda _: all(m.beats_chance for m in trained.values()), measured, untrained)


def _by_correlation(match: StageMatch) -> float:
    return match.correlation if math.isfinite(match.correlation) else -math.inf


def _small_steps(diagnosis: Diagnosis) -> Answer:
    def ratios(survey: Survey) -> dict[str, Measured]:
        found = {}
        for name, region in survey.limits.regions.items():
            ratio = region.distance_over_small_step
            if region.nonfinite:
                found[name] = Measured(math.nan)
            elif ratio.mean is not None:
                found[name] = Measured(ratio.mean, ratio.std)
        return found

    trained, untrained = ratios(diagnosis.trained), ratios(diagnosis.untrained)
    if not trained:
        return cannot_tell("no step is under a hundredth of the state in the long run")
    return judged(lambda ratios: max(ratios) >= 10, trained, untrained)


# --- the grid of untrained blocks


def _whole_grid(diagnosis: Diagnosis) -> Sequence[Cell]:
    """The grid's cells; none of a grid that was cut short, whose shares would be of other models."""
    grid = diagnosis.grid
    return grid if len(grid) == math.prod(len({axis(cell) for cell in grid}) for axis in AXES) else ()


def _same_limit(cell: Cell) -> str | None:
    """The limit that all seeds of a cell agree on; None if they do not."""
    kinds = {seed.limit for seed in cell.seeds}
    return kinds.pop() if len(kinds) == 1 and kinds != {"mixed"} else None


def _differ(a: Cell, b: Cell) -> bool:
    """Whether two cells of the grid have another limit, in every seed.

    A block of one layer rests, but has no cycle to rest in.
    """
    kinds = [_same_limit(cell) for cell in (a, b)]
    if min(a.layers, b.layers) == 1:
        kinds = ["fixed point" if kind and "fixed point" in kind else kind for kind in kinds]
    return None not in kinds and kinds[0] != kinds[1]


def _axes_govern(diagnosis: Diagnosis) -> Answer:
    grid = _whole_grid(diagnosis)
    measured = {}
    for axis, label in zip(AXES, AXIS_NAMES, strict=True):
        rest = [other for other in AXES if other is not axis]
        pairs = [
            _differ(a, b)
            for a, b in itertools.combinations(grid, 2)
            if axis(a) != axis(b) and all(other(a) == other(b) for other in rest)
        ]
        if not pairs:
            return cannot_tell(NO_GRID)
        measured[f"{label}: share of pairs that differ"] = Measured(sum(pairs) / len(pairs))
    return Answer(YES if min(v.value for v in measured.values()) >= 0.1 else NO, {}, measured, "untrained models")


def _injection_settles(diagnosis: Diagnosis) -> Answer:
    fixed: dict[str, list[Mapping[str, float | None]]] = {}
    for cell in _whole_grid(diagnosis):
        fixed.setdefault(f"{cell.norm}, {cell.injection}", []).append(cell.fixed)

    def shares(measure: str) -> dict[str, float]:
        return {name: fmean(number(one[measure]) for one in cells) for name, cells in fixed.items()}

    by_cosine, by_distance = shares("cosine"), shares("distance")
    if not {*SETTLE, *WANDER} <= by_cosine.keys():
        return cannot_tell(NO_GRID)
    shown = {name: Measured(share) for name, share in by_cosine.items()}
    shown |= {f"{name}, by distance": Measured(share) for name, share in by_distance.items()}
    wrong = [n for n in SETTLE if by_cosine[n] < 0.9] + [n for n in WANDER if by_cosine[n] > 0.5]
    return Answer(NO if wrong else YES, {}, shown, "otherwise in " + "; ".join(wrong) if wrong else "untrained models")


def _without_training(diagnosis: Diagnosis) -> Answer:
    cycles = [cell for cell in _whole_grid(diagnosis) if cell.layers > 1]
    if not cycles:
        return cannot_tell(NO_GRID)
    share = sum(_same_limit(cell) == "cyclic fixed points" for cell in cycles) / len(cycles)
    return Answer(YES if share > 0 else NO, {}, {"share of cells with two or more layers": Measured(share)})


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "M1",
        "[M]",
        "Each layer of the cycle converges to its own fixed point",
        "share of tokens at a fixed point (by cosine), and with distinct ones: the angle between the layers' states "
        "at the last step is 0.9 of that half way or more, and above 100 roundings",
        f"{SETTING}: both shares >= 0.95, the first in every layer",
        _cyclic_fixed_points,
    ),
    Claim(
        "M2",
        "[M]",
        "Attention settles as the states do",
        "change of attention between steps 8 and 9 over that between 1 and 2, largest layer; the states' too",
        f"{SETTING}: attention's at most 0.1",
        _attention_settles,
    ),
    Claim(
        "M3",
        "[M]",
        "Each pass repeats the stages of a feed-forward model",
        "correlation of column-sum concentration over relative depth with the loops-off control",
        f"{SETTING}, the control's too: above 95% of layer-shuffled controls in the first and in the median pass",
        _stages_repeat,
    ),
    Claim(
        "M4",
        "[M]",
        "Block size, input injection and norm placement govern the cycle",
        "share of pairs of untrained models, differing in one of them only, whose limit (by cosine, and whether the "
        "norm grows) differs in all seeds",
        "at least 0.1 for each of the three",
        _axes_govern,
    ),
    Claim(
        "M5",
        "[M]",
        "Injection settles every norm placement but Ouro's (branch+state); without it only pre-norm settles",
        "share of tokens at a fixed point, untrained models, by cosine (what distance says stands beside)",
        "injected: pre and residual >= 0.9, branch+state <= 0.5; without: pre >= 0.9, residual and branch+state "
        "<= 0.5; branch alone is in neither",
        _injection_settles,
    ),
    Claim(
        "M6",
        "[M]",
        "Cyclic fixed points appear without being trained for",
        "share of untrained cells of two or more layers with distinct fixed points (by cosine, and no growing norm) "
        "in all seeds",
        "above 0",
        _without_training,
    ),
    Claim(
        "M7",
        "[M]",
        "A small step is not a fixed point",
        "‖x_k - x*‖ / ‖d_k‖ at the first step under 1% of ‖x_k‖",
        "at least 10 in some region",
        _small_steps,
    ),
)
