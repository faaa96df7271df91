"""A looped model as the diagnostics see it: how to run it, where its loops are and which layers are inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment import Loop, attach
from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.layers import record_layers
from haltkit.loop import Outcome
from haltkit.protocol import Readout
from haltkit.recorder import Record, Recorder, record
from haltkit.registry import policy
from haltkit.trajectory import RegionTrajectory, Trajectory

__all__ = ["LayerStates", "Subject"]

LayerStates = dict[str, list[Tensor]]


def _stopped_being_finite(region: RegionTrajectory) -> bool:
    return region.outcome is not None and bool((region.outcome == Outcome.NONFINITE).any())


@dataclass(frozen=True)
class Subject:
    """A model to diagnose. Make one with :meth:`of_modules` or :meth:`attached`.

    Attributes:
        model: uncompiled, in evaluation mode.
        run: one forward pass of inputs ``(B, T)`` at so many loops of every region. A model whose depth is its own
            business may ignore the number, as long as it runs at least as many (``attached`` then stops it).
        name: for tables and titles.
        modules: region to the module whose call is one loop step (see :func:`haltkit.record`); empty if ``loop``.
        injections: region to the module that injects its input.
        loop: the description of a foreign model's loop (see :func:`haltkit.attach`); None if ``modules``.
        layers: region to the layers inside, in the order of the cycle.
        depth: the residual stream from bottom to top: modules that run once, and regions by name. Empty: the regions.
        readout: from the state to logits, for policies that look at them.
        tokens: from token ids ``(T,)`` to their text, for the page.
        halted: from (inputs ``(1, T)``, policy spec, budget) to each region's steps ``(T,)``, where the model has a
            native way to halt tokens; None judges the recording (:func:`haltkit.replay`).
    """

    model: nn.Module
    run: Callable[[Tensor, int], Any]
    name: str = "model"
    modules: Mapping[str, str] = field(default_factory=dict)
    injections: Mapping[str, str] = field(default_factory=dict)
    loop: Loop | None = None
    layers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    depth: Sequence[str] = ()
    readout: Readout | None = None
    tokens: Callable[[Tensor], list[str]] | None = None
    halted: Callable[[Tensor, str, int], Mapping[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        if not self.regions:
            raise DiagnosticError(f"{self.name} has no looped region: there is no loop to look at")

    @classmethod
    def of_modules(
        cls, model: nn.Module, run: Callable[[Tensor, int], Any], modules: Mapping[str, str], **more: Any
    ) -> Subject:
        """A model whose loop step is one module: ``{"core": "transformer.core"}``."""
        return cls(model, run, modules=dict(modules), **more)

    @classmethod
    def attached(
        cls, model: nn.Module, run: Callable[[Tensor, int], Any], loop: Loop | None = None, **more: Any
    ) -> Subject:
        """A model that is not ours, through :func:`haltkit.attach`: ``loop`` describes it (None: by its preset).

        The layers are the modules of the loop's body, where there is more than one, unless given.
        """
        with attach(model, policy("fixed:steps=1"), loop) as session:
            found, readout = session.loop, session.readout
        more.setdefault("layers", {found.body[0]: found.body} if len(found.body) > 1 else {})
        return cls(model, run, loop=found, **{"readout": readout, **more})

    @property
    def regions(self) -> list[str]:
        """Names of the regions, in the order they run."""
        return list(self.modules) if self.loop is None else [self.loop.body[0]]

    def layer_paths(self, region: str) -> tuple[str, ...]:
        """The layers inside a region; a region that names none is one layer, seen only from outside."""
        return tuple(self.layers.get(region, ()))

    @torch.no_grad()
    def record(self, inputs: Tensor, loops: int, spec: Record | None = None) -> Trajectory:
        """The trajectory of one pass at a fixed depth.

        Raises:
            DiagnosticError: the model ran another number of loops than it was asked for.
        """
        if self.loop is None:
            with record(self.model, self.modules, spec, injections=self.injections) as recorder:
                self.run(inputs, loops)
            found = recorder.trajectory
        else:
            recorder = Recorder(spec or Record())
            recorder.metadata["iterations"] = str(self._attached(inputs, loops, recorder))
            # A fixed depth ends every row at once: all an outcome can say is that a row stopped being finite before.
            plain = {
                name: region if _stopped_being_finite(region) else replace(region, outcome=None)
                for name, region in recorder.trajectory.regions.items()
            }
            found = Trajectory(plain, recorder.metadata)
        for name, region in found.regions.items():
            if region.max_steps != loops:
                raise DiagnosticError(
                    f"region {name!r} of {self.name} ran {region.max_steps} loops when asked for {loops}: give a run= "
                    "that sets the depth, or ask for no more loops than it runs"
                )
        return found

    @torch.no_grad()
    def with_layers(self, inputs: Tensor, loops: int, spec: Record | None = None) -> tuple[Trajectory, LayerStates]:
        """The trajectory and, by path, each known layer's output at every recurrence.

        Raises:
            DiagnosticError: a layer that is not inside the loop, or a loop that runs several times in one pass.
        """
        paths = [path for name in self.regions for path in self.layer_paths(name)]
        with record_layers(self.model, paths) as kept:
            trajectory = self.record(inputs, loops, spec)
        iterations = int(trajectory.metadata.get("iterations", loops))
        return trajectory, {path: self.by_recurrence(path, kept[path], loops, iterations) for path in paths}

    def by_recurrence(self, path: str, kept: list[Tensor], loops: int, iterations: int) -> list[Tensor]:
        """One entry a recurrence, the last of each, from what every call of a layer gave in one pass.

        Args:
            iterations: those of the model's own loop; modules that :func:`haltkit.attach` replays are called in the
                ones after the halt too, and those calls do not count.

        Raises:
            DiagnosticError: calls that do not come to so many a recurrence.
        """
        rounds = iterations if self.loop is not None and path in self.loop.body else loops
        if not kept or len(kept) % rounds:
            raise DiagnosticError(
                f"layer {path!r} ran {len(kept)} times in {rounds} loops: name layers that run inside the loop, and a "
                "loop that runs once in a forward pass"
            )
        each = len(kept) // rounds
        return kept[each - 1 : each * loops : each]

    def at_depth(self, inputs: Tensor, loops: int) -> int:
        """One pass at a fixed depth, for hooks that are already in place; the iterations of the model's own loop."""
        with torch.no_grad():
            if self.loop is None:
                self.run(inputs, loops)
                return loops
            return self._attached(inputs, loops, None)

    def _attached(self, inputs: Tensor, loops: int, recorder: Recorder | None) -> int:
        with attach(self.model, policy(f"fixed:steps={loops}"), loop=self.loop, observer=recorder) as session:
            self.run(inputs, loops)
        return session.computed + session.skipped
