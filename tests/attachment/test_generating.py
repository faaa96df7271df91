"""``model.generate(..., custom_generate=haltkit.generation(...))`` of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from cases import certificate_for, hrm_model
from haltkit.attachment.errors import AttachError, KVDepthMismatch
from haltkit.identity import Identity
from standins import AtDepths, with_config

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns as it likes

NEW = 6
IDS = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(0))
COMMON: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": 0, "return_dict_in_generate": True}


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return hrm_model()


def generated(model: Any, seed: int = 0, **keys: Any) -> Any:
    torch.manual_seed(seed)
    return model.generate(**{"inputs": IDS, "do_sample": False, **COMMON, **keys})


def padded() -> dict[str, Any]:
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    return {"inputs": IDS.where(mask.bool(), 0), "attention_mask": mask}


class Streamer:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


class TooLong:
    """A stopping criterion of a user's own."""

    def __call__(self, input_ids: Tensor, scores: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= IDS.shape[1] + 3)


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": dict,
    "sampling": lambda: {"do_sample": True, "temperature": 0.7, "top_k": 9},
    "several of each": lambda: {"do_sample": True, "num_return_sequences": 2},
    "padding": padded,
    "ended": lambda: {"eos_token_id": list(range(0, 50, 3)), "output_scores": True},
    "criteria": lambda: {"stopping_criteria": [TooLong()]},
    "no cache": lambda: {"use_cache": False},
    "in chunks": lambda: {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_model_at_that_depth(model: Any, way: str) -> None:
    keys = WAYS[way]()
    expected = with_config(model.config, lambda: generated(model, **keys), H_cycles=2)
    out = generated(model, custom_generate=haltkit.generation("fixed:steps=2"), **keys)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.steps.shape == (len(out.sequences), out.sequences.shape[1] - IDS.shape[1], 1)
    assert out.steps.eq(2).all()
    assert out.outcome.eq(haltkit.Outcome.CONVERGED).all()
    for scores, others in zip(out.scores or (), expected.scores or (), strict=True):
        assert torch.equal(scores, others)


def test_each_token_equals_a_loop_by_hand_at_its_depth(model: Any) -> None:
    """Without a cache every call is exact at a depth of its own: the model itself, run with as many steps."""
    depths = (3, 1, 4, 2, 1, 3)
    out = generated(model, use_cache=False, custom_generate=haltkit.generation(AtDepths(*depths)))
    ids = IDS
    for depth in depths:
        logits = with_config(model.config, lambda ids=ids: model(ids, use_cache=False).logits, H_cycles=depth)
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(out.sequences, ids)
    assert out.steps[:, :, 0].tolist() == [list(depths)] * len(IDS)


def test_steps_are_those_of_the_position_that_a_token_was_read_from(model: Any) -> None:
    """Rows halt one by one; the reference attaches to one call of the model after the other."""
    spec = "norm:tau=0.055"
    out = generated(model, use_cache=False, custom_generate=haltkit.generation(spec, max_steps=3))
    assert len(out.steps.unique()) > 1
    for token in range(NEW):
        with haltkit.attach(model, spec, max_steps=3) as session, torch.no_grad():
            model(out.sequences[:, : IDS.shape[1] + token], use_cache=False)
        assert torch.equal(out.steps[:, token, 0], session.steps["loop"][:, -1])
        assert torch.equal(out.outcome[:, token, 0], session.outcome["loop"][:, -1])


def test_steps_of_a_token_are_not_those_of_a_processor_that_calls_the_model(model: Any) -> None:
    """Classifier-free guidance runs the model once more per token, at depths of its own."""
    how = haltkit.generation(AtDepths(3, 1, 2, 1, 4, 1), check=False)
    out = generated(model, use_cache=False, guidance_scale=1.5, max_new_tokens=3, custom_generate=how)
    assert out.steps[:, :, 0].tolist() == [[3, 2, 4]] * len(IDS)


class Refining(nn.Module):
    """A loop that runs for a prompt alone."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4 if x.shape[1] > 1 else 0):
            x = torch.tanh(self.core(x))
        return x


def test_a_region_that_does_not_run_for_a_token_has_no_steps() -> None:
    model = gpt2()
    model.transformer.ln_f = Refining().eval()
    loop = haltkit.Loop(["transformer.ln_f.core"], scope="transformer.ln_f")
    out = generated(model, eos_token_id=None, custom_generate=haltkit.generation("fixed:steps=2", loop=loop))
    assert out.steps[:, :, 0].tolist() == [[2, *[0] * (NEW - 1)]] * len(IDS)
    assert out.outcome[0, :, 0].tolist() == [haltkit.Outcome.CONVERGED, *[haltkit.Outcome.ABSENT] * (NEW - 1)]


def test_rows_that_max_steps_stops_have_spent_their_budget(model: Any) -> None:
    out = generated(model, custom_generate=haltkit.generation("norm:tau=1e-30", max_steps=3))
    expected = with_config(model.config, lambda: generated(model), H_cycles=3)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.steps.eq(3).all()
    assert out.outcome.eq(haltkit.Outcome.BUDGET).all()
    with pytest.raises(ValueError, match="max_steps=0"):
        generated(model, custom_generate=haltkit.generation("norm:tau=1", max_steps=0))


def test_regions_of_one_token_are_counted_over_all_their_turns(model: Any) -> None:
    out = generated(model, custom_generate=haltkit.generation("high=fixed:steps=3;low=fixed:steps=2"))
    expected = with_config(model.config, lambda: generated(model), H_cycles=3, L_cycles=2)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.steps[0, 0].tolist() == [3, 3 * 2]
    assert out.steps.shape == out.outcome.shape == (3, NEW, 2)


def test_streamers_hear_what_they_hear_without_haltkit(model: Any) -> None:
    with_it, without = Streamer(), Streamer()
    keys: dict[str, Any] = {"inputs": IDS[:1]}
    generated(model, streamer=with_it, custom_generate=haltkit.generation("fixed:steps=4"), **keys)
    generated(model, streamer=without, **keys)
    assert with_it.seen == without.seen
    assert with_it.seen[-1] == "end"


def test_without_a_dictionary_the_tokens_come_alone(model: Any) -> None:
    keys = {"return_dict_in_generate": False}
    out = generated(model, custom_generate=haltkit.generation("fixed:steps=4"), **keys)
    assert torch.equal(out, generated(model, **keys))


def test_a_cache_that_would_miss_steps_is_refused_until_a_mode_is_chosen(model: Any) -> None:
    with pytest.raises(KVDepthMismatch):
        generated(model, custom_generate=haltkit.generation(AtDepths(3, 2, 4, 1, 1, 1)))
    out = generated(model, custom_generate=haltkit.generation(AtDepths(3, 2, 4, 1, 1, 1), kv="uniform"))
    expected = with_config(model.config, lambda: generated(model), H_cycles=3)
    assert torch.equal(out.sequences, expected.sequences)


@pytest.mark.parametrize(
    ("keys", "token"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"num_beams": 2, "do_sample": True}, "beam sample"),
        ({"prompt_lookup_num_tokens": 2, "inputs": IDS[:1]}, "assisted generation"),
    ],
)
def test_other_ways_to_choose_tokens_are_refused_by_name(model: Any, keys: dict[str, Any], token: str) -> None:
    with pytest.raises(ValueError, match=token):
        generated(model, custom_generate=haltkit.generation("fixed:steps=2"), **keys)


def test_an_assistant_is_refused_by_name(model: Any) -> None:
    with pytest.raises(ValueError, match="assisted generation"):
        generated(
            model, inputs=IDS[:1], assistant_model=hrm_model(), custom_generate=haltkit.generation("fixed:steps=2")
        )


@pytest.mark.parametrize(
    ("custom_generate", "token"),
    [
        (lambda: haltkit.generation, "call it with a policy"),
        (lambda: haltkit.generation("norm:tau=1", observer=haltkit.Recorder()), "around model.generate"),
    ],
    ids=["not called", "an observer"],
)
def test_what_is_no_generation_is_told_so(model: Any, custom_generate: Callable[[], Any], token: str) -> None:
    with pytest.raises(ValueError, match=token):
        generated(model, custom_generate=custom_generate())


def test_a_stop_string_is_a_criterion(model: Any) -> None:
    """transformers gives its own stop strings a tokenizer, and a callable none."""
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from transformers.generation import StopStringCriteria

    words = [*(f"<{i}>" for i in range(50)), "abcdef"]  # the last is what transformers looks for
    level = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<0>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(level))
    keys: dict[str, Any] = {"inputs": IDS[:1]}
    whole = generated(model, **keys).sequences[0, IDS.shape[1] :].tolist()
    stop = [f"<{whole[2]}>"]
    expected = generated(model, stop_strings=stop, tokenizer=tokenizer, **keys)
    criteria = [StopStringCriteria(tokenizer, stop)]
    out = generated(model, stopping_criteria=criteria, custom_generate=haltkit.generation("fixed:steps=4"), **keys)
    assert torch.equal(out.sequences, expected.sequences)
    assert out.sequences.shape[1] < IDS.shape[1] + NEW
    assert out.steps.shape[1] == out.sequences.shape[1] - IDS.shape[1]


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 1, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2, **ends)).eval()


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def bert() -> Any:
    from transformers import BertConfig, BertLMHeadModel

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertLMHeadModel(BertConfig(vocab_size=50, **size)).eval()


LAYER = {"body": ["bert.encoder.layer.0"]}
UNFIT: dict[str, tuple[Callable[[], Any], dict[str, Any], list[str]]] = {
    "no preset": (gpt2, {"policy": "norm:tau=1"}, ["GPT2LMHeadModel", "body=", "haltkit.discover"]),
    "no such module": (
        gpt2,
        {"policy": "norm:tau=1", "body": ["transformer.h.7"]},
        ["'transformer.h.7'", "not one of 0"],
    ),
    "never called": (gpt2, {"policy": "norm:tau=1", "body": ["transformer.h"]}, ["never ran", "ModuleList"]),
    "no readout": (gpt2, {"policy": "kl:tau=1", "body": ["transformer.h.0"]}, ["readout=", "norm"]),
    "no readout of one": (hrm_model, {"policy": "high=kl:tau=1;low=kl:tau=1", "kv": "uniform"}, ["'low'", "readout="]),
    "no such region": (hrm_model, {"policy": "middle=norm:tau=1"}, ["middle", "high, low"]),
    "encoder and decoder": (t5, {"policy": "norm:tau=1", "body": ["decoder.block.0"]}, ["encoder", "haltkit.attach"]),
    "not causal": (bert, {"policy": "norm:tau=1", **LAYER}, ["causal", "BertLMHeadModel", "is_decoder"]),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_one_error_that_says_what_to_do(case: str) -> None:
    build, how, tokens = UNFIT[case]
    model = build()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises((ValueError, AttachError)) as error:
        generated(model, custom_generate=haltkit.generation(**how))
    message = str(error.value)
    assert all(token in message for token in tokens), message
    assert "\n" not in message
    assert [type(module) for module in model.modules()] == kinds


def test_a_bidirectional_model_that_is_made_a_decoder_generates() -> None:
    from transformers import BertConfig, BertLMHeadModel

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertLMHeadModel(BertConfig(vocab_size=50, is_decoder=True, **size)).eval()
    out = generated(model, custom_generate=haltkit.generation("norm:tau=1", **LAYER))
    assert torch.equal(out.sequences, generated(model).sequences)


def test_the_model_is_restored_whatever_happens(model: Any) -> None:
    class Fails(nn.Module):
        def __call__(self, input_ids: Tensor, scores: Any) -> Tensor:
            raise InterruptedError

    before = [type(module) for module in model.modules()]
    with pytest.raises(InterruptedError):
        generated(model, custom_generate=haltkit.generation("fixed:steps=2"), stopping_criteria=[Fails()])
    assert [type(module) for module in model.modules()] == before
    assert not model._forward_pre_hooks


def test_the_output_says_what_is_promised_of_a_card_or_what_it_is_used_without(model: Any, tmp_path: Path) -> None:
    spec = "norm:tau=0.05"
    certificate = certificate_for(spec)
    haltkit.Card(spec, identity=Identity.of(model, 3), certificate=certificate).save(tmp_path / "card")
    for card, max_steps, said in (
        (tmp_path / "card", 3, f"certified: {certificate.promise}"),
        (
            haltkit.Card.load(tmp_path / "card").without_certificate(),
            2,
            "used without its certificate (full depth 2 instead of 3): nothing is promised",
        ),
        (spec, 2, ""),
    ):
        halting = haltkit.generation(card, max_steps=max_steps, kv="freeze")
        assert generated(model, custom_generate=halting).standing == said
