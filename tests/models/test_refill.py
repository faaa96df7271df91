"""Prompts that take the place of texts that have ended: each gets the text that it gets alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
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
from haltkit.models.gpt.sampling import GenerationError

POLICIES = ["fixed:steps=3", "norm:tau=0.3", "accel:tau=0.05", "norm:tau=0.1,patience=2,min_steps=3", "stable:times=2"]
STOP = range(40)  # of 512 tokens: texts end at different lengths


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> LoopedGPT:
    """In float64, so that no two tokens are tied to the last digits."""
    torch.manual_seed(0)
    return build_model(replace(tiny_config, block_size=24, state_norm=True)).eval().double()


def prompts(seed: int, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (count,), generator=generator).tolist()
    return [torch.randint(0, 512, (n,), generator=generator).tolist() for n in lengths]


@given(
    policy=st.sampled_from(POLICIES),
    layout=st.sampled_from(["depth-indexed", "last", "modulo:2"]),
    seed=st.integers(0, 1000),
    count=st.integers(0, 9),
    slots=st.integers(1, 5),
    ordered=st.booleans(),
    temperature=st.sampled_from([0.0, 1.0]),
    total=st.sampled_from([None, 7]),
)
def test_every_prompt_gets_what_it_gets_alone(
    model: LoopedGPT,
    policy: str,
    layout: str,
    seed: int,
    count: int,
    slots: int,
    ordered: bool,
    temperature: float,
    total: int | None,
) -> None:
    given = prompts(seed, count)
    common: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature, "stop": STOP, "max_loops": 8}
    common |= {"layout": layout, "total_loops": total}
    texts = list(model.generate_stream(iter(given), policy, slots=slots, ordered=ordered, seed=seed, **common))
    assert not ordered or [text.index for text in texts] == list(range(count))
    assert sorted(text.index for text in texts) == list(range(count))
    for text in texts:
        alone = model.generate([given[text.index]], policy, seed=seed + text.index, **common)
        assert (alone.tokens, alone.finished) == ([text.tokens], [text.finished])
        assert alone.steps == {name: [steps] for name, steps in text.steps.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "speculative", "ahead": 3},
        {"sampler": "wavefront", "width": 3},
        {"sampler": "wavefront", "verify": 1},
    ],
)
def test_other_samplers_give_their_texts_too(model: LoopedGPT, settings: dict[str, Any]) -> None:
    given = prompts(1, 5)
    common: dict[str, Any] = {"max_new_tokens": 9, "stop": STOP, "max_loops": 8, **settings}
    texts = list(model.generate_stream(given, "fixed:steps=3", slots=2, **common))
    assert [text.tokens for text in texts] == model.generate(given, "fixed:steps=3", **common).tokens


@pytest.mark.parametrize("ordered", [True, False])
def test_a_source_without_an_end_is_read_so_far_ahead_and_no_further(model: LoopedGPT, ordered: bool) -> None:
    read = 0

    def source() -> Iterator[list[int]]:
        nonlocal read
        for read in itertools.count(1):
            yield [read % 512, 7]

    texts = model.generate_stream(
        source(), "fixed:steps=1", slots=3, ordered=ordered, ahead=5, max_new_tokens=12, stop=STOP
    )
    assert read == 0
    for handed_out, _ in enumerate(itertools.islice(texts, 40)):
        assert read <= handed_out + (5 if ordered else 2 * 3)


@pytest.mark.parametrize("layout", ["depth-indexed", "last", "modulo:3"])
@pytest.mark.parametrize(("had", "new"), [(2, 6), (6, 2)])
def test_a_prompt_of_another_depth_reads_and_leaves_what_it_does_alone(
    model: LoopedGPT, layout: str, had: int, new: int
) -> None:
    old, late, tokens = [5, 17, 3, 240], [7, 7], torch.tensor([9, 11])

    def decoder(loops: int, *given: list[int]) -> Decoder:
        one = Decoder(model, f"fixed:steps={loops}", layout=layout, max_loops=8)
        one.prefill(torch.tensor(given))
        return one

    both = decoder(had, old, [1, 2, 3, 4]).under(f"fixed:steps={new}")
    both.admit([1], torch.tensor([late]))
    apart = [decoder(had, old).under(f"fixed:steps={new}"), decoder(new, late)]
    expected = torch.cat([one.step(tokens[i : i + 1]).logits for i, one in enumerate(apart)])
    torch.testing.assert_close(both.step(tokens).logits, expected, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def spoiled(model: LoopedGPT) -> LoopedGPT:
    """The same, whose first layer is not finite at the tenth token."""
    other = deepcopy(model)
    with torch.no_grad():
        other.wpe.weight[9] = torch.nan
    return other


def test_what_breaks_in_one_text_reaches_no_other(model: LoopedGPT, spoiled: LoopedGPT) -> None:
    given = [[5] * 8, [7, 300], [1, 2], [5] * 12, [9]]
    for text in spoiled.generate_stream(given, "norm:tau=0.3", slots=2, max_new_tokens=6):
        whole = len(given[text.index]) < 4  # it ends before the tenth token
        alone = (model if whole else spoiled).generate(
            [given[text.index]], "norm:tau=0.3", seed=text.index, max_new_tokens=6
        )
        assert alone.tokens == [text.tokens]


def test_a_cache_is_whole_again_once_a_broken_sequence_is_replaced(spoiled: LoopedGPT) -> None:
    decoder = Decoder(spoiled, "norm:tau=0.3", max_loops=8)
    decoder.prefill(torch.tensor([[5, 6], [7, 8]]))
    for prompt, guarded in (([1] * 10, True), ([1] * 9, False)):
        decoder.admit([1], torch.tensor([prompt]))
        assert decoder.guarded == guarded
    for rows in ([0, 0], [2], []):
        with pytest.raises(GenerationError, match="rows"):
            decoder.admit(rows, torch.tensor([[1, 2]]))


def test_a_prompt_that_cannot_be_continued_is_the_error_of_its_own_text(model: LoopedGPT) -> None:
    texts = list(model.generate_stream([[], [1], [2], [512], [3]], "fixed:steps=1", slots=1, max_new_tokens=2))
    assert [len(text.tokens) for text in texts] == [0, 2, 2, 0, 2]
    for text, named in zip(texts, ("empty", None, None, "vocabulary", None), strict=True):
        assert (text.error is None) if named is None else (named in str(text.error))
    for options, named in (({"slots": 0}, "slots=0"), ({"ahead": 2}, "ahead=2"), ({"max_new_tokens": 0}, "max_new")):
        with pytest.raises(ValueError, match=named):
            model.generate_stream([[1]], "fixed:steps=1", **options)
