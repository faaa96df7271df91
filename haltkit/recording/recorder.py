"""Recorders: keep a loop's states, or statistics of them, as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from haltkit import signals
from haltkit.recording.trajectory import STATISTICS, RegionTrajectory, Trajectory

__all__ = ["Record", "Recorder", "RecordingTooLarge", "record"]


class RecordingTooLarge(ValueError):
    """The next step would take a recording over its ``max_bytes``."""


@dataclass(frozen=True)
class Record:
    """What to record, as a value.

    Args:
        what: ``states`` keeps every ``x_k``; ``statistics`` keeps four numbers per row and step
            (:data:`~haltkit.recording.trajectory.STATISTICS`), computed as the loop runs.
        regions: which regions; None for all.
        every: keep every n-th step (statistics are measured at each step in either case).
        max_bytes: refuse to grow beyond this.
    """

    what: Literal["states", "statistics"] = "states"
    regions: tuple[str, ...] | None = None
    every: int = 1
    max_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.what not in ("states", "statistics"):
            raise ValueError(f"what={self.what!r}: allowed are 'states' and 'statistics'")
        if self.every < 1:
            raise ValueError(f"every={self.every}: it must be at least 1")


@dataclass
class _Region:
    """A recording of one region in progress."""

    first: Tensor
    x: Tensor
    recorded: list[int]
    kept: list[Tensor]
    d: Tensor | None = None
    k: int = 0
    steps: Tensor | None = None
    outcome: Tensor | None = None
    injected: Tensor | None = None
    size: int = 0  # bytes


@dataclass
class Recorder:
    """Observes loops (pass it as ``observer=``) and keeps the latest pass as a :class:`Trajectory`.

    Recorded tensors are detached copies on the CPU, states in their own dtype, statistics as measured.

    Attributes:
        spec: what to keep.
        metadata: strings saved along with the recording.
    """

    spec: Record = field(default_factory=Record)
    metadata: dict[str, str] = field(default_factory=dict)
    _regions: dict[str, _Region] = field(default_factory=dict)
    _bytes: int = 0

    def _wants(self, name: str) -> bool:
        return self.spec.regions is None or name in self.spec.regions

    def clear(self) -> None:
        """Forget what was recorded; the next loop starts a new trajectory."""
        self._regions, self._bytes = {}, 0

    def begin(self, name: str, x0: Tensor) -> None:
        """A loop called ``name`` starts at ``x0``.

        If it ran before, this is a new pass; or, while a loop around it is still running, its newest turn within one.
        """
        if not self._wants(name):
            return
        if name in self._regions:
            if any(region.steps is None for other, region in self._regions.items() if other != name):
                self._bytes -= self._regions.pop(name).size
            else:
                self.clear()
        x0 = x0.detach().to("cpu", copy=True)
        kept, recorded = ([x0], [0]) if self.spec.what == "states" else ([], [])
        region = self._regions[name] = _Region(x0, x0, recorded, kept)
        self._count(region, 2 * x0.nbytes)

    def _count(self, region: _Region, size: int) -> None:
        region.size += size
        self._bytes += size
        if self._bytes > self.spec.max_bytes:
            raise RecordingTooLarge(
                f"this recording would exceed {self.spec.max_bytes / 2**20:.0f} MiB: record statistics instead of "
                "states, fewer regions, every n-th step, or raise max_bytes"
            )

    def step(self, name: str, k: int, x: Tensor) -> None:
        """The loop has reached ``x_k``."""
        region = self._regions.get(name)
        if region is None or not self._wants(name):
            return
        x = x.detach().to("cpu", copy=True)
        keep = k % self.spec.every == 0
        if self.spec.what == "states":
            value = x
        else:
            d = signals.difference(x, region.x)
            value = self._statistics(x, d, region.d)
            region.d = d
        if keep:
            self._count(region, value.nbytes)
            region.recorded.append(k)
            region.kept.append(value)
        region.x, region.k = x, k

    @staticmethod
    def _statistics(x: Tensor, d: Tensor, d_prev: Tensor | None) -> Tensor:
        """The four statistics of one step, ``(4, ...)``, in the order of ``STATISTICS``."""
        step_norm = signals.norm(d)
        if d_prev is None:
            accel, angle = torch.full_like(step_norm, torch.inf), torch.full_like(step_norm, torch.nan)
        else:
            accel, angle = signals.acceleration(d, d_prev), signals.step_angle(d, d_prev)
        return torch.stack([signals.norm(x), step_norm, accel, angle])

    def end(self, name: str, steps: Tensor | None, outcome: Tensor | None) -> None:
        """The loop is over. Rows took ``steps`` steps each (None: all of them)."""
        region = self._regions.get(name)
        if region is not None and self._wants(name):
            region.steps = None if steps is None else steps.detach().cpu()
            region.outcome = None if outcome is None else outcome.detach().cpu()

    def newest(self, name: str) -> Tensor:
        """The newest state of a loop in progress."""
        return self._regions[name].x

    def inject(self, name: str, x: Tensor) -> None:
        """What enters the region's first layer at its first step."""
        region = self._regions.get(name)
        if region is not None and region.injected is None:
            region.injected = x.detach().to("cpu", copy=True)

    @property
    def trajectory(self) -> Trajectory:
        """The latest pass.

        Raises:
            ValueError: nothing was recorded.
        """
        if not any(region.k for region in self._regions.values()):
            wanted = "" if self.spec.regions is None else f" in {', '.join(self.spec.regions)}"
            raise ValueError(f"nothing was recorded: no loop ran{wanted}")
        return Trajectory(
            {name: self._finish(name, r) for name, r in self._regions.items() if r.recorded}, self.metadata
        )

    def _finish(self, name: str, region: _Region) -> RegionTrajectory:
        stacked = torch.stack(region.kept)
        states = stacked if self.spec.what == "states" else None
        statistics = {} if states is not None else {name: stacked[:, i] for i, name in enumerate(STATISTICS)}
        steps = region.steps if region.steps is not None else torch.full(region.first.shape[:-1], region.k)
        return RegionTrajectory(
            recorded=torch.tensor(region.recorded),
            states=states,
            statistics=statistics,
            first=region.first,
            last=region.x,
            steps=steps,
            outcome=region.outcome,
            injected=region.injected,
            name=name,
        )


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two states are one, also where they are not a number."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _change_of(x: Tensor) -> Callable[[], bool]:
    """Tells, when asked later, whether ``x`` was changed in place: inference tensors, without versions, by a copy."""
    if x.is_inference():
        before = x.clone()
        return lambda: not _same(x, before)
    version = x._version
    return lambda: x._version != version


@contextmanager
def record(
    model: nn.Module,
    modules: Mapping[str, str] | Sequence[str] | None = None,
    spec: Record | None = None,
    *,
    injections: Mapping[str, str] | None = None,
) -> Iterator[Recorder]:
    """Record the loops inside a model's forward pass, with forward hooks that do not change its output::

        with haltkit.record(model, ["core"]) as recording:
            model(tokens)
        recording.trajectory["core"].step_norms()

    Args:
        model: each call of it starts a new trajectory; the latest is kept.
        modules: the looped modules by dotted path, or a mapping from a name of your choice to the path. Each is
            called once a loop step with ``x_{k-1}`` as its first argument and returns ``x_k``. None for a model
            that says itself what it loops (``model.regions``, as the bundled one).
        spec: what to keep; all states by default.
        injections: for each name whose input is injected by a module of its own, the path of that module; its
            first output in a pass is kept for the DLR. None with ``modules=None`` asks the model.

    Raises:
        ValueError: an unknown module, a module whose output is not a tensor like its first input, or one that
            changes that input in place.
    """
    paths = _paths(model, modules)
    if injections is None:
        injections = getattr(model, "loop_injections", {}) if modules is None else {}
    for path in (*paths.values(), *injections.values()):
        try:
            model.get_submodule(path)
        except AttributeError:
            known = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"no module {path!r} in {type(model).__name__}; it has: {known}") from None
    recorder = Recorder(spec or Record())
    wanted = recorder.spec.regions
    if wanted is not None and (unknown := [name for name in wanted if name not in paths]):
        raise ValueError(f"no region {unknown[0]!r} among the recorded modules; there are: {', '.join(paths)}")
    counts: dict[str, int] = {}
    injected: dict[str, Tensor] = {}
    entered: dict[str, Callable[[], bool]] = {}  # whether the state that a module was given has been changed since

    def restart(*_: Any) -> None:
        recorder.clear()
        counts.clear()
        injected.clear()

    def observe(name: str, args: tuple[Any, ...], output: Any) -> None:
        x_prev = args[0] if args else None
        if not isinstance(output, Tensor) or not isinstance(x_prev, Tensor) or output.shape != x_prev.shape:
            raise ValueError(
                f"module {paths[name]!r} must take the state as its first argument and return the next one, a tensor "
                "of the same shape"
            )
        if entered.pop(name)():
            raise ValueError(
                f"{paths[name]!r} changes the state that it is given in place (such as x += ...), so its steps cannot "
                "be recorded: make that operation out of place"
            )
        if counts.get(name) and not _same(x_prev.detach().to("cpu"), recorder.newest(name)):
            raise ValueError(
                f"{paths[name]!r} was given another state than it returned: its loop began anew without a call of "
                f"{type(model).__name__}, or something changes the state in between. Record a model halted by haltkit "
                "through observer=, and others by the module whose call is one pass"
            )
        counts[name] = counts.get(name, 0) + 1
        if counts[name] == 1:
            recorder.begin(name, x_prev)
            if name in injected:
                recorder.inject(name, injected.pop(name))
        recorder.step(name, counts[name], output)

    def enter(name: str, args: tuple[Any, ...]) -> None:
        entered[name] = _change_of(args[0]) if args and isinstance(args[0], Tensor) else bool

    def inject(name: str, output: Tensor) -> None:
        if not counts.get(name):  # the body that contains it has not returned for the first time yet
            injected[name] = output

    handles = [model.register_forward_pre_hook(restart, prepend=True)]
    try:
        for name, path in paths.items():
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(lambda _m, args, name=name: enter(name, args)))
            handles.append(module.register_forward_hook(lambda _m, args, out, name=name: observe(name, args, out)))
        for name, path in injections.items():
            module = model.get_submodule(path)
            handles.append(module.register_forward_hook(lambda _m, _a, out, name=name: inject(name, out)))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _paths(model: nn.Module, modules: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    if isinstance(modules, str):
        raise ValueError(f"modules={modules!r}: a list of paths or a mapping is expected")
    if isinstance(modules, Mapping):
        return dict(modules)
    if modules is not None:
        return {path: path for path in modules}
    loops = getattr(model, "loop_modules", None)
    if loops is None:
        raise ValueError(f"{type(model).__name__} does not say what it loops: name the looped modules by path")
    return dict(loops)
