"""Boards per second: the bundled sudoku model over a queue, against the best fixed depth.

    python examples/bench_sudoku.py [--boards 512] [--slots 64] [--repeats 5] [--policy SPEC]

The fixed depth is the least one that solves as many of these boards as the policy does, chosen with the answers at
hand, so it is better than what anybody could have picked. Both take turns; the gain is the median of their ratios.
"""

from __future__ import annotations

import argparse
import statistics

import torch

import haltkit
from haltkit.models.reasoner.checkpoint import bundled_reasoner
from haltkit.models.reasoner.measure import curve, predictions
from haltkit.timing import in_turns

FULL = 28


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=int, default=512)
    parser.add_argument("--slots", type=int, default=64, help="of the queue; also the size of a batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--policy", default="kl:tau=0.0013,granularity=sequence")
    options = parser.parse_args()
    loaded = bundled_reasoner("sudoku")
    model, policy = loaded.model, haltkit.policy(options.policy)
    boards = next(iter(loaded.task.test_sets(options.boards, 0).values()))
    right_at = curve(predictions(model, boards, FULL), boards).sequences

    def queue() -> tuple[float, float]:
        """Mean steps, and the share of boards solved."""
        e = model.embed(boards.inputs)
        items = (haltkit.QueueItem(x, one) for x, one in zip(model.initial_state(e), e, strict=True))
        steps = solved = 0
        for result in haltkit.run_queue(
            model.step, items, policy, options.slots, max_steps=FULL, readout=model.readout
        ):
            steps += int(result.steps[0])
            solved += bool((model.readout(result.x).argmax(-1) == boards.labels[result.index]).all())
        return steps / options.boards, solved / options.boards

    mean, solved = queue()
    depth = next((k for k, share in enumerate(right_at, 1) if share >= solved), FULL)

    def fixed() -> None:
        for inputs in boards.inputs.split(options.slots):
            model(inputs, depth).argmax(-1)

    fixed()
    times = in_turns({"fixed": fixed, "queue": queue}, options.repeats)
    rates = {name: options.boards / statistics.median(seconds) for name, seconds in times.items()}
    gains = sorted(b / a for a, b in zip(times["queue"], times["fixed"], strict=True))
    print(f"{options.boards} boards, {solved:.2%} solved under {options.policy}")
    print(f"  queue       {rates['queue']:8.1f} boards per second, {mean:.2f} steps on average")
    print(f"  fixed {depth:3d}   {rates['fixed']:8.1f} boards per second, {right_at[depth - 1]:.2%} solved")
    print(f"  the queue is {statistics.median(gains):.2f} times as fast ({gains[0]:.2f} to {gains[-1]:.2f})")


if __name__ == "__main__":
    main()
