"""Each rule of [P] on a diagnosis made up so that the answer is known."""

from __future__ import annotations

from typing import Any

import pytest

from diagnoses import NO, UNKNOWN, YES, Spoil, change, dlr, region, regions, results, row, rows, rulings
from haltkit.diagnostics.claims import two_scale, two_scale_policies
from haltkit.diagnostics.compared import read_comparison


def all_snapshots_alike(found: dict[str, Any]) -> None:
    for one in found["snapshots"]:
        one["regions"]["a"] = region()


def low_dlr(found: dict[str, Any]) -> None:
    found["snapshots"][1]["dlr"] = dlr(1.2)  # one snapshot is enough


def young(found: dict[str, Any]) -> None:
    found["about"].update(tokens_seen=2e6)


def flat_policies(found: dict[str, Any]) -> None:
    for r in found["comparison"]["rows"]:
        r["loss"] = 5.0


def flat_kl(found: dict[str, Any]) -> None:
    for r in rows(found, "kl"):
        r["loss"] = 5.0


def disagreeing_repeats(found: dict[str, Any]) -> None:
    for r in found["comparison"]["rows"]:
        r["ms_repeats"] = [r["ms"], 1.0 if r["policy"] == "kl" else 7.0]


def slow_accel(found: dict[str, Any]) -> None:
    for r in rows(found, "accel"):
        r["ms"] = 9.0


def oracle(found: dict[str, Any]) -> None:
    """Faster than any policy, and none."""
    found["comparison"]["rows"].append({**row("oracle", 1.0, 5.0, 0.1), "tau": None, "decided": "oracle"})


def young_and(spoil: Spoil) -> Spoil:
    return lambda found: (spoil(found), young(found))


def step_norms(norms: list[float]) -> Spoil:
    return lambda found: regions(found)["a"].update(step_norm_mean=norms)


CASES: list[tuple[str, Spoil, str]] = [
    ("P1", change(rate=0.9), NO),
    ("P2", change(cosine=-0.4, least=1e-3), NO),
    ("P2", young_and(change(cosine=-0.4, least=1e-3)), UNKNOWN),
    ("P2", young_and(change(least=1e-3)), YES),
    ("P3", all_snapshots_alike, NO),
    ("P3", lambda f: f["snapshots"].pop(), YES),
    ("P3", lambda f: f.update(snapshots=f["snapshots"][:3]), UNKNOWN),
    ("P4", change(rate=0.5), NO),
    ("P4", change(rate=0.9), NO),  # still shrinking
    ("P4", change(rate=1.0), NO),  # a slider: at no small value
    ("P4", change(rate=1.2), NO),  # growing
    ("P4", step_norms([10.0 * 0.5**k for k in range(24)] + [1e-3] * 8), NO),
    ("P4", step_norms([0.9] + [0.0] * 31), NO),  # x -> 0.1 x + 1 lands on its limit
    ("P5", change(curvature=0.0), UNKNOWN),
    ("P5", lambda f: regions(f)["a"].update(curvature_mean=[None, *[1.3**k for k in range(31)]]), NO),
    ("P6", all_snapshots_alike, NO),
    ("P7", all_snapshots_alike, NO),
    ("P8 noise", low_dlr, NO),
    ("P8 injected", low_dlr, NO),
    ("P8 net", low_dlr, NO),
    ("P8 net without d_1", low_dlr, NO),
    ("P9", slow_accel, NO),
    ("P10", slow_accel, NO),
    ("P9", disagreeing_repeats, UNKNOWN),
    ("P10", disagreeing_repeats, UNKNOWN),
    ("P13", disagreeing_repeats, UNKNOWN),
    ("P14", disagreeing_repeats, UNKNOWN),
    ("P11", flat_policies, NO),
    ("P12", flat_policies, UNKNOWN),
    ("P12", flat_kl, NO),
    ("P13", slow_accel, NO),
    ("P14", slow_accel, NO),
    ("P14", oracle, YES),
]


@pytest.mark.parametrize(("name", "spoil", "ruling"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_each_rule_can_say_otherwise(name: str, spoil: Spoil, ruling: str) -> None:
    found = results()
    spoil(found)
    assert rulings(found)[name] == ruling


def test_every_claim_has_a_case_against_it() -> None:
    names = {claim.name for claim in (*two_scale.CLAIMS, *two_scale_policies.CLAIMS)}
    assert {name for name, _, ruling in CASES if ruling == NO} == names


def test_rows_of_a_comparison_of_before_are_judged_alike() -> None:
    found = results()
    names = {"loss": "ce", "delta": "delta_ce", "delta_se": "delta_ce_se", "ms": "ms_per_token"}
    new = {"unit", "depth", "label"}
    before = [
        {names.get(key, key): value for key, value in one.items() if key not in new} | {"ppl": 1.0}
        for one in found["comparison"]["rows"]
    ]
    old = {"tokens": 64, "sequences": 4, "timed_tokens": 16, "rows": before}
    assert rulings({**found, "comparison": old}) == rulings(found)


def test_a_file_of_before_has_no_module_imported_that_its_specs_name() -> None:
    old = row("own", 1.0, 5.0, 2.0)
    old = {"ce": 5.0, "ppl": 1.0, "delta_ce": 0.0, "delta_ce_se": 0.0, "ms_per_token": 2.0, **old}
    for spec in ("no_such_module:Policy:tau=1", "a=no_such_module:Policy;b=fixed:steps=2"):
        document = {"tokens": 4, "sequences": 2, "timed_tokens": 4, "rows": [{**old, "spec": spec}]}
        assert read_comparison(document).rows[0].spec == spec
