"""The first picture of README: steps taken against hops needed on chase, and the frontiers of chase and text.

    make compare                                # writes haltkit-chase.json and haltkit-compare.json
    python examples/draw_overview.py --chase haltkit-chase.json --text haltkit-compare.json --out examples/overview.png

The first panel is measured here, on the forests that compare runs on: each policy at the threshold that the comparison
of chase found fastest within its middle level.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from haltkit.comparison import Comparison, Row, within
from haltkit.files import atomic_path, read_json
from haltkit.models.reasoner.checkpoint import bundled_reasoner
from haltkit.models.reasoner.measure import steps_by_need
from haltkit.models.reasoner.subject import sequences_of
from haltkit.reporting.overview import Needs, plot_overview


def read(path: Path) -> Comparison:
    return Comparison.from_json(read_json(path, "the comparison", dict))


def fastest(result: Comparison) -> dict[str, Row]:
    """Each policy's fastest setting within the middle level for sure."""
    concluded = result.conclusion()
    chosen = [f for f in concluded.findings if f.kind == "loss" and f.level == concluded.level]
    return {found.policy: found.best for found in chosen if found.best is not None and found.best.spec is not None}


def least_depth(result: Comparison) -> int | None:
    """The least fixed depth within the middle level for sure: in steps, so the noise of timings has no say."""
    level = result.conclusion().level
    return min(
        (max(row.depth.values()) for row in result.rows if row.depth and within(row, level) == "yes"), default=None
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chase", type=Path, required=True, help="haltkit compare chase --json FILE")
    parser.add_argument("--text", type=Path, required=True, help="haltkit compare text --json FILE")
    parser.add_argument("--out", type=Path, default=Path("overview.png"))
    parser.add_argument("--forests", type=int, default=128)
    options = parser.parse_args()
    chase, text = read(options.chase), read(options.text)
    loaded = bundled_reasoner("chase")
    _, batch = sequences_of(loaded.task, options.forests)
    taken = {name: steps_by_need(loaded.model, batch, str(row.spec)) for name, row in fastest(chase).items()}
    suffix = options.out.suffix[1:].lower() or "png"
    with atomic_path(options.out) as partial:
        plot_overview(
            Needs("hops", taken, least_depth(chase)),
            [("chase: halting pays", chase), ("text: no policy beats a fixed depth per region", text)],
            partial,
            suffix,
        )
    for name, by_need in taken.items():
        print(f"{name}: " + ", ".join(f"{need} hops {mean:.1f}" for need, (mean, _, _) in list(by_need.items())[:6]))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
