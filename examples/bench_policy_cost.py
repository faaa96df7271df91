"""What one policy update costs beside one application of a loop body.

    python examples/bench_policy_cost.py [--rows 512] [--width 768] [--repeats 30]

The body is one transformer layer of the bundled model's kind. Body and updates take turns within each repeat, so a
machine that slows down slows both; the ratio is the median of the repeats' ratios.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import haltkit
from haltkit.models.gpt.model import Block
from haltkit.policies.probe import FEATURES, Probe
from haltkit.protocol import LoopStep
from haltkit.timing import in_turns, milliseconds, ratio

SPECS = ["norm:tau=1e-9", "norm-rel:tau=1e-9", "accel:tau=1e-9", "accel-rel:tau=1e-9", "speed:tau=1e-9", "kl:tau=1e-12"]


def probe(width: int, *names: str, hidden: int = 0) -> Probe:
    """A probe with features, as 'haltkit fit' makes them; ``hidden``: units of its hidden layer."""
    tensors: dict[str, Tensor] = {"loop/state": torch.randn(width) / width, "loop/bias": torch.zeros(1)}
    used = {f"loop/{one}": torch.tensor([float(one in names)]) for one in FEATURES}
    if hidden:
        layer = torch.randn(hidden, width + len(FEATURES)) / width
        layer[:, width:] *= torch.tensor([float(one in names) for one in FEATURES])
        tensors |= {"loop/hidden": layer, "loop/hidden_bias": torch.zeros(hidden), "loop/out": torch.randn(hidden)}
    return Probe(0.5, haltkit.Weights(tensors | used))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=8192, help="of the readout that kl pays for")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    body = Block(options.width, max(1, options.width // 64), 4, "branch")
    head = torch.nn.Linear(options.width, options.vocabulary, bias=False)
    x_prev = torch.randn(1, options.rows, options.width)
    x = body(x_prev)
    active = torch.ones(1, options.rows, dtype=torch.bool)

    policies = {spec.partition(":")[0]: haltkit.policy(spec) for spec in SPECS}
    policies |= {"probe, state alone": probe(options.width)}
    policies |= {"probe, size, cosine, step": probe(options.width, "size", "cosine", "step")}
    policies |= {"probe, the same, 32 hidden": probe(options.width, "size", "cosine", "step", hidden=32)}
    states = {}
    for name, policy in policies.items():  # a state from the middle of a loop
        states[name], _ = policy.update(policy.init(x_prev), LoopStep(1, x_prev, x, active, head))

    def judging(name: str) -> object:
        return policies[name].update(states[name], LoopStep(2, x, x_prev, active, head))

    runs = {"body": lambda: body(x_prev), **{name: (lambda name=name: judging(name)) for name in policies}}
    in_turns(runs, 3)  # warms up
    times = in_turns(runs, options.repeats)
    print(f"{options.rows} rows of width {options.width}, float32, {torch.get_num_threads()} threads")
    print(f"{'body (one layer)':26} {milliseconds(times['body']):8.3f} ms")
    for name in policies:
        print(f"{name:26} {milliseconds(times[name]):8.3f} ms  {ratio(times, name, 'body'):7.1%} of the body")


if __name__ == "__main__":
    main()
