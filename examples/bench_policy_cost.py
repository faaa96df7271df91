"""What one update of each policy costs beside one application of a loop body.

    python examples/bench_policy_cost.py [--rows 512] [--width 768] [--seconds 20]

The body is one transformer layer of the bundled model's kind. Body and updates take turns within each repeat, so a
machine that slows down slows both; the ratio is the median of the repeats' ratios. Every update follows a body, as in a
loop. Where other work interrupts the body, the ratios are too small: use an idle machine. Every registered policy is
there; a gate is timed with a linear exit head, and probes with weights of the shapes that 'haltkit fit' makes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from torch import Tensor

import haltkit
from haltkit.models.gpt.bench import policy_cost
from haltkit.policies.probe import FEATURES, Probe


def probe(width: int, *names: str, hidden: int = 0) -> Probe:
    """A probe with features, as 'haltkit fit' makes them; ``hidden``: units of its hidden layer."""
    tensors: dict[str, Tensor] = {"loop/state": torch.randn(width) / width, "loop/bias": torch.zeros(1)}
    used = {f"loop/{one}": torch.tensor([float(one in names)]) for one in FEATURES}
    if hidden:
        layer = torch.randn(hidden, width + len(FEATURES)) / width
        layer[:, width:] *= torch.tensor([float(one in names) for one in FEATURES])
        tensors |= {"loop/hidden": layer, "loop/hidden_bias": torch.zeros(hidden), "loop/out": torch.randn(hidden)}
    return Probe(0.5, haltkit.Weights(tensors | used))


def probes(width: int) -> Mapping[str, Probe]:
    """Those without a readout, and the one that sees the margin of the prediction."""
    return {
        "probe, state alone": probe(width),
        "probe, size, cosine, step": probe(width, "size", "cosine", "step"),
        "probe, the same, 32 hidden": probe(width, "size", "cosine", "step", hidden=32),
        "probe, all of it, margin": probe(width, *FEATURES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=8192, help="of the readout that some policies pay for")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    [found] = policy_cost(
        (options.width,),
        (options.rows,),
        options.vocabulary,
        seconds=options.seconds,
        dtypes=[torch.float32],
        also=probes,
    )
    print(f"{options.rows} rows of width {options.width}, float32, {torch.get_num_threads()} threads")
    print(f"{'body (one layer)':26} {found['body_ms']:8.3f} ms")
    for name, share in found["relative"].items():
        print(f"{name:26} {share:7.1%} of the body")


if __name__ == "__main__":
    main()
