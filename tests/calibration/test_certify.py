"""What is certified, and that nothing else is: tests of sequences, paths, certificates and thresholds by step."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haltkit.calibration import Certificate, calibrate
from haltkit.calibration.bounds import betting_p_values, binomial_p_value
from haltkit.calibration.calibrate import data_hash, least_units, p_values
from haltkit.calibration.conditional import NEVER, Asked, calibrate_by_step, halting_steps
from haltkit.calibration.testing import bonferroni, even_path, fixed_sequence, greedy_path, holm

pytestmark = pytest.mark.slow

seeds = st.integers(0, 2**31)
probabilities = st.lists(st.floats(0, 1) | st.just(math.nan), max_size=12)


@given(probabilities, st.floats(0.01, 0.99))
def test_fixed_sequence_certifies_the_passing_prefix_and_nothing_behind_a_failure(p: list[float], delta: float) -> None:
    certified = fixed_sequence(p, delta)
    assert all(value <= delta for value in p[:certified])
    assert certified == len(p) or not p[certified] <= delta


def test_fixed_sequence_asks_for_no_p_value_behind_the_first_failure() -> None:
    asked = []

    def values() -> object:
        for p in (0.01, 0.02, 0.5, 0.01):
            asked.append(p)
            yield p

    assert fixed_sequence(values(), 0.05) == 2
    assert asked == [0.01, 0.02, 0.5]


@given(probabilities, st.floats(0.01, 0.99))
def test_holm_is_closed_testing_with_bonferroni_and_certifies_no_less(p: list[float], delta: float) -> None:
    p = p[:6]
    found = holm(p, delta)
    m = len(p)
    for i in range(m):  # certified if Bonferroni rejects every intersection that holds it
        groups = [g for size in range(1, m + 1) for g in itertools.combinations(range(m), size) if i in g]
        assert found[i] == all(any(p[j] <= delta / len(g) for j in g) for g in groups)
    assert (found >= bonferroni(p, delta)).all()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), seeds)
def test_a_path_goes_from_all_safest_to_all_most_eager_one_threshold_at_a_time(sizes: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    risks, costs = ([np.sort(generator.random(n))[::d] for n in sizes] for d in (1, -1))
    for path in (even_path(sizes), greedy_path(risks, costs)):
        assert path[0].tolist() == [0] * len(sizes)
        assert path[-1].tolist() == [n - 1 for n in sizes]
        assert (np.diff(path, axis=0).sum(1) == 1).all()
        assert (np.diff(path, axis=0) >= 0).all()


def test_a_greedy_path_takes_the_region_where_steps_are_cheap_and_sees_behind_a_hump() -> None:
    # Region 0 saves nothing at its first threshold and much at its second, at less risk than region 1.
    path = greedy_path([[0, 0.01, 0.01], [0, 0.05, 0.2]], [[8, 8, 2], [8, 6, 5]])
    assert path.tolist() == [[0, 0], [1, 0], [2, 0], [2, 1], [2, 2]]


def synthetic(seed: int, units: int, settings: int = 25, binary: bool = True) -> np.ndarray:
    """Losses whose true risk at setting k is 0.2 k / (settings - 1)."""
    generator = np.random.default_rng(seed)
    risk = np.linspace(0, 0.2, settings)
    if binary:
        return (generator.random((units, 1)) < risk).astype(float)
    return generator.beta(2, 8, (units, 1)) * 5 * risk


@pytest.mark.parametrize("method", ["binomial", "hoeffding-bentkus", "betting"])
@given(seed=seeds, units=st.integers(1, 300))
def test_the_chosen_setting_and_all_before_it_pass_their_test(method: str, seed: int, units: int) -> None:
    losses = synthetic(seed, units)
    found = calibrate(losses, epsilon=0.1, delta=0.1, method=method, seed=3)
    order = np.random.default_rng(3).permutation(units)
    p = list(p_values(losses[order], 0.1, 0.1, method, 1.0))
    if found.chosen is None:
        assert p[0] > 0.1
        return
    assert max(p[: found.chosen + 1]) <= 0.1
    assert found.chosen + 1 == len(p) or p[found.chosen + 1] > 0.1
    assert found.p_value == pytest.approx(p[found.chosen])
    assert found.empirical_risk == pytest.approx(losses[:, found.chosen].mean())
    assert found.units >= found.units_needed
    assert found.bound is None or found.bound <= 0.1


@pytest.mark.parametrize("correction", ["fixed-sequence", "bonferroni", "holm"])
@pytest.mark.parametrize("method", ["binomial", "hoeffding-bentkus", "betting"])
def test_the_risk_is_kept_with_the_promised_probability(method: str, correction: str) -> None:
    """True risk of setting k is 0.2 k / 24: a violation is a chosen index above 12; 3 standard errors of 400 draws."""
    delta, draws, violations, chosen = 0.2, 400, 0, []
    for seed in range(draws):
        losses = synthetic(seed, 250, binary=method == "binomial" or seed % 2 == 0)
        found = calibrate(losses, epsilon=0.1, delta=delta, method=method, correction=correction)
        chosen.append(-1 if found.chosen is None else found.chosen)
        violations += chosen[-1] > 12
    assert violations / draws <= delta + 3 * math.sqrt(delta * (1 - delta) / draws)
    assert np.mean(chosen) > 5  # of 12: not vacuous


@pytest.mark.parametrize("method", ["binomial", "hoeffding-bentkus", "betting", "conformal"])
@pytest.mark.parametrize(("epsilon", "delta", "bound"), [(0.1, 0.1, 1.0), (0.02, 0.05, 1.0), (0.05, 0.1, 0.5)])
def test_too_few_units_certify_nothing_and_the_least_number_does(
    method: str, epsilon: float, delta: float, bound: float
) -> None:
    needed = least_units(epsilon, delta, method, bound)
    keys = {"epsilon": epsilon, "delta": delta, "method": method, "loss_bound": bound}
    few = calibrate(np.zeros((needed - 1, 3)), **keys)
    assert not few.certified
    assert few.setting is None
    assert str(needed) in few.reason
    assert few.promise.startswith("Nothing is promised")
    enough = calibrate(np.zeros((needed, 3)), **keys)
    assert enough.chosen == 2
    assert enough.units_needed == needed


@pytest.mark.parametrize("correction", ["bonferroni", "holm"])
@pytest.mark.parametrize("method", ["binomial", "hoeffding-bentkus", "betting"])
def test_without_an_order_every_setting_costs_units(method: str, correction: str) -> None:
    needed = least_units(0.05, 0.1 / 4, method)
    assert needed > least_units(0.05, 0.1, method)
    for units in (needed - 1, needed):
        found = calibrate(np.zeros((units, 4)), epsilon=0.05, delta=0.1, method=method, correction=correction)
        assert found.units_needed == needed
        assert found.certified == (units == needed)


def test_the_reason_says_whether_more_units_would_help() -> None:
    hopeless = calibrate(np.ones((500, 2)), epsilon=0.1)
    assert "more units do not help" in hopeless.reason
    close = np.zeros((100, 1))
    close[:8] = 1
    found = calibrate(close, epsilon=0.1, method="binomial")
    assert not found.certified
    said = int(found.reason.split("about ")[1].split()[0])
    assert said > 100
    assert binomial_p_value(round(0.08 * said), said, 0.1) <= 0.1 * 1.2  # what it says is about enough


def test_the_cheapest_certified_setting_is_chosen_where_costs_are_known() -> None:
    losses = np.zeros((300, 4))
    losses[:, 3] = 1
    assert calibrate(losses, epsilon=0.1, cost=[9, 5, 6, 1]).chosen == 1
    assert calibrate(losses, epsilon=0.1, cost=[9, 5, 6, 1], method="conformal").chosen == 1
    assert calibrate(losses, epsilon=0.1, settings=list("abcd")).setting == "c"


def test_tensors_and_arrays_give_the_same_certificate() -> None:
    losses = synthetic(0, 300)
    assert calibrate(torch.tensor(losses), epsilon=0.1) == calibrate(losses, epsilon=0.1)
    assert calibrate(torch.tensor(losses).to(torch.bfloat16), epsilon=0.1) == calibrate(losses, epsilon=0.1)


def test_the_hash_depends_on_every_loss_and_on_the_shape() -> None:
    a = np.zeros((4, 3))
    b = a.copy()
    b[2, 1] = 1e-300
    assert len({data_hash(a), data_hash(b), data_hash(a.reshape(3, 4))}) == 3
    assert data_hash(a) == data_hash(np.asfortranarray(a))


@pytest.mark.parametrize(
    "keys",
    [
        {"epsilon": 0.0},
        {"epsilon": 1.0},
        {"epsilon": 0.1, "delta": 0.0},
        {"epsilon": 0.1, "delta": 1.0},
        {"epsilon": 0.1, "method": "magic"},
        {"epsilon": 0.1, "correction": "none"},
        {"epsilon": 0.1, "settings": ["one"]},
        {"epsilon": 0.1, "cost": [1.0]},
        {"epsilon": 0.1, "loss_bound": 0.2},
        {"epsilon": 0.1, "method": "binomial"},
        {"epsilon": 0.1, "losses": np.zeros((0, 2))},
        {"epsilon": 0.1, "losses": np.zeros((5, 0))},
        {"epsilon": 0.1, "losses": np.zeros(5)},
        {"epsilon": 0.1, "losses": np.full((5, 2), np.nan)},
    ],
)
def test_a_calibration_that_makes_no_sense_is_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        calibrate(**{"losses": np.full((50, 2), 0.5), **keys})


numbers = st.floats(0, 1e6, allow_nan=False)
texts = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "))


@st.composite
def certificates(draw: st.DrawFn) -> Certificate:
    settings = tuple(draw(st.lists(texts, min_size=1, max_size=5)))
    bound = draw(st.floats(1e-3, 1e6))
    needed = draw(st.integers(0, 10**6))
    method = draw(st.sampled_from(["binomial", "hoeffding-bentkus", "betting", "conformal"]))
    return Certificate(
        risk=draw(texts),
        epsilon=bound * draw(st.floats(0.01, 0.99)),
        delta=None if method == "conformal" else draw(st.floats(1e-9, 0.999)),
        method=method,
        correction=draw(st.sampled_from(["fixed-sequence", "bonferroni", "holm", "by-step", "none"])),
        promise=draw(texts),
        unit=draw(texts),
        units=needed + draw(st.integers(0, 10**6)),
        units_needed=needed,
        settings=settings,
        chosen=draw(st.none() | st.integers(0, len(settings) - 1)),
        empirical_risk=draw(st.none() | numbers),
        p_value=draw(st.none() | numbers),
        bound=draw(st.none() | numbers),
        loss_bound=bound,
        data_hash=draw(texts),
        seed=draw(st.integers(-(2**70), 2**70)),
        reason=draw(texts),
    )


@given(certificates())
def test_a_certificate_comes_back_from_json_as_it_was(certificate: Certificate) -> None:
    assert Certificate.from_json(certificate.to_json()) == certificate


def test_betting_passes_nothing_whose_mean_is_above_epsilon() -> None:
    late = np.concatenate([np.zeros(400), np.ones(40)])[:, None]  # the wealth peaks after 400 units without a loss
    assert float(betting_p_values(late, 0.05, 0.1)[0]) < 1e-3
    assert list(p_values(late, 0.05, 0.1, "betting", 1.0)) == [1.0]
    assert next(iter(p_values(late, 0.1, 0.1, "betting", 1.0))) < 1e-3


def test_no_delta_passes_a_mean_above_epsilon() -> None:
    two_of_ten = np.array([1.0] * 2 + [0.0] * 8)[:, None]
    assert binomial_p_value(2, 10, 0.15) < 0.9
    assert list(p_values(two_of_ten, 0.15, 0.9, "binomial", 1.0)) == [1.0]
    for method in ("binomial", "betting", "hoeffding-bentkus"):
        assert not calibrate(two_of_ten, epsilon=0.15, delta=0.99, method=method).certified


@pytest.mark.parametrize("method", ["betting", "hoeffding-bentkus", "conformal"])
@pytest.mark.parametrize("below", [0.0, 1e-17, 1e-12, 1e-8, 1e-5])
def test_a_risk_just_below_epsilon_is_said_at_once(method: str, below: float) -> None:
    """The units that it would take are more than can be counted one by one."""
    found = calibrate(np.full((400, 1), 0.1 - below), epsilon=0.1, delta=0.05, method=method)
    if found.certified:  # a mean below epsilon is enough for conformal only if it is clearly so
        assert below == 1e-5
        assert method == "conformal"
        return
    told = found.reason.split("about ")
    assert ("more units do not help" in found.reason) == (len(told) == 1) == (below < 1e-9)
    if len(told) == 2:
        assert int(told[1].split()[0]) > 1e4


@pytest.mark.parametrize("field", ["risk", "unit", "settings"])
def test_a_certificate_that_could_steer_a_terminal_is_not_made(field: str) -> None:
    found = calibrate(synthetic(1, 300), epsilon=0.1, delta=0.05)
    with pytest.raises(ValueError, match=f"{field}=.*can be printed"):
        replace(found, **{field: ("\x1b[2J",) * len(found.settings) if field == "settings" else "\x1b[2J"})


def test_certificates_about_other_settings_have_other_digests_where_no_loss_was_seen() -> None:
    nothing = np.zeros((300, 1))
    one, other = (calibrate(nothing, epsilon=0.1, settings=[name]) for name in ("norm:tau=1", "norm:tau=9"))
    assert one.data_hash == other.data_hash
    assert one.digest != other.digest
    assert Certificate.from_json(one.to_json()).digest == one.digest


def test_every_kind_of_certificate_comes_back_from_json() -> None:
    for method, units in itertools.product(["binomial", "hoeffding-bentkus", "betting", "conformal"], [8, 300]):
        found = calibrate(synthetic(1, units), epsilon=0.1, delta=0.05, method=method)
        assert found.certified == (units == 300)
        assert Certificate.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    "edit",
    [
        {"chosen": 25},
        {"chosen": True},
        {"units": 2},
        {"epsilon": "0.1"},
        {"epsilon": -0.1},
        {"delta": None},
        {"delta": 2.0},
        {"method": "magic"},
        {"settings": "abc"},
        {"version": 2},
        {"kind": "recipe"},
        {"surprise": 1},
    ],
)
def test_a_certificate_that_was_edited_into_nonsense_is_refused(edit: dict[str, object]) -> None:
    text = calibrate(synthetic(1, 300), epsilon=0.1, method="binomial").to_json()
    with pytest.raises(ValueError, match="certificate"):
        Certificate.from_json(json.dumps({**json.loads(text), **edit}))


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"kind": "haltkit certificate", "version": 1}'])
def test_a_text_that_is_no_certificate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="certificate"):
        Certificate.from_json(text)


def early_and_late(seed: int, units: int, early_risk: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores and losses at 4 steps: a score below 1 comes at a random step; what halts at step 1 errs by early_risk."""
    generator = np.random.default_rng(seed)
    settles = generator.integers(1, 5, units)
    scores = np.where(np.arange(1, 5) >= settles[:, None], generator.random((units, 4)), 2.0)
    rates = np.array([early_risk, 0.01, 0.01, 0.0])
    return scores, (generator.random((units, 1)) < rates).astype(float)


def true_conditional_risks(thresholds: tuple[float | None, ...], early_risk: float) -> list[float]:
    scores, _ = early_and_late(10**6, 200_000, early_risk)
    rates = np.array([early_risk, 0.01, 0.01, 0.0])
    taus = np.array([-np.inf if tau is None else tau for tau in thresholds])
    steps = halting_steps(scores, taus)
    return [float(rates[steps[steps <= t] - 1].mean()) for t in range(1, 5) if (steps <= t).any()]


@pytest.mark.parametrize("early_risk", [0.0, 0.3])
def test_thresholds_by_step_keep_the_risk_among_what_halts_by_every_step(early_risk: float) -> None:
    delta, draws, violations, saved = 0.1, 60, 0, 0
    for seed in range(draws):
        scores, losses = early_and_late(seed, 2000, early_risk)
        found = calibrate_by_step(scores, losses, [0.25, 0.5, 0.75, 1.0], epsilon=0.05, delta=delta, seed=seed)
        saved += found.certificate.certified
        violations += any(risk > 0.05 for risk in true_conditional_risks(found.thresholds, early_risk))
    assert violations / draws <= delta + 3 * math.sqrt(delta * (1 - delta) / draws)
    assert saved / draws > 0.8


def test_what_is_certified_by_step_passes_its_test_among_what_halts_by_every_step() -> None:
    """A first half that is easily pleased proposes thresholds that are not safe; the second half must see each step."""
    seen = 0
    for seed in range(60):
        scores, losses = early_and_late(seed, 800, 0.06)
        found = calibrate_by_step(scores, losses, [0.5, 1.0], epsilon=0.05, delta=0.2, screening=1.0, seed=seed)
        second = np.random.default_rng(seed).permutation(800)[400:]
        taus = np.array([-np.inf if tau is None else tau for tau in found.thresholds])
        steps = halting_steps(scores[second], taus)
        worst = 0.0
        for t in range(1, 5):
            if (taus[:t] > -np.inf).any():
                by = steps <= t
                worst = max(worst, binomial_p_value(int(losses[second[by], steps[by] - 1].sum()), int(by.sum()), 0.05))
        assert worst <= 0.2
        if found.certificate.certified:
            seen += 1
            assert found.certificate.p_value == pytest.approx(worst)
    assert seen > 20


def _sequences(seed: int, units: int, rows: int, risk: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores and losses ``(units, rows, 2)``: rows halt at step 1 or 2, and of the early ones a share ``risk`` errs.

    All errors are in hard sequences, in which fewer rows halt early: rows of a sequence err together, and the mean of
    the sequences' own shares is not the share of all rows.
    """
    generator = np.random.default_rng([seed, units, rows])
    hard = generator.random((units, 1)) < 0.3
    early = generator.random((units, rows)) < np.where(hard, 0.2, 0.5)
    wrong = early & hard & (generator.random((units, rows)) < risk * (0.3 * 0.2 + 0.7 * 0.5) / (0.3 * 0.2))
    scores = np.stack([np.where(early, 0.5, 2.0), np.full((units, rows), 0.5)], -1)
    return scores, np.stack([wrong, np.zeros_like(wrong)], -1).astype(float)


@pytest.mark.parametrize(("rows", "least"), [(1, 0.02), (8, 0.0)])
def test_rows_of_one_sequence_are_no_evidence_of_their_own(rows: int, least: float) -> None:
    """The worst proposal, at the boundary: early halts err just more than epsilon allows, late ones never."""
    delta, draws, epsilon, violations, late = 0.1, 400, 0.1, 0, 0
    asked = Asked(epsilon, delta, "betting")
    for seed in range(draws):
        scores, losses = _sequences(seed, 300, rows, epsilon * 1.001)
        for start in (2, 1):
            steps = halting_steps(scores, np.array([NEVER if start > 1 else 1.0, 1.0]))
            there = np.take_along_axis(losses, steps[..., None] - 1, -1)[..., 0]
            if asked.worst(steps, there, start, 2) > delta:
                break
            late += start == 2
            violations += start == 1
    assert late == draws  # what is safe passes
    assert least <= violations / draws <= delta + 3 * math.sqrt(delta * (1 - delta) / draws)


def test_thresholds_by_step_from_too_few_units_halt_nothing_and_say_so() -> None:
    scores, losses = early_and_late(0, 60, 0.0)
    found = calibrate_by_step(scores, losses, [1.0], epsilon=0.05)
    assert found.thresholds == (None,) * 4
    assert not found.certificate.certified
    assert str(found.certificate.units_needed) in found.certificate.reason
    assert Certificate.from_json(found.certificate.to_json()) == found.certificate


@given(seeds)
def test_a_row_halts_at_the_first_step_below_its_threshold(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores, taus = generator.random((20, 5)), np.where(generator.random(5) < 0.3, -np.inf, generator.random(5))
    for row, step in zip(scores, halting_steps(scores, taus), strict=True):
        assert step == next((k for k in range(1, 6) if row[k - 1] < taus[k - 1]), 6)


@pytest.mark.parametrize(
    "keys",
    [
        {"scores": np.zeros((9, 3))},
        {"grid": []},
        {"method": "conformal"},
        {"epsilon": 1.5},
        {"screening": 0.0},
        {"losses": np.full((9, 4), 2.0)},
        {"scores": np.zeros((1, 4)), "losses": np.zeros((1, 4))},
    ],
)
def test_thresholds_by_step_refuse_what_makes_no_sense(keys: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        calibrate_by_step(
            **{"scores": np.zeros((9, 4)), "losses": np.zeros((9, 4)), "grid": [1.0], "epsilon": 0.1, **keys}
        )
