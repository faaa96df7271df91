"""What halting row by row must beat on chase: the best fixed depth, the best depth by kind of row, and the oracle.

    python examples/bench_kinds.py [--forests 64] [--repeats 7] [--least 0.995] [--policy SPEC]

A row is an edge or a query. Three baselines stand beside the policy, all chosen with the answers at hand on these very
forests, so each is better than what anybody could have picked. They agree with full depth in at least ``--least`` of
the answers:

- the least fixed depth;
- the pair of depths, one for edges and one for queries, that takes the fewest steps; queries take at least the fixed
  depth, and where no pair takes fewer steps than the fixed depth, that is the pair;
- the same depth of edges with an oracle of queries: each leaves a number of steps after its answer has settled, the
  same for all and the least that will do. (0 may be too few: rows that have left go on being read as they were.)

Edges have no answer, so there is no oracle of edges. Rows leave in compact execution, so each baseline is a program
that runs. All take turns, and a share of the fixed depth's time is the median over the repeats.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor

import haltkit
from haltkit.models.reasoner.checkpoint import bundled_reasoner
from haltkit.models.reasoner.measure import curve, fewest_steps, predictions, settled_after
from haltkit.models.reasoner.subject import sequences_of
from haltkit.timing import in_turns, ratio

FULL = 48


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forests", type=int, default=64, help="one batch")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--least", type=float, default=0.995, help="share of answers that agree with full depth")
    parser.add_argument("--policy", default="norm:tau=1.9")
    options = parser.parse_args()
    loaded = bundled_reasoner("chase")
    model, (_, forests) = loaded.model, sequences_of(loaded.task, options.forests)
    asked = forests.asked
    seen = predictions(model, forests, FULL)

    def compact(policy: str | haltkit.HaltingPolicy[object], depths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Answers and steps, ``(B, T)`` each; with ``depths``, ``(B, T)``, each row leaves at its own."""
        out = model.forward_adaptive(forests.inputs, policy, max_loops=FULL, budget=depths, execution="compact")
        return out.logits.argmax(-1), out.steps["loop"]

    def leaving(depths: Tensor) -> tuple[Tensor, Tensor]:
        return compact(f"fixed:steps={FULL}", depths)

    def agree(answers: Tensor) -> float:
        return float((answers == seen[-1])[asked].double().mean())

    def good(depths: Tensor) -> bool:
        return agree(leaving(depths)[0]) >= options.least

    fixed = fewest_steps(curve(seen, forests).agreement, options.least) or FULL
    pairs = sorted(
        ((edges, queries) for queries in range(fixed, min(2 * fixed, FULL)) for edges in range(1, 2 * fixed - queries)),
        key=sum,
    )
    edges, queries = next((p for p in pairs if good(torch.where(asked, p[1], p[0]))), (fixed, fixed))
    settled = settled_after(seen)
    late = next((n for n in range(FULL) if good(torch.where(asked, (settled + n).clamp(max=FULL), edges))), FULL)
    kinds = torch.where(asked, queries, edges)
    oracle = torch.where(asked, (settled + late).clamp(max=FULL), edges)
    policy = haltkit.policy(options.policy)
    runs = {
        "fixed": lambda: model(forests.inputs, fixed).argmax(-1),
        "kinds": lambda: leaving(kinds),
        "oracle": lambda: leaving(oracle),
        "policy": lambda: compact(policy),
    }
    times = in_turns(runs, options.repeats)
    said = {
        "fixed": f"fixed depth {fixed}",
        "kinds": f"edges {edges}, queries {queries}",
        "oracle": f"edges {edges}, oracle + {late}",
        "policy": options.policy,
    }
    answers = {"fixed": (seen[fixed - 1], torch.full_like(seen[0], fixed))}
    answers |= {"kinds": leaving(kinds), "oracle": leaving(oracle), "policy": compact(policy)}
    rows = int(asked.sum())
    print(f"{options.forests} forests, {rows:,} queries; agreement with {FULL} steps at least {options.least:g}")
    for name, label in said.items():
        found, steps = answers[name]
        means = " ".join(f"{float(steps[of].double().mean()):5.1f}" for of in (~asked, asked))
        print(
            f"  {label:24s} steps of edges and queries {means}, agreement {agree(found):.4f}, "
            f"{1e3 * statistics.median(times[name]) / rows:.4f} ms per answer, "
            f"{ratio(times, name, 'fixed'):.2f} of the fixed depth's time"
        )


if __name__ == "__main__":
    main()
