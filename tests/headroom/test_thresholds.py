"""What thresholds on recorded signals take, against a loop over rows and steps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from haltkit.headroom import ThresholdAccount, Thresholds

K = 5


def _drawn(seed: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(K, rows, 2, generator=generator)
    scores[torch.rand(scores.shape, generator=generator) < 0.1] = math.nan
    good = torch.rand(scores.shape, generator=generator) < 0.5
    return scores, good, torch.rand(rows, 2, generator=generator) < 0.8


@given(st.integers(0, 1000))
def test_steps_and_quality_are_those_of_halting_row_by_row(seed: int) -> None:
    scores, good, counts = _drawn(seed, 4)
    account = ThresholdAccount(["norm"], K)
    account.add({"norm": scores}, good, counts)
    found = account.result()
    if not bool(counts.any()):
        assert not found
        return
    for tau, steps, quality in zip(found["norm"].taus, found["norm"].steps, found["norm"].quality, strict=True):
        taken, fine = [], []
        for row, entry in counts.nonzero().tolist():
            below = [k for k in range(K) if float(scores[k, row, entry]) < tau]
            taken.append(min([*below, K - 1]) + 1)
            fine.append(bool(good[taken[-1] - 1, row, entry]))
        assert steps == pytest.approx(sum(taken) / len(taken))
        assert quality == pytest.approx(sum(fine) / len(fine))


def test_portions_are_tried_at_the_thresholds_of_the_first_and_add_up() -> None:
    portions = [_drawn(seed, 20) for seed in (1, 2)]
    account, parts = ThresholdAccount(["norm"], K), []
    for scores, good, counts in portions:
        account.add({"norm": scores}, good, counts)
        parts.append(int(counts.sum()))
    alone = ThresholdAccount(["norm"], K)
    alone.add({"norm": portions[0][0]}, *portions[0][1:])
    whole, first = account.result()["norm"], alone.result()["norm"]
    assert whole.taus == first.taus
    assert list(whole.taus) == sorted(whole.taus)
    assert whole.steps != first.steps
    second = [
        (sum(parts) * both - parts[0] * one) / parts[1] for both, one in zip(whole.steps, first.steps, strict=True)
    ]
    assert all(1 - 1e-9 <= steps <= K + 1e-9 for steps in second)
    assert second == pytest.approx(sorted(second, reverse=True))  # a greater threshold halts no later


def test_every_row_halts_at_once_at_the_greatest_threshold_and_never_at_the_least() -> None:
    """The safest is full depth, so a level is always within reach."""
    scores = torch.rand(K, 30, generator=torch.Generator().manual_seed(0)) + torch.arange(K, 0, -1).unsqueeze(1)
    account = ThresholdAccount(["norm"], K)
    good = torch.zeros(K, 30, dtype=torch.bool)
    good[-1] = True
    account.add({"norm": scores}, good, torch.ones(30, dtype=torch.bool))
    found = account.result()["norm"]
    assert (found.steps[0], found.steps[-1]) == (K, 1)
    assert found.least_steps(1.0) == K


def test_the_fewest_steps_of_the_level_are_taken() -> None:
    known = Thresholds((1.0, 2.0, 3.0), (4.0, 3.0, 2.0), (0.98, 0.995, 0.9), 8)
    assert known.least_steps(0.99) == 3.0
    assert known.least_steps(0.9) == 2.0  # exactly at the level
    assert known.least_steps(0.999) == 8.0  # no threshold is that good: full depth


def test_other_rows_are_refused() -> None:
    account = ThresholdAccount(["norm"], K)
    for shape in ((K - 1, 3), (K, 4)):
        with pytest.raises(ValueError, match="expected"):
            account.add({"norm": torch.zeros(shape)}, torch.ones(K, 3).bool(), torch.ones(3).bool())
