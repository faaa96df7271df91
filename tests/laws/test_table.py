"""``table``: every row runs the steps of its kind, wherever a subject says what kinds its rows are of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import haltkit
from cases import run_command
from haltkit.kinds import Kinds
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.gpt.subject import gpt_subject
from haltkit.models.reasoner.config import LayerConfig, build_reasoner
from haltkit.models.reasoner.subject import reasoner_subject
from haltkit.models.reasoner.task import make_task
from haltkit.policies import Table
from haltkit.setting import Setting
from haltkit.specs import spec_of
from haltkit.subject import Subject
from haltkit.weights import Weights, WeightsMisfit
from maps import wiggle

FULL = 6


def table(*depths: int, other: int = 3, regions: tuple[str, ...] = ("loop",)) -> Table:
    tensors = {f"{region}/depths": torch.tensor(depths) for region in regions}
    return Table(Weights({**tensors, **{f"{region}/other": torch.tensor([other]) for region in regions}}))


def text(model: LoopedGPT, execution: Any = "compact") -> Subject:
    windows = torch.arange(14).reshape(2, 7) * 5 % 16
    return gpt_subject(model, windows, batch=2, max_loops=FULL, execution=execution)


def chase(execution: Any = "compact") -> Subject:
    task = make_task("chase", {"nodes": 4, "first_nodes": 4, "longest": 4, "names": 6, "depths": (1, 2)})
    torch.manual_seed(0)
    model = build_reasoner(task, LayerConfig(d_model=16, n_head=2)).eval()
    sequences = task.test_sets(4, 0)["chains"]
    subject = reasoner_subject(model, task, sequences, batch=4, max_loops=FULL, execution=execution)
    return replace(subject, kinds=Kinds(lambda batch: batch.asked.long(), ("edges", "queries")))


def everywhere(subject: Subject, one: Table) -> dict[str, Table]:
    return dict.fromkeys(subject.regions, one)


@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_a_token_runs_the_steps_of_its_id_in_every_region(tiny_model: LoopedGPT, execution: Any) -> None:
    subject = text(tiny_model, execution)
    depths = [1 + token % 4 for token in range(10)]
    one = table(*depths, other=5, regions=subject.regions)
    sample = subject.samples[0]
    done = subject.run(sample, everywhere(subject, one))
    expected = [[depths[token] if token < 10 else 5 for token in row] for row in sample[:, :-1].tolist()]
    assert set(done.steps) == set(subject.regions)
    assert all(steps.tolist() == expected for steps in done.steps.values())
    masked = text(tiny_model, "masked")
    torch.testing.assert_close(done.output, masked.run(sample, everywhere(masked, one)).output, rtol=1e-4, atol=1e-4)


def test_a_table_of_one_depth_is_the_fixed_depth(tiny_model: LoopedGPT) -> None:
    for subject in (text(tiny_model), chase()):
        one, sample = table(4, 4, other=4, regions=subject.regions), subject.samples[0]
        same, fixed = subject.run(sample, everywhere(subject, one)), subject.run(sample, 4)
        torch.testing.assert_close(same.output, fixed.output, rtol=1e-4, atol=1e-4)


def test_no_row_runs_deeper_than_the_budget(tiny_model: LoopedGPT) -> None:
    for subject in (text(tiny_model), chase()):
        tables = [table(FULL + more, other=FULL, regions=subject.regions) for more in (3, 0)]
        done, expected = (subject.run(subject.samples[0], everywhere(subject, one)) for one in tables)
        assert all(int(steps.max()) == FULL for steps in done.steps.values())
        assert torch.equal(done.output, expected.output)


def test_a_row_depends_on_its_own_kind_alone_where_rows_do_not_see_each_other() -> None:
    one, kinds = table(2, 5, 1), torch.tensor([[0, 1, 2, 9]])
    assert one.steps(kinds, "loop").tolist() == [[2, 5, 1, 3]]
    order = torch.tensor([3, 1, 0, 2])
    assert torch.equal(one.steps(kinds[:, order], "loop"), one.steps(kinds, "loop")[:, order])
    assert one.deepest("loop") == 5


def test_it_is_measured_beside_policies_and_saved_as_a_spec(tmp_path: Path) -> None:
    subject = chase()
    weights = table(2, 5).weights.save(tmp_path / "w.safetensors")
    spec = f"table:weights={tmp_path / 'w.safetensors'}"
    assert str(spec_of(Table(weights))) == spec
    result = haltkit.compare(subject, policies=[spec, "norm:tau=0.1"], repeats=1)
    (row,) = (row for row in result.rows if row.spec == spec)
    asked = float(subject.samples[0].asked.double().mean())
    assert row.steps["loop"] == pytest.approx(2 + 3 * asked)
    assert not row.outcomes


def test_where_nothing_says_what_rows_are_it_is_refused(tiny_model: LoopedGPT) -> None:
    with pytest.raises(ValueError, match="does not say what its rows are"):
        haltkit.run_loop(wiggle, torch.ones(1, 3), table(1))
    subject = replace(chase(), kinds=None)
    with pytest.raises(ValueError, match="does not say its rows' kinds"):
        subject.run(subject.samples[0], table(1))
    both = text(tiny_model)
    mixed = {
        name: table(1, regions=both.regions) if n else haltkit.policy("norm:tau=1")
        for n, name in enumerate(both.regions)
    }
    with pytest.raises(ValueError, match="for all regions"):
        both.run(both.samples[0], mixed)
    decoding = gpt_subject(tiny_model, torch.zeros(1, 5, dtype=torch.long), mode="decode", max_loops=FULL)
    with pytest.raises(ValueError, match="mode forward"):
        decoding.run(decoding.samples[0], table(1, regions=decoding.regions))


def test_a_table_of_another_region_and_kinds_below_zero_are_refused() -> None:
    subject = chase()
    with pytest.raises(WeightsMisfit, match="for core, and this loop is 'loop'"):
        subject.run(subject.samples[0], table(1, 1, regions=("core",)))
    with pytest.raises(ValueError, match="kind -1"):
        table(1).steps(torch.tensor([-1]), "loop")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loop/other": None}, "'loop/other' is missing"),
        ({"loop/dephts": torch.ones(1, dtype=torch.int64)}, "'loop/dephts' is unknown"),
        ({"loop/depths": torch.tensor([1, 0])}, "from 1"),
        ({"loop/depths": torch.ones(2)}, "float32"),
        ({"loop/other": torch.tensor([1, 2])}, r"\(2,\)"),
    ],
)
def test_what_are_no_weights_of_a_table_is_refused_in_one_line(
    change: dict[str, Tensor | None], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {name: one for name, one in (table(1, 2).weights.tensors | change).items() if one is not None}
    save_file(tensors, tmp_path / "w.safetensors")
    spec = f"table:weights={tmp_path / 'w.safetensors'}"
    with pytest.raises(WeightsMisfit, match=message):
        haltkit.policy(spec)
    assert run_command("solve", "chase", "0>1 1>1 0?", "--policy", spec) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_setting_of_tables_is_of_policies_that_are_looked_up() -> None:
    setting = Setting.of(table(1, 2), ["loop"])
    assert setting.looked_up
    assert setting.depth is setting.by_row is None
    assert not Setting.of("norm:tau=1", ["loop"]).looked_up
