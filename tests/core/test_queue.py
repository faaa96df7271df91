"""The queue: the same answers as a loop of one's own for each item, dense slots, bounded reading, errors as data."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import haltkit
from cases import SPECS
from haltkit import LoopStep, Outcome, QueueItem, QueueResult, Verdict
from haltkit.loop import LoopResult
from haltkit.slots import place
from maps import readout, wiggle

pytestmark = pytest.mark.slow

seeds = st.integers(0, 2**31)
NORM = haltkit.policy("norm:tau=0.05")


def rows(seed: int, count: int, *shape: int) -> list[Tensor]:
    """Items ``(*shape, 6)`` of sizes that differ by three orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (3 * torch.rand(count, generator=generator, dtype=torch.float64) - 2)
    return [size * torch.randn(*shape, 6, generator=generator, dtype=torch.float64) for size in sizes]


def halve(x: Tensor) -> Tensor:
    return x / 2


def alone(body: Any, x0: Tensor, policy: Any, inputs: tuple[Tensor, ...] = (), **keys: Any) -> LoopResult:
    """The slow reference: a loop over a batch of this one item."""
    stacked = [given.unsqueeze(0) for given in inputs]
    result = haltkit.run_loop(body, x0.unsqueeze(0), policy, inputs=stacked, **keys)
    return LoopResult(result.x[0], result.steps[0], result.outcome[0])


def assert_same(results: list[QueueResult], expected: list[LoopResult]) -> None:
    assert sorted(result.index for result in results) == list(range(len(expected)))
    for result in results:
        reference = expected[result.index]
        assert result.error is None
        assert torch.equal(result.steps, reference.steps)
        assert torch.equal(result.outcome, reference.outcome)
        torch.testing.assert_close(result.x, reference.x, rtol=0, atol=1e-13, equal_nan=True)


def count_reads(items: Any, seen: list[int]) -> Iterator[Any]:
    for i, item in enumerate(items):
        seen.append(i)
        yield item


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@given(seeds, st.integers(1, 9), st.integers(0, 20), st.booleans(), st.sampled_from(["current", "previous"]))
def test_every_row_gets_what_run_loop_gives_it_alone(
    spec: str, seed: int, slots: int, n: int, o: bool, keep: Any
) -> None:
    items, policy = rows(seed, n), haltkit.policy(spec)
    keys: dict[str, Any] = {"max_steps": 20, "readout": readout, "keep": keep}
    results = list(haltkit.run_queue(wiggle, items, policy, slots, ordered=o, **keys))
    assert_same(results, [alone(wiggle, x0, policy, **keys) for x0 in items])
    assert not o or [result.index for result in results] == list(range(n))


INSTANCES = [
    "norm:tau=0.05,granularity=sequence",
    "kl:tau=1e-3,granularity=sequence,pool=max",
    "accel:tau=0.05,granularity=sequence,min_steps=5,check_every=2",
    "any(speed:tau=0.02,granularity=sequence|fixed:steps=7)",
    "all(accel:tau=0.2|norm:tau=0.1):min_steps=4",
    "norm-rel:tau=0.03",
]


def mixing(x: Tensor, goal: Tensor) -> Tensor:
    """The rows of an instance see each other; a row that overflows reaches only those of its own instance."""
    return 0.5 * wiggle(x) + 0.1 * torch.tanh(x).mean(-2, keepdim=True) + goal


@pytest.mark.parametrize("spec", INSTANCES)
@given(seeds, st.integers(1, 5), st.sampled_from(["current", "previous"]), st.booleans())
def test_every_instance_gets_what_run_loop_gives_it_alone(spec: str, seed: int, slots: int, keep: Any, o: bool) -> None:
    """Instances of four rows, inputs of their own, a budget for each, and one that stops being finite."""
    items, policy = rows(seed, 11, 4), haltkit.policy(spec)
    goals, budgets = rows(seed + 1, 11, 4), [3 + (seed + i) % 9 for i in range(11)]
    goals[seed % 11][seed % 4, 1] = torch.inf
    queued = [QueueItem(*item) for item in zip(items, goals, budgets, strict=True)]
    keys: dict[str, Any] = {"max_steps": 10, "readout": readout, "keep": keep}
    results = list(haltkit.run_queue(mixing, queued, policy, slots, ordered=o, **keys))
    keys.pop("max_steps")
    expected = [alone(mixing, x0, policy, (goal,), max_steps=min(10, budget), **keys) for x0, goal, budget in queued]
    assert_same(results, expected)
    ends = torch.stack([result.outcome for result in results])
    assert (ends == Outcome.NONFINITE).any()


@given(seeds, st.integers(1, 4), st.integers(0, 9), st.integers(1, 5), st.integers(1, 8))
def test_wrappers_count_from_the_step_at_which_an_item_entered(
    seed: int, patience: int, min_steps: int, every: int, slots: int
) -> None:
    policy = haltkit.policy(f"norm:tau=0.2,patience={patience},min_steps={min_steps},check_every={every}")
    items = rows(seed, 15)
    results = list(haltkit.run_queue(wiggle, items, policy, slots, max_steps=20))
    assert_same(results, [alone(wiggle, x0, policy, max_steps=20) for x0 in items])


@pytest.mark.parametrize("keep", ["current", "previous"])
@pytest.mark.parametrize("spec", ["norm:tau=2", "fixed:steps=1", "fixed:steps=2", "norm:tau=2,min_steps=2"])
def test_a_newcomer_may_halt_at_its_first_step_and_hands_on_what_it_came_to(spec: str, keep: Any) -> None:
    items, policy = rows(5, 30), haltkit.policy(spec)
    results = list(haltkit.run_queue(wiggle, items, policy, 4, keep=keep))
    assert_same(results, [alone(wiggle, x0, policy, keep=keep) for x0 in items])
    assert min(int(result.steps) for result in results) == (2 if "=2," in spec or spec == "fixed:steps=2" else 1)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("spec", ["norm:tau=1e-3", "accel:tau=1e-3", "kl:tau=1e-6", "fixed:steps=9"])
def test_an_item_that_stops_being_finite_leaves_others_and_the_next_in_its_slot_alone(spec: str, poison: float) -> None:
    items, policy = rows(0, 12), haltkit.policy(spec)
    factors = [torch.full((6,), poison if i % 3 == 1 else 1.0, dtype=torch.float64) for i in range(12)]

    def body(x: Tensor, factor: Tensor) -> Tensor:
        return torch.where(x.norm(dim=-1, keepdim=True) < 3, factor, 1.0) * wiggle(x)

    keys: dict[str, Any] = {"max_steps": 30, "readout": readout}
    results = list(haltkit.run_queue(body, zip(items, factors, strict=True), policy, 3, **keys))
    assert_same(results, [alone(body, x0, policy, (f,), **keys) for x0, f in zip(items, factors, strict=True)])
    assert [int(result.outcome) == Outcome.NONFINITE for result in results] == [i % 3 == 1 for i in range(12)]
    assert all(result.x.isfinite().all() for result in results)


@dataclass
class Momentum:
    """A body with a memory per slot; ``gain`` is an input of the item."""

    velocity: Tensor | None = None
    gain: Tensor | None = None
    sizes: list[int] = field(default_factory=list)

    def admit(self, slots: Tensor, inputs: tuple[Tensor, ...]) -> None:
        (gain,) = inputs
        self.gain = place(self.gain, slots, gain)
        self.velocity = place(self.velocity, slots, torch.zeros(len(slots), 6, dtype=torch.float64))

    def select(self, kept: Tensor) -> None:
        assert self.velocity is not None
        assert self.gain is not None
        self.velocity, self.gain = self.velocity[kept], self.gain[kept]

    def step(self, x: Tensor, k: Tensor, active: Tensor) -> Tensor:
        assert self.velocity is not None
        assert self.gain is not None
        assert k.shape == active.shape == self.velocity.shape[:1]
        self.sizes.append(len(x))
        self.velocity = 0.5 * self.velocity + self.gain * (wiggle(x) - x) / k.unsqueeze(-1)
        return x + self.velocity


@given(seeds, st.integers(1, 8), st.booleans())
def test_a_body_with_memory_finds_a_fresh_one_in_each_slot(seed: int, slots: int, ordered: bool) -> None:
    items = rows(seed, 20)
    gains = [torch.full((1,), 0.2 + 0.04 * i, dtype=torch.float64) for i in range(20)]
    policy, body = haltkit.policy("accel:tau=0.02"), Momentum()
    queue = haltkit.run_queue(body, zip(items, gains, strict=True), policy, slots, ordered=ordered)
    results = list(queue)
    for result in results:
        x, own, k = items[result.index].unsqueeze(0), Momentum(), 0
        own.admit(torch.tensor([0]), (gains[result.index].unsqueeze(0),))
        reference = []
        for k in range(1, int(result.steps) + 1):
            x = own.step(x, torch.tensor([k]), torch.tensor([True]))
            reference.append(x[0])
        assert k == int(result.steps)
        torch.testing.assert_close(result.x, reference[-1], rtol=0, atol=1e-13)
        recorded = iter(reference)
        again = haltkit.run_loop(lambda x, recorded=recorded: next(recorded), items[result.index], policy, max_steps=k)
        assert int(again.steps) == k
        assert int(again.outcome) == int(result.outcome)
    assert body.velocity is not None
    assert len(body.velocity) == 0  # nothing is left of any item


def test_a_queue_that_is_given_up_leaves_a_body_with_memory_empty() -> None:
    body = Momentum()
    items = [(x0, torch.ones(1, dtype=torch.float64)) for x0 in rows(0, 20)]
    queue = haltkit.run_queue(body, items, NORM, 4)
    next(queue)
    queue.close()
    assert body.velocity is not None
    assert len(body.velocity) == 0
    assert len(list(haltkit.run_queue(body, items, NORM, 4))) == 20


def test_no_slot_is_empty_while_the_source_has_items_and_the_tail_shrinks() -> None:
    sizes: list[int] = []

    def body(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return halve(x)

    items = [QueueItem(torch.ones(2), budget=1 + i % 7) for i in range(40)]
    work = sum(1 + i % 7 for i in range(40))
    list(haltkit.run_queue(body, items, haltkit.policy("fixed:steps=9"), 5))
    assert sum(sizes) == work  # nothing is computed in vain
    full = sizes.index(next(n for n in sizes if n < 5))
    assert sizes[:full] == [5] * full
    assert sizes[full:] == sorted(sizes[full:], reverse=True)
    assert full > len(sizes) - 8


def test_an_unbounded_source_is_read_only_as_far_as_the_results_drawn_ask_for() -> None:
    for ordered, bound in ((True, 24), (False, 8)):
        seen: list[int] = []
        source = (QueueItem(torch.ones(2), budget=30 if i % 50 == 0 else 1 + i % 4) for i in itertools.count())
        policy = haltkit.policy("fixed:steps=30")
        queue = haltkit.run_queue(halve, count_reads(source, seen), policy, 4, ordered=ordered, ahead=24)
        assert not seen  # nothing before the first result is asked for
        for taken, result in enumerate(itertools.islice(queue, 300), start=1):
            assert int(result.steps) == (30 if result.index % 50 == 0 else 1 + result.index % 4)
            assert len(seen) <= taken - 1 + bound
            assert not ordered or result.index == taken - 1


def test_memory_is_bounded_by_what_runs_and_waits() -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def source() -> Iterator[Tensor]:
        for _ in range(400):
            x0 = torch.ones(3)
            alive.add(x0)
            yield x0

    for _ in haltkit.run_queue(halve, source(), haltkit.policy("fixed:steps=3"), 4, ahead=8):
        gc.collect(0)
        most = max(most, len(alive))
    assert most <= 8


def test_a_slow_item_does_not_keep_later_ones_from_running_up_to_ahead() -> None:
    items = [QueueItem(torch.ones(2), budget=20 if i == 0 else 1) for i in range(100)]
    seen: list[int] = []
    queue = haltkit.run_queue(halve, count_reads(items, seen), haltkit.policy("fixed:steps=20"), 4, ahead=10)
    assert next(queue).index == 0
    assert len(seen) == 10
    assert [result.index for result in queue] == list(range(1, 100))


@pytest.mark.parametrize("ordered", [True, False])
def test_an_item_whose_preparation_raises_is_reported_and_the_others_go_on(ordered: bool) -> None:
    def prepare(i: int) -> Tensor:
        if i % 4 == 2:
            raise KeyError(i)
        return torch.full((2,), float(i))

    found = list(haltkit.run_queue(halve, range(30), NORM, 3, prepare=prepare, ordered=ordered))
    assert sorted(result.index for result in found) == list(range(30))
    for result in found:
        if result.index % 4 == 2:
            assert isinstance(result.error, KeyError)
            assert result.error.args == (result.index,)
            assert int(result.outcome) == Outcome.ABSENT
            assert int(result.steps) == 0
            assert result.x.shape == (0,)
        else:
            assert result.error is None
            assert int(result.steps) == int(alone(halve, torch.full((2,), float(result.index)), NORM).steps)
    assert not ordered or [result.index for result in found] == list(range(30))


def test_a_source_of_failing_items_without_end_still_gives_results() -> None:
    def prepare(i: int) -> Tensor:
        raise RuntimeError("no")

    for ordered in (True, False):
        queue = haltkit.run_queue(halve, itertools.count(), NORM, 3, prepare=prepare, ordered=ordered)
        assert [result.index for result in itertools.islice(queue, 20)] == list(range(20))


def test_an_error_of_the_source_or_of_the_body_ends_the_queue() -> None:
    def source() -> Iterator[Tensor]:
        yield torch.ones(2)
        raise OSError("the disk")

    with pytest.raises(OSError, match="disk"):
        list(haltkit.run_queue(halve, source(), NORM, 3))

    def body(x: Tensor) -> Tensor:
        raise OSError("the body")

    with pytest.raises(OSError, match="body"):
        list(haltkit.run_queue(body, [torch.ones(2)], NORM, 3))


def test_an_empty_source_gives_nothing_and_does_not_call_the_body() -> None:
    def body(x: Tensor) -> Tensor:
        raise AssertionError

    for ordered in (True, False):
        assert list(haltkit.run_queue(body, [], NORM, ordered=ordered)) == []


def draw(body: Any = halve, items: Any = None, spec: str = "norm:tau=0.1", **keys: Any) -> None:
    list(haltkit.run_queue(body, rows(0, 5, 2) if items is None else items, haltkit.policy(spec), **keys))


class LoopOnly:
    def step(self, x: Tensor, k: int, active: Tensor) -> Tensor:
        return x


X = torch.ones(3)
REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "no slots": (lambda: draw(slots=0), "slots=0"),
    "no steps": (lambda: draw(max_steps=0), "max_steps=0"),
    "ahead below slots": (lambda: draw(slots=4, ahead=3), "ahead=3"),
    "keep": (lambda: draw(keep="newest"), "keep='newest'"),
    "batch": (lambda: draw(spec="norm:tau=1,granularity=batch"), "granularity=batch"),
    "batch inside": (lambda: draw(spec="any(norm:tau=1,granularity=batch|fixed:steps=2)"), "granularity=batch"),
    "world": (lambda: draw(spec="norm:tau=1,granularity=world"), "granularity=world"),
    "sequence of rows": (lambda: draw(items=[X], spec="norm:tau=1,granularity=sequence"), "granularity=sequence"),
    "unequal shapes": (lambda: draw(items=[X, X, torch.ones(4)]), "item 2 is"),
    "unequal inputs": (lambda: draw(lambda x, y: x, items=[(X, X), (X, torch.ones(2))]), "item 1 is"),
    "unequal number of inputs": (lambda: draw(lambda x, y: x, items=[(X, X), X]), "item 1 is"),
    "unequal dtype": (lambda: draw(items=[X, X.double()]), "item 1 is"),
    "later, in another cohort": (lambda: draw(items=[X] * 9 + [torch.ones(1, 3)], slots=2), "item 9 is"),
    "no tensor": (lambda: draw(items=[[1.0, 2.0]]), "item 0 is list"),
    "inputs that are no tensors": (lambda: draw(items=[(X, [3])]), "item 0"),
    "an input that is no tensor": (lambda: draw(items=[(X, 3)]), "item 0"),
    "no width": (lambda: draw(items=[torch.tensor(1.0)]), "item 0"),
    "budget": (lambda: draw(items=[(X, (), 0)]), "budget=0"),
    "body that changes the shape": (lambda: draw(lambda x: x[..., :1]), "must keep"),
    "body that changes the dtype": (lambda: draw(lambda x: x.float()), "must keep"),
    "body that returns a tuple": (lambda: draw(lambda x: (x,)), "must keep"),
    "body for one loop": (lambda: draw(LoopOnly()), "SlotBody"),
    "no readout": (lambda: draw(spec="kl:tau=1e-3"), "readout="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_queue_refuses(case: str) -> None:
    call, token = REFUSED[case]
    with pytest.raises(ValueError, match="^[^\n]+$") as caught:
        call()
    assert token in str(caught.value)


@dataclass(frozen=True)
class NeedsNumber:
    """A user's policy that was written for loops."""

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: LoopStep) -> tuple[None, Verdict]:
        score = step.step_norm
        return None, Verdict(score, score < 1.0 if step.k >= 3 else torch.zeros_like(score, dtype=torch.bool))


@dataclass(frozen=True)
class Fails:
    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: LoopStep) -> tuple[None, Verdict]:
        if torch.as_tensor(step.k).max() > 1:
            raise RuntimeError("of its own")
        return None, Verdict(step.step_norm, step.step_norm < 0)


@dataclass(frozen=True)
class Late:
    """Its state appears at the second step only."""

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: Tensor | None, step: LoopStep) -> tuple[Tensor | None, Verdict]:
        late = step.step_norm if isinstance(step.k, Tensor) else None
        return late, Verdict(step.step_norm, step.step_norm < 0.1)


def test_a_policy_that_needs_one_step_number_is_told_apart_from_one_that_fails() -> None:
    with pytest.raises(ValueError, match=r"NeedsNumber needs step\.k to be one number"):
        list(haltkit.run_queue(halve, rows(0, 9), NeedsNumber(), 3))
    with pytest.raises(RuntimeError, match="of its own"):
        list(haltkit.run_queue(halve, rows(0, 9), Fails(), 3))
    with pytest.raises(ValueError, match="another structure"):
        list(haltkit.run_queue(halve, rows(0, 9), Late(), 3))


def test_the_readout_runs_at_most_once_per_step_and_only_if_asked() -> None:
    calls: list[int] = []
    steps: list[int] = []

    def counting(x: Tensor) -> Tensor:
        calls.append(len(x))
        return readout(x)

    def body(x: Tensor) -> Tensor:
        steps.append(len(x))
        return wiggle(x)

    both = haltkit.policy("any(kl:tau=1e-3|kl:tau=1e-3,direction=previous_current)")
    list(haltkit.run_queue(body, rows(0, 30), both, 4, readout=counting))
    assert calls == steps
    calls.clear()
    list(haltkit.run_queue(body, rows(0, 30), NORM, 4, readout=counting))
    assert not calls


def test_no_graph_is_kept_and_the_consumer_keeps_its_gradient_mode() -> None:
    weight = torch.full((3,), 0.5, requires_grad=True)
    for result in haltkit.run_queue(lambda x: weight * x, torch.randn(9, 3), NORM, 2):
        assert torch.is_grad_enabled()
        assert not result.x.requires_grad


def test_a_body_may_write_into_the_state_and_return_one_buffer_at_every_step() -> None:
    items, policy = rows(0, 20), haltkit.policy("accel:tau=0.05")
    expected = [alone(wiggle, x0, policy) for x0 in items]
    buffer = torch.empty(3, 6, dtype=torch.float64)

    def in_place(x: Tensor) -> Tensor:
        return x.copy_(wiggle(x))

    def buffered(x: Tensor) -> Tensor:
        return buffer[: len(x)].copy_(wiggle(x))

    for body in (in_place, buffered):
        assert_same(list(haltkit.run_queue(body, items, policy, 3)), expected)
        with torch.inference_mode():
            assert_same(list(haltkit.run_queue(body, items, policy, 3)), expected)


def test_a_body_that_returns_its_own_buffer_finds_it_unchanged() -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def body(x: Tensor) -> Tensor:
        new = halve(x)
        kept.append((new, new.clone()))
        return new

    items = rows(0, 20)
    copies = [item.clone() for item in items]
    list(haltkit.run_queue(body, items, NORM, 3))
    assert all(torch.equal(new, copy) for new, copy in kept)
    assert all(torch.equal(item, copy) for item, copy in zip(items, copies, strict=True))


def test_the_example_of_the_docstring_runs() -> None:
    lines = (haltkit.run_queue.__doc__ or "").splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith("::"))
    block = itertools.takewhile(lambda line: not line or line.startswith(" " * 8), lines[start + 1 :])
    space: dict[str, Any] = {}
    exec("\n".join(line[8:] for line in block), space)
    assert space["result"].index == 999
