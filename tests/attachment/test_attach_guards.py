"""What would be silently wrong is an error: drifting glue, a state that is not carried, and what only looks steady."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from cases import STEPS, WIDTH, Refiner
from haltkit.attachment import errors


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1))


class Momentum(nn.Module):
    """The first module is fed a constant; what moves is kept in locals and mixed by glue."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.core = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
        h = v = torch.zeros_like(x)
        for _ in range(n):
            v = 0.9 * v + torch.tanh(self.core(self.inject(x) + h))
            h = h + 0.1 * v
        return h


@torch.no_grad()
def test_a_momentum_behind_a_constant_first_input_is_seen_to_drift(x: Tensor) -> None:
    model = Momentum().eval()
    keys: dict[str, Any] = {"body": ["inject", "core"], "initial": None}
    for run_at in (None, lambda k: model(x, k)):
        with pytest.raises(errors.GlueDrift, match="'core'"):
            haltkit.verify(model, lambda: model(x), 4, run_at, **keys)
    with pytest.raises(errors.GlueDrift, match="'core'"), haltkit.attach(model, "fixed:steps=4", **keys):
        model(x)


class Injected(nn.Module):
    """The input is projected anew at each step, and the state is added to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inject, self.core = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
        h = torch.zeros_like(x)
        for _ in range(n):
            h = torch.tanh(self.core(self.inject(x) + h))
        return h


@torch.no_grad()
def test_inputs_that_never_move_prove_nothing(x: Tensor) -> None:
    model, momentum = Injected().eval(), Momentum().eval()
    report = haltkit.verify(model, lambda: model(x), 4, body=["inject", "core"], initial=None)
    assert (report.drift, report.steady, report.constant) == ({"loop": 0}, {"loop": ["core"]}, {"loop": ["inject"]})
    assert report.ok
    assert "constant throughout, which proves nothing: inject" in str(report)
    with pytest.raises(errors.GlueDrift):  # with the injection alone nothing drifts, and the output tells
        haltkit.verify(momentum, lambda: momentum(x), 4, body=["inject"], initial=None)
    twice = nn.Sequential(nn.Identity(), Repeating())
    report = haltkit.verify(twice, lambda: twice(x), 4, body=["1.core"], initial=None)
    assert (report.drift, report.steady, report.ok) == ({"loop": None}, {"loop": []}, False)


class Repeating(nn.Module):
    """Computes the same in every step: nothing that could be seen to be steady."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(STEPS):
            y = self.core(x)
        return y


class Gated(nn.Module):
    """After each step an exit gate looks at the state; nothing reads it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
        h = x
        for _ in range(n):
            h = torch.tanh(self.core(h))
            self.exits = self.gate(h)
        return h


@torch.no_grad()
def test_a_state_that_the_next_step_does_not_read_is_refused(x: Tensor) -> None:
    model = Gated().eval()

    def run_at(k: int) -> Tensor:
        return model(x, k)

    for k in (2, 5, STEPS - 1):
        with pytest.raises(errors.StateNotCarried, match="'gate'"):
            haltkit.verify(model, lambda: model(x), k, run_at, body=["core", "gate"], initial=None)
        report = haltkit.verify(model, lambda: model(x), k, run_at, body=["core", "gate"], state="core")
        assert report.ok
        assert report.others == {"loop": 0}


@torch.no_grad()
def test_entries_of_a_batch_that_meet_are_seen_by_halting_one(x: Tensor) -> None:
    class Meeting(Refiner):
        def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
            for _ in range(n):
                x = self.core(x)
            return x

    class Mixed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x) + x.mean(0, keepdim=True))

    model = Meeting().eval()
    model.core = Mixed(WIDTH, WIDTH)
    report = haltkit.verify(model, lambda: model(x), 4, lambda k: model(x, k), body=["core"])
    assert report.halted == 0
    assert report.others["loop"] is not None
    assert report.others["loop"] > 1e-3
    assert not report.ok
    alone = haltkit.verify(model, lambda: model(x[:1]), 4, lambda k: model(x[:1], k), body=["core"])
    assert alone.others == {"loop": None}
    assert alone.ok


class OverTime(nn.Module):
    """A recurrence over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.RNNCell(WIDTH, WIDTH)

    def forward(self, sequence: Tensor) -> Tensor:
        h = torch.zeros(sequence.shape[1], WIDTH)
        for item in sequence:
            h = self.cell(item, h)
        return h


@torch.no_grad()
def test_the_first_halted_pass_of_a_session_is_checked_and_only_that(x: Tensor) -> None:
    sequence, model = torch.randn(STEPS, 3, WIDTH), OverTime().eval()
    with haltkit.attach(model, "fixed:steps=3", body=["cell"], initial=1), pytest.raises(errors.VaryingInput):
        model(sequence)
    glued = Refiner(lambda core, h: h + 0.3 * torch.tanh(core(h))).eval()
    with haltkit.attach(glued, "fixed:steps=4", body=["core"]), pytest.raises(errors.GlueDrift, match="check=False"):
        glued(x)
    with haltkit.attach(glued, "fixed:steps=4", body=["core"], check=False):
        assert not torch.equal(glued(x), glued.head(x))
    # A loop-index embedding changes the input, and a halt is exact all the same: only a comparison tells.
    indexed = Indexed().eval()
    with (
        haltkit.attach(indexed, "fixed:steps=4", body=["core"]),
        pytest.raises(errors.AttachError, match="check=False"),
    ):
        indexed(x)
    with haltkit.attach(indexed, "fixed:steps=4", body=["core"], check=False):
        halted = indexed(x)
    assert torch.equal(halted, indexed(x, 4))
    assert haltkit.verify(indexed, lambda: indexed(x), 4, lambda k: indexed(x, k), body=["core"]).halted == 0
    # Later loops are not watched: what the check costs, it costs once.
    model2, copies = Refiner().eval(), []
    with haltkit.attach(model2, "fixed:steps=4", body=["core"]) as session:
        for _ in range(3):
            model2(x)
            copies.append(session.watched()["loop"].replayed if session.watched() else 0)
    assert copies == [STEPS - 4, 0, 0]


class Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core, self.index = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(STEPS, WIDTH))

    def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
        for k in range(n):
            x = torch.tanh(self.core(x + self.index[k]))
        return x


class PairOut(nn.Module):
    """Returns the state first in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.linear(x)), x.sum()


@torch.no_grad()
@pytest.mark.parametrize("body", [["map"], ["map", "core"]])
@pytest.mark.parametrize("spec", ["fixed:steps=4", "norm:tau=0.2,granularity=sequence"])
def test_identity_keeps_the_type_of_an_output_that_is_a_tuple(x: Tensor, body: list[str], spec: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.map, self.core = PairOut(), nn.Linear(WIDTH, WIDTH)
            self.two = len(body) == 2

        def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
            for _ in range(n):
                h, _ = self.map(x)
                x = self.core(h) if self.two else h
            return x

    model = Model().eval()
    sizes = torch.tensor([0.01, 1.0]).view(2, 1, 1)
    with haltkit.attach(model, spec, body=body, on_halt={"map": "identity"}) as session:
        halted = model(sizes * x)
    assert halted.shape == x.shape
    if body == ["map"]:
        own = haltkit.run_loop(lambda h: model.map(h)[0], sizes * x, haltkit.policy(spec), max_steps=STEPS)
        assert torch.equal(session.steps["loop"], own.steps)
        assert torch.equal(halted, own.x)


class AddsInPlace(nn.Linear):
    """A body that changes what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        x += 0.1 * torch.tanh(super().forward(x))
        return x


class ReturnsNew(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.tanh(super().forward(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("spec", ["fixed:steps=4", "norm:tau=0.15", "norm:tau=0.15,granularity=sequence"])
def test_bodies_and_glue_that_work_in_place_are_right_with_copies(x: Tensor, spec: str, mode: Any) -> None:
    def glue(core: nn.Module, h: Tensor) -> Tensor:
        h = core(h)
        h += 0.05
        return h

    x = torch.logspace(-2, 1, 4).view(1, 4, 1) * x
    for body, between in ((AddsInPlace, None), (nn.Linear, glue)):
        model, pure = Refiner(between).eval(), Refiner().eval()
        model.core, pure.core = body(WIDTH, WIDTH), (ReturnsNew if between is None else nn.Linear)(WIDTH, WIDTH)
        pure.core.load_state_dict(model.core.state_dict())
        if mode is torch.no_grad:
            with (
                mode(),
                pytest.raises(errors.MutatedOutput, match="copies=True"),
                haltkit.attach(model, spec, body=["core"]),
            ):
                model(x.clone())
        with mode(), haltkit.attach(model, spec, body=["core"], copies=True) as session:
            out = model(x.clone())
        with torch.no_grad():
            steps = session.steps["loop"]
            h, held = x, x
            for k in range(1, STEPS + 1):  # by hand, out of place: a halted row keeps the state that it halted with
                held = torch.where((steps >= k).unsqueeze(-1), pure.core(h), held)
                h = held if between is None else held + 0.05
            assert torch.equal(out, model.head(h))
            own = haltkit.run_loop(_once(pure.core, between is not None), x, haltkit.policy(spec), max_steps=STEPS)
            assert torch.equal(steps, own.steps)


def _once(core: nn.Module, glued: bool) -> Any:
    """The same body without anything in place, the glue at the beginning of every step but the first."""
    taken = 0

    def body(h: Tensor) -> Tensor:
        nonlocal taken
        taken += 1
        out: Tensor = core(h + 0.05 if glued and taken > 1 else h)
        return out

    return body


@torch.no_grad()
def test_a_trajectory_prints_in_a_line(x: Tensor) -> None:
    model = Refiner().eval()
    with haltkit.attach(model, "fixed:steps=4", body=["core"], observer=haltkit.Recorder()) as session:
        model(x)
    text = repr(session.trajectory)
    assert text == "Trajectory(loop: RegionTrajectory(4 steps, states (5, 2, 4, 8) float32))"


class Averaged(nn.Module):
    """The output is an average over all states, kept beside the loop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core, self.weigh = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, n: int = STEPS, weighed: bool = False) -> Tensor:
        total = torch.zeros_like(x)
        for _ in range(n):
            x = torch.tanh(self.core(x))
            total = total + self.weigh(x) if weighed else 0.5 * total + x
        return total


@torch.no_grad()
def test_what_the_model_sums_up_beside_its_loop_is_seen_without_a_comparison(x: Tensor) -> None:
    model = Averaged().eval()
    with pytest.raises(errors.GlueDrift, match="sums something up"):
        haltkit.verify(model, lambda: model(x), 4, body=["core"])
    keys: dict[str, Any] = {"body": ["core", "weigh"], "state": "core"}
    with pytest.raises(errors.GlueDrift, match="sums something up"):
        haltkit.verify(model, lambda: model(x, weighed=True), 4, **keys)
    report = haltkit.verify(
        model, lambda: model(x, weighed=True), 4, lambda k: model(x, k, True), on_halt={"weigh": "zero"}, **keys
    )
    assert (report.ok, report.beside, report.halted) == (True, 0, 0)


class TwoStates(nn.Module):
    """Carries a memory beside its state; ``folded``: the memory sees tokens of all entries as one batch."""

    def __init__(self, folded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.memory, self.core, self.folded = nn.GRUCell(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), folded

    def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
        h = torch.zeros_like(x.flatten(0, 1) if self.folded else x)
        for _ in range(n):
            h = self.memory(x.reshape(h.shape), h)
            x = torch.tanh(0.5 * self.core(x) + 0.5 * h.reshape(x.shape))
        return h.reshape(x.shape)


@torch.no_grad()
def test_an_entry_that_halts_keeps_what_its_loop_carries_beside_the_state() -> None:
    model, x = TwoStates(folded=False).eval(), torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    run, body = lambda: model(x), {"body": ["memory", "core"], "initial": None}
    for execution in ("masked", "compact"):
        report = haltkit.verify(model, run, 4, lambda k: model(x, k), execution=execution, **body)
        assert report.ok
        assert report.alone is not None


@torch.no_grad()
def test_entries_that_cannot_keep_what_their_loop_carries_are_seen_not_to_halt_alone() -> None:
    model, x = TwoStates(folded=True).eval(), torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    run, body = lambda: model(x), {"body": ["memory", "core"], "initial": None}
    report = haltkit.verify(model, run, 4, lambda k: model(x, k), **body)
    assert report.halted == 0
    assert report.together
    assert not report.ok
    assert "granularity=batch" in str(report)
    assert haltkit.verify(model, run, 4, lambda k: model(x, k), rows=False, **body).ok
    for spec, right in (("norm:tau=0.1,granularity=batch", True), ("norm:tau=0.1", False)):
        with haltkit.attach(model, spec, **body) as session:
            assert session.verify(run, 4, lambda k: model(x, k)).ok is right
            run()
    found = haltkit.discover(model, run, lambda k: model(x, k))
    assert found.candidates[0].together
    assert "granularity=batch" in found.candidates[0].verdict
    one = Refiner().eval()
    states = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    assert haltkit.verify(one, lambda: one(states), 4, lambda k: one(states, k), body=["core"]).alone == 0


class UntilSettled(nn.Module):
    """Ends by a residual that it computes beside its body."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = x
        while (torch.tanh(0.5 * (z @ self.core.weight.T)) + x - z).norm() > 1e-4:
            z = torch.tanh(0.5 * self.core(z)) + x
        return z


@torch.no_grad()
def test_a_loop_that_would_not_end_after_the_halt_is_refused(x: Tensor) -> None:
    model = UntilSettled().eval()
    with (
        haltkit.attach(model, "norm:tau=0.05,granularity=batch", body=["core"], initial=None),
        pytest.raises(errors.NeverEnds, match="residual"),
    ):
        model(x)
    assert "NeverEnds" in haltkit.discover(model, lambda: model(x)).candidates[0].problem


class Siamese(nn.Module):
    """Runs its loop on two inputs in one call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.core = nn.Linear(WIDTH, WIDTH)

    def refine(self, h: Tensor, n: int) -> Tensor:
        for _ in range(n):
            h = torch.tanh(self.core(h))
        return h

    def forward(self, a: Tensor, b: Tensor, n: int = STEPS) -> Tensor:
        return self.refine(a, n) * self.refine(b, n)


@torch.no_grad()
def test_a_second_loop_in_the_same_call_is_noticed(x: Tensor) -> None:
    model, other = Siamese().eval(), torch.randn_like(x)
    with haltkit.attach(model, "fixed:steps=3", body=["core"]), pytest.raises(errors.AttachError):
        model(x, other)
    with haltkit.attach(model, "fixed:steps=3", body=["core"], scope=":refine"):
        assert torch.equal(model(x, other), model(x, other, 3))


@torch.no_grad()
def test_discover_proposes_what_attach_accepts(x: Tensor) -> None:
    """An embedding of the step number changes what the body is given, and a halt is right all the same."""
    model = Indexed().eval()
    best = haltkit.discover(model, lambda: model(x), lambda k: model(x, k)).candidates[0]
    assert "check=False" in best.call()
    with haltkit.attach(model, "fixed:steps=4", **best.fields()):
        assert torch.equal(model(x), model(x, 4))
