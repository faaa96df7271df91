"""Attaching to loops that are not ours: exact halts, what is refused, and that nothing is left behind."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import haltkit
from cases import SPECS, STEPS, WIDTH, Refiner, state_of
from haltkit.attachment import errors
from haltkit.attachment.description import Loop
from haltkit.protocol import Heads
from haltkit.recording.recorder import Recorder
from standins import AtDepths


@pytest.fixture
def model() -> Refiner:
    return Refiner().eval()


@pytest.fixture
def x() -> Tensor:
    sizes = torch.logspace(-3, 1, 4).view(1, 4, 1)  # rows that settle at different steps
    return sizes * torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("k", range(1, STEPS))
def test_a_halt_at_k_is_the_model_run_with_k_loops(model: Refiner, x: Tensor, k: int) -> None:
    with haltkit.attach(model, f"fixed:steps={k}", body=["core"]) as session:
        halted = model(x)
    assert torch.equal(halted, model(x, k))
    assert (session.computed, session.skipped) == (k, STEPS - k)
    assert session.steps["loop"].eq(k).all()


@torch.no_grad()
@pytest.mark.parametrize(
    "spec",
    [
        "norm:tau=0.3",
        "accel:tau=0.5",
        "kl:tau=1e-3",
        "norm:tau=0.3,granularity=sequence",
        "accel-rel:tau=0.4,min_steps=4",
    ],
)
def test_rows_halt_as_in_haltkits_own_loop(model: Refiner, x: Tensor, spec: str) -> None:
    """Finished rows keep their state exactly while others go on; an independent loop says which and when."""
    with haltkit.attach(model, spec, body=["core"], readout=model.head) as session:
        out = model(x)
    own = haltkit.run_loop(model.core, x, haltkit.policy(spec), max_steps=STEPS, readout=model.head)
    assert torch.equal(session.steps["loop"], own.steps)
    assert torch.equal(session.outcome["loop"], own.outcome)
    assert torch.equal(out, model.head(own.x))
    if "min_steps" not in spec:
        assert len(own.steps.unique()) > 1


@torch.no_grad()
def test_observing_is_neutral_and_sees_every_state(model: Refiner, x: Tensor) -> None:
    plain, recorder = model(x), Recorder()
    with haltkit.attach(model, "fixed:steps=1000", body=["core"], observer=recorder):
        assert torch.equal(model(x), plain)
    with haltkit.record(model, {"core": "core"}) as recording:
        model(x)
    seen, hooked = recorder.trajectory["loop"].states, recording.trajectory["core"].states
    assert seen is not None
    assert hooked is not None
    assert torch.equal(seen, hooked)


@torch.no_grad()
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_nothing_is_left_behind(model: Refiner, x: Tensor, error: type[BaseException] | None) -> None:
    before, plain = state_of(model), model(x)
    try:
        with haltkit.attach(model, "fixed:steps=3", body=["core"]):
            assert type(model.core) is not nn.Linear
            model(x)
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert state_of(model) == before
    assert torch.equal(model(x), plain)


@torch.no_grad()
def test_an_exception_inside_the_model_leaves_the_next_call_clean(model: Refiner, x: Tensor) -> None:
    broken = True

    def fail(*_: Any) -> None:
        if broken:
            raise RuntimeError("inside")

    model.head.register_forward_pre_hook(fail)
    with haltkit.attach(model, "fixed:steps=3", body=["core"]) as session:
        with pytest.raises(RuntimeError, match="inside"):
            model(x)
        broken = False
        out = model(x)
        assert session.steps["loop"].eq(3).all()
    assert torch.equal(out, model(x, 3))


class Pair(NamedTuple):
    hidden: Tensor
    extra: int


@dataclasses.dataclass
class Packed:
    hidden: Tensor
    extra: int = 0


class Wrapped(nn.Module):
    """A cell whose output carries the state in something else, and a loop that takes it out again."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.cell = Cell(kind)

    def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
        for _ in range(n):
            out = self.cell(x)
            x = (
                out
                if self.kind == "tensor"
                else out["h"]
                if self.kind == "dict"
                else out[0]
                if self.kind == "tuple"
                else out.hidden
            )
        return x


class Cell(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.linear(x))
        kinds = {"tensor": h, "tuple": (h, 1), "namedtuple": Pair(h, 1), "dataclass": Packed(h, 1), "dict": {"h": h}}
        return kinds[self.kind]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tensor", "tuple", "namedtuple", "dataclass", "dict"])
@pytest.mark.parametrize("spec", ["fixed:steps=4", "norm:tau=0.05"])
def test_the_state_inside_any_kind_of_output(kind: str, spec: str, x: Tensor) -> None:
    model = Wrapped(kind).eval()
    keys: dict[str, Any] = {}
    if kind == "dict":
        with pytest.raises(errors.AttachError, match="say select="), haltkit.attach(model, spec, body=["cell"]):
            model(x)
        keys = {"select": lambda out: out["h"], "put": lambda out, h: {**out, "h": h}}
    with haltkit.attach(model, spec, body=["cell"], **keys) as session:
        out = model(x)
    own = haltkit.run_loop(lambda h: torch.tanh(model.cell.linear(h)), x, haltkit.policy(spec), max_steps=STEPS)
    assert torch.equal(session.steps["loop"], own.steps)
    assert torch.equal(out, own.x)


def residual(core: nn.Module, x: Tensor) -> Tensor:
    return x + 0.3 * torch.tanh(core(x))


@torch.no_grad()
def test_verify_proves_a_right_description_and_catches_a_wrong_one(model: Refiner, x: Tensor) -> None:
    with haltkit.attach(model, "norm:tau=0.3", body=["core"]) as session:
        report = session.verify(lambda: model(x), 4, lambda k: model(x, k))
        assert report.ok
        assert (report.k, report.loops, report.neutral, report.halted) == ({"loop": 4}, {"loop": STEPS}, 0, 0)
        assert (report.drift, report.steady, report.constant) == ({"loop": 0}, {"loop": ["core"]}, {"loop": []})
        assert "exactly equal" in str(report)
        assert (
            session.verify(lambda: model(x), STEPS - 1).drift["loop"] is None
        )  # one replayed iteration proves nothing
        with pytest.raises(ValueError, match="1 to 9"):
            session.verify(lambda: model(x), STEPS)
    glued = Refiner(residual).eval()
    with (
        haltkit.attach(glued, "norm:tau=0.3", body=["core"]) as session,
        pytest.raises(errors.GlueDrift, match="on_halt"),
    ):
        session.verify(lambda: glued(x), 4)
    with haltkit.attach(glued, "fixed:steps=4", body=["core"], on_halt={"core": "zero"}) as session:
        assert session.verify(lambda: glued(x), 4, lambda k: glued(x, k)).ok
        halted = glued(x)
    assert torch.equal(halted, glued(x, 4))


@torch.no_grad()
def test_a_recurrence_over_a_sequence_is_refused() -> None:
    class OverTime(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNNCell(WIDTH, WIDTH)

        def forward(self, sequence: Tensor) -> Tensor:
            h = torch.zeros(sequence.shape[1], WIDTH)
            for item in sequence:
                h = self.cell(item, h)
            return h

    model, sequence = OverTime(), torch.randn(STEPS, 3, WIDTH)
    with (
        haltkit.attach(model, "norm:tau=0.1", body=["cell"], initial=1) as session,
        pytest.raises(errors.VaryingInput, match="over a sequence"),
    ):
        session.verify(lambda: model(sequence), 3)


def test_what_attach_refuses(model: Refiner, x: Tensor) -> None:
    before = state_of(model)
    with pytest.raises(errors.UnknownModule, match="'cor' is not one of core, head"):
        haltkit.attach(model, "norm:tau=1", body=["cor"])
    with pytest.raises(errors.UnknownModule, match="no method 'predict'"):
        haltkit.attach(model, "norm:tau=1", body=["core"], scope=":predict")
    with pytest.raises(errors.AttachError, match="no preset for Refiner"):
        haltkit.attach(model, "norm:tau=1")
    with pytest.raises(ValueError, match="a list of module paths"):
        haltkit.attach(model, "norm:tau=1", body="core")
    for fields in ({"body": [3]}, {"body": 3}, {"scope": 3}, {"reset_on": 3}, {"reset_on": [3]}):
        with pytest.raises(ValueError, match="3.*path"):
            haltkit.attach(model, "norm:tau=1", **{"body": ["core"], **cast(Any, fields)})
    with pytest.raises(ValueError, match="nested"):
        haltkit.attach(model, "loop=" + "any(" * 2000, body=["core"])
    nothing: Any = None
    with pytest.raises(ValueError, match="torch.nn.Module"):
        haltkit.attach(nothing, "norm:tau=1", body=["core"])
    with pytest.raises(ValueError, match="torch.nn.Module"):
        haltkit.discover(nothing, lambda: None)
    with pytest.raises(ValueError, match="not one of the body's modules"):
        Loop(("core",), state="head")
    with pytest.raises(ValueError, match="allowed are replay, zero, identity"):
        Loop(("core",), on_halt={"core": "nothing"})
    scripted = nn.Module()
    scripted.core = _scripted()
    with pytest.raises(errors.ScriptModuleUnsupported, match="before scripting"):
        haltkit.attach(scripted, "norm:tau=1", body=["core"])
    assert state_of(model) == before


@torch.no_grad()
@pytest.mark.parametrize("shape", [(0, 4, WIDTH), (2, 0, WIDTH)])
@pytest.mark.parametrize(
    "spec", [*SPECS.values(), "norm:tau=0.1,granularity=sequence", "norm:tau=1,granularity=batch,pool=max"]
)
def test_an_empty_batch_passes_through(model: Refiner, spec: str, shape: tuple[int, ...]) -> None:
    plain, heads = model(torch.zeros(shape)), Heads(lambda x: x, lambda x: x[..., 0])
    executions: tuple[Any, ...] = ("masked",) if "=batch" in spec else ("masked", "compact")
    for execution in executions:
        with haltkit.attach(model, spec, body=["core"], readout=heads, execution=execution) as session:
            assert model(torch.zeros(shape)).shape == plain.shape
        assert session.steps["loop"].shape == session.outcome["loop"].shape == shape[:-1]
        assert (session.computed, session.skipped) == (1, STEPS - 1)
        assert "empty" in session.summary()
    with pytest.raises(ValueError, match="empty in loop"):
        haltkit.verify(model, lambda: model(torch.zeros(shape)), 2, body=["core"])
    with haltkit.attach(model, None, body=["core"]) as observing:
        model(torch.zeros(shape))
    assert "empty" in observing.summary()


def _scripted() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still there
        module: nn.Module = torch.jit.script(nn.Linear(WIDTH, WIDTH))
    return module


@torch.no_grad()
def test_sessions_do_not_share_a_loop_and_are_detached_newest_first(model: Refiner, x: Tensor) -> None:
    first = haltkit.attach(model, "fixed:steps=3", body=["core"])
    with pytest.raises(errors.AlreadyAttached, match="detach it first"):
        haltkit.attach(model, "fixed:steps=4", body=["core"])
    second = haltkit.attach(model, "fixed:steps=2", body=["core", "head"], state="head", scope="")
    with pytest.raises(errors.DetachOrder, match="newest first"):
        first.detach()
    second.detach()
    assert torch.equal(model(x), Refiner().eval()(x, 3))
    first.detach()
    assert type(model.core) is nn.Linear


@torch.no_grad()
def test_a_body_that_never_runs_inside_the_scope_is_noticed(model: Refiner, x: Tensor) -> None:
    with (
        pytest.raises(errors.BodyOutsideScope, match="module:method"),
        haltkit.attach(model, "norm:tau=1", body=["core"]),
    ):
        model.rollout(x)
    with haltkit.attach(model, "fixed:steps=4", body=["core"], scope=":rollout") as session:
        out = model.rollout(x)
    assert session.skipped == STEPS - 4
    expected = x
    for _ in range(4):
        expected = model.core(expected)
    assert torch.equal(out, expected)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["norm:tau=1", None])
def test_an_error_that_was_caught_inside_the_block_is_not_followed_by_another(
    model: Refiner, x: Tensor, policy: str | None
) -> None:
    """Nothing ran to its end, but not because the description is wrong."""
    with haltkit.attach(model, policy, body=["core"]), pytest.raises(RuntimeError):
        model(x[..., :2])
    model.head = nn.Linear(2, 2)
    with haltkit.attach(model, policy, body=["core"]), pytest.raises(RuntimeError):
        model(x)


@torch.no_grad()
def test_outputs_changed_in_place_are_refused_and_harmless_under_inference_mode(x: Tensor) -> None:
    def in_place(core: nn.Module, h: Tensor) -> Tensor:
        h = core(h)
        h += 1
        return h

    model = Refiner(in_place).eval()
    with pytest.raises(errors.MutatedOutput, match="in place"), haltkit.attach(model, "fixed:steps=3", body=["core"]):
        model(x)
    with torch.inference_mode(), haltkit.attach(model, "fixed:steps=3", body=["core"]):
        halted = model(x)
    with torch.inference_mode():
        assert torch.equal(halted, model(x, 3))


@torch.no_grad()
def test_a_loop_that_calls_other_modules_each_time_is_refused(x: Tensor) -> None:
    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for i in range(STEPS):
                x = self.c((self.a if i < 5 else self.b)(self.a(x) if i % 2 else x))
            return x

    model = Alternating()
    with (
        pytest.raises(errors.TapeMismatch, match="same order"),
        haltkit.attach(model, "fixed:steps=3", body=["a", "b", "c"]),
    ):
        model(x)


@torch.no_grad()
def test_a_state_that_changes_shape_is_refused(x: Tensor) -> None:
    class Shrinking(Refiner):
        def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
            for i in range(n):
                x = self.core(x)[: 1 if i > 3 else 2]
            return x

    with (
        pytest.raises(errors.StateShapeChanged, match="inside one loop"),
        haltkit.attach(Shrinking(), "norm:tau=1e-9", body=["core"]) as session,
    ):
        session.model(x)
    for policy in ("norm:tau=1", None):  # a recording is held to the same
        with pytest.raises(errors.StateShapeChanged, match="say state="):
            wide = nn.Sequential(nn.Linear(4, WIDTH))
            with haltkit.attach(wide, policy, body=["0"], observer=Recorder()):
                wide(torch.randn(2, 4))


def test_gradients_equal_those_of_k_loops_and_lost_ones_are_refused(model: Refiner, x: Tensor) -> None:
    def gradient(run: Callable[[], Tensor]) -> Tensor:
        model.zero_grad()
        run().square().sum().backward()
        assert model.core.weight.grad is not None
        return model.core.weight.grad.clone()

    with haltkit.attach(model, "fixed:steps=4", body=["core"]):
        halted = gradient(lambda: model(x))
    assert torch.equal(halted, gradient(lambda: model(x, 4)))

    def prefix(core: nn.Module, h: Tensor) -> Tensor:
        prefix.calls += 1
        with torch.set_grad_enabled(prefix.calls > 5):
            out: Tensor = core(h)
        return out

    prefix.calls = 0
    truncated = Refiner(prefix)
    with (
        pytest.raises(errors.GradientLost, match="allow_grad"),
        haltkit.attach(truncated, "fixed:steps=3", body=["core"]),
    ):
        truncated(x)
    prefix.calls = 0
    with haltkit.attach(truncated, "fixed:steps=3", body=["core"], allow_grad=True):
        truncated(x)


def test_gradients_flow_through_rows_that_have_halted(model: Refiner, x: Tensor) -> None:
    spec = "norm:tau=0.3"
    with haltkit.attach(model, spec, body=["core"]) as session:
        model(x).sum().backward()
    assert model.core.weight.grad is not None
    attached, steps = model.core.weight.grad.clone(), session.steps["loop"]
    model.zero_grad()
    h, kept = x, torch.zeros_like(x)
    for k in range(1, STEPS + 1):
        h = model.core(h)
        kept = torch.where((steps == k).unsqueeze(-1), h, kept)
    model.head(kept).sum().backward()
    torch.testing.assert_close(attached, model.core.weight.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(x: Tensor, reentrant: bool) -> None:
    model = Refiner(lambda core, h: checkpoint(core, h, use_reentrant=reentrant))
    x = x.clone().requires_grad_()
    if reentrant:
        with haltkit.attach(model, "fixed:steps=4", body=["core"], allow_grad=True):
            loss = model(x).sum()
            with pytest.raises(errors.ReentrantCheckpoint, match="use_reentrant=False"):
                loss.backward()
        return
    with haltkit.attach(model, "fixed:steps=4", body=["core"]):
        model(x).sum().backward()
    assert model.core.weight.grad is not None
    halted = model.core.weight.grad.clone()
    model.zero_grad()
    model(x, 4).sum().backward()
    torch.testing.assert_close(halted, model.core.weight.grad)


@torch.no_grad()
def test_copies_and_pickles_are_plain_models(model: Refiner, x: Tensor) -> None:
    plain = model(x)
    with haltkit.attach(model, "fixed:steps=3", body=["core"]):
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        halted = model(x)
    for other in (copied, pickled):
        assert type(other) is Refiner
        assert type(other.core) is nn.Linear
        assert torch.equal(other(x), plain)
        other.core.weight.zero_()
    assert not torch.equal(halted, plain)
    assert torch.equal(model(x), plain)


@torch.no_grad()
def test_threads_and_reentry_have_loops_of_their_own(model: Refiner, x: Tensor) -> None:
    expected = {n: model(x * n, 3) for n in range(1, 5)}
    results: dict[int, Tensor] = {}
    with haltkit.attach(model, "fixed:steps=3", body=["core"]):

        def work(n: int) -> None:
            with torch.no_grad():
                results[n] = model(x * n)

        threads = [threading.Thread(target=work, args=(n,)) for n in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(results[n], expected[n]) for n in expected)

    class Nested(Refiner):
        """Calls itself in the middle of its own loop."""

        def forward(self, x: Tensor, n: int = STEPS, inner: int = STEPS) -> Tensor:
            for i in range(n):
                x = self.core(x)
                if i == 1 and inner:
                    x = x + 0.1 * self(x, inner, 0)
            return x

    nested = Nested().eval()
    with haltkit.attach(nested, "fixed:steps=3", body=["core"]) as session:
        halted = nested(x)
    assert torch.equal(halted, nested(x, 3, 3))
    assert not torch.equal(halted, nested(x, 3, STEPS))
    assert (session.computed, session.skipped) == (6, 2 * STEPS - 6)


@torch.no_grad()
def test_a_policy_may_call_the_model_itself(model: Refiner, x: Tensor) -> None:
    """A readout that runs body and model is not part of the loop."""
    with haltkit.attach(model, "kl:tau=1e-3", body=["core"], readout=lambda h: model(model.core(h), 2)) as session:
        out = model(x)
    own = haltkit.run_loop(
        model.core, x, haltkit.policy("kl:tau=1e-3"), max_steps=STEPS, readout=lambda h: model(model.core(h), 2)
    )
    assert torch.equal(session.steps["loop"], own.steps)
    assert torch.equal(out, model.head(own.x))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # inductor's own import
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_body_is_halted_exactly(model: Refiner, x: Tensor, backend: str) -> None:
    plain = {k: model(x, k) for k in (3, STEPS)}
    model.core = torch.compile(model.core, backend=backend)
    with haltkit.attach(model, "fixed:steps=3", body=["core"]) as session:
        torch.testing.assert_close(model(x), plain[3])
    assert session.skipped == STEPS - 3
    torch.testing.assert_close(model(x), plain[STEPS])


@torch.no_grad()
def test_an_instance_forward_is_wrapped_and_put_back(model: Refiner, x: Tensor) -> None:
    """As accelerate leaves behind: forward as an attribute of the instance."""
    own = lambda h: 0.5 * nn.Linear.forward(model.core, h)  # noqa: E731
    model.core.forward = own
    expected = model(x, 3)
    with haltkit.attach(model, "fixed:steps=3", body=["core"]):
        assert torch.equal(model(x), expected)
    assert model.core.__dict__["forward"] is own


class Cache:
    """As much of a Hugging Face cache as is looked at."""

    length = 0

    def update(self) -> None:
        self.length += 1

    def get_seq_length(self) -> int:
        return self.length


@torch.no_grad()
def test_a_kv_cache_is_not_left_at_varying_depth(x: Tensor) -> None:
    class Cached(Refiner):
        def forward(self, x: Tensor, cache: Any = None) -> Tensor:
            for _ in range(STEPS):
                x = self.cell(x, cache)
            return x

        def __init__(self) -> None:
            super().__init__()
            self.cell = CachedCell()

    class CachedCell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, cache: Any) -> Tensor:
            if cache is not None:
                cache.update()
            return self.linear(x)

    model, cache = Cached().eval(), Cache()
    with haltkit.attach(model, AtDepths(3, 3, 5, 2, 5, 5), body=["cell"]):
        model(x, cache)
        model(x, cache)  # the same depth again is fine
        with pytest.raises(errors.KVDepthMismatch, match="3 iterations"):
            model(x, cache)
        with pytest.raises(errors.KVDepthMismatch, match="at 2"):
            model(x, cache)
        model(x, Cache())
        model(x)


@torch.no_grad()
def test_the_session_says_what_came_of_it(model: Refiner, x: Tensor) -> None:
    with haltkit.attach(model, "norm:tau=0.3", body=["core"]) as session:
        session.verify(lambda: model(x), 3)
        assert "no loop has run" in session.summary()  # a check is not a use
        model(x)
        model(x)
    text = session.summary()
    assert "CONVERGED" in text
    assert "computed" in text
    assert sum(int(line.split()[2]) for line in text.splitlines() if "rows" in line) == 2 * x[..., 0].numel()


@torch.no_grad()
def test_a_session_in_which_nothing_ran_has_no_steps(model: Refiner) -> None:
    with (
        haltkit.attach(model, "norm:tau=0.3", body=["core"]) as session,
        pytest.raises(ValueError, match="no loop has run"),
    ):
        _ = session.steps["loop"]


@torch.no_grad()
def test_discover_proposes_a_description_that_verifies(model: Refiner, x: Tensor) -> None:
    found = haltkit.discover(model, lambda: model(x))
    assert "haltkit.attach(model, policy, body=['core'])" in str(found)
    best = found.candidates[0]
    with haltkit.attach(model, "norm:tau=1", body=best.body, state=best.state, scope=best.scope) as session:
        assert session.verify(lambda: model(x), 3, lambda k: model(x, k)).ok
    with pytest.raises(errors.AttachError, match="no loop"):
        haltkit.discover(model.head, lambda: model.head(x))


class InPlace(nn.Linear):
    """A body that works in the buffer that it was given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.copy_(torch.tanh(super().forward(x)))


def in_place_glue(core: nn.Module, h: Tensor) -> Tensor:
    h = core(h)
    h += 1
    return h


@torch.no_grad()
@pytest.mark.parametrize("spec", ["norm:tau=0.05", "norm:tau=1e-30", "norm:tau=0.3,granularity=sequence"])
def test_states_changed_in_place_are_refused_before_anything_is_measured_wrong(x: Tensor, spec: str) -> None:
    buffered = Refiner().eval()
    buffered.core = InPlace(WIDTH, WIDTH)
    for model in (buffered, Refiner(in_place_glue).eval()):
        with pytest.raises(errors.MutatedOutput, match="in place"), haltkit.attach(model, spec, body=["core"]):
            model(x.clone())
    # Under inference mode nobody can see it, so what is measured is a copy.
    glued = Refiner(in_place_glue).eval()
    states = [x.clone()]
    for _ in range(STEPS):
        states.append(glued.core(states[-1] + (len(states) > 1)))
    with torch.inference_mode(), haltkit.attach(glued, "fixed:steps=100", body=["core"], observer=(seen := Recorder())):
        glued(x.clone())
    recorded = seen.trajectory["loop"].states
    assert recorded is not None
    assert torch.equal(recorded, torch.stack(states))


@torch.no_grad()
@pytest.mark.parametrize("action", ["zero", "identity"])
def test_actions_hold_row_by_row(x: Tensor, action: Any) -> None:
    """A residual branch that adds nothing, or a map that changes nothing, for the rows that have halted.

    The glue around the map goes on changing these rows, which the check of the first halted loop would refuse.
    """
    glue = residual if action == "zero" else (lambda core, h: torch.tanh(core(h)))
    model = Refiner(glue).eval()
    keys: dict[str, Any] = {"on_halt": {"core": action}, "check": action == "zero"}
    with haltkit.attach(model, "norm:tau=0.4", body=["core"], **keys) as session:
        out = model(x)
    taken = session.steps["loop"]
    assert taken.min() < taken.max()
    h = x
    for k in range(1, STEPS + 1):
        live = (taken >= k).unsqueeze(-1)
        if action == "zero":
            h = torch.where(live, glue(model.core, h), h)
        else:
            h = torch.tanh(torch.where(live, model.core(h), h))
    assert torch.allclose(out, model.head(h), atol=1e-6)


@torch.no_grad()
def test_every_part_of_a_state_is_kept(x: Tensor) -> None:
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.cell = nn.LSTMCell(WIDTH, WIDTH)

        def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
            h = c = torch.zeros_like(x)
            for _ in range(n):
                h, c = self.cell(x, (h, c))
            return h + c

    model, rows = Cells().eval(), x.flatten(0, 1)
    with haltkit.attach(model, "norm:tau=0.05", body=["cell"], initial=None) as session:
        out = model(rows)
    taken = session.steps["loop"]
    assert taken.min() < taken.max()
    expected = torch.stack([model(rows, int(k))[i] for i, k in enumerate(taken)])
    assert torch.allclose(out, expected, atol=1e-6)


def test_rows_kept_from_a_pass_without_gradients_are_refused(model: Refiner, x: Tensor) -> None:
    def run(*, grad: bool) -> Tensor:
        h = x
        with torch.no_grad():
            for _ in range(5):
                h = model.core(h)
        for _ in range(5):
            h = model.core(h)
        return model.head(h)

    model.rollout = lambda x: run(grad=True)
    with (
        pytest.raises(errors.GradientLost, match="rows halted under no_grad"),
        haltkit.attach(model, "norm:tau=0.1", body=["core"], scope=":rollout"),
    ):
        model.rollout(x)


@torch.no_grad()
def test_verify_says_what_it_cannot_know(model: Refiner, x: Tensor) -> None:
    with haltkit.attach(model, "norm:tau=0.3", body=["core"]) as session:
        model(x)
        before = session.steps["loop"]
        assert not session.verify(lambda: model(x), STEPS - 1).ok  # nothing compared, nothing seen to be steady
        assert torch.equal(session.steps["loop"], before)
        with pytest.raises(ValueError, match="must return what is to be compared"):
            session.verify(lambda: (model(x), 1.0)[1], 4)
        with pytest.raises(ValueError, match="another output each time"):
            session.verify(lambda: model(x + torch.rand(())), 4)
    with haltkit.attach(model, None, body=["core"]) as session, pytest.raises(ValueError, match="only observes"):
        session.verify(lambda: model(x), 4)
    from haltkit.attachment.verify import difference

    nan = torch.tensor(float("nan"))
    assert difference((x, nan), (x, torch.tensor(1.0))) == float("inf")


def test_descriptions_and_policies_that_would_be_ignored_are_refused(model: Refiner, x: Tensor) -> None:
    with pytest.raises(ValueError, match="period, state, scope belong to a description by fields"):
        haltkit.attach(model, "norm:tau=1", Loop(("core",)), period=5, state="nonsense", scope="zzz")
    with pytest.raises(ValueError, match="not both"):
        haltkit.attach(model, "norm:tau=1", Loop(("core",)), body=["core"])
    with pytest.raises(ValueError, match="not described by steps; its fields are body, state"):
        haltkit.attach(model, "norm:tau=1", body=["core"], steps=4)
    wrong: tuple[Any, ...] = (5, Loop(("core",)), haltkit.HaltingPolicy)
    for policy in wrong:
        with pytest.raises(ValueError, match="give a spec such as"):
            haltkit.attach(model, policy, body=["core"])
    with pytest.raises(ValueError, match="no file 'none.yaml'"):
        haltkit.attach(model, "none.yaml", body=["core"])
    for how in ({"max_steps": 3}, {"total_steps": 3}, {"execution": "compact"}, {"kv": "freeze"}, {"allow_grad": True}):
        with pytest.raises(ValueError, match=f"only observes, and {next(iter(how))} would be ignored"):
            haltkit.attach(model, None, body=["core"], **how)
    model.layers = nn.ModuleList([nn.Linear(2, 2)])
    with (
        pytest.raises(errors.BodyOutsideScope, match="not a ModuleList"),
        haltkit.attach(model, "norm:tau=1", body=["layers"]),
    ):
        model(x)
    with haltkit.attach(model, "norm:tau=1", body=["core"]) as session:
        torch.nn.utils.parametrizations.weight_norm(model.core)
        with pytest.raises(errors.DetachOrder, match="parametrization"):
            session.detach()
        torch.nn.utils.parametrize.remove_parametrizations(model.core, "weight")
    assert type(model.core) is nn.Linear


@torch.no_grad()
@pytest.mark.parametrize("order", ["model first", "attached first", "core in place", "core of the original"])
def test_other_orders_of_compiling_are_exact_too(model: Refiner, x: Tensor, order: str) -> None:
    torch._dynamo.reset()
    expected, body, run = model(x, 4), "core", model
    if order == "model first":
        run = torch.compile(model, backend="eager")
    elif order == "core in place":
        model.core.compile(backend="eager")
    elif order == "core of the original":
        model.core = torch.compile(model.core, backend="eager")
        body = "core._orig_mod"
    with haltkit.attach(model, "fixed:steps=4", body=[body]):
        if order == "attached first":
            run = torch.compile(model, backend="eager")
        assert torch.equal(run(x), expected)


def test_a_base_class_that_wraps_the_forward_of_its_subclasses_is_attached_to(x: Tensor) -> None:
    """As transformers wraps that of its layers: the wrapper must not come before haltkit."""

    class Layer(nn.Module):
        def __init_subclass__(cls) -> None:
            super().__init_subclass__()
            inner = cls.forward
            cls.forward = lambda self, *args: inner(self, *args)  # type: ignore[method-assign]

    class Core(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.linear(x))

    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = Core()

        def forward(self, x: Tensor, n: int = STEPS) -> Tensor:
            for _ in range(n):
                x = self.core(x)
            return x

    model = Looped().eval()
    with torch.no_grad(), haltkit.attach(model, "fixed:steps=3", body=["core"]) as session:
        assert torch.equal(model(x), model(x, 3))
    assert session.skipped == STEPS - 3
    assert type(model.core) is Core
