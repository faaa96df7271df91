"""Speculation: several tokens in one pass are the tokens one by one, so drafts change the time and never the text."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haltkit.models.checkpoint import build_model
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.decoding import Decoder
from haltkit.models.gpt.model import LoopedGPT
from haltkit.models.gpt.sampling import GenerationError, Sampling
from haltkit.models.gpt.speculative import Speculation, by_wavefront
from haltkit.models.gpt.wavefront import Wavefront

PROMPTS = [[5, 17, 3, 240, 99], [7, 7, 300]]
POLICIES = ["fixed:steps=5", "norm:tau=0.3", "accel:tau=0.05", "norm:tau=0.1,patience=2,min_steps=3", "stable:times=2"]


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> LoopedGPT:
    """In float64, so that no two tokens are tied to the last digits."""
    torch.manual_seed(0)
    return build_model(replace(tiny_config, block_size=48, state_norm=True)).eval().double()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (6,), (2, 3, 1)])
def test_several_tokens_in_one_pass_are_the_tokens_one_by_one(
    model: LoopedGPT, policy: str, sizes: tuple[int, ...]
) -> None:
    new = torch.tensor([11, 200, 3, 77, 5, 150])
    one, many = (Decoder(model, policy, max_loops=8) for _ in range(2))
    for decoder in (one, many):
        decoder.prefill(torch.tensor(PROMPTS[:1]))
    apart = [one.step(token) for token in new.split(1)]
    together = [many.extend(part) for part in new.split(sizes)]
    assert many.lengths == one.lengths
    torch.testing.assert_close(torch.cat([s.logits for s in together]), torch.cat([s.logits for s in apart]))
    for name in model.regions:
        assert torch.equal(torch.cat([s.steps[name] for s in together]), torch.cat([s.steps[name] for s in apart]))
        assert torch.equal(torch.cat([s.outcome[name] for s in together]), torch.cat([s.outcome[name] for s in apart]))
    after = [decoder.step(torch.tensor([42])).logits for decoder in (one, many)]  # and the caches are equal
    torch.testing.assert_close(after[0], after[1])


def test_a_known_depth_gives_what_a_policy_gives_that_is_asked(model: LoopedGPT) -> None:
    """At fixed depths no policy is asked; a combination of two of them is."""
    known, asked = (
        Decoder(model, policy, max_loops=8) for policy in ("fixed:steps=5", "any(fixed:steps=5|fixed:steps=7)")
    )
    for tokens in (PROMPTS[0], [11, 200, 3], [77, 5, 150, 9]):
        given_ = torch.tensor(tokens)
        one, other = (d.extend(given_) if d.lengths else d.prefill(given_[None]) for d in (known, asked))
        torch.testing.assert_close(one.logits, other.logits)
        for name in model.regions:
            assert torch.equal(one.steps[name], other.steps[name])
            assert torch.equal(one.outcome[name], other.outcome[name])
            for mine, theirs in zip(known.caches[name], asked.caches[name], strict=True):
                torch.testing.assert_close(mine.kv, theirs.kv)


def test_a_wavefront_drafts_what_its_open_positions_have_instead_of_waiting_for_them(model: LoopedGPT) -> None:
    def drafted() -> tuple[Wavefront, int]:
        decoder = Decoder(model, "fixed:steps=6", max_loops=8)
        first = int(decoder.prefill(torch.tensor(PROMPTS[:1])).logits.argmax())
        return Wavefront(decoder, "fixed:steps=6", width=4), first

    greedy = Sampling(0.0)
    wave, first = drafted()
    committed = [one.token for one in wave.tokens(first, 6, sampling=greedy)]
    again, first = drafted()
    found = by_wavefront(again, greedy, frozenset())(first, 6)
    assert len(found) == 6
    assert found[:3] == committed[:3]  # three committed, and three open
    assert again.sweeps < wave.sweeps


@given(
    policy=st.sampled_from(POLICIES),
    draft=st.sampled_from(["fixed:steps=1", "fixed:steps=2", "norm:tau=3", "fixed:steps=8"]),
    ahead=st.integers(1, 7),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 5),
)
def test_speculation_gives_the_text_and_the_steps_of_the_decoder_alone(
    model: LoopedGPT, policy: str, draft: str, ahead: int, temperature: float, seed: int
) -> None:
    common: dict[str, Any] = {"max_new_tokens": 14, "temperature": temperature, "seed": seed, "max_loops": 8}
    alone = model.generate(PROMPTS, policy, **common)
    assert model.generate(PROMPTS, policy, sampler="speculative", draft=draft, ahead=ahead, **common) == alone


@given(
    width=st.integers(1, 6),
    ahead=st.integers(1, 9),
    tau=st.sampled_from([1e-9, 0.1, 3.0, 1e3]),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_a_verified_wavefront_gives_the_text_of_the_decoder_alone(
    model: LoopedGPT, width: int, ahead: int, tau: float, temperature: float
) -> None:
    common: dict[str, Any] = {"max_new_tokens": 14, "temperature": temperature, "max_loops": 8}
    alone = model.generate(PROMPTS, "fixed:steps=6", **common)
    settings: dict[str, Any] = {"width": width, "commit": f"norm:tau={tau}", "verify": True, "ahead": ahead}
    assert model.generate(PROMPTS, "fixed:steps=6", sampler="wavefront", **settings, **common) == alone


def test_a_stop_token_and_a_full_context_end_the_text_where_they_do_alone(model: LoopedGPT) -> None:
    common: dict[str, Any] = {"max_new_tokens": 100, "temperature": 0.0, "max_loops": 8}
    whole = model.generate(PROMPTS, "fixed:steps=4", **common)
    for stop in ([], [whole.tokens[0][5]], [whole.tokens[1][3], whole.tokens[0][9]]):
        alone = model.generate(PROMPTS, "fixed:steps=4", stop=stop, **common)
        assert model.generate(PROMPTS, "fixed:steps=4", sampler="speculative", stop=stop, **common) == alone
    assert whole.finished == ["context", "context"]


def test_drafts_of_the_policy_that_verifies_are_all_kept(model: LoopedGPT) -> None:
    decoder = Decoder(model, "fixed:steps=4", max_loops=8)
    first = int(decoder.prefill(torch.tensor(PROMPTS[:1])).logits.argmax())
    reference = Decoder(model, "fixed:steps=4", max_loops=8)
    reference.prefill(torch.tensor(PROMPTS[:1]))

    def perfect(token: int, count: int) -> list[int]:
        oracle = decoder.under("fixed:steps=4")
        found = []
        for _ in range(count):
            token = int(oracle.step(torch.tensor([token])).logits.argmax())
            found.append(token)
        return found

    speculation = Speculation(decoder, perfect, ahead=4)
    greedy = Sampling(temperature=0)
    assert len(list(speculation.tokens(first, 15, sampling=greedy))) == 15
    assert speculation.accepted == speculation.drafted == 12
    assert speculation.verified == 3


def test_a_position_that_breaks_does_what_it_does_in_the_decoder_alone(model: LoopedGPT) -> None:
    spoiled = deepcopy(model)
    with torch.no_grad():
        spoiled.wpe.weight[len(PROMPTS[0]) + 5] = torch.nan
    common: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "max_loops": 8}
    alone = spoiled.generate(PROMPTS[:1], "fixed:steps=4", **common)
    assert spoiled.generate(PROMPTS[:1], "fixed:steps=4", sampler="speculative", **common) == alone


@pytest.mark.parametrize(
    ("settings", "token"),
    [
        ({"sampler": "speculative", "layout": "last"}, "layout"),
        ({"sampler": "speculative", "ahead": 0}, "ahead=0"),
        ({"sampler": "speculative", "draft": "norm:tau=1,granularity=batch"}, "granularity=token"),
        ({"sampler": "speculative", "draft": "fixed:steps=99"}, "max_loops"),
        ({"sampler": "speculative", "width": 3}, "wavefront"),
        ({"sampler": "wavefront", "draft": "fixed:steps=1"}, "speculative"),
        ({"sampler": "wavefront", "ahead": 3}, "verify"),
        ({"sampler": "wavefront", "verify": True, "layout": "last", "commit": "norm:tau=1"}, "layout"),
        ({"verify": True}, "wavefront"),
        ({"sampler": "beam"}, "speculative"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(model: LoopedGPT, settings: dict[str, Any], token: str) -> None:
    with pytest.raises(GenerationError, match=token):
        model.generate(PROMPTS, "fixed:steps=2", max_loops=8, **settings)
