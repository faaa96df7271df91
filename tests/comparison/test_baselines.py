"""Baselines that leave no excuse: depths by kind of row, and the oracle, each against brute force or a closed form."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from countdown import BY_HOPS, STEPS, countdown
from hypothesis import example, given
from hypothesis import strategies as st

import haltkit
from haltkit.comparison import Comparison, Row
from haltkit.comparison.baselines import GOALS, allocate, refine
from haltkit.driving import ByModules
from haltkit.kinds import Kinds
from haltkit.setting import Setting


@pytest.fixture(scope="module")
def result() -> Comparison:
    return haltkit.compare(countdown(kinds=BY_HOPS), policies="norm:tau=0.5", repeats=2)


def rows(result: Comparison, decided: str) -> list[Row]:
    return [row for row in result.rows if row.decided == decided]


def test_each_kind_gets_the_depth_that_its_rows_need(result: Comparison) -> None:
    needed = next(row for row in rows(result, "kind") if row.agreement == 1)
    assert needed.label == "fixed by hops: near 1, far 5"
    assert needed.steps == {"loop": 3.0}
    assert needed.loss == 0
    assert needed.policy == "fixed"
    assert min(row.steps["loop"] for row in rows(result, "depth") if row.agreement == 1) == 5


def test_the_oracle_leaves_each_row_when_it_has_settled_and_some_steps_later(result: Comparison) -> None:
    found = {row.label: row.steps["loop"] for row in rows(result, "oracle")}
    assert found == {"oracle": 3.0, "oracle + 1": 4.0, "oracle + 2": 5.0, "oracle + 4": 6.5}
    assert all(row.agreement == 1 for row in rows(result, "oracle"))


def test_the_oracle_is_no_policy_and_no_depth_that_anybody_can_pick(result: Comparison) -> None:
    quick = {"ms": 1e-9, "ms_repeats": (1e-9, 1e-9)}
    changed = [replace(row, **quick) if row.oracle else row for row in result.rows]  # type: ignore[arg-type]
    concluded = replace(result, rows=tuple(changed)).conclusion()
    assert result.policies == ["norm"]
    assert concluded.winner is not None
    assert concluded.winner.decided == "policy"
    assert concluded.fixed is not None
    assert not concluded.fixed.oracle
    for finding in concluded.findings:
        assert finding.oracle is not None
        assert finding.oracle.ms == 1e-9
        assert finding.fixed is not finding.oracle


def test_what_the_oracle_reaches_for_sure_decides_nothing(result: Comparison) -> None:
    """Full depth alone is good for sure, a policy may be, and the oracle is: there are too few items to tell."""
    full, oracle = result.rows[0], next(row for row in result.rows if row.oracle)
    maybe = replace(next(row for row in result.rows if row.decided == "policy"), delta=0.0, delta_se=1.0, agreement=0.5)
    surely = replace(oracle, delta=-1.0, delta_se=0.0, agreement=0.5)
    assert replace(result, rows=(full, maybe, surely)).conclusion().undecided


def test_a_policy_is_held_against_the_depths_by_kind_where_they_are_faster(result: Comparison) -> None:
    speed = {"kind": (2.0, 2.0), "depth": (4.0, 4.0), "policy": (3.0, 3.0), "oracle": (1.0, 1.0)}
    timed = [replace(row, ms=speed[row.decided][0], ms_repeats=speed[row.decided]) for row in result.rows]
    for finding in replace(result, rows=tuple(timed)).conclusion().findings:
        assert finding.fixed is not None
        assert finding.fixed.decided == "kind"
        assert finding.one_depth is not None
        assert finding.one_depth.decided == "depth"
        assert finding.against_fixed == "slower"


def test_what_decides_comes_back_from_json_and_is_known_of_older_files(result: Comparison) -> None:
    values = result.to_json()
    assert [row.decided for row in Comparison.from_json(values).rows] == [row.decided for row in result.rows]
    for row in values["rows"]:
        del row["decided"]
    older = Comparison.from_json({**values, "rows": [r for r in values["rows"] if r["policy"] in ("fixed", "norm")]})
    assert {row.decided for row in older.rows if row.depth is not None} == {"depth"}
    assert [row.decided for row in older.rows if row.policy == "norm"] == ["policy"]
    with pytest.raises(ValueError, match="decided"):
        Comparison.from_json({**values, "rows": [{**values["rows"][0], "decided": "dice"}]})


def test_kinds_that_need_the_same_depth_are_given_the_fixed_depth() -> None:
    alternate = Kinds(lambda inputs: torch.arange(inputs.shape[-3]) % 2, ("even", "odd"))
    found = haltkit.compare(countdown(kinds=alternate), policies="norm:tau=0.5", repeats=1)
    assert not rows(found, "kind")
    assert found.about["kinds"] == "kind of row"


def test_where_rows_cannot_leave_there_is_neither() -> None:
    found = haltkit.compare(countdown(by_row=False), policies="norm:tau=0.5", repeats=1)
    assert {row.decided for row in found.rows} == {"depth", "policy"}
    found = haltkit.compare(countdown(kinds=BY_HOPS), policies="norm:tau=0.5", repeats=1, recorded=0)
    assert {row.decided for row in found.rows} == {"depth", "policy"}


@pytest.mark.parametrize("missing", ["logits", "readout"])
def test_kinds_without_what_depths_are_looked_for_by_are_refused(missing: str) -> None:
    with pytest.raises(ValueError, match=f"kinds=.* no {missing}"):
        haltkit.compare(countdown(kinds=BY_HOPS, **{missing: None}), policies="norm:tau=0.5", repeats=1)


def test_kinds_of_a_model_that_cannot_be_told_its_depth_are_refused_for_that_reason() -> None:
    subject = countdown(kinds=BY_HOPS)
    assert isinstance(subject.driver, ByModules)
    stubborn = replace(subject.driver, run=lambda inputs, _: subject.model(inputs, STEPS - 1))
    with pytest.raises(ValueError, match=f"kinds=.* ran {STEPS - 1} steps"):
        haltkit.compare(replace(subject, driver=stubborn), policies="norm:tau=0.5", repeats=1)


@pytest.mark.parametrize(
    ("kinds", "named"),
    [
        (Kinds(lambda inputs: inputs[..., 0].long(), ("near", "far")), r"kind 5.* 0 to 1 \(near, far\)"),
        (Kinds(lambda inputs: inputs[..., 0].long() - 2), "kind -1.* from 0"),
        (Kinds(lambda inputs: torch.zeros(3, 5, dtype=torch.int64)), r"kinds \(3, 5\) for rows \(3, 8\)"),
    ],
)
def test_kinds_that_are_none_are_refused_by_name(kinds: Kinds, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        haltkit.compare(countdown(kinds=kinds), policies="norm:tau=0.5", repeats=1)


def test_where_sequences_halt_as_one_depths_by_kind_are_judged_by_whole_sequences() -> None:
    """19 of 20 rows of every sequence settle at step 1, and no sequence before step 5: depth 1 is good for nothing."""
    hops = torch.tensor([1.0] * 19 + [5.0]).repeat(4, 1)
    sample = torch.stack([hops, torch.zeros_like(hops)], -1)
    alternate = Kinds(lambda inputs: torch.arange(len(inputs)) % 2, ("even", "odd"))
    subject = countdown(kinds=alternate, samples=[sample], granularity="sequence")
    found = haltkit.compare(subject, policies="norm:tau=0.5", repeats=1)
    tried = {row.steps["loop"] for row in found.rows if row.fixed}
    assert 1 not in tried
    assert 5 in tried


def test_many_kinds_are_given_depths_by_their_recordings() -> None:
    """Kind 9 occurs nowhere; the others are told apart by hops, in numbers."""
    many = Kinds(lambda inputs: 2 * inputs[..., 0].long(), tuple(map(str, range(12))))
    found = haltkit.compare(countdown(kinds=many), policies="norm:tau=0.5", repeats=1)
    (needed,) = (row for row in rows(found, "kind") if row.agreement == 1)
    assert needed.steps == {"loop": 3.0}


tables = st.integers(1, 3).flatmap(
    lambda kinds: st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=kinds, max_size=kinds)
)


def test_so_many_kinds_that_each_would_be_learned_by_heart_are_left_to_a_table() -> None:
    ids = Kinds(lambda inputs: (1000 * inputs[..., 0]).long(), what="token id")
    result = haltkit.compare(countdown(kinds=ids), policies="norm:tau=0.5", repeats=1)
    assert not rows(result, "kind")
    assert "kinds" not in result.about


@given(tables, st.sampled_from((0.5, 0.7, 0.9, *GOALS)))
@example([[3, 0, 3, 4, 2], [0, 4, 0, 1, 0], [3, 3, 0, 2, 0]], 0.9)  # prices alone cost more than one depth for all
@example([[0, 0, 5, 0, 5], [0, 0, 5, 0, 5], [5, 0, 0, 0, 0]], 0.9)  # a price lowers two kinds at once, or neither
def test_allocated_depths_reach_the_goal_and_none_can_be_lowered(counts: list[list[int]], goal: float) -> None:
    settled = torch.tensor(counts)
    found, by_then, of = allocate(settled, goal), settled.cumsum(1), settled.sum(1)

    def reaches(depths: tuple[int, ...]) -> bool:
        return sum(int(by_then[i, d - 1]) if d else 0 for i, d in enumerate(depths)) >= goal * int(settled.sum())

    def cost(depths: tuple[int, ...]) -> int:
        return sum(int(n) * d for n, d in zip(of, depths, strict=True))

    assert reaches(found)
    every = [depths for depths in product(range(1, 6), repeat=len(counts)) if reaches(depths)]
    best, uniform = (
        min(map(cost, every)),
        min(cost((d,) * len(counts)) for d in range(1, 6) if (d,) * len(counts) in every),
    )
    assert best <= cost(found) <= uniform
    if goal == 1:
        assert cost(found) == best
    for kind, depth in enumerate(found):
        if depth > 1 and int(of[kind]):
            assert not reaches((*found[:kind], depth - 1, *found[kind + 1 :]))


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_coordinate_search_finds_what_each_kind_needs(needed: tuple[int, int], weights: tuple[int, int]) -> None:
    def agreement(point: tuple[int, ...]) -> float:
        return float(all(d >= n for d, n in zip(point, needed, strict=True)))

    assert refine(agreement, weights, 9, 0.99) == needed


@given(st.integers(1, 12))
def test_coordinate_search_stays_at_one_depth_where_kinds_depend_on_each_other(needed: int) -> None:
    """As on chase: a query reads the edges, so both need the deepest depth, and few points are run to see that."""
    run: list[tuple[int, ...]] = []

    def agreement(point: tuple[int, ...]) -> float:
        run.append(point)
        return min(1.0, min(point) / needed)

    assert refine(agreement, (1, 1), 48, 1.0) == (needed, needed)
    assert len(set(run)) <= 10


def test_coordinate_search_raises_one_kind_for_the_other_to_be_lowered() -> None:
    """All at 6 is good; (7, 2) is too, and no coordinate of (6, 6) can be lowered by itself."""

    def agreement(point: tuple[int, ...]) -> float:
        return float(min(point) >= 6 or (point[0] >= 7 and point[1] >= 2))

    assert refine(agreement, (1, 1), 9, 1.0) == (7, 2)


def test_an_oracle_setting_is_labelled_as_one_and_runs_by_sample() -> None:
    subject = countdown(count=1)
    found = haltkit.compare(subject, policies="norm:tau=0.5", repeats=1)
    oracle = next(row.setting for row in found.rows if row.label == "oracle")
    assert isinstance(oracle, Setting)
    assert oracle.by_row is not None
    assert oracle.by_row.hindsight
    steps = subject.run(subject.samples[0], oracle).steps["loop"]
    assert torch.equal(steps, subject.samples[0][..., 0].long())
