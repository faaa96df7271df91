"""Packed weights: the same model up to rounding, without touching the one that they were made of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from haltkit.models.checkpoint import build_model
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.gpt.packed import can_pack, packed


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> LoopedGPT:
    torch.manual_seed(0)
    return build_model(tiny_config).eval()


needs_packing = pytest.mark.skipif(not can_pack(torch.ones(1, 1)), reason="this build of PyTorch cannot pack weights")


@needs_packing
def test_a_packed_model_gives_the_same_logits_up_to_rounding(model: LoopedGPT) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin, ids = packed(model), torch.tensor([[5, 17, 3, 240, 99, 7, 7, 300]])
    assert twin is not model
    with torch.no_grad():
        torch.testing.assert_close(twin(ids, 4), model(ids, 4), rtol=1e-4, atol=1e-5)
        adaptive = [one.forward_adaptive(ids, "norm:tau=0.5", max_loops=6) for one in (twin, model)]
    torch.testing.assert_close(adaptive[0].logits, adaptive[1].logits, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert any(isinstance(module, nn.Linear) for module in model.modules())
    assert not any(isinstance(module, nn.Linear) for module in twin.modules())


@needs_packing
def test_the_twin_shares_what_is_not_packed(model: LoopedGPT) -> None:
    twin = packed(model)
    assert twin.wte.weight is model.wte.weight
    assert twin.norm_f is not None
    assert list(twin.regions) == list(model.regions)


def test_a_model_that_trains_or_is_not_in_float32_stays_as_it_is(model: LoopedGPT, tiny_config: ModelConfig) -> None:
    wide = build_model(tiny_config).eval().double()
    assert packed(wide) is wide
    training = build_model(tiny_config).train()
    assert packed(training) is training
