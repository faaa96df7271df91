"""Oracle depths against a slow obvious loop, headroom against its definition, and regret."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from haltkit.headroom import Headroom, HeadroomAccount, RegretAccount, realised
from haltkit.headroom.clusters import ClusteredMean
from haltkit.headroom.oracles import best_depths, eps_loss_depths, right_depths, stable_depths

seeds = st.integers(0, 2**31)
DEFINITIONS = ("stable", "eps-loss", "right", "best")


def recorded(seed: int, steps: int = 6, shape: tuple[int, ...] = (3, 5)) -> dict[str, Tensor]:
    """Three possible predictions, so that coming back and being right by chance are frequent."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "predictions": torch.randint(3, (steps, *shape), generator=generator),
        "labels": torch.randint(3, shape, generator=generator),
        "losses": torch.randint(0, 5, (steps, *shape), generator=generator) / 4.0,
    }


def slow_depth(definition: str, predictions: list[int], losses: list[float], label: int, epsilon: float) -> int:
    """Step by step, as the definition reads; 0 if no step qualifies."""
    steps = len(predictions)
    for k in range(1, steps + 1):
        rest = range(k - 1, steps)
        if definition == "stable" and all(predictions[j] == predictions[-1] for j in rest):
            return k
        if definition == "right" and all(predictions[j] == label for j in rest):
            return k
        if definition == "eps-loss" and losses[k - 1] <= losses[-1] + epsilon:
            return k
        if definition == "best" and all(losses[k - 1] <= other for other in losses):
            return k
    return 0


@pytest.mark.parametrize("definition", DEFINITIONS)
@given(seed=seeds, steps=st.integers(1, 7), epsilon=st.sampled_from([0.0, 0.25, 0.6]))
def test_oracle_depths_are_what_a_loop_over_steps_finds(definition: str, seed: int, steps: int, epsilon: float) -> None:
    data = recorded(seed, steps)
    depths = {
        "stable": lambda: stable_depths(data["predictions"]),
        "right": lambda: right_depths(data["predictions"], data["labels"]),
        "eps-loss": lambda: eps_loss_depths(data["losses"], epsilon),
        "best": lambda: best_depths(data["losses"]),
    }[definition]()
    for b in range(3):
        for t in range(5):
            expected = slow_depth(
                definition,
                data["predictions"][:, b, t].tolist(),
                data["losses"][:, b, t].tolist(),
                int(data["labels"][b, t]),
                epsilon,
            )
            assert int(depths[b, t]) == expected


@given(seeds)
def test_an_answer_of_several_cells_is_settled_when_its_last_cell_is(seed: int) -> None:
    data = recorded(seed)
    whole = stable_depths(data["predictions"], item_dims=1)
    assert torch.equal(whole, stable_depths(data["predictions"]).amax(-1))
    right = right_depths(data["predictions"], data["labels"], item_dims=1)
    cells = right_depths(data["predictions"], data["labels"])
    assert torch.equal(right, torch.where((cells > 0).all(-1), cells.amax(-1), 0))


def test_a_loss_that_is_not_finite_is_never_best() -> None:
    losses = torch.tensor([[torch.nan, torch.nan], [torch.inf, torch.nan], [2.0, torch.nan], [2.0, torch.nan]])
    assert best_depths(losses).tolist() == [3, 0]


@pytest.mark.parametrize("definition", DEFINITIONS)
@given(seed=seeds)
def test_portions_add_up_to_the_whole_and_padding_does_not_count(definition: str, seed: int) -> None:
    data = recorded(seed, shape=(8, 5))
    present = torch.rand(8, 5, generator=torch.Generator().manual_seed(seed)) < 0.8
    present[0, 0] = True
    data["predictions"][-1] = data["labels"]  # so that every definition has rows
    whole, parts = (HeadroomAccount(6, definition, epsilon=0.25) for _ in range(2))
    whole.add(**data, present=present)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 8)):
        parts.add(
            **{name: x[rows] if name == "labels" else x[:, rows] for name, x in data.items()}, present=present[rows]
        )
    one, other = whole.result(), parts.result()
    assert one.histogram == other.histogram
    assert one.quality == other.quality
    assert one.losses == pytest.approx(other.losses)
    assert one.oracle_loss == pytest.approx(other.oracle_loss)
    assert one.mean_depth == pytest.approx(other.mean_depth)
    assert one.rows == int(present.sum())
    if one.error is not None:
        assert one.error == pytest.approx(other.error)


@given(seeds, st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_headroom_is_one_minus_mean_depth_over_the_best_fixed_depth(seed: int, level: float) -> None:
    data = recorded(seed, shape=(40,))
    account = HeadroomAccount(6, "stable")
    depths = account.add(predictions=data["predictions"])
    found = account.result()
    agreement = [(data["predictions"][k] == data["predictions"][-1]).double().mean().item() for k in range(6)]
    fixed = next(k for k in range(1, 7) if agreement[k - 1] >= level)
    assert found.fixed_depth(level) == fixed
    assert found.mean_depth == pytest.approx(depths.double().mean().item())
    assert found.headroom(level) == pytest.approx(1 - depths.double().mean().item() / fixed)
    assert sum(found.histogram) == found.rows == 40
    late = (depths + 2).clamp_max(6).double().mean().item()
    assert found.ceiling(level, lag=2, overhead=0.1) == pytest.approx(fixed / (1.1 * late))
    assert realised(fixed, found, level) in (0.0, None)
    if fixed > found.mean_depth:
        assert realised(found.mean_depth, found, level) == pytest.approx(1.0)


def test_uniform_depths_have_the_headroom_of_the_closed_form() -> None:
    """Queries of 1 to 16 hops, equally often: mean 8.5, and a fixed depth of 16 serves them all."""
    depths = torch.arange(1, 17)
    predictions = (torch.arange(1, 17).unsqueeze(1) >= depths).long()
    account = HeadroomAccount(16, "stable", region="chase")
    assert torch.equal(account.add(predictions=predictions), depths)
    found = account.result()
    assert found.headroom(1.0) == pytest.approx(1 - 8.5 / 16)
    assert found.ceiling(1.0) == pytest.approx(16 / 8.5)
    assert found.ceiling(1.0, lag=1) == pytest.approx(16 / ((sum(range(2, 17)) + 16) / 16))


def test_rows_that_are_wrong_at_full_depth_are_counted_apart() -> None:
    predictions = torch.tensor([[1, 0, 1], [1, 0, 0], [1, 0, 1]])
    account = HeadroomAccount(3, "right")
    account.add(predictions=predictions, labels=torch.ones(3, dtype=torch.int64))
    found = account.result()
    assert (found.rows, found.undefined) == (2, 1)
    assert found.histogram == (1, 0, 1)
    assert found.quality == (1.0, 0.5, 1.0)


def test_the_best_oracle_is_held_against_the_fixed_depth_of_least_mean_loss() -> None:
    losses = torch.tensor([[3.0, 1.0], [1.0, 2.0], [2.0, 2.5]])
    account = HeadroomAccount(3, "best")
    account.add(losses=losses)
    found = account.result()
    assert found.losses == (2.0, 1.5, 2.25)
    assert found.oracle_loss == 1.0
    assert found.fixed_depth() == 2
    assert found.headroom() == pytest.approx(1 - 1.5 / 2)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_headroom_comes_back_from_json_as_it_was(definition: str) -> None:
    data = recorded(0)
    account = HeadroomAccount(6, definition)
    account.add(**data)
    found = account.result()
    assert Headroom.from_json(found.to_json()) == found
    for text in ("", "[]", "{}", found.to_json().replace("region", "place")):
        with pytest.raises(ValueError, match="headroom"):
            Headroom.from_json(text)


def test_the_clustered_error_is_that_of_a_bootstrap_over_sequences() -> None:
    """Rows of one sequence share most of their value; rows by themselves would claim a fifth of the error."""
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(60, 1, generator=generator)
    values = level + 0.1 * torch.randn(60, 50, generator=generator)
    account = ClusteredMean()
    account.add(values.flatten(), torch.arange(60).repeat_interleave(50))
    means = [float(values[torch.randint(60, (60,), generator=generator)].mean()) for _ in range(2000)]
    spread = float(torch.tensor(means).std())
    assert account.mean == pytest.approx(float(values.mean()), rel=1e-5)
    assert account.error == pytest.approx(spread, rel=0.1)
    assert account.error > 5 * float(values.std()) / math.sqrt(values.numel())


def test_memory_does_not_grow_with_the_text() -> None:
    def numbers(portions: int) -> int:
        account = HeadroomAccount(6, "stable")
        for seed in range(portions):
            account.add(predictions=recorded(seed)["predictions"])
        held = [v for v in vars(account).values() if isinstance(v, Tensor)]
        return sum(v.numel() for v in held) + account._depths._sums.numel()

    assert numbers(1) == numbers(20)


@given(seeds)
def test_regret_is_waste_and_haste_apart(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps, depths = torch.randint(1, 9, (4, 6), generator=generator), torch.randint(0, 9, (4, 6), generator=generator)
    depths[0, 0] = 3
    account = RegretAccount()
    account.add(steps[:2], depths[:2])
    account.add(steps[2:], depths[2:])
    pairs = [(s, d) for s, d in zip(steps.flatten().tolist(), depths.flatten().tolist(), strict=True) if d]
    found = account.result()
    assert found.rows == len(pairs)
    assert found.wasted == pytest.approx(sum(max(0, s - d) for s, d in pairs) / len(pairs))
    assert found.early == pytest.approx(sum(s < d for s, d in pairs) / len(pairs))


@pytest.mark.parametrize(
    "call",
    [
        lambda d: HeadroomAccount(6, "hindsight"),
        lambda d: HeadroomAccount(0),
        lambda d: HeadroomAccount(6, "eps-loss", epsilon=-1.0),
        lambda d: HeadroomAccount(6, "stable").add(losses=d["losses"]),
        lambda d: HeadroomAccount(6, "right").add(predictions=d["predictions"]),
        lambda d: HeadroomAccount(6, "right").add(predictions=d["predictions"], labels=d["labels"][:1]),
        lambda d: HeadroomAccount(6, "best").add(predictions=d["predictions"]),
        lambda d: HeadroomAccount(5, "stable").add(predictions=d["predictions"]),
        lambda d: HeadroomAccount(6, "stable").add(predictions=d["predictions"], losses=d["losses"][:, :1]),
        lambda d: HeadroomAccount(6, "stable").add(
            predictions=d["predictions"], present=torch.ones(3, dtype=torch.bool)
        ),
        lambda d: HeadroomAccount(6, "stable").add(predictions=d["predictions"], sequence=torch.zeros(3)),
        lambda d: HeadroomAccount(6, "best").add(losses=torch.cat([d["losses"][:5], d["losses"][:1] / 0])),
        lambda d: HeadroomAccount(6, "stable", item_dims=3).add(predictions=d["predictions"]),
        lambda d: HeadroomAccount(6, "stable").result(),
        lambda d: stable_depths(d["predictions"][:0]),
        lambda d: RegretAccount().result(),
        lambda d: RegretAccount().add(d["labels"], d["predictions"]),
    ],
)
def test_what_cannot_be_accounted_for_is_refused(call: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        call(recorded(0))


def test_a_level_outside_its_range_is_refused() -> None:
    account = HeadroomAccount(6, "stable")
    account.add(predictions=recorded(0)["predictions"])
    for level in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="level"):
            account.result().headroom(level)
