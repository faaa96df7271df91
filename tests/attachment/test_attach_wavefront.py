"""A wavefront over a foreign model: with a width of 1 it is a call inside ``attach`` per token; what cannot be stepped is
refused."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from cases import hrm_model
from haltkit.attachment.errors import AttachError, CannotStep
from haltkit.attachment.wavefront import ForeignWavefront
from haltkit.models.gpt.sampling import Sampling
from standins import RavenForCausalLM

PROMPT = [3, 7, 1, 20, 5]
VOCABULARY, WIDTH = 50, 8


class Core(nn.Module):
    """One step, which contracts: each position sees its input, its own state and the mean of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        nn.init.orthogonal_(self.linear.weight, 0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).unsqueeze(-1)
        return torch.tanh(self.linear(x) + 0.4 * x.cumsum(1) / count + e)


class Looped(nn.Module):
    """A causal language model with one loop, whose step and output subclasses change."""

    def __init__(self, steps: int = 60) -> None:
        super().__init__()
        self.wte, self.core = nn.Embedding(VOCABULARY, WIDTH), Core()
        self.head = nn.Linear(WIDTH, VOCABULARY)
        nn.init.normal_(self.head.weight, 0, 4.0)
        self.steps = steps

    def step(self, x: Tensor, e: Tensor, k: int) -> Tensor:
        out: Tensor = self.core(x, e)
        return out

    def forward(self, ids: Tensor) -> Tensor:
        e = self.wte(ids)
        x = torch.zeros_like(e)
        for k in range(self.steps):
            x = self.step(x, e, k)
        out: Tensor = self.head(x)
        return out


class Counting(Looped):
    """Its step depends on its number."""

    def step(self, x: Tensor, e: Tensor, k: int) -> Tensor:
        out: Tensor = self.core(x, e + 0.1 * k)
        return out


class TwoStates(Looped):
    """It carries the state before as well."""

    before: Tensor

    def step(self, x: Tensor, e: Tensor, k: int) -> Tensor:
        older, self.before = self.before if k else torch.zeros_like(x), x
        out: Tensor = self.core(x, e + 0.1 * older)
        return out


class Averaging(Looped):
    """Its output is a mean over the steps."""

    def forward(self, ids: Tensor) -> Tensor:
        e = self.wte(ids)
        x, total = torch.zeros_like(e), torch.zeros_like(e)
        for k in range(self.steps):
            x = self.step(x, e, k)
            total = total + x
        out: Tensor = self.head(total / self.steps)
        return out


class Bidirectional(Looped):
    def step(self, x: Tensor, e: Tensor, k: int) -> Tensor:
        out: Tensor = self.core(x, e + 0.1 * x.mean(1, keepdim=True))
        return out


class Flat(Looped):
    """Its output has no dimension of sequences."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).flatten(0, 1)


def built(kind: Callable[..., nn.Module] = Looped, **values: Any) -> Any:
    torch.manual_seed(0)
    return kind(**values).eval().double()


def huginn() -> tuple[Any, Callable[[Tensor], Any]]:
    model = built(RavenForCausalLM)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.25)
    return model, lambda ids: model(ids, (16, 0))


def one_by_one(model: nn.Module, policy: str, count: int, run: Callable[[Tensor], Any], pick: Any, **how: Any) -> Any:
    """One call of the model inside ``attach`` per token: its tokens, and the steps of the positions they were read from."""
    text, steps = list(PROMPT), []
    with torch.no_grad(), haltkit.attach(model, policy, **how) as session:
        for _ in range(count):
            output = run(torch.tensor([text]))
            text.append(int(pick.pick(getattr(output, "logits", output)[:, -1], [len(text)])))
            [taken] = session.steps.values()
            steps.append(int(taken[0, -1]))
    return text[len(PROMPT) :], steps


def told(found: Any) -> tuple[list[int], list[int]]:
    found = list(found)
    return [one.token for one in found], [steps for one in found for steps in one.steps.values()]


POLICIES = [
    "norm:tau=0.3", "accel:tau=0.2", "kl:tau=1e-3", "fixed:steps=3", "norm:tau=100", "norm:tau=1e-30",
    "norm:tau=0.5,patience=2,min_steps=3", "any(accel:tau=0.1|fixed:steps=7)", "stable:times=2",
]  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_one_open_position_is_a_call_inside_attach_per_token_token_for_token(policy: str, temperature: float) -> None:
    model, run = huginn()
    how: dict[str, Any] = {"width": 1, "layout": "depth-indexed", "sampling": Sampling(temperature), "run": run}
    found = told(haltkit.wavefront(model, PROMPT, policy, max_new_tokens=10, **how))
    assert found == one_by_one(model, policy, 10, run, Sampling(temperature))


def third_party(name: str) -> tuple[Any, Callable[[Tensor], Any], haltkit.Loop]:
    """A causal model of the gallery, with random weights: itself, how it is run, and the description of its loop."""
    if name == "ponder-transformer":
        from ponder_transformer import PonderTransformer

        model = built(PonderTransformer, num_tokens=VOCABULARY, dim=32, max_seq_len=40, dim_head=8)
        with torch.no_grad():
            model.block.to_halt_logits[0].bias.fill_(-1e4)  # its own halting draws random numbers: never
        return model, lambda ids: model(ids)[0], haltkit.Loop(["block"])
    import x_transformers

    shape = {"dim": 32, "heads": 4, "attn_dim_head": 8, "depth": 2, "pre_and_post_norm": True}
    model = built(
        x_transformers.TransformerWrapper,
        num_tokens=VOCABULARY,
        max_seq_len=40,
        attn_layers=x_transformers.Decoder(**shape),
        looped=True,
    )
    return (
        model,
        lambda ids: model(ids, looped_steps=6),
        haltkit.Loop(["attn_layers", "exit_gate"], state="attn_layers"),
    )


@pytest.mark.filterwarnings("ignore")  # other people's packages warn as they like
@pytest.mark.parametrize("name", ["ponder-transformer", "x-transformers"])
@pytest.mark.parametrize("policy", ["norm:tau=0.5", "fixed:steps=3"])
def test_models_of_others_are_stepped_exactly(name: str, policy: str) -> None:
    if importlib.util.find_spec(name.replace("-", "_")) is None:
        pytest.skip(f"{name} is not installed")
    model, run, loop = third_party(name)
    how: dict[str, Any] = {"width": 1, "layout": "depth-indexed", "sampling": Sampling(1.0), "run": run, "loop": loop}
    found = told(haltkit.wavefront(model, PROMPT, policy, max_new_tokens=8, **how))
    assert found == one_by_one(model, policy, 8, run, Sampling(1.0), loop=loop)


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("policy", ["fixed:steps={}", "norm:tau=100,patience={}"])
def test_inner_steps_count_as_steps(policy: str, steps: int) -> None:
    model, run = huginn()
    policy = policy.format(steps)
    how: dict[str, Any] = {"width": 1, "layout": "depth-indexed", "sampling": Sampling(1.0), "run": run}
    single = told(haltkit.wavefront(model, PROMPT, policy, max_new_tokens=8, **how))
    for inner in (2, 4):
        front = ForeignWavefront(model, PROMPT, policy, inner=inner, **how)
        assert told(front.generate(8)) == single
        assert front.sweeps == 7 * steps // inner  # the first token is the prompt's


@pytest.mark.parametrize("layout", ["depth-indexed", "last"])
@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("initial", [0, None])
def test_where_states_settle_fully_every_width_gives_the_text_of_full_depth(
    width: int, layout: Any, initial: int | None
) -> None:
    model, loop = built(), haltkit.Loop(["core"], initial=initial)
    exact, _ = one_by_one(model, "fixed:steps=60", 12, model, Sampling(1.0), loop=loop)
    found = haltkit.wavefront(
        model, PROMPT, "norm:tau=1e-9", max_new_tokens=12, width=width, layout=layout, sampling=Sampling(1.0), loop=loop
    )
    tokens, steps = told(found)
    assert tokens == exact
    assert max(steps) < 60  # settled, not out of budget


@pytest.mark.parametrize("layout", ["depth-indexed", "last"])
def test_a_committed_position_keeps_its_token_and_its_states(layout: Any) -> None:
    front = ForeignWavefront(built(), PROMPT, "norm:tau=0.5", width=4, layout=layout, body=["core"])
    seen, given = [], []
    for new in front.generate(12):
        given.append(new.token)
        seen.append((list(front.text), front.past.clone()))
    assert front.text == PROMPT + given[:-1]
    for text, past in seen:
        assert front.text[: len(text)] == text
        now = front.past[:, : past.shape[1]]
        assert torch.equal(now[: len(past)], past)
        assert bool((now[len(past) :] == past[-1]).all())  # steps beyond: where it ended


def test_a_wavefront_takes_fewer_calls_than_one_token_after_the_other() -> None:
    model = built()
    calls = 0

    def run(ids: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        out: Tensor = model(ids)
        return out

    front = ForeignWavefront(model, PROMPT, "norm:tau=1e-6", width=8, run=run, body=["core"])
    before = calls
    found = list(front.generate(24))
    assert calls - before == front.sweeps
    assert 2 * front.sweeps < sum(new.steps["loop"] for new in found)


def test_a_text_ends_at_a_stop_token() -> None:
    model = built()
    whole = told(haltkit.wavefront(model, PROMPT, "fixed:steps=5", max_new_tokens=9, body=["core"]))[0]
    stop = next(token for token in whole if whole.index(token) > 2)
    found = told(haltkit.wavefront(model, PROMPT, "fixed:steps=5", max_new_tokens=9, stop=[stop], body=["core"]))[0]
    assert found == whole[: whole.index(stop) + 1]


def test_the_model_is_as_it_was_whenever_a_token_is_handed_out() -> None:
    model = built()
    ids = torch.tensor([PROMPT])
    plain, kinds = model(ids), {name: type(module) for name, module in model.named_modules()}
    for _ in haltkit.wavefront(model, PROMPT, "norm:tau=0.5", max_new_tokens=6, body=["core"]):
        assert {name: type(module) for name, module in model.named_modules()} == kinds
        assert torch.equal(model(ids), plain)


@pytest.mark.parametrize("width", [1, 6])
def test_a_position_that_is_not_finite_ends_the_text_and_reaches_no_token_before_it(width: int) -> None:
    model, how = built(), {"max_new_tokens": 9, "width": width, "body": ["core"]}
    whole = told(haltkit.wavefront(model, PROMPT, "norm:tau=1e-9", **how))[0]
    broken = next(token for token in whole if whole.index(token) > 2 and token not in PROMPT)
    with torch.no_grad():
        model.wte.weight[broken] = torch.nan
    found = told(haltkit.wavefront(model, PROMPT, "norm:tau=1e-9", **how))[0]
    assert found == [*whole[: whole.index(broken) + 1], None]
    model.wte.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="prompt are not finite"):
        haltkit.wavefront(model, PROMPT, "norm:tau=1e-9", **how)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (Counting, "step's number"),
        (TwoStates, "a second state"),
        (Averaging, "sums up the steps"),
        (Bidirectional, "not causal"),
        (Flat, "output is"),
    ],
)
def test_a_loop_that_cannot_be_stepped_is_refused_by_name_with_what_works(kind: type[Looped], named: str) -> None:
    model = built(kind)
    with pytest.raises(AttachError, match=named) as refused:
        haltkit.wavefront(model, PROMPT, "norm:tau=0.5", body=["core"])
    assert kind.__name__ in str(refused.value)
    assert "haltkit.generation" in str(refused.value)
    assert type(model.core) is Core


def test_a_model_with_two_states_in_its_loop_is_refused() -> None:
    model = hrm_model()
    with pytest.raises(CannotStep, match="HrmTextForCausalLM"):
        haltkit.wavefront(model, PROMPT, "norm:tau=0.5", run=lambda ids: model(ids, use_cache=False))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"width": 0}, "width"),
        ({"inner": 0}, "inner"),
        ({"inner": 60}, "inner=60"),
        ({"inner": 4, "max_steps": 3}, "max_steps=3"),
        ({"layout": "modulo:2"}, "layout='modulo:2'"),
        ({"policy": "norm:tau=0.1,granularity=batch"}, "granularity=batch"),
        ({"policy": "norm:tau=0.1,granularity=sequence"}, "granularity=sequence"),
        ({"commit": "norm:tau=0.1,granularity=batch"}, "granularity=batch"),
        ({"prompt": []}, "at least one token"),
        ({"prompt": "text"}, "integers"),
        ({"prompt": torch.tensor(PROMPT)}, "tolist"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": 5}, "such as .5."),
        ({"policy": "kl:tau=0.1", "inner": 2, "readout": nn.Linear(WIDTH, VOCABULARY).double()}, "inner=1"),
        ({"run": lambda ids: torch.zeros(3)}, "0 times"),
    ],
)  # fmt: skip
def test_what_cannot_go_together_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    how = {"prompt": PROMPT, "policy": "norm:tau=0.5", "body": ["core"], **values}
    with pytest.raises((ValueError, AttachError), match=named):
        list(haltkit.wavefront(built(), **how))


def test_a_model_that_halts_itself_or_has_several_loops_is_refused(tiny_config: Any) -> None:
    from haltkit.models.checkpoint import build_model

    with pytest.raises(ValueError, match="sampler='wavefront'"):
        haltkit.wavefront(build_model(tiny_config).eval(), PROMPT, "norm:tau=0.5")
    loops = {"one": haltkit.Loop(["core"]), "two": haltkit.Loop(["head"])}
    with pytest.raises(ValueError, match="one, two"):
        haltkit.wavefront(built(), PROMPT, "norm:tau=0.5", loops=loops)
