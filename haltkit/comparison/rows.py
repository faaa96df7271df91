"""One row of a comparison: what was measured at one setting."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from haltkit.headroom import Regret
from haltkit.setting import Setting
from haltkit.standing import Standing

__all__ = ["Decided", "Row", "decided_by", "policies_of", "sweep_spread"]

# What decides how deep rows go: policies, one depth, a depth for each kind of row, or hindsight, which nobody has.
Decided = Literal["policy", "depth", "kind", "oracle"]


@dataclass(frozen=True)
class Row:
    """What was measured at one setting.

    Attributes:
        policy: the sweep that the setting belongs to; ``fixed`` heads the fixed depths, and ``oracle`` the oracle's.
        spec: the setting as text; None for depths of rows, and for a policy object that no spec can say.
        tau: the threshold, where the setting has one number.
        depth: the fixed steps by region; None where not all rows have the same.
        loss: mean over the items, in ``unit``.
        unit: of the loss and of what is said about it; ``nats`` for cross-entropy.
        delta, delta_se: difference to full depth's loss on the same items, and its standard error, paired and
            clustered by sequence; the error is infinite for a single sequence.
        agreement, agreement_se: share of positions whose top token equals full depth's.
        kl_to_full: mean ``KL(full || this)`` in nats. None, like agreement, where there are no logits.
        steps: mean steps by region.
        ms: median wall-clock time of a pass, in milliseconds per item.
        ms_spread: least and greatest of the repeats.
        ms_repeats: every repeat, in order; repeat ``i`` of all settings ran side by side.
        speedup: full depth's median time over this one's.
        outcomes: share of the rows of all regions that ended in each way; empty for depths, which nothing ends.
        decided: what decides how deep rows go.
        causal: no row's depth depends on another row.
        label: what tells the setting from its neighbours.
        regret: against the oracle by region, on the rows whose oracle depth is known; empty where none is.
        promise: what a certificate about this model promises of the setting; empty: nothing is promised.
        without: what a card's policy is used without, as outputs say it; empty: the card is used whole, or is none.
        setting: the setting itself; None where the row was read from a file.
    """

    policy: str
    spec: str | None
    tau: float | None
    depth: dict[str, int] | None
    loss: float
    unit: str
    delta: float
    delta_se: float
    agreement: float | None
    agreement_se: float | None
    kl_to_full: float | None
    steps: dict[str, float]
    ms: float
    ms_spread: tuple[float, float]
    ms_repeats: tuple[float, ...]
    speedup: float
    outcomes: dict[str, float] = field(default_factory=dict)
    decided: Decided = "policy"
    causal: bool = True
    label: str = ""
    regret: dict[str, Regret] = field(default_factory=dict)
    promise: str = ""
    without: str = ""
    setting: Setting | None = field(default=None, compare=False, repr=False)

    @property
    def standing(self) -> str:
        """One line: what is promised of the setting, or what it is used without; empty where there is nothing."""
        return self.without or str(Standing(self.promise))

    @property
    def fixed(self) -> bool:
        """Whether this is a fixed depth, the same for all rows or by kind, which no policy decides."""
        return self.decided in ("depth", "kind")

    @property
    def oracle(self) -> bool:
        """Whether rows leave at depths that only a pass to full depth tells."""
        return self.decided == "oracle"

    @property
    def perplexity(self) -> float | None:
        """The exponential of a loss in nats; None of any other."""
        if self.unit != "nats":
            return None
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def same_as_full(self) -> bool:
        """Whether no difference to full depth was seen at all."""
        return self.delta == 0 and self.kl_to_full in (0, None) and self.agreement in (1, None)


def decided_by(setting: Setting) -> Decided:
    """What decides how deep rows go under a setting."""
    if setting.by_row is not None:
        return "oracle" if setting.by_row.hindsight else "kind"
    return "policy" if setting.depth is None else "depth"


def policies_of(rows: Iterable[Row]) -> list[str]:
    """The policies by name, in the order of their rows; fixed depths and the oracle are none."""
    return list(dict.fromkeys(row.policy for row in rows if row.decided == "policy"))


def sweep_spread(rows: Iterable[Row], policy: str) -> float | None:
    """Greatest minus least loss over a policy's thresholds: how much tuning it needs."""
    losses = [row.loss for row in rows if row.policy == policy and row.tau is not None]
    return max(losses) - min(losses) if len(losses) > 1 else None
