"""A queue over a foreign model: each item gets what it gets alone, and the calls of the body are made together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import haltkit
from cases import WIDTH, needs
from haltkit.attachment.errors import AttachError, RowsMeet
from haltkit.attachment.joining import QueueOutput

LOOPS = 12


class Counting(nn.Module):
    """A module, and how many entries it was given in each call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.seen = inner, list[int]()

    def forward(self, x: Tensor, *rest: Any, **more: Any) -> Any:
        self.seen.append(len(x))
        return self.inner(x, *rest, **more)


class Solver(nn.Module):
    """Embeds a board, loops with the input injected between two modules, and reads an answer."""

    def __init__(self, core: nn.Module | None = None, loops: int = LOOPS) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, dropout=0.0, dtype=torch.float64)
        self.embed = nn.Linear(3, WIDTH, dtype=torch.float64)
        self.mix = nn.Linear(2 * WIDTH, WIDTH, dtype=torch.float64)
        self.core = Counting(layer if core is None else core)
        self.head = nn.Linear(WIDTH, 2, dtype=torch.float64)
        self.loops = loops
        self.eval()

    def forward(self, board: Tensor, n: int | None = None) -> dict[str, Tensor]:
        e = self.embed(board)
        x = torch.zeros_like(e)
        for _ in range(n or self.loops):
            x = self.core(torch.tanh(self.mix(torch.cat([x, e], -1))))
        return {"answer": self.head(x), "state": x}


def boards(seed: int, count: int, tokens: int = 5) -> list[Tensor]:
    """Boards of sizes that differ by orders of magnitude, so that they need different numbers of steps."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (4 * torch.rand(count, generator=generator, dtype=torch.float64) - 3)
    return [size * torch.randn(tokens, 3, generator=generator, dtype=torch.float64) for size in sizes]


def items_running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("haltkit item")]


BODY = {"body": ["mix", "core"], "initial": None}
SPEC = "norm:tau=0.02,granularity=sequence"


def alone(model: Solver, spec: str, given: list[Tensor]) -> list[QueueOutput]:
    """The slow obvious way: one item after the other."""
    found = []
    with torch.no_grad(), haltkit.attach(model, spec, **BODY) as session:
        for i, board in enumerate(given):
            output = model(board[None])
            found.append(QueueOutput(i, output, session.steps["loop"], session.outcome["loop"]))
    return found


def assert_same(one: QueueOutput, other: QueueOutput) -> None:
    assert one.error is None
    assert torch.equal(one.steps, other.steps)
    assert torch.equal(one.outcome, other.outcome)
    for name in other.output:
        torch.testing.assert_close(one.output[name], other.output[name], rtol=0, atol=1e-12)


@given(
    st.integers(0, 2**31),
    st.integers(1, 6),
    st.integers(0, 13),
    st.booleans(),
    st.sampled_from([SPEC, "norm:tau=0.05", "accel:tau=0.05,granularity=batch", "fixed:steps=3"]),
)
def test_each_item_gets_what_it_gets_alone(seed: int, slots: int, count: int, ordered: bool, spec: str) -> None:
    model, given = Solver(), boards(seed, count)
    expected = alone(model, spec, given)
    with haltkit.attach(model, spec, **BODY) as session:
        results = list(session.queue(given, lambda board: model(board[None]), slots, ordered=ordered))
    assert sorted(result.index for result in results) == list(range(count))
    assert not ordered or [result.index for result in results] == list(range(count))
    for result in results:
        assert_same(result, expected[result.index])
    assert not items_running()


def test_calls_are_made_together_and_a_free_slot_is_filled_at_once() -> None:
    model, given = Solver(), boards(3, 40)
    steps = [int(result.steps.max()) for result in alone(model, SPEC, given)]
    assert len(set(steps)) > 3
    model.core.seen.clear()
    with haltkit.attach(model, SPEC, check=False, **BODY) as session:
        assert len(list(session.queue(given, lambda board: model(board[None]), 8, ordered=False))) == 40
    together = [size for size in model.core.seen if size > 1]
    assert max(together) == 8
    assert sum(together) > 0.8 * sum(steps)
    assert len(model.core.seen) < 0.3 * sum(steps)  # at most as many calls as there are steps / 8, and the proof
    assert session.tally["loop"].loops == 40


def test_items_of_different_shapes_share_a_queue() -> None:
    model = Solver()
    given = [board for pair in zip(boards(1, 6, 5), boards(2, 6, 7), strict=True) for board in pair]
    expected = alone(model, SPEC, given)
    with haltkit.attach(model, SPEC, **BODY) as session:
        for result in session.queue(given, lambda board: model(board[None]), 6):
            assert_same(result, expected[result.index])


def test_items_whose_arguments_only_seem_equal_are_computed_apart() -> None:
    """True equals 1, and is something else to a model."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = Scaling()

        def forward(self, x: Tensor, how: Any) -> Tensor:
            for _ in range(4):
                x = self.core(x, how)
            return x

    class Scaling(nn.Module):
        def forward(self, x: Tensor, how: Any) -> Tensor:
            return 0.5 * x if how is True else 0.25 * x

    model, given = Scaled(), boards(4, 8)
    ways = [True, 1, 1.0, True, 1, True, 1.0, 1]
    with haltkit.attach(model, "fixed:steps=3", body=["core"]) as session:
        items = zip(given, ways, strict=True)
        results = list(session.queue(items, lambda item: model(item[0][None], item[1]), 4))
    for result, board, how in zip(results, given, ways, strict=True):
        assert torch.equal(result.output[0], board * (0.5 if how is True else 0.25) ** 3)


def test_an_empty_item_passes_through_beside_others() -> None:
    model, (first, *others) = Solver(), boards(1, 4)
    given = [first[None], *[first[None, :0]] * 2, *(board[None] for board in others), first[None, :0]]
    with haltkit.attach(model, SPEC, **BODY) as session:
        found = list(session.queue(given, model, slots=3))
    assert [done.output["answer"].shape[:-1] for done in found] == [board.shape[:-1] for board in given]
    assert [done.error for done in found] == [None] * len(given)
    assert [done.steps.shape for done in found] == [board.shape[:-1] for board in given]


def test_the_source_is_read_no_further_than_needed_and_may_have_no_end() -> None:
    model, read = Solver(), list[int]()

    def endless() -> Iterator[Tensor]:
        while True:
            read.append(len(read))
            yield boards(len(read), 1)[0]

    with haltkit.attach(model, SPEC, **BODY) as session:
        results = session.queue(endless(), lambda board: model(board[None]), 4, ahead=6)
        assert read == []
        for i in range(10):
            assert next(results).index == i
            assert len(read) <= i + 1 + 6
        results.close()
        assert not items_running()
        assert next(session.queue(boards(0, 2), lambda board: model(board[None]), 2)).index == 0


def test_an_error_in_one_item_does_not_end_the_others() -> None:
    model, given = Solver(), boards(5, 9)
    given[2] = given[2][:, :2]  # the embedding refuses it
    expected = alone(model, SPEC, given[:2] + given[3:])
    with haltkit.attach(model, SPEC, **BODY) as session:
        results = list(session.queue(given, lambda board: model(board[None]), 4))
    assert isinstance(results[2].error, RuntimeError)
    assert results[2].output is None
    assert int(results[2].outcome) == haltkit.Outcome.ABSENT
    for result, other in zip(results[:2] + results[3:], expected, strict=True):
        assert_same(result, other)


class Fails(nn.Module):
    """Refuses a state whose first number is large."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x[..., 0, 0].abs() > 0.4).any()):
            raise ArithmeticError("too far")
        return x * 0.9


def test_an_item_at_which_the_body_raises_is_told_apart_from_those_beside_it() -> None:
    model = Solver(Fails())
    given = boards(7, 12)
    wrong = []
    for board in given:
        try:
            with torch.no_grad():
                model(board[None])
            wrong.append(False)
        except ArithmeticError:
            wrong.append(True)
    assert 0 < sum(wrong) < len(wrong)
    with haltkit.attach(model, "fixed:steps=12", check=False, **BODY) as session:
        results = list(session.queue(given, lambda board: model(board[None]), 5))
    assert [isinstance(result.error, ArithmeticError) for result in results] == wrong


class Keeps(Solver):
    """Keeps its input on itself between the calls of its loop."""

    def forward(self, board: Tensor, n: int | None = None) -> dict[str, Tensor]:
        self.kept = self.embed(board)
        x = torch.zeros_like(self.kept)
        for _ in range(n or self.loops):
            x = self.core(torch.tanh(self.mix(torch.cat([x, self.kept], -1))))
        return {"answer": self.head(x), "state": x}


class Across(nn.Module):
    """Attends across the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class Centred(nn.Module):
    """Subtracts the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x - x.mean(0) + 0.3)


@pytest.mark.parametrize(
    ("model", "token"),
    [
        (lambda: Keeps(), "on itself"),
        (lambda: Solver(Centred()), "see each other"),
        (lambda: Solver(nn.Dropout(0.5)).train(), "see each other"),
    ],
    ids=["kept on the model", "mean of the batch", "random"],
)
def test_items_that_meet_are_refused(model: Callable[[], Solver], token: str) -> None:
    made = model()
    with haltkit.attach(made, SPEC, **BODY) as session, pytest.raises(RowsMeet, match=token):
        list(session.queue(boards(1, 6), lambda board: made(board[None]), 4))
    assert not items_running()


def test_what_a_queue_refuses() -> None:
    model = Solver()
    run = lambda board: model(board[None])  # noqa: E731
    with haltkit.attach(model, SPEC, **BODY) as session:
        for keys, token in (({"slots": 0}, "at least 1"), ({"slots": 4, "ahead": 3}, "ahead")):
            with pytest.raises(ValueError, match=token):
                session.queue([], run, **keys)
        first = session.queue(boards(0, 3), run, 2)
        next(first)
        with pytest.raises(ValueError, match="in progress"):
            next(session.queue(boards(0, 3), run, 2))
        first.close()
    with haltkit.attach(model, SPEC, observer=haltkit.Recorder(), **BODY) as session:
        with pytest.raises(ValueError, match="observer"):
            session.queue([], run)
        run(boards(0, 1)[0])
    with haltkit.attach(model, None, **BODY) as session:
        with pytest.raises(ValueError, match="only observes"):
            session.queue([], run)
        run(boards(0, 1)[0])


def test_a_first_item_of_its_own_shape_is_compared_too() -> None:
    """Items whose calls are never made together still take turns in the model's code."""
    model = Keeps()
    given = [boards(0, 1, 3)[0], *boards(1, 7, 5)]
    with haltkit.attach(model, SPEC, **BODY) as session, pytest.raises(RowsMeet, match="on itself"):
        list(session.queue(given, lambda board: model(board[None]), 4))


def test_items_run_in_the_mode_of_whoever_reads_the_queue() -> None:
    model = Solver(nn.Linear(WIDTH, WIDTH)).float()
    given = [board.float() for board in boards(2, 5)]
    with haltkit.attach(model, "fixed:steps=4", **BODY) as session, torch.autocast("cpu", dtype=torch.bfloat16):
        results = list(session.queue(given, lambda board: model(board[None]), 3))
    assert {result.output["answer"].dtype for result in results} == {torch.bfloat16}


class AutocastSolver(Solver):
    """Loops under autocast, which PyTorch keeps for each thread."""

    def forward(self, board: Tensor, n: int | None = None) -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(board.float(), n)


def test_calls_are_made_in_the_mode_of_the_items_own_thread() -> None:
    model = AutocastSolver(nn.Linear(WIDTH, WIDTH)).float()
    given, seen = boards(2, 5), list[torch.dtype]()
    model.core.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with haltkit.attach(model, "fixed:steps=4", **BODY) as session:
        results = list(session.queue(given, lambda board: model(board[None]), 3))
    assert all(result.error is None for result in results)
    assert set(seen) == {torch.bfloat16}


def test_boards_of_a_tiny_recursive_model() -> None:
    """The package's real code: one module in two roles, seven calls of it per step."""
    needs("tiny_recursive_model")
    from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel

    torch.manual_seed(0)
    model: Any = TinyRecursiveModel(
        dim=16,
        num_tokens=11,
        network=MLPMixer1D(dim=16, depth=1, seq_len=7),
        num_refinement_blocks=8,
        num_latent_refinements=6,
    )
    model = model.double().eval()
    start, given = model.get_initial(), list(torch.randint(0, 11, (9, 7)))
    run = lambda board: model(board[None], *start)[2]  # noqa: E731
    spec = "norm:tau=0.3,granularity=sequence"
    with torch.no_grad(), haltkit.attach(model, spec) as session:
        expected = [(run(board), session.steps["loop"]) for board in given]
    with haltkit.attach(model, spec) as session:
        for result in session.queue(given, run, 4):
            torch.testing.assert_close(result.output, expected[result.index][0], rtol=0, atol=1e-10)
            assert torch.equal(result.steps, expected[result.index][1])


def test_a_model_that_cannot_be_halted_ends_the_queue() -> None:
    class Drifts(Solver):
        def forward(self, board: Tensor, n: int | None = None) -> dict[str, Tensor]:
            x = e = self.embed(board)
            for _ in range(n or self.loops):
                x = x + 0.1 * self.core(torch.tanh(self.mix(torch.cat([x, e], -1))))
            return {"answer": self.head(x), "state": x}

    model = Drifts()
    with haltkit.attach(model, "fixed:steps=3", **BODY) as session, pytest.raises(AttachError):
        list(session.queue(boards(0, 4), lambda board: model(board[None]), 2))
    assert not items_running()
