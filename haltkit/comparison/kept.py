"""What is kept of full depth where the whole model is run at its oracles' depths, or at its regions' own fixed depths.

An oracle is read off recordings. There, what leaves is still read by others as if it had gone on, and a region that is
not the last is judged by its own readout, which may say little of what later regions need. A live run tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from haltkit.comparison.baselines import oracle_settings
from haltkit.comparison.measure import measure
from haltkit.comparison.possible import LATEST, Possible
from haltkit.comparison.rows import Row
from haltkit.setting import Depth, Setting
from haltkit.subject import Subject

__all__ = ["Kept", "kept_live", "with_live"]

# How much deeper than on their own all regions are run together: what they lose adds up.
DEEPER = (0, 1, 2, 4)


@dataclass(frozen=True)
class Kept:
    """What live runs of the whole model agreed on with full depth.

    Attributes:
        late: with every row leaving ``0, 1, ... LATEST`` steps after its oracle depth, in all regions.
        depths: the least of the regions' own fixed depths, all of them raised by as many steps, that keeps the level
            (:data:`DEEPER`; full depth where none does), by region.
        agreement: of these depths.
    """

    late: tuple[float, ...]
    depths: Mapping[str, int]
    agreement: float


def kept_live(
    subject: Subject, found: Mapping[str, Possible], oracles: Sequence[Mapping[str, Tensor]], level: float, enough: int
) -> Kept | None:
    """Run the first samples at full depth, at the oracle's depths, and at the regions' own fixed depths.

    Args:
        subject: with its full depth.
        found: of *stable*, by region.
        oracles: the oracle depth of each row by region, of the first samples
            (see :func:`haltkit.comparison.possible.possible`).
        level: the agreement that fixed depths must keep.
        enough: no further sample is run once so many rows were.

    Returns:
        None where a live run could tell nothing new: one region whose rows do not see each other, since whole sequences
        halt; or where rows cannot be given depths of their own, or there are no logits.
    """
    known = subject.driver.rows_leave and subject.logits is not None and bool(oracles)
    if not known or (len(found) == 1 and subject.granularity == "sequence"):
        return None
    count, seen = 0, 0
    while count < len(oracles) and seen < enough:
        seen += next(iter(oracles[count].values())).numel()
        count += 1
    subject = replace(subject, samples=subject.samples[:count])
    full = subject.full_depth
    own = {name: one.headroom.fixed_depth(level) for name, one in found.items()}
    deeper = (Depth({name: min(k + more, full) for name, k in own.items()}) for more in DEEPER)
    depths = [one for one in dict.fromkeys(deeper) if one.deepest < full]
    settings = [Setting.of(full, subject.regions), *oracle_settings(subject, oracles[:count])[: LATEST + 1]]
    rows = measure(subject, [*settings, *map(Setting, depths)], repeats=1).rows
    agreed = [row.agreement or 0.0 for row in rows]
    late, fixed = agreed[1 : len(settings)], zip(depths, agreed[len(settings) :], strict=True)
    deepest = Depth.uniform(full, subject.regions)
    depth, share = next(((one, share) for one, share in fixed if share >= level), (deepest, 1.0))
    return Kept(tuple(late), dict(depth.steps), share)


def with_live(found: Mapping[str, Possible], rows: Sequence[Row]) -> dict[str, Possible]:
    """The same, with what the live runs of the oracle agreed on; as it was where there are none among the rows."""
    late = [row.agreement for row in rows if row.decided == "oracle"][: LATEST + 1]
    known = tuple(one for one in late if one is not None)
    return {name: replace(one, live=known) for name, one in found.items()}
