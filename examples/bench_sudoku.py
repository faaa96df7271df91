"""Boards per second: the bundled sudoku model over a queue, against fixed depths that solve as many boards.

    python examples/bench_sudoku.py [--boards 4096] [--part 1024] [--slots 64] [--repeats 3] [--policy SPEC]

Three fixed depths stand against the queue, all chosen with the answers at hand, so they are better than what anybody
could have picked. Each is the least one that solves

- no fewer of these boards than the policy does; on few boards that hangs on one or two of them;
- fewer by at most two standard errors of the difference, board by board;
- fewer by at most one standard error of the policy's own share, which is more: the same boards are hard for both.

All take turns on one part of the boards after the other. A gain is the mean of the ratios of time, with its standard
error over parts and repeats.
"""

from __future__ import annotations

import argparse
import math
import statistics
from functools import partial

import torch
from torch import Tensor

import haltkit
from haltkit.models.reasoner.checkpoint import bundled_reasoner
from haltkit.models.reasoner.measure import predictions
from haltkit.models.reasoner.model import Reasoner
from haltkit.models.reasoner.task import Batch
from haltkit.timing import in_turns

FULL = 28


def queue(model: Reasoner, boards: Batch, policy: haltkit.HaltingPolicy[object], slots: int) -> tuple[Tensor, Tensor]:
    """Steps and whether it is solved of each board, ``(B,)`` each."""
    e = model.embed(boards.inputs)
    items = (haltkit.QueueItem(x, one) for x, one in zip(model.initial_state(e), e, strict=True))
    steps, solved = torch.zeros(len(e)), torch.zeros(len(e), dtype=torch.bool)
    for result in haltkit.run_queue(model.step, items, policy, slots, max_steps=FULL, readout=model.readout):
        steps[result.index] = float(result.steps[0])
        solved[result.index] = bool((model.readout(result.x).argmax(-1) == boards.labels[result.index]).all())
    return steps, solved


def fixed(model: Reasoner, boards: Batch, depth: int, slots: int) -> None:
    for inputs in boards.inputs.split(slots):
        model(inputs, depth).argmax(-1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=int, default=4096)
    parser.add_argument("--part", type=int, default=1024, help="boards that one timing covers")
    parser.add_argument("--slots", type=int, default=64, help="of the queue; also the size of a batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--policy", default="kl:tau=0.0013,granularity=sequence")
    options = parser.parse_args()
    loaded = bundled_reasoner("sudoku")
    model, policy = loaded.model, haltkit.policy(options.policy)
    boards = next(iter(loaded.task.test_sets(options.boards, 0).values()))
    right_at = (predictions(model, boards, FULL) == boards.labels).all(-1)  # (FULL, B)
    steps, solved = queue(model, boards, policy, options.slots)

    behind = solved.double() - right_at.double()  # of each fixed depth, board by board
    missing = behind.mean(1)
    errors = behind.std(1, correction=min(1, options.boards - 1)) / math.sqrt(options.boards)
    share = float(solved.double().mean())
    own = torch.full_like(missing, math.sqrt(share * (1 - share) / options.boards))
    allowed = {
        "no fewer": torch.zeros_like(missing),
        "within two errors of the difference": 2 * errors,
        f"within the share's own error, {float(own[0]):.2%}": own,
    }
    depths = {
        name: next((k for k in range(1, FULL) if missing[k - 1] <= most[k - 1]), FULL) for name, most in allowed.items()
    }
    gains: dict[int, list[float]] = {depth: [] for depth in depths.values()}
    rates: dict[str | int, list[float]] = {"queue": [], **{depth: [] for depth in gains}}
    for start in range(0, options.boards, options.part):
        part = boards[slice(start, start + options.part)]
        runs = {"queue": partial(queue, model, part, policy, options.slots)}
        runs |= {str(depth): partial(fixed, model, part, depth, options.slots) for depth in gains}  # type: ignore[misc]
        times = in_turns(runs, options.repeats)
        rates["queue"] += [len(part.inputs) / one for one in times["queue"]]
        for depth, found in gains.items():
            found += [a / b for a, b in zip(times[str(depth)], times["queue"], strict=True)]
            rates[depth] += [len(part.inputs) / one for one in times[str(depth)]]

    print(f"{options.boards} boards, {share:.2%} solved under {options.policy}")
    print(f"  queue        {statistics.median(rates['queue']):8.1f} boards per second, {float(steps.mean()):.2f} steps")
    for name, depth in depths.items():
        gain, lost, error = gains[depth], float(missing[depth - 1]), float(errors[depth - 1])
        spread = statistics.stdev(gain) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
        rate = statistics.median(rates[depth])
        print(f"  fixed {depth:3d}    {rate:8.1f} boards per second, {share - lost:.2%} solved")
        print(f"    {name}: {0 - lost:+.2%} ± {error:.2%}")
        print(f"    the queue is {statistics.fmean(gain):.2f} ± {spread:.2f} times as fast")


if __name__ == "__main__":
    main()
