"""generate with a KV cache whose slots belong to iterations: what each mode gives, against loops written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import haltkit
from cases import hrm_model, needs
from haltkit.attachment.errors import KVDepthMismatch
from standins import with_config

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns as it likes

LOOPS, NEW = 4, 5
IDS = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Looped:
    """A looped model of transformers.

    Attributes:
        model: with tiny random weights.
        setting: in its configuration, the number of iterations.
        fields: the description; none where there is a preset.
        call: begins a call by hand on (tokens, cache): the first state, a step from (state, number) and the logits of
            the last position from the last state.
        slots: of the cache, that an iteration writes.
    """

    model: Any
    setting: str
    fields: dict[str, Any]
    call: Callable[[Tensor, Any], tuple[Tensor, Callable[[Tensor, int], Tensor], Callable[[Tensor], Tensor]]]
    slots: Callable[[int], list[int]] = lambda k: []


def mask_of(model: Any, x: Tensor, cache: Any, positions: Tensor) -> dict[str, Any]:
    """What transformers' functions for masks are given by the models."""
    ones = torch.ones(len(x), cache.get_seq_length() + x.shape[1], dtype=torch.long)
    return {
        "config": model.config,
        "inputs_embeds": x,
        "attention_mask": ones,
        "cache": cache,
        "position_ids": positions,
    }


def positions_of(ids: Tensor, cache: Any) -> Tensor:
    return (torch.arange(ids.shape[1]) + cache.get_seq_length()).expand(len(ids), -1)


def hrm() -> Looped:
    model = hrm_model()
    from transformers.masking_utils import create_causal_mask

    base, turns = model.model, model.config.L_cycles

    def call(ids: Tensor, cache: Any) -> Any:
        x, positions = base.embed_tokens(ids) * base.embedding_scale, positions_of(ids, cache)
        keys = {
            "attention_mask": create_causal_mask(**mask_of(model, x, cache, positions)),
            "cache": cache,
            "position_embeddings": base.rotary_emb(x, positions),
            "position_ids": positions,
        }
        low = [base.z_L_init.expand_as(x).contiguous()]

        def step(high: Tensor, k: int) -> Tensor:
            first = (k - 1) * (turns + 1)
            for turn in range(turns):
                low[0] = base.L_module(low[0] + high, cycle_offset=first + turn, **keys)
            new: Tensor = base.H_module(high + low[0], cycle_offset=first + turns, **keys)
            return new

        return x, step, lambda high: model.lm_head(high[:, -1:])

    def slots(k: int) -> list[int]:
        return list(range((k - 1) * (turns + 1), k * (turns + 1)))

    return Looped(model, "H_cycles", {}, call, slots)


def dory(mode: str = "per_loop") -> Looped:
    needs("transformers.models.dory")
    from transformers import DoryConfig, DoryForCausalLM
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    config = DoryConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        n_input_layers=1,
        n_output_layers=1,
        n_recurrent_loops=LOOPS,
        recurrent_kv_cache_mode=mode,
        initializer_range=0.3,
        pad_token_id=0,
    )
    model = DoryForCausalLM(config).eval()
    base = model.model

    def call(ids: Tensor, cache: Any) -> Any:
        x, positions = base.embed_tokens(ids), positions_of(ids, cache)
        given = mask_of(model, x, cache, positions)
        masks = {
            "full_attention": create_causal_mask(**given),
            "sliding_attention": create_sliding_window_causal_mask(**given),
        }
        if mode == "per_loop" and len(cache.layers) == config.num_hidden_layers:
            cache.layers += [copy.deepcopy(cache.layers[1]) for _ in range(2 * (LOOPS - 1))]
        past = {i: (c.keys, c.values) for i, c in enumerate(cache.layers) if c.is_initialized}

        def layer(number: int, x: Tensor, offset: int = 0, reads: Any = None) -> Tensor:
            kind = base.layers[number].attention_type
            angles = base.rotary_emb(x, positions, kind)
            keys = {"attention_mask": masks[kind], "position_embeddings": angles, "cache": cache}
            out: Tensor = base.layers[number](x, cache_offset=offset, shared_kv_states=reads, **keys)
            return out

        start = layer(0, x)
        first = base.norm(start)

        def step(x: Tensor, k: int) -> Tensor:
            x = base.norm(x) + first
            shared = mode == "last_loop"
            for number in (1, 2):
                x = layer(number, x, 0 if k == 1 or shared else 2 * k - 1, past if shared and k < LOOPS else None)
            return x

        return start, step, lambda x: model.lm_head(base.norm(layer(3, x))[:, -1:])

    return Looped(
        model,
        "n_recurrent_loops",
        {"body": ["model.layers.1", "model.layers.2"], "scope": "model", "initial": None},
        call,
    )


def inkling() -> Looped:
    needs("transformers.models.inkling2_loop")
    from transformers.models.inkling2_loop.configuration_inkling2_loop import Inkling2LoopTextConfig
    from transformers.models.inkling2_loop.modeling_inkling2_loop import Inkling2LoopForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = Inkling2LoopTextConfig(
        vocab_size=50,
        unpadded_vocab_size=50,
        hidden_size=32,
        num_hidden_layers=6,
        **heads,
        **{f"swa_{name}": number for name, number in heads.items()},
        sliding_window_size=16,
        rel_extent=16,
        d_rel=4,
        moe_intermediate_size=32,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_layers_per_attn_res_block=2,
        loop_layer_index_start=2,
        loop_layer_index_end=4,
        loop_num_passes=LOOPS,
        loop_gate_rank=4,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = Inkling2LoopForCausalLM(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.copy_(0.2 * torch.randn(weights.shape))
    fields = {"body": ["model.layers.2", "model.layers.3"], "scope": "model", "initial": None}
    return Looped(model, "loop_num_passes", fields, lambda ids, cache: NotImplemented)


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def generated(looped: Looped, policy: Any = None, kv: Any = "refuse", **keys: Any) -> Any:
    torch.manual_seed(0)
    how = {} if policy is None else {"custom_generate": haltkit.generation(policy, kv=kv, **looped.fields)}
    asked = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **keys}
    return looped.model.generate(IDS, return_dict_in_generate=True, output_logits=True, **asked, **how)


@pytest.mark.parametrize("kv", ["refuse", "uniform", "freeze"])
@pytest.mark.parametrize("build", [dory, inkling])
@pytest.mark.parametrize("keys", [{}, {"do_sample": True, "top_k": 9}], ids=["greedy", "sampling"])
def test_tokens_are_those_of_the_model_at_that_depth(
    build: Callable[[], Looped], kv: str, keys: dict[str, Any]
) -> None:
    looped = build()
    seen: list[Tensor] = []
    for k in range(1, LOOPS + 1):
        expected = with_config(
            looped.model.config, lambda looped=looped: generated(looped, **keys), **{looped.setting: k}
        )
        out = generated(looped, f"fixed:steps={k}", kv, **keys)
        assert torch.equal(out.sequences, expected.sequences)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, expected.logits, strict=True))
        assert out.steps.eq(k).all()
        assert all(not torch.allclose(out.logits[0], other, atol=1e-5) for other in seen)  # the depth matters
        seen.append(out.logits[0])


@pytest.mark.parametrize("build", [dory, inkling])
def test_discover_proposes_the_call(build: Callable[[], Looped]) -> None:
    looped = build()
    run = lambda: looped.model(IDS, use_cache=False).logits  # noqa: E731
    best = haltkit.discover(
        looped.model, run, lambda k: with_config(looped.model.config, run, **{looped.setting: k})
    ).candidates[0]
    assert best.holds
    assert best.fields() == looped.fields


class AtRows:
    """Halts each row of the n-th loop at the depth that the n-th table has for it."""

    def __init__(self, tables: list[Tensor]) -> None:
        self.tables = list(tables)

    def init(self, x0: Tensor) -> Tensor:
        return self.tables.pop(0)

    def update(self, state: Tensor, step: haltkit.LoopStep) -> tuple[Tensor, haltkit.Verdict]:
        return state, haltkit.Verdict((state - step.k).float(), step.k >= state)


def tables(deepest: int | None = None) -> list[Tensor]:
    """Depths of all rows in each call, drawn; with ``deepest``, no row of a call is deeper, and one is as deep."""
    drawn = torch.Generator().manual_seed(1)
    found = [torch.randint(1, (deepest or LOOPS) + 1, (3, n), generator=drawn) for n in (7, *[1] * (NEW - 1))]
    for table in found:
        if deepest:
            table[0, -1] = deepest
    return found


def by_hand(looped: Looped, depths: list[Tensor], kv: str) -> tuple[Tensor, list[Tensor]]:
    """The model's own parts, and ``torch.where`` for the rows that have halted."""
    from transformers import DynamicCache

    cache, ids, logits = DynamicCache(config=looped.model.config), IDS, []
    for depth in depths:
        given = ids if not logits else ids[:, -1:]
        x, step, readout = looped.call(given, cache)
        computed = LOOPS if kv == "freeze" else int(depth.max())
        for k in range(1, computed + 1):
            x = torch.where((depth >= k).unsqueeze(-1), step(x, k), x)
        for k in range(computed + 1, LOOPS + 1) if kv == "copy" else ():
            for source, slot in zip(looped.slots(computed), looped.slots(k), strict=True):
                layer, new = cache.layers[source], given.shape[1]
                cache.update(layer.keys[:, :, -new:], layer.values[:, :, -new:], slot)
        logits.append(readout(x)[:, -1].float())
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    return ids, logits


ROWS: dict[str, tuple[Callable[[], Looped], str, Callable[[], list[Tensor]]]] = {
    "hrm, refuse": (hrm, "refuse", lambda: tables(3)),
    "hrm, uniform": (hrm, "uniform", lambda: tables(3)),
    "hrm, freeze": (hrm, "freeze", tables),
    "hrm, copy": (hrm, "copy", lambda: [torch.full((3, 7), LOOPS), *tables()[1:]]),  # the first shows where slots are
    "dory, refuse": (dory, "refuse", lambda: tables(3)),
    "dory, uniform": (dory, "uniform", lambda: tables(2)),
    "dory, freeze": (dory, "freeze", tables),
    "dory whose last loop writes, freeze": (lambda: dory("last_loop"), "freeze", tables),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_at_depths_of_their_own_equal_a_loop_by_hand(case: str) -> None:
    build, kv, drawn = ROWS[case]
    looped, depths = build(), drawn()
    assert all(len(table[:, -1].unique()) > 1 for table in depths[1:3])
    out = generated(looped, AtRows(depths), kv)
    if kv == "uniform":  # the first call's deepest row decides for all later calls
        depths = [depths[0], *(torch.full_like(table, int(depths[0].max())) for table in depths[1:])]
    ids, logits = by_hand(looped, depths, kv)
    assert torch.equal(out.sequences, ids)
    assert torch.equal(out.steps[:, :, 0], torch.stack([table[:, -1] for table in depths], 1))
    assert all(torch.equal(a, b) for a, b in zip(out.logits, logits, strict=True))


@pytest.mark.parametrize("build", [hrm, dory, inkling])
def test_a_cache_that_each_step_writes_is_seen_in_inference_mode(build: Callable[[], Looped]) -> None:
    looped = build()
    with torch.inference_mode():
        expected = with_config(looped.model.config, lambda: generated(looped), **{looped.setting: 2})
        assert torch.equal(generated(looped, "fixed:steps=2").sequences, expected.sequences)
        own = with_config(looped.model.config, lambda: in_sessions(looped, None), **{looped.setting: 2})
        assert torch.equal(in_sessions(looped, "fixed:steps=2"), own)


def in_sessions(looped: Looped, policy: str | None) -> Tensor:
    """A text in three pieces with one cache, each piece in a session of its own."""
    from transformers import DynamicCache

    cache, seen = DynamicCache(config=looped.model.config), []
    for piece in IDS.split([4, 2, 1], 1):
        if policy is None:
            seen.append(looped.model(piece, cache=cache, use_cache=True).logits)
            continue
        with haltkit.attach(looped.model, policy, **looped.fields):
            seen.append(looped.model(piece, cache=cache, use_cache=True).logits)
    return torch.cat(seen, 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kv", [{"kv": "refuse"}, {"kv": "uniform"}, {"kv": "copy", "kv_stride": 1}])
def test_a_cache_that_only_the_last_loop_writes_is_refused_after_a_halt(kv: dict[str, Any], mode: Any) -> None:
    """Later tokens would miss the keys and values of this one: without the error, other tokens come out."""
    looped = dory("last_loop")
    with mode():
        refused(looped, kv)


def refused(looped: Looped, kv: dict[str, Any]) -> None:
    for k in range(1, LOOPS):
        generation = haltkit.generation(f"fixed:steps={k}", **kv, **looped.fields)
        with pytest.raises(KVDepthMismatch, match=r"none of its \d iterations.*kv='freeze'"):
            looped.model.generate(IDS, max_new_tokens=NEW, do_sample=False, custom_generate=generation)
    generation = haltkit.generation(f"fixed:steps={LOOPS}", **kv, **looped.fields)
    out = looped.model.generate(IDS, max_new_tokens=NEW, do_sample=False, custom_generate=generation)
    assert torch.equal(out, generated(looped).sequences)
    # What runs without a cache is exact, and so is a call whose last step is not skipped.
    expected = with_config(looped.model.config, lambda: generated(looped, use_cache=False), n_recurrent_loops=2)
    assert torch.equal(generated(looped, "fixed:steps=2", use_cache=False).sequences, expected.sequences)
