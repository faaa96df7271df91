"""Signals against plain numpy, closed forms, and how they scale."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haltkit import signals
from maps import MAPS, Map, rotation

seeds = st.integers(0, 2**31)


def states(seed: int, count: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, 4, 3, 6, generator=generator, dtype=torch.float64).to(dtype))


@given(seeds)
def test_signals_equal_plain_numpy(seed: int) -> None:
    a, b, c = states(seed, 3)
    x0, x1, x2 = (t.numpy() for t in (a, b, c))
    d1, d2 = x1 - x0, x2 - x1
    n1, n2 = (np.sqrt((d**2).sum(-1)) for d in (d1, d2))
    accel = np.sqrt(((d2 - d1) ** 2).sum(-1))
    t1, t2 = signals.difference(b, a), signals.difference(c, b)
    np.testing.assert_allclose(signals.norm(t2), n2)
    np.testing.assert_allclose(signals.acceleration(t2, t1), accel)
    np.testing.assert_allclose(signals.step_size_change(signals.norm(t2), signals.norm(t1)), abs(n2 - n1))
    np.testing.assert_allclose(signals.step_angle(t2, t1), (d1 * d2).sum(-1) / (n1 * n2))
    np.testing.assert_allclose(
        signals.normalized(signals.norm(t2), signals.norm(b), 0.1), n2 / (np.sqrt((x1**2).sum(-1)) + 0.1)
    )
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (x2 / 0.7, x1 / 0.7))
    log_p, log_q = (signals.log_probabilities(t, 0.7) for t in (c, b))
    np.testing.assert_allclose(signals.kl_divergence(log_p, log_q), (p * np.log(p / q)).sum(-1), atol=1e-12)
    np.testing.assert_allclose(
        signals.kl_divergence(log_p, log_q, "previous_current"), (q * np.log(q / p)).sum(-1), atol=1e-12
    )
    norms = torch.stack([signals.norm(t1), signals.norm(t2)])
    np.testing.assert_allclose(
        signals.delta_loop_ratio(a - c, norms), np.sqrt(((x0 - x2) ** 2).sum(-1)) / ((n1 + n2) / 2)
    )


@given(st.floats(0.05, 0.97), st.floats(-1, 1), st.floats(0.01, 100))
def test_the_remaining_distance_is_the_sum_of_the_steps_to_come(ratio: float, cosine: float, size: float) -> None:
    factor = ratio * complex(cosine, math.sqrt(1 - cosine**2))
    step, rest = complex(size, 0), 0j
    for _ in range(2000):
        step *= factor
        rest += step
    given = (torch.tensor(value, dtype=torch.float64) for value in (size, size / ratio, cosine))
    np.testing.assert_allclose(float(signals.remaining_distance(*given)), abs(rest), rtol=1e-7)


def test_a_loop_that_does_not_shrink_has_no_limit() -> None:
    sizes, before = torch.tensor([1.0, 2.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, math.inf, 1.0])
    cosines = torch.tensor([0.5, 1.0, math.nan, math.nan])
    assert signals.remaining_distance(sizes, before, cosines).tolist() == [math.inf, math.inf, math.inf, 0.0]


@pytest.mark.parametrize("case", MAPS, ids=lambda case: case.name)
def test_synthetic_maps_have_their_closed_form(case: Map) -> None:
    xs = [case.start]
    for _ in range(6):
        xs.append(case.step(xs[-1]))
    ds = [signals.difference(b, a) for a, b in itertools.pairwise(xs)]
    for k, d in enumerate(ds, 1):
        assert float(signals.norm(d)[0]) == pytest.approx(case.step_norm(k))
        if k > 1:
            assert float(signals.acceleration(d, ds[k - 2])[0]) == pytest.approx(case.acceleration(k), abs=1e-12)


@given(st.floats(-0.99, 0.99), st.floats(0.01, 100))
def test_a_steady_rotation_holds_normalized_acceleration_up(cosine: float, radius: float) -> None:
    """a = s sqrt(2 - 2c) and a_hat = sqrt(2 - 2c) / 2, however small the steps are."""
    case = rotation(cosine, radius)
    x0 = case.start
    x1 = case.step(x0)
    d1 = signals.difference(x1, x0)
    d2 = signals.difference(case.step(x1), x1)
    a_hat = signals.normalized(signals.acceleration(d2, d1), signals.norm(d2) + signals.norm(d1), 0.0)
    assert float(a_hat[0]) == pytest.approx(math.sqrt(2 - 2 * cosine) / 2, abs=1e-6)
    assert float(signals.step_angle(d2, d1)[0]) == pytest.approx(cosine, abs=1e-6)


@given(seeds, st.floats(1e-3, 1e3))
def test_how_signals_scale(seed: int, factor: float) -> None:
    """Norms, accelerations and speeds scale with the state; ratios and angles do not change."""
    xs = states(seed, 3)

    def measure(scale: float) -> dict[str, torch.Tensor]:
        a, b, c = (scale * x for x in xs)
        d1, d2 = signals.difference(b, a), signals.difference(c, b)
        n1, n2, accel = signals.norm(d1), signals.norm(d2), signals.acceleration(d2, d1)
        return {
            "norm": n2,
            "accel": accel,
            "speed": signals.step_size_change(n2, n1),
            "rel": signals.normalized(n2, signals.norm(b), 0.0),
            "accel-rel": signals.normalized(accel, n1 + n2, 0.0),
            "angle": signals.step_angle(d2, d1),
        }

    one, scaled = measure(1.0), measure(factor)
    for name in ("norm", "accel", "speed"):
        torch.testing.assert_close(scaled[name], factor * one[name])
    for name in ("rel", "accel-rel", "angle"):
        torch.testing.assert_close(scaled[name], one[name])


@given(seeds)
def test_normalized_acceleration_is_at_most_one(seed: int) -> None:
    a, b, c = states(seed, 3)
    d1, d2 = signals.difference(b, a), signals.difference(c, b)
    score = signals.normalized(signals.acceleration(d2, d1), signals.norm(d1) + signals.norm(d2))
    assert (score <= 1 + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_measured_in_float32_whatever_the_state_is_in(dtype: torch.dtype) -> None:
    """In bf16 the sum of squares of 512 ones would stop growing at 256."""
    x = torch.ones(2, 512, dtype=dtype)
    d = signals.difference(2 * x, x)
    assert d.dtype == torch.float32
    torch.testing.assert_close(signals.norm(d), torch.full((2,), math.sqrt(512)))


def test_kl_of_certain_predictions_is_finite_or_infinite_but_never_nan() -> None:
    sure = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
    assert signals.kl_divergence(sure, sure).tolist() == [0.0, 0.0]
    assert signals.kl_divergence(sure, sure.flip(0)).tolist() == [torch.inf, torch.inf]
    halves = torch.full((2, 2), math.log(0.5))
    torch.testing.assert_close(signals.kl_divergence(sure, halves), torch.full((2,), math.log(2)))


def test_eps_keeps_a_ratio_defined_at_zero() -> None:
    assert signals.normalized(torch.zeros(1), torch.zeros(1), 1e-8).tolist() == [0.0]
    assert signals.normalized(torch.ones(1), torch.ones(1), 1.0).tolist() == [0.5]


def test_an_undefined_scale_gives_infinity() -> None:
    value, scale = torch.tensor([1.0, torch.inf]), torch.tensor([torch.inf, torch.inf])
    assert signals.normalized(value, scale).tolist() == [torch.inf, torch.inf]


@pytest.mark.parametrize("shape", [(5, 90_000), (3, 4, 70_000), (300_000,), (2, 0, 8), (7, 300_000)])
def test_kl_of_many_numbers_is_kl_row_by_row(shape: tuple[int, ...]) -> None:
    """Taken a few rows at a time where there are many; each row by itself is the reference."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.log_softmax(torch.randn(shape, generator=generator), -1) for _ in range(2))
    found = signals.kl_divergence(p, q)
    assert found.shape == shape[:-1]
    rows = zip(p.reshape(-1, shape[-1]), q.reshape(-1, shape[-1]), strict=True)
    expected = [float((a.double().exp() * (a.double() - b.double())).sum()) for a, b in rows]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-4)


@given(seeds, st.floats(0.05, 0.9))
def test_signals_of_predictions_equal_plain_numpy(seed: int, share: float) -> None:
    logits = states(seed, 1)[0]
    log_p = signals.log_probabilities(logits)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(-1, keepdims=True)
    np.testing.assert_allclose(signals.entropy(log_p), -(p * np.log(p)).sum(-1))
    ordered = np.sort(p, -1)
    np.testing.assert_allclose(signals.margin(log_p), ordered[..., -1] - ordered[..., -2])
    np.testing.assert_array_equal(signals.top(logits), p.argmax(-1))
    floored = np.where(p < share * p.max(-1, keepdims=True), 1 / p.shape[-1], p)
    np.testing.assert_allclose(signals.min_p(log_p, share).exp(), floored / floored.sum(-1, keepdims=True))


def test_signals_of_certain_and_of_uniform_predictions() -> None:
    sure = torch.tensor([0.0, -torch.inf, -torch.inf])
    uniform = torch.full((3,), -math.log(3))
    assert signals.entropy(torch.stack([sure, uniform])).tolist() == pytest.approx([0.0, math.log(3)])
    assert signals.margin(torch.stack([sure, uniform])).tolist() == pytest.approx([1.0, 0.0])
    assert bool(signals.min_p(sure, 0.1).isfinite().all())
    with pytest.raises(ValueError, match="at least 2"):
        signals.margin(torch.zeros(4, 1))


@given(seeds, st.floats(1e-8, 3.0))
def test_cosine_distance_is_exact_for_small_angles(seed: int, angle: float) -> None:
    a = states(seed, 1)[0].flatten(0, 1)
    across = torch.linalg.qr(torch.stack([a, states(seed + 1, 1)[0].flatten(0, 1)], -1)).Q[..., 1]
    turned = math.cos(angle) * a / signals.norm(a).unsqueeze(-1) + math.sin(angle) * across
    found = signals.cosine_distance(7 * turned, a)
    assert found.tolist() == pytest.approx([2 * math.sin(angle / 2) ** 2] * len(a), rel=1e-6)
    np.testing.assert_allclose(found, 1 - signals.cosine(turned, a), atol=1e-12)


def test_a_zero_state_has_no_direction() -> None:
    a, zero = torch.ones(2, 3), torch.zeros(2, 3)
    assert signals.cosine_distance(a, zero).tolist() == [math.inf] * 2
    assert signals.cosine_distance(zero, zero).tolist() == [math.inf] * 2


@given(st.floats(0.5, 1.2), st.floats(1, 179), st.floats(0.3, 3.0), st.floats(0, 3))
def test_areas_of_steps_shrink_alike_on_every_ellipse(rate: float, degrees: float, axis: float, phase: float) -> None:
    angles = phase + math.radians(degrees) * torch.arange(8, dtype=torch.float64)
    x = torch.stack([angles.cos(), axis * angles.sin()], -1) * rate ** torch.arange(8, dtype=torch.float64).unsqueeze(
        -1
    )
    d = x[1:] - x[:-1]
    sizes = signals.norm(d)
    spans = signals.span(sizes[1:], sizes[:-1], signals.step_angle(d[1:], d[:-1]))
    torch.testing.assert_close(spans[1:] / spans[:-1], torch.full((5,), rate, dtype=torch.float64))
    torch.testing.assert_close(signals.rate(spans), torch.tensor(rate, dtype=torch.float64))


@given(seeds)
def test_the_way_off_a_plane_is_what_least_squares_leave(seed: int) -> None:
    a, b, c = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plane = torch.stack([b, c], -1)
    left = a.unsqueeze(-1) - plane @ torch.linalg.lstsq(plane, a.unsqueeze(-1)).solution
    found = signals.off_plane(signals.cosine(a, b), signals.cosine(a, c), signals.cosine(b, c))
    torch.testing.assert_close(found, left.squeeze(-1).norm(dim=-1) / a.norm(dim=-1))
    in_it = signals.off_plane(signals.cosine(b - c, b), signals.cosine(b - c, c), signals.cosine(b, c))
    torch.testing.assert_close(in_it, torch.zeros_like(in_it), rtol=0, atol=1e-5)
    on_line = signals.off_plane(signals.cosine(a, b), -signals.cosine(a, b), signals.cosine(-b, b))
    torch.testing.assert_close(on_line, (1 - signals.cosine(a, b) ** 2).sqrt())


def test_the_rate_of_sizes_that_recur_is_one() -> None:
    recurring = torch.tensor([[1.0, 5.0, 1.0, 5.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 4.0, 4.0]])
    assert signals.rate(recurring).tolist() == pytest.approx([1.0, math.nan, 2.0], nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_cosine_from_known_norms_is_the_same_number(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    b[0], b[1] = 0, torch.inf
    sizes = signals.norm(a), signals.norm(b)
    expected = signals.cosine(a, b)
    for known in ((sizes[0], None), (None, sizes[1]), sizes):
        assert torch.equal(signals.cosine(a, b, *known).nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(signals.step_angle(a, b, *known).nan_to_num(7.0), expected.nan_to_num(7.0))
    assert not torch.equal(signals.cosine(a, b, 2 * sizes[0])[2:], expected[2:])  # it is not measured again
