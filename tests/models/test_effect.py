"""What a cut of one region does to the model's prediction: examples/bench_effect.py against forward passes."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from haltkit.models.gpt.model import LoopedGPT

EFFECT = runpy.run_path(str(Path(__file__).parent.parent.parent / "examples" / "bench_effect.py"))
FULL = 5


@pytest.mark.parametrize("place", [0, -1])
def test_a_cut_region_is_a_forward_pass_at_these_depths(tiny_model: LoopedGPT, place: int) -> None:
    name = list(tiny_model.regions)[place]
    ids = torch.randint(0, tiny_model.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = EFFECT["cut"](tiny_model, ids, name, FULL, FULL)
        full = tiny_model(ids, FULL).argmax(-1)
        for k in range(1, FULL + 1):
            depths = dict.fromkeys(tiny_model.regions, FULL) | {name: k}
            assert torch.equal(found["same"][k - 1], tiny_model(ids, depths).argmax(-1) == full)
    assert not found["same"].all()  # or nothing was compared
    assert len(found["states"]) == FULL + 1


def test_a_rule_that_knows_takes_the_oracle_s_steps_and_one_that_knows_nothing_a_fixed_depth() -> None:
    depths = torch.tensor([[1, 1, 1, 2, 4]] * 20)
    same = depths <= torch.arange(1, 5).view(-1, 1, 1)
    knows = EFFECT["fewest"]((~same).float(), same)
    nothing = EFFECT["fewest"](torch.zeros(same.shape), same)
    assert knows == pytest.approx(dict.fromkeys(EFFECT["LEVELS"], 1.8))
    assert nothing == pytest.approx(dict.fromkeys(EFFECT["LEVELS"], 4.0))
