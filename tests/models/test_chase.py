"""Chase: the laws of its generator, bad forests, and the bundled model."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haltkit.models.chase.forest import make_forest, path, read_forest
from haltkit.models.chase.task import Chase, ChaseSettings
from haltkit.models.chase.trees import chains, hops_and_roots, trees
from haltkit.models.config import ConfigError
from haltkit.models.reasoner.checkpoint import bundled_reasoner
from haltkit.models.reasoner.measure import curve, predictions
from haltkit.models.reasoner.task import IGNORED, Batch, make_task

SMALL = ChaseSettings(names=20, nodes=10, first_nodes=5, longest=16, depths=(1, 2, 4, 8))


def check(batch: Batch, names: int, deepest: int) -> None:
    """Each query's label and needed steps are what following the edges of its own sequence finds."""
    for inputs, labels, needed in zip(batch.inputs.tolist(), batch.labels.tolist(), batch.needed.tolist(), strict=True):
        nodes = len(inputs) // 2
        parents = {source: target for source, target, _ in inputs[:nodes]}
        assert len(parents) == nodes  # names are distinct
        assert all(query == 0 and 1 <= source <= names for source, _, query in inputs[:nodes])
        assert sorted(query for _, _, query in inputs[nodes:]) == sorted(parents)
        assert all(label == IGNORED for label in labels[:nodes])
        for (source, target, query), label, hops in zip(inputs[nodes:], labels[nodes:], needed[nodes:], strict=True):
            assert source == target == 0
            way = path(parents, query)
            assert (way[-1] - 1, len(way) - 1) == (label, hops)
            assert hops <= deepest


@given(seed=st.integers(0, 10**6), level=st.integers(0, 3))
def test_training_batches_are_forests_no_deeper_than_their_level(seed: int, level: int) -> None:
    task = Chase(SMALL)
    batch = task.sample(np.random.default_rng(seed), level, 4)
    check(batch, 20, task.levels[level].depth)
    again = task.sample(np.random.default_rng(seed), level, 4)
    assert torch.equal(batch.inputs, again.inputs)


@given(seed=st.integers(0, 1000))
def test_test_sets_depend_on_their_seed_alone(seed: int) -> None:
    sets = Chase(SMALL).test_sets(3, seed)
    assert list(sets) == ["chains", "trees", "long"]
    for name, batch in sets.items():
        check(batch, 20, batch.inputs.shape[1])
        assert torch.equal(batch.inputs, Chase(SMALL).test_sets(3, seed)[name].inputs)
    assert sets["long"].inputs.shape[1] == 32


def test_chains_are_of_geometric_length_and_trees_are_trees() -> None:
    hops, _ = hops_and_roots(chains(np.random.default_rng(0), 4000, 32, 0.2, 32))
    starts = (hops[:, 1:] == 0).mean()
    assert abs(starts - 0.2) < 0.01
    deepest = hops[:, -1]  # geometric, cut off by the number of nodes
    assert abs((deepest >= 5).mean() - 0.8**5) < 0.03
    hops, roots = hops_and_roots(trees(np.random.default_rng(0), 1000, 64))
    assert (roots == 0).all()
    harmonic = sum(1 / i for i in range(1, 64))
    assert abs(hops[:, -1].mean() - harmonic) < 0.3


def test_nothing_in_the_input_tells_the_hops() -> None:
    """The names, and where edges and queries stand, are independent of depth."""
    batch = Chase(ChaseSettings()).test_sets(600, 0)["chains"]
    nodes = batch.inputs.shape[1] // 2
    hops = batch.needed[:, nodes:].double().flatten()
    for cause in (torch.arange(nodes).double().repeat(600), batch.inputs[:, nodes:, 2].double().flatten()):
        correlation = torch.corrcoef(torch.stack([hops, cause]))[0, 1]
        assert abs(float(correlation)) < 0.03


@given(st.dictionaries(st.integers(0, 19), st.integers(0, 19), min_size=1, max_size=12))
def test_a_given_forest_is_encoded_or_refused_in_one_line(parents: Mapping[int, int]) -> None:
    stray = set(parents.values()) - set(parents)
    at = set(parents)
    for _ in parents:  # where everybody is after so many hops: roots, unless there is a cycle
        at = {parents.get(node, node) for node in at}
    if stray or any(parents[node] != node for node in at):
        with pytest.raises(ValueError, match=r"^[^\n]*(no node of the forest|is a cycle)[^\n]*$"):
            make_forest(parents, SMALL.names, SMALL.longest)
    else:
        forest = make_forest(parents, SMALL.names, SMALL.longest)
        check(forest.batch, 20, 20)
        assert forest.batch.inputs[0, :, 0].tolist()[: len(parents)] == [name + 1 for name in parents]


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ({}, "an empty forest"),
        ({1: 2, 2: 3, 3: 1}, "1 -> 2 -> 3 -> 1 is a cycle"),
        ({0: 0, 5: 7, 7: 9, 9: 7}, "7 -> 9 -> 7 is a cycle"),
        ({1: 99}, "unknown name 99: names are the numbers 0 to 19"),
        ({-1: -1}, "unknown name -1"),
        ({1: 4}, "node 1 points to 4, which is no node"),
        ({i: i for i in range(17)}, "17 nodes: the model takes at most 16"),
    ],
)
def test_bad_forests_are_named(parents: Mapping[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_forest(parents, SMALL.names, SMALL.longest)


def test_a_written_forest_is_read_with_its_names_and_queries() -> None:
    forest = read_forest("ann>bob bob>cy cy dee>cy ann? dee?", 20, 16)
    right = [forest.nodes[2]] * 4
    assert forest.right(right)
    assert forest.right([2, 7, 7, 2])  # nobody asked for bob and cy
    assert not forest.right([7, 2, 2, 2])
    assert forest.show(right, [3, 2, 1, 2]).splitlines() == [
        "ann: cy  in 3 steps (2 hops)",
        "dee: cy  in 2 steps (1 hop)",
    ]
    assert read_forest("a>b b", 20, 16).show([1, 9]).splitlines() == ["a: b", "b: #9"]


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("a>b b>a", "a -> b -> a"),
        ("a>b", "'b'"),
        ("a>a b?", "'b'"),
        ("a>b a>c b c", "two parents"),
        ("a>", "'a>'"),
        ("a>b>c", "'a>b>c'"),
        ("?", "'?'"),
        ("", "empty forest"),
        (" ".join(f"n{i}" for i in range(17)), "at most 16"),
    ],
)
def test_a_forest_that_cannot_be_read_is_refused_by_what_is_wrong(text: str, token: str) -> None:
    with pytest.raises(ValueError, match=re.escape(token)):
        read_forest(text, 20, 16)


def test_cycles_in_arrays_are_found() -> None:
    with pytest.raises(ValueError, match="2 -> 3 -> 1 -> 2 go round in a circle"):
        hops_and_roots(np.array([[0, 2, 3, 1]]))


@pytest.mark.parametrize(
    "settings", [{"nodes": 100}, {"depths": [2, 1]}, {"depths": [40]}, {"chain_ends": [0.0]}, {"rows": 0}]
)
def test_settings_that_do_not_work_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        make_task("chase", settings)


@torch.no_grad()
def test_the_bundled_model_is_as_right_as_its_card_says() -> None:
    loaded = bundled_reasoner("chase")
    for name, steps, least in (("chains", 32, 0.998), ("trees", 16, 0.998), ("long", 96, 0.99)):
        batch = loaded.task.test_sets(8, 11)[name]
        shares = curve(predictions(loaded.model, batch, steps), batch)
        assert shares.rows[-1] >= least, name
        hops = batch.needed[batch.asked]
        right = (predictions(loaded.model, batch, 3)[2] == batch.labels)[batch.asked]
        assert right[hops <= 1].double().mean() > 0.9  # one hop a step: near ones are there early,
        assert right[hops >= 6].double().mean() < 0.2  # far ones are not
