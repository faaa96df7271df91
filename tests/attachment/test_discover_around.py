"""Loops around calls of a whole model: what discover proposes is exact at every step, and what is no loop is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import haltkit
from cases import WIDTH, needs
from haltkit.attachment.errors import AttachError, NeverEnds, VaryingInput
from haltkit.attachment.saved import check_savable
from haltkit.attachment.verify import difference

STEPS = 6
X = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 50, (3, 5), generator=torch.Generator().manual_seed(1))
Loops = tuple[nn.Module, Callable[..., Any]]  # a model, and a function of a number of steps that loops around it


@dataclasses.dataclass
class Inner:
    z_H: Tensor
    z_L: Tensor


@dataclasses.dataclass
class Carry:
    inner: Inner
    steps: Tensor
    halted: Tensor


class Recursive(nn.Module):
    """The structure of HRM with ACT: a carry in a carry, two loops inside, and entries that begin anew when halted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.most, self.turns, self.cycles = STEPS, 4, 3

    def initial_carry(self, x: Tensor) -> Carry:
        z = torch.empty_like(x)
        return Carry(Inner(z, z), torch.zeros(len(x), dtype=torch.int32), torch.ones(len(x), dtype=torch.bool))

    def forward(self, carry: Carry, batch: dict[str, Tensor]) -> tuple[Carry, dict[str, Tensor], Tensor]:
        fresh = carry.halted.view(-1, *[1] * (batch["x"].ndim - 1))
        high, low = carry.inner.z_H.masked_fill(fresh, 0.1), carry.inner.z_L.masked_fill(fresh, 0.2)
        steps = carry.steps.masked_fill(carry.halted, 0) + 1
        for _ in range(self.cycles):
            for _ in range(self.turns):
                low = torch.tanh(self.low(low + high + batch["x"]))
            high = torch.tanh(self.high(high + low))
        new = Carry(Inner(high, low), steps, steps >= self.most)
        return new, {"logits": self.head(high), "q": high.flatten(1).mean(1)}, new.halted.all()


class Small(nn.Module):
    """Two maps and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, flip: bool = False) -> Tensor:
        return torch.tanh((self.other if flip else self.core)(x))

    def step(self, h: Tensor) -> Tensor:
        h = h + 0.3 * torch.tanh(self.core(h))
        return h + 0.1 * self.other(h)


class Pair(NamedTuple):
    y: Tensor
    z: Tensor


class Answers(Small):
    """The structure of a tiny recursive model under deep supervision: a latent and an answer, and a loss per step."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:  # type: ignore[override]
        z = torch.tanh(self.core(x + y + z))
        y = torch.tanh(self.other(y + z))
        return Pair(y, z), y.mean(-1)


class Mapping(Small):
    def forward(self, carry: dict[str, Any]) -> Any:  # type: ignore[override]
        return {"count": carry["count"] + 1, "states": [carry["states"][0], super().forward(carry["states"][1])]}


class Values(Small):
    """The structure of hrm-pytorch: states by the level of their network, handed on as a dictionary's values."""

    def forward(self, x: Tensor, states: Any = None) -> Any:  # type: ignore[override]
        low, high = (x, x) if states is None else states
        levels = {0: torch.tanh(self.core(low + high)), 1: high}
        levels[1] = torch.tanh(self.other(levels[0] + high))
        return levels[1].mean(-1), levels.values()


def recursive() -> Loops:
    model = Recursive()

    def run(n: int = STEPS) -> Any:
        carry = model.initial_carry(X)
        for _ in range(n):
            carry, out, _ = model(carry, {"x": X})
        return out

    return model, run


def plain() -> Loops:
    model = Small()

    def run(n: int = STEPS) -> Tensor:
        x = X
        for _ in range(n):
            x = model(x)
        return x

    return model, run


def answers() -> Loops:
    model = Answers()

    def run(n: int = STEPS) -> Any:
        y = z = torch.zeros_like(X)
        for _ in range(n):
            (y, z), loss = model(X, y, z)
        return y, loss

    return model, run


def mapping() -> Loops:
    model = Mapping()

    def run(n: int = STEPS) -> Any:
        carry = {"count": 0, "states": [X.mean(-1), X]}
        for _ in range(n):
            carry = model(carry)
        return carry["states"]

    return model, run


def values() -> Loops:
    model = Values()

    def run(n: int = STEPS) -> Tensor:
        states = None
        for _ in range(n):
            out, states = model(X, states)
        return out

    return model, run


def refined() -> Loops:
    """The sum is the caller's own."""
    model = Small()

    def run(n: int = STEPS) -> Tensor:
        x = X
        for _ in range(n):
            x = x - 0.1 * model(x)
        return x

    return model, run


def guided() -> Loops:
    """Two calls per step, with a condition and without, as a diffusion model is guided."""
    model = Small()

    def run(n: int = STEPS) -> Tensor:
        x = X
        for _ in range(n):
            x = x - 0.1 * (1.5 * model(x) - 0.5 * model(x, True))
        return x

    return model, run


def alternating() -> Loops:
    model = Small()

    def run(n: int = STEPS) -> Tensor:
        x = X
        for _ in range(n):
            x = model(model(x, flip=False), flip=True)
        return x

    return model, run


def by_method() -> Loops:
    model = Small()

    def run(n: int = STEPS) -> Tensor:
        h = X
        for _ in range(n):
            h = model.step(h)
        return h

    return model, run


def by_parts() -> Loops:
    model = Small()

    def run(n: int = STEPS) -> Tensor:
        h = X
        for _ in range(n):
            h = model.core(torch.tanh(model.other(h)))
        return h

    return model, run


Z_H = "lambda out: out[0].inner.z_H"
CASES: dict[str, tuple[Callable[[], Loops], dict[str, Any]]] = {
    "carry in a carry": (recursive, {"body": ("model",), "select": Z_H}),
    "tensor": (plain, {"body": ("model",), "initial": 0}),
    "named tuple": (answers, {"initial": 1, "select": "lambda out: out[0].y"}),
    "list in a dictionary": (mapping, {"select": "lambda out: out['states'][1]"}),
    "values of a dictionary": (values, {"select": "lambda out: list(out[1])[0]"}),
    "sum": (refined, {"on_halt": {"model": "zero"}}),
    "two calls and a sum": (guided, {"on_halt": {"model": "zero"}, "period": 2}),
    "two calls": (alternating, {"period": 2}),
    "method": (by_method, {"body": ("model:step",)}),
    "parts": (by_parts, {"body": ("model.other", "model.core")}),
}
NAMES = {"haltkit": haltkit, "dataclasses": dataclasses, "torch": torch}


@torch.no_grad()
@pytest.mark.parametrize("given", ["with run_at", "without"])
@pytest.mark.parametrize("case", CASES)
def test_the_proposal_is_exact_at_every_step(case: str, given: str) -> None:
    model, run = CASES[case][0]()
    expected = CASES[case][1]
    found = haltkit.discover(model, run, run if given == "with run_at" else None)
    best = found.candidates[0]
    assert best.around
    assert best.holds
    assert best.iterations == STEPS
    for name, value in expected.items():
        assert (best.leaf.select_text() if name == "select" and best.leaf else getattr(best, name)) == value, name
    looped = haltkit.LoopAround(model, run)
    for k in range(1, STEPS):
        report = haltkit.verify(looped, looped, k, run, rows=False, **best.fields())
        assert report.ok
        assert report.halted == 0
    # The call to copy says the same.
    session = eval(found.candidates[0].call(), {**NAMES, "model": model, "run": run, "policy": "fixed:steps=4"})
    with session:
        halted = session.model()
    assert difference(halted, run(4)) == 0
    assert session.skipped == STEPS - 4
    assert difference(run(), halted) > 0


def trm_refinements() -> Loops:
    """tiny-recursive-model: calls of the whole model on what the one before gave, as in its deep supervision."""
    needs("tiny_recursive_model")
    from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel

    torch.manual_seed(0)
    network = MLPMixer1D(dim=16, depth=1, seq_len=5)
    model: Any = TinyRecursiveModel(
        dim=16, num_tokens=50, network=network, num_refinement_blocks=2, num_latent_refinements=2
    ).eval()

    def run(n: int = STEPS) -> Tensor:
        outputs, latents = model.get_initial()
        answer = outputs
        for _ in range(n):
            outputs, latents, answer, _ = model(IDS, outputs, latents)
        return answer

    return model, run


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # other people's packages warn as they like
def test_a_loop_around_a_model_of_others_is_proposed_and_exact() -> None:
    model, run = trm_refinements()
    best = haltkit.discover(model, run, run).candidates[0]
    assert best.around
    assert best.holds
    assert best.iterations == STEPS
    looped = haltkit.LoopAround(model, run)
    for k in range(1, STEPS):
        report = haltkit.verify(looped, looped, k, run, rows=False, **best.fields())
        assert report.ok
        assert report.halted == 0
        assert difference(run(k), run()) > 0


def until_halted(model: Recursive) -> Any:
    carry = model.initial_carry(X)
    out: Any = None
    while out is None or not carry.halted.all():
        carry, out, _ = model(carry, {"x": X})
    return carry, out


def until_rows_halted(model: Recursive) -> Any:
    """Entries are rows themselves: the state is ``(batch, D)``."""
    carry = model.initial_carry(X[:, 0])
    out: Any = None
    while out is None or not carry.halted.all():
        carry, out, _ = model(carry, {"x": X[:, 0]})
    return carry, out


def until_told(model: Recursive) -> Any:
    carry = model.initial_carry(X)
    while True:
        carry, out, finished = model(carry, {"x": X})
        if finished:
            return carry, out


class Running(Small):
    """Says whether it goes on."""

    most = STEPS

    def forward(self, x: Tensor, count: int) -> Any:  # type: ignore[override]
        return super().forward(x), count + 1, count + 1 < self.most


def while_running(model: Running) -> Any:
    x, count, running = X, 0, True
    while running:
        x, count, running = model(x, count)
    return x


ENDING: dict[str, tuple[type[Any], Callable[[Any], Any], str]] = {
    "a flag per entry": (Recursive, until_halted, "halted=torch.ones_like(out[0].halted)"),
    "a flag per row": (Recursive, until_rows_halted, "halted=torch.ones_like(out[0].halted)"),
    "a flag of all": (Recursive, until_told, "torch.ones_like(out[2])"),
    "a truth": (Running, while_running, "False"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", ENDING)
def test_a_loop_that_goes_on_until_the_model_says_so_is_told_that_it_is_over(case: str) -> None:
    kind, solve, token = ENDING[case]
    model = kind()

    def run() -> Any:
        return solve(model)

    def run_at(k: int) -> Any:
        model.most = k
        try:
            return run()
        finally:
            model.most = STEPS

    found = haltkit.discover(model, run, run_at)
    best = found.candidates[0]
    assert best.holds
    assert "granularity=batch" in best.verdict
    assert token in best.call()
    looped = haltkit.LoopAround(model, run)
    for k in range(1, STEPS):
        report = haltkit.verify(looped, looped, k, run_at, **best.fields())
        assert report.ok
        assert report.halted == 0
    session = eval(best.call(), {**NAMES, "model": model, "run": run, "policy": "norm:tau=1e9,granularity=batch"})
    with session:
        halted = session.model()
    taken = int(session.steps["loop"].max())
    assert taken < 3
    assert difference(halted, run_at(taken)) == 0
    # Rows that halt alone would keep the loop going.
    with pytest.raises(ValueError, match="granularity=batch"):
        haltkit.attach(looped, "norm:tau=0.1", **best.fields())
    with pytest.raises(ValueError, match="on_halt"):
        check_savable(haltkit.Loop.of(best.fields()))
    # Without a comparison nothing is seen after the halt, because the loop ends at once.
    unsure = next(c for c in haltkit.discover(model, run).candidates if c.around)
    assert "run_at=" in unsure.problem


@torch.no_grad()
def test_a_loop_that_ends_by_a_count_of_the_model_says_what_it_needs() -> None:
    model = Running()

    def run() -> Tensor:
        x, count = X, 0
        while count < STEPS:
            x, count, _ = model(x, count)
        return x

    best = haltkit.discover(model, run).candidates[0]
    assert NeverEnds.__name__ in best.problem
    assert "greatest number of iterations" in best.problem


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.embedding(ids)))
        return out


@torch.no_grad()
def test_tokens_chosen_one_after_the_other_are_no_loop() -> None:
    model = Words()

    def generate() -> Tensor:
        ids = torch.tensor([[1, 2], [3, 4]])
        for _ in range(STEPS):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
        return ids

    def rewrite() -> Tensor:
        ids = torch.tensor([[1, 2], [3, 4]])
        for _ in range(STEPS):
            ids = model(ids).argmax(-1)
        return ids

    for run in (generate, rewrite):
        with pytest.raises(AttachError, match="floating-point"):
            haltkit.discover(model, run)


@torch.no_grad()
def test_a_loop_around_the_model_and_those_inside_it_halt_together() -> None:
    model, _ = recursive()
    assert isinstance(model, Recursive)

    def run() -> Any:
        return until_told(model)

    def run_at(k: dict[str, int]) -> Any:
        model.most, model.turns, model.cycles = k["act"], k["low"], k["high"]
        try:
            return run()
        finally:
            model.most, model.turns, model.cycles = STEPS, 4, 3

    proposed = haltkit.discover(model, run, lambda k: run_at({"act": k, "low": 4, "high": 3})).candidates
    act = next(c for c in proposed if c.around)
    loops = {
        "act": haltkit.Loop.of(act.fields()),
        "high": haltkit.Loop(["model.low", "model.high"], scope="model", initial=None),
        "low": haltkit.Loop(["model.low"], scope="model", initial=None, reset_on=["model.high"]),
    }
    looped = haltkit.LoopAround(model, run)
    for k in ({"act": 4, "low": 1, "high": 2}, {"act": 2, "low": 3, "high": 1}):
        assert haltkit.verify(looped, looped, k, run_at, loops=loops).halted == 0


@torch.no_grad()
def test_entries_leave_a_loop_around_the_model_one_by_one() -> None:
    model, run = recursive()
    assert isinstance(model, Recursive)
    fields = haltkit.discover(model, run, run).candidates[0].fields()

    def solve(x: Tensor, n: int = STEPS) -> Any:
        carry = model.initial_carry(x)
        for _ in range(n):
            carry, out, _ = model(carry, {"x": x})
        return out

    boards = torch.randn(9, 4, WIDTH, generator=torch.Generator().manual_seed(2))
    looped = haltkit.LoopAround(model, solve)
    spec = "norm:tau=0.1,granularity=sequence"
    with haltkit.attach(looped, spec, execution="compact", **fields) as session:
        together = looped(boards)
    taken = session.steps["loop"][:, 0].tolist()
    assert len(set(taken)) > 1
    with haltkit.attach(looped, spec, **fields) as session:
        queued = list(session.queue(boards, lambda board: looped(board[None]), slots=4))
    for i, k in enumerate(taken):
        alone = solve(boards[i : i + 1], k)
        assert queued[i].steps is not None
        assert queued[i].steps[0, 0] == k
        for name, value in alone.items():
            torch.testing.assert_close(together[name][i : i + 1], value, rtol=0, atol=1e-5)
            torch.testing.assert_close(queued[i].output[name], value, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("given", [lambda x: x, lambda x: {"x": x}], ids=["a tensor", "a dictionary"])
def test_what_a_carry_has_beside_the_state_is_no_cache(given: Callable[[Tensor], Any]) -> None:
    """Each call of the loop may stop at a depth of its own, also after one step."""
    model, run = recursive()
    assert isinstance(model, Recursive)
    fields = haltkit.discover(model, run).candidates[0].fields()

    def solve(inputs: Any, n: int = STEPS) -> Any:
        batch = inputs if isinstance(inputs, dict) else {"x": inputs}
        carry = model.initial_carry(batch["x"])
        for _ in range(n):
            carry, out, _ = model(carry, batch)
        return out

    looped = haltkit.LoopAround(model, solve)
    for k in (5, 1, 3, 1, 2):
        with haltkit.attach(looped, f"fixed:steps={k}", **fields):
            assert difference(looped(given(X)), solve(given(X), k)) == 0


@torch.no_grad()
def test_what_goes_on_changing_deep_inside_an_argument_is_noticed() -> None:
    class Inside(Small):
        def forward(self, x: Tensor, time: Carry) -> Tensor:  # type: ignore[override]
            return super().forward(x) * time.inner.z_H

    model = Inside()

    def run(n: int = STEPS) -> Tensor:
        x, still = X, torch.zeros(3)
        for k in range(n):
            x = model(x, Carry(Inner(torch.tensor([1.0 + k]), still), still, still))
        return x

    looped = haltkit.LoopAround(model, run)
    with pytest.raises(VaryingInput), haltkit.attach(looped, "fixed:steps=2", body=["model"]):
        looped()
    best = haltkit.discover(model, run, run).candidates[0]
    assert best.holds  # equal to the model run with as many, so the check is turned off
    assert best.fields()["check"] is False


def test_a_loop_around_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(ValueError, match="Module"):
        haltkit.LoopAround(print, print)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="function"):
        haltkit.LoopAround(Small(), 3)  # type: ignore[arg-type]
