"""One policy, four executions, the same answer: masked, compact, cached token by token, and a batch of one.

Equality as the design defines it: in float64 step counts are equal and logits equal to rounding; in float32 the same
where tau lies in a gap of the reference's scores; policies pooled over a sequence or batch are masked = compact only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import haltkit
from cases import each_choice_of_the_recipe
from haltkit import rows as books
from haltkit.loop import Outcome
from haltkit.models.checkpoint import build_model
from haltkit.models.gpt.bench import Scripted
from haltkit.models.gpt.cache import parse_layout
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.decoding import Decoded, Decoder
from haltkit.models.gpt.model import AdaptiveOutput, LoopedGPT
from haltkit.models.gpt.sampling import GenerationError, Sampling
from maps import readout, wiggle

MAX_LOOPS, CONTEXT = 10, 12
# Token by token: every signal, the wrappers, combinations, a policy a region; all at once, and never.
CAUSAL = [
    "accel:tau=0.05",
    "norm:tau=0.08",
    "norm-rel:tau=0.01",
    "kl:tau=1e-5",
    "kl:tau=1e-5,direction=previous_current",
    "speed:tau=0.02",
    "accel-rel:tau=0.01,denominator=state",
    "accel-rel:tau=0.45",
    "any(accel:tau=0.02|fixed:steps=7)",
    "all(norm:tau=0.1|kl:tau=1e-4):patience=2",
    "norm:tau=0.1,patience=2,min_steps=3",
    "norm:tau=0.1,check_every=3",
    "2=norm:tau=0.1;3-4=kl:tau=1e-5",
    "2=fixed:steps=1;3-4=accel:tau=0.03",
    "norm:tau=100",
    "norm:tau=1e-30",
]
POOLED = [
    "norm:tau=0.05,granularity=sequence",
    "accel:tau=0.1,granularity=sequence,pool=max",
    "kl:tau=1e-5,granularity=batch",
    "any(norm:tau=0.05,granularity=sequence|accel:tau=0.02)",
    "norm:tau=0.05,granularity=batch,pool=max,min_steps=2",
]


@pytest.fixture(scope="module")
def models(tiny_config: ModelConfig) -> dict[torch.dtype, LoopedGPT]:
    torch.manual_seed(0)
    model = build_model(tiny_config).eval()
    again = build_model(tiny_config).eval()
    again.load_state_dict(model.state_dict())
    return {torch.float32: model, torch.float64: again.double()}


def batch_of(seed: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Random texts of these lengths, padded at the end, ``(B, T)``, and which positions are real."""
    ids = torch.randint(0, 512, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)
    return ids * rows, rows


def same(a: AdaptiveOutput, b: AdaptiveOutput, real: Tensor, atol: float) -> None:
    for name in a.steps:
        assert torch.equal(a.steps[name], b.steps[name])
        assert torch.equal(a.outcome[name], b.outcome[name])
    torch.testing.assert_close(a.logits[real], b.logits[real], rtol=0, atol=atol, equal_nan=True)


def same_as_decoded(whole: AdaptiveOutput, sequence: int, position: int, at: Decoded, row: int, atol: float) -> None:
    for name in whole.steps:
        assert whole.steps[name][sequence, position] == at.steps[name][row]
        assert whole.outcome[name][sequence, position] == at.outcome[name][row]
    torch.testing.assert_close(whole.logits[sequence, position], at.logits[row], rtol=0, atol=atol, equal_nan=True)


def check_all(
    model: LoopedGPT, spec: str, ids: Tensor, lengths: Sequence[int], total_loops: int | None, atol: float
) -> None:
    """Masked in a batch, compact in a batch, cached from the middle of every text, and alone: all the same."""
    real = torch.arange(ids.shape[1]) < torch.tensor(lengths).unsqueeze(-1)
    budget = {"max_loops": MAX_LOOPS, "total_loops": total_loops}
    masked = model.forward_adaptive(ids, spec, rows=real, **budget)
    same(masked, model.forward_adaptive(ids, spec, rows=real, execution="compact", **budget), real, atol)
    starts = [(n + 1) // 2 for n in lengths]
    decoder = Decoder(model, spec, **budget)
    prompts = ids[:, : max(starts)] * (torch.arange(max(starts)) < torch.tensor(starts).unsqueeze(-1))
    seen = decoder.prefill(prompts, starts)
    for i in range(max(n - s for n, s in zip(lengths, starts, strict=True)) + 1):
        active = torch.tensor([s + i < n for n, s in zip(lengths, starts, strict=True)])
        for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            if start + i <= length:
                same_as_decoded(masked, b, start + i - 1, seen, b, atol)
        if active.any():
            nexts = [ids[b, min(s + i, n - 1)] for b, (s, n) in enumerate(zip(starts, lengths, strict=True))]
            seen = decoder.step(torch.stack(nexts), active)
    alone = model.forward_adaptive(ids[-1:, : lengths[-1]], spec, **budget)
    for name, steps in alone.steps.items():
        assert torch.equal(masked.steps[name][-1, : lengths[-1]], steps[0])
    torch.testing.assert_close(masked.logits[-1, : lengths[-1]], alone.logits[0], rtol=0, atol=atol)


@pytest.mark.parametrize("spec", CAUSAL)
@given(data=st.data())
@settings(max_examples=6)
def test_all_executions_are_one_function_in_float64(
    models: dict[torch.dtype, LoopedGPT], spec: str, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=5), "lengths")
    total = data.draw(st.sampled_from([None, None, 2, 7]), "total_loops")
    ids, _ = batch_of(data.draw(st.integers(0, 2**31), "seed"), lengths)
    check_all(models[torch.float64], spec, ids, lengths, total, 1e-10)


@each_choice_of_the_recipe
def test_all_executions_are_one_function_for_every_choice_of_the_recipe(
    tiny_config: ModelConfig, changes: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = build_model(replace(tiny_config, **changes)).double().eval()
    lengths = [9, 4, 12]
    ids, real = batch_of(1, lengths)
    scores: list[Tensor] = []
    listening: Any = Listening(haltkit.policy("norm:tau=1e-9"), scores)
    model.forward_adaptive(ids, listening, max_loops=MAX_LOOPS, rows=real)
    for k in (2, 4):  # half of the tokens halt there, at the latest; tau between two scores, not on one
        middle = scores[k - 1].sort().values[len(scores[k - 1]) // 2 :][:2]
        spec = f"norm:tau={float(middle.mean())}"
        depths = model.forward_adaptive(ids, spec, max_loops=MAX_LOOPS, rows=real).steps["2"][real]
        assert depths.unique().numel() > 1  # otherwise nothing is left behind
        check_all(model, spec, ids, lengths, None, 1e-10)
    for execution in ("masked", "compact"):  # the other state that a token may hand on
        found = model.forward_adaptive(
            ids,
            spec,
            max_loops=MAX_LOOPS,
            rows=real,
            keep="previous",
            execution=execution,
        )
        assert torch.equal(found.steps["2"][real], depths)
        if execution == "masked":
            previous = found
    same(previous, found, real, 1e-10)


def gap(scores: list[Tensor], tau: float) -> bool:
    """Whether no score lies so near tau that rounding to float32 could decide.

    That is 1e-3 of tau, and 1e-6 for scores that are small differences of numbers of order one: a divergence of 1e-4 of
    log-probabilities moves by 3e-7 from one execution to another.
    """
    seen = torch.cat([s[s.isfinite()] for s in scores])
    return bool(((seen - tau).abs() > 1e-3 * tau + 1e-6).all())


class Listening:
    """A policy that notes the scores of live rows."""

    def __init__(self, policy: Any, scores: list[Tensor]) -> None:
        self.policy, self.scores = policy, scores

    def init(self, x0: Tensor) -> Any:
        return self.policy.init(x0)

    def update(self, state: Any, step: haltkit.LoopStep) -> Any:
        state, verdict = self.policy.update(state, step)
        self.scores.append(verdict.score[step.active])
        return state, verdict


@pytest.mark.parametrize(
    "spec", ["accel:tau=0.05", "norm:tau=0.08", "kl:tau=1e-4", "accel-rel:tau=0.02,denominator=state"]
)
@given(st.integers(0, 2**31), st.lists(st.integers(1, CONTEXT), min_size=1, max_size=4))
@example(343, [1, 1, 12, 8])  # kl has a score at 1.0002 of tau
@settings(max_examples=5)
def test_all_executions_are_one_function_in_float32_where_tau_is_in_a_gap(
    models: dict[torch.dtype, LoopedGPT], spec: str, seed: int, lengths: list[int]
) -> None:
    model = models[torch.float32]
    ids, real = batch_of(seed, lengths)
    scores: list[Tensor] = []
    policy: Any = haltkit.policy(spec)
    tau = float(haltkit.specs.parse_spec(spec).get("tau") or 0)
    model.forward_adaptive(ids, Listening(policy, scores), max_loops=MAX_LOOPS, rows=real)
    clear = gap(scores, tau)
    event(f"{spec}: {'compared' if clear else 'left out, a score is too near tau'}")  # --hypothesis-show-statistics
    assume(clear)
    check_all(model, spec, ids, lengths, None, 2e-4)


@pytest.mark.parametrize("spec", POOLED)
@given(st.integers(0, 2**31), st.lists(st.integers(1, CONTEXT), min_size=1, max_size=5), st.sampled_from([None, 6]))
@settings(max_examples=6)
def test_pooled_policies_are_masked_and_compact_alike(
    models: dict[torch.dtype, LoopedGPT], spec: str, seed: int, lengths: list[int], total: int | None
) -> None:
    model = models[torch.float64]
    ids, real = batch_of(seed, lengths)
    masked = model.forward_adaptive(ids, spec, max_loops=MAX_LOOPS, total_loops=total, rows=real)
    compact = model.forward_adaptive(ids, spec, max_loops=MAX_LOOPS, total_loops=total, rows=real, execution="compact")
    same(masked, compact, real, 1e-10)
    if total is None and "batch" not in spec:
        alone = model.forward_adaptive(ids[:1, : lengths[0]], spec, max_loops=MAX_LOOPS, execution="compact")
        for name, steps in alone.steps.items():
            assert torch.equal(compact.steps[name][0, : lengths[0]], steps[0])
        torch.testing.assert_close(compact.logits[0, : lengths[0]], alone.logits[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("spec", ["norm:tau=0.08", "accel:tau=0.05"])
def test_bfloat16_agrees_at_forced_depths(
    models: dict[torch.dtype, LoopedGPT], tiny_config: ModelConfig, spec: str
) -> None:
    """Step counts may differ in bf16, so the executions are compared at depths that are forced; the rest is reported."""
    model = build_model(tiny_config).eval()
    model.load_state_dict(models[torch.float32].state_dict())
    model = model.bfloat16()
    ids, real = batch_of(0, [12, 7, 3])
    for depth in (1, 5):
        masked = model.forward_adaptive(ids, f"fixed:steps={depth}", rows=real)
        compact = model.forward_adaptive(ids, f"fixed:steps={depth}", rows=real, execution="compact")
        same(masked, compact, real, 0.15)
    drawn = Scripted(MAX_LOOPS, seed=1)  # tokens leave one by one
    masked = model.forward_adaptive(ids, drawn, rows=real, max_loops=MAX_LOOPS)
    assert masked.steps["2"][real].unique().numel() > 3
    same(masked, model.forward_adaptive(ids, drawn, rows=real, max_loops=MAX_LOOPS, execution="compact"), real, 0.15)
    free = [
        model.forward_adaptive(ids, spec, rows=real, max_loops=MAX_LOOPS, execution=e) for e in ("masked", "compact")
    ]
    equal = [float((free[0].steps[n] == free[1].steps[n])[real].double().mean()) for n in free[0].steps]
    print(f"{spec} in bf16: equal step counts by region {equal}")
    assert min(equal) > 0.5


class Spoiled:
    """Makes one token's output of a module not finite, at one step of its loop, in whatever execution.

    The token is told by its input: it is the one row that equals the clean run's.
    """

    def __init__(self, poison: float, fingerprint: Tensor) -> None:
        self.poison, self.fingerprint = poison, fingerprint

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hit = (args[0] - self.fingerprint).abs().amax(-1) < 1e-9
        return output.masked_fill(hit.unsqueeze(-1), self.poison) if bool(hit.any()) else output


@torch.no_grad()
@pytest.mark.parametrize("bad", [pytest.param(4, id="in-the-prompt"), pytest.param(6, id="decoded-from-a-cache")])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "where",
    [
        "layers.2.body.blocks.0.mlp",
        "layers.2.body.blocks.0.attn.qkv",
        "layers.3-4.body.blocks.0.attn.proj",
        "layers.1.attn.qkv",
    ],
)
def test_a_token_that_stops_being_finite_does_the_same_everywhere(
    models: dict[torch.dtype, LoopedGPT], bad: int, poison: float, where: str
) -> None:
    model, spec, lengths = models[torch.float64], "norm:tau=0.06", [9, 7]
    ids, real = batch_of(3, lengths)
    inputs: list[Tensor] = []
    module = model.get_submodule(where)
    handle = module.register_forward_hook(lambda _m, args, _o: inputs.append(args[0]))
    clean = model.forward_adaptive(ids, spec, rows=real, max_loops=MAX_LOOPS)
    handle.remove()
    step = min(2, len(inputs) - 1)  # the third step of a loop, or the only one
    handle = module.register_forward_hook(Spoiled(poison, inputs[step][0, bad]))
    try:
        masked = model.forward_adaptive(ids, spec, rows=real, max_loops=MAX_LOOPS)
        check_all(model, spec, ids[:, :], lengths, None, 1e-10)
    finally:
        handle.remove()
    regions = [name for name in masked.outcome if (masked.outcome[name] == Outcome.NONFINITE).any()]
    assert regions
    assert all(masked.outcome[name][0, bad] == Outcome.NONFINITE for name in regions)
    torch.testing.assert_close(masked.logits[0, :bad], clean.logits[0, :bad], rtol=0, atol=1e-10)
    torch.testing.assert_close(masked.logits[1, :7], clean.logits[1, :7], rtol=0, atol=1e-10)


# The loop's own side: any body of single rows.


@given(
    st.sampled_from(
        [
            "accel:tau=1e-3",
            "norm:tau=0.1",
            "kl:tau=1e-4",
            "all(norm:tau=0.5|accel:tau=0.1)",
            "norm:tau=0.1,check_every=4",
        ]
    ),
    st.sampled_from([(), (1,), (40,), (3, 7), (2, 3, 5), (0,), (4, 0)]),
    st.sampled_from(["current", "previous"]),
    st.integers(0, 100),
    st.booleans(),
)
@settings(max_examples=60)
def test_compact_is_masked_for_any_function_of_rows(
    spec: str, shape: tuple[int, ...], keep: Any, seed: int, partly: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(*shape, 6, generator=generator, dtype=torch.float64)
    e = torch.randn(*shape, 6, generator=generator, dtype=torch.float64)
    rows = torch.rand(shape, generator=generator) > 0.3 if partly else None
    budget = torch.randint(1, 15, shape, generator=generator) if partly else None

    def run(execution: Any) -> tuple[haltkit.LoopResult, Any]:
        recorder = haltkit.Recorder()
        result = haltkit.run_loop(
            lambda x, e: wiggle(x) + 0.1 * e,
            x0,
            haltkit.policy(spec),
            inputs=(e,),
            max_steps=25,
            readout=readout,
            keep=keep,
            rows=rows,
            budget=budget,
            observer=recorder,
            execution=execution,
        )
        return result, recorder

    (masked, one), (compact, other) = run("masked"), run("compact")
    assert torch.equal(masked.steps, compact.steps)
    assert torch.equal(masked.outcome, compact.outcome)
    torch.testing.assert_close(masked.x, compact.x, rtol=0, atol=1e-12)
    if masked.steps.any():
        torch.testing.assert_close(one.trajectory["loop"].states, other.trajectory["loop"].states, rtol=0, atol=1e-12)
        assert torch.equal(one.trajectory["loop"].steps, other.trajectory["loop"].steps)


def test_compact_computes_live_rows_only() -> None:
    """Rows halt one after the other: the body is given ever fewer, and a handful is not worth moving."""
    x0 = torch.zeros(64, 2)
    x0[:, 0] = 2.0 ** torch.arange(64)
    seen: list[int] = []

    def halve(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x / 2

    masked = haltkit.run_loop(halve, x0.double(), haltkit.policy("norm:tau=1"), max_steps=100)
    assert set(seen) == {64}
    seen.clear()
    compact = haltkit.run_loop(halve, x0.double(), haltkit.policy("norm:tau=1"), max_steps=100, execution="compact")
    assert torch.equal(masked.steps, compact.steps)
    assert len(set(compact.steps.tolist())) > 60
    assert seen == sorted(seen, reverse=True)
    live = [int((compact.steps >= k).sum()) for k in range(1, len(seen) + 1)]
    for computed, needed in zip(seen, live, strict=True):
        assert needed <= computed <= max(books.FEW_ROWS, needed / (1 - books.RETIRE_SHARE) + 1)


def test_a_body_of_rows_is_called_once_a_step_even_when_a_row_is_not_finite() -> None:
    calls = 0

    def body(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        new = wiggle(x)
        return torch.where(torch.arange(len(x)).unsqueeze(-1) == 2, math.nan, new) if calls == 3 else new

    x0 = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = haltkit.run_loop(body, x0, haltkit.policy("fixed:steps=6"), execution="compact")
    assert calls == 6
    assert result.outcome.tolist() == [
        Outcome.CONVERGED,
        Outcome.CONVERGED,
        Outcome.NONFINITE,
        *[Outcome.CONVERGED] * 2,
    ]
    assert result.steps.tolist() == [6, 6, 3, 6, 6]


def test_a_budget_for_each_row_ends_it_unless_its_policy_does() -> None:
    x0 = torch.tensor([[8.0, 0.0], [4.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    for execution in ("masked", "compact"):
        for keep in ("current", "previous"):
            result = haltkit.run_loop(
                lambda x: x / 2,
                x0,
                haltkit.policy("norm:tau=1.5"),
                keep=keep,
                execution=execution,
                budget=torch.tensor([2, 2, 9]),
            )
            # d_k = x_0 / 2^k: the first would need 3 steps, the second halts at its last one.
            assert result.steps.tolist() == [2, 2, 1]
            assert result.outcome.tolist() == [Outcome.BUDGET, Outcome.CONVERGED, Outcome.CONVERGED]
            assert result.x[0, 0] == 2.0


def test_the_joint_budget_keeps_a_step_for_every_region_to_come(models: dict[torch.dtype, LoopedGPT]) -> None:
    model = models[torch.float64]
    ids, _ = batch_of(0, [8, 8])
    out = model.forward_adaptive(ids, "norm:tau=1e-30", max_loops=6, total_loops=9)
    assert out.steps["2"].eq(6).all()
    assert out.steps["3-4"].eq(3).all()
    out = model.forward_adaptive(ids, "norm:tau=1e-30", max_loops=20, total_loops=9)
    assert out.steps["2"].eq(8).all()
    assert out.steps["3-4"].eq(1).all()
    saved = model.forward_adaptive(ids, "2=norm:tau=0.08;3-4=norm:tau=1e-30", max_loops=20, total_loops=9)
    assert (saved.steps["2"] + saved.steps["3-4"]).eq(9).all()  # what one region leaves, the next may spend
    assert saved.steps["2"].unique().numel() > 1
    with pytest.raises(ValueError, match="the model has 2 regions"):
        model.forward_adaptive(ids, "norm:tau=1", total_loops=1)


def test_what_cannot_go_together_is_refused_by_name(models: dict[torch.dtype, LoopedGPT]) -> None:
    model, x0, policy = models[torch.float64], torch.zeros(3, 2), haltkit.policy("norm:tau=1")
    ids, _ = batch_of(0, [4, 4])
    for granularity in ("sequence", "batch"):
        with pytest.raises(GenerationError, match=f"granularity={granularity} cannot decode.*granularity=token"):
            Decoder(model, f"norm:tau=1,granularity={granularity}")
    with pytest.raises(GenerationError, match="region 3-4"):
        Decoder(model, "2=norm:tau=1;3-4=any(norm:tau=1,granularity=batch|kl:tau=1)")
    with pytest.raises(ValueError, match="known: depth-indexed"):
        Decoder(model, "norm:tau=1", layout="full")
    with pytest.raises(ValueError, match="known: depth-indexed"):
        parse_layout("modulo:0")
    with pytest.raises(ValueError, match="allowed are 'masked' and 'compact'"):
        model.forward_adaptive(ids, "norm:tau=1", execution="cached")
    with pytest.raises(GenerationError, match="at least 50 steps and max_loops is 32"):
        Decoder(model, "2=norm:tau=1;3-4=norm:tau=1,min_steps=50")
    with pytest.raises(GenerationError, match="prefill first"):
        Decoder(model, "norm:tau=1").step(ids[:, 0])
    for lengths in ([0, 4], [5, 4], [4]):
        with pytest.raises(GenerationError, match="one for each of 2 prompts, from 1 to 4"):
            Decoder(model, "norm:tau=1").prefill(ids, lengths)
    with pytest.raises(ValueError, match="budget=0 for some row"):
        haltkit.run_loop(lambda x: x, x0, policy, budget=torch.tensor([1, 0, 2]))
    with pytest.raises(ValueError, match="padding must be at the end"):
        model.forward_adaptive(ids, "norm:tau=1", rows=torch.tensor([[False, True, True, True]] * 2))

    class Stepper:
        def step(self, x: Tensor, k: int, active: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match="rows of Stepper cannot be retired.*execution='masked'"):
        haltkit.run_loop(Stepper(), x0, policy, execution="compact")
    with pytest.raises(ValueError, match="inputs= is for functions"):
        haltkit.run_loop(Stepper(), x0, policy, inputs=(x0,))
    with pytest.raises(ValueError, match="not one entry per row"):
        haltkit.run_loop(lambda x, e: x, x0, policy, inputs=(torch.zeros(2, 2),))
    with pytest.raises(ValueError, match="budget has shape"):
        haltkit.run_loop(lambda x: x, x0, policy, budget=torch.ones(2))
    with pytest.raises(ValueError, match="turned a state of shape"):
        haltkit.run_loop(lambda x: x[:1], x0, policy, execution="compact")


# Layouts.


def layout_reference(
    model: LoopedGPT, ids: Tensor, spec: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> list[Decoded]:
    """Token by token from the first on, with every slot looked up in a full history by the layout's definition."""
    from haltkit.models.gpt import cache

    slots = parse_layout(layout).slots
    written: dict[int, list[dict[int, Tensor]]] = {}  # by cache: for each position, keys and values of each step

    def write(self: Any, rows: Any, new: Tensor) -> None:
        tape = written.setdefault(id(self), [])
        while len(tape) < rows.end:
            tape.append({})
        tape[rows.end - 1][rows.k] = new[0]
        for position, steps in enumerate(tape):
            last = max(steps)
            if slots is None or not self.looped:
                pick = min(rows.k, last)
            else:
                matching = [s for s in steps if (s - 1) % slots == (rows.k - 1) % slots]
                pick = max(matching) if matching else last
            self.kv[self.layout.slot(rows.k), 0, position] = steps[pick]

    decoder = Decoder(model, spec, layout=layout, max_loops=MAX_LOOPS)
    first = decoder.prefill(ids[:, :1])
    for name, caches in decoder._caches.items():
        for store in caches:
            store.looped = name in model.regions
            store._grow(MAX_LOOPS) if parse_layout(layout).slots is None else None
    # The prompt's own token, once more, to have its history.
    decoder.lengths = [0]
    monkeypatch.setattr(cache.LayerCache, "write", write)
    out = [first]
    for i in range(ids.shape[1]):
        seen = decoder.step(ids[:, i])
        if i:
            out.append(seen)
    monkeypatch.undo()
    return out


@pytest.mark.parametrize("layout", ["last", "modulo:1", "modulo:2", "modulo:3", "modulo:16", "depth-indexed"])
def test_a_layout_keeps_what_it_says(
    models: dict[torch.dtype, LoopedGPT], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, spec = models[torch.float64], "norm:tau=0.06"
    ids, _ = batch_of(11, [9])
    expected = layout_reference(model, ids, spec, layout, monkeypatch)
    decoder = Decoder(model, spec, layout=layout, max_loops=MAX_LOOPS)
    seen = [decoder.prefill(ids[:, :1]), *(decoder.step(ids[:, i]) for i in range(1, 9))]
    for mine, theirs in zip(seen, expected, strict=True):
        assert {n: s.tolist() for n, s in mine.steps.items()} == {n: s.tolist() for n, s in theirs.steps.items()}
        torch.testing.assert_close(mine.logits, theirs.logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", ["last", "modulo:2", "modulo:3", "depth-indexed"])
def test_a_prompt_leaves_what_its_tokens_would_have_left_one_by_one(
    models: dict[torch.dtype, LoopedGPT], layout: str
) -> None:
    """Of a prompt run canonically, the layout keeps of each token what it says. (What the cache then holds.)"""
    model, spec, lengths = models[torch.float64], "norm:tau=0.06", [9, 4]
    ids, _ = batch_of(11, lengths)
    exact = Decoder(model, spec, max_loops=MAX_LOOPS)
    exact.prefill(ids, lengths)
    one = Decoder(model, spec, layout=layout, max_loops=MAX_LOOPS)
    one.prefill(ids, lengths)
    slots = parse_layout(layout).slots
    steps = model.forward_adaptive(ids, spec, max_loops=MAX_LOOPS).steps
    for name in model.regions:
        for full, kept in zip(exact._caches[name], one._caches[name], strict=True):
            for b, length in enumerate(lengths):
                for t in range(length):
                    depth = int(steps[name][b, t])
                    for slot in range(kept.filled):
                        matching = [s for s in range(1, depth + 1) if slots and (s - 1) % slots == slot]
                        pick = min(slot + 1, depth) if slots is None else max(matching, default=depth)
                        torch.testing.assert_close(kept.kv[slot, b, t], full.kv[pick - 1, b, t], rtol=0, atol=1e-12)


def test_approximate_layouts_are_other_functions_and_take_less_memory(models: dict[torch.dtype, LoopedGPT]) -> None:
    model, spec = models[torch.float64], "norm:tau=0.06"
    ids, _ = batch_of(2, [10])
    results, sizes = {}, {}
    for layout in ("depth-indexed", "last", "modulo:2"):
        decoder = Decoder(model, spec, layout=layout, max_loops=MAX_LOOPS)
        decoder.prefill(ids[:, :5])
        for i in range(5, 10):
            seen = decoder.step(ids[:, i])
        results[layout], sizes[layout] = seen.logits, decoder.nbytes()
    assert sizes["last"] < sizes["modulo:2"] < sizes["depth-indexed"]
    # last: one slot a layer and token, as in a model that loops nothing
    assert sizes["last"] == 10 * 5 * 2 * model.d_model * 8
    for layout in ("last", "modulo:2"):
        assert (results[layout] - results["depth-indexed"]).abs().max() > 1e-6


@torch.no_grad()
@pytest.mark.parametrize("layout", ["depth-indexed", "last", "modulo:2"])
@given(data=st.data())
@settings(max_examples=6)
def test_rewinding_then_stepping_is_as_if_the_dropped_tokens_had_never_been(
    models: dict[torch.dtype, LoopedGPT], layout: str, data: st.DataObject
) -> None:
    model, spec = models[torch.float64], "norm:tau=0.06"
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4), "lengths")
    tried = data.draw(st.integers(1, 4), "tokens that are dropped")
    ids, _ = batch_of(data.draw(st.integers(0, 2**31), "seed"), lengths)
    text = torch.randint(0, 512, (tried + 3, len(lengths)), generator=torch.Generator().manual_seed(1))
    never, rewound = (Decoder(model, spec, layout=layout, max_loops=MAX_LOOPS) for _ in range(2))
    for decoder in (never, rewound):
        decoder.prefill(ids, lengths)
    for tokens in text[:tried]:
        rewound.step(tokens)
    rewound.rewind(tried)
    for tokens in text[tried:]:
        expected, found = never.step(tokens), rewound.step(tokens)
        for name in expected.steps:
            assert torch.equal(expected.steps[name], found.steps[name])
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-12)


@torch.no_grad()
def test_sequences_rewind_each_by_its_own_count_also_past_a_broken_token(models: dict[torch.dtype, LoopedGPT]) -> None:
    model, spec, lengths = models[torch.float64], "norm:tau=0.06", [4, 2]
    ids, _ = batch_of(5, lengths)
    one, other = Decoder(model, spec, max_loops=MAX_LOOPS), Decoder(model, spec, max_loops=MAX_LOOPS)
    one.prefill(ids, lengths)
    other.prefill(ids, lengths)
    first, second, last = torch.tensor([7, 8]), torch.tensor([9, 10]), torch.tensor([11, 12])
    one.step(first)
    spoil = model.get_submodule("layers.1.attn.qkv").register_forward_hook(lambda _m, _a, out: out * math.nan)
    one.step(second, torch.tensor([True, False]))
    spoil.remove()
    one.rewind([1, 0])
    other.step(first)
    torch.testing.assert_close(one.step(last).logits, other.step(last).logits, rtol=0, atol=1e-12)
    for count in ([1], -1, 99, [1, 2, 3]):
        with pytest.raises(GenerationError, match="rewind"):
            one.rewind(count)


# Generation.


def test_generation_is_the_argmax_of_the_whole_text_so_far(models: dict[torch.dtype, LoopedGPT]) -> None:
    model, spec, prompts = models[torch.float64], "accel:tau=0.05", [[5, 7, 9], [3], [1, 2, 3, 4, 5, 6]]
    made = model.generate(prompts, spec, max_new_tokens=6, temperature=0, max_loops=MAX_LOOPS)
    for i, prompt in enumerate(prompts):
        text = list(prompt)
        for j in range(6):
            whole = model.forward_adaptive(torch.tensor([text]), spec, max_loops=MAX_LOOPS)
            assert made.tokens[i][j] == int(whole.logits[0, -1].argmax())
            assert {n: made.steps[n][i][j] for n in whole.steps} == {n: int(s[0, -1]) for n, s in whole.steps.items()}
            text.append(made.tokens[i][j])
    assert made.finished == ["length"] * 3


def test_a_text_ends_at_a_stop_token_or_where_the_context_is_full(models: dict[torch.dtype, LoopedGPT]) -> None:
    model = models[torch.float64]
    free = model.generate([[5, 7], [9]], "norm:tau=0.1", max_new_tokens=100, seed=1)
    assert free.finished == ["context", "context"]
    assert [len(t) for t in free.tokens] == [model.block_size - 2, model.block_size - 1]
    stop = free.tokens[0][4]
    stopped = model.generate([[5, 7], [9]], "norm:tau=0.1", max_new_tokens=100, seed=1, stop=[stop])
    first = free.tokens[0].index(stop)
    assert stopped.tokens[0] == free.tokens[0][:first]
    assert stopped.finished[0] == "stop"
    other = free.tokens[1].index(stop) if stop in free.tokens[1] else len(free.tokens[1])
    assert stopped.tokens[1] == free.tokens[1][:other]  # one that goes on is not disturbed by one that has ended


@torch.no_grad()
def test_a_sequence_whose_logits_break_ends_alone(models: dict[torch.dtype, LoopedGPT]) -> None:
    model, prompts = models[torch.float64], [[5, 7, 9], [3, 8]]
    free = model.generate(prompts, "norm:tau=0.1", max_new_tokens=8, seed=1)
    count = 0

    def spoil(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        nonlocal count
        count += 1
        bad = torch.zeros(len(output), dtype=torch.bool)
        bad[0] = count == 4  # the fourth token of the first text
        return output.masked_fill(bad.unsqueeze(-1), math.nan)

    handle = model.norm_f.register_forward_hook(spoil)
    try:
        made = model.generate(prompts, "norm:tau=0.1", max_new_tokens=8, seed=1)
    finally:
        handle.remove()
    assert made.finished == ["nonfinite", "length"]
    assert made.tokens == [free.tokens[0][:3], free.tokens[1]]


@torch.no_grad()
def test_budgets_by_region_reach_every_token_that_is_generated(models: dict[torch.dtype, LoopedGPT]) -> None:
    made = models[torch.float64].generate([[5, 7]], "norm:tau=1e-30", max_new_tokens=3, max_loops={"2": 3, "3-4": 5})
    assert made.steps == {"2": [[3, 3, 3]], "3-4": [[5, 5, 5]]}


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 0), (0, 4)])
def test_nothing_to_compute_is_no_error(models: dict[torch.dtype, LoopedGPT], shape: tuple[int, int]) -> None:
    ids = torch.zeros(shape, dtype=torch.long)
    for execution in ("masked", "compact"):
        out = models[torch.float64].forward_adaptive(ids, "norm:tau=1", execution=execution)
        assert out.logits.shape == (*shape, 512)


def test_sampling_draws_from_the_distribution_it_says() -> None:
    n = 20_000
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(n, -1)
    for sampling, expected in (
        (Sampling(), logits[0].softmax(-1)),
        (Sampling(temperature=0.5), (2 * logits[0]).softmax(-1)),
        (Sampling(top_k=2), torch.tensor([2.0, 1.0, -math.inf, -math.inf]).softmax(-1)),
        (Sampling(top_p=0.7), torch.tensor([2.0, 1.0, -math.inf, -math.inf]).softmax(-1)),
        (Sampling(top_p=0.6), torch.tensor([1.0, 0, 0, 0])),
        (Sampling(temperature=0), torch.tensor([1.0, 0, 0, 0])),
        (Sampling(temperature=1e-300), torch.tensor([1.0, 0, 0, 0])),
        (Sampling(top_k=1), torch.tensor([1.0, 0, 0, 0])),
        (Sampling(vocabulary=2), torch.tensor([2.0, 1.0, -math.inf, -math.inf]).softmax(-1)),
    ):
        for positions, sequences in ((range(n), None), ([3] * n, range(n))):  # along a text, and across a batch
            share = torch.bincount(sampling.pick(logits, positions, sequences), minlength=4) / n
            assert bool(((share - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt()).all())


@pytest.mark.parametrize("sampling", [Sampling(seed=4), Sampling(1.5, seed=4, top_p=0.9), Sampling(top_k=40, seed=4)])
def test_a_draw_depends_on_its_sequence_and_position_alone_and_rounding_hardly_changes_any(sampling: Sampling) -> None:
    n = 1500
    logits = 3 * torch.randn(n, 8192, generator=torch.Generator().manual_seed(1))
    sequences, positions = [i % 7 for i in range(n)], [i // 7 for i in range(n)]
    drawn = sampling.pick(logits, positions, sequences)
    alone = [sampling.of(s).pick(logits[i : i + 1], [positions[i]]) for i, s in enumerate(sequences)]
    assert torch.equal(drawn, torch.cat(alone))
    # Each probability changes by 0.01 %, and so should about one draw of ten thousand. Boundaries that are summed up
    # over the vocabulary move by more than the width of most tokens.
    moved = logits + 1e-4 * torch.randn(n, 8192, generator=torch.Generator().manual_seed(2))
    assert int((sampling.pick(moved, positions, sequences) != drawn).sum()) <= 2


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompt"),
        ([[1], []], {}, "prompt 2 is empty"),
        ([[512]], {}, "outside the vocabulary of 512"),
        ([[1] * 32], {}, "the prompt has 32 tokens and the model's context 32.*at most 31"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"temperature": -1.0}, "temperature=-1"),
        ([[1]], {"top_k": 0}, "top_k=0"),
        ([[1]], {"top_p": 0.0}, "top_p=0"),
        ([[1]], {"seed": -1}, "seed=-1"),
        ([[1]], {"seed": 2**63}, r"below 2\*\*63"),
        ([[1]], {"max_loops": 0}, "max_loops=0"),
        ([[1]], {"stop": [512]}, "stop token 512 is outside"),
        ([[1.5]], {}, "not a list of token ids"),
        ([1, 2], {}, "prompt 1 is not a list of token ids"),
        (["text"], {}, "not a list of token ids"),
    ],
)
def test_generation_refuses_what_it_cannot_do(
    models: dict[torch.dtype, LoopedGPT], prompts: list[list[int]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        models[torch.float64].generate(prompts, "norm:tau=1", **options)
