"""Entries that halt alone in several loops of one model, and leave them: in a row, nested, and on real models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from cases import hrm_model, needs
from haltkit.attachment.description import Loop
from haltkit.attachment.errors import RowsMeet
from standins import Counting, DrawnFromState, InARow, Nested, with_config

WIDTH, BATCH = 8, 7


class Stacked(nn.Module):
    """A step of three maps, the middle one in a loop of its own: the outer loop calls the step, and not its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.low, self.after = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor, n: int) -> Tensor:
        z = torch.tanh(self.before(x))
        for _ in range(n):
            z = torch.tanh(self.low(z + x))
        out: Tensor = self.after(z)
        return out


class Inside(nn.Module):
    """A loop around :class:`Stacked`."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Stacked()

    def forward(self, x: Tensor, high: int = 5, low: int = 4) -> Tensor:
        for _ in range(high):
            x = torch.tanh(self.step(x, low))
        return x


class Threefold(nn.Module):
    """Three loops, each inside the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor, n: int = 4) -> Tensor:
        y, z = torch.zeros_like(x), torch.zeros_like(x)
        for _ in range(n):
            for _ in range(n):
                for _ in range(n):
                    z = torch.tanh(self.c(x + y + z))
                y = torch.tanh(self.b(y + z))
            x = torch.tanh(self.a(x + y))
        return x


class Hrm(nn.Module):
    """HRM-text, which is called without a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = hrm_model().double()
        self.inner.config.H_cycles, self.inner.config.L_cycles = 5, 4

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.inner(ids, use_cache=False).logits
        return logits


class Supervised(nn.Module):
    """A tiny-recursive-model that is called again on what it gave, as its deep supervision does."""

    def __init__(self) -> None:
        super().__init__()
        needs("tiny_recursive_model")
        from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel

        network = MLPMixer1D(dim=16, depth=1, seq_len=5)
        self.trm = TinyRecursiveModel(
            dim=16, num_tokens=50, network=network, num_refinement_blocks=4, num_latent_refinements=2
        ).double()

    def forward(self, ids: Tensor) -> Tensor:
        outputs, latents = self.trm.get_initial()
        for _ in range(5):
            outputs, latents, answer, _ = self.trm(ids, outputs, latents)
        return answer


HRM = {
    "high": Loop(("inner.model.L_module", "inner.model.H_module"), initial=None, scope="inner.model"),
    "low": Loop(("inner.model.L_module",), initial=None, scope="inner.model", reset_on=("inner.model.H_module",)),
}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Loop], dict[str, int]]] = {
    "in a row": (
        lambda: InARow(WIDTH).double(),
        {"core": Loop(("core",)), "refine": Loop(("refine",))},
        {"core": 9, "refine": 7},
    ),
    "nested": (
        lambda: Nested(WIDTH).double(),
        {"high": Loop(("low", "high"), initial=None), "low": Loop(("low",), initial=None, reset_on=("high",))},
        {"high": 6, "low": 5},
    ),
    "inside a step": (
        Inside,
        {"high": Loop(("step",)), "low": Loop(("step.low",), initial=None, scope="step")},
        {"high": 6, "low": 5},
    ),
    "three": (
        Threefold,
        {
            "a": Loop(("c", "b", "a"), initial=None),
            "b": Loop(("c", "b"), initial=None, reset_on=("a",)),
            "c": Loop(("c",), initial=None, reset_on=("b",)),
        },
        {"a": 5, "b": 5, "c": 5},
    ),
    "hrm-text": (Hrm, HRM, {"high": 6, "low": 5}),
    "tiny-recursive-model": (
        Supervised,
        {"high": Loop(("trm",), initial=None), "low": Loop(("trm.network",), period=3, initial=None, scope="trm")},
        {"high": 6, "low": 5},
    ),
}


def inputs(case: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if case in ("hrm-text", "tiny-recursive-model"):
        return torch.randint(0, 50, (BATCH, 5), generator=generator)
    return torch.randn(BATCH, 3, WIDTH, dtype=torch.float64, generator=generator)


def made(case: str) -> tuple[nn.Module, dict[str, Loop], dict[str, DrawnFromState]]:
    torch.manual_seed(0)
    make, loops, most = CASES[case]
    return make().eval(), loops, {name: DrawnFromState(steps) for name, steps in most.items()}


def counted(model: nn.Module, loops: dict[str, Loop]) -> dict[str, Counting]:
    """Counts the entries that each module of the bodies is given."""
    found = {}
    for path in dict.fromkeys(path for loop in loops.values() for path in loop.body):
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        found[path] = Counting(getattr(owner, name))
        setattr(owner, name, found[path])
    return found


@torch.no_grad()
@pytest.mark.parametrize("execution", ["masked", "compact"])
@pytest.mark.parametrize("case", CASES)
def test_each_entry_gets_what_it_gets_alone_in_every_loop(case: str, execution: Any) -> None:
    model, loops, policies = made(case)
    x = inputs(case)
    alone, steps, outcomes = [], dict[str, list[Tensor]](), dict[str, list[Tensor]]()
    for entry in x.split(1):
        with haltkit.attach(model, policies, loops=loops) as session:
            alone.append(model(entry))
        for name in loops:
            steps.setdefault(name, []).append(session.steps[name])
            outcomes.setdefault(name, []).append(session.outcome[name])
    with haltkit.attach(model, policies, loops=loops, execution=execution) as session:
        for _ in range(3):
            out = model(x)
            torch.testing.assert_close(out, torch.cat(alone), rtol=0, atol=1e-12)
            for name in loops:
                assert torch.equal(session.steps[name], torch.cat(steps[name]))
                assert torch.equal(session.outcome[name], torch.cat(outcomes[name]))
    for name in loops:
        assert len(torch.cat(steps[name]).unique()) > 2  # or the test tells nothing


@torch.no_grad()
@pytest.mark.parametrize("execution", ["masked", "compact"])
@pytest.mark.parametrize("total", [3, 8, 13, 21])
def test_each_entry_spends_a_joint_budget_of_nested_loops_as_alone(total: int, execution: Any) -> None:
    """How many loops run inside an outer step differs from entry to entry."""
    model, loops, _ = made("three")
    policies = {"a": DrawnFromState(3), "b": DrawnFromState(4), "c": DrawnFromState(3)}
    x = torch.randn(12, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    alone, steps = [], dict[str, list[Tensor]]()
    for entry in x.split(1):
        with haltkit.attach(model, policies, loops=loops, total_steps=total) as session:
            alone.append(model(entry))
        assert session.computed <= total
        for name in loops:
            steps.setdefault(name, []).append(session.steps[name])
    with haltkit.attach(model, policies, loops=loops, total_steps=total, execution=execution) as session:
        for _ in range(2):
            torch.testing.assert_close(model(x), torch.cat(alone), rtol=0, atol=1e-12)
            assert all(torch.equal(session.steps[name], torch.cat(steps[name])) for name in loops)


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in CASES if case not in ("inside a step", "tiny-recursive-model")])
def test_modules_compute_each_entry_as_often_as_alone(case: str) -> None:
    model, loops, policies = made(case)
    x = inputs(case)
    counts = counted(model, loops)
    for entry in x.split(1):
        with haltkit.attach(model, policies, loops=loops):
            model(entry)
    needed = {path: len(count.seen) for path, count in counts.items()}
    with haltkit.attach(model, policies, loops=loops, execution="compact"):
        model(x)  # the first loops also find the batch
        for count in counts.values():
            count.seen.clear()
        model(x)
    assert {path: sum(count.seen) for path, count in counts.items()} == needed
    assert all(len(set(count.seen)) > 2 for count in counts.values())


def test_gradients_are_those_of_each_entry_alone() -> None:
    model, loops, policies = made("nested")
    x, weights = inputs("nested"), list(model.parameters())
    with haltkit.attach(model, policies, loops=loops):
        alone = torch.cat([model(entry) for entry in x.split(1)])
    expected = torch.autograd.grad(alone.square().sum(), weights)
    with haltkit.attach(model, policies, loops=loops, execution="compact"):
        for _ in range(2):
            found = torch.autograd.grad(model(x).square().sum(), weights)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_a_batch_as_large_as_the_other_dimensions_leaves_along_its_own() -> None:
    model, loops, policies = made("nested")
    x = torch.randn(WIDTH, WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    alone = []
    for entry in x.split(1):
        with haltkit.attach(model, policies, loops=loops):
            alone.append(model(entry))
    with haltkit.attach(model, policies, loops=loops, execution="compact"):
        for _ in range(2):
            torch.testing.assert_close(model(x), torch.cat(alone), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("execution", ["masked", "compact"])
@pytest.mark.parametrize("k", [{"high": 2}, {"low": 3}, {"high": 3, "low": 2}], ids=str)
@pytest.mark.parametrize("case", ["nested", "inside a step", "hrm-text"])
def test_verify_holds_an_entry_that_leaves_against_the_model_at_these_depths(
    case: str, k: dict[str, int], execution: Any
) -> None:
    model, loops, _ = made(case)
    x = inputs(case)

    def run_at(depths: dict[str, int]) -> Tensor:
        if case == "hrm-text":
            names = {"high": "H_cycles", "low": "L_cycles"}
            return with_config(
                model.inner.config, lambda: model(x), **{names[name]: depth for name, depth in depths.items()}
            )
        return model(x, **depths)

    report = haltkit.verify(model, lambda: model(x), k, run_at, loops=loops, execution=execution)
    assert report.ok
    assert report.halted == 0
    assert report.alone is not None
    assert all(report.others[name] is not None for name in k)


class Restarting(nn.Module):
    """An inner loop that begins at zero: the rows of its first step are equal, and prove nothing about the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            z = torch.zeros_like(x)
            for _ in range(4):
                z = torch.tanh(self.low(z)) + x
            x = torch.tanh(self.high(z))
        return x


@torch.no_grad()
def test_an_inner_loop_of_which_not_every_call_is_proven_is_given_whole_batches() -> None:
    _, loops, policies = made("nested")
    model = Restarting()
    x = inputs("nested")
    alone = []
    for entry in x.split(1):
        with haltkit.attach(model, policies, loops=loops):
            alone.append(model(entry))
    counts = counted(model, loops)
    with haltkit.attach(model, policies, loops=loops, execution="compact") as session:
        for _ in range(2):
            torch.testing.assert_close(model(x), torch.cat(alone), rtol=0, atol=1e-12)
        assert len(session.steps["high"].unique()) > 2
        counts["low"].seen.clear()
        counts["high"].seen.clear()
        model(x)
    assert set(counts["low"].seen) == {2, BATCH}  # two entries for a proof
    assert min(counts["high"].seen) < BATCH


class Leaking(nn.Module):
    """As :class:`Nested`, but between its loops glue tells every entry of the batch about the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low, self.high = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor, high: int = 5, low: int = 4) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(high):
            for _ in range(low):
                z = torch.tanh(self.low(z + x))
            x = torch.tanh(self.high(z + x + z.mean(0, keepdim=True)))
        return x


@torch.no_grad()
def test_verify_sees_entries_that_meet_between_nested_loops() -> None:
    model, loops, _ = made("nested")
    model = Leaking()
    x, k = inputs("nested"), {"high": 2, "low": 2}
    run_at = lambda depths: model(x, **depths)  # noqa: E731
    assert not haltkit.verify(model, lambda: model(x), k, run_at, loops=loops, execution="compact").ok


class Across(nn.Module):
    """Sees the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        new: Tensor = self.map(x) + x.mean(0, keepdim=True)
        return new


@torch.no_grad()
@pytest.mark.parametrize("module", ["low", "high"])
def test_rows_that_meet_in_either_loop_are_refused(module: str) -> None:
    model, loops, policies = made("nested")
    setattr(model, module, Across())
    with (
        haltkit.attach(model, policies, loops=loops, execution="compact"),
        pytest.raises(RowsMeet, match=f"'{module}' gives entries"),
    ):
        model(inputs("nested"))


def test_an_observer_of_loops_that_entries_leave_is_refused() -> None:
    model, loops, policies = made("nested")
    with pytest.raises(ValueError, match="halt in high leave the loops inside it"):
        haltkit.attach(model, policies, loops=loops, execution="compact", observer=haltkit.Recorder())
    model, loops, policies = made("in a row")
    recorder = haltkit.Recorder()
    with haltkit.attach(model, policies, loops=loops, execution="compact", observer=recorder), torch.no_grad():
        model(inputs("in a row"))
    assert list(recorder.trajectory.regions) == ["core", "refine"]
