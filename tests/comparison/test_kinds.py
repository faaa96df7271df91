"""Depths of rows, known beforehand: each row runs exactly its steps, and one depth for all kinds is the fixed depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from countdown import Countdown, readout
from torch import Tensor

import haltkit
from haltkit.driving import Pass
from haltkit.kinds import Kinds, per_row
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.gpt.subject import gpt_subject
from haltkit.models.reasoner.config import LayerConfig, build_reasoner
from haltkit.models.reasoner.subject import reasoner_subject
from haltkit.models.reasoner.task import make_task
from haltkit.policies import Fixed
from haltkit.setting import Depth, Setting
from haltkit.subject import Subject

FULL = 6


def text_subject(model: LoopedGPT, execution: Any = "compact") -> Subject:
    """Two windows of six tokens; a token's kind is whether its id is odd."""
    windows = torch.arange(14).reshape(2, 7) * 5 % 16
    subject = gpt_subject(model, windows, batch=2, max_loops=FULL, execution=execution)
    return replace(subject, kinds=Kinds(lambda window: window[:, :-1] % 2, ("even", "odd"), "parity"))


def chase_subject(execution: Any = "compact") -> Subject:
    task = make_task("chase", {"nodes": 4, "first_nodes": 4, "longest": 4, "names": 6, "depths": (1, 2)})
    torch.manual_seed(0)
    model = build_reasoner(task, LayerConfig(d_model=16, n_head=2)).eval()
    return reasoner_subject(model, task, task.test_sets(4, 0)["chains"], batch=4, max_loops=FULL, execution=execution)


def depths_of(subject: Subject, *steps: Mapping[str, int]) -> Setting:
    assert subject.kinds is not None
    return Setting(subject.kinds.depths({r: [each[r] for each in steps] for r in subject.regions}))


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_every_token_runs_the_steps_of_its_kind_in_every_region(tiny_model: LoopedGPT, execution: str) -> None:
    subject = text_subject(tiny_model, execution)
    even = {region: 1 + number for number, region in enumerate(subject.regions)}
    odd = dict.fromkeys(subject.regions, 4)
    done = subject.run(subject.samples[0], depths_of(subject, even, odd))
    is_odd = subject.samples[0][:, :-1] % 2 == 1
    for region in subject.regions:
        assert torch.equal(done.steps[region], torch.where(is_odd, odd[region], even[region]))
    assert done.outcome == {}


def test_a_depth_by_kind_is_causal_and_the_same_function_in_both_executions(tiny_model: LoopedGPT) -> None:
    """Masked is the reference; and a token's answer is what a pass over the text up to it gives."""
    compact, masked = text_subject(tiny_model), text_subject(tiny_model, "masked")
    steps = (dict.fromkeys(compact.regions, 2), dict.fromkeys(compact.regions, 5))
    sample = compact.samples[0]
    out = compact.run(sample, depths_of(compact, *steps)).output
    torch.testing.assert_close(out, masked.run(sample, depths_of(masked, *steps)).output, rtol=1e-4, atol=1e-4)
    for upto in range(1, 6):
        part = sample[:, : upto + 1]
        torch.testing.assert_close(
            masked.run(part, depths_of(masked, *steps)).output[:, -1], out[:, upto - 1], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("depth", [1, 3, FULL])
def test_one_depth_for_all_kinds_is_the_fixed_depth(tiny_model: LoopedGPT, depth: int) -> None:
    chase = replace(chase_subject(), kinds=Kinds(lambda batch: batch.asked.long(), ("edges", "queries")))
    for subject in (text_subject(tiny_model), chase):
        sample = subject.samples[0]
        same = dict.fromkeys(subject.regions, depth)
        by_kind, fixed = subject.run(sample, depths_of(subject, same, same)), subject.run(sample, depth)
        torch.testing.assert_close(by_kind.output, fixed.output, rtol=1e-4, atol=1e-4)


def test_a_kind_of_a_whole_sequence_is_that_of_each_of_its_rows() -> None:
    subject = chase_subject()
    by_board = Kinds(lambda batch: torch.arange(len(batch.inputs)) % 2)
    done = replace(subject, kinds=by_board).run(subject.samples[0], Setting(by_board.depths({"loop": (2, 5)})))
    assert done.steps["loop"].tolist() == [[2] * 8, [5] * 8] * 2


def test_a_model_of_ones_own_gives_its_rows_depths_by_a_function() -> None:
    model = Countdown().eval()

    def by_row(inputs: Tensor, steps: Mapping[str, Tensor]) -> Pass:
        budget = per_row(steps["loop"], inputs.shape[:-1])
        result = haltkit.run_loop(model.body, inputs, Fixed(int(budget.max())), max_steps=FULL, budget=budget)
        return Pass(result.x, {"loop": result.steps}, {"loop": result.outcome})

    hops = torch.tensor([[1.0, 2.0, 5.0]])
    sample = torch.stack([hops, torch.zeros_like(hops)], -1)
    kinds = Kinds(lambda inputs: inputs[..., 0].long())
    more: dict[str, Any] = {"samples": [sample], "kinds": kinds, "full_depth": FULL}
    subject = Subject.of_modules(model, lambda x, n: model(x, n), {"loop": "body"}, by_row=by_row, **more)
    told = Setting(kinds.depths({"loop": (1, 1, 2, 1, 1, 4)}))
    assert readout(subject.run(sample, told).output).argmax(-1).tolist() == [[1, 1, 0]]  # 5 hops want 5 steps
    with pytest.raises(ValueError, match="by_row"):
        Subject.of_modules(model, lambda x, n: model(x, n), {"loop": "body"}, **more)


def test_labels_say_what_differs_and_stay_short() -> None:
    kinds = Kinds(lambda sample: sample, ("edges", "queries"))
    assert Setting(kinds.depths({"loop": (3, 7)})).label == "fixed by kind of row: edges 3, queries 7"
    numbers = Kinds(lambda sample: sample, what="empty cells")
    assert numbers.depths({"loop": (2, 2, 2, 5)}).label == "by empty cells: 0..2 2, 3 5"
    assert numbers.depths({"loop": tuple(range(1, 60))}).label == "by empty cells: 1 to 59 steps"
    assert Setting(numbers.depths({"loop": (2, 5)})).text is None


def test_depths_that_do_not_fit_the_kinds_are_refused() -> None:
    named = Kinds(lambda sample: sample, ("edges", "queries"))
    for wrong in ((1,), (1, 2, 3), (), (0, 1)):
        with pytest.raises(ValueError, match="'loop'"):
            named.depths({"loop": wrong})
    depths = Kinds(lambda sample: sample).depths({"loop": (1, 2)})
    for unknown in (torch.tensor([0, 2]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="kind"):
            depths.of(unknown)


def test_models_halted_from_outside_and_decoders_refuse_depths_of_rows(tiny_model: LoopedGPT) -> None:
    from cases import Refiner

    kinds = Kinds(lambda sample: sample.long())
    attached = Subject.attached(Refiner(), samples=[torch.zeros(1, 4)], loop=haltkit.Loop(["core"]))
    with pytest.raises(ValueError, match="from outside"):
        attached.run(attached.samples[0], Setting(kinds.depths({"loop": (1,)})))
    decoding = gpt_subject(tiny_model, torch.zeros(1, 5, dtype=torch.long), mode="decode", max_loops=FULL)
    with pytest.raises(ValueError, match="by_row"):
        decoding.run(decoding.samples[0], Setting(kinds.depths(dict.fromkeys(decoding.regions, (1,)))))


def test_budgets_of_rows_must_name_the_regions_and_be_the_only_ones(tiny_model: LoopedGPT) -> None:
    tokens = torch.zeros(1, 4, dtype=torch.long)
    budget = {region: torch.ones(1, 4, dtype=torch.long) for region in tiny_model.regions}
    with pytest.raises(ValueError, match="total_loops"):
        tiny_model.forward_adaptive(tokens, "norm:tau=1", total_loops=9, budget=budget)
    with pytest.raises(ValueError, match="regions"):
        tiny_model.forward_adaptive(tokens, "norm:tau=1", budget={"elsewhere": torch.ones(1, 4, dtype=torch.long)})


def test_one_depth_is_a_depth_and_not_one_of_rows() -> None:
    setting = Setting(Depth({"loop": 3}))
    assert setting.by_row is None
    assert setting.depth is not None
