"""Rows that leave the body of a foreign model: each gets what it gets alone, and only running rows are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from cases import WIDTH, Refiner, needs
from haltkit.attachment import proving
from haltkit.attachment.errors import AttachError, BatchNotFound, RowsMeet
from standins import Counting, SlotCache

DEPTHS = [3, 1, 6, 2, 6, 4]  # of the entries of a batch; the model below runs at most 8
LOOPS = 8


@dataclass(frozen=True)
class Drawn:
    """Halts each entry of the batch at a step drawn for it."""

    depths: tuple[int, ...]

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: haltkit.LoopStep) -> tuple[None, haltkit.Verdict]:
        depths = torch.tensor(self.depths).view(-1, *[1] * (step.x.ndim - 2))
        left = (depths - step.k).expand(step.x.shape[:-1])
        return None, haltkit.Verdict(left.float(), left <= 0)


class Looped(nn.Module):
    """A loop around one module that is called with whatever else ``extra`` names."""

    def __init__(self, body: nn.Module, *extra: Any, **keywords: Any) -> None:
        super().__init__()
        self.body, self.extra, self.keywords = body, extra, keywords

    def forward(self, x: Tensor, n: int = LOOPS) -> Tensor:
        for _ in range(n):
            out = self.body(x, *self.extra, **self.keywords)
            x = out[0] if isinstance(out, tuple) else out
        return x


class TwoOutputs(nn.Module):
    """Gives the state and, sequence first, something beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor, shift: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.tanh(self.map(x) + shift) * scale
        return new, new.transpose(0, 1)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, dropout=0.0, dtype=torch.float64)
    return layer.eval()


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def models() -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    torch.manual_seed(0)
    batch = len(DEPTHS)
    return {
        "one map": lambda: (nn.Linear(WIDTH, WIDTH, dtype=torch.float64), values(batch, WIDTH)),
        "attention inside the entries": lambda: (encoder(), values(batch, 5, WIDTH)),
        "as many tokens as entries": lambda: (encoder(), values(batch, batch, WIDTH)),
    }


def at_their_depths(model: nn.Module, x: Tensor) -> Tensor:
    """The slow obvious way: each entry alone, with its number of loops."""
    return torch.cat([model(x[i : i + 1], depth) for i, depth in enumerate(DEPTHS)])


@torch.no_grad()
@pytest.mark.parametrize("case", models())
def test_each_entry_gets_what_it_gets_alone(case: str) -> None:
    body, x = models()[case]()
    model = Looped(counting := Counting(body))
    alone = at_their_depths(model, x)
    with haltkit.attach(model, Drawn(tuple(DEPTHS)), body=["body"], execution="compact") as session:
        model(x)  # the first loop also finds the batch
        counting.seen.clear()
        out = model(x)
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-12)
    steps = session.steps["loop"]
    assert steps.reshape(len(DEPTHS), -1)[:, 0].tolist() == DEPTHS
    assert counting.seen == [sum(depth >= k for depth in DEPTHS) for k in range(1, max(DEPTHS) + 1)]


@torch.no_grad()
def test_arguments_and_outputs_leave_along_their_own_dimension() -> None:
    batch = len(DEPTHS)
    shift, scale = values(batch, 5, WIDTH), values(WIDTH)  # one for each entry, and one for all
    x = values(batch, 5, WIDTH)
    model = Looped(body := TwoOutputs(), shift, scale=scale)
    alone = torch.cat([Looped(body, shift[i : i + 1], scale=scale)(x[i : i + 1], d) for i, d in enumerate(DEPTHS)])
    with haltkit.attach(model, Drawn(tuple(DEPTHS)), body=["body"], execution="compact"):
        for _ in range(2):
            torch.testing.assert_close(model(x), alone, rtol=0, atol=1e-12)


@torch.no_grad()
def test_an_argument_that_entries_have_apart_may_be_shared_in_the_next_call() -> None:
    batch, x, scale = len(DEPTHS), values(len(DEPTHS), 5, WIDTH), values(WIDTH)
    apart = values(batch, 5, WIDTH)
    model = Looped(body := Counting(TwoOutputs()), apart, scale=scale)
    with haltkit.attach(model, Drawn(tuple(DEPTHS)), body=["body"], execution="compact"):
        for shift in (apart[:1], apart, apart[:1], apart):
            model.extra = (shift,)
            found = model(x)
            expected = []
            for entry, own, depth in zip(x.split(1), shift.expand(batch, 5, WIDTH).split(1), DEPTHS, strict=True):
                for _ in range(depth):
                    entry, _ = body.inner(entry, own, scale=scale)
                expected.append(entry)
            torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-12)


def test_gradients_are_those_of_each_entry_alone() -> None:
    model, x = Looped(encoder()), values(len(DEPTHS), 5, WIDTH)
    weights = list(model.parameters())
    expected = torch.autograd.grad(at_their_depths(model, x).square().sum(), weights)
    with haltkit.attach(model, Drawn(tuple(DEPTHS)), body=["body"], execution="compact"):
        for _ in range(2):
            found = torch.autograd.grad(model(x).square().sum(), weights)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_verify_proves_that_rows_can_leave() -> None:
    model, x = Looped(encoder()), values(4, 5, WIDTH)
    report = haltkit.verify(model, lambda: model(x), 3, lambda k: model(x, k), body=["body"], execution="compact")
    assert report.ok
    assert report.others["loop"] is not None


@torch.no_grad()
def test_equal_rows_prove_nothing() -> None:
    """Attention across the batch gives equal rows what it gives them alone; the next batch tells."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, dtype=torch.float64).eval()  # the batch is second
    model, same = Looped(layer), values(1, 4, WIDTH).expand(6, 4, WIDTH)
    with haltkit.attach(model, f"fixed:steps={LOOPS}", body=["body"], execution="compact"):
        model(same)
        with pytest.raises(RowsMeet, match="see each other"):
            model(values(6, 4, WIDTH))


class Folded(nn.Module):
    """Keeps its input to itself: the body is given nothing with a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(LOOPS):
            x = self.body(x.reshape(1, -1, WIDTH)).view_as(x)
        return x


@torch.no_grad()
@pytest.mark.parametrize(
    ("body", "extra", "error", "token"),
    [
        (nn.BatchNorm1d(WIDTH), (), RowsMeet, "batch norm"),
        (nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0).eval(), (), RowsMeet, "see each other"),
        (nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.5, batch_first=True), (), RowsMeet, "model.eval()"),
    ],
    ids=["batch norm in training", "attention across the batch", "dropout"],
)
def test_rows_that_meet_are_refused(
    body: nn.Module, extra: tuple[Any, ...], error: type[AttachError], token: str
) -> None:
    model = Looped(body, *extra)
    x = torch.randn(6, 4, WIDTH) if not isinstance(body, nn.BatchNorm1d) else torch.randn(6, WIDTH)
    with (
        haltkit.attach(model, Drawn(tuple(DEPTHS)), body=["body"], execution="compact"),
        pytest.raises(error, match=token.replace("(", r"\(").replace(")", r"\)")),
    ):
        model(x)


@torch.no_grad()
@pytest.mark.parametrize("function", ["gathered", "matching", "same_rows"])
def test_an_error_of_our_own_is_not_taken_for_a_batch_that_does_not_fit(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise NameError("ours")

    monkeypatch.setattr(proving, function, broken)
    model = Looped(nn.Linear(WIDTH, WIDTH))
    with (
        haltkit.attach(model, Drawn(tuple(DEPTHS)), body=["body"], execution="compact"),
        pytest.raises(NameError, match="ours"),
    ):
        model(torch.randn(6, WIDTH))


@torch.no_grad()
def test_a_batch_that_is_no_dimension_is_refused() -> None:
    model = Folded()
    loop = haltkit.Loop(
        ["body"],
        select=lambda out: out.view(6, 2, WIDTH),
        put=lambda out, x: x.reshape(out.shape),
        initial=lambda args, kwargs: args[0].view(6, 2, WIDTH),
    )
    with (
        haltkit.attach(model, Drawn(tuple(DEPTHS)), loop, execution="compact"),
        pytest.raises(BatchNotFound, match="dimension of 6"),
    ):
        model(torch.randn(6, 2, WIDTH))


class Remembering(nn.Module):
    """Writes what it is given into a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.k = nn.Linear(WIDTH, WIDTH), 0

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        self.k += 1
        cache.update(x, x, self.k)
        new: Tensor = self.map(x)
        return new


@torch.no_grad()
def test_a_cache_is_refused() -> None:
    model = Looped(Remembering(), SlotCache())
    with (
        haltkit.attach(model, Drawn(tuple(DEPTHS)), body=["body"], execution="compact"),
        pytest.raises(RowsMeet, match="cache"),
    ):
        model(torch.randn(6, 1, 2, WIDTH))


@pytest.mark.parametrize(
    ("policy", "options", "token"),
    [
        ("norm:tau=0.1,granularity=batch", {}, "granularity=batch"),
        ("norm:tau=0.1", {"kv": "freeze"}, "kv="),
        ("norm:tau=0.1", {"execution": "compressed"}, "'masked' and 'compact'"),
    ],
)
def test_what_compact_execution_cannot_do_is_refused(policy: str, options: dict[str, Any], token: str) -> None:
    with pytest.raises(ValueError, match=token):
        haltkit.attach(Refiner(), policy, body=["core"], **{"execution": "compact", **options})


@torch.no_grad()
def test_a_tiny_recursive_model_gives_each_board_what_it_gets_alone() -> None:
    needs("tiny_recursive_model")
    from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel

    torch.manual_seed(0)
    model: Any = TinyRecursiveModel(
        dim=16,
        num_tokens=50,
        network=MLPMixer1D(dim=16, depth=1, seq_len=7),
        num_refinement_blocks=LOOPS,
        num_latent_refinements=3,
    ).eval()
    boards = torch.randint(0, 50, (len(DEPTHS), 7))
    start = model.get_initial()
    alone = []
    for board, depth in zip(boards, DEPTHS, strict=True):
        model.num_refinement_blocks = depth
        alone.append(model(board[None], *start))
    model.num_refinement_blocks = LOOPS
    with haltkit.attach(model, Drawn(tuple(DEPTHS)), execution="compact"):
        for _ in range(2):
            together = model(boards, *start)
            for part in range(3):  # outputs, latents, predictions
                expected = torch.cat([single[part] for single in alone])
                torch.testing.assert_close(together[part], expected, rtol=0, atol=1e-5)


class Transposing(nn.Module):
    """Carries its state and, sequence first, a second one; counts its calls, in two ways, and draws random numbers."""

    counted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.map, self.other, self.calls = encoder(), nn.Linear(WIDTH, WIDTH, dtype=torch.float64), 0
        self.register_buffer("counted", torch.zeros(()))

    def forward(self, x: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        self.counted += 1
        torch.rand(3)
        new = torch.tanh(self.map(x) + beside.transpose(0, 1))
        return new, torch.tanh(self.other(new)).transpose(0, 1) + 0.5 * beside


class Carrying(nn.Module):
    """A loop around :class:`Transposing`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = Transposing()

    def forward(self, x: Tensor, n: int = LOOPS) -> Tensor:
        beside = torch.zeros_like(x.transpose(0, 1))
        for _ in range(n):
            x, beside = self.body(x, beside)
        return x + beside.transpose(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("execution", ["masked", "compact"])
@pytest.mark.parametrize("tokens", [5, len(DEPTHS)])
def test_a_second_state_is_kept_along_its_own_dimension(tokens: int, execution: Any) -> None:
    model, x = Carrying(), values(len(DEPTHS), tokens, WIDTH)
    alone = at_their_depths(model, x)
    with haltkit.attach(model, Drawn(tuple(DEPTHS)), body=["body"], execution=execution):
        for _ in range(2):
            torch.testing.assert_close(model(x), alone, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_trials_leave_random_numbers_and_counters_as_they_were(execution: Any) -> None:
    model, x = Carrying(), values(len(DEPTHS), 5, WIDTH)
    torch.manual_seed(1)
    model(x, max(DEPTHS))
    expected = torch.rand(3)
    torch.manual_seed(1)
    model.body.calls = 0
    model.body.counted.zero_()
    with haltkit.attach(model, Drawn(tuple(DEPTHS)), body=["body"], execution=execution):
        model(x)
    assert model.body.calls == max(DEPTHS)
    assert model.body.counted == max(DEPTHS)
    assert torch.equal(torch.rand(3), expected)


@torch.no_grad()
def test_rows_that_meet_keep_their_state_alone_in_masked_execution() -> None:
    """Attention across the batch: no entry can be computed apart, so nothing but the state is known to be its own."""
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, dtype=torch.float64).eval()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            new: Tensor = self.layer(x)
            return new, new.mean(1)

    model, x = Looped(Both()), values(len(DEPTHS), 5, WIDTH)
    h = x
    depths = torch.tensor(DEPTHS).view(-1, 1, 1)
    for k in range(max(DEPTHS)):
        h = torch.where(depths > k, model.body(h)[0], h)
    with haltkit.attach(model, Drawn(tuple(DEPTHS)), body=["body"]):
        for _ in range(2):
            assert torch.equal(model(x), h)


class Lengths(nn.Module):
    """Masks each entry by its length, which is given as a number in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor, lengths: Any) -> Tensor:
        new = torch.tanh(self.map(x))
        for row, length in enumerate(lengths[: len(x)]):
            new[row, length:] = 0
        return new


@torch.no_grad()
def test_a_list_of_one_number_per_entry_is_refused() -> None:
    """Where the entries tried have the same length, a trial proves nothing about the others."""
    lengths = [4, 4, 2, 4, 3, 4]
    model, x = Looped(Lengths(), lengths), values(len(DEPTHS), 4, WIDTH)
    with (
        haltkit.attach(model, Drawn(tuple(DEPTHS)), body=["body"], execution="compact"),
        pytest.raises(BatchNotFound, match="a list of 6 numbers"),
    ):
        model(x)
    alone = torch.cat([Looped(model.body, [n])(x[i : i + 1], DEPTHS[i]) for i, n in enumerate(lengths)])
    with haltkit.attach(model, Drawn(tuple(DEPTHS)), body=["body"]):
        assert torch.equal(model(x), alone)


class Graph(nn.Module):
    """Nodes that read their neighbours, by number."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__()
        self.map, self.seen = nn.Linear(WIDTH, WIDTH, dtype=torch.float64), seen

    def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(len(x))
        gathered = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
        new = torch.tanh(self.map(gathered))
        return new, new.sum(-1)


@torch.no_grad()
@pytest.mark.parametrize("edges", [len(DEPTHS), 9])
def test_rows_that_are_read_by_number_are_never_tried_without_each_other(edges: int) -> None:
    """An index beyond the end is an error that a process with a GPU does not survive."""
    drawn, seen = torch.Generator().manual_seed(0), list[int]()
    pairs = torch.randint(0, len(DEPTHS), (2, edges), generator=drawn)
    model, x = Looped(Graph(seen), pairs), values(len(DEPTHS), WIDTH)
    expected, depths = x, torch.tensor(DEPTHS).unsqueeze(-1)
    for k in range(1, max(DEPTHS) + 1):
        expected = torch.where(depths >= k, model.body(expected, pairs)[0], expected)
    with haltkit.attach(model, Drawn(tuple(DEPTHS)), body=["body"]):
        assert torch.equal(model(x), expected)
    with (
        haltkit.attach(model, Drawn(tuple(DEPTHS)), body=["body"], execution="compact"),
        pytest.raises(RowsMeet, match="see each other"),
    ):
        model(x)
    assert set(seen) == {len(DEPTHS)}
