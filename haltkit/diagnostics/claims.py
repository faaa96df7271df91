"""The claims of two papers, each with the quantity that tests it and the rule that judges it.

[P] is "Two-Scale Latent Dynamics for Recurrent-Depth Transformers" (arXiv 2509.23314), [M] "A Mechanistic Analysis of
Looped Reasoning Language Models" (arXiv 2604.11791). Rules and their limits stand here, written down before any model
is looked at, and a claim is judged from the results alone (:func:`judge`), so a table can be made again from its JSON.

A claim that a model of this kind or size cannot speak to is *cannot tell at this scale*, with the reason. What an
untrained model of the same shape does stands beside each value: a finding that it shares is not training's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np

from haltkit.diagnostics.stages import StageMatch, match_stages

__all__ = ["CLAIMS", "Claim", "Finding", "Verdict", "judge"]

Verdict = Literal["reproduced", "not reproduced", "cannot tell at this scale"]
YES: Verdict = "reproduced"
NO: Verdict = "not reproduced"
UNKNOWN: Verdict = "cannot tell at this scale"

# [P] trains on 300M tokens; a claim about late training is not refuted before a tenth of that.
LATE_TOKENS = 30_000_000
# Steps under so many rounding floors are rounding, and have no direction or size of their own.
ABOVE_FLOOR = 10.0
# A trend over training wants so many checkpoints, and this rank correlation with tokens seen.
CHECKPOINTS, TREND = 4, 0.5
# [M]'s small models saw 3.7B tokens; one of under so many is too young to be spoken of beside them.
CYCLE_TOKENS = 2_000_000
# "Flat" quality, in nats: the level that haltkit compare uses.
FLAT = 0.01


class Value(NamedTuple):
    """One measured number; ``spread`` is one standard deviation over tokens, where there is one."""

    value: float
    spread: float | None = None


@dataclass(frozen=True)
class Answer:
    verdict: Verdict
    measured: dict[str, Value] = field(default_factory=dict)
    untrained: dict[str, Value] = field(default_factory=dict)
    reason: str = ""


Results = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """One claim: where it is made, what tests it, and by which rule."""

    name: str
    paper: str
    text: str
    quantity: str
    rule: str
    test: Callable[[Results], Answer]


@dataclass(frozen=True)
class Finding:
    """A claim judged. ``measured`` and ``untrained`` map a label (a region, a boundary) to a :class:`Value`."""

    name: str
    paper: str
    text: str
    quantity: str
    rule: str
    verdict: Verdict
    measured: dict[str, Value]
    untrained: dict[str, Value]
    reason: str

    def to_dict(self) -> dict[str, Any]:
        plain = asdict(self)
        for key in ("measured", "untrained"):
            plain[key] = {k: {"value": _finite(v.value), "spread": _finite(v.spread)} for k, v in plain[key].items()}
        return plain


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _cannot(reason: str) -> Answer:
    return Answer(UNKNOWN, {}, {}, reason)


def _judged(
    good: Callable[[list[float]], bool], measured: dict[str, Value], untrained: dict[str, Value], reason: str = ""
) -> Answer:
    """Whether the measured numbers are good, which is asked only if they are all finite."""
    numbers = [v.value for v in measured.values()]
    if not all(math.isfinite(number) for number in numbers):
        return Answer(UNKNOWN, measured, untrained, "states stopped being finite")
    return Answer(YES if good(numbers) else NO, measured, untrained, reason)


# --- reading results


def _regions(results: Results, model: str = "trained", part: str = "geometry") -> Mapping[str, Any]:
    found = ((results.get("models") or {}).get(model) or {}).get(part) or {}
    return found.get("regions") or {}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [_number(v) for v in values]


def _moving(region: Mapping[str, Any], first: int, last: int) -> list[int]:
    """Steps ``first .. last`` whose mean norm is above the floor, as indices into lists over k."""
    norms = _numbers(region["step_norm_mean"])
    floor = region.get("floor")
    if floor is None:  # statistics of a snapshot: from the state's norm, in float32
        floor = _numbers(region["state_norm_mean"])[-1] * 2.0**-24
    return [k - 1 for k in range(first, min(last, len(norms)) + 1) if norms[k - 1] > ABOVE_FLOOR * floor]


def _mean_over(region: Mapping[str, Any], name: str, steps: Sequence[int]) -> Value | None:
    """A signal's mean over some steps, with the spread over tokens at a typical one of them."""
    means = np.array(_numbers(region[f"{name}_mean"]))[list(steps)]
    spreads = np.array(_numbers(region.get(f"{name}_std") or [None] * len(region[f"{name}_mean"])))[list(steps)]
    if not len(means) or not np.isfinite(means).all():
        return None
    return Value(float(means.mean()), float(np.median(spreads)) if np.isfinite(spreads).all() else None)


def _each_region(
    results: Results, number: Callable[[Mapping[str, Any]], Value | None], part: str = "geometry"
) -> tuple[dict[str, Value], dict[str, Value]]:
    """A number for every region that has one, trained and untrained; NaN where states stopped being finite."""
    found: list[dict[str, Value]] = []
    for model in ("trained", "untrained"):
        pairs = (
            (name, Value(math.nan) if region.get("nonfinite") else number(region))
            for name, region in _regions(results, model, part).items()
        )
        found.append({name: value for name, value in pairs if value is not None})
    return found[0], found[1]


def _trained_tokens(results: Results) -> float:
    return float((results.get("about") or {}).get("tokens_seen") or 0)


def _too_young(seen: float, who: str = "the model") -> str | None:
    """Why a model cannot speak for or against [M]'s trained ones, if it cannot."""
    if not seen:
        return f"how long {who} was trained is not known: {CYCLE_TOKENS / 1e6:.0f}M tokens are needed"
    if seen < CYCLE_TOKENS:
        return f"{who} has seen {seen / 1e6:.2g}M tokens, {CYCLE_TOKENS / 1e6:.0f}M are needed"
    return None


def _checkpoints(results: Results) -> list[Mapping[str, Any]]:
    found = [one for one in results.get("checkpoints") or [] if one.get("tokens_seen")]
    return sorted(found, key=lambda one: float(one["tokens_seen"]))


def _rank_correlation(values: Sequence[float]) -> float:
    """Spearman's, with the order of the values; ties share a rank."""
    a = np.array([np.mean([*np.flatnonzero(np.sort(values) == v)]) for v in values])
    b = np.arange(len(values), dtype=float)
    if a.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _falls_over_training(results: Results, number: Callable[[Mapping[str, Any]], float | None], least: float) -> Answer:
    """Whether a number falls by ``least`` from the first to the last checkpoint, in every region, as a trend."""
    checkpoints = _checkpoints(results)
    if len(checkpoints) < CHECKPOINTS:
        return _cannot(
            f"{len(checkpoints)} checkpoints of one run are here, {CHECKPOINTS} are needed: give a run folder"
        )
    measured: dict[str, Value] = {}
    falls = []
    for name in checkpoints[-1]["regions"]:
        series = [number(one["regions"][name]) for one in checkpoints if name in one["regions"]]
        known = [v for v in series if v is not None and math.isfinite(v)]
        if len(known) < CHECKPOINTS:
            continue
        measured[f"{name} first"], measured[f"{name} last"] = Value(known[0]), Value(known[-1])
        falls.append(known[-1] < known[0] - least and _rank_correlation(known) <= -TREND)
    if not falls:
        return _cannot("the number is not defined at enough checkpoints")
    pairs = {name: number(region) for name, region in _regions(results, "untrained").items()}
    untrained = {name: Value(v) for name, v in pairs.items() if v is not None and math.isfinite(v)}
    return Answer(YES if all(falls) else NO, measured, untrained, f"falls in {sum(falls)} of {len(falls)} regions")


# --- [P]


def _steps_shrink(results: Results) -> Answer:
    def ratio(region: Mapping[str, Any]) -> Value | None:
        norms = _numbers(region["step_norm_mean"])
        return Value(norms[9] / norms[0]) if len(norms) >= 10 and norms[0] > 0 else None

    trained, untrained = _each_region(results, ratio)
    if not trained:
        return _cannot("fewer than ten loops were run")
    return _judged(lambda ratios: max(ratios) <= 0.1, trained, untrained)


def _cosines_settle(results: Results) -> Answer:
    trained, untrained = _each_region(results, lambda r: _mean_over(r, "cosine", _moving(r, 4, 12)))
    if not trained:
        return _cannot("no step from 4 to 12 is above the float floor")
    answer = _judged(lambda cosines: all(0.5 <= c <= 0.65 for c in cosines), trained, untrained)
    seen = _trained_tokens(results)
    if answer.verdict == NO and seen < LATE_TOKENS:
        reason = f"{seen / 1e6:.1f}M tokens are not late in training ({LATE_TOKENS / 1e6:.0f}M)"
        return replace(answer, verdict=UNKNOWN, reason=reason)
    return answer


def _absolute_cosine(region: Mapping[str, Any]) -> float | None:
    found = _mean_over(region, "cosine", _moving(region, 4, 12))
    return None if found is None else abs(found.value)


def _more_orthogonal(results: Results) -> Answer:
    return _falls_over_training(results, _absolute_cosine, 0.05)


def _norms_plateau(results: Results) -> Answer:
    def over_floor(region: Mapping[str, Any]) -> Value | None:
        norms = _numbers(region["step_norm_mean"])
        return Value(norms[-1] / region["floor"]) if len(norms) >= 24 and region.get("floor") else None

    def course(region: Mapping[str, Any]) -> str:
        norms = _numbers(region["step_norm_mean"])
        earlier = norms[len(norms) * 3 // 4 - 1]
        if min(norms[-1], earlier) <= ABOVE_FLOOR * region["floor"]:  # of rounding, no ratio says anything
            return "steps reach the float floor"
        if norms[-1] > 0.1 * norms[0]:
            return "steps are not small at the last loop"
        ratio = norms[-1] / earlier
        return f"steps still {'shrink' if ratio < 1 else 'grow'} at the last loop" if not 0.8 <= ratio <= 1.25 else ""

    trained, untrained = _each_region(results, over_floor)
    if not trained:
        return _cannot("fewer than 24 loops were run, or there is no float floor")
    courses = dict.fromkeys(course(_regions(results)[name]) for name in trained)
    return _judged(lambda _: set(courses) == {""}, trained, untrained, ", ".join(c for c in courses if c))


def _constant_curvature(results: Results) -> Answer:
    def variation(region: Mapping[str, Any]) -> Value | None:
        if "curvature_mean" not in region:
            return None
        steps = _moving(region, 3, 32)
        values = np.array(_numbers(region["curvature_mean"]))[steps]
        if len(steps) < 5 or not np.isfinite(values).all() or not values.mean() > 0:
            return None
        return Value(float(values.std() / values.mean()))

    trained, untrained = _each_region(results, variation)
    if not trained:
        return _cannot("fewer than five steps are above the float floor, or the path is straight")
    return _judged(lambda variations: max(variations) <= 0.25, trained, untrained)


def _shrinking(region: Mapping[str, Any]) -> float | None:
    norms = _numbers(region["step_norm_mean"])
    steps = _moving(region, 2, 8)
    if len(steps) < 2:
        return None
    return float((norms[steps[-1]] / norms[steps[0]]) ** (1 / (steps[-1] - steps[0])))


def _faster_decay(results: Results) -> Answer:
    return _falls_over_training(results, _shrinking, 0.02)


def _angle_spread(region: Mapping[str, Any]) -> float | None:
    steps = _moving(region, 2, 8)
    spreads = np.array(_numbers(region["cosine_std"]))[steps]
    return float(spreads.mean()) if len(spreads) and np.isfinite(spreads).all() else None


def _steadier_angles(results: Results) -> Answer:
    return _falls_over_training(results, _angle_spread, 0.01)


def _large_dlr(convention: str) -> Callable[[Results], Answer]:
    def test(results: Results) -> Answer:
        def ratios(model: str) -> dict[str, Value]:
            part = ((results.get("models") or {}).get(model) or {}).get("geometry") or {}
            found = {k: v[convention] for k, v in (part.get("dlr") or {}).items() if convention in v}
            broken = any(region.get("nonfinite") for region in _regions(results, model).values())
            return {
                k: Value(math.nan if broken else _number(v["mean"]), None if broken else v.get("std"))
                for k, v in found.items()
            }

        measured = ratios("trained")
        if not measured:
            return _cannot("there is no boundary between two regions, or this convention was not recorded")
        earlier = _checkpoints(results)
        of_earlier = [_number(v[convention]["mean"]) for c in earlier for v in c["dlr"].values() if convention in v]
        least = min([v.value for v in measured.values()] + of_earlier)
        where = f"least over {len(earlier)} checkpoints and this model {least:.2g}" if earlier else "this model only"
        return _judged(lambda own: min(own + of_earlier) >= 2, measured, ratios("untrained"), where)

    return test


def _rows(results: Results, policy: str) -> list[Mapping[str, Any]]:
    """A policy's rows at the paper's thresholds, ascending."""
    rows = (results.get("comparison") or {}).get("rows") or []
    own = [r for r in rows if r["policy"] == policy and r["tau"] is not None and 0.99e-5 < r["tau"] < 1.01e-2]
    return sorted(own, key=lambda r: float(r["tau"]))


def _needs_rows(results: Results, *policies: str) -> str | None:
    for policy in policies:
        if len(_rows(results, policy)) < 2:
            return f"no sweep of {policy} over the paper's thresholds: run haltkit compare with --json DIR/compare.json"
    return None


def _spread(rows: Sequence[Mapping[str, Any]]) -> float:
    return max(float(r["ce"]) for r in rows) - min(float(r["ce"]) for r in rows)


def _ratios(row: Mapping[str, Any], other: Mapping[str, Any]) -> list[float]:
    """Time of one setting over another's, a repeat each: repeats of a comparison ran side by side."""
    pairs = zip(*(r.get("ms_repeats") or [r["ms_per_token"]] for r in (row, other)), strict=False)
    return [a / b for a, b in pairs]


def _timed(ratios: Sequence[float], least: float, good: bool, measured: dict[str, Value]) -> Answer:
    """Reproduced if ``good`` and every repeat says that a ratio of times is ``least`` or more; not if every one denies.

    Repeats that disagree tell of the machine, not of the policy.
    """
    if not good or max(ratios) < least:
        return Answer(NO, measured)
    if min(ratios) >= least:
        return Answer(YES, measured)
    return Answer(UNKNOWN, measured, {}, "the repeats' times disagree: compare again on an idle machine")


def _acceleration_faster(results: Results) -> Answer:
    if (missing := _needs_rows(results, "accel")) is not None:
        return _cannot(missing)
    rows = _rows(results, "accel")
    ratios, spread = _ratios(rows[0], rows[-1]), _spread(rows)
    measured = {"time at 1e-5 over 1e-2": Value(float(np.median(ratios))), "spread of CE": Value(spread)}
    return _timed(ratios, 1.3, spread <= FLAT, measured)


def _kl_slow(results: Results) -> Answer:
    if (missing := _needs_rows(results, "accel", "kl")) is not None:
        return _cannot(missing)
    kl, accel = _rows(results, "kl"), _rows(results, "accel")
    pairs = [_ratios(k, a) for k in kl for a in accel if k["tau"] == a["tau"]]
    if not pairs:
        return _cannot("kl and accel share no threshold")
    medians = [float(np.median(ratios)) for ratios in pairs]
    measured = {"time, kl over accel, least": Value(min(medians)), "spread of CE": Value(_spread(kl))}
    faster = any(max(ratios) < 1 for ratios in pairs)  # at one threshold, for sure
    return _timed([r for ratios in pairs for r in ratios], 1.0, not faster and _spread(kl) <= FLAT, measured)


def _norm_degrades(results: Results) -> Answer:
    if (missing := _needs_rows(results, "norm")) is not None:
        return _cannot(missing)
    rows = _rows(results, "norm")
    loss = {f"CE at {r['tau']:g} over {rows[0]['tau']:g}": Value(r["ce"] - rows[0]["ce"]) for r in rows[1:]}
    return Answer(YES if list(loss.values())[-1].value >= FLAT else NO, loss)


def _less_tuning(results: Results) -> Answer:
    if (missing := _needs_rows(results, "accel", "norm", "kl")) is not None:
        return _cannot(missing)
    spreads = {name: Value(_spread(_rows(results, name))) for name in ("accel", "norm", "kl")}
    if max(v.value for v in spreads.values()) <= 0.001:
        return Answer(UNKNOWN, spreads, {}, "every policy is flat over this sweep: nothing needs tuning")
    best = min(spreads["norm"].value, spreads["kl"].value)
    return Answer(YES if spreads["accel"].value < best - 0.001 else NO, spreads)


def _kl_costs_more(results: Results) -> Answer:
    if (missing := _needs_rows(results, "accel", "kl")) is not None:
        return _cannot(missing)

    def a_step(policy: str, repeat: int | None) -> float:
        times = [
            (row["ms_per_token"] if repeat is None else row["ms_repeats"][repeat], sum(row["steps"].values()))
            for row in _rows(results, policy)
        ]
        return float(np.median([ms / steps for ms, steps in times]))

    repeats = min(len(r.get("ms_repeats") or []) for name in ("accel", "kl") for r in _rows(results, name))
    rounds: list[int | None] = list(range(repeats)) if repeats else [None]
    ratios = [a_step("kl", i) / a_step("accel", i) for i in rounds]
    return _timed(ratios, 1.2, True, {name: Value(a_step(name, None)) for name in ("accel", "kl")})


def _gain(results: Results) -> Answer:
    if (missing := _needs_rows(results, "accel", "norm", "kl")) is not None:
        return _cannot(missing)
    fastest: dict[str, Mapping[str, Any]] = {}
    for row in results["comparison"]["rows"][1:]:
        if row["delta_ce_se"] is not None and row["delta_ce"] + 2 * row["delta_ce_se"] <= FLAT:
            name = row["policy"]
            if name not in fastest or row["ms_per_token"] < fastest[name]["ms_per_token"]:
                fastest[name] = row
    others = [row for name, row in fastest.items() if name not in ("accel", "fixed")]
    if "accel" not in fastest or not others:
        return _cannot(f"no setting is surely within {FLAT} nats on so few tokens")
    other = min(others, key=lambda row: float(row["ms_per_token"]))
    ratios = _ratios(other, fastest["accel"])
    measured = {"time saved against the best other policy": Value(1 - 1 / float(np.median(ratios)))}
    if "fixed" in fastest:
        measured["against the best fixed depth"] = Value(
            1 - 1 / float(np.median(_ratios(fastest["fixed"], fastest["accel"])))
        )
    return _timed(ratios, 1 / 0.9, True, measured)


# --- [M]


def _cycle_region(results: Results, part: str) -> str | None:
    """The region in [M]'s setting: the model's only one, of four or more layers seen in this part of the results."""
    regions = _regions(results, "trained", part)
    alone = len(_regions(results) or regions) == 1
    return next((name for name, r in regions.items() if alone and len(r.get("layers") or ()) >= 4), None)


def _setting(results: Results, part: str) -> str:
    regions = _regions(results, "trained", part)
    if not regions:
        return "no long run (128 loops) was made" if part == "limits" else "attention was not seen"
    shape = ", ".join(f"{name}: {max(1, len(r.get('layers') or ()))}" for name, r in regions.items())
    return f"[M] is about one region of four or more layers; layers by region here are {shape}"


def _fixed_share(counts: Mapping[str, int]) -> float:
    total = sum(counts.values())
    return counts.get("fixed point", 0) / total if total else math.nan


def _cycle_values(regions: Mapping[str, Mapping[str, Any]]) -> dict[str, Value]:
    values = {}
    for name, region in regions.items():
        share = math.nan if region.get("nonfinite") else _fixed_share(region["limits"]["cosine"])
        values[f"{name} at a fixed point"] = Value(share)
        if region.get("least_cosine"):
            cosine = region["least_cosine"]
            values[f"{name} least cosine between layers"] = Value(_number(cosine["mean"]), cosine["std"])
            values[f"{name} with distinct fixed points"] = Value(_number(region["distinct"]))
    return values


def _cyclic_fixed_points(results: Results) -> Answer:
    everywhere = _cycle_values(_regions(results, "trained", "limits"))
    untrained = _cycle_values(_regions(results, "untrained", "limits"))
    name = _cycle_region(results, "limits")
    if name is None:
        return Answer(UNKNOWN, everywhere, untrained, _setting(results, "limits"))
    if (young := _too_young(_trained_tokens(results))) is not None:
        return Answer(UNKNOWN, everywhere, untrained, young)
    region = _regions(results, "trained", "limits")[name]
    shares = [_fixed_share(counts) for counts in region["layer_limits"].values()]
    return _judged(lambda _: min(*shares, region["distinct"]) >= 0.95, everywhere, untrained)


def _attention_settles(results: Results) -> Answer:
    def ratio(rows: Sequence[Sequence[float | None]]) -> float | None:
        changes = np.array([_numbers(row) for row in rows])  # (recurrences - 1, layers)
        return float((changes[7] / changes[0]).max()) if len(changes) >= 8 and (changes[0] > 0).all() else None

    def values(model: str, key: str) -> dict[str, Value]:
        pairs = {name: ratio(region[key]) for name, region in _regions(results, model, "attention").items()}
        return {name: Value(found) for name, found in pairs.items() if found is not None}

    def shown(model: str) -> dict[str, Value]:
        states = values(model, "moved")
        return values(model, "successive") | {f"{name}, states": value for name, value in states.items()}

    attention, measured, untrained = values("trained", "successive"), shown("trained"), shown("untrained")
    if not attention:
        return _cannot("attention was not seen, or over fewer than nine recurrences")
    if _cycle_region(results, "attention") is None:
        return Answer(UNKNOWN, measured, untrained, _setting(results, "attention"))
    if (young := _too_young(_trained_tokens(results))) is not None:
        return Answer(UNKNOWN, measured, untrained, young)
    return _judged(lambda _: max(v.value for v in attention.values()) <= 0.1, measured, untrained)


def _stages_repeat(results: Results) -> Answer:
    control = results.get("control") or {}
    name = _cycle_region(results, "attention")
    if name is None:
        return _cannot(_setting(results, "attention"))
    if not control.get("profiles"):
        return _cannot("there is no feed-forward control of the same data: train small-control and give --control")

    def stages(model: str) -> list[StageMatch]:
        profiles = (_regions(results, model, "attention").get(name) or {}).get("profiles") or {}
        flow = _numbers(control["profiles"]["concentration"])
        return [match_stages(_numbers(row), flow) for row in profiles.get("concentration") or []]

    # Once the loop has converged a pass is the last one again: not each counts, but the first and a typical one.
    def judged(matches: list[StageMatch]) -> dict[str, StageMatch]:
        if not matches:
            return {}
        return {"first pass": matches[0], "median pass": sorted(matches, key=_by_correlation)[(len(matches) - 1) // 2]}

    def values(chosen: Mapping[str, StageMatch]) -> dict[str, Value]:
        shown = {}
        for which, match in chosen.items():
            shown[which], shown[f"{which}, 95% of shuffled"] = Value(match.correlation), Value(match.shuffled_high)
        return shown

    chosen = judged(stages("trained"))
    measured, untrained = values(chosen), values(judged(stages("untrained")))
    for seen, who in ((_trained_tokens(results), "the model"), (control.get("tokens_seen") or 0, "the control")):
        if (young := _too_young(seen, who)) is not None:
            return Answer(UNKNOWN, measured, untrained, young)
    return _judged(lambda _: all(m.beats_chance for m in chosen.values()), measured, untrained)


def _by_correlation(match: StageMatch) -> float:
    return match.correlation if math.isfinite(match.correlation) else -math.inf


AXES = ("norm", "injection", "layers")
NO_GRID = "the grid of untrained models was not run to its end: give --grid"
# [M]'s placements: pre-norm, Huginn's (residual) and Ouro's (branch+state).
SETTLE = ("pre, every_step", "residual, every_step", "pre, never")
WANDER = ("branch+state, every_step", "residual, never", "branch+state, never")


def _whole_grid(results: Results) -> Sequence[Mapping[str, Any]]:
    """The grid's cells; none of a grid that was cut short, whose shares would be of other models."""
    grid = results.get("grid") or []
    return grid if len(grid) == math.prod(len({cell[axis] for cell in grid}) for axis in AXES) else []


def _same_limit(cell: Mapping[str, Any]) -> str | None:
    """The limit that all seeds of a cell agree on; None if they do not."""
    kinds = {one["limit"] for one in cell["seeds"]}
    return kinds.pop() if len(kinds) == 1 and kinds != {"mixed"} else None


def _differ(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two cells of the grid have another limit, in every seed.

    A block of one layer rests, but has no cycle to rest in.
    """
    kinds = [_same_limit(cell) for cell in (a, b)]
    if min(a["layers"], b["layers"]) == 1:
        kinds = ["fixed point" if kind and "fixed point" in kind else kind for kind in kinds]
    return None not in kinds and kinds[0] != kinds[1]


def _axes_govern(results: Results) -> Answer:
    grid = _whole_grid(results)
    measured = {}
    for axis in AXES:
        rest = [a for a in AXES if a != axis]
        pairs = [
            _differ(a, b)
            for a, b in itertools.combinations(grid, 2)
            if a[axis] != b[axis] and all(a[k] == b[k] for k in rest)
        ]
        if not pairs:
            return _cannot(NO_GRID)
        measured[f"{axis}: share of pairs that differ"] = Value(sum(pairs) / len(pairs))
    return Answer(YES if min(v.value for v in measured.values()) >= 0.1 else NO, {}, measured, "untrained models")


def _injection_settles(results: Results) -> Answer:
    fixed: dict[str, list[Mapping[str, Any]]] = {}
    for cell in _whole_grid(results):
        fixed.setdefault(f"{cell['norm']}, {cell['injection']}", []).append(cell["fixed"])
    shares = {name: fmean(one["cosine"] for one in cells) for name, cells in fixed.items()}
    if not {*SETTLE, *WANDER} <= shares.keys():
        return _cannot(NO_GRID)
    shown = {name: Value(share) for name, share in shares.items()}
    shown |= {f"{name}, by distance": Value(fmean(c["distance"] for c in cells)) for name, cells in fixed.items()}
    wrong = [n for n in SETTLE if shares[n] < 0.9] + [n for n in WANDER if shares[n] > 0.5]
    return Answer(NO if wrong else YES, {}, shown, "otherwise in " + "; ".join(wrong) if wrong else "untrained models")


def _without_training(results: Results) -> Answer:
    cycles = [c for c in _whole_grid(results) if c["layers"] > 1]
    if not cycles:
        return _cannot(NO_GRID)
    share = sum(_same_limit(c) == "cyclic fixed points" for c in cycles) / len(cycles)
    return Answer(YES if share > 0 else NO, {}, {"share of cells with two or more layers": Value(share)})


def _small_steps(results: Results) -> Answer:
    def ratio(region: Mapping[str, Any]) -> Value | None:
        found = region["distance_over_small_step"]
        return None if found["mean"] is None else Value(found["mean"], found["std"])

    trained, untrained = _each_region(results, ratio, "limits")
    if not trained:
        return _cannot("no step is under a hundredth of the state in the long run")
    return _judged(lambda ratios: max(ratios) >= 10, trained, untrained)


_SETTING = f"one region of >= 4 layers and {CYCLE_TOKENS / 1e6:.0f}M tokens"
_COMPARE = "haltkit compare, at thresholds 1e-5 .. 1e-2"
CLAIMS: tuple[Claim, ...] = (
    Claim("P1", "[P]", "Steps shrink within 5-10 loops", "mean ‖d_10‖ / mean ‖d_1‖",
          "at most 0.1 in every region", _steps_shrink),
    Claim("P2", "[P]", "Consecutive steps settle at a cosine of 0.5-0.65 late in training",
          "mean cos(d_k, d_{k-1}), k = 4..12 above 10 float floors",
          f"0.5-0.65 in every region; otherwise cannot tell below {LATE_TOKENS / 1e6:.0f}M tokens", _cosines_settle),
    Claim("P3", "[P]", "Steps become more orthogonal over training", "abs of P2's cosine, first and last checkpoint",
          f"falls by 0.05 in every region with a rank correlation of at most -{TREND}", _more_orthogonal),
    Claim("P4", "[P]", "Step norms plateau at a small value that is not zero", "mean ‖d_K‖ over the float floor",
          "over 10, at most 0.1 of ‖d_1‖ and 0.8 to 1.25 times the value a quarter earlier, in every region",
          _norms_plateau),
    Claim("P5", "[P]", "Curvature is nearly constant (a spiral)",
          "coefficient of variation of the mean curvature over k >= 3 above 10 float floors",
          "at most 0.25 in every region; cannot tell of a straight path", _constant_curvature),
    Claim("P6", "[P]", "Steps decay faster in later checkpoints", "factor by which mean ‖d_k‖ shrinks a step, k = 2..8",
          f"falls by 0.02 in every region with a rank correlation of at most -{TREND}", _faster_decay),
    Claim("P7", "[P]", "Angles are steadier in later checkpoints", "spread of the cosine over tokens, k = 2..8",
          f"falls by 0.01 in every region with a rank correlation of at most -{TREND}", _steadier_angles),
    *(
        Claim(f"P8 {convention}", "[P]", f"DLR is well above 1 at every boundary ({convention})",
              f"mean DLR, convention '{convention}'", "at least 2 at every boundary and checkpoint",
              _large_dlr(convention))
        for convention in ("noise", "injected", "net", "net without d_1")
    ),
    Claim("P9", "[P]", "Acceleration: 580 to 360 ms a token from tau 1e-5 to 1e-2, quality flat", _COMPARE,
          f"time falls by a factor of 1.3 in every repeat, and CE varies by at most {FLAT} nats", _acceleration_faster),
    Claim("P10", "[P]", "KL is flat but slow", _COMPARE,
          f"slower than accel at every threshold and repeat, and CE varies by at most {FLAT} nats", _kl_slow),
    Claim("P11", "[P]", "Step norm loses quality past 1e-3, sharply at 1e-2", _COMPARE,
          f"CE at 1e-2 is {FLAT} nats above that at 1e-5", _norm_degrades),
    Claim("P12", "[P]", "Acceleration needs less threshold tuning", "spread of CE over the same thresholds (nats)",
          "accel's is below the others' by 0.001; cannot tell if all are at most 0.001", _less_tuning),
    Claim("P13", "[P]", "A step of acceleration costs O(d), one of KL O(V)", "ms a token and loop step",
          "kl at least 1.2 times accel in every repeat", _kl_costs_more),
    Claim("P14", "[P]", "Acceleration saves 10-20%", "time of the fastest setting within 0.01 nats",
          "at least 10% less than the best other policy's in every repeat", _gain),
    Claim("M1", "[M]", "Each layer of the cycle converges to its own fixed point",
          "share of tokens at a fixed point (by cosine), and with distinct ones: the angle between the layers' states "
          "at the last recurrence is 0.9 of that half way or more, and above 100 roundings",
          f"{_SETTING}: both shares >= 0.95, the first in every layer", _cyclic_fixed_points),
    Claim("M2", "[M]", "Attention settles as the states do",
          "change of attention between recurrences 8 and 9 over that between 1 and 2, largest layer; the states' too",
          f"{_SETTING}: attention's at most 0.1", _attention_settles),
    Claim("M3", "[M]", "Each pass repeats the stages of a feed-forward model",
          "correlation of column-sum concentration over relative depth with the loops-off control",
          f"{_SETTING}, the control's too: above 95% of layer-shuffled controls in the first and in the median pass",
          _stages_repeat),
    Claim("M4", "[M]", "Block size, input injection and norm placement govern the cycle",
          "share of pairs of untrained models, differing in one of them only, whose limit (by cosine, and whether the "
          "norm grows) differs in all seeds",
          "at least 0.1 for each of the three", _axes_govern),
    Claim("M5", "[M]",
          "Injection settles every norm placement but Ouro's (branch+state); without it only pre-norm settles",
          "share of tokens at a fixed point, untrained models, by cosine (what distance says stands beside)",
          "injected: pre and residual >= 0.9, branch+state <= 0.5; without: pre >= 0.9, residual and branch+state "
          "<= 0.5; branch alone is in neither", _injection_settles),
    Claim("M6", "[M]", "Cyclic fixed points appear without being trained for",
          "share of untrained cells of two or more layers with distinct fixed points (by cosine, and no growing norm) "
          "in all seeds", "above 0", _without_training),
    Claim("M7", "[M]", "A small step is not a fixed point", "‖x_k - x*‖ / ‖d_k‖ at the first step under 1% of ‖x_k‖",
          "at least 10 in some region", _small_steps),
)  # fmt: skip


SHARED = "the untrained model has it too"


def _untrained_alone(results: Results) -> Results:
    """The same results with the untrained model in the trained one's place, and nothing that is not about a model."""
    untrained = (results.get("models") or {}).get("untrained")
    return {
        "about": results.get("about"),
        "control": results.get("control"),
        "models": {} if untrained is None else {"trained": untrained},
    }


def judge(results: Results) -> list[Finding]:
    """Every claim, judged from results as ``haltkit diagnose`` writes them; what they lack is a reason, no error.

    Where a claim is reproduced the untrained model takes the same test: a finding that it shares is not training's.
    """
    found = []
    fresh = _untrained_alone(results)
    for claim in CLAIMS:
        answer = claim.test(results)
        if answer.verdict == YES and claim.test(fresh).verdict == YES:
            answer = replace(answer, reason=f"{answer.reason}; {SHARED}" if answer.reason else SHARED)
        found.append(
            Finding(
                claim.name,
                claim.paper,
                claim.text,
                claim.quantity,
                claim.rule,
                answer.verdict,
                answer.measured,
                answer.untrained,
                answer.reason,
            )
        )
    return found
