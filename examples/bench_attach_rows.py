"""What it saves that halted boards leave a foreign model: boards of drawn depths through a tiny-recursive-model.

    python examples/bench_attach_rows.py [--width 512] [--tokens 81] [--latents 2] [--boards 128] [--repeats 2]

Every board has a depth drawn from 1 to 16. Three ways take turns within every repeat: batches of 64 that wait for their
slowest board (masked execution), batches of 64 whose boards leave (compact execution), and a queue of 64 slots, where
the next board takes the place of one that has left; ratios are medians of the repeats' ratios. Width 512, two layers
and 81 tokens (a 9x9 Sudoku) are those of arXiv 2510.04871, and so are the 512 hidden units across tokens, where the
package's mixer has 2048 by default. Two latent steps instead of the paper's six (``--latents 6``) let two slow cores
finish within a few minutes. Weights are random: the time does not depend on them. Target: 1.5.

``--nested`` takes an HRM-text of that width instead, without a cache, whose high loop of 8 steps has a low loop of 4 in
each: both halt at drawn depths, and a sequence leaves both.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import haltkit
from haltkit.timing import in_turns, ratio

with warnings.catch_warnings():  # of what the package imports for its trainer
    warnings.simplefilter("ignore")
    from tiny_recursive_model import MLPMixer1D, TinyRecursiveModel

BATCH, DEEPEST, VOCABULARY = 64, 16, 11


@dataclass(frozen=True)
class Drawn:
    """Halts each board at a step drawn by the signs of its state after the first step."""

    most: int = DEEPEST
    granularity = "sequence"

    def init(self, x0: Tensor) -> Tensor:
        return torch.zeros(x0.shape[:-1], dtype=torch.int64, device=x0.device)

    def update(self, state: Tensor, step: haltkit.LoopStep) -> tuple[Tensor, haltkit.Verdict]:
        if step.k == 1:
            signs = (step.x[:, 0, :16] > 0).long() * torch.arange(1, 17, device=step.x.device) ** 2
            state = (1 + signs.sum(-1) % self.most).unsqueeze(-1).expand(step.x.shape[:-1])
        left = state - step.k
        return state, haltkit.Verdict(left.float(), left <= 0)


@torch.no_grad()
def nested(options: argparse.Namespace) -> None:
    from transformers import HrmTextConfig, HrmTextForCausalLM

    config = HrmTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.width,
        num_layers_per_stack=1,
        num_attention_heads=8,
        intermediate_size=2 * options.width,
        H_cycles=8,
        L_cycles=4,
    )
    model, ids = HrmTextForCausalLM(config).eval(), torch.randint(0, VOCABULARY, (options.boards, options.tokens))
    policies = {"high": Drawn(8), "low": Drawn(4)}
    found: dict[str, Tensor] = {}
    taken: dict[str, list[float]] = {}

    def in_batches(execution: Any) -> Callable[[], None]:
        def run() -> None:
            with haltkit.attach(model, policies, execution=execution, check=False) as session:
                logits = [model(batch, use_cache=False).logits for batch in ids.split(BATCH)]
            found[execution], taken[execution] = torch.cat(logits), [session.tally[name].computed for name in policies]

        return run

    times = in_turns({"masked": in_batches("masked"), "compact": in_batches("compact")}, options.repeats)
    high, low = taken["masked"]
    print(f"{options.boards} sequences, masked: {high} high and {low} low steps, {torch.get_num_threads()} threads")
    apart = float((found["compact"] - found["masked"]).abs().max())
    each = statistics.median(times["compact"])
    print(f"compact  {each:7.2f} s, {ratio(times, 'masked', 'compact'):.2f}x; logits differ by up to {apart:.1e}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=81)
    parser.add_argument("--latents", type=int, default=2, help="latent steps per refinement")
    parser.add_argument("--boards", type=int, default=2 * BATCH)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--nested", action="store_true", help="two nested loops of an HRM-text")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.nested:
        nested(options)
        return
    model: Any = TinyRecursiveModel(
        dim=options.width,
        num_tokens=VOCABULARY,
        network=MLPMixer1D(dim=options.width, depth=2, seq_len=options.tokens, expansion_factor=1),
        num_refinement_blocks=DEEPEST,
        num_latent_refinements=options.latents,
    ).eval()
    boards, start = torch.randint(0, VOCABULARY, (options.boards, options.tokens)), model.get_initial()
    found: dict[str, Tensor] = {}
    steps: list[float] = []

    def in_batches(execution: Any) -> Callable[[], None]:
        def run() -> None:
            answers = []
            with haltkit.attach(model, Drawn(), execution=execution, check=False) as session:
                for batch in boards.split(BATCH):  # finding the batch is counted
                    answers.append(model(batch, *start)[2])
                    steps.extend(session.steps["loop"][:, 0].tolist())
            found[execution] = torch.cat(answers)

        return run

    def queued() -> None:
        with haltkit.attach(model, Drawn(), check=False) as session:
            done = session.queue(boards, lambda board: model(board[None], *start)[2], BATCH)
            found["queue"] = torch.cat([result.output for result in done])

    runs = {"masked": in_batches("masked"), "compact": in_batches("compact"), "queue": queued}
    times = in_turns(runs, options.repeats)
    threads = torch.get_num_threads()
    print(f"{options.boards} boards, mean depth {statistics.mean(steps):.2f} of {DEEPEST}, {threads} threads")
    for name, seconds in times.items():
        apart = float((found[name] - found["masked"]).abs().max())
        print(
            f"{name:8} {statistics.median(seconds):7.2f} s, {ratio(times, 'masked', name):.2f}x over waiting for the "
            f"slowest board; predictions differ by up to {apart:.1e}"
        )


if __name__ == "__main__":
    main()
