"""What it saves that rows leave a foreign model: boards with drawn depths through a tiny-recursive-model.

    python examples/bench_attach_rows.py [--width 512] [--tokens 81] [--latents 2] [--repeats 2]

Every board of a batch of 64 has a depth drawn from 1 to 16. Waiting for the slowest board (masked execution) and
letting boards leave (compact execution) take turns within every repeat; the ratio is the median of the repeats' ratios.
Width 512, two layers and 81 tokens (a 9x9 Sudoku) are those of arXiv 2510.04871, and so are the 512 hidden units across
tokens, where the package's mixer has 2048 by default. Two latent steps instead of the paper's six (``--latents 6``) let
two slow cores finish within three minutes. Weights are random: the time does not depend on them. Target: 1.5.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import haltkit

with warnings.catch_warnings():  # of what the package imports for its trainer
    warnings.simplefilter("ignore")
    from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel

BATCH, DEEPEST, VOCABULARY = 64, 16, 11
EXECUTIONS = ("masked", "compact")


@dataclass(frozen=True)
class Drawn:
    """Halts each board at a step drawn for it."""

    depths: tuple[int, ...]

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: haltkit.LoopStep) -> tuple[None, haltkit.Verdict]:
        depths = torch.tensor(self.depths, device=step.x.device).unsqueeze(-1)
        left = (depths - step.k).expand(step.x.shape[:-1])
        return None, haltkit.Verdict(left.float(), left <= 0)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=81)
    parser.add_argument("--latents", type=int, default=2, help="latent steps per refinement")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    model: Any = TinyRecursiveModel(
        dim=options.width,
        num_tokens=VOCABULARY,
        network=MLPMixer1D(dim=options.width, depth=2, seq_len=options.tokens, expansion_factor=1),
        num_refinement_blocks=DEEPEST,
        num_latent_refinements=options.latents,
    ).eval()
    boards, start = torch.randint(0, VOCABULARY, (BATCH, options.tokens)), model.get_initial()
    drawn = Drawn(tuple(torch.randint(1, DEEPEST + 1, (BATCH,)).tolist()))
    print(f"depths: mean {statistics.mean(drawn.depths):.2f}, deepest {max(drawn.depths)} of {DEEPEST}")
    ratios = []
    for _ in range(options.repeats):
        seconds: dict[str, float] = {}
        predictions: dict[str, Tensor] = {}
        for execution in EXECUTIONS:
            started = time.perf_counter()
            with haltkit.attach(model, drawn, execution=execution, check=False):  # finding the batch is counted
                predictions[execution] = model(boards, *start)[2]
            seconds[execution] = time.perf_counter() - started
        ratios.append(seconds["masked"] / seconds["compact"])
        apart = float((predictions["masked"] - predictions["compact"]).abs().max())
        print(
            f"masked {seconds['masked']:.2f} s, compact {seconds['compact']:.2f} s: {ratios[-1]:.2f}x, "
            f"predictions differ by up to {apart:.1e}",
            flush=True,
        )
    print(f"median {statistics.median(ratios):.2f}x over waiting for the slowest board (target 1.5)")


if __name__ == "__main__":
    main()
