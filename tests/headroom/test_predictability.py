"""The area under the curve against the pairwise definition, its error against a bootstrap, and the probe."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from haltkit.cli.oracles import describe_auc
from haltkit.headroom import Auc, AucAccount, auc, fit_logistic, probe_by_step, split_by_sequence

seeds = st.integers(0, 2**31)


def pairwise(scores: Tensor, settled: Tensor) -> float:
    """How often a settled row has the smaller score, over all pairs; ties count half."""
    low, high = scores[settled].tolist(), scores[~settled].tolist()
    wins = sum(1.0 if a < b else 0.5 if a == b else 0.0 for a in low for b in high)
    return wins / (len(low) * len(high)) if low and high else math.nan


@given(seeds, st.booleans())
def test_the_area_is_the_pairwise_definition(seed: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(4, (30,), generator=generator).double() if ties else torch.randn(30, generator=generator)
    settled = torch.rand(30, generator=generator) < 0.5
    assert auc(scores, settled).value == pytest.approx(pairwise(scores, settled), nan_ok=True)


def test_infinity_is_a_score_and_nan_is_none() -> None:
    scores = torch.tensor([torch.inf, 1.0, torch.inf, 2.0, torch.nan])
    settled = torch.tensor([False, True, True, False, True])
    assert auc(scores, settled).value == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert auc(torch.full((4,), torch.inf), torch.tensor([True, False, True, False])).value == 0.5


def test_an_area_without_both_kinds_or_an_error_from_one_sequence_is_unknown() -> None:
    assert math.isnan(auc(torch.randn(5), torch.ones(5, dtype=torch.bool)).value)
    assert math.isnan(auc(torch.randn(1, 5), torch.tensor([[True, False, True, True, False]])).error)
    one = torch.ones(6, 5, dtype=torch.bool)
    one[2, 1:3] = False  # what is not settled is all in one sequence: nothing is known of the next
    assert math.isnan(auc(torch.randn(6, 5), one).error)
    one[4, 0] = False
    assert auc(torch.randn(6, 5), one).error > 0


def sequences(seed: int, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Scores whose level is the sequence's own, for settled rows and the others."""
    generator = torch.Generator().manual_seed(seed)
    settled = torch.rand(count, length, generator=generator) < torch.rand(count, 1, generator=generator)
    level = torch.randn(count, 1, generator=generator)
    return level + 0.5 * torch.randn(count, length, generator=generator) - 0.7 * settled, settled


def test_the_clustered_error_is_the_spread_over_new_draws_of_sequences() -> None:
    found = [auc(*sequences(seed, 40, 20)) for seed in range(300)]
    spread = float(torch.tensor([area.value for area in found]).std())
    typical = float(torch.tensor([area.error for area in found]).mean())
    assert typical == pytest.approx(spread, rel=0.15)
    rows = [auc(*(x.flatten() for x in sequences(seed, 40, 20))).error for seed in range(20)]
    assert typical > 1.5 * sum(rows) / 20  # rows taken for independent would claim less


@given(seeds)
def test_counting_in_portions_gives_the_exact_area_to_a_bin(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    depths = torch.randint(0, 5, (24, 10), generator=generator)
    settled = torch.arange(1, 5).view(-1, 1, 1) >= depths
    scores = {
        "norm": torch.exp(3 * torch.randn(4, 24, 10, generator=generator) - 2 * settled),
        "signed": torch.randn(4, 24, 10, generator=generator) - 1.0 * settled,
        "infinite": torch.full((4, 24, 10), torch.inf),
    }
    account = AucAccount(list(scores), 4)
    for rows in (slice(0, 7), slice(7, 24)):
        account.add({name: x[:, rows] for name, x in scores.items()}, depths[rows])
    found = account.result()
    known = depths > 0
    index = torch.arange(24).unsqueeze(1).expand(24, 10)
    for name, x in scores.items():
        for k in range(4):
            exact = auc(x[k][known], settled[k][known], index[known])
            assert found[name][k].value == pytest.approx(exact.value, abs=0.02, nan_ok=True)
            if name != "infinite" and not math.isnan(exact.error):
                assert 0.3 < (found[name][k].error + 1e-3) / (exact.error + 1e-3) < 3


def test_counted_scores_keep_their_order_from_the_smallest_to_the_largest() -> None:
    account = AucAccount(["x"], 1)
    scores = torch.tensor([-torch.inf, -1e30, -1.0, -1e-30, 0.0, 1e-30, 1e-3, 1.1e-3, 1.0, 1e30, torch.inf])
    bins = account._bin(scores)
    assert (bins.diff() > 0).all()
    assert 0 <= int(bins.min()) <= int(bins.max()) < account._BINS
    assert account._bin(torch.tensor([-0.0])) == account._bin(torch.tensor([0.0]))


def test_memory_of_counts_does_not_grow_with_the_text() -> None:
    def numbers(portions: int) -> int:
        account, generator = AucAccount(["x"], 2), torch.Generator().manual_seed(0)
        for _ in range(portions):
            scores = 1 + torch.rand(2, 32, 400, generator=generator)
            account.add({"x": scores}, torch.randint(1, 4, (32, 400), generator=generator))
        return sum(keys.numel() for keys, _ in account._counts["x"])

    assert numbers(2) == numbers(12)


def separable(seed: int, rows: int = 400) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 100.0, 0.01]) + 5
    logit = 2 * (x[:, 0] - 5) - 0.01 * (x[:, 1] - 5)
    return x, torch.rand(rows, generator=generator, dtype=torch.float64) < torch.sigmoid(logit)


@given(seeds)
def test_a_fitted_probe_is_where_the_gradient_of_the_penalized_loss_is_zero(seed: int) -> None:
    x, y = separable(seed)
    probe = fit_logistic(x, y, ridge=0.01)
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    weight = (probe.weight * x.std(0, correction=0)).requires_grad_()
    bias = (probe.bias + probe.weight @ x.mean(0)).requires_grad_()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(standard @ weight + bias, y.double())
    (loss + 0.005 * weight.square().sum()).backward()
    assert float(weight.grad.abs().max()) < 1e-7
    assert abs(float(bias.grad)) < 1e-7


def test_a_probe_of_classes_that_can_be_separated_is_finite() -> None:
    x = torch.linspace(-1, 1, 50).unsqueeze(1)
    probe = fit_logistic(torch.cat([x, torch.ones_like(x)], 1), x[:, 0] > 0)
    assert bool(probe.weight.isfinite().all())
    assert ((probe.logit(torch.cat([x, torch.ones_like(x)], 1)) > 0) == (x[:, 0] > 0)).all()


@given(seeds, st.integers(2, 9), st.floats(0.05, 0.95))
def test_a_split_takes_whole_sequences_and_leaves_both_sides_some(seed: int, count: int, share: float) -> None:
    sequence = torch.randint(count, (60,), generator=torch.Generator().manual_seed(seed)) * 7
    sequence[:2] = torch.tensor([0, 7])
    fits = split_by_sequence(sequence, share, seed)
    assert not set(sequence[fits].tolist()) & set(sequence[~fits].tolist())
    assert fits.any()
    assert not fits.all()


def test_a_probe_sees_what_two_features_say_together_and_nothing_where_there_is_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    depths = torch.randint(1, 4, (40, 30), generator=generator)
    settled = (torch.arange(1, 4).view(-1, 1, 1) >= depths).float()
    noise = torch.randn(3, 40, 30, generator=generator)
    features = torch.stack([settled + noise, noise, torch.randn(3, 40, 30, generator=generator)], -1)
    together = probe_by_step(features, depths)
    assert [area.value for area in together[:2]] == pytest.approx([1.0, 1.0], abs=0.01)
    nothing = probe_by_step(features[..., 2:], depths)
    for area in nothing[:2]:
        assert abs(area.value - 0.5) < 4 * area.error
    assert math.isnan(together[2].value)  # at the last step every row has settled


def test_a_probe_is_judged_on_sequences_that_it_was_not_fitted_on() -> None:
    """Features that name the sequence would separate perfectly on the rows of the fit."""
    generator = torch.Generator().manual_seed(2)
    settled = torch.rand(20, 1, generator=generator).expand(20, 15) < 0.5
    depths = torch.where(settled, 1, 2)
    features = torch.eye(20).unsqueeze(1).expand(20, 15, 20).expand(2, 20, 15, 20)
    assert probe_by_step(features, depths)[0].value < 0.8


@pytest.mark.parametrize(
    "call",
    [
        lambda: auc(torch.zeros(3), torch.zeros(4, dtype=torch.bool)),
        lambda: AucAccount([], 3),
        lambda: AucAccount(["x"], 0),
        lambda: AucAccount(["x"], 2).add({"y": torch.zeros(2, 3)}, torch.ones(3)),
        lambda: AucAccount(["x"], 2).add({"x": torch.zeros(3, 3)}, torch.ones(3)),
        lambda: fit_logistic(torch.zeros(4), torch.zeros(4, dtype=torch.bool)),
        lambda: fit_logistic(torch.zeros(4, 1), torch.ones(4, dtype=torch.bool)),
        lambda: fit_logistic(torch.full((2, 1), torch.inf), torch.tensor([True, False])),
        lambda: fit_logistic(torch.zeros(2, 1), torch.tensor([True, False]), ridge=0.0),
        lambda: split_by_sequence(torch.zeros(5)),
        lambda: split_by_sequence(torch.arange(5), 1.0),
        lambda: probe_by_step(torch.zeros(2, 4, 1), torch.ones(3)),
    ],
)
def test_what_makes_no_sense_is_refused(call: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        call()


def test_an_area_that_is_not_defined_is_said_in_words() -> None:
    assert describe_auc(Auc(0.75, 0.125)) == "0.75 ± 0.12"
    for area in (Auc(0.75, math.nan), Auc(math.nan, math.nan)):
        assert "nan" not in describe_auc(area)
