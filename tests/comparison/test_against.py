"""Policies beside the oracle: each one is there, with its regret, its share of the headroom and what is promised."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from countdown import BY_HOPS, countdown
from rich.console import Console

import haltkit
from haltkit.cli.oracles import print_regret
from haltkit.comparison import Comparison
from haltkit.comparison.conclusions import within


@pytest.fixture(scope="module")
def result() -> Comparison:
    """Countdown: ``norm`` at two thresholds that lose nothing and one that loses much; ``accel`` only loses."""
    return haltkit.compare(countdown(), policies="norm,accel:tau=1000", taus=[0.25, 0.5, 1000.0], repeats=1)


def test_each_policy_is_held_against_the_oracle_also_one_that_is_not_good_enough(result: Comparison) -> None:
    found = result.against_oracle()
    assert list(dict.fromkeys(one.policy for one in found)) == result.policies
    rows = {row.label: row for row in result.rows}
    assert {one.good for one in found} == {True, False}
    for one in found:
        row, known = rows[one.setting], result.headroom[one.region].headroom
        assert one.good == (within(row, result.conclusion().level) == "yes")
        regret = row.regret[one.region]
        assert (one.steps, one.wasted, one.early) == (regret.steps, regret.wasted, regret.early)
        assert (one.oracle, one.fixed) == (known.mean_depth, known.fixed_depth(0.99))
        if one.good:
            assert one.realised == pytest.approx((one.fixed - one.steps) / (one.fixed - one.oracle))
            own = [r for r in result.rows if r.policy == one.policy and within(r, result.conclusion().level) == "yes"]
            assert row.ms == min(r.ms for r in own)
        else:
            assert one.realised is None
            assert row.delta == min(r.delta for r in result.rows if r.policy == one.policy)


def _printed(result: Comparison, width: int) -> str:
    file = io.StringIO()
    print_regret(Console(file=file, width=width, force_terminal=False), result)
    return file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 140])
def test_a_certified_setting_is_named_with_its_promise_even_if_it_is_not_the_fastest(
    result: Comparison, width: int
) -> None:
    slow = max((row for row in result.rows if row.policy == "norm" and row.delta == 0), key=lambda row: row.ms)
    rows = tuple(replace(row, promise="it will hold") if row is slow else row for row in result.rows)
    certified = replace(result, rows=rows)
    assert slow.label not in [one.setting for one in result.against_oracle()]
    assert certified.certified == (next(row for row in rows if row.promise),)
    assert [one.setting for one in certified.against_oracle() if one.certified] == [slow.label]
    text = " ".join(_printed(certified, width).split())
    assert f"{slow.spec}" in text
    assert f"{slow.speedup:.2f}x full depth" in text
    assert "certified: it will hold" in text
    assert f"{slow.label} +" in text or f"{slow.label} * +" in text
    assert "certified" not in _printed(result, width)
    assert all(len(line) <= width for line in _printed(certified, width).splitlines())


def test_the_file_of_a_comparison_has_its_conclusion(result: Comparison) -> None:
    values = json.loads(json.dumps(result.to_json(), allow_nan=False))
    said = values["conclusion"]
    concluded = result.conclusion()
    assert said["winner"] == (concluded.winner.label if concluded.winner else None)
    assert said["fixed"] == (concluded.fixed.label if concluded.fixed else None)
    assert (said["fixed_serves_best"], said["undecided"]) == (concluded.fixed_serves_best, concluded.undecided)
    assert len(said["against_oracle"]) == len(result.against_oracle())
    known = result.headroom["loop"].headroom
    assert said["headroom"]["loop"]["headroom"] == known.headroom(0.99)
    assert said["headroom"]["loop"]["conclusion"] == result.headroom["loop"].conclusion(0.99)
    assert said["certified"] == []
    assert json.loads(json.dumps(Comparison.from_json(values).to_json())) == values


def test_nothing_is_held_against_an_oracle_that_is_not_known(result: Comparison) -> None:
    unknown = replace(result, headroom={}, rows=tuple(replace(row, regret={}) for row in result.rows))
    assert unknown.against_oracle() == ()
    assert _printed(unknown, 80) == ""
    assert unknown.to_json()["conclusion"]["headroom"] == {}


def test_whoever_waits_is_told_what_is_being_done() -> None:
    told: list[str] = []
    haltkit.compare(countdown(kinds=BY_HOPS), policies="norm:tau=0.5", repeats=1, on_doing=told.append)
    assert [line.split()[0] for line in dict.fromkeys(line.partition(",")[0] for line in told)] == [
        "recording",
        "looking",
        "looking",
        "measuring",
    ]
    assert told[-2].endswith(f"try {len(told) - 3}")
    short: list[str] = []
    haltkit.compare(countdown(), policies="norm:tau=0.5", repeats=1, recorded=0, on_doing=short.append)
    assert not any("looking" in line for line in short)
