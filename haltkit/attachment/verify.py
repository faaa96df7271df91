"""Proof, on the user's own model, that halting from outside gives what it says."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from haltkit.attachment.errors import GlueDrift, StateNotCarried
from haltkit.attachment.outputs import largest, tensors_in
from haltkit.attachment.steadiness import Inputs, gap
from haltkit.policies import Fixed
from haltkit.protocol import HaltingPolicy, LoopStep, Verdict

__all__ = ["NEVER", "NOTHING", "ROUNDING", "ByRegion", "Depths", "Probe", "Report", "difference", "verify"]

Depths = Mapping[str, int]
NOTHING: Depths = MappingProxyType({})
ByRegion = Mapping[str, HaltingPolicy[Any]]
NEVER = Fixed(2**31 - 1)
# Other rows may differ by the rounding of products whose sizes depend on what the halted ones route where (experts).
ROUNDING = 1e-5


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found. Differences are the largest over all tensors of the output; 0 is bit-equal.

    Attributes:
        k: the step of the forced halt, by region; a region that is not named ran to its end.
        loops: iterations that the model runs by itself, by region.
        neutral: difference that attaching makes when nothing halts.
        beside: difference that it makes to disturb what the body gives after the halt, in all iterations but the last:
            0 unless the model keeps something of each, beside the loop; None where fewer than two were replayed.
        drift: change of the inputs of the body's modules between replayed iterations, by region; None where that could
            not be seen: fewer than two were replayed, or no input ever moved.
        halted: difference between the forced halt and the model run with ``k`` loops; None without ``run_at``.
        steady: modules whose inputs moved before the halt and stood still after it, by region.
        constant: modules whose inputs never moved, which proves nothing about them, by region.
        others: how much the other entries of the batch change when only its first one is halted, relative to the
            largest state, by region; None where that could not be seen (a batch of one).
        alone: difference between the first entry's own output when it alone is halted at ``k``, in each region that
            ``k`` names, and that of the model run with ``k`` loops, relative to the largest; None without ``run_at``,
            or of a batch of one.
        rows: whether rows or entries are to halt one by one, so that ``alone`` counts.
    """

    k: dict[str, int]
    loops: dict[str, int]
    neutral: float
    drift: dict[str, float | None]
    halted: float | None
    steady: dict[str, list[str]] = field(default_factory=dict)
    constant: dict[str, list[str]] = field(default_factory=dict)
    beside: float | None = None
    others: dict[str, float | None] = field(default_factory=dict)
    alone: float | None = None
    rows: bool = True

    @property
    def together(self) -> bool:
        """Entries of the batch must halt together: one that halts alone gets another output."""
        return self.alone is not None and self.alone > ROUNDING

    @property
    def ok(self) -> bool:
        """Everything that could be checked is exactly equal, and a halt was compared or at least seen to be steady.

        What the rest of the batch notices of a halted entry may be rounding.
        """
        if (
            self.neutral != 0
            or self.halted
            or (self.beside and self.halted != 0)
            or any(seen and seen > ROUNDING for seen in self.others.values())
            or (self.rows and self.together)
        ):
            return False
        drifts = self.drift.values()
        return self.halted == 0 or (not self.beside and bool(drifts) and all(drift == 0 for drift in drifts))

    def __str__(self) -> str:
        def verdict(value: float | None, unknown: str = "") -> str:
            return unknown if value is None else "exactly equal" if value == 0 else f"differs by up to {value:.3g}"

        ran = ", ".join(
            f"{count} iterations" if len(self.loops) == 1 else f"{count} of {name}"
            for name, count in self.loops.items()
        )
        lines = [f"attached, nothing halts: {verdict(self.neutral)} (the model runs {ran})"]
        for name, drift in self.drift.items():
            at = self.k[name] if len(self.loops) == 1 else f"{self.k[name]} in {name}"
            unknown = "not seen, for fewer than two iterations were replayed or no input ever moved"
            line = f"halted at {at}, inputs of the body's modules while replaying: {verdict(drift, unknown)}"
            if self.steady.get(name):
                line += f" ({', '.join(self.steady[name])})"
            if self.constant.get(name):
                line += f"; constant throughout, which proves nothing: {', '.join(self.constant[name])}"
            lines.append(line)
        unknown = "not seen, for fewer than two iterations were replayed"
        lines.append(f"what the model keeps of replayed iterations before the last: {verdict(self.beside, unknown)}")
        for name, seen in self.others.items():
            where = "" if len(self.loops) == 1 else f" in {name}"
            unknown = "not seen, for that takes a batch of two and rows in each entry"
            lines.append(f"one entry of the batch halted{where}, the others' states: {verdict(seen, unknown)}")
        if self.alone is not None:
            said = verdict(self.alone)
            if self.together:
                said += (
                    ": its loop carries more than the state, in modules whose batch dimension is not found. Halt whole "
                    "batches (granularity=batch)"
                )
            lines.append(f"one entry of the batch halted, its own output: {said}")
        depths = ", ".join(str(k) if len(self.loops) == 1 else f"{k} in {name}" for name, k in self.k.items())
        unknown = "not compared, no run_at was given: what the model sums up beside the loop is not seen"
        lines.append(f"halted at {depths}, against the model run with that many: {verdict(self.halted, unknown)}")
        return "\n".join(lines)


class Probe(Protocol):
    """A session that verify has for itself."""

    @property
    def steps(self) -> dict[str, Tensor]:
        """See :class:`~haltkit.attachment.session.Session`."""
        ...

    def iterations(self) -> dict[str, int]:
        """Iterations computed in the newest loop of each region."""
        ...

    def watched(self) -> dict[str, Inputs]:
        """What the modules of each region's body were given in its newest loop; empty where that is not seen."""
        ...


class Attaching(Protocol):
    """Attaches a session of verify's own.

    It has policies by region, keeps the inputs of some iterations, and gives disturbed outputs in replayed iterations
    before one. ``state_only``: in masked execution, entries that halt before others keep the state alone.
    """

    def __call__(
        self,
        policies: ByRegion,
        keep: tuple[int, ...] = (),
        disturb_before: Depths = NOTHING,
        state_only: bool = False,
    ) -> AbstractContextManager[Probe]: ...


@dataclass(frozen=True)
class _First:
    """Halts the first entry of the batch at a step; of a batch of one its first row, and nothing else ever."""

    at: int = 1

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: LoopStep) -> tuple[None, Verdict]:
        halt = self.rows(step.x) & (step.k >= self.at)
        return None, Verdict((~halt).float(), halt)

    @staticmethod
    def rows(x: Tensor) -> Tensor:
        """Which rows of a state are halted, ``(...)`` bool; none of a single row."""
        halt = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        several = next((i for i, size in enumerate(halt.shape) if size > 1), None)
        if several is not None:
            halt.select(several, 0).fill_(True)
        return halt


def difference(one: Any, other: Any) -> float:
    """The largest difference over the tensors of two outputs; 0 is bit-equal, inf another structure or shape.

    Raises:
        ValueError: there is no tensor in them.
    """
    a, b = tensors_in(one), tensors_in(other)
    if not a and not b:
        raise ValueError("run must return what is to be compared: tensors, or containers of them")
    return max(map(gap, a, b)) if len(a) == len(b) else float("inf")


@torch.no_grad()
def verify(
    regions: Sequence[str],
    detached: Callable[[], AbstractContextManager[None]],
    probe: Attaching,
    run: Callable[[], Any],
    k: int | Depths,
    run_at: Callable[[Any], Any] | None = None,
    rows: bool = True,
    whole: Collection[str] = (),
) -> Report:
    """Compare runs of the user's own model.

    Args:
        regions: of the model.
        detached: runs the model as it is.
        probe: attaches a session with other policies.
        run: calls the model on some input and returns its output; called five times (six with ``run_at``), and once
            more for each further region; it must be deterministic.
        k: where to force a halt, below the number of iterations that the model runs: in every region, or by region.
        run_at: called with ``k``: runs the model on the same input with that many loops, for the comparison that
            settles it.
        rows: whether rows or entries are to halt one by one.
        whole: regions all of whose rows have to halt together, so that none is halted alone.

    Raises:
        GlueDrift: the body's input goes on changing after the halt, so state is carried outside the described modules.
        VaryingInput: likewise, and the input does not depend on the state at all: a recurrence over a sequence.
        StateNotCarried: nothing that the next iteration reads changes when a row is halted.
        ValueError: ``k`` is no number of steps, or for a region that is not there, the model ran no more than ``k``
            iterations, ``run`` is not deterministic, returns no tensor, or has an empty batch.
    """
    if not isinstance(k, (int, Mapping)) or k == {}:
        raise ValueError(f"k={k!r}: a number of steps is expected, or a mapping from regions to one each")
    depths = dict.fromkeys(regions, k) if isinstance(k, int) else dict(k)
    if unknown := [name for name in depths if name not in regions]:
        raise ValueError(f"no region {', '.join(unknown)} here; the regions are {', '.join(regions)}")
    with detached():
        plain = run()
    never = dict.fromkeys(regions, NEVER)
    with probe(never, keep=(1, 2, 3)) as unhalted:
        neutral = difference(run(), plain)
        loops, free, taken = unhalted.iterations(), unhalted.watched(), unhalted.steps
    if empty := [name for name, steps in taken.items() if not steps.numel()]:
        raise ValueError(f"the batch of run is empty in {', '.join(empty)}, which proves nothing: run it on some rows")
    if neutral:
        with detached():
            if difference(run(), plain):
                raise ValueError("run gives another output each time: fix its seed, and call model.eval()")
    for name, depth in depths.items():
        ran = loops.get(name, 0)
        if not 1 <= depth < ran:
            raise ValueError(f"k={depth}: the model runs {ran} iterations, so a halt can be forced at 1 to {ran - 1}")
    with probe({**never, **{name: Fixed(depth) for name, depth in depths.items()}}) as halting:
        halted = run()
        watched = {name: inputs for name, inputs in halting.watched().items() if name in depths}
    compared = reference = None
    if run_at is not None:
        with detached():
            reference = run_at(k)
        compared = difference(halted, reference)
    beside = None
    if all(inputs.replayed > 1 for inputs in watched.values()) and watched:
        last = {name: loops[name] for name in depths}
        with probe({**never, **{name: Fixed(depth) for name, depth in depths.items()}}, disturb_before=last):
            beside = difference(run(), halted)
    if compared != 0:
        for inputs in watched.values():
            inputs.refuse_drift()
        if beside:
            raise GlueDrift(
                f"the model's output depends (by up to {beside:.3g}) on what the body gives after the halt in "
                "iterations other than the last: it sums something up beside the loop, such as a weighted sum of "
                "states. Say on_halt={...: 'zero'} for the module whose output is summed, or halt a loop that contains "
                "the sum"
            )
    alone = None
    seen = [name for name in depths if name in free and name not in whole]
    if reference is not None and seen and not any(name in whole for name in depths):
        with probe({**never, **{name: _First(depths[name]) for name in seen}}):
            alone = _alone(run(), reference, free[seen[0]].newest)
    others = {}
    for name in seen:
        with probe({**never, name: _First()}, keep=(1, 2, 3), state_only=True) as some:
            run()
            others[name] = _carried(name, free[name], some.watched()[name])
    return Report(
        depths,
        loops,
        neutral,
        {name: inputs.drift for name, inputs in watched.items()},
        compared,
        {name: inputs.steady for name, inputs in watched.items()},
        {name: inputs.constant for name, inputs in watched.items()},
        beside,
        others,
        alone,
        rows,
    )


def _alone(output: Any, reference: Any, state: Tensor | None) -> float | None:
    """The first entry's own output against that of the model at the same depth, relative to the largest.

    Of outputs whose first dimension is as large as the batch, and no other: which dimension it is must be plain.
    """
    if state is None or state.ndim < 2 or len(state) < 2:
        return None
    batch, found = len(state), None
    for one, other in zip(tensors_in(output), tensors_in(reference), strict=False):
        if one.shape == other.shape and one.ndim and one.is_floating_point() and list(one.shape).count(batch) == 1:
            if len(one) != batch:
                continue
            found = max(found or 0.0, gap(one[0], other[0]) / (largest(other) or 1.0))
    return found


def _carried(region: str, free: Inputs, some: Inputs) -> float | None:
    """What the other entries of the batch noticed when the first was halted, relative to the largest state.

    Raises:
        StateNotCarried: no input of the body did, though it moves.
    """
    if free.newest is None or some.newest is None or 2 not in free.states:
        return None
    rows = _First.rows(free.newest)
    moving = gap(free.states[1][rows], free.states[2][rows]) and free.moved_into(3)
    if moving and free.reads_as(some, 3):
        raise StateNotCarried(
            f"region {region}: rows frozen at the first output of {some.loop.state_module!r} went on as before, so the "
            "next iteration does not read it (an exit gate, perhaps), and policies would judge something else than "
            "what the loop carries. Say state=, the module whose output enters the next iteration; haltkit.discover "
            "proposes one"
        )
    if rows.ndim < 2 or len(rows) < 2:
        return None
    return gap(free.newest[~rows], some.newest[~rows]) / (largest(free.newest) or 1.0)
