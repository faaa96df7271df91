"""Wavefront generation: with one region and a width of 1 it is the sequential decoder; what is committed never changes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from haltkit.models.checkpoint import build_model
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.decoding import Decoder
from haltkit.models.gpt.generation import Settings, stream
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.gpt.sampling import GenerationError, Sampling
from haltkit.models.gpt.wavefront import Wavefront

POLICIES = [
    "norm:tau=0.08", "accel:tau=0.05", "kl:tau=1e-5", "fixed:steps=3", "norm:tau=100", "norm:tau=1e-30",
    "norm:tau=0.1,patience=2,min_steps=3", "any(accel:tau=0.02|fixed:steps=7)", "stable:times=2",
]  # fmt: skip
SETTLED = "norm:tau=1e-9"  # reached in float64 long before the budget


def built(config: ModelConfig, **changes: Any) -> LoopedGPT:
    torch.manual_seed(0)
    return build_model(replace(config, **changes)).eval().double()


@pytest.fixture(scope="module")
def one_region(tiny_config: ModelConfig) -> LoopedGPT:
    return built(tiny_config, regions=("2",), block_size=32)


@pytest.fixture(scope="module")
def regions(tiny_config: ModelConfig) -> LoopedGPT:
    """Two regions whose states settle: a norm on the state holds them together."""
    return built(tiny_config, block_size=32, state_norm=True)


PROMPTS = [[5, 17, 3, 240, 99], [7, 7, 300]]


@pytest.mark.parametrize("layout", ["depth-indexed", "last"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_one_open_position_and_one_region_is_the_sequential_decoder_token_for_token(
    one_region: LoopedGPT, policy: str, temperature: float, layout: str
) -> None:
    common: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature, "layout": layout, "max_loops": 10}
    sequential = one_region.generate(PROMPTS, policy, **common)
    wavefront = one_region.generate(PROMPTS, policy, sampler="wavefront", width=1, **common)
    assert wavefront == sequential  # tokens, steps of each, and why they ended


@pytest.mark.parametrize("layout", ["depth-indexed", "last"])
@pytest.mark.parametrize("width", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_states_settle_fully_every_width_gives_the_text_of_full_depth(
    regions: LoopedGPT, width: int, temperature: float, layout: str
) -> None:
    common: dict[str, Any] = {"max_new_tokens": 16, "temperature": temperature, "max_loops": 120}
    exact = regions.generate(PROMPTS, "fixed:steps=60", **common)
    wavefront = regions.generate(
        PROMPTS, "fixed:steps=60", sampler="wavefront", width=width, commit=SETTLED, layout=layout, **common
    )
    assert wavefront.tokens == exact.tokens
    assert max(steps for text in wavefront.steps["2"] for steps in text) < 120  # settled, not out of budget


def caches(decoder: Decoder, end: int) -> list[Tensor]:
    """What later positions read of those before ``end``, at every step of every block."""
    kept = [cache for blocks in decoder.caches.values() for cache in blocks]
    return [cache.kv[: cache.filled, 0, :end].clone() for cache in kept]


@pytest.mark.parametrize("layout", ["depth-indexed", "last"])
@pytest.mark.parametrize("policy", ["norm:tau=0.3", "fixed:steps=2", "norm:tau=100"])
def test_a_committed_position_keeps_its_keys_and_values_to_the_end(
    regions: LoopedGPT, policy: str, layout: str
) -> None:
    decoder = Decoder(regions, "fixed:steps=4", layout=layout, max_loops=10)
    first = int(decoder.prefill(torch.tensor(PROMPTS[:1])).logits.argmax())
    wavefront = Wavefront(decoder, policy, width=4)
    seen, end = [], len(PROMPTS[0])
    for _ in wavefront.tokens(first, 12, sampling=Sampling(0.0)):
        end += 1
        seen.append((end, caches(decoder, end)))
    for end, before in seen:
        for old, now in zip(before, caches(decoder, end), strict=True):
            assert torch.equal(now[: len(old)], old)
            assert bool((now[len(old) :] == old[-1]).all())  # slots beyond: those of its last step


def test_earlier_steps_of_a_committed_position_are_those_it_took(regions: LoopedGPT) -> None:
    """Depth-indexed: slot k of a position holds what it computed during its step k, the last step's from K on."""
    decoder = Decoder(regions, "fixed:steps=6", max_loops=10)
    first = int(decoder.prefill(torch.tensor(PROMPTS[:1])).logits.argmax())
    wavefront = Wavefront(decoder, "fixed:steps=3", width=3)
    wrote: dict[tuple[int, int], Tensor] = {}
    [memory, *_] = wavefront.memories["2"]
    attend = memory.attend

    def spy(qkv: Tensor, n_head: int) -> Tensor:
        for row, k in enumerate(memory.rows.k):
            wrote[memory.rows.first + row, k] = qkv[row, regions.d_model :].clone()
        return attend(qkv, n_head)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "attend", spy)
        list(wavefront.tokens(first, 8, sampling=Sampling(0.0)))
    start = len(PROMPTS[0])
    for position in range(start, start + 8):
        for slot in range(memory.cache.filled):
            expected = wrote[position, min(slot + 1, 3)]
            assert torch.equal(memory.cache.kv[slot, 0, position], expected)


@pytest.mark.parametrize("inner", [2, 3])
def test_inner_steps_count_as_steps_and_keep_within_the_budget(regions: LoopedGPT, inner: int) -> None:
    text = regions.generate(
        PROMPTS,
        "fixed:steps=4",
        sampler="wavefront",
        commit="norm:tau=1e-30",
        inner=inner,
        max_loops=8,
        temperature=0.0,
    )
    # The first token is the prompt's; no other position settles, so each takes all whole sweeps of its budget.
    assert {steps for one in text.steps["2"] for steps in one[1:]} == {8 // inner * inner}


def test_a_text_ends_at_a_stop_token_or_where_the_context_is_full(regions: LoopedGPT) -> None:
    common: dict[str, Any] = {"temperature": 1.0, "sampler": "wavefront", "commit": "norm:tau=0.3", "width": 6}
    whole = regions.generate(PROMPTS, "fixed:steps=4", max_new_tokens=100, **common)
    assert whole.finished == ["context", "context"]
    assert [len(text) for text in whole.tokens] == [regions.block_size - len(prompt) for prompt in PROMPTS]
    stop = whole.tokens[0][6]
    ended = regions.generate(PROMPTS[:1], "fixed:steps=4", max_new_tokens=100, stop=[stop], **common)
    assert ended.tokens[0] == whole.tokens[0][: whole.tokens[0].index(stop)]
    assert ended.finished == ["stop"]


def test_a_draft_that_is_not_finite_reaches_no_committed_token(regions: LoopedGPT) -> None:
    """The embedding of one token is spoiled: texts are those of the sequential decoder up to it, and then end."""
    common: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "max_loops": 120}
    sound = regions.generate(PROMPTS[:1], "fixed:steps=60", **common)
    spoiled = deepcopy(regions)
    with torch.no_grad():  # a position, so that no logits of earlier positions are touched
        spoiled.wpe.weight[len(PROMPTS[0]) + 5] = torch.nan
    wavefront = spoiled.generate(PROMPTS[:1], "fixed:steps=60", sampler="wavefront", commit=SETTLED, **common)
    assert wavefront.finished == ["nonfinite"]
    assert wavefront.tokens[0] == sound.tokens[0][:6]


@pytest.mark.parametrize(
    ("huge", "enough"),
    [
        ({"max_new_tokens": 10**20}, {"max_new_tokens": 32}),
        ({"max_new_tokens": 10**20, "sampler": "wavefront", "width": 10**13}, {"max_new_tokens": 32, "width": 32}),
        ({"sampler": "speculative", "ahead": 10**20, "max_new_tokens": 10**12}, {"ahead": 32, "max_new_tokens": 32}),
        ({"layout": "modulo:100000000000000"}, {"layout": "modulo:32"}),
        ({"total_loops": 10**20}, {"total_loops": 64}),
        ({"top_k": 10**20}, {"top_k": 512}),
    ],
)
def test_more_than_the_context_or_the_budget_can_take_is_as_much_as_they_can(
    regions: LoopedGPT, huge: dict[str, Any], enough: dict[str, Any]
) -> None:
    assert regions.generate(PROMPTS, "fixed:steps=4", **huge) == regions.generate(
        PROMPTS, "fixed:steps=4", **{**huge, **enough}
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"width": 0}, "width=0"),
        ({"inner": 0}, "inner=0"),
        ({"layout": "modulo:2"}, "layout=modulo:2"),
        ({"commit": "norm:tau=0.1,granularity=sequence"}, "granularity=sequence"),
        ({"commit": "norm:tau=0.1,granularity=batch"}, "granularity=batch"),
        ({"total_loops": 20}, "total_loops"),
        ({"max_loops": 4, "inner": 5}, "inner=5"),
        ({"commit": "fixed:steps=1000"}, "at least 1000 steps and max_loops is 32"),
        ({"sampler": "parallel"}, "parallel"),
        ({"sampler": "sequential", "width": 4}, "width"),
        ({"sampler": "sequential", "commit": "norm:tau=0.1"}, "commit"),
    ],
)
def test_what_cannot_go_together_is_refused_by_name(regions: LoopedGPT, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(GenerationError, match=named):
        regions.generate(PROMPTS, "fixed:steps=2", **{"sampler": "wavefront", **settings})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"injection": "first_step"}, "injection=first_step"),
        ({"noise": "every_step"}, "noise=every_step"),
    ],
)
def test_regions_that_a_changing_input_cannot_reach_are_refused_by_name(
    tiny_config: ModelConfig, changes: dict[str, Any], named: str
) -> None:
    model = built(tiny_config, **changes)
    with pytest.raises(GenerationError, match=named):
        model.generate([[1, 2]], "fixed:steps=2", sampler="wavefront", width=4)


def test_each_emission_belongs_to_one_text_and_texts_follow_one_another(regions: LoopedGPT) -> None:
    values: dict[str, Any] = {"max_new_tokens": 5, "sampler": "wavefront", "commit": "norm:tau=0.3"}
    emissions = list(stream(regions, PROMPTS, "fixed:steps=4", Settings.of(**values)))
    order: Sequence[list[bool]] = [[token is not None for token in one.tokens] for one in emissions]
    assert order == [[True, False]] * 5 + [[False, True]] * 5
    alone = [regions.generate([prompt], "fixed:steps=4", seed=b, **values) for b, prompt in enumerate(PROMPTS)]
    assert [text.tokens[0] for text in alone] == regions.generate(PROMPTS, "fixed:steps=4", **values).tokens
