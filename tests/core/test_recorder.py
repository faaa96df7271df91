"""Recorders and trajectories: what is kept equals what ran, and is bounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import haltkit
from haltkit.models.gpt.model import LoopedGPT
from haltkit.recording.recorder import Record, Recorder, RecordingTooLarge
from haltkit.recording.replay import scores
from haltkit.recording.trajectory import Trajectory, TrajectoryError, delta_loop_ratios
from maps import wiggle

X0 = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def recorded(spec: Record | None = None, policy: str = "fixed:steps=8") -> Trajectory:
    recorder = Recorder(spec or Record())
    haltkit.run_loop(wiggle, X0, haltkit.policy(policy), max_steps=8, observer=recorder, name="map")
    return recorder.trajectory


def by_hand(steps: int = 8) -> Tensor:
    states = [X0]
    for _ in range(steps):
        states.append(wiggle(states[-1]))
    return torch.stack(states)


def test_states_are_those_of_the_loop() -> None:
    region = recorded()["map"]
    assert torch.equal(region.states, by_hand())
    assert region.recorded.tolist() == list(range(9))
    assert torch.equal(region.first, X0)
    assert torch.equal(region.last, by_hand()[-1])
    d = by_hand().diff(dim=0)
    torch.testing.assert_close(region.step_norms(), d.norm(dim=-1))
    torch.testing.assert_close(region.accelerations()[1:], d.diff(dim=0).norm(dim=-1))
    torch.testing.assert_close(region.step_angles()[1:], torch.cosine_similarity(d[1:], d[:-1], dim=-1))
    torch.testing.assert_close(region.state_norms(), by_hand()[1:].norm(dim=-1))
    assert region.accelerations()[0].isinf().all()
    assert region.step_angles()[0].isnan().all()


def test_statistics_equal_those_computed_from_states() -> None:
    states, statistics = recorded()["map"], recorded(Record(what="statistics"))["map"]
    for name in ("step_norms", "accelerations", "step_angles", "state_norms"):
        torch.testing.assert_close(getattr(statistics, name)(), getattr(states, name)(), equal_nan=True)
    thinned = recorded(Record(what="statistics", every=3))["map"]
    assert thinned.recorded.tolist() == [3, 6]
    torch.testing.assert_close(thinned.step_norms(), states.step_norms()[[2, 5]])


def test_nothing_is_made_up_after_a_row_has_halted() -> None:
    region = recorded(policy="norm:tau=0.3")["map"]
    assert region.steps.unique().numel() > 1
    for row, steps in enumerate(region.steps.tolist()):
        norms = region.step_norms()[:, row]
        assert norms[:steps].isfinite().all()
        assert norms[steps:].isnan().all()
    with pytest.raises(TrajectoryError, match="record at a fixed depth"):
        haltkit.replay(haltkit.policy("norm:tau=0.01"), region)


def test_what_is_recorded_is_what_was_reached() -> None:
    """Keeping the previous state, or a state that is not finite, makes no step of length zero."""
    recorder = Recorder()
    policy = haltkit.policy("fixed:steps=3")
    haltkit.run_loop(lambda x: x / 2, X0, policy, keep="previous", observer=recorder, name="map")
    region = recorder.trajectory["map"]
    torch.testing.assert_close(region.step_norms(), torch.stack([X0.norm(dim=-1) / 2**k for k in (1, 2, 3)]))
    k = 0

    def breaks(x: Tensor) -> Tensor:
        nonlocal k
        k += 1
        return x / 2 if k < 3 else torch.full_like(x, torch.nan)

    haltkit.run_loop(breaks, X0, haltkit.policy("fixed:steps=9"), observer=recorder, name="map")
    assert recorder.trajectory["map"].step_norms()[2].isnan().all()


def test_padding_does_not_stop_a_replay() -> None:
    recorder, rows = Recorder(), torch.tensor([True, True, False])
    haltkit.run_loop(wiggle, X0, haltkit.policy("fixed:steps=8"), rows=rows, max_steps=8, observer=recorder, name="map")
    replayed = haltkit.replay(haltkit.policy("norm:tau=0.3"), recorder.trajectory["map"])
    live = haltkit.run_loop(wiggle, X0, haltkit.policy("norm:tau=0.3"), rows=rows, max_steps=8)
    assert torch.equal(replayed.steps, live.steps)
    assert torch.equal(replayed.outcome, live.outcome)


@pytest.mark.parametrize("tau", [0.05, 0.3, 5.0])
def test_a_row_that_stopped_being_finite_does_so_again_in_a_replay(tau: float) -> None:
    def run(policy: str, recorder: Recorder | None = None) -> haltkit.LoopResult:
        k = 0

        def breaks(x: Tensor) -> Tensor:
            nonlocal k
            k += 1
            return wiggle(x).index_fill(0, torch.tensor([1]), torch.inf) if k == 3 else wiggle(x)

        return haltkit.run_loop(breaks, X0, haltkit.policy(policy), max_steps=8, observer=recorder, name="map")

    recorder = Recorder()
    run("fixed:steps=8", recorder)
    replayed = haltkit.replay(haltkit.policy(f"norm:tau={tau}"), recorder.trajectory["map"])
    live = run(f"norm:tau={tau}")
    assert torch.equal(replayed.steps, live.steps)
    assert torch.equal(replayed.outcome, live.outcome)
    assert torch.equal(replayed.x, live.x)


def test_every_nth_step_and_what_then_cannot_be_asked() -> None:
    region = recorded(Record(every=3))["map"]
    assert region.recorded.tolist() == [0, 3, 6]
    assert torch.equal(region.states, by_hand()[[0, 3, 6]])
    with pytest.raises(TrajectoryError, match="every=1"):
        region.step_norms()
    with pytest.raises(TrajectoryError, match="what='states'"):
        haltkit.replay(haltkit.policy("norm:tau=1"), recorded(Record(what="statistics"))["map"])
    with pytest.raises(TrajectoryError, match="there are: map"):
        recorded()["core"]


def test_memory_is_bounded() -> None:
    with pytest.raises(RecordingTooLarge, match="record statistics"):
        recorded(Record(max_bytes=3 * X0.nbytes))
    recorded(Record(max_bytes=20 * X0.nbytes))


def test_save_and_load_give_back_everything(tmp_path: Path) -> None:
    for spec in (Record(), Record(what="statistics", every=2)):
        recorder = Recorder(spec, {"model": "wiggle", "note": "π"})
        haltkit.run_loop(wiggle, X0, haltkit.policy("norm:tau=0.3"), max_steps=8, observer=recorder, name="a/b 5-6")
        saved = recorder.trajectory
        saved.save(tmp_path / "t.safetensors")
        loaded = Trajectory.load(tmp_path / "t.safetensors")
        assert loaded.metadata == saved.metadata
        assert loaded.regions.keys() == saved.regions.keys()
        one, other = saved["a/b 5-6"], loaded["a/b 5-6"]
        for name in ("recorded", "states", "first", "last", "steps", "outcome", "injected"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
        assert one.statistics.keys() == other.statistics.keys()


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(TrajectoryError, match="no recording"):
        Trajectory.load(tmp_path / "missing")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(TrajectoryError, match="cannot be read"):
        Trajectory.load(tmp_path / "junk")
    save_file({"x": X0}, tmp_path / "other")
    with pytest.raises(TrajectoryError, match="not a recording"):
        Trajectory.load(tmp_path / "other")


class Looped(nn.Module):
    """A foreign model: one linear layer applied ``n`` times."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor, n: int = 5) -> Tensor:
        for _ in range(n):
            x = self.core(x)
        out: Tensor = self.head(x)
        return out


@torch.no_grad()
def test_record_any_module_by_path_without_touching_its_output() -> None:
    torch.manual_seed(0)
    model, x = Looped(), X0.float()
    plain = model(x)
    with haltkit.record(model, {"loop": "core"}) as recording:
        assert torch.equal(model(x), plain)
        model(2 * x, n=3)  # a new call is a new trajectory
    region = recording.trajectory["loop"]
    states = [2 * x]
    for _ in range(3):
        states.append(model.core(states[-1]))
    assert torch.equal(region.states, torch.stack(states))
    assert not model.core._forward_hooks
    assert not model._forward_pre_hooks


def test_record_leaves_no_hooks_behind_after_an_exception() -> None:
    model = Looped()
    with pytest.raises(KeyboardInterrupt), haltkit.record(model, ["core"]):
        raise KeyboardInterrupt
    assert not model.core._forward_hooks
    assert not model._forward_pre_hooks


def test_what_record_refuses() -> None:
    model = Looped()
    with (
        pytest.raises(ValueError, match="no module 'cor' in Looped; it has: core, head"),
        haltkit.record(model, ["cor"]),
    ):
        pass
    with pytest.raises(ValueError, match="does not say what it loops"), haltkit.record(model):
        pass
    with pytest.raises(ValueError, match="a tensor of the same shape"), haltkit.record(model, ["head"]):
        model(X0.float())
    with haltkit.record(model, ["core"]) as recording, pytest.raises(ValueError, match="nothing was recorded"):
        _ = recording.trajectory


@torch.no_grad()
def test_a_loop_that_begins_anew_unseen_is_refused() -> None:
    model = Looped()
    with haltkit.record(model, ["core"]), pytest.raises(ValueError, match="began anew"):
        model.core(X0.float())
        model.core(X0.float())


@torch.no_grad()
def test_hooks_on_the_bundled_model_see_what_the_loop_sees(tiny_model: LoopedGPT) -> None:
    tokens = torch.randint(0, 512, (2, 9), generator=torch.Generator().manual_seed(0))
    with haltkit.record(tiny_model) as recording:
        tiny_model(tokens, 6)
    recorder = Recorder()
    tiny_model.forward_adaptive(tokens, "fixed:steps=6", observer=recorder)
    assert list(recording.trajectory.regions) == ["2", "3-4"]
    for name, region in recording.trajectory.regions.items():
        assert torch.equal(region.states, recorder.trajectory[name].states)
        assert region.injected is not None
    first = recording.trajectory["2"]
    e = tiny_model.layers["1"](tiny_model.embed(tokens))
    adapter = tiny_model.layers["2"].body.adapter
    torch.testing.assert_close(first.injected, adapter(torch.cat([first.first, e], -1)))


def test_dlr_by_hand() -> None:
    """Two regions whose numbers can be worked out: steps of norm 4, 2 and 1, a jump of 7."""

    def region(values: list[float], injected: float | None = None) -> haltkit.recording.trajectory.RegionTrajectory:
        states = torch.tensor(values).view(-1, 1, 1)
        return haltkit.recording.trajectory.RegionTrajectory(
            recorded=torch.arange(len(values)),
            states=states,
            statistics={},
            first=states[0],
            last=states[-1],
            steps=torch.tensor([len(values) - 1]),
            injected=None if injected is None else torch.tensor([[injected]]),
        )

    ratios = delta_loop_ratios(region([0, 4, 6, 7]), region([14, 10], injected=7.7))
    expected = {"noise": 3.0, "injected": 0.3, "net": 9 / 7}
    for name, value in expected.items():
        assert float(ratios[name]) == pytest.approx(value)
    assert float(ratios["noise without d_1"]) == pytest.approx(7 / 1.5)


def test_scores_are_what_a_policy_would_have_measured() -> None:
    seen = scores(haltkit.policy("norm:tau=1"), recorded()["map"])
    torch.testing.assert_close(seen, recorded()["map"].step_norms())


def test_a_recording_of_another_model_is_refused() -> None:
    recorder = Recorder()
    haltkit.run_loop(lambda x: x / 2, torch.ones(3, 8), haltkit.policy("fixed:steps=4"), observer=recorder)
    region = recorder.trajectory["loop"]
    haltkit.replay(haltkit.policy("kl:tau=0.1"), region, readout=torch.nn.Linear(8, 5))
    with pytest.raises(TrajectoryError, match="of width 8, do not fit the readout: it is of another model"):
        haltkit.replay(haltkit.policy("kl:tau=0.1"), region, readout=torch.nn.Linear(6, 5))


@pytest.mark.parametrize("inference", [False, True])
def test_a_module_that_changes_its_input_in_place_is_refused(inference: bool) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = Core()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.core(x)
            return out

    class Core(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(0.5)

    model = InPlace()
    with torch.inference_mode(inference), haltkit.record(model, ["core"]), pytest.raises(ValueError, match="in place"):
        model(torch.ones(2, 3))
