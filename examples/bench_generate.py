"""What ``custom_generate=haltkit.generation(...)`` costs over transformers' own loop at equal steps, and what it saves.

    python examples/bench_generate.py [--width 512] [--tokens 16] [--repeats 7]

An HRM-text of random weights, one layer per stack, generates greedily with a cache at batch 1. The ways take turns
within every repeat; ratios are medians of the repeats' ratios. Target: 1.03 at equal steps; at half the steps, 0.8 of
what the model itself saves.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from transformers import HrmTextConfig, HrmTextForCausalLM

import haltkit
from haltkit.timing import in_turns, milliseconds, ratio

CYCLES, FEWER = 8, 4


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = HrmTextConfig(
        vocab_size=1000,
        hidden_size=options.width,
        num_hidden_layers=1,
        num_attention_heads=8,
        intermediate_size=4 * options.width,
        H_cycles=CYCLES,
        L_cycles=2,
    )
    model: Any = HrmTextForCausalLM(config).eval()
    ids = torch.randint(1, 1000, (1, 32))
    # What generates, and how many cycles the model itself is told to run.
    ways: dict[str, tuple[Any, int]] = {
        "transformers": (None, CYCLES),
        "haltkit, never halts": (haltkit.generation("norm:tau=1e-30", check=False), CYCLES),
        "transformers, fewer": (None, FEWER),
        "haltkit, halts": (haltkit.generation(f"fixed:steps={FEWER}", check=False), CYCLES),
    }

    def generate(way: Any, cycles: int) -> None:
        model.config.H_cycles = cycles
        model.generate(ids, max_new_tokens=options.tokens, do_sample=False, pad_token_id=0, custom_generate=way)

    runs = {name: partial(generate, *how) for name, how in ways.items()}
    in_turns(runs, 1)  # warms up
    times = in_turns(runs, options.repeats)
    print(f"transformers: {milliseconds(times['transformers'], options.tokens):.1f} ms a token")
    print(
        f"equal steps: {ratio(times, 'haltkit, never halts', 'transformers'):.3f} of transformers' time (target 1.03)"
    )
    own, ours = (ratio(times, name, "transformers") for name in ("transformers, fewer", "haltkit, halts"))
    print(
        f"{FEWER} of {CYCLES} cycles: {ours:.3f} of the time, the model itself {own:.3f}: "
        f"{(1 - ours) / (1 - own):.2f} of what can be saved (target 0.8)"
    )


if __name__ == "__main__":
    main()
