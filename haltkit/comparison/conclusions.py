"""What a comparison says: the fastest setting of each policy at a given quality, against the best fixed depth.

Signals have different scales, so policies at equal thresholds say nothing about each other. What can be compared is
the frontier of quality against wall-clock time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from haltkit.comparison.rows import Row, policies_of

__all__ = ["AGREEMENT_LEVELS", "NATS_LEVELS", "SHARES", "Conclusion", "Finding", "conclude", "within"]

# Losses above full depth: nats of a cross-entropy, and shares of full depth's loss in any other unit.
NATS_LEVELS = (0.001, 0.01, 0.05)
SHARES = (0.001, 0.01, 0.05)
AGREEMENT_LEVELS = (0.95, 0.99)
Kind = Literal["loss", "agreement"]
Sure = Literal["yes", "no", "cannot tell"]
Faster = Literal["faster", "slower", "no clear difference", "cannot tell"]


def within(row: Row, level: float, kind: Kind = "loss") -> Sure:
    """Whether a row is of this quality: only said when two standard errors clear the limit.

    ``loss``: at most ``level`` above full depth. ``agreement``: at least ``level``.
    """
    if row.same_as_full:
        return "yes"
    if kind == "loss":
        margin, se = level - row.delta, row.delta_se
    elif row.agreement is None or row.agreement_se is None:
        return "cannot tell"
    else:
        margin, se = row.agreement - level, row.agreement_se
    if margin >= 2 * se:
        return "yes"
    return "no" if margin < -2 * se else "cannot tell"


@dataclass(frozen=True)
class Finding:
    """One policy at one quality.

    Attributes:
        policy: the sweep.
        kind, level: the quality, a loss above full depth or a share of agreement.
        best: its fastest setting of this quality for sure; None: it has none.
        fixed: the fastest fixed depth of this quality for sure, one for all rows or by kind; None: there is none.
        against_fixed: whether the policy is faster than the fixed depth, said only if all of two or more repeats agree;
            ``cannot tell`` from a single repeat; None where one of the two settings is missing.
        one_depth: the fastest depth of this quality for sure that all rows of a region have; None: there is none.
        oracle: the fastest oracle of this quality for sure, which nobody can pick; None: there is none.
    """

    policy: str
    kind: Kind
    level: float
    best: Row | None
    fixed: Row | None
    against_fixed: Faster | None
    one_depth: Row | None = None
    oracle: Row | None = None


@dataclass(frozen=True)
class Conclusion:
    """The result of a comparison.

    Attributes:
        findings: by quality, then by policy.
        level: the loss above full depth that a winner is chosen at, the middle one.
        winner: the fastest setting of any policy within that level; None: no policy is that good for sure.
        fixed: the fastest fixed depth within that level; None: there is none.
        undecided: full depth alone is within that level for sure, and at least one other setting may be: there are too
            few items to conclude anything.
    """

    findings: tuple[Finding, ...]
    level: float
    winner: Row | None
    fixed: Row | None
    undecided: bool = False

    @property
    def fixed_serves_best(self) -> bool:
        """Whether a fixed depth is within the level for sure, and every policy is slower or not that good for sure.

        Not where there are too few items to tell (``undecided``).
        """
        if self.undecided:
            return False
        chosen = [f for f in self.findings if f.kind == "loss" and f.level == self.level]
        return self.fixed is not None and bool(chosen) and all(f.against_fixed in (None, "slower") for f in chosen)


def _fastest(rows: Iterable[Row], level: float, kind: Kind) -> Row | None:
    good = [row for row in rows if within(row, level, kind) == "yes"]
    return min(good, key=lambda row: row.ms, default=None)


def _faster(row: Row, other: Row) -> Faster:
    ratios = [a / b for a, b in zip(row.ms_repeats, other.ms_repeats, strict=True)]
    if len(ratios) < 2:
        return "cannot tell"
    if min(ratios) <= 1 <= max(ratios):
        return "no clear difference"
    return "faster" if ratios[0] < 1 else "slower"


def conclude(
    rows: Sequence[Row], levels: Sequence[float], agreement_levels: Sequence[float] = AGREEMENT_LEVELS
) -> Conclusion:
    """Draw the conclusion from rows, full depth first.

    Args:
        rows: of one comparison.
        levels: losses above full depth, in the loss's unit, the middle one being what a winner is chosen at.
        agreement_levels: shares of positions; not used where there are no logits.
    """
    names = policies_of(rows)
    qualities: list[tuple[Kind, float]] = [
        *(("loss", level) for level in dict.fromkeys(levels)),  # shares of no loss are one level
        *(("agreement", level) for level in agreement_levels if rows[0].agreement is not None),
    ]
    found = []
    for kind, level in qualities:
        fixed = _fastest((row for row in rows if row.fixed), level, kind)
        one_depth = _fastest((row for row in rows if row.decided == "depth"), level, kind)
        oracle = _fastest((row for row in rows if row.oracle), level, kind)
        for name in names:
            best = _fastest((row for row in rows if row.policy == name and row.decided == "policy"), level, kind)
            compared = None if best is None or fixed is None else _faster(best, fixed)
            found.append(Finding(name, kind, level, best, fixed, compared, one_depth, oracle))
    middle = levels[len(levels) // 2]
    winner = _fastest((row for row in rows if row.decided == "policy"), middle, "loss")
    said = [(row, within(row, middle)) for row in rows if not row.oracle]
    undecided = all(row.same_as_full for row, sure in said if sure == "yes") and any(
        s == "cannot tell" for _, s in said
    )
    return Conclusion(
        tuple(found), middle, winner, _fastest((row for row in rows if row.fixed), middle, "loss"), undecided
    )
