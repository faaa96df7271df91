"""Looped models that haltkit was not built for: what discover proposes for each, what is exact, and what a halt saves.

    python examples/gallery.py                       # all that are installed: make test installs them
    python examples/gallery.py bdh slot-attention    # some of them
    python examples/gallery.py --write gallery.md    # the page, with times of larger models

Every model has tiny random weights, for haltkit only has to stop its loop where the model itself would have stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import haltkit
from haltkit.attachment.verify import ROUNDING
from haltkit.timing import in_turns, ratio

PAGE = Path(__file__).with_name("gallery.md")
SMALL, LARGE = (32, 2, 7), (256, 4, 64)  # width, sequences, tokens
VOCABULARY = 50


@dataclass(frozen=True)
class Size:
    """How large a model and its input are made."""

    width: int
    sequences: int
    tokens: int

    @property
    def ids(self) -> Tensor:
        shape = self.sequences, self.tokens
        return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))

    @property
    def states(self) -> Tensor:
        return torch.randn(self.sequences, self.tokens, self.width, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    """A model, how it is run, how it is run with k loops, and how many loops it runs by itself."""

    model: nn.Module
    run: Callable[[], Any]
    run_at: Callable[[int], Any] | None
    loops: int


@dataclass(frozen=True)
class Entry:
    """One model of the gallery.

    Attributes:
        name: of the model.
        needs: the modules that it is imported from; none for loops of one's own.
        build: makes it.
        exact: the steps at which a halt must be exactly equal; None: 1 to loops - 1. Empty: it must be refused.
        rounds: equal to rounding is enough, because the model itself rounds differently when run with fewer loops.
        why: for the page, where not every step is exact.
    """

    name: str
    needs: str
    build: Callable[[Size], Case]
    exact: tuple[int, ...] | None = None
    why: str = ""
    rounds: bool = False

    @property
    def installed(self) -> bool:
        """Whether everything that it needs can be imported."""
        try:
            return not self.needs or importlib.util.find_spec(self.needs) is not None
        except ModuleNotFoundError:
            return False

    def case(self, size: Size | None = None) -> Case:
        """The model, with the same weights each time."""
        torch.manual_seed(0)
        return self.build(size or Size(*SMALL))

    def steps(self, case: Case) -> tuple[int, ...]:
        """The steps at which a halt must be exact."""
        return tuple(range(1, case.loops)) if self.exact is None else self.exact


@contextmanager
def changed(thing: Any, **values: Any) -> Iterator[None]:
    """Attributes have other values in a ``with`` block."""
    before = {name: getattr(thing, name) for name in values}
    for name, value in values.items():
        setattr(thing, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(thing, name, value)


def told(model: nn.Module, thing: Any, name: str, run: Callable[[], Any], loops: int) -> Case:
    """A model whose depth is an attribute of ``thing``, as that of most is."""

    def run_at(k: int) -> Any:
        with changed(thing, **{name: k}):
            return run()

    return Case(model, run, run_at, loops)


def randomized(model: nn.Module) -> nn.Module:
    """Large enough weights that every step matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


# --- models of others


def iterative_bert(size: Size) -> Case:
    from iterative_bert import IterativeBert, IterativeBertConfig

    config = IterativeBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        num_attention_heads=4,
        intermediate_size=2 * size.width,
        h_cycles=6,
        l_cycles=2,
        attn_implementation="sdpa",
    )
    model, ids = IterativeBert(config).eval(), size.ids

    def run() -> Tensor:
        out = model(ids, attention_mask=torch.ones_like(ids))
        hidden: Tensor = out[0] if isinstance(out, tuple) else out.last_hidden_state
        return hidden

    return told(model, model.config, "h_cycles", run, 6)


def bdh(size: Size) -> Case:
    from bdh_cq.bdh_cq import BDH

    model = BDH(
        dim=size.width, num_tokens=VOCABULARY, depth=8, heads=2, dim_qk_heads=4 * size.width, rotary_dim=8
    ).eval()
    ids = size.ids
    return told(model, model, "depth", lambda: model(ids), 8)


def bdh_reasoning(size: Size) -> Case:
    from bdh_cq.bdh_cq import BDH, BDHReasoningWrapper

    core = BDH(dim=size.width, num_tokens=VOCABULARY, depth=2, heads=2, dim_qk_heads=64, rotary_dim=8)
    model, ids = BDHReasoningWrapper(core).eval(), size.ids
    return Case(model, lambda: model(ids, 6, ids), lambda k: model(ids, k, ids), 6)


def ponder_transformer(size: Size) -> Case:
    from ponder_transformer import PonderTransformer

    model = PonderTransformer(
        num_tokens=VOCABULARY, dim=size.width, max_seq_len=size.tokens, dim_head=size.width // 4, heads=4
    ).eval()
    with torch.no_grad():
        model.block.to_halt_logits[0].bias.fill_(-1e4)  # its own halting draws random numbers: never
    ids = size.ids
    return told(model, model, "train_max_steps", lambda: model(ids)[0], model.train_max_steps)


def _hrm_networks(size: Size) -> list[dict[str, Any]]:
    one = {"dim": size.width, "depth": 1, "attn_dim_head": max(32, size.width // 4), "heads": 4, "pre_norm": False}
    return [{**one, "use_rmsnorm": True, "rotary_pos_emb": True} for _ in range(2)]


def hrm_pytorch(size: Size) -> Case:
    from HRM import HRM

    model = HRM(networks=_hrm_networks(size), num_tokens=VOCABULARY, dim=size.width, reasoning_steps=5).eval()
    ids = size.ids
    return Case(model, lambda: model(ids)[0], lambda k: model(ids, reasoning_steps=k)[0], 5)


def hrm_act(size: Size) -> Case:
    from HRM import HRM_ACT

    model = HRM_ACT(networks=_hrm_networks(size), num_tokens=VOCABULARY, dim=size.width, max_reasoning_steps=5).eval()
    ids = size.ids

    def run(k: int = 5) -> Tensor:
        out: Tensor = model(ids, max_reasoning_steps=k, adaptive_compute=False)[0]
        return out

    return Case(model, run, run, 5)


def _slots(kind: str) -> Callable[[Size], Case]:
    def build(size: Size) -> Case:
        import slot_attention

        more = {} if kind == "SlotAttention" else {"heads": 4, "dim_head": size.width // 4}
        model: Any = getattr(slot_attention, kind)(num_slots=5, dim=size.width, iters=6, **more).eval()
        states = size.states

        def run() -> Tensor:
            with torch.random.fork_rng():  # the slots begin at random
                torch.manual_seed(0)
                out: Tensor = model(states)
                return out

        return told(model, model, "iters", run, 6)

    return build


def perceiver_pytorch(size: Size) -> Case:
    from perceiver_pytorch import Perceiver

    images = torch.randn(size.sequences, 8, 8, 3, generator=torch.Generator().manual_seed(2))

    def build(depth: int) -> nn.Module:
        torch.manual_seed(0)
        return Perceiver(
            num_freq_bands=2,
            max_freq=4.0,
            depth=depth,
            num_latents=size.tokens,
            latent_dim=size.width,
            latent_heads=2,
            cross_dim_head=16,
            latent_dim_head=16,
            num_classes=4,
            weight_tie_layers=True,
        ).eval()

    model = build(7)  # the first layer has weights of its own: the loop is over the six others

    def run_at(k: int) -> Tensor:
        other = build(k + 1)
        other.load_state_dict({name: model.state_dict()[name] for name in other.state_dict()})
        out: Tensor = other(images)
        return out

    return Case(model, lambda: model(images), run_at, 6)


def perceiver_transformers(size: Size) -> Case:
    from transformers import PerceiverConfig, PerceiverModel

    config = PerceiverConfig(
        num_latents=size.tokens,
        d_latents=size.width,
        d_model=size.width,
        num_blocks=6,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
    )
    model, states = PerceiverModel(config).eval(), size.states
    return told(model, model.config, "num_blocks", lambda: model(inputs=states).last_hidden_state, 6)


def inkling2_loop(size: Size) -> Case:
    from transformers.models.inkling2_loop.configuration_inkling2_loop import Inkling2LoopTextConfig
    from transformers.models.inkling2_loop.modeling_inkling2_loop import Inkling2LoopTextModel

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = Inkling2LoopTextConfig(
        vocab_size=VOCABULARY,
        unpadded_vocab_size=VOCABULARY,
        hidden_size=size.width,
        num_hidden_layers=6,
        **heads,
        **{f"swa_{name}": number for name, number in heads.items()},
        sliding_window_size=16,
        rel_extent=16,
        d_rel=4,
        moe_intermediate_size=size.width,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_layers_per_attn_res_block=2,
        loop_layer_index_start=2,
        loop_layer_index_end=4,
        loop_num_passes=5,
        loop_gate_rank=4,
        eos_token_id=None,
    )
    model, ids = randomized(Inkling2LoopTextModel(config)), size.ids
    return told(model, model.config, "loop_num_passes", lambda: model(ids, use_cache=False).last_hidden_state, 5)


def esmfold_trunk(size: Size) -> Case:
    from transformers.models.esm.configuration_esm import TrunkConfig
    from transformers.models.esm.modeling_esmfold import EsmFoldingTrunk

    config = TrunkConfig(
        num_blocks=1,
        sequence_state_dim=size.width,
        pairwise_state_dim=size.width // 2,
        sequence_head_width=8,
        pairwise_head_width=8,
        position_bins=4,
        max_recycles=5,
        structure_module={
            "sequence_dim": 16,
            "pairwise_dim": 8,
            "ipa_dim": 4,
            "resnet_dim": 8,
            "num_heads_ipa": 2,
            "num_qk_points": 2,
            "num_v_points": 2,
            "num_blocks": 2,
            "num_transition_layers": 1,
            "num_resnet_blocks": 1,
        },
    )
    model, states = EsmFoldingTrunk(config).eval(), size.states
    pairs = torch.randn(size.sequences, size.tokens, size.tokens, size.width // 2)
    acids = torch.randint(0, 20, (size.sequences, size.tokens))
    places, mask = torch.arange(size.tokens).expand_as(acids), torch.ones(acids.shape)

    def run(k: int = 5) -> Tensor:
        out: Tensor = model(states, pairs, acids, places, mask, no_recycles=k - 1)["s_s"]
        return out

    return Case(model, run, run, 5)


def _x_transformer(causal: bool = True, order: bool = False, **more: Any) -> Callable[[Size], Case]:
    def build(size: Size) -> Case:
        import x_transformers

        shape = {"dim": size.width, "heads": 4, "attn_dim_head": max(8, size.width // 4)}
        layers = {"depth": 2, "pre_and_post_norm": bool(more.get("looped"))}
        if order:
            layers = {"custom_layers": ("a", "f"), "layers_execute_order": (0, 1) * 6}
        kind = x_transformers.Decoder if causal else x_transformers.Encoder
        if not causal:
            layers = {"depth": 6, "weight_tie_layers": True}
        model = x_transformers.TransformerWrapper(
            num_tokens=VOCABULARY, max_seq_len=size.tokens, attn_layers=kind(**shape, **layers), **more
        ).eval()
        ids = size.ids
        if not more:

            def reordered(k: int) -> Any:
                with changed(model.attn_layers, layers_execute_order=(0, 1) * k):
                    return model(ids)

            return Case(model, lambda: model(ids), reordered, 6)
        told = "recycle_steps" if "recycling" in more else "looped_steps"
        return Case(model, lambda: model(ids, **{told: 6}), lambda k: model(ids, **{told: k}), 6)

    return build


def gated_graph(size: Size) -> Case:
    from torch_geometric.nn import GatedGraphConv

    model = GatedGraphConv(size.width, num_layers=6).eval()
    with torch.no_grad():
        model.weight.copy_(model.weight[:1].expand_as(model.weight))
    nodes = size.states.flatten(0, 1)
    edges = torch.stack([torch.arange(len(nodes) - 1), torch.arange(1, len(nodes))])
    return told(model, model, "num_layers", lambda: model(nodes, edges), 6)


def spiral(size: Size) -> Case:
    from spiral.config import SpiralConfig
    from spiral.model import SpiralCore

    config = SpiralConfig(
        vocab_size=VOCABULARY, emb_factor=0, d_model=size.width, n_heads=2, d_ff=2 * size.width, mean_iters=6
    )
    model, ids = SpiralCore(config).eval(), size.ids
    with torch.no_grad():
        for parameter in model.mod.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def run(k: int = 6) -> Tensor:
        out = model(ids, n_iters=k)
        logits: Tensor = out if isinstance(out, Tensor) else out[0]
        return logits

    return Case(model, run, run, 6)


def plato_mythos(size: Size) -> Case:
    from plato_mythos.config import PlatoMythosConfig
    from plato_mythos.model import PlatoMythos

    config = PlatoMythosConfig(vocab_size=VOCABULARY, d_model=size.width, num_heads=2, max_loop_depth=6, d_kv_latent=16)
    model: Any = PlatoMythos(config).eval()
    model.deadband.should_continue = lambda x, step: True  # its own halting: never
    ids = size.ids
    return told(model, model.config, "max_loop_depth", lambda: model(ids), 6)


class Flow(nn.Module):
    """An ordinary differential equation, solved by fixed steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.steps = 6

    def forward(self, x: Tensor) -> Tensor:
        from torchdiffeq import odeint

        times = torch.arange(self.steps + 1.0) * 0.1
        out: Tensor = odeint(lambda t, y: self.field(y), x, times, method="euler")[-1]
        return out


def torchdiffeq_euler(size: Size) -> Case:
    model, states = Flow(size.width).eval(), size.states
    return told(model, model, "steps", lambda: model(states), 6)


def silva_deq(size: Size) -> Case:
    from silva_networks.layers import DEQLayer, SolverConfig

    transition = nn.Sequential(nn.Linear(size.width, size.width), nn.Tanh())
    settings = {"alpha": 1.0, "tol": 1e-30}
    model = DEQLayer(transition, config=SolverConfig(max_iter=8, **settings)).eval()
    states = size.states.flatten(0, 1)

    def run_at(k: int) -> Tensor:
        with changed(model, config=SolverConfig(max_iter=k, **settings)):
            out: Tensor = model(states)
            return out

    return Case(model, lambda: model(states), run_at, 8)


def act_cell(size: Size) -> Case:
    from pytorch_adaptive_computation_time.models import AdaptiveGRUCell

    model = AdaptiveGRUCell(size.width, size.width, time_penalty=1e-3, time_limit=7, initial_halting_bias=-8.0).eval()
    x, hidden = size.states[:, 0], torch.zeros(size.sequences, size.width)
    return told(model, model, "time_limit", lambda: model(x, hidden)[0], 7)


def coconut(size: Size) -> Case:
    from coconut_pytorch import Coconut

    shape = {"num_tokens": VOCABULARY, "dim": size.width, "depth": 2, "heads": 2, "dim_head": 8}
    model, ids = Coconut(num_reasoning_steps=5, transformer=shape).eval(), size.ids
    return Case(model, lambda: model(ids)[2], lambda k: model(ids, num_reasoning_steps=k)[2], 5)


def rlt(size: Size) -> Case:
    from RLT import RLT

    model, ids = RLT(size.width, enc_depth=1, dec_depth=1, num_tokens=VOCABULARY, dim_head=8, heads=2).eval(), size.ids

    def run() -> Tensor:
        out = model(ids)
        logits: Tensor = out if isinstance(out, Tensor) else out[0]
        return logits

    return Case(model, run, None, size.tokens)


# --- loops as one writes them


class Own(nn.Module):
    """A layer that is applied several times; subclasses differ in how they loop."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.positions = nn.Embedding(512, width)
        self.steps = 6

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = self.layer(x)
        return x


class While(Own):
    def forward(self, x: Tensor) -> Tensor:
        left = self.steps
        while left:
            x, left = self.layer(x), left - 1
        return x


class Generator(Own):
    def states(self, x: Tensor) -> Iterator[Tensor]:
        for _ in range(self.steps):
            x = self.layer(x)
            yield x

    def forward(self, x: Tensor) -> Tensor:
        return list(self.states(x))[-1]


class Reused(Own):
    """One module in every place of a list."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.layers = nn.ModuleList([self.layer] * self.steps)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[: self.steps]:
            x = layer(x)
        return x


class Universal(Own):
    """A Universal Transformer, which adds positions in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for _ in range(self.steps):
            x += self.positions.weight[: x.shape[1]]
            x = self.layer(x)
        return x


class Injected(Own):
    """The input is added at each step, and what the layer gives as well: the state changes outside of any module."""

    def step(self, x: Tensor, e: Tensor) -> Tensor:
        return x + e + 0.1 * self.layer(x + e)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        for _ in range(self.steps):
            state = self.step(state, x)
        return state


class Method(Own):
    def refine(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = self.layer(x)
        return x


def _own(kind: type[Own]) -> Callable[[Size], Case]:
    def build(size: Size) -> Case:
        model, states = kind(size.width).eval(), size.states

        def run() -> Tensor:
            out: Tensor = model.refine(states) if isinstance(model, Method) else model(states)
            return out

        return told(model, model, "steps", run, 6)

    return build


@dataclass
class Carry:
    """What a segment of reasoning hands on to the next one."""

    answer: Tensor
    latent: Tensor


class Segment(Own):
    """One segment of deep supervision, as in HRM's ACT loop: an answer and a latent, and whether to halt."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.halts = nn.Linear(width, 2)

    def forward(self, carry: Carry, x: Tensor) -> tuple[Carry, Tensor]:  # type: ignore[override]
        latent = self.layer(x + carry.answer + carry.latent)
        return Carry(self.layer(carry.answer + latent), latent), self.halts(latent.mean(1))


def around_the_model(size: Size) -> Case:
    model, states = Segment(size.width).eval(), size.states

    def solve(segments: int) -> Tensor:
        carry = Carry(torch.zeros_like(states), torch.zeros_like(states))
        for _ in range(segments):
            carry, _ = model(carry, states)
        return carry.answer

    looped = haltkit.LoopAround(model, solve)
    return Case(looped, lambda: looped(6), solve, 6)


ENTRIES = (
    Entry("iterative-bert", "iterative_bert", iterative_bert),
    Entry("bdh", "bdh_cq", bdh),
    Entry("ponder-transformer", "ponder_transformer", ponder_transformer),
    Entry("hrm-pytorch", "HRM", hrm_pytorch),
    Entry("hrm-pytorch, ACT", "HRM", hrm_act),
    Entry("slot-attention", "slot_attention", _slots("SlotAttention")),
    Entry("slot-attention, multi-head", "slot_attention", _slots("MultiHeadSlotAttention")),
    Entry("perceiver-pytorch", "perceiver_pytorch", perceiver_pytorch),
    Entry("Perceiver (transformers)", "transformers", perceiver_transformers),
    Entry("Inkling 2 loop (transformers)", "transformers.models.inkling2_loop", inkling2_loop),
    Entry("ESMFold's trunk (transformers)", "transformers", esmfold_trunk),
    Entry("x-transformers, layers_execute_order", "x_transformers", _x_transformer(order=True)),
    Entry("x-transformers, tied encoder", "x_transformers", _x_transformer(causal=False)),
    Entry("x-transformers, looped", "x_transformers", _x_transformer(looped=True)),
    Entry(
        "x-transformers, recycling",
        "x_transformers",
        _x_transformer(recycling=True),
        (1, 2, 3, 4),
        "the projection that feeds a state back runs once less than the layers: a halt at 5 of 6 saves nothing",
    ),
    Entry("torch-geometric GatedGraphConv", "torch_geometric", gated_graph),
    Entry("torchdiffeq, Euler", "torchdiffeq", torchdiffeq_euler),
    Entry("silva-networks DEQ", "silva_networks", silva_deq),
    Entry("plato-mythos", "plato_mythos", plato_mythos),
    Entry(
        "spiral-lm",
        "spiral",
        spiral,
        why="the model makes the modulations of all its steps in one product, which rounds differently for fewer",
        rounds=True,
    ),
    Entry("own loop, for", "", _own(Own)),
    Entry("own loop, while", "", _own(While)),
    Entry("own loop, generator", "", _own(Generator)),
    Entry("own loop, one module in a ModuleList", "", _own(Reused)),
    Entry("own loop, a method", "", _own(Method)),
    Entry("own loop, in place", "", _own(Universal)),
    Entry("own loop, input added at each step", "", _own(Injected)),
    Entry("own loop, around the model (deep supervision)", "", around_the_model),
    Entry(
        "pytorch-adaptive-computation-time",
        "pytorch_adaptive_computation_time",
        act_cell,
        (),
        "the model sums its states beside the loop, weighted by its own halting (refused: GlueDrift)",
    ),
    Entry(
        "rlt-pytorch",
        "RLT",
        rlt,
        (),
        "a recurrence over the tokens: each step is given new input (refused: VaryingInput)",
    ),
    Entry(
        "coconut-pytorch",
        "coconut_pytorch",
        coconut,
        (),
        "each thought appends to a cache that the answer reads, and the same module also reads the prompt; put the "
        "loop over thoughts into a module of its own",
    ),
    Entry(
        "bdh, reasoning",
        "bdh_cq",
        bdh_reasoning,
        (),
        "the module of the loop also reads the prompt and writes the answer; put the loop over latent steps into a "
        "module of its own",
    ),
)


@dataclass
class Found:
    """What came of one entry."""

    call: str
    verdict: str
    exact: list[int] = field(default_factory=list)
    refused: str = ""
    alone: list[float] = field(default_factory=list)  # what an entry that halts alone gets, beside what it should

    @property
    def alone_text(self) -> str:
        """Whether entries of a batch may halt one by one."""
        if not self.alone or not self.exact:
            return "not seen" if self.exact else ""
        return "yes" if max(self.alone) <= ROUNDING else "whole batches"


@torch.no_grad()
def look(entry: Entry) -> Found:
    """Take the first proposal of discover, and halt at every step."""
    case = entry.case()
    best = haltkit.discover(case.model, case.run, case.run_at).candidates[0]
    found = Found(best.call(), best.verdict)
    for k in range(1, case.loops):
        try:
            report = haltkit.verify(case.model, case.run, k, case.run_at, rows=False, **best.fields())
        except Exception as error:  # whatever the model says where the proposal does not fit
            found.refused = found.refused or type(error).__name__
            continue
        if report.ok or (entry.rounds and report.halted is not None and report.halted <= ROUNDING):
            found.exact.append(k)
        if report.alone is not None:
            found.alone.append(report.alone)
    return found


@torch.no_grad()
def share(entry: Entry, repeats: int) -> tuple[int, int, float]:
    """A step about a third of the way, of how many, and the share of the full time that a halt there takes."""
    case = entry.case(Size(*LARGE))
    k = max(1, case.loops // 3)
    fields = haltkit.discover(case.model, case.run, case.run_at).candidates[0].fields()
    with haltkit.attach(case.model, f"fixed:steps={k}", **fields) as session:

        def full() -> None:
            with session.detached():
                case.run()

        case.run()  # the first halted loop is checked
        full()
        times = in_turns({"full": full, "halted": case.run}, repeats)
    return k, case.loops, ratio(times, "halted", "full")


def steps_text(found: Found, entry: Entry, case: Case) -> str:
    every = found.exact == list(range(1, case.loops))
    if every and entry.rounds:
        return "every k, to rounding"
    return "every k" if every else ", ".join(map(str, found.exact)) if found.exact else "refused"


HEAD = """# Gallery: looped models of others, and loops as one writes them

Each line is the first proposal of `haltkit.discover(model, run, run_at)` on the package's real code with tiny random
weights, and what `haltkit.verify` finds for a halt at each step: the model's output, bit for bit, against the model
run with that many loops. "Entries alone": whether an entry of the batch that halts before the others gets that, too;
where a loop carries more than its state in modules whose batch dimension is not found, it does not, and whole batches
have to halt (`granularity=batch`).
`tests/attachment/test_gallery.py` holds every line. The
presets (ALBERT, HRM-text, hrm-pytorch, tiny-recursive-model, OpenMythos, Huginn, Ouro, torchdeq) are in
[haltkit/attachment](../haltkit/attachment/README.md), and so is `haltkit.LoopAround` for a loop around calls of a whole
model. `tests/attachment/test_discover_around.py` holds its proposals: deep supervision of tiny-recursive-model (the
package), and stand-ins of HRM's ACT loop, guided diffusion and refinement.

"""


def page(repeats: int) -> str:
    """The gallery as Markdown."""
    lines = ["| model | call | exact at | entries alone | time of a halt |", "|---|---|---|---|---|"]
    notes = []
    for entry in ENTRIES:
        found, case = look(entry), entry.case()
        took = ""
        if found.exact:
            k, of, part = share(entry, repeats)
            took = f"{part:.2f} at {k} of {of}"
        if entry.why:
            notes.append(f"- **{entry.name}**: {entry.why}.")
        exact = steps_text(found, entry, case)
        lines.append(f"| {entry.name} | `{found.call}` | {exact} | {found.alone_text} | {took} |")
        print(lines[-1], flush=True)
    width, sequences, tokens = LARGE
    foot = (
        f"The last column is the share of the model's full time that a run with a halt takes: width {width}, "
        f"{sequences} sequences of {tokens} tokens, float32, medians of {repeats} interleaved repeats on one thread "
        f"({platform.machine()}). What is outside of the loop is not saved, and where a step is one small product, "
        "halting costs more than it saves."
    )
    return HEAD + "\n".join([*lines, "", foot, "", "Where not every step is exact:", "", *notes]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="some entries; default: all that are installed")
    parser.add_argument("--write", type=Path, help="write the page here; all packages must be installed")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # other people's packages warn as they like
    torch.set_num_threads(1)
    if options.write is not None:
        options.write.write_text(page(options.repeats), encoding="utf-8")
        return
    known = {entry.name: entry for entry in ENTRIES}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no entry {', '.join(unknown)}; there are: {'; '.join(known)}")
    for name in options.names or known:
        entry = known[name]
        if not entry.installed:
            print(f"{name}: not installed")
            continue
        found = look(entry)
        print(f"{name}: exact at {steps_text(found, entry, entry.case())}\n  {found.call}\n  {found.verdict}.")


if __name__ == "__main__":
    main()
