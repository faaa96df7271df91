"""The presets against the real third-party models, with tiny random weights: exact at every k."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from cases import hrm_model
from haltkit.attachment.description import Loop
from haltkit.attachment.presets import preset_for
from haltkit.recording.recorder import Recorder
from standins import with_config

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's packages warn as they like


@dataclass(frozen=True)
class Target:
    """A model, how it is run, how it is run with k loops, and how many it runs by itself."""

    model: Any
    run: Callable[[], Tensor]
    run_at: Callable[[int], Tensor]
    loops: int
    loop: Loop | None = None  # None: found by the preset


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


IDS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))


def albert() -> Target:
    needs("transformers")
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        vocab_size=50,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=64,
    )
    model = AlbertModel(config).eval()
    run = lambda: model(IDS).last_hidden_state  # noqa: E731
    return Target(model, run, lambda k: with_config(model.config, run, num_hidden_layers=k), 8)


def hrm_outer() -> Target:
    model = hrm_model()
    run = lambda: model(IDS, use_cache=False).logits  # noqa: E731
    return Target(model, run, lambda k: with_config(model.config, run, H_cycles=k), 4)


def hrm_inner() -> Target:
    from haltkit.attachment.presets.hrm_text import describe_inner

    model = hrm_model()
    run = lambda: model(IDS, use_cache=False).logits  # noqa: E731
    return Target(model, run, lambda k: with_config(model.config, run, L_cycles=k), 3, describe_inner(model)[0])


def tiny_recursive() -> Target:
    needs("tiny_recursive_model")
    from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel

    model: Any = TinyRecursiveModel(
        dim=16,
        num_tokens=50,
        network=MLPMixer1D(dim=16, depth=1, seq_len=7),
        num_refinement_blocks=5,
        num_latent_refinements=3,
    ).eval()
    start = model.get_initial()
    run = lambda: model(IDS, *start)[2]  # noqa: E731
    return Target(model, run, lambda k: with_config(model, run, num_refinement_blocks=k), 5)


def mythos() -> Target:
    needs("open_mythos")
    from open_mythos.main import MythosConfig, OpenMythos

    config = MythosConfig(
        vocab_size=50,
        dim=64,
        n_heads=4,
        n_kv_heads=2,
        max_seq_len=32,
        max_loop_iters=6,
        prelude_layers=1,
        coda_layers=1,
        attn_type="gqa",
        n_experts=2,
        n_shared_experts=1,
        n_experts_per_tok=1,
        expert_dim=32,
        lora_rank=4,
        act_threshold=100.0,  # its own ACT never ends the loop
    )
    model = OpenMythos(config).eval()
    return Target(model, lambda: model(IDS, n_loops=6), lambda k: model(IDS, n_loops=k), 6)


def bundled_region() -> Target:
    from haltkit.models.checkpoint import build_model
    from haltkit.models.training.config import load_config

    model = build_model(load_config("tiny").model).eval()
    loops = {"2": 7, "3-4": 3}
    return Target(
        model, lambda: model(IDS, loops), lambda k: model(IDS, {**loops, "2": k}), 7, Loop(("layers.2.body",))
    )


def huginn() -> Target:
    """A model of our own with Huginn's structure and names; examples/check_huginn.py checks the real source."""
    from standins import RavenForCausalLM

    model = RavenForCausalLM().eval()
    return Target(model, lambda: model(IDS).logits, lambda k: model(IDS, (k, 0)).logits, 8)


def hrm_pytorch() -> Target:
    needs("HRM")
    from HRM import HRM

    network = {"dim": 16, "depth": 1, "attn_dim_head": 32, "heads": 2, "use_rmsnorm": True, "rotary_pos_emb": True}
    model = HRM(networks=[network, network], num_tokens=50, dim=16, reasoning_steps=5).eval()
    return Target(model, lambda: model(IDS)[0], lambda k: model(IDS, reasoning_steps=k)[0], 5)


def ouro() -> Target:
    """A model of our own with Ouro's structure and names; examples/check_ouro.py checks the real source."""
    from standins import OuroForCausalLM

    model = OuroForCausalLM().eval()
    run = lambda: model(IDS).logits  # noqa: E731
    return Target(model, run, lambda k: with_config(model.model, run, total_ut_steps=k), 6)


def plain_loop() -> Target:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
            self.loops = 9

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.loops):
                x = self.core(x)
            return x

    model, x = Plain().eval(), torch.randn(2, 7, 16)
    run = lambda: model(x)  # noqa: E731
    return Target(model, run, lambda k: with_config(model, run, loops=k), 9, Loop(("core",)))


class Equilibrium(nn.Module):
    """A DEQ layer: the solver of torchdeq iterates ``f`` on the injected input."""

    def __init__(self, **solver: Any) -> None:
        super().__init__()
        from torchdeq import get_deq

        self.f = nn.Linear(16, 16)
        torch.nn.init.orthogonal_(self.f.weight, 0.8)
        self.deq = get_deq(f_tol=1e-12, **solver)
        self.loops = 12

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        states, _ = self.deq(
            lambda z: torch.tanh(self.f(z) + x),
            torch.zeros_like(x),
            solver_kwargs={"f_max_iter": self.loops, **options},
        )
        return states[-1]


def deq(solver: str) -> Target:
    needs("torchdeq")
    from haltkit.attachment.presets import torchdeq

    class F(nn.Module):  # the whole of f as a module, so that its output is the state
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)
            torch.nn.init.orthogonal_(self.linear.weight, 0.8)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(z) + x)

    class Layer(Equilibrium):
        def __init__(self) -> None:
            super().__init__(f_solver=solver)
            self.f = F()

        def forward(self, x: Tensor, **options: Any) -> Tensor:
            states, _ = self.deq(
                lambda z: self.f(z, x), torch.zeros_like(x), solver_kwargs={"f_max_iter": self.loops, **options}
            )
            return states[-1]

    model, x = Layer().eval(), torch.randn(2, 16)
    run = lambda: model(x)  # noqa: E731
    loop, _ = torchdeq.describe(model, ["f"])
    return Target(model, run, lambda k: with_config(model, run, loops=k), 12, loop)


def deq_fixed_point() -> Target:
    return deq("fixed_point_iter")


def deq_simple() -> Target:
    return deq("simple_fixed_point_iter")


TARGETS = [
    albert,
    hrm_outer,
    hrm_inner,
    hrm_pytorch,
    tiny_recursive,
    mythos,
    huginn,
    ouro,
    deq_fixed_point,
    deq_simple,
    plain_loop,
    bundled_region,
]


@pytest.fixture(params=TARGETS, ids=lambda build: build.__name__)
def target(request: pytest.FixtureRequest) -> Target:
    torch.manual_seed(0)
    built: Target = request.param()
    return built


@torch.no_grad()
def test_a_halt_at_every_k_equals_the_model_run_with_k_loops(target: Target) -> None:
    for k in range(1, target.loops):
        with haltkit.attach(target.model, f"fixed:steps={k}", target.loop) as session:
            out = target.run()
        assert torch.equal(out, target.run_at(k)), k
        assert session.skipped > 0
        assert session.steps["loop"].eq(k).all()
        with haltkit.attach(target.model, "norm:tau=1", target.loop) as session:
            report = session.verify(target.run, k, target.run_at)
        assert report.neutral == 0
        assert report.halted == 0


@torch.no_grad()
def test_a_threshold_halts_where_the_recorded_states_say(target: Target) -> None:
    """Batch granularity: the depth at which the pooled score of the model's own states falls below tau."""
    from haltkit.recording.recorder import Recorder
    from haltkit.recording.replay import scores

    recorder = Recorder()
    with haltkit.attach(target.model, "fixed:steps=1000", target.loop, observer=recorder):
        target.run()
    (region,) = recorder.trajectory.regions.values()
    policy = haltkit.policy("norm:tau=1e-9,granularity=batch")
    seen = scores(policy, region).flatten(1)[:, 0].nan_to_num(torch.inf)
    order = seen.sort().values
    tau = float(order[len(order) // 2]) * 1.001
    first = next(k for k, value in enumerate(seen.tolist(), 1) if value < tau)
    with haltkit.attach(target.model, f"norm:tau={tau!r},granularity=batch", target.loop) as session:
        out = target.run()
    if (first < target.loops and target.loop is None) or (target.loop is not None and not target.loop.reset_on):
        assert session.steps["loop"].eq(first).all()
        assert torch.equal(out, target.run_at(first))


def albert_steps() -> tuple[Target, Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    target = albert()
    model = target.model
    first = model.encoder.embedding_hidden_mapping_in(model.embeddings(IDS))
    group = model.encoder.albert_layer_groups[0]
    return target, first, lambda x: group(x, None), lambda x: x


def huginn_steps() -> tuple[Target, Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    target = huginn()
    model = target.model
    e = model.embed(IDS)
    step = lambda x: model.core_block_forward(x, e, torch.tensor(0), None)  # noqa: E731
    return target, model.initial(e), step, lambda x: model.predict_from_latents(x).logits


def ouro_steps() -> tuple[Target, Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    target = ouro()
    base = target.model.model

    def step(x: Tensor) -> Tensor:
        for layer in base.layers:
            x = layer(x)
        return base.norm(x)

    return target, base.embed_tokens(IDS), step, target.model.lm_head


def plain_steps() -> tuple[Target, Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    target = plain_loop()
    x = target.run.__closure__[1].cell_contents
    return target, x, target.model.core, lambda x: x


def tiny_recursive_steps() -> tuple[Target, Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    target = tiny_recursive()
    model = target.model
    outputs, latents = model.get_initial()
    inputs = model.input_embed(IDS)
    memory = [latents]

    def step(x: Tensor) -> Tensor:
        for _ in range(model.num_latent_refinements):
            memory[0] = model.network(x + memory[0] + inputs)
        out: Tensor = model.network(x + memory[0])
        return out

    return target, outputs.expand(*inputs.shape), step, lambda x: model.to_pred(x)


def hrm_steps() -> tuple[Target, Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    target = hrm_outer()
    base = target.model.model
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = base.L_module.register_forward_pre_hook(lambda _, a, k: seen.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        target.run()
    hook.remove()
    (first, *_), keys = seen[0]  # z_L + z_H, and the masks and positions that every call is given
    keys = {name: value for name, value in keys.items() if name not in ("cycle_offset", "past_key_values")}
    z_l = base.z_L_init.to(first).expand_as(first).clone()
    memory = [z_l]

    def step(x: Tensor) -> Tensor:
        for _ in range(target.model.config.L_cycles):
            memory[0] = base.L_module(memory[0] + x, **keys)
        return base.H_module(x + memory[0], **keys)

    return target, first - z_l, step, lambda x: target.model.lm_head(x)


@torch.no_grad()
@pytest.mark.parametrize(
    "build", [albert_steps, hrm_steps, huginn_steps, ouro_steps, plain_steps, tiny_recursive_steps]
)
@pytest.mark.parametrize("granularity", ["token", "sequence"])
def test_rows_that_halt_keep_their_state_as_in_a_loop_of_ones_own(build: Callable[[], Any], granularity: str) -> None:
    """A loop written by hand over the model's own parts, with ``torch.where`` for the rows that have halted."""
    torch.manual_seed(0)
    target, x, step, leave = build()
    with haltkit.attach(target.model, "fixed:steps=1000", target.loop, observer=(seen := haltkit.Recorder())):
        target.run()
    (region,) = seen.trajectory.regions.values()
    from haltkit.recording.replay import scores

    spec = f"norm:tau={{}},granularity={granularity}"
    values = scores(haltkit.policy(spec.format(1e-9)), region)
    tau = float(values[torch.isfinite(values)].median())
    with haltkit.attach(target.model, spec.format(repr(tau)), target.loop) as session:
        out = target.run()
    taken = session.steps["loop"]
    assert taken.min() < target.loops
    if granularity == "token":
        assert len(taken.unique()) > 1
    for k in range(1, target.loops + 1):
        x = torch.where((taken >= k).unsqueeze(-1), step(x), x)
    assert torch.equal(out, leave(x))


def test_solvers_that_mix_earlier_iterates_are_refused() -> None:
    needs("torchdeq")
    from haltkit.attachment.errors import AttachError, GlueDrift
    from haltkit.attachment.presets import torchdeq

    for solver in ("anderson", "broyden"):
        with pytest.raises(GlueDrift, match=f"{solver}_solver mixes earlier iterates"):
            torchdeq.describe(Equilibrium(f_solver=solver), ["f"])
    model, x = Equilibrium(f_solver="fixed_point_iter").eval(), torch.randn(2, 16)
    with pytest.raises(AttachError, match="modules that your function calls"):
        haltkit.attach(model, "norm:tau=1")
    with pytest.raises(AttachError, match="no DEQ module"):
        torchdeq.describe(nn.Linear(2, 2), ["f"])
    loop, _ = torchdeq.describe(model, ["f"])
    with haltkit.attach(model, "fixed:steps=3", loop), torch.no_grad():
        model(x)
        with pytest.raises(GlueDrift, match=r"damped \(tau=0.7\)"):
            model(x, tau=0.7)
    assert type(model.f) is nn.Linear


@torch.no_grad()
@pytest.mark.parametrize("outer_first", [True, False])
def test_nested_loops_in_either_order(outer_first: bool) -> None:
    from haltkit.attachment.presets.hrm_text import describe_inner

    torch.manual_seed(0)
    model = hrm_model()
    run = lambda: model(IDS, use_cache=False).logits  # noqa: E731
    expected = with_config(model.config, run, H_cycles=2, L_cycles=2)
    kinds: list[Loop | None] = [None, describe_inner(model)[0]]
    first, second = kinds if outer_first else kinds[::-1]
    with haltkit.attach(model, "fixed:steps=2", first), haltkit.attach(model, "fixed:steps=2", second):
        assert torch.equal(run(), expected)


@torch.no_grad()
def test_generate_with_a_cache_while_attached() -> None:
    """Same depth for every token: exact; varying depth: refused."""
    from haltkit.attachment.errors import KVDepthMismatch

    torch.manual_seed(0)
    model = hrm_model()
    keys: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected = with_config(model.config, lambda: model.generate(IDS, **keys), H_cycles=2)
    with haltkit.attach(model, "fixed:steps=2"):
        assert torch.equal(model.generate(IDS, **keys), expected)
    depth = iter([2, 3, 1, 2, 3])

    class Moody:
        def init(self, x0: Tensor) -> int:
            return next(depth)

        def update(self, state: int, step: haltkit.LoopStep) -> tuple[int, haltkit.Verdict]:
            score = torch.full_like(step.x[..., 0], float(step.k < state))
            return state, haltkit.Verdict(score, score < 0.5)

    with pytest.raises(KVDepthMismatch, match="KV cache"), haltkit.attach(model, Moody()):
        model.generate(IDS, **keys)


@torch.no_grad()
def test_alberts_with_heads_and_with_several_groups_are_known() -> None:
    needs("transformers")
    from transformers import AlbertConfig, AlbertForSequenceClassification, AlbertModel

    sizes: dict[str, Any] = {
        "vocab_size": 50,
        "embedding_size": 16,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    model = AlbertForSequenceClassification(AlbertConfig(num_hidden_layers=4, **sizes)).eval()
    run = lambda: model(IDS).logits  # noqa: E731
    with haltkit.attach(model, "fixed:steps=2"):
        halted = run()
    assert torch.equal(halted, with_config(model.config, run, num_hidden_layers=2))
    grouped = AlbertModel(AlbertConfig(num_hidden_layers=8, num_hidden_groups=2, **sizes)).eval()
    layers = grouped.encoder.albert_layer_groups
    x = grouped.encoder.embedding_hidden_mapping_in(grouped.embeddings(IDS))
    for group, k in zip(layers, (2, 3), strict=True):
        for _ in range(k):
            x = group(x, None)
    with haltkit.attach(grouped, "group0=fixed:steps=2;group1=fixed:steps=3") as session:
        assert torch.equal(grouped(IDS).last_hidden_state, x)
        assert {name: int(steps.max()) for name, steps in session.steps.items()} == {"group0": 2, "group1": 3}


@torch.no_grad()
def test_the_gate_of_a_model_with_act_stops_where_the_model_itself_does() -> None:
    torch.manual_seed(0)
    target = mythos()
    model: Any = target.model
    model.recurrent.cfg.act_threshold = 0.9
    torch.nn.init.normal_(model.recurrent.act.halt.weight, std=0.05, generator=torch.Generator().manual_seed(1))
    torch.nn.init.constant_(model.recurrent.act.halt.bias, 0.0)
    recorder = Recorder()
    with haltkit.attach(model, None, observer=recorder) as session:
        target.run()
    own = session.steps["loop"]
    recorded = recorder.trajectory["loop"]
    readout = preset_for(model)[1]
    taken = haltkit.replay("gate:tau=0.1,rule=sum", recorded, readout=readout)
    assert int(taken.steps.max()) == int(own.max()) < 6
    assert int(taken.steps.min()) < int(taken.steps.max())
    with haltkit.attach(model, "gate:tau=0.1,rule=sum,granularity=batch,pool=max") as session:
        target.run()
    assert (session.steps["loop"] == own.max()).all()


@torch.no_grad()
def test_the_gate_of_a_tiny_recursive_model_judges_a_sequence_as_its_own_head_does() -> None:
    torch.manual_seed(0)
    target = tiny_recursive()
    model: Any = target.model
    torch.nn.init.normal_(model.to_halt_pred[1].weight, std=3.0, generator=torch.Generator().manual_seed(2))
    outputs, latents = model.get_initial()
    inputs, _ = model.embed_inputs_with_registers(IDS)
    found = []
    for _ in range(5):
        outputs, latents = model.refine_latent_then_output_once(inputs, outputs, latents)
        found.append(model.to_halt_pred(outputs).sigmoid())
    probabilities = torch.stack(found)  # (5, B)
    limit = float(probabilities[2].mean())
    halts = probabilities > limit  # which tells the two sequences apart at the third step
    expected = torch.where(halts.any(0), halts.int().argmax(0) + 1, 5)
    with haltkit.attach(model, f"gate:tau={1 - limit},granularity=sequence") as session:
        target.run()
    assert len(set(expected.tolist())) > 1
    assert torch.equal(session.steps["loop"], expected.unsqueeze(1).expand_as(session.steps["loop"]))


def test_a_stranger_of_a_known_name_is_told_so() -> None:
    from haltkit.attachment.errors import AttachError

    stranger = type("TinyRecursiveModel", (nn.Module,), {})()
    with pytest.raises(AttachError, match="not the one that haltkit knows"):
        haltkit.attach(stranger, "fixed:steps=2")


def test_discover_tells_two_loops_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(5):
                x = self.a(x)
            for _ in range(3):
                x = self.c(self.b(x))
            return x

    model = Two()
    found = haltkit.discover(model, lambda: model(torch.ones(1, 4))).candidates
    assert [(c.body, c.iterations) for c in found] == [(("a",), 5), (("b", "c"), 3)]
