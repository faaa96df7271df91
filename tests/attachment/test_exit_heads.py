"""The exit heads of models, read by ``gate``: each rule takes the steps that the model's own rule takes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import haltkit
from cases import needs
from haltkit.attachment.presets import preset_for
from haltkit.recording.trajectory import RegionTrajectory as Region
from standins import OuroForCausalLM, SlotCache, with_config

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's packages warn as they like

IDS = torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(0))
probabilities = st.floats(0.05, 0.95)


def spread(linear: nn.Linear, size: float, bias: float = 0.0) -> None:
    """Large enough weights of a head that rows exit at different steps."""
    nn.init.normal_(linear.weight, std=size, generator=torch.Generator().manual_seed(1))
    if linear.bias is not None:
        nn.init.constant_(linear.bias, bias)


def recorded(model: nn.Module, run: Any, loop: haltkit.Loop | None = None) -> Region:
    """The states of all steps of the one loop."""
    recorder = haltkit.Recorder()
    with torch.no_grad(), haltkit.attach(model, "fixed:steps=1000", loop, observer=recorder):
        run()
    (region,) = recorder.trajectory.regions.values()
    return region


def near(values: Tensor, threshold: float) -> bool:
    """Rounding would decide."""
    return bool(((values - threshold).abs() < 1e-5).any())


def first(reached: Tensor, dim: int) -> Tensor:
    """The first step, from 1, at which a rule's condition holds; the last if it never does."""
    return torch.where(reached.any(dim), reached.int().argmax(dim) + 1, reached.shape[dim])


# --- Ouro


@functools.cache
def ouro() -> Any:
    torch.manual_seed(0)
    model = OuroForCausalLM(steps=6).eval()
    spread(model.model.early_exit_gate, 0.6, -0.7)
    return model


@functools.cache
def ouro_recorded() -> tuple[Region, list[Tensor]]:
    model = ouro()
    with torch.no_grad():
        _, _, gates = model.model(IDS)
    return recorded(model, lambda: model(IDS)), gates


@given(probabilities)
def test_ouro_exits_where_its_own_rule_does(q: float) -> None:
    region, gates = ouro_recorded()
    distribution = ouro().exit_distribution(gates)
    assume(not near(distribution.cumsum(-1), q))
    taken = haltkit.replay(f"gate:tau={1 - q},rule=cumulative", region, readout=preset_for(ouro())[1])
    assert torch.equal(taken.steps, ouro().exit_steps(gates, q))


def test_ouros_tokens_exit_at_different_steps() -> None:
    """Otherwise the property above says little."""
    assert len(ouro().exit_steps(ouro_recorded()[1], 0.6).unique()) >= 4


@torch.no_grad()
@given(probabilities, st.integers(0, 49))
def test_one_token_of_ouro_gets_what_its_own_threshold_gives_it(q: float, token: int) -> None:
    """Alone there is no other token whose keys and values would be those of deeper steps."""
    model, ids = ouro(), torch.tensor([[token]])
    _, _, gates = model.model(ids)
    assume(not near(model.exit_distribution(gates).cumsum(-1), q))
    expected = model(ids, exit_threshold=q).logits
    with haltkit.attach(model, f"gate:tau={1 - q},rule=cumulative") as session:
        out = model(ids).logits
    assert torch.equal(out, expected)
    assert torch.equal(session.steps["loop"], model.exit_steps(gates, q))


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 3, 5])
def test_ouros_own_choices_among_steps_are_those_of_the_model_run_with_k(k: int) -> None:
    model = ouro()

    def all_choices() -> list[Tensor]:
        by_threshold = [model(IDS, exit_threshold=q).logits for q in (0.3, 0.8, 1.0)]
        return [*by_threshold, *(model(IDS, exit_at_step=step).logits for step in range(k))]

    expected = with_config(model.model, all_choices, total_ut_steps=k)
    weighted = with_config(model.model, lambda: model(IDS, weighted=True).logits, total_ut_steps=k)
    with haltkit.attach(model, f"fixed:steps={k}"):
        assert all(torch.equal(a, b) for a, b in zip(all_choices(), expected, strict=True))
        torch.testing.assert_close(model(IDS, weighted=True).logits, weighted, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kv", ["uniform", "copy"])
def test_ouro_decodes_by_its_gate_with_a_cache(kv: Any) -> None:
    """Against its own parts in a loop by hand, which under ``copy`` repeats the last step's keys and values."""
    model, layers, pieces = ouro(), 2, (IDS[:, :4], IDS[:, 4:5], IDS[:, 5:6], IDS[:, 6:])
    cache, out, depths = SlotCache(), [], []
    with haltkit.attach(
        model, "gate:tau=0.4,rule=cumulative,granularity=batch", kv=kv, kv_stride=layers if kv == "copy" else None
    ) as session:
        for piece in pieces:
            out.append(model(piece, cache).logits)
            depths.append(int(session.steps["loop"].max()))
    assert min(depths) < 6
    assert kv == "uniform" or len(set(depths)) > 1
    own, base = SlotCache(), model.model
    for piece, depth, found in zip(pieces, depths, out, strict=True):
        x = base.embed_tokens(piece)
        for step in range(depth):
            for layer in base.layers:
                x = layer(x, past_key_value=own, current_ut=step)
            x = base.norm(x)
        for slot in range(layers * depth, layers * 6) if kv == "copy" else ():
            keys, values = (t[:, :, -piece.shape[1] :] for t in own.slots[slot - layers])
            own.update(keys, values, slot)
        assert torch.equal(found, model.lm_head(x))
    assert own.slots.keys() == cache.slots.keys()


def test_the_gate_of_ouro_without_its_language_head_has_no_logits() -> None:
    base = ouro().model
    readout = preset_for(base)[1]
    assert isinstance(readout, haltkit.Heads)
    assert readout.logits is None
    with torch.no_grad(), haltkit.attach(base, "gate:tau=0.4,rule=cumulative") as session:
        base(IDS)
    assert int(session.steps["loop"].min()) < 6


# --- ACT: OpenMythos


@functools.cache
def mythos() -> tuple[Any, Region, Tensor]:
    """The model, its states, and the halting probabilities that its own unit gave, ``(steps, B, T)``."""
    needs("open_mythos")
    from test_attach_real_models import mythos as target

    torch.manual_seed(0)
    model: Any = target().model
    spread(model.recurrent.act.halt, 0.05, -0.5)
    seen: list[Tensor] = []
    hook = model.recurrent.act.register_forward_hook(lambda _m, _a, out: seen.append(out))
    region = recorded(model, lambda: model(IDS, n_loops=6))
    hook.remove()
    return model, region, torch.stack(seen)


@given(probabilities)
def test_act_halts_where_the_sum_of_its_own_unit_says(threshold: float) -> None:
    model, region, halts = mythos()
    total = halts.cumsum(0)
    assume(not near(total, threshold))
    expected = first(total >= threshold, 0)
    taken = haltkit.replay(f"gate:tau={1 - threshold},rule=sum", region, readout=preset_for(model)[1])
    assert torch.equal(taken.steps, expected)


@torch.no_grad()
def test_act_gets_the_models_own_output_when_all_rows_have_halted() -> None:
    """The weights that the model gives its states are those of its own threshold; what comes after adds nothing."""
    model, region, _ = mythos()
    readout = preset_for(model)[1]
    deepest = haltkit.replay("gate:tau=0.3,rule=sum", region, readout=readout).steps.max()
    with_threshold = lambda: with_config(model.recurrent.cfg, lambda: model(IDS, n_loops=6), act_threshold=0.7)  # type: ignore[arg-type]  # noqa: E731
    expected = with_threshold()
    with haltkit.attach(model, "gate:tau=0.3,rule=sum,granularity=batch,pool=max") as session:
        out = with_threshold()
    assert 1 < int(deepest) < 6
    assert session.steps["loop"].eq(deepest).all()
    assert torch.equal(out, expected)


# --- PonderNet: ponder-transformer


@functools.cache
def ponder(causal: bool) -> tuple[Any, Region, Tensor, Any]:
    """The model, its states, its own halting logits ``(B, steps[, T])`` and the package's exit distribution."""
    needs("ponder_transformer")
    from ponder_transformer import PonderTransformer
    from ponder_transformer.ponder_transformer import calc_geometric

    torch.manual_seed(0)
    model: Any = PonderTransformer(num_tokens=50, dim=16, max_seq_len=7, dim_head=8, heads=2, causal=causal).eval()
    spread(model.block.to_halt_logits[0], 0.1, -1.5)
    seen: list[Tensor] = []
    hook = model.block.register_forward_hook(lambda _m, _a, out: seen.append(out[1]))

    def run() -> None:  # its own halting draws random numbers: here none is small enough
        draw = torch.rand_like
        torch.rand_like = lambda *a, **k: torch.full_like(*a, 2.0, **k)
        try:
            model(IDS)
        finally:
            torch.rand_like = draw

    region = recorded(model, run, haltkit.Loop(["block"]))
    hook.remove()
    return model, region, torch.stack(seen, 1), calc_geometric


def ponder_heads(model: Any) -> haltkit.Heads:
    """What the block does with its state to halt: the mean of the positions so far, or of all."""

    def gate(x: Tensor) -> Tensor:
        if not model.causal:
            return model.block.to_halt_logits(x.mean(1)).unsqueeze(-1).expand(x.shape[:-1])  # type: ignore[no-any-return]
        seen = torch.arange(x.shape[1]).view(1, -1, 1) + 1
        return model.block.to_halt_logits(x.cumsum(1) / seen)  # type: ignore[no-any-return]

    return haltkit.Heads(model.to_logits, gate)


@pytest.mark.parametrize("causal", [True, False])
@given(probabilities)
def test_ponder_exits_where_the_packages_distribution_has_passed(causal: bool, q: float) -> None:
    model, region, logits, distribution = ponder(causal)
    passed = distribution(logits.sigmoid(), dim=1).cumsum(1)
    assume(not near(passed, q))
    expected = first(passed >= q, 1)
    taken = haltkit.replay(f"gate:tau={1 - q},rule=cumulative", region, readout=ponder_heads(model)).steps
    assert torch.equal(taken, expected if causal else expected.unsqueeze(1).expand_as(taken))


# --- halt logits: hrm-pytorch, tiny-recursive-model


@functools.cache
def hrm() -> Any:
    needs("HRM")
    from HRM import HRM_ACT

    torch.manual_seed(0)
    network = {"dim": 16, "depth": 1, "attn_dim_head": 32, "heads": 2, "use_rmsnorm": True, "rotary_pos_emb": True}
    model: Any = HRM_ACT(networks=[network, network], num_tokens=50, dim=16, max_reasoning_steps=6).eval()
    return model


@torch.no_grad()
@given(st.integers(0, 2**31))
def test_hrm_halts_each_sequence_where_it_does_itself(seed: int) -> None:
    model = hrm()
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(model.to_q_halt_continue[2].weight, std=0.5, generator=generator)
    ids = torch.randint(0, 50, (8, 5), generator=generator)
    expected, _, own = model(ids)  # its batch shrinks as sequences halt; -1: they ran to the end
    with haltkit.attach(model, "gate:tau=0.5,granularity=sequence") as session:
        out, _ = model(ids, adaptive_compute=False)
    assert torch.equal(session.steps["loop"][:, 0], torch.where(own < 0, 6, own))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)  # products of other sizes round differently


@torch.no_grad()
def test_hrm_halts_sequences_at_different_steps() -> None:
    """Otherwise the property above says little."""
    model = hrm()
    seen = set()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(model.to_q_halt_continue[2].weight, std=0.5, generator=generator)
        seen |= set(model(torch.randint(0, 50, (8, 5), generator=generator))[2].tolist())
    assert len(seen & {2, 3, 4, 5, 6}) >= 2


@torch.no_grad()
@given(st.integers(0, 2**31), probabilities)
def test_a_tiny_recursive_model_stops_predicting_where_it_does_itself(seed: int, threshold: float) -> None:
    """Its ``predict`` judges each round of refinements, whatever the threshold; one that it never reaches records."""
    needs("tiny_recursive_model")
    from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel

    torch.manual_seed(seed)
    model: Any = TinyRecursiveModel(
        dim=16,
        num_tokens=50,
        network=MLPMixer1D(dim=16, depth=1, seq_len=7),
        num_refinement_blocks=2,
        num_latent_refinements=2,
    ).eval()
    spread(model.to_halt_pred[1], 1.0)
    rounds = haltkit.Loop(["network"], period=2 * 3, initial=None, scope=":predict")
    region = recorded(model, lambda: model.predict(IDS, 2.0, 6), rounds)
    readout = preset_for(model)[1]
    assert isinstance(readout, haltkit.Heads)
    assume(not near(torch.stack([readout.gate(x) for x in region.states]).sigmoid(), threshold))
    taken = haltkit.replay(f"gate:tau={1 - threshold}", region, readout=readout).steps
    assert torch.equal(taken[:, 0], model.predict(IDS, threshold, 6)[1])
