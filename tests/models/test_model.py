"""The bundled model: the recipe's pieces, and the canonical semantics of halting."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import haltkit
from cases import each_choice_of_the_recipe
from haltkit.loop import Outcome
from haltkit.models.checkpoint import build_model
from haltkit.models.config import ConfigError
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.draws import STATE_STD, EvaluationNoise, TrainingNoise, loop_count, truncated_normal_
from haltkit.models.gpt.model import LoopedGPT, Region

SPECS = [
    "accel:tau=0.05",
    "norm:tau=0.05",
    "norm-rel:tau=0.01",
    "kl:tau=1e-5",
    "speed:tau=0.02",
    "accel-rel:tau=0.01,denominator=state",
    "any(accel:tau=0.02|fixed:steps=7)",
    "norm:tau=0.1,patience=2,min_steps=3",
    "norm:tau=100",
    "norm:tau=1e-30",
]


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 512, shape, generator=torch.Generator().manual_seed(seed))


def model_of(config: ModelConfig, **changes: Any) -> LoopedGPT:
    torch.manual_seed(0)
    return build_model(replace(config, **changes)).double().eval()


@pytest.mark.parametrize("norm_placement", ["branch", "residual"])
def test_one_loop_without_state_is_a_plain_gpt(tiny_config: ModelConfig, norm_placement: str) -> None:
    """One loop, no norm on the state, and the projection at [0 ; I]: the same blocks in a row."""
    looped = model_of(tiny_config, state_norm=False, exit_norm=False, norm_placement=norm_placement)
    width = tiny_config.d_model
    blocks: list[nn.Module] = []
    for layer in looped.layers.values():
        if isinstance(layer, Region):
            with torch.no_grad():
                layer.body.adapter.weight.copy_(torch.cat([torch.zeros(width, width), torch.eye(width)], 1))
            blocks += layer.body.blocks
        else:
            blocks.append(layer)
    plain = model_of(tiny_config, regions=(), norm_placement=norm_placement)
    with torch.no_grad():
        for mine, theirs in zip(plain.layers.values(), blocks, strict=True):
            mine.load_state_dict(theirs.state_dict())
        for name in ("wte", "wpe", "norm_f"):
            getattr(plain, name).load_state_dict(getattr(looped, name).state_dict())
        ids = tokens(0, 2, 12)
        torch.testing.assert_close(looped(ids, 1), plain(ids, {}), rtol=0, atol=1e-12)


def test_attention_and_block_against_a_plain_reading(tiny_config: ModelConfig) -> None:
    """One block written out head by head, both norm placements, with and without gradients."""
    for placement in ("branch", "residual"):
        block: Any = model_of(tiny_config, norm_placement=placement).layers["1"]
        x = torch.randn(2, 7, tiny_config.d_model, dtype=torch.float64)

        def attention(h: Tensor, block: Any = block) -> Tensor:
            q, k, v = (h @ block.attn.qkv.weight.T).chunk(3, -1)
            heads = []
            for piece in range(tiny_config.n_head):
                size = tiny_config.d_model // tiny_config.n_head
                part = slice(piece * size, (piece + 1) * size)
                scores = q[..., part] @ k[..., part].mT / math.sqrt(size)
                future = torch.triu(torch.full((7, 7), -math.inf, dtype=torch.float64), 1)
                heads.append((scores + future).softmax(-1) @ v[..., part])
            return torch.cat(heads, -1) @ block.attn.proj.weight.T

        def norm(h: Tensor, gain: nn.Module) -> Tensor:
            return h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain.weight

        def mlp(h: Tensor, block: Any = block) -> Tensor:
            return F.silu(h @ block.mlp.fc.weight.T) @ block.mlp.proj.weight.T

        if placement == "residual":
            h = norm(x + attention(norm(x, block.n1)), block.n2)
            expected = norm(h + mlp(norm(h, block.n3)), block.n4)
        else:
            h = x + norm(attention(norm(x, block.n1)), block.n2)
            expected = h + norm(mlp(norm(h, block.n3)), block.n4)
        torch.testing.assert_close(block(x), expected)
        with torch.no_grad():
            torch.testing.assert_close(block(x), expected)


def test_initialization_has_the_recipes_scales(tiny_config: ModelConfig) -> None:
    model = build_model(replace(tiny_config, d_model=256, n_head=4, norm_placement="residual", injection_init="random"))
    std = math.sqrt(2 / (5 * 256))
    depth = 1 + 4 * 1 + 4 * 2 + 1  # layers 1 and 5 once; regions 2 and 3-4 four times
    assert model.effective_depth == depth
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert parameter.eq(1).all()
            continue
        expected = std / math.sqrt(2 * depth) if name.endswith("proj.weight") else std
        assert parameter.std().item() == pytest.approx(0.9866 * expected, rel=0.03), name  # cut at three sigma
        assert parameter.abs().max() <= 3 * expected
    start = build_model(replace(tiny_config, injection_init="identity")).regions["2"].body.adapter.weight
    own = start[:, tiny_config.d_model :].detach()
    assert own.diagonal().mean().item() == pytest.approx(1, abs=0.1)
    assert (own - torch.eye(tiny_config.d_model)).std().item() == pytest.approx(
        0.5 * 0.9866 * math.sqrt(2 / (5 * tiny_config.d_model)), rel=0.1
    )


def test_the_loop_schedule_has_its_distribution() -> None:
    """K ~ Poisson(exp(tau)) + 1: mean r + 1, and the lognormal's variance on top of Poisson's."""
    mean, sigma = 12, 0.5
    draws = np.array([loop_count(mean, sigma, seed=1, step=i, micro_step=0, region="4") for i in range(6000)])
    assert draws.min() >= 1
    assert draws.mean() == pytest.approx(mean + 1, abs=4 * math.sqrt(draws.var() / len(draws)))
    expected = mean + mean**2 * (math.exp(sigma**2) - 1)
    assert draws.var() == pytest.approx(expected, rel=0.15)
    # Poisson mixtures have P(K = 1) = E[exp(-rate)]: integrate it over the lognormal.
    z = np.random.default_rng(0).standard_normal(200_000)
    zero = np.exp(-np.exp(math.log(3) - sigma**2 / 2 + sigma * z)).mean()
    few = np.array([loop_count(3, sigma, seed=2, step=i, micro_step=0, region="4") for i in range(6000)])
    assert (few == 1).mean() == pytest.approx(zero, abs=4 * math.sqrt(zero * (1 - zero) / len(few)))


def test_draws_depend_on_their_key_alone() -> None:
    key: dict[str, Any] = {"seed": 3, "step": 5, "micro_step": 0, "region": "4"}
    first = loop_count(12, 0.5, **key)
    np.random.default_rng().poisson(3, 100)
    assert loop_count(12, 0.5, **key) == first
    others = [
        loop_count(12, 0.5, **{**key, **change})
        for change in ({"step": 6}, {"region": "7"}, {"micro_step": 1}, {"seed": 4})
    ]
    assert len({first, *others}) > 1
    like = torch.empty(2, 4, 8)
    both = TrainingNoise(0, [7, 9])("4", 0, like)
    assert torch.equal(TrainingNoise(0, [9])("4", 0, like[:1])[0], both[1])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, TrainingNoise(0, [7, 9])("4", 1, like))


def test_the_initial_state_has_variance_two_fifths() -> None:
    table = EvaluationNoise(0, 512, 256).table("4")
    assert table.dtype == torch.float32
    assert table.var().item() == pytest.approx(2 / 5 * 0.9733, rel=0.02)  # cut at three sigma
    assert table.abs().max() <= 3 * STATE_STD
    assert not torch.equal(table, EvaluationNoise(0, 512, 256).table("7"))
    assert torch.equal(table, EvaluationNoise(0, 512, 256).table("4"))
    x = truncated_normal_(torch.empty(1000), 2.0, torch.Generator().manual_seed(0))
    assert x.abs().max() <= 6


def test_gradients_flow_through_the_last_steps_only(tiny_config: ModelConfig) -> None:
    model = model_of(tiny_config)
    region = model.regions["2"]
    e = torch.randn(1, 5, tiny_config.d_model, dtype=torch.float64)
    noise = model.noise

    def gradient(x: Tensor) -> Tensor:
        model.zero_grad()
        x.pow(3).sum().backward()
        return region.body.adapter.weight.grad.clone()

    truncated = gradient(region.unroll(e, 7, noise, backprop_depth=3))
    with torch.no_grad():
        x = region.initial_state(e, noise)
        for k in range(1, 5):
            x = region.step(x, e, k, noise)
    for k in range(5, 8):
        x = region.step(x, e, k, noise)
    torch.testing.assert_close(truncated, gradient(region.exit(x)))
    assert not torch.allclose(truncated, gradient(region.unroll(e, 7, noise, backprop_depth=None)))


@torch.no_grad()
@pytest.mark.parametrize("spec", SPECS)
@given(st.integers(0, 2**31), st.integers(2, 10))
@settings(max_examples=5)
def test_masked_execution_equals_recomputing_every_prefix(
    tiny_model_f64: LoopedGPT, spec: str, seed: int, length: int
) -> None:
    """Causal: what a token does is what it would do as the last token of the text so far."""
    ids = tokens(seed, 1, length)
    whole = tiny_model_f64.forward_adaptive(ids, spec, max_loops=12)
    for end in range(1, length + 1):
        prefix = tiny_model_f64.forward_adaptive(ids[:, :end], spec, max_loops=12)
        for name in whole.steps:
            assert whole.steps[name][0, end - 1] == prefix.steps[name][0, -1]
            assert whole.outcome[name][0, end - 1] == prefix.outcome[name][0, -1]
        torch.testing.assert_close(whole.logits[0, end - 1], prefix.logits[0, -1], rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def tiny_model_f64(tiny_config: ModelConfig) -> LoopedGPT:
    return model_of(tiny_config)


@torch.no_grad()
def slow_reference(model: LoopedGPT, ids: Tensor, spec: str, max_loops: int) -> tuple[Tensor, dict[str, list[int]]]:
    """The canonical semantics token by token: token t at step k reads keys and values of step min(k, K_j)."""
    x = model.embed(ids)  # (1, T, D)
    steps: dict[str, list[int]] = {}
    for name, layer in model.layers.items():
        if not isinstance(layer, Region):
            x = layer(x)
            continue
        blocks: Any = layer.body.blocks
        x0 = layer.initial_state(x, model.noise)
        kept: list[list[list[tuple[Tensor, Tensor]]]] = []  # [token][step - 1][block]: keys and values, (H, D/H)
        left, steps[name] = [], []
        for t in range(ids.shape[1]):
            policy = haltkit.policy(spec)
            h, e, history = x0[0, t], x[0, t], []
            state, live = policy.init(h), torch.tensor(True)
            for k in range(1, max_loops + 1):
                y = layer.body.adapter(torch.cat([h, e]))
                memory = []
                for b, block in enumerate(blocks):
                    heads = block.attn.n_head
                    q, key, value = block.attn.qkv(block.n1(y)).view(3, heads, -1)
                    memory.append((key, value))
                    past = [kept[j][min(k, len(kept[j])) - 1][b] for j in range(t)] + [(key, value)]
                    keys, values = (torch.stack([p[i] for p in past], 1) for i in (0, 1))  # (H, t+1, D/H)
                    weights = (keys @ q.unsqueeze(-1)).squeeze(-1).div(math.sqrt(q.shape[-1])).softmax(-1)
                    read = (weights.unsqueeze(1) @ values).flatten()
                    y = y + block.n2(block.attn.proj(read))
                    y = y + block.n4(block.mlp(block.n3(y)))
                new = layer.body.norm(y) if layer.body.norm is not None else y
                history.append(memory)
                step = haltkit.LoopStep(k, new, h, live, model.readout)
                state, verdict = policy.update(state, step)
                h = new
                if verdict.halt:
                    break
            kept.append(history)
            left.append(layer.exit(h))
            steps[name].append(len(history))
        x = torch.stack(left).unsqueeze(0)
    return model.readout(x), steps


@pytest.mark.parametrize("spec", SPECS)
def test_masked_execution_equals_a_slow_token_by_token_reference(tiny_model_f64: LoopedGPT, spec: str) -> None:
    ids = tokens(5, 1, 9)
    logits, steps = slow_reference(tiny_model_f64, ids, spec, 12)
    fast = tiny_model_f64.forward_adaptive(ids, spec, max_loops=12)
    assert {name: s[0].tolist() for name, s in fast.steps.items()} == steps
    torch.testing.assert_close(fast.logits, logits, rtol=0, atol=1e-10)


def test_the_semantics_test_would_notice_recomputed_keys(
    tiny_model_f64: LoopedGPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputing a halted token's keys from its last state is another function, and the reference tells."""
    from haltkit.models.gpt import memory

    spec, ids = "norm:tau=0.1", tokens(5, 1, 9)
    logits, _ = slow_reference(tiny_model_f64, ids, spec, 12)
    monkeypatch.setattr(memory.MaskedMemory, "update", lambda self, k, v: (k, v, None))
    wrong = tiny_model_f64.forward_adaptive(ids, spec, max_loops=12)
    assert (wrong.logits - logits).abs().max() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize(
    "spec", [*SPECS, "norm:tau=0.05,granularity=sequence", "accel:tau=0.1,granularity=sequence,pool=max"]
)
def test_a_sequence_does_not_depend_on_its_batch_or_its_padding(tiny_model_f64: LoopedGPT, spec: str) -> None:
    lengths = [11, 4, 7]
    batch, rows = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.bool)
    texts = [tokens(i, 1, n) for i, n in enumerate(lengths)]
    for i, text in enumerate(texts):
        batch[i, : lengths[i]], rows[i, : lengths[i]] = text[0], True
    together = tiny_model_f64.forward_adaptive(batch, spec, max_loops=12, rows=rows)
    for i, text in enumerate(texts):
        alone = tiny_model_f64.forward_adaptive(text, spec, max_loops=12)
        for name in alone.steps:
            assert torch.equal(together.steps[name][i, : lengths[i]], alone.steps[name][0])
            assert together.steps[name][i, lengths[i] :].eq(0).all()
        torch.testing.assert_close(together.logits[i, : lengths[i]], alone.logits[0], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["state", "keys"])
def test_a_token_that_stops_being_finite_reaches_no_earlier_token_and_no_other_sequence(
    tiny_config: ModelConfig, poison: float, where: str
) -> None:
    model = model_of(tiny_config)
    ids, spec, bad = tokens(3, 2, 8), "norm:tau=0.05", 4
    clean = model.forward_adaptive(ids, spec, max_loops=10)
    calls = 0

    def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            output = output.clone()
            output[1, bad, -1] = poison
        return output

    body = model.regions["2"].body
    handle = (body if where == "state" else body.blocks[0].attn.qkv).register_forward_hook(spoil)
    result = model.forward_adaptive(ids, spec, max_loops=10)
    handle.remove()
    assert int(result.outcome["2"][1, bad]) == Outcome.NONFINITE
    assert int(result.steps["2"][1, bad]) == 3
    for name in clean.steps:
        assert torch.equal(result.steps[name][0], clean.steps[name][0])
        assert torch.equal(result.steps[name][1, :bad], clean.steps[name][1, :bad])
    torch.testing.assert_close(result.logits[0], clean.logits[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(result.logits[1, :bad], clean.logits[1, :bad], rtol=0, atol=1e-12)
    assert result.logits.isfinite().all()  # it hands on its last finite state


@torch.no_grad()
def test_a_token_that_is_not_finite_before_any_loop_reaches_no_earlier_token(tiny_config: ModelConfig) -> None:
    model, ids = model_of(tiny_config), torch.arange(16).view(2, 8)
    clean = model.forward_adaptive(ids, "norm:tau=0.05", max_loops=10)
    model.wte.weight[12] = math.nan  # position 4 of the second sequence
    result = model.forward_adaptive(ids, "norm:tau=0.05", max_loops=10)
    for name in clean.steps:
        assert torch.equal(result.steps[name][0], clean.steps[name][0])
        assert torch.equal(result.steps[name][1, :4], clean.steps[name][1, :4])
    assert result.outcome["2"][1, 4] == Outcome.NONFINITE
    keep = torch.arange(512) != 12  # the head shares the embedding: only its own column is lost
    torch.testing.assert_close(result.logits[0][:, keep], clean.logits[0][:, keep], rtol=0, atol=1e-12)
    torch.testing.assert_close(result.logits[1, :4][:, keep], clean.logits[1, :4][:, keep], rtol=0, atol=1e-12)


@torch.no_grad()
def test_fixed_policies_equal_fixed_loop_counts(tiny_model_f64: LoopedGPT) -> None:
    ids = tokens(0, 2, 10)
    for loops in (1, 3, 8):
        adaptive = tiny_model_f64.forward_adaptive(ids, f"fixed:steps={loops}")
        torch.testing.assert_close(adaptive.logits, tiny_model_f64(ids, loops), rtol=0, atol=1e-12)
    mixed = tiny_model_f64.forward_adaptive(ids, "2=fixed:steps=2;3-4=fixed:steps=5")
    torch.testing.assert_close(mixed.logits, tiny_model_f64(ids, {"2": 2, "3-4": 5}), rtol=0, atol=1e-12)


@torch.no_grad()
@each_choice_of_the_recipe
def test_every_choice_of_the_recipe_runs_and_stays_causal(tiny_config: ModelConfig, changes: dict[str, Any]) -> None:
    model = model_of(tiny_config, **changes)
    ids = tokens(0, 1, 8)
    whole = model.forward_adaptive(ids, "norm:tau=0.1", max_loops=6)
    part = model.forward_adaptive(ids[:, :5], "norm:tau=0.1", max_loops=6)
    torch.testing.assert_close(whole.logits[:, :5], part.logits, rtol=0, atol=1e-10)
    assert torch.equal(whole.steps["2"][:, :5], part.steps["2"])
    default = model_of(tiny_config)
    assert not torch.allclose(model(ids, 3), default(ids, 3))


@torch.no_grad()
def test_keep_reaches_every_region_and_tokens_start_at_sqrt_d(tiny_model_f64: LoopedGPT) -> None:
    ids, spec = tokens(1, 1, 6), "fixed:steps=4"
    previous = tiny_model_f64.forward_adaptive(ids, spec, keep="previous")
    assert all(steps.eq(4).all() for steps in previous.steps.values())
    torch.testing.assert_close(previous.logits, tiny_model_f64(ids, 3), rtol=0, atol=1e-12)
    token_and_position = tiny_model_f64.wte.weight[ids[0]] + tiny_model_f64.wpe.weight[:6]
    torch.testing.assert_close(tiny_model_f64.embed(ids)[0], token_and_position * math.sqrt(32))


def test_what_the_model_refuses(tiny_config: ModelConfig, tiny_model: LoopedGPT) -> None:
    with pytest.raises(ValueError, match="context of 32"):
        tiny_model(tokens(0, 1, 33))
    with pytest.raises(ValueError, match="at least 1"):
        tiny_model(tokens(0, 1, 4), 0)
    with pytest.raises(ValueError, match="the model's are"):
        tiny_model(tokens(0, 1, 4), {"2": 3})
    for changes, message in [
        ({"regions": ("6",)}, "after the last layer"),
        ({"regions": ("2", "2-3")}, "overlaps"),
        ({"regions": ("4-2",)}, "runs upwards"),
        ({"regions": ("x",)}, "one layer"),
        ({"n_head": 3}, "not a multiple"),
        ({"injection": "never"}, "never sees its input"),
    ]:
        with pytest.raises(ConfigError, match=message):
            replace(tiny_config, **changes)
