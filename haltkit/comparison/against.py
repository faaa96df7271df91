"""Each policy of a comparison beside the oracle: what it wastes, what it halts too early, and how much it realises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from haltkit.comparison.conclusions import Conclusion, within
from haltkit.comparison.possible import Possible
from haltkit.comparison.rows import Row, policies_of
from haltkit.headroom import realised
from haltkit.measured import LEVEL

__all__ = ["AgainstOracle", "against_oracle"]


@dataclass(frozen=True)
class AgainstOracle:
    """One policy in one region.

    Attributes:
        policy: the sweep.
        setting: the label of its setting.
        good: whether the setting is within the comparison's level for sure; if not, it is the policy's best one.
        certified: whether something is promised of the setting.
        region: the region.
        steps: its mean steps on rows that have an oracle depth.
        oracle: the oracle's.
        fixed: the best fixed depth at which a share ``LEVEL`` of the rows loses nothing.
        wasted: mean steps after the prediction was final.
        early: share of rows halted before that.
        realised: the share that is saved of the steps between the fixed depth and the oracle; only of settings that are
            good, and None where there are no such steps.
    """

    policy: str
    setting: str
    good: bool
    certified: bool
    region: str
    steps: float
    oracle: float
    fixed: int
    wasted: float
    early: float
    realised: float | None


def against_oracle(
    rows: Sequence[Row], concluded: Conclusion, headroom: Mapping[str, Possible]
) -> tuple[AgainstOracle, ...]:
    """Every policy's fastest setting within the level beside the oracle, or, where none is, that of the least loss.

    Settings of which something is promised are all there. Empty where no headroom is known.
    """
    chosen = []
    for name in policies_of(rows):
        own = [row for row in rows if row.policy == name and row.decided == "policy"]
        good = [row for row in own if within(row, concluded.level) == "yes"]
        best = min(good, key=lambda row: row.ms) if good else min(own, key=lambda row: row.delta)
        chosen += [row for row in own if row is best or row.promise]
    found = []
    for row in chosen:
        good_enough = within(row, concluded.level) == "yes"
        for region, regret in row.regret.items():
            known = headroom[region].headroom
            found.append(
                AgainstOracle(
                    row.policy,
                    row.label,
                    good_enough,
                    bool(row.promise),
                    region,
                    regret.steps,
                    known.mean_depth,
                    known.fixed_depth(LEVEL),
                    regret.wasted,
                    regret.early,
                    realised(regret.steps, known, LEVEL) if good_enough else None,
                )
            )
    return tuple(found)
