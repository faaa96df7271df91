"""How the passes of a subject are run and recorded: through a model's own loop modules, or from outside.

A driver is what differs between models; :class:`haltkit.subject.Subject` is what tools see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from haltkit.attachment import Loop, Session
from haltkit.attachment.attach import attach
from haltkit.loop import LoopObserver, Outcome
from haltkit.protocol import HaltingPolicy, Readout
from haltkit.recording.recorder import Record, Recorder, record
from haltkit.recording.trajectory import RegionTrajectory, Trajectory
from haltkit.setting import Depth, Setting

__all__ = ["Adaptive", "ByAttaching", "ByModules", "ByRow", "Driver", "Look", "Pass", "RunPass"]


@dataclass(frozen=True)
class Pass:
    """The result of one pass at one setting.

    Attributes:
        output: of the model.
        steps: by region, ``(B, T)`` or ``(B,)``; empty where nothing was counted, as at a fixed depth.
        outcome: an :class:`~haltkit.loop.Outcome` for each row, by region; empty for a fixed depth, which nothing ends.
    """

    output: Any
    steps: Mapping[str, Tensor] = field(default_factory=dict)
    outcome: Mapping[str, Tensor] = field(default_factory=dict)


RunPass = Callable[[Any], Pass]
# From inputs, policies by region and the budget of each region to a pass.
Adaptive = Callable[[Any, Mapping[str, HaltingPolicy[Any]], int], Pass]
# From inputs and the steps that each row takes by region, ``(B, T)`` or ``(B,)``, to a pass.
ByRow = Callable[[Any, Mapping[str, Tensor]], Pass]


@dataclass(frozen=True)
class Look:
    """What a subject does by itself.

    Attributes:
        recordings: of the first samples at full depth, one by one, by region.
        depths: the steps that each sample takes by region, where the model itself decides; empty where it is told.
        full_depth: steps of "full depth": the most that any region takes on any sample.
    """

    recordings: Sequence[Mapping[str, RegionTrajectory]]
    depths: Sequence[Mapping[str, int]]
    full_depth: int


class Driver(Protocol):
    """Runs the passes of one model."""

    @property
    def regions(self) -> tuple[str, ...]:
        """The looped regions, in the order they run."""
        ...

    @property
    def native(self) -> bool:
        """Whether the model halts its regions itself, each token for itself."""
        ...

    @property
    def rows_leave(self) -> bool:
        """Whether each row can be given a number of steps of its own."""
        ...

    @property
    def described(self) -> Mapping[str, Loop]:
        """The descriptions that a user gave, by region; empty where nothing need be described to attach again."""
        ...

    def using(self, setting: Setting, full_depth: int) -> AbstractContextManager[RunPass]:
        """What runs one sample at a setting; whatever must be put in place is, inside the ``with`` block."""
        ...

    def look(self, samples: Sequence[Any], full_depth: int) -> Look:
        """What the model does by itself."""
        ...

    def record(self, inputs: Any, steps: int, spec: Record) -> Trajectory:
        """The trajectory of one pass with ``steps`` steps in every region."""
        ...

    def at_depth(self, inputs: Any, steps: int) -> int:
        """One pass with ``steps`` steps in every region; the steps that the model's own loop took."""
        ...

    def replays(self, path: str) -> bool:
        """Whether calls of this module after the halt are answered from a recording, and so do not count."""
        ...

    def halted(self, inputs: Any, policies: Mapping[str, HaltingPolicy[Any]], budget: int) -> Mapping[str, Tensor]:
        """The steps of the rows of ``inputs`` by region, ``(1, T)`` each, where the model halts itself."""
        ...


@dataclass(frozen=True)
class ByModules:
    """Drives a model whose loop steps are calls of modules of its own, and which is told how deep to go.

    Args:
        model: the model.
        run: one pass of inputs at ``steps`` steps in every region, for recordings.
        modules: region to the module whose call is one step (see :func:`haltkit.record`).
        injections: region to the module that injects its input.
        inputs: what of a sample the model is given.
        fixed: one pass of inputs at a depth; None: ``run``, given a number of steps or a mapping from regions.
        adaptive: one pass under policies; None: the model cannot halt itself.
        by_row: one pass in which every row takes steps of its own; None: the model cannot do that.
    """

    model: nn.Module
    run: Callable[[Any, Any], Any]
    modules: Mapping[str, str]
    injections: Mapping[str, str] = field(default_factory=dict)
    inputs: Callable[[Any], Any] = lambda sample: sample
    fixed: Callable[[Any, Depth], Any] | None = None
    adaptive: Adaptive | None = None
    by_row: ByRow | None = None

    @property
    def regions(self) -> tuple[str, ...]:
        return tuple(self.modules)

    @property
    def native(self) -> bool:
        return self.adaptive is not None

    @property
    def rows_leave(self) -> bool:
        return self.by_row is not None

    @property
    def described(self) -> Mapping[str, Loop]:
        return {}

    @contextmanager
    def using(self, setting: Setting, full_depth: int) -> Iterator[RunPass]:
        depth, policies = setting.depth, setting.policies
        if depth is not None:
            fixed = self.fixed or (lambda inputs, d: self.run(inputs, d.same if d.same is not None else d.steps))
            yield lambda sample: Pass(fixed(self.inputs(sample), depth))
            return
        if setting.by_row is not None:
            leaving, steps = self._leaving(), setting.by_row.of
            yield lambda sample: replace(leaving(self.inputs(sample), steps(sample)), outcome={})
            return
        adaptive = self._adaptive()
        yield lambda sample: adaptive(self.inputs(sample), policies, full_depth)

    def _adaptive(self) -> Adaptive:
        if self.adaptive is None:
            raise ValueError(
                f"this {type(self.model).__name__} is told how deep to go and cannot halt itself: describe it by "
                "Subject.attached, or give adaptive="
            )
        return self.adaptive

    def _leaving(self) -> ByRow:
        if self.by_row is None:
            raise ValueError(
                f"rows of this {type(self.model).__name__} cannot be given depths of their own: give its driver by_row="
            )
        return self.by_row

    def look(self, samples: Sequence[Any], full_depth: int) -> Look:
        if full_depth < 1:
            raise ValueError("a model that is told how deep to go has a full depth: give the subject full_depth=")
        found: list[Mapping[str, RegionTrajectory]] = []
        for sample in samples:
            for row in torch.split(self.inputs(sample), 1):  # a policy that looks at logits takes memory by the row
                if len(found) < 2:
                    found.append(self.record(row, full_depth, Record()).regions)
        return Look(found, (), full_depth)

    def record(self, inputs: Any, steps: int, spec: Record) -> Trajectory:
        with record(self.model, self.modules, spec, injections=self.injections) as recorder:
            self.run(inputs, steps)
        return recorder.trajectory

    def at_depth(self, inputs: Any, steps: int) -> int:
        self.run(inputs, steps)
        return steps

    def replays(self, path: str) -> bool:
        return False

    def halted(self, inputs: Any, policies: Mapping[str, HaltingPolicy[Any]], budget: int) -> Mapping[str, Tensor]:
        return self._adaptive()(inputs, policies, budget).steps


@dataclass(frozen=True)
class ByAttaching:
    """Drives a model that is not ours, from outside (see :func:`haltkit.attach`).

    Full depth is the model as it is, not attached to; a depth or a policy is attached for as long as it is used.

    Args:
        model: the model.
        run: one pass of one sample.
        loops: region to the description of its loop.
        readout: from the state to logits, for policies that look at predictions; or one for each region that has one.
        run_at: one pass of inputs at ``steps`` steps, for a model that can be asked for a depth; None: ``run``, and the
            loop is halted at a depth that it reaches by itself.
        preset: whether the descriptions are the preset's for the model's class.
    """

    model: nn.Module
    run: Callable[[Any], Any]
    loops: Mapping[str, Loop]
    readout: Readout | Mapping[str, Readout] | None = None
    run_at: Callable[[Any, int], Any] | None = None
    preset: bool = False

    @property
    def regions(self) -> tuple[str, ...]:
        return tuple(self.loops)

    @property
    def native(self) -> bool:
        return False

    @property
    def rows_leave(self) -> bool:
        return False

    @property
    def described(self) -> Mapping[str, Loop]:
        return {} if self.preset else self.loops

    @contextmanager
    def using(self, setting: Setting, full_depth: int) -> Iterator[RunPass]:
        depth = setting.depth
        if setting.by_row is not None:
            raise ValueError(
                f"{setting.label}: a {type(self.model).__name__} is halted from outside, where rows cannot be given "
                "depths of their own: use one depth for all rows, or a policy"
            )
        if depth is not None and full_depth and min(depth.steps.values()) >= full_depth:
            yield lambda sample: Pass(self.run(sample))
            return
        with self.attach(setting.policies) as session:

            def one(sample: Any) -> Pass:
                output = self.run(sample)
                return Pass(output, session.steps, {} if depth is not None else session.outcome)

            yield one

    def attach(
        self, policies: Mapping[str, HaltingPolicy[Any]] | None, observer: LoopObserver | None = None
    ) -> Session:
        """A policy attached to each loop; None only observes."""
        return attach(self.model, policies, loops=self.loops, readout=self.readout, observer=observer)

    def look(self, samples: Sequence[Any], full_depth: int) -> Look:
        for loop in self.loops.values():
            if loop.scope_method != "forward":
                raise ValueError(f"compare needs a loop inside a call of forward; this one is in {loop.scope!r}")
        recorder = Recorder()
        depths = []
        for number, sample in enumerate(samples):
            with self.attach(None, None if number else recorder) as session:
                self.run(sample)
                for region, tally in session.tally.items():
                    if tally.loops != 1:
                        where = f"loop {region!r}" if len(self.loops) > 1 else "loop"
                        raise ValueError(
                            f"the {where} ran {tally.loops} times on one sample, and compare measures loops that run "
                            "once per sample: let run call the model once, and of nested loops describe only the "
                            "outer one"
                        )
                depths.append({region: session.tally[region].computed for region in self.loops})
        deepest = max(max(steps.values()) for steps in depths)
        if deepest < 2:
            raise ValueError("the loop takes a single step on every sample: there is nothing to halt")
        return Look([{region: recorder.trajectory[region] for region in self.loops}], depths, deepest)

    def record(self, inputs: Any, steps: int, spec: Record) -> Trajectory:
        recorder = Recorder(spec)
        went = self._run_at(inputs, steps, recorder)
        recorder.metadata |= {f"iterations of {region}": str(count) for region, count in went.items()}
        # A fixed depth ends every row at once: all an outcome can say is that a row stopped being finite before.
        plain = {
            name: region if _stopped_being_finite(region) else replace(region, outcome=None)
            for name, region in recorder.trajectory.regions.items()
        }
        return Trajectory(plain, recorder.metadata)

    def at_depth(self, inputs: Any, steps: int) -> int:
        return max(self._run_at(inputs, steps, None).values())

    def _run_at(self, inputs: Any, steps: int, observer: LoopObserver | None) -> dict[str, int]:
        """One pass at a depth; the steps that the model's own loops took."""
        with self.attach(Depth.uniform(steps, self.regions).policies, observer) as session:
            if self.run_at is None:
                self.run(inputs)
            else:
                self.run_at(inputs, steps)
        return {region: tally.computed + tally.skipped for region, tally in session.tally.items()}

    def replays(self, path: str) -> bool:
        return any(path in loop.body for loop in self.loops.values())

    def halted(self, inputs: Any, policies: Mapping[str, HaltingPolicy[Any]], budget: int) -> Mapping[str, Tensor]:
        raise ValueError(f"this {type(self.model).__name__} does not halt itself: judge a recording by haltkit.replay")


def _stopped_being_finite(region: RegionTrajectory) -> bool:
    return region.outcome is not None and bool((region.outcome == Outcome.NONFINITE).any())
