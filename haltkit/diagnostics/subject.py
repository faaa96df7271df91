"""A looped model as the diagnostics see it: how to run it, where its loops are and which layers are inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment import Loop, attach
from haltkit.diagnostics.errors import DiagnosticError
from haltkit.protocol import Readout
from haltkit.recorder import Record, Recorder, record
from haltkit.registry import policy
from haltkit.trajectory import Trajectory

__all__ = ["Subject"]


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
            with attach(self.model, policy(f"fixed:steps={loops}"), loop=self.loop, observer=recorder):
                self.run(inputs, loops)
            # A fixed depth ends every row at once: nothing is left out, so outcomes say nothing.
            plain = {name: replace(region, outcome=None) for name, region in recorder.trajectory.regions.items()}
            found = Trajectory(plain, recorder.metadata)
        for name, region in found.regions.items():
            if region.max_steps != loops:
                raise DiagnosticError(
                    f"region {name!r} of {self.name} ran {region.max_steps} loops when asked for {loops}: give a run= "
                    "that sets the depth, or ask for no more loops than it runs"
                )
        return found

    @torch.no_grad()
    def at_depth(self, inputs: Tensor, loops: int) -> None:
        """One pass at a fixed depth, for hooks that are already in place."""
        if self.loop is None:
            self.run(inputs, loops)
        else:
            with attach(self.model, policy(f"fixed:steps={loops}"), loop=self.loop):
                self.run(inputs, loops)
