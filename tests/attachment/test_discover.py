"""What discover proposes verifies as it stands: the state is what the next step reads, wherever it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from cases import STEPS, WIDTH, Refiner
from haltkit.attachment.errors import AttachError

X = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1))


class Cell(nn.Module):
    """One step: injects what it is given and mixes it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, e: Tensor | None = None) -> Tensor:
        return torch.tanh(self.linear(h) + (0.0 if e is None else e))


class Model(nn.Module):
    """A loop over cells; subclasses are the structures that are told apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core, self.other = Cell(), Cell()
        self.head = nn.Linear(WIDTH, WIDTH)


class Gate(Model):
    """After each step an exit gate looks at the state; nothing reads it."""

    def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
        for _ in range(n):
            x = self.core(x)
            self.exits = self.other(x)
        return x


class Readout(Model):
    """Each step is read out, and the answers are collected."""

    def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
        for _ in range(n):
            x = self.core(x)
            self.answer = self.head(x)
        return self.answer


class Message(Model):
    """Before each step, a message with a dimension for heads is made of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.message = Heads()

    def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
        for _ in range(n):
            x = self.core(x, self.message(x).mean(1))
        return x


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).unflatten(-1, (3, WIDTH)).transpose(1, 2)


class ByKeyword(Model):
    def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
        e = self.head(x)
        h = torch.zeros_like(x)
        for _ in range(n):
            h = self.core(e=e, h=h)
        return h


class Roles(Model):
    """One module, called three times on a latent and once on the answer in each step, as recursive reasoning does."""

    def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
        y = z = torch.zeros_like(x)
        for _ in range(n):
            for _ in range(3):
                z = self.core(z + y + x)
            y = self.core(y + z)
        return y


@dataclasses.dataclass
class Carry:
    steps: int
    memory: Tensor


class Inner(nn.Module):
    """A whole model that takes and gives what it carries."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell, self.kind = Cell(), kind

    def forward(self, carry: Any, x: Tensor) -> Any:
        if self.kind == "dict":
            h = self.cell(carry["z"], x)
            return {"logits": h.mean(-1), "z": h}
        if self.kind == "dataclass":
            return Carry(carry.steps + 1, self.cell(carry.memory, x))
        h = self.cell(carry[1], x)
        return h.mean(-1), h


class Around(nn.Module):
    """A Python loop around calls of a whole model."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.kind = Inner(kind), kind

    def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
        z = torch.zeros_like(x)
        carries: dict[str, Any] = {"dict": {"z": z}, "dataclass": Carry(0, z), "tuple": (z.mean(-1), z)}
        carry = carries[self.kind]
        for _ in range(n):
            carry = self.model(carry, x)
        out: Tensor = carry["z"] if self.kind == "dict" else carry.memory if self.kind == "dataclass" else carry[1]
        return out


class Summed(Model):
    """The sum is the model's own: h = h + f(h)."""

    def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
        for _ in range(n):
            x = x + 0.1 * self.core(x)
        return x


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (Refiner, {"state": "core"}),
    "gate": (Gate, {"state": "core"}),
    "readout": (Readout, {"state": "core"}),
    "message": (Message, {"state": "core"}),
    "keyword": (ByKeyword, {"state": "core", "initial": "h"}),
    "roles": (Roles, {"state": "core", "period": 4}),
    "summed": (Summed, {"state": "core", "on_halt": {"core": "zero"}}),
    "dict": (lambda: Around("dict"), {"state": "model", "iterations": STEPS}),
    "dataclass": (lambda: Around("dataclass"), {"state": "model"}),
    "tuple": (lambda: Around("tuple"), {"state": "model"}),
}


@torch.no_grad()
@pytest.mark.parametrize("case", list(CASES))
def test_the_first_proposal_verifies(case: str) -> None:
    build, expected = CASES[case]
    model = build().eval()
    found = haltkit.discover(model, lambda: model(X))
    best = found.candidates[0]
    for name, value in expected.items():
        assert getattr(best, name) == value, name
    for k in (1, 4, STEPS - 2):
        report = haltkit.verify(model, lambda: model(X), k, lambda k: model(X, k), **best.fields())
        assert report.ok
        assert report.halted == 0
    with haltkit.attach(model, "norm:tau=0.05,granularity=batch", **best.fields()) as session:
        model(X)
    assert session.steps["loop"].shape == X.shape[:-1]
    # The call to copy says the same.
    copied = eval(
        str(found).splitlines()[-1],
        {"haltkit": haltkit, "model": model, "policy": "fixed:steps=4", "dataclasses": dataclasses},
    )
    halted = model(X)
    copied.detach()
    assert torch.equal(halted, model(X, 4))


@torch.no_grad()
@pytest.mark.parametrize("runs", [2, 5])
def test_repeated_calls_of_the_whole_model_are_no_loop(runs: int) -> None:
    """A generation, or a test that runs twice."""
    model = Gate().eval()

    def run() -> None:
        for _ in range(runs):
            model(X, 3)

    best = haltkit.discover(model, run).candidates[0]
    assert (best.iterations, best.state) == (3, "core")

    straight = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    with pytest.raises(AttachError, match="around the model"):
        haltkit.discover(straight, lambda: [straight(X) for _ in range(runs)])


@torch.no_grad()
def test_a_loop_inside_an_iteration_is_proposed_beside_the_outer_one() -> None:
    class Nested(Model):
        def forward(self, x: Tensor, core: int = 4, other: int = 5) -> Tensor:
            z = torch.zeros_like(x)
            for _ in range(other):
                for _ in range(core):
                    z = self.core(z + x)
                x = self.other(z + x)
            return x

    model = Nested().eval()
    outer, inner = haltkit.discover(model, lambda: model(X)).candidates
    assert (outer.body, outer.state, outer.iterations) == (("core", "other"), "other", 5)
    assert (inner.body, inner.reset_on, inner.iterations) == (("core",), ("other",), 4)
    loops = {name: haltkit.Loop.of(c.fields()) for name, c in (("other", outer), ("core", inner))}
    report = haltkit.verify(model, lambda: model(X), {"core": 2, "other": 3}, lambda k: model(X, **k), loops=loops)
    assert report.ok


@torch.no_grad()
def test_a_loop_that_a_method_runs_is_proposed_with_its_scope() -> None:
    model = Refiner().eval()
    best = haltkit.discover(model, lambda: model.rollout(X)).candidates[0]
    assert best.scope == ":rollout"
    with haltkit.attach(model, "fixed:steps=4", **best.fields()) as session:
        model.rollout(X)
    assert session.skipped == STEPS - 4


@torch.no_grad()
def test_a_model_that_draws_noise_is_told_apart_from_one_that_reads_itself() -> None:
    class Noisy(Model):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(STEPS):
                x = self.core(x + 0.1 * torch.randn_like(x))
            return x

    model = Noisy().eval()
    with pytest.raises(ValueError, match="fix its seed"):
        haltkit.discover(model, lambda: model(X))

    def seeded() -> Tensor:
        torch.manual_seed(0)
        return model(X)

    assert haltkit.discover(model, seeded).candidates[0].state == "core"


class Gated(nn.Module):
    """A loop with an exit head, beside it a gate of a layer and a map that has nothing to do with either."""

    def __init__(self, name: str, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core = nn.ModuleDict(
            {"up": nn.Linear(WIDTH, WIDTH), "gate": nn.Linear(WIDTH, 1), "pool": nn.Linear(WIDTH, 1)}
        )
        self.core.forward = self.step  # type: ignore[method-assign]
        self.value = nn.Linear(WIDTH, 1)
        self.name = name
        self.add_module(name, nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, outputs)))

    def step(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.core["up"](x) * torch.sigmoid(self.core["gate"](x)) + self.core["pool"](x))
        return out

    def forward(self, x: Tensor, n: int = 6) -> tuple[Tensor, list[Tensor]]:
        logits = []
        for _ in range(n):
            x = self.core(x)
            logits.append(getattr(self, self.name)(x))
        return self.value(x), logits


@pytest.mark.parametrize(
    ("name", "outputs"), [("exit_gate", 1), ("to_halt_pred", 1), ("q_head", 2), ("early_exit", 2), ("gate", 1)]
)
def test_what_looks_like_an_exit_head_is_said_with_the_call_that_halts_by_it(name: str, outputs: int) -> None:
    model, x = Gated(name, outputs), torch.randn(2, 3, WIDTH)
    found = haltkit.discover(model, lambda: model(x)[0])
    assert [(head.path, head.outputs) for head in found.heads] == [(f"{name}.1", outputs)]
    line = str(found).splitlines()[-1]
    assert "by its name alone" in line
    gate = eval(line.partition("lambda x: ")[2].partition("), policy")[0], {"model": model, "x": x})
    logits = getattr(model, name)[1](x)
    assert torch.equal(gate, logits[..., 0] - logits[..., 1] if outputs == 2 else logits[..., 0])


def test_a_model_without_an_exit_head_is_not_said_to_have_one() -> None:
    model = Gated("readout", 2)
    found = haltkit.discover(model, lambda: model(torch.ones(2, 3, WIDTH))[0])
    assert not found.heads
    assert str(found).splitlines()[-1].startswith("  haltkit.attach(")
