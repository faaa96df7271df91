"""KV caches while attached: what is refused, and what each mode promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from haltkit.attachment import errors
from haltkit.attachment.description import Loop
from standins import AtDepths, RavenForCausalLM, SlotCache

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
PIECES = (IDS[:, :6], IDS[:, 6:7], IDS[:, 7:8], IDS[:, 8:])
CORE_SLOTS = 2  # cache slots that one iteration of the stand-in writes


@pytest.fixture
def model() -> RavenForCausalLM:
    torch.manual_seed(0)
    return RavenForCausalLM().eval()


def decode(model: nn.Module, steps: tuple[int, ...] = (6, 6, 6, 6)) -> tuple[list[Tensor], SlotCache]:
    cache = SlotCache()
    return [model(ids, (k, 0), cache).logits for ids, k in zip(PIECES, steps, strict=True)], cache


@torch.no_grad()
def test_one_depth_for_every_call_needs_no_mode_and_is_exact(model: RavenForCausalLM) -> None:
    with haltkit.attach(model, "fixed:steps=3"):
        halted, _ = decode(model)
    expected, _ = decode(model, (3, 3, 3, 3))
    assert all(torch.equal(a, b) for a, b in zip(halted, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("depths", [(3, 4), (4, 3), (3, 6)])
def test_varying_depth_is_refused(model: RavenForCausalLM, depths: tuple[int, ...]) -> None:
    with pytest.raises(errors.KVDepthMismatch, match="kv='uniform'"), haltkit.attach(model, AtDepths(*depths)):
        decode(model)


@torch.no_grad()
def test_uniform_keeps_the_depth_of_the_first_call(model: RavenForCausalLM) -> None:
    with haltkit.attach(model, AtDepths(3, 5), kv="uniform") as session:
        halted, _ = decode(model)
        assert session.computed == 4 * 3
        assert (session.steps["loop"] == 3).all()
        decode(model)  # another cache, another depth
        assert session.computed == 4 * 3 + 4 * 5
    expected, _ = decode(model, (3, 3, 3, 3))
    assert all(torch.equal(a, b) for a, b in zip(halted, expected, strict=True))


@torch.no_grad()
def test_freeze_fills_every_slot_from_the_halted_state(model: RavenForCausalLM) -> None:
    """The reference is a loop over the model's own step: the state stays, the body runs on."""
    depths = (3, 1, 6, 2)
    with haltkit.attach(model, AtDepths(*depths), kv="freeze") as session:
        halted, cache = decode(model)
        assert session.skipped == 0
    own, expected = SlotCache(), []
    for ids, depth in zip(PIECES, depths, strict=True):
        e = model.embed(ids, own)
        x, block = model.initial(e), torch.tensor(0)
        for k in range(1, 7):
            new = model.core_block_forward(x, e, block, own)
            x = new if k <= depth else x
        expected.append(model.predict_from_latents(x, own).logits)
    assert all(torch.equal(a, b) for a, b in zip(halted, expected, strict=True))
    assert cache.slots.keys() == own.slots.keys()


@torch.no_grad()
@pytest.mark.parametrize("stride", [None, CORE_SLOTS])
def test_copy_writes_the_last_keys_into_the_slots_of_skipped_iterations(
    model: RavenForCausalLM, stride: int | None
) -> None:
    depths = (3, 2, 6, 4) if stride is None else (3, 1, 6, 1)
    with haltkit.attach(model, AtDepths(*depths), kv="copy", kv_stride=stride) as session:
        halted, cache = decode(model)
        assert session.computed == sum(depths)
    assert "update" not in vars(cache)
    own, expected = SlotCache(), []
    for ids, depth in zip(PIECES, depths, strict=True):
        e = model.embed(ids, own)
        x, block = model.initial(e), torch.tensor(0)
        for _ in range(depth):
            x = model.core_block_forward(x, e, block, own)
        for slot in range(CORE_SLOTS * depth + 1, CORE_SLOTS * 6 + 1):
            source = slot - CORE_SLOTS
            new = ids.shape[1]
            keys, values = (t[:, :, -new:] for t in own.slots[source])
            own.update(keys, values, slot)
        expected.append(model.predict_from_latents(x, own).logits)
    assert all(torch.equal(a, b) for a, b in zip(halted, expected, strict=True))
    for slot, (keys, values) in own.slots.items():
        assert torch.equal(keys, cache.slots[slot][0])
        assert torch.equal(values, cache.slots[slot][1])


@torch.no_grad()
def test_copy_that_cannot_know_the_distance_says_so_and_leaves_the_cache_as_it_was(model: RavenForCausalLM) -> None:
    cache = SlotCache()
    with pytest.raises(errors.KVDepthMismatch, match="say kv_stride="), haltkit.attach(model, AtDepths(1), kv="copy"):
        model(PIECES[0], (6, 0), cache)
    assert "update" not in vars(cache)


def test_modes_that_make_no_sense_are_refused(model: RavenForCausalLM) -> None:
    with pytest.raises(ValueError, match="allowed are refuse, uniform, freeze, copy"):
        haltkit.attach(model, "norm:tau=1", kv="ignore")
    with pytest.raises(ValueError, match="is for kv='copy'"):
        haltkit.attach(model, "norm:tau=1", kv_stride=2)


class DictCached(nn.Module):
    """A loop whose layer keeps keys in a plain dictionary, by the loop's index."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Remembering()

    def forward(self, x: Tensor, cache: dict[int, Tensor], n: int = 5) -> Tensor:
        for k in range(n):
            x = self.cell(x, cache, k)
        return x


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, cache: dict[int, Tensor], k: int) -> Tensor:
        new = torch.tanh(self.linear(x))
        cache[k] = torch.cat([cache[k], new], 1) if k in cache else new
        return new + 0.1 * cache[k].mean(1, keepdim=True)


@torch.no_grad()
def test_a_dictionary_that_is_filled_is_a_cache_too() -> None:
    torch.manual_seed(0)
    model, x = DictCached().eval(), torch.randn(2, 3, 4)

    def calls() -> list[Tensor]:
        cache: dict[int, Tensor] = {}
        return [model(x, cache), model(x[:, :1], cache)]

    with pytest.raises(errors.KVDepthMismatch), haltkit.attach(model, AtDepths(2, 4), body=["cell"]):
        calls()
    with haltkit.attach(model, AtDepths(2), body=["cell"], kv="uniform") as session:
        calls()
        assert session.computed == 4
    with (
        pytest.raises(errors.KVDepthMismatch, match="dictionary"),
        haltkit.attach(model, AtDepths(2), Loop(("cell",)), kv="copy"),
    ):
        calls()


@torch.no_grad()
@pytest.mark.parametrize("kv", ["uniform", "freeze", "copy"])
def test_generate_of_hrm_text_works_in_every_mode(kv: Any) -> None:
    pytest.importorskip("transformers.models.hrm_text", reason="transformers with HRM-text is not installed")
    from cases import hrm_model

    torch.manual_seed(0)
    model = hrm_model()
    keys: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    with haltkit.attach(model, AtDepths(3, 2, 4, 2), kv=kv) as session:
        out = model.generate(IDS, **keys)
    assert out.shape == (2, 13)
    assert session.computed + session.skipped == 4 * model.config.H_cycles
    assert (session.skipped == 0) == (kv == "freeze")


@torch.no_grad()
def test_a_dictionary_that_is_only_read_is_no_cache() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Reading()

        def forward(self, x: Tensor, given: dict[str, Tensor]) -> Tensor:
            for _ in range(5):
                x = self.cell(x, given)
            return x

    class Reading(nn.Module):
        def forward(self, x: Tensor, given: dict[str, Tensor]) -> Tensor:
            return torch.tanh(x + given["c"])

    model, given = Conditioned(), {"c": torch.ones(4)}
    with haltkit.attach(model, AtDepths(2, 4, 1), body=["cell"]) as session:
        for _ in range(3):
            model(torch.zeros(2, 3, 4), given)
        assert session.computed == 7


@torch.no_grad()
def test_a_cache_inside_a_tuple_is_seen(model: RavenForCausalLM) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Unpacking()

        def forward(self, x: Tensor, cache: SlotCache) -> Tensor:
            for k in range(5):
                x = self.cell(x, (cache, k))
            return x

    class Unpacking(nn.Module):
        def forward(self, x: Tensor, packed: tuple[SlotCache, int]) -> Tensor:
            keys, _ = packed[0].update(x, x, packed[1])
            return torch.tanh(keys[:, -x.shape[1] :])

    packed, cache = Packed(), SlotCache()
    with pytest.raises(errors.KVDepthMismatch), haltkit.attach(packed, AtDepths(2, 4), body=["cell"]):
        for _ in range(2):
            packed(torch.zeros(2, 3, 4), cache)
