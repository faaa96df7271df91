"""What a policy's saved steps are worth in time: the measured speed-up beside the one that counted operations allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from haltkit.comparison.settings import Candidate, Sweeps
from haltkit.driving import Look
from haltkit.setting import Depth, Setting
from haltkit.subject import Subject
from haltkit.timing import Times, clock, milliseconds, ratio, turns

__all__ = ["Speed", "Work", "at_target", "break_even", "counted", "speeds"]

# From the mean steps by region to the operations of a pass.
Work = Callable[[Mapping[str, float]], float]


@dataclass(frozen=True)
class Speed:
    """One policy against full depth, and against a bare loop of as many steps: what deciding costs.

    Attributes:
        name: of the policy.
        steps: mean steps by region. A bare loop has whole ones: it is run at those below and at those above.
    """

    name: str
    steps: Mapping[str, float]

    @property
    def below(self) -> dict[str, int]:
        """Whole steps by region, no more than the mean."""
        return {region: math.floor(mean) for region, mean in self.steps.items()}

    @property
    def above(self) -> dict[str, int]:
        """Whole steps by region, no fewer than the mean."""
        return {region: math.ceil(mean) for region, mean in self.steps.items()}

    def bare(self, run: Callable[[Mapping[str, int]], object]) -> dict[str, Callable[[], object]]:
        """What is timed beside the policy."""
        return {f"{self.name} below": partial(run, self.below), f"{self.name} above": partial(run, self.above)}

    def result(self, times: Times, work: Work, full_depth: int) -> dict[str, Any]:
        """Figures for a table.

        Args:
            times: of the policy by its name, of :meth:`bare`, and of ``full`` depth.
            work: counts operations.
            full_depth: steps of full depth.

        Returns:
            ``steps``; ``bound``, the speed-up that operations allow; the measured ``speedup``; ``realised``, the
            measured one over the bound; and ``over_bare_loop``, the time above that of a loop of as many steps that
            decides nothing, as a share of it.
        """
        bound = work(dict.fromkeys(self.steps, full_depth)) / work(self.steps)
        speedup = ratio(times, "full", self.name)
        low, high = work(self.below), work(self.above)
        part = (work(self.steps) - low) / (high - low) if high > low else 0.0
        below, above = (ratio(times, f"{self.name} {which}", self.name) for which in ("below", "above"))
        deciding = 1 / (below + part * (above - below)) - 1
        found = {"bound": bound, "speedup": speedup, "realised": speedup / bound, "over_bare_loop": deciding}
        return {"steps": dict(self.steps), **found}


def at_target(subject: Subject, look: Look, wanted: Sequence[Candidate], step: int) -> list[Setting]:
    """Candidates as settings; one without a tau gets that at which a typical row takes ``step`` steps.

    Args:
        look: what was seen of the subject.

    Raises:
        ValueError: a policy whose scores give no threshold.
    """
    sweeps = Sweeps.on(replace(subject, target_steps=(step,)), look, "auto")
    return [setting for candidate in wanted for setting in sweeps.settings(candidate)]


def counted(subject: Subject, sample: Any) -> Work:
    """The operations of a pass on a sample by its steps: matrix products and attention, what does not loop included.

    They are counted on passes of one step in every region, and of two in one region after the other; what a step of a
    region takes is the difference.

    Raises:
        ValueError: a step without any such operation, so that nothing can be counted.
    """
    once = dict.fromkeys(subject.regions, 1)

    def count(depths: Mapping[str, int]) -> int:
        counter = FlopCounterMode(display=False)
        # Attention written out is counted on every device, whichever kernel a model takes by itself.
        with subject.using(Setting(Depth(depths))) as run, sdpa_kernel(SDPBackend.MATH), counter:
            run(sample)
        return counter.get_total_flops()

    base = count(once)
    each = {region: count({**once, region: 2}) - base for region in subject.regions}
    if idle := [region for region, cost in each.items() if cost <= 0]:
        raise ValueError(
            f"a step of region {idle[0]!r} of {subject.name} has no matrix product or attention that could be counted, "
            "so nothing bounds its speed-up: compare measures times alone (haltkit compare)"
        )
    return lambda steps: base + sum((steps[region] - 1) * cost for region, cost in each.items())


def break_even(one: float, over: float, full_depth: int) -> float | None:
    """The mean steps, the same in every region, below which a policy is faster than full depth; None: it never is.

    A bare loop's time is taken to grow evenly from one step to full depth.

    Args:
        one: the time of a bare loop of one step over full depth's.
        over: what deciding adds to a bare loop's time, as a share of it.
        full_depth: steps of full depth.
    """
    allowed = 1 / (1 + over)  # the share of full depth's time that the bare loop may take
    if one >= min(1.0, allowed):
        return None
    return min(float(full_depth), 1 + (allowed - one) / (1 - one) * (full_depth - 1))


@torch.no_grad()
def speeds(
    subject: Subject,
    wanted: Sequence[Candidate],
    *,
    target: int = 6,
    repeats: int = 3,
    on_tick: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Time policies on the first sample of a subject, all in turns.

    What a session of :func:`haltkit.attach` does once is not counted: every pass is timed after another one.

    Args:
        subject: with a sample.
        wanted: the policies.
        target: for one without a tau, the steps that a typical row should take; at most half of full depth.
        repeats: of every pass.
        on_tick: is called with (passes timed, passes in all).

    Returns:
        a row for each setting: ``spec``, ``standing``, what is promised of it or what it is used without, ``full_ms``
        and ``ms`` per item of the subject, what :meth:`Speed.result` says, and ``break_even``, see :func:`break_even`.

    Raises:
        ValueError: no sample, no threshold for a policy, or operations that cannot be counted.
    """
    look = subject.look()
    subject, full, sample = replace(subject, full_depth=look.full_depth), look.full_depth, subject.samples[0]
    chosen = {one.title: one for one in at_target(subject, look, wanted, max(1, min(target, full // 2)))}
    settings = {"full": Setting.of(full, subject.regions), "one": Setting.of(1, subject.regions), **chosen}
    found: dict[str, Speed] = {}
    items = 1
    for name, setting in chosen.items():
        done = subject.run(sample, setting)
        items = subject.losses(done.output, sample).numel()
        means = {region: float(taken.double().mean()) for region, taken in done.steps.items()}
        found[name] = Speed(name, means if setting.depth is None else setting.depth.steps)
        settings |= {
            f"{name} below": Setting(Depth(found[name].below)),
            f"{name} above": Setting(Depth(found[name].above)),
        }
    work, names = counted(subject, sample), list(settings)
    times: Times = {name: [] for name in names}
    for order in turns(len(names), repeats):
        for name in (names[i] for i in order):
            with subject.using(settings[name]) as run:
                run(sample)
                times[name].append(clock(partial(run, sample))[0])
            if on_tick is not None:
                on_tick(sum(map(len, times.values())), repeats * len(names))
    one, rows = ratio(times, "one", "full"), []
    for name, speed in found.items():
        said = speed.result(times, work, full)
        spent = {"full_ms": milliseconds(times["full"], items), "ms": milliseconds(times[name], items)}
        even = break_even(one, said["over_bare_loop"], full)
        rows.append({"spec": name, "standing": str(chosen[name].standing), **spent, **said, "break_even": even})
    return rows
