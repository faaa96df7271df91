"""A looped model as every tool sees it: how to run it at a setting, what that loses, and what is inside its loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from haltkit.attachment import Loop
from haltkit.attachment.presets import preset_for
from haltkit.calibration.losses import Judged, as_losses
from haltkit.driving import Adaptive, ByAttaching, ByModules, ByRow, Driver, Look, Pass, RunPass
from haltkit.kinds import DepthByRow, Kinds
from haltkit.policies import Table
from haltkit.protocol import MOST, Readout
from haltkit.recording.layers import LayerStates, record_layers
from haltkit.recording.recorder import Record
from haltkit.recording.replay import readout_of_recordings, replay
from haltkit.recording.trajectory import Trajectory, TrajectoryError
from haltkit.setting import Setting
from haltkit.specs import Policies

__all__ = ["LayerStates", "Pass", "Subject"]

# Fixed depths that a comparison tries, below full depth.
FIXED_DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True)
class Subject:
    """A looped model, with the samples and the loss that tools measure it by.

    Make one with :meth:`attached` or :meth:`of_modules`.

    Attributes:
        model: in evaluation mode.
        driver: runs its passes.
        name: for tables and titles.
        samples: what it is run on; with one alone there is no standard error, and few conclusions.
        loss: from (output, sample) to what is lost, less is better: a number, ``(B,)`` with an entry per sequence or
            ``(B, T)`` with one per position. None: the output is that itself.
        metric: names the loss in tables, as ``CE``.
        unit: of the loss; ``nats`` of cross-entropy gives perplexities too.
        item: what one entry of the loss is for, as in "ms per token".
        levels: three qualities to draw conclusions at, as losses above full depth, the middle one being what a winner
            is chosen by; None: 0.1%, 1% and 5% of full depth's loss.
        logits: from the output to logits ``(B, T, V)``, for agreement and KL with full depth; None: not measured.
        readout: from the state to logits, for policies that look at predictions.
        labels: from a sample to the right class of each row, ``(B, T)`` int64, as the readout numbers classes; below 0
            where a row is asked nothing. None: the data have none, and nothing that needs them is measured.
        layers: region to the paths of the layers inside, in the order of one step.
        depth: the residual stream from bottom to top: modules that run once, and regions by name. Empty: the regions.
        tokens: from token ids ``(T,)`` to their text.
        inputs: what of a sample the model is given, as :meth:`record` takes it.
        full_depth: steps of "full depth", and the budget of a policy in each region; 0: as many as the model itself
            takes on the samples.
        granularity: which rows decide together under a policy that does not say. From outside only a halt of all rows
            saves time, so :meth:`attached` says ``batch``.
        fixed_depths: depths that a comparison tries, as far as they are below full depth.
        target_steps: where thresholds that are picked from scores should stop a typical row; None: at shares of full
            depth.
        kinds: tells rows apart by the input alone, so that fixed depths by kind can be tried; only where each row can
            be given steps of its own. None: all rows are alike.
        about: what else is known of it, plain values that results carry along.
    """

    model: nn.Module
    driver: Driver
    name: str = "model"
    samples: Sequence[Any] = ()
    loss: Callable[[Any, Any], Tensor | float] | None = None
    metric: str = "loss"
    unit: str = "loss"
    item: str = "item"
    levels: tuple[float, float, float] | None = None
    logits: Callable[[Any], Tensor] | None = None
    readout: Readout | None = None
    labels: Callable[[Any], Tensor] | None = None
    layers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    depth: Sequence[str] = ()
    tokens: Callable[[Tensor], list[str]] | None = None
    inputs: Callable[[Any], Any] = lambda sample: sample
    full_depth: int = 0
    granularity: Literal["token", "sequence", "batch"] = "token"
    fixed_depths: tuple[int, ...] = FIXED_DEPTHS
    target_steps: tuple[int, ...] | None = None
    kinds: Kinds | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ValueError(f"a Subject needs a model (an nn.Module), not a {type(self.model).__name__}")
        if self.kinds is not None and not self.driver.rows_leave:
            raise ValueError("kinds= is for a model whose rows can be given steps of their own (by_row= of its driver)")
        object.__setattr__(self, "samples", list(self.samples))

    @classmethod
    def attached(
        cls,
        model: nn.Module,
        run: Callable[[Any], Any] | None = None,
        loop: Loop | None = None,
        *,
        loops: Mapping[str, Loop] | None = None,
        run_at: Callable[[Any, int], Any] | None = None,
        readout: Readout | None = None,
        **more: Any,
    ) -> Subject:
        """A model that is not ours, halted from outside (see :func:`haltkit.attach`)::

            subject = Subject.attached(model, samples=batches, loss=residual, loop=haltkit.Loop(["core"]))

        Args:
            model: with a loop inside.
            run: one pass of the model on one sample; None: the model itself.
            loop: the description of the one loop, a region called ``loop``; None finds the preset for the model's
                class.
            loops: the descriptions of several loops by region instead.
            run_at: one pass of inputs at a number of steps, for a model that can be asked for a depth.
            readout: from the state to logits; None asks the preset.
            more: further attributes. The layers are the modules of each loop's body, where there is more than one.

        Raises:
            AttachError: no description and no preset, or one that does not fit.
            ValueError: a model that halts itself.
        """
        if loop is not None and loops is not None:
            raise ValueError("give one loop= or several loops=, not both")
        if not isinstance(model, nn.Module) or not callable(run or model):
            raise ValueError("a Subject needs a model (an nn.Module) and run, a function of one sample")
        preset = loops is None and loop is None
        if preset:
            found, readout = preset_for(model, readout)
            if not isinstance(found, (Loop, dict)):
                raise ValueError(
                    f"a {type(model).__name__} halts itself: make its subject as "
                    "haltkit.models.gpt.subject.gpt_subject does"
                )
            loop, loops = (found, None) if isinstance(found, Loop) else (None, found)
        described = {"loop": loop} if loop is not None else dict(loops or {})
        driver = ByAttaching(model, run or model, described, readout, run_at, preset)
        with driver.attach(Setting.of(1, driver.regions).policies):  # a description that does not fit shows now
            pass
        bodies = {name: one.body for name, one in described.items() if not any(":" in path for path in one.body)}
        more.setdefault("layers", {name: body for name, body in bodies.items() if len(body) > 1})
        return cls(model, driver, **{"readout": readout, "granularity": "batch", **more})

    @classmethod
    def of_modules(
        cls,
        model: nn.Module,
        run: Callable[[Any, Any], Any],
        modules: Mapping[str, str],
        *,
        injections: Mapping[str, str] | None = None,
        adaptive: Adaptive | None = None,
        by_row: ByRow | None = None,
        **more: Any,
    ) -> Subject:
        """A model whose loop step is the call of one module, and which is told how deep to go.

        Args:
            model: the model.
            run: one pass of inputs at a number of steps, or at a mapping from regions to steps.
            modules: region to that module's path, as in ``{"core": "transformer.core"}``.
            injections: region to the module that injects its input.
            adaptive: one pass of inputs under policies by region and a budget, for a model that halts itself.
            by_row: one pass of inputs in which each row takes the steps that it is given by region, for a model that
                can do that.
            more: further attributes.
        """
        inputs = {"inputs": more["inputs"]} if "inputs" in more else {}
        driver = ByModules(
            model, run, dict(modules), dict(injections or {}), adaptive=adaptive, by_row=by_row, **inputs
        )
        return cls(model, driver, **more)

    @property
    def regions(self) -> tuple[str, ...]:
        """Names of the regions, in the order they run."""
        return self.driver.regions

    def layer_paths(self, region: str) -> tuple[str, ...]:
        """The layers inside a region; a region that names none is one layer, seen only from outside."""
        return tuple(self.layers.get(region, ()))

    @property
    def described(self) -> Mapping[str, Loop]:
        """The descriptions of loops that a user gave, by region; none for presets and models that halt themselves."""
        return self.driver.described

    @property
    def halts_itself(self) -> bool:
        """Whether :meth:`halted` asks the model; otherwise it judges a recording."""
        return self.driver.native

    # --- running it

    def using(self, setting: Setting) -> AbstractContextManager[RunPass]:
        """What runs one sample at a setting, inside a ``with`` block whose beginning and end are not to be timed::

        with subject.using(Setting.of("accel:tau=1e-3", subject.regions)) as run:
            done = run(sample)  # a Pass
        """
        return self.driver.using(self._known(setting), self.full_depth)

    def _known(self, setting: Setting) -> Setting:
        """The setting, with tables replaced by the depths of rows that they say.

        Raises:
            ValueError: tables in some regions only, or no kinds to look up.
        """
        if not setting.looked_up:
            return setting
        tables = {name: policy for name, policy in setting.policies.items() if isinstance(policy, Table)}
        if len(tables) < len(setting.policies):
            raise ValueError(
                f"a table in {', '.join(tables)} alone: depths of rows are for all regions, so give the others a table "
                "too, in which every kind may have the same depth"
            )
        if self.kinds is None:
            raise ValueError(
                f"a table is looked up by kind of row, and {self.name} does not say its rows' kinds: give the Subject "
                "kinds=, run the text model in mode forward, or use another policy"
            )
        of, most = self.kinds.of, self.full_depth or MOST  # full depth is the budget of a policy

        def depths(sample: Any) -> dict[str, Tensor]:
            kinds = of(sample)
            return {name: table.steps(kinds, name).clamp_max(most) for name, table in tables.items()}

        deepest = {name: min(table.deepest(name), most) for name, table in tables.items()}
        return replace(setting, how=DepthByRow(depths, deepest, f"table by {self.kinds.what}"))

    @torch.no_grad()
    def run(self, sample: Any, setting: Setting | int | Policies) -> Pass:
        """One pass of one sample at a setting, as a value or as :meth:`Setting.of` takes it."""
        with self.using(Setting.of(setting, self.regions)) as run:
            return run(sample)

    def losses(self, output: Any, sample: Any) -> Tensor:
        """What a pass lost, ``(B,)`` or ``(B, T)``.

        Raises:
            ValueError: the loss is not a number or a tensor of numbers, or not finite.
        """
        return as_losses(output if self.loss is None else self.loss(output, sample))

    def judged(self, output: Any, sample: Any) -> Judged:
        """What a pass lost, and its top predictions if there are logits; the logits themselves are not kept.

        Raises:
            ValueError: see :meth:`losses`.
        """
        tops = None if self.logits is None else self.logits(output).argmax(-1)
        return Judged(self.losses(output, sample), tops)

    @torch.no_grad()
    def look(self) -> Look:
        """What the model does by itself on the samples: its depth, and recordings of the first ones.

        Raises:
            ValueError: no samples, no looped region, or a loop that is not run once per sample.
        """
        if not self.samples:
            raise ValueError("a Subject needs at least one sample to run the model on")
        return self._looped().look(self.samples, self.full_depth)

    def _looped(self) -> Driver:
        if not self.regions:
            raise ValueError(f"{self.name} is a model without looped regions: there is nothing to halt")
        return self.driver

    # --- looking inside

    @torch.no_grad()
    def record(self, inputs: Any, steps: int, spec: Record | None = None) -> Trajectory:
        """The trajectory of one pass with ``steps`` steps in every region.

        Raises:
            ValueError: the model ran another number of steps than it was asked for.
        """
        found = self._looped().record(inputs, steps, spec or Record())
        for name, region in found.regions.items():
            if region.max_steps != steps:
                raise TrajectoryError(
                    f"region {name!r} of {self.name} ran {region.max_steps} steps when asked for {steps}: give a "
                    "run_at= that sets the depth, or ask for no more steps than it runs"
                )
        return found

    def with_layers(self, inputs: Any, steps: int, spec: Record | None = None) -> tuple[Trajectory, LayerStates]:
        """The trajectory and, by path, each known layer's output at every step.

        Raises:
            ValueError: a layer that is not inside the loop, or a loop that runs several times in one pass.
        """
        paths = [path for name in self.regions for path in self.layer_paths(name)]
        with record_layers(self.model, paths) as kept:
            trajectory = self.record(inputs, steps, spec)
        went = {name: int(trajectory.metadata.get(f"iterations of {name}", steps)) for name in self.regions}
        return trajectory, {
            path: self.by_step(path, kept[path], steps, went[name])
            for name in self.regions
            for path in self.layer_paths(name)
        }

    def by_step(self, path: str, kept: list[Tensor], steps: int, iterations: int) -> list[Tensor]:
        """One entry per step, the last of each, from what every call of a layer gave in one pass.

        Args:
            iterations: those of the model's own loop; modules that :func:`haltkit.attach` replays are called in the
                ones after the halt too, and those calls do not count.

        Raises:
            ValueError: the layer ran a number of times that is no multiple of the steps.
        """
        rounds = iterations if self.driver.replays(path) else steps
        if not kept or len(kept) % rounds:
            raise TrajectoryError(
                f"layer {path!r} ran {len(kept)} times in {rounds} steps: name layers that run inside the loop, and a "
                "loop that runs once in a forward pass"
            )
        each = len(kept) // rounds
        return kept[each - 1 : each * steps : each]

    @torch.no_grad()
    def at_depth(self, inputs: Any, steps: int) -> int:
        """One pass at a fixed depth, for hooks that are already in place; the iterations of the model's own loop."""
        return self.driver.at_depth(inputs, steps)

    @torch.no_grad()
    def halted(self, inputs: Any, policy: Policies, budget: int) -> Mapping[str, Tensor]:
        """Each region's steps ``(T,)`` under a policy, for inputs ``(1, T)``.

        A model that halts itself is run; otherwise a recording at full depth is judged (:func:`haltkit.replay`).
        """
        policies = Setting.of(policy, self.regions).policies
        if self.driver.native:
            taken = self.driver.halted(inputs, policies, budget)
        else:
            readout = self.readout and readout_of_recordings(self.readout, self.model)
            recorded = self.record(inputs, budget).regions
            taken = {name: replay(policies[name], region, readout=readout).steps for name, region in recorded.items()}
        return {name: steps[0] for name, steps in taken.items()}
