"""What halting could save: on a model whose rows settle at steps that are known beforehand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from countdown import Countdown, readout
from torch import Tensor

import haltkit
from haltkit.comparison import Comparison
from haltkit.comparison.oracle import Oracle
from haltkit.comparison.possible import PROBE, Possible, possible, possible_if_known
from haltkit.headroom import Auc, Headroom, ProbeAccount, Thresholds
from haltkit.recording.trajectory import TrajectoryError
from haltkit.subject import Subject

STEPS = 8


def _subject(hops: Tensor, **more: Any) -> Subject:
    model = Countdown().eval()

    def run(inputs: Tensor, depth: int | Mapping[str, int]) -> Tensor:
        return model(inputs, depth if isinstance(depth, int) else depth["loop"])

    sample = torch.stack([hops, torch.zeros_like(hops)], -1).float()
    given = {"samples": [sample], "readout": readout, "full_depth": STEPS, **more}
    return Subject.of_modules(model, run, {"loop": "body"}, **given)


def test_finds_the_steps_at_which_rows_are_known_to_settle() -> None:
    hops = torch.tensor([[1, 2, 2, 6], [1, 1, 3, 6]])
    found = possible(_subject(hops))["loop"]
    assert found.headroom.histogram == (3, 2, 1, 0, 0, 2, 0, 0)
    assert found.headroom.mean_depth == pytest.approx(float(hops.float().mean()))
    assert found.headroom.fixed_depth(0.99) == 6
    assert found.best_signal() is not None
    assert "can pay: up to" in found.conclusion(0.99)


def test_a_probe_on_the_state_is_judged_on_sequences_that_it_was_not_fitted_on() -> None:
    """The state ``(hops, count)`` says which rows have settled; a state of noise, fitted as well, says nothing."""
    hops = torch.randint(1, 6, (40, 6), generator=torch.Generator().manual_seed(0))
    found = possible(_subject(hops), probe=True)["loop"]
    assert set(found.aucs) == {"step norm", "margin", PROBE}
    areas = found.aucs[PROBE]
    assert len(areas) == STEPS
    assert all(area.value == 1 for area in areas[:4])
    assert all(math.isnan(area.value) for area in areas[4:])  # all rows have settled
    account = ProbeAccount()
    account.add(torch.randn(1, 40, 6, 50, generator=torch.Generator().manual_seed(1)), hops.clamp_max(2))
    (noise,) = account.result()
    assert abs(noise.value - 0.5) < 4 * noise.error < 0.4
    boards = possible(_subject(hops, granularity="sequence"), probe=True)["loop"]
    assert len(boards.aucs[PROBE]) == STEPS


@pytest.mark.parametrize(("most", "kept"), [(2**24, 6), (4 * 3 * 2 * 5, 4), (1, 2)])
def test_a_probe_keeps_whole_sequences_as_far_as_there_is_room(most: int, kept: int) -> None:
    """Sequences of three rows with two features at five steps, in portions of two: as one portion of those kept."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 6, 3, 2, generator=generator)
    depths = torch.randint(1, 6, (6, 3), generator=generator)
    account, expected = ProbeAccount(most), ProbeAccount()
    for start in (0, 2, 4):
        account.add(features[:, start : start + 2], depths[start : start + 2])
    expected.add(features[:, :kept], depths[:kept])
    assert repr(account.result()) == repr(expected.result())
    alone = ProbeAccount()
    alone.add(features[:, :1], depths[:1])
    assert all(math.isnan(area.value) for area in alone.result())


def test_rows_that_settle_together_leave_nothing_to_halt() -> None:
    found = possible(_subject(torch.full((2, 4), 3)))["loop"]
    assert found.headroom.headroom(0.99) == 0
    assert "fixed depth of 3" in found.conclusion(0.99)
    assert "cannot pay" in found.conclusion(0.99)


def test_a_sequence_has_settled_when_its_last_position_has() -> None:
    found = possible(_subject(torch.tensor([[1, 2, 5], [1, 1, 3]]), granularity="sequence"))["loop"]
    assert found.headroom.histogram == (0, 0, 1, 0, 1, 0, 0, 0)


def test_without_signals_that_tell_no_policy_pays() -> None:
    known = Headroom("loop", "stable", 2, 4, 0, (3, 0, 0, 1), (0.75, 0.75, 0.75, 1.0), (), None, 1.75, None)
    for value, said in ((0.6, "no signal"), (0.9, "can pay: up to"), (math.nan, "can pay: up to")):
        assert said in Possible(known, {"margin": (Auc(value, 0.01),) * 4}).conclusion(0.99)


def test_a_threshold_on_the_step_norm_waits_for_the_step_after_the_last_hop() -> None:
    """Rows stand still from their last hop on, which the step after it shows.

    Only the row of most hops can be let go at its last one: no other row takes so short a step beside its state.
    """
    hops = torch.tensor([[1, 2, 2, 6], [1, 1, 3, 6]])
    found = possible(_subject(hops))["loop"]
    assert found.thresholds["step norm"].least_steps(1.0) == (2 + 3 + 3 + 6 + 2 + 2 + 4 + 6) / 8
    assert found.thresholds["margin"].least_steps(1.0) == STEPS  # as great long before the last hop as after it
    assert "takes 3.5 steps on the step norm, 8.0 steps on the margin: 1.71x" in found.conclusion(0.99)
    labels = torch.where(hops < 6, 1, 0)  # rows on which full depth is wrong do not count
    right = possible(_subject(hops, labels=lambda sample: labels), Oracle("right"))["loop"]
    assert right.thresholds["step norm"].least_steps(1.0) == (2 + 3 + 3 + 2 + 2 + 3) / 6
    best = possible(_subject(hops, labels=lambda sample: labels), Oracle("best"))["loop"]
    assert best.thresholds == {}  # no step can be said to lose nothing


def test_signals_that_tell_too_late_pay_nothing_unless_a_probe_tells_in_time() -> None:
    known = Headroom("loop", "stable", 2, 4, 0, (3, 0, 0, 1), (0.75, 0.75, 0.75, 1.0), (), None, 1.75, None)
    late, timely = (Thresholds((1.0,), (steps,), (1.0,), 4) for steps in (3.8, 2.5))
    seen = {"step norm": (Auc(0.9, 0.01),) * 4}
    said = Possible(known, seen, thresholds={"step norm": late}).conclusion(0.99)
    assert "cannot pay here because signals tell too late" in said
    assert said.endswith("3.8 steps on the step norm; use a fixed depth of 4")
    both = {"step norm": timely, "margin": late}
    assert "1.60x, less" in Possible(known, seen, thresholds=both).conclusion(0.99)
    for value, pays in ((0.9, True), (0.6, False), (math.nan, False)):
        learned = Possible(known, seen | {PROBE: (Auc(value, 0.01),) * 4}, thresholds={"step norm": late})
        assert ("can pay: up to" in learned.conclusion(0.99)) == pays


def test_a_subject_without_areadout_is_refused() -> None:
    with pytest.raises(ValueError, match="readout"):
        possible(_subject(torch.ones(1, 2), readout=None))


def test_what_is_saved_reads_back_as_it_was() -> None:
    found = possible(_subject(torch.tensor([[1, 2, 2, 6], [1, 1, 3, 6]])))["loop"]
    again = Possible.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert again.headroom == found.headroom
    assert again.thresholds == found.thresholds != {}
    older = {name: value for name, value in found.to_json().items() if name != "thresholds"}
    assert Possible.from_json(older).thresholds == {}
    for name, areas in found.aucs.items():
        pairs = zip(areas, again.aucs[name], strict=True)
        assert all(repr(a) == repr(b) for a, b in pairs)  # NaN where an area is not defined


def test_recording_ends_with_the_sample_that_has_enough_rows() -> None:
    depths: list[Mapping[str, Tensor]] = []
    subject = _subject(torch.tensor([[1, 2]]))
    samples = [subject.samples[0]] * 5
    found = possible(replace(subject, samples=samples), enough=3, on_sample=depths.append)["loop"]
    assert found.headroom.rows == 4  # two samples of two rows
    assert [one["loop"].tolist() for one in depths] == [[[1, 2]]] * 2


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_a_comparison_tells_each_settings_regret(depth: int) -> None:
    hops = torch.tensor([[1, 2, 2, 6], [1, 1, 3, 6]])
    subject = _subject(hops, loss=_wrong, logits=readout, metric="wrong", unit="wrong")
    subject = replace(subject, fixed_depths=(depth,))
    result = haltkit.compare(subject, policies=f"fixed:steps={depth}", repeats=1)
    row = next(row for row in result.rows if row.depth == {"loop": depth})
    regret = row.regret["loop"]
    assert regret.rows == hops.numel()
    assert regret.steps == depth
    assert regret.wasted == pytest.approx(float((depth - hops).clamp_min(0).double().mean()))
    assert regret.early == pytest.approx(float((hops > depth).double().mean()))
    assert result.headroom["loop"].headroom.mean_depth == pytest.approx(float(hops.double().mean()))
    again = Comparison.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
    assert again.to_json() == result.to_json()
    assert again.rows == result.rows


def test_without_areadout_a_comparison_says_why_headroom_is_not_known() -> None:
    hops = torch.tensor([[1, 2, 2, 6], [1, 1, 3, 6]])
    result = haltkit.compare(_subject(hops, readout=None, loss=_wrong), policies="fixed:steps=2", repeats=1)
    assert not result.headroom
    assert "readout" in result.no_headroom
    assert all(not row.regret for row in result.rows)


def _wrong(output: Tensor, sample: Tensor) -> Tensor:
    return (output[..., 1] < sample[..., 0]).float()


class TimeFirst(torch.nn.Module):
    """A loop over states ``(T, B, D)``, as recurrent networks have them; logits ``(B, T, V)``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.body(x)
        return x.transpose(0, 1)


def _time_first(**fields: Any) -> Subject:
    torch.manual_seed(0)
    loop = haltkit.Loop(["body"], **fields)
    samples = list(torch.randn(3, 5, 2, 3))
    return Subject.attached(TimeFirst(), loop=loop, samples=samples, readout=lambda x: x, logits=lambda out: out)


def test_sequences_are_told_from_positions_where_the_batch_is_not_the_first_dimension() -> None:
    with pytest.raises(TrajectoryError, match=r"rows \(5, 2\), and the logits a batch of 2"):
        possible(_time_first())
    found, why = possible_if_known(_time_first())  # a comparison does without
    assert (found, "must be the batch" in why) == ({}, True)

    def move(x: Tensor, state: Tensor | None = None) -> Tensor:
        return (x if state is None else state).transpose(0, 1)

    moved = _time_first(select=move, put=move, initial=lambda args, _: args[0].transpose(0, 1))
    known = possible(moved)["loop"].headroom
    assert (known.rows, known.sequences) == (30, 6)
