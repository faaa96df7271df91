"""A recorded loop: what was kept of it, and the signals computed from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from haltkit import signals
from haltkit.files import usual_mode
from haltkit.loop import Outcome

__all__ = ["STATISTICS", "RegionTrajectory", "Trajectory", "TrajectoryError", "delta_loop_ratios"]

# Reduced statistics that a recorder keeps a step and row, instead of the state.
STATISTICS = ("state_norm", "step_norm", "acceleration", "step_angle")
FORMAT = "haltkit-trajectory-1"


class TrajectoryError(ValueError):
    """A recording that lacks what is asked of it, or does not fit it."""


@dataclass(frozen=True, repr=False)
class RegionTrajectory:
    """One region's loop.

    Attributes:
        recorded: the steps ``k`` kept, ascending, ``(N,)`` int64; states include ``k = 0``.
        states: ``x_k`` at those steps, ``(N, ..., D)``, or None when only statistics were kept.
        statistics: ``(N, ...)`` float each, by the names in :data:`STATISTICS`; empty when states were kept.
        first: ``x_0``, ``(..., D)``.
        last: the state handed on, ``(..., D)``.
        steps: body applications of each row, ``(...)`` int64.
        outcome: an :class:`~haltkit.loop.Outcome` each, ``(...)`` int8; None where no policy was running.
        injected: what enters the first layer at step 1, ``(..., D)``, where the model injects an input.
        name: of the region.
    """

    recorded: Tensor
    states: Tensor | None
    statistics: Mapping[str, Tensor]
    first: Tensor
    last: Tensor
    steps: Tensor
    outcome: Tensor | None = None
    injected: Tensor | None = None
    name: str = "loop"

    def __repr__(self) -> str:
        kept = f"statistics {', '.join(self.statistics)}"
        if self.states is not None:
            kept = f"states {tuple(self.states.shape)} {str(self.states.dtype).removeprefix('torch.')}"
        return f"RegionTrajectory({self.max_steps} steps, {kept})"

    @property
    def max_steps(self) -> int:
        """The number of loop steps that the recording covers."""
        return int(self.recorded[-1])

    @property
    def present(self) -> Tensor:
        """Rows that are no padding, ``(...)`` bool."""
        if self.outcome is None:
            return torch.ones_like(self.steps, dtype=torch.bool)
        return self.outcome != Outcome.ABSENT

    def _consecutive_states(self) -> Tensor:
        if self.states is None:
            raise TrajectoryError("this recording has statistics, not states: record with what='states'")
        if len(self.recorded) != self.max_steps + 1:
            raise TrajectoryError("this recording skips steps: record with every=1")
        return self.states

    def differences(self) -> Tensor:
        """``d_1 .. d_K``, ``(K, ..., D)``."""
        states = signals.measured(self._consecutive_states())
        return states[1:] - states[:-1]

    def _statistic(self, name: str) -> Tensor:
        if name not in self.statistics:
            raise TrajectoryError(f"this recording has no {name}")
        return self.statistics[name]

    def _ran(self, values: Tensor, steps: Tensor) -> Tensor:
        """NaN at steps that a row did not take: a value there would be made up."""
        k = steps.view(-1, *[1] * self.steps.ndim)
        ran = self.steps
        if self.outcome is not None:  # the step at which a row stopped being finite led nowhere
            ran = ran - (self.outcome == Outcome.NONFINITE).long()
        return values.masked_fill(k > ran, torch.nan)

    def _series(self, name: str, computed: Tensor | None) -> Tensor:
        if computed is not None:
            return self._ran(computed, torch.arange(1, self.max_steps + 1))
        return self._ran(self._statistic(name), self.recorded)

    def step_norms(self) -> Tensor:
        """``||d_k||`` at k = 1 .. K, or at the recorded steps of a recording of statistics; ``(K, ...)``."""
        return self._series("step_norm", signals.norm(self.differences()) if self.states is not None else None)

    def accelerations(self) -> Tensor:
        """``||d_k - d_{k-1}||``, ``(K, ...)``; ``+inf`` at k = 1, where it is not defined."""
        computed = None
        if self.states is not None:
            d = self.differences()
            computed = torch.full(d.shape[:-1], torch.inf, dtype=d.dtype)
            computed[1:] = signals.acceleration(d[1:], d[:-1])
        return self._series("acceleration", computed)

    def step_angles(self) -> Tensor:
        """``cos(d_k, d_{k-1})``, ``(K, ...)``; NaN at k = 1, where it is not defined."""
        computed = None
        if self.states is not None:
            d = self.differences()
            computed = torch.full(d.shape[:-1], torch.nan, dtype=d.dtype)
            computed[1:] = signals.step_angle(d[1:], d[:-1])
        return self._series("step_angle", computed)

    def state_norms(self) -> Tensor:
        """``||x_k||`` at k = 1 .. K, or at the recorded steps of a recording of statistics; ``(K, ...)``."""
        return self._series(
            "state_norm", signals.norm(self._consecutive_states()[1:]) if self.states is not None else None
        )


@dataclass(frozen=True, repr=False)
class Trajectory:
    """The loops of one forward pass, by region in the order they ran, and what is known of their origin."""

    regions: Mapping[str, RegionTrajectory]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Trajectory({', '.join(f'{name}: {region!r}' for name, region in self.regions.items())})"

    def __getitem__(self, region: str) -> RegionTrajectory:
        if region not in self.regions:
            raise TrajectoryError(f"no region {region!r} in this recording; there are: {', '.join(self.regions)}")
        return self.regions[region]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, metadata included."""
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, region in self.regions.items():
            for key in ("recorded", "states", "first", "last", "steps", "outcome", "injected"):
                value = getattr(region, key)
                if value is not None:
                    tensors[f"{name}/{key}"] = value.contiguous().clone()
            for key, value in region.statistics.items():
                tensors[f"{name}/statistics/{key}"] = value.contiguous().clone()
        with usual_mode(Path(path)):
            save_file(tensors, path, {**self.metadata, "format": FORMAT, "regions": "\n".join(self.regions)})

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read a file written by :meth:`save`.

        Raises:
            TrajectoryError: the file does not exist, is not safetensors, or is not a recording.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise TrajectoryError(f"no recording {str(path)!r}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise TrajectoryError(f"{str(path)!r} cannot be read: {error}") from None
        if metadata.pop("format", None) != FORMAT:
            raise TrajectoryError(f"{str(path)!r} is not a recording made by haltkit")
        regions = {}
        for name in metadata.pop("regions").split("\n"):
            own = {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
            statistics = {k.partition("/")[2]: own.pop(k) for k in list(own) if k.startswith("statistics/")}
            regions[name] = RegionTrajectory(
                recorded=own["recorded"],
                states=own.get("states"),
                statistics=statistics,
                first=own["first"],
                last=own["last"],
                steps=own["steps"],
                outcome=own.get("outcome"),
                injected=own.get("injected"),
                name=name,
            )
        return cls(regions, metadata)


def delta_loop_ratios(before: RegionTrajectory, after: RegionTrajectory) -> dict[str, Tensor]:
    """DLR (arXiv 2509.23314, Eq. 2) at the boundary between two adjacent regions, in every convention, per token.

    The jump is measured to ``noise`` (``x^(0)`` of the next region as drawn), to ``injected`` (what the projection
    of ``[x^(0); e]`` hands to its first layer; only where that was recorded) and to ``net`` (its ``x^(K)``). The
    unit is the mean step norm of the region before, over all steps and, under ``... without d_1``, over all but
    the first: with fresh noise both the jump and ``d_1`` are noise-sized, so a large DLR needs no training.

    Returns:
        convention to DLR, ``(...)`` each; NaN for a row that stopped being finite.
    """
    norms = before.step_norms()
    halted = before.steps < before.max_steps
    if before.outcome is not None:
        halted &= before.outcome != Outcome.NONFINITE
    if halted.any() or len(norms) != before.max_steps:
        raise TrajectoryError("DLR needs every step of a recording at a fixed depth (every=1, and no policy)")
    targets = {"noise": after.first, "injected": after.injected, "net": after.last}
    result = {}
    for name, target in targets.items():
        if target is not None:
            jump = signals.difference(target, before.last)
            result[name] = signals.delta_loop_ratio(jump, norms)
            if len(norms) > 1:
                result[f"{name} without d_1"] = signals.delta_loop_ratio(jump, norms[1:])
    return result
