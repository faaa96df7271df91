"""Each claim's rule on results made up so that the answer is known."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from haltkit.diagnostics.claims import CLAIMS, judge
from haltkit.diagnostics.stages import resample

YES, NO, UNKNOWN = "reproduced", "not reproduced", "cannot tell at this scale"
K = 32


def region(
    rate: float = 0.5, cosine: float = 0.55, curvature: float = 2.0, spread: float = 0.1, least: float = 0.0,
    nonfinite: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """A loop whose steps shrink by ``rate`` down to ``least``, at a constant angle and curvature."""
    return {
        "step_norm_mean": [max(10 * rate**k, least) for k in range(K)],
        "state_norm_mean": [16.0] * K,
        "cosine_mean": [None, *[cosine] * (K - 1)],
        "cosine_std": [None, *[spread] * (K - 1)],
        "curvature_mean": [None, *[curvature] * (K - 1)],
        "floor": 1e-6,
        "nonfinite": nonfinite,
    }


def dlr(value: float) -> dict[str, Any]:
    names = ("noise", "injected", "net", "net without d_1")
    return {"a -> b": {name: {"mean": value, "std": 0.1, "median": value} for name in names}}


def row(policy: str, tau: float, ce: float, ms: float, steps: float = 8.0) -> dict[str, Any]:
    return {
        "policy": policy, "spec": f"{policy}:tau={tau}", "tau": tau, "ce": ce, "delta_ce": ce - 5.0, "delta_ce_se": 0.001,
        "ms_per_token": ms, "steps": {"a": steps}, "speedup": 1.0,
    }  # fmt: skip


def comparison() -> dict[str, Any]:
    """As the paper tells it: accel gets faster and stays good, kl is slow, norm breaks at 1e-2."""
    taus = (1e-5, 1e-4, 1e-3, 1e-2)
    rows = [{**row("fixed", 1.0, 5.0, 10.0), "tau": None}]
    rows += [row("accel", tau, 5.0 + 0.0005 * i, 6 - 0.7 * i) for i, tau in enumerate(taus)]
    rows += [row("kl", tau, 5.0 + 0.001 * i, 8 - 0.5 * i) for i, tau in enumerate(taus)]
    rows += [row("norm", tau, 5.0 + 0.02 * i, 7 - 0.5 * i) for i, tau in enumerate(taus)]
    return {"rows": rows}


def layer_counts(fixed: int = 100) -> dict[str, int]:
    return {"fixed point": fixed, "orbit": 100 - fixed, "slider": 0, "unknown": 0}


def limits(layers: int = 4, ratio: float = 50.0) -> dict[str, Any]:
    return {
        "limits": {"cosine": layer_counts()}, "least_cosine": {"mean": 0.97, "std": 0.01} if layers > 1 else None,
        "distinct": 1.0 if layers > 1 else None,
        "layers": {f"layer {i}": {} for i in range(layers)},
        "layer_limits": {f"layer {i}": layer_counts() for i in range(layers)},
        "distance_over_small_step": {"mean": ratio, "std": 1.0},
    }  # fmt: skip


CONTROL = [0.1, 0.5, 0.9, 1.0, 0.8, 0.6, 0.5, 0.4, 0.2, 0.1, 0.3, 0.9]


def attention(profile: list[float], layers: int = 4) -> dict[str, Any]:
    return {
        "layers": [f"layer {i}" for i in range(layers)],
        "moved": [[3.0 * 0.4**t] * 4 for t in range(15)],
        "successive": [[1.0 * 0.5**t] * 4 for t in range(15)],
        "profiles": {"concentration": [profile] * 16},
    }  # fmt: skip


def cell_of(kind: str) -> dict[str, Any]:
    share = float("fixed" in kind)
    return {"limit": kind, "fixed": {"cosine": share, "distance": share}, "seeds": [{"limit": kind}] * 3}


def grid() -> list[dict[str, Any]]:
    """As [M] has it: injection settles all but Ouro's, without it only pre-norm rests, at one point."""
    cells = []
    for norm in ("pre", "branch", "residual", "branch+state"):
        for injection in ("every_step", "never"):
            for layers in (1, 2, 4):
                settled = norm == "pre" or (injection == "every_step" and norm != "branch+state")
                several = (
                    "cyclic fixed points" if injection == "every_step" and layers == 4 else "degenerate fixed point"
                )
                kind = "slider" if not settled else "fixed point" if layers == 1 else several
                cells.append({"norm": norm, "injection": injection, "layers": layers, **cell_of(kind)})
    return cells


def results() -> dict[str, Any]:
    """A model that does everything as the papers say."""
    checkpoints = [
        {"tokens_seen": 10.0**i, "dlr": dlr(5.0), "regions": {"a": region(0.9 - 0.05 * i, 0.9 - 0.05 * i, spread=0.5 - 0.05 * i)}}
        for i in range(4, 9)
    ]  # fmt: skip
    trained = {
        "geometry": {"regions": {"a": region(0.6, least=1e-3)}, "dlr": dlr(5.0)},
        "limits": {"regions": {"a": limits()}},
        "attention": {"regions": {"a": attention(resample(CONTROL, 4))}},
    }  # fmt: skip
    untrained = {
        "geometry": {"regions": {"a": region(0.9, cosine=-0.3)}, "dlr": dlr(1.5)},
        "limits": {"regions": {"a": {**limits(ratio=0.4), "distinct": 0.0}}},
        "attention": {"regions": {"a": {**attention([0.5, 0.1, 0.6, 0.9]), "successive": [[1.0] * 4] * 15}}},
    }  # fmt: skip
    untrained["geometry"]["regions"]["a"]["curvature_mean"] = [None, *[1.3**k for k in range(31)]]
    return {
        "about": {"tokens_seen": 3e8}, "models": {"trained": trained, "untrained": untrained}, "checkpoints": checkpoints,
        "comparison": comparison(), "grid": grid(), "control": {"tokens_seen": 3e8, "profiles": {"concentration": CONTROL}},
    }  # fmt: skip


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in judge(found)}


def test_everything_as_the_papers_say_is_reproduced() -> None:
    found = judge(results())
    assert {f.name: (f.verdict, f.reason) for f in found if f.verdict != YES} == {}
    assert not any("untrained model has it" in f.reason for f in found)
    json.dumps([finding.to_dict() for finding in found], allow_nan=False)


def test_nothing_at_hand_tells_nothing_and_says_why() -> None:
    for empty in (
        {},
        {"models": {}, "about": {}, "checkpoints": [], "comparison": None, "grid": None, "control": None},
    ):
        for finding in judge(empty):
            assert finding.verdict == UNKNOWN, finding.name
            assert finding.reason, finding.name


def regions(found: dict[str, Any], part: str = "geometry") -> dict[str, Any]:
    inner: dict[str, Any] = found["models"]["trained"][part]["regions"]
    return inner


def rows(found: dict[str, Any], policy: str) -> list[dict[str, Any]]:
    return [r for r in found["comparison"]["rows"] if r["policy"] == policy]


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: regions(found)["a"].update(region(**values))


def all_checkpoints_alike(found: dict[str, Any]) -> None:
    for one in found["checkpoints"]:
        one["regions"]["a"] = region()


def low_dlr(found: dict[str, Any]) -> None:
    found["checkpoints"][1]["dlr"] = dlr(1.2)  # one checkpoint is enough


def two_layers(found: dict[str, Any]) -> None:
    regions(found, "limits")["a"] = limits(layers=2)
    regions(found, "attention")["a"]["layers"] = ["layer 0", "layer 1"]


def flat_policies(found: dict[str, Any]) -> None:
    for r in found["comparison"]["rows"]:
        r["ce"] = 5.0


def disagreeing_repeats(found: dict[str, Any]) -> None:
    for r in found["comparison"]["rows"]:
        r["ms_repeats"] = [r["ms_per_token"], 1.0 if r["policy"] == "kl" else 7.0]


def slow_accel(found: dict[str, Any]) -> None:
    for r in rows(found, "accel"):
        r["ms_per_token"] = 9.0


def one_layer_is_no_other_kind(found: dict[str, Any]) -> None:
    for cell in found["grid"]:
        cell.update(cell_of("fixed point" if cell["layers"] == 1 else "cyclic fixed points"))


def one_cell_type(found: dict[str, Any]) -> None:
    for cell in found["grid"]:
        cell.update(cell_of("fixed point"))


def seeds_that_disagree(found: dict[str, Any]) -> None:
    """The cells differ as before by what most seeds say, but one seed says otherwise each time."""
    for cell in found["grid"]:
        cell["seeds"] = [*cell["seeds"][:2], {"limit": "unknown"}]


def one_pair_in_many(found: dict[str, Any]) -> None:
    one_cell_type(found)
    found["grid"][0].update(cell_of("slider"))


def ouros_norm_settles(found: dict[str, Any]) -> None:
    for cell in found["grid"]:
        if cell["norm"] == "branch+state" and cell["injection"] == "every_step":
            cell.update(cell_of("cyclic fixed points"))


def branch_alone_wanders(found: dict[str, Any]) -> None:
    for cell in found["grid"]:
        if cell["norm"] == "branch":
            cell.update(cell_of("slider"))


def passes(found: dict[str, Any], alike: list[bool]) -> None:
    profiles = [resample(CONTROL, 4) if yes else [0.5, 0.1, 0.6, 0.9] for yes in alike]
    regions(found, "attention")["a"]["profiles"]["concentration"] = profiles


CASES: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("P1", change(rate=0.9), NO),
    ("P2", change(cosine=-0.4, least=1e-3), NO),
    ("P2", lambda f: (change(cosine=-0.4, least=1e-3)(f), f["about"].update(tokens_seen=2e6)), UNKNOWN),  # type: ignore[func-returns-value]
    ("P2", lambda f: (change(least=1e-3)(f), f["about"].update(tokens_seen=2e6)), YES),  # type: ignore[func-returns-value]
    ("P3", all_checkpoints_alike, NO),
    ("P3", lambda f: f["checkpoints"].pop(), YES),
    ("P3", lambda f: f.update(checkpoints=f["checkpoints"][:3]), UNKNOWN),
    ("P4", change(rate=0.5), NO),
    ("P4", change(rate=0.9), NO),  # still shrinking
    ("P4", change(rate=1.0), NO),  # a slider: at no small value
    ("P4", change(rate=1.2), NO),  # growing
    ("P4", lambda f: regions(f)["a"].update(step_norm_mean=[10.0 * 0.5**k for k in range(24)] + [1e-3] * 8), NO),
    ("P4", lambda f: regions(f)["a"].update(step_norm_mean=[0.9] + [0.0] * 31), NO),  # x -> 0.1 x + 1 lands on its limit
    ("P5", change(curvature=0.0), UNKNOWN),
    ("P5", lambda f: regions(f)["a"].update(curvature_mean=[None, *[1.3**k for k in range(31)]]), NO),
    ("P6", all_checkpoints_alike, NO),
    ("P7", all_checkpoints_alike, NO),
    ("P8 noise", low_dlr, NO),
    ("P8 net", low_dlr, NO),
    ("P9", slow_accel, NO),
    ("P10", slow_accel, NO),
    ("P9", disagreeing_repeats, UNKNOWN),
    ("P10", disagreeing_repeats, UNKNOWN),
    ("P13", disagreeing_repeats, UNKNOWN),
    ("P14", disagreeing_repeats, UNKNOWN),
    ("P11", flat_policies, NO),
    ("P12", flat_policies, UNKNOWN),
    ("P12", lambda f: [r.update(ce=5.0) for r in rows(f, "kl")], NO),
    ("P13", slow_accel, NO),
    ("P14", slow_accel, NO),
    ("M1", two_layers, UNKNOWN),
    ("M1", lambda f: regions(f, "limits")["a"]["layer_limits"].update({"layer 2": layer_counts(80)}), NO),
    ("M1", lambda f: regions(f, "limits")["a"].update(distinct=0.9), NO),
    ("M1", lambda f: regions(f).update(b=region()), UNKNOWN),  # two regions are not that paper's setting
    ("M1", lambda f: f["models"]["trained"].pop("limits"), UNKNOWN),
    *((name, lambda f: f["models"]["trained"].pop("limits"), YES) for name in ("M2", "M3")),  # no long run is needed
    ("M2", lambda f: regions(f, "attention")["a"].update(successive=[[1.0] * 4] * 15), NO),
    ("M2", two_layers, UNKNOWN),
    ("M3", lambda f: regions(f, "attention")["a"].update(attention([0.5, 0.1, 0.6, 0.9])), NO),
    ("M3", lambda f: f.update(control=None), UNKNOWN),
    ("M3", lambda f: passes(f, [False, *[True] * 15]), NO),  # a loop that converged to it in one pass repeats one thing
    ("M3", lambda f: passes(f, [True, *[False] * 15]), NO),
    ("M3", lambda f: passes(f, [True, *[False] * 7, *[True] * 8]), YES),
    ("M3", lambda f: f["control"].update(tokens_seen=1.9e6), UNKNOWN),
    *((name, lambda f: f["about"].update(tokens_seen=1.9e6), UNKNOWN) for name in ("M1", "M2", "M3")),
    *((name, lambda f: f["about"].pop("tokens_seen"), UNKNOWN) for name in ("M1", "M2", "M3")),
    ("M4", one_cell_type, NO),
    ("M4", one_layer_is_no_other_kind, NO),
    ("M4", seeds_that_disagree, NO),
    ("M4", one_pair_in_many, NO),
    *((name, lambda f: f["grid"].pop(), UNKNOWN) for name in ("M4", "M5", "M6")),  # cut short
    ("M5", one_cell_type, NO),
    ("M5", ouros_norm_settles, NO),
    ("M5", branch_alone_wanders, YES),  # not a placement of that paper
    ("M6", seeds_that_disagree, NO),
    ("M6", one_cell_type, NO),
    ("M7", lambda f: regions(f, "limits").update(a=limits(ratio=0.4)), NO),
]  # fmt: skip


def test_states_that_stopped_being_finite_tell_nothing_in_whatever_region_they_are() -> None:
    for order in (["a", "b"], ["b", "a"]):
        found = results()
        for part in ("geometry", "limits"):
            inside = regions(found, part)
            broken = {**inside["a"], "nonfinite": 3}
            found["models"]["trained"][part]["regions"] = {n: {"a": inside["a"], "b": broken}[n] for n in order}
        judged = {f.name: f for f in judge(found)}
        for name in ("P1", "P2", "P4", "P5", "P8 net", "M7"):
            assert (judged[name].verdict, judged[name].reason) == (UNKNOWN, "states stopped being finite"), name


def test_numbers_that_are_not_there_are_no_error() -> None:
    found = results()
    found["models"]["trained"]["geometry"]["dlr"] = {"a -> b": {"noise": {"mean": None, "std": None, "median": None}}}
    regions(found, "limits")["a"].update(distinct=None)
    regions(found, "attention")["a"]["successive"][7] = [None] * 4
    judged = {f.name: f for f in judge(found)}
    for name in ("P8 noise", "M1", "M2"):
        assert (judged[name].verdict, judged[name].reason) == (UNKNOWN, "states stopped being finite"), name


@pytest.mark.parametrize(("name", "spoil", "verdict"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_each_rule_can_say_otherwise(name: str, spoil: Callable[[dict[str, Any]], None], verdict: str) -> None:
    found = results()
    spoil(found)
    assert verdicts(found)[name] == verdict


def test_every_claim_has_a_case_against_it_and_a_rule() -> None:
    names = {claim.name for claim in CLAIMS}
    assert {case[0] for case in CASES if case[2] == NO} | {"P8 injected", "P8 net without d_1"} == names
    assert all(claim.rule and claim.quantity for claim in CLAIMS)


def test_what_the_untrained_model_shares_is_said() -> None:
    found = results()
    found["models"]["untrained"] = copy.deepcopy(found["models"]["trained"])
    shared = {f.name for f in judge(found) if f.reason.endswith("the untrained model has it too")}
    assert shared == {"P1", "P2", "P4", "P5", "M1", "M2", "M3", "M7"} | {n for n in verdicts(found) if n[:3] == "P8 "}


def test_the_stages_of_the_untrained_model_stand_beside() -> None:
    found = results()
    stages = next(f for f in judge(found) if f.name == "M3")
    assert stages.untrained.keys() == stages.measured.keys()
    assert stages.untrained["first pass"].value < stages.measured["first pass"].value


def test_how_states_settle_stands_beside_how_attention_does() -> None:
    settles = next(f for f in judge(results()) if f.name == "M2")
    assert settles.measured["a"].value == pytest.approx(0.5**7)
    assert settles.measured["a, states"].value == pytest.approx(0.4**7)
    assert settles.untrained["a, states"].value == pytest.approx(0.4**7)
