"""What live runs at the oracle's depths keep, on models in which it is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from countdown import STEPS, Count, countdown
from torch import Tensor, nn

import haltkit
from haltkit.comparison.kept import kept_live
from haltkit.comparison.possible import LATEST, Possible, possible
from haltkit.driving import Pass
from haltkit.headroom import Auc, Headroom
from haltkit.kinds import per_row
from haltkit.policies import Fixed
from haltkit.subject import Subject

HOPS = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


class Counting(nn.Module):
    """Counts a row ``(h, count, shown)`` to h, one per step."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([Count()(x[..., :2]), x[..., 2:]], -1)


class Showing(nn.Module):
    """Shows, from its first step on, whether the count has reached h."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[..., :2], (x[..., 1:2] >= x[..., :1]).to(x.dtype)], -1)


class InTurn(nn.Module):
    """Region ``count``, whose readout says nothing until region ``show`` has run."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.count, self.show = Counting(), Showing()

    def forward(self, x: Tensor, steps: Mapping[str, int]) -> Tensor:
        for name in ("count", "show"):
            for _ in range(steps[name]):
                x = getattr(self, name)(x)
        return x * self.scale


def readout(x: Tensor) -> Tensor:
    return torch.stack([0.5 - x[..., 2], x[..., 2] - 0.5], -1)


def in_turn() -> Subject:
    model = InTurn().eval()

    def run(inputs: Tensor, depth: int | Mapping[str, int]) -> Tensor:
        return model(inputs, dict.fromkeys(("count", "show"), depth) if isinstance(depth, int) else depth)

    def halted(inputs: Tensor, policies: Mapping[str, Any], budget: int, rows: Mapping[str, Tensor]) -> Pass:
        x, taken, ended = inputs, {}, {}
        for name in ("count", "show"):
            each = per_row(rows[name], x.shape[:-1]) if rows else None
            body = getattr(model, name)
            result = haltkit.run_loop(body, x, policies[name], max_steps=budget, budget=each, readout=readout)
            x, taken[name], ended[name] = result.x, result.steps, result.outcome
        return Pass(x * model.scale, taken, ended)

    hops = HOPS.repeat(2, 1)
    sample = torch.stack([hops, torch.zeros_like(hops), torch.zeros_like(hops)], -1)
    return Subject.of_modules(
        model,
        run,
        {"count": "count", "show": "show"},
        samples=[sample] * 3,
        readout=readout,
        logits=readout,
        loss=lambda output, sample: 1 - output[..., 2],
        unit="wrong",
        full_depth=STEPS,
        fixed_depths=(5,),
        adaptive=lambda inputs, policies, budget: halted(inputs, policies, budget, {}),
        by_row=lambda inputs, steps: halted(inputs, dict.fromkeys(steps, Fixed(STEPS)), STEPS, steps),
    )


def recorded(subject: Subject) -> tuple[dict[str, Possible], list[Mapping[str, Tensor]]]:
    oracles: list[Mapping[str, Tensor]] = []
    return possible(subject, on_sample=oracles.append), oracles


def test_an_inner_regions_readout_is_held_against_the_whole_model() -> None:
    """What ``count`` reads out never changes, so its oracle leaves at once, and only rows of one hop get it right."""
    subject = in_turn()
    found, oracles = recorded(subject)
    assert [one.headroom.mean_depth for one in found.values()] == [1, 1]
    assert [one.inner for one in found.values()] == [True, False]
    kept = kept_live(subject, found, oracles, 0.99, 10)
    assert kept is not None
    assert kept.late == pytest.approx((0.2, 0.4, 0.6))
    assert dict(kept.depths) == {"count": 5, "show": 5}  # the regions' own 1 1, four steps deeper
    assert kept.agreement == 1
    lenient = kept_live(subject, found, oracles, 0.5, 10)
    assert lenient is not None
    assert dict(lenient.depths) == {"count": 3, "show": 3}
    assert lenient.agreement == pytest.approx(0.6)


def test_where_no_depth_tried_keeps_the_level_it_is_full_depth() -> None:
    subject = in_turn()
    sample = subject.samples[0].clone()
    sample[..., 0] = 7
    found, oracles = recorded(replace(subject, samples=[sample]))
    kept = kept_live(replace(subject, samples=[sample]), found, oracles, 0.99, 10)
    assert kept is not None
    assert (dict(kept.depths), kept.agreement) == (dict.fromkeys(("count", "show"), STEPS), 1)


def test_a_comparison_says_it_from_its_own_runs() -> None:
    result = haltkit.compare(in_turn(), policies="norm:tau=0.5", repeats=1)
    assert all(one.live == pytest.approx((0.2, 0.4, 0.6)) for one in result.headroom.values())
    again = Possible.from_json(json.loads(json.dumps(result.headroom["count"].to_json())))
    assert (again.live, again.inner) == (result.headroom["count"].live, True)
    told = result.headroom["count"].to_json()
    del told["live"], told["inner"]
    assert (Possible.from_json(told).live, Possible.from_json(told).inner) == ((), False)  # older files


@pytest.mark.parametrize("inner", [False, True])
def test_halting_does_not_pay_by_a_readout_that_the_model_does_not_keep(inner: bool) -> None:
    known = Headroom("a", "stable", 2, 4, 0, (3, 0, 0, 1), (0.75, 0.75, 0.75, 1.0), (), None, 1.75, None)
    seen = {"margin": (Auc(0.9, 0.01),) * 4}
    assert "can pay: up to" in Possible(known, seen, inner, (0.4, 0.9, 0.99)).conclusion(0.99)
    said = Possible(known, seen, inner, (0.4, 0.8, 0.9)).conclusion(0.99)
    assert f"cannot pay by this readout: where the model is run with it, rows that leave {LATEST} steps" in said
    assert "90.0%" in said
    assert ("use a fixed depth" in said) != inner


def test_where_a_live_run_says_nothing_new_none_is_made() -> None:
    for subject in (countdown(by_row=False), countdown(granularity="sequence"), countdown(logits=None)):
        assert kept_live(subject, *recorded(subject), 0.99, 10) is None
    subject = countdown()
    kept = kept_live(subject, *recorded(subject), 0.99, 10)
    assert kept is not None
    assert (kept.late, dict(kept.depths), kept.agreement) == ((1, 1, 1), {"loop": 5}, 1)
