"""How deep a looped model goes: a policy for each region, or steps that are known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from haltkit.kinds import DepthByRow
from haltkit.policies import Fixed, Table
from haltkit.protocol import HaltingPolicy, granularity_of
from haltkit.specs import Policies, UnprintablePolicy, policy_for_regions, text_of
from haltkit.standing import PLAIN, Standing

__all__ = ["Depth", "Setting"]


@dataclass(frozen=True)
class Depth:
    """A fixed number of steps in each region: nothing is measured, so nothing is paid for.

    Args:
        steps: by region, in the order the regions run.

    Raises:
        ValueError: a region with less than one step.
    """

    steps: Mapping[str, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", dict(self.steps))
        for region, steps in self.steps.items():
            if steps < 1:
                raise ValueError(f"steps={steps} in region {region!r}: a loop takes at least 1 step")

    @classmethod
    def uniform(cls, steps: int, regions: Sequence[str]) -> Depth:
        """The same number of steps in every region."""
        return cls(dict.fromkeys(regions, steps))

    def __hash__(self) -> int:
        return hash(tuple(self.steps.items()))

    @property
    def same(self) -> int | None:
        """The number of steps where it is the same in every region; None where it is not, or there are no regions."""
        counts = set(self.steps.values())
        return counts.pop() if len(counts) == 1 else None

    @property
    def deepest(self) -> int:
        """The largest number of steps in any region; 0 where there are no regions."""
        return max(self.steps.values(), default=0)

    @property
    def label(self) -> str:
        """``8`` where all regions take 8 steps, ``3 6 3`` where they differ."""
        return str(self.same) if self.same is not None else " ".join(map(str, self.steps.values()))

    @property
    def policies(self) -> dict[str, HaltingPolicy[Any]]:
        """The policies that halt every row at this depth, by region, for what runs nothing but policies."""
        return {region: Fixed(steps) for region, steps in self.steps.items()}


@dataclass(frozen=True)
class Setting:
    """A fixed depth, a depth for each row, or a policy for each region; what one row of a comparison stands for.

    Args:
        how: the depth, the depths of rows, or the policies by region.
        sweep: the sweep over thresholds that the setting belongs to; empty: it names itself.
        tau: its threshold in that sweep, where there is one number.
        standing: what is promised of the setting, where it came from a card.
    """

    how: Depth | DepthByRow | Mapping[str, HaltingPolicy[Any]]
    sweep: str = field(default="", compare=False)
    tau: float | None = field(default=None, compare=False)
    standing: Standing = field(default=PLAIN, compare=False)

    @classmethod
    def of(cls, given: int | Depth | Setting | Policies, regions: Sequence[str]) -> Setting:
        """The setting that a user means: a number of steps, text as in :mod:`haltkit.specs`, or policy objects.

        ``fixed`` policies in every region are a :class:`Depth`.

        Raises:
            ValueError: a bad spec, an unknown region, or a missing one.
        """
        if isinstance(given, Setting):
            return given
        if isinstance(given, int):
            return cls(Depth.uniform(given, regions))
        if isinstance(given, Depth):
            if given.steps.keys() != set(regions):
                raise ValueError(f"steps for regions {', '.join(given.steps)}; the model's are {', '.join(regions)}")
            return cls(Depth({region: given.steps[region] for region in regions}))
        found = policy_for_regions(given, regions)
        steps = {region: one.steps for region, one in found.items() if isinstance(one, Fixed)}
        return cls(Depth(steps)) if found and len(steps) == len(found) else cls(found)

    def named(self, sweep: str, tau: float | None = None, standing: Standing = PLAIN) -> Setting:
        """The same setting as a member of a sweep, with what is promised of it."""
        return replace(self, sweep=sweep, tau=tau, standing=standing)

    @property
    def depth(self) -> Depth | None:
        """The fixed depth that all rows have; None for depths of rows and for policies."""
        return self.how if isinstance(self.how, Depth) else None

    @property
    def looked_up(self) -> bool:
        """Whether some policy is a table, which a subject turns into depths of rows."""
        return any(isinstance(policy, Table) for policy in self.policies.values())

    @property
    def by_row(self) -> DepthByRow | None:
        """The depths of rows; None for anything else."""
        return self.how if isinstance(self.how, DepthByRow) else None

    @property
    def policies(self) -> Mapping[str, HaltingPolicy[Any]]:
        """The policy of each region; for a fixed depth those that halt there, for depths of rows at the deepest."""
        if isinstance(self.how, DepthByRow):
            return Depth(self.how.deepest).policies
        return self.how.policies if isinstance(self.how, Depth) else self.how

    @property
    def causal(self) -> bool:
        """Whether no row's depth depends on another row: every region's policy decides row by row."""
        return all(granularity_of(policy) == "token" for policy in self.policies.values())

    @cached_property
    def text(self) -> str | None:
        """The spec that says the same; None for depths of rows, and policy objects that cannot be printed as one."""
        if isinstance(self.how, DepthByRow):
            return None
        try:
            return text_of(self.policies) if self.policies else ""
        except UnprintablePolicy:
            return None

    @property
    def label(self) -> str:
        """What tells the setting from its neighbours in a table, and what it is used without."""
        return self.standing.mark(self._label)

    @property
    def title(self) -> str:
        """The spec that says the same, or else the label; and what it is used without."""
        return self.standing.mark(self.text or self._label)

    @property
    def _label(self) -> str:
        if isinstance(self.how, Depth):
            return f"fixed {self.how.label}"
        if isinstance(self.how, DepthByRow):
            return self.how.label if self.how.hindsight else f"fixed {self.how.label}"
        if self.tau is not None:
            return f"{self.sweep} tau={self.tau:g}"
        return self.text or self.sweep or ", ".join(dict.fromkeys(type(p).__name__ for p in self.how.values()))
