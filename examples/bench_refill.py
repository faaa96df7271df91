"""What refilling saves where texts end at different lengths.

    python examples/bench_refill.py [--prompts 64] [--slots 8] [--longest 128] [--repeats 3]

The bundled model continues prompts of 8 to 64 tokens until it draws a full stop. Two ways, which draw the same texts,
take turns within each repeat:

    batches   generate, --slots prompts at a time: a batch waits for its longest text
    refill    generate_stream: the next prompt takes the slot of a text that has ended

Tokens per second, and by how much refilling is faster (the median of the repeats' ratios).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from haltkit.models.checkpoint import BUNDLED, load_checkpoint
from haltkit.timing import in_turns, milliseconds, ratio

DEPTHS = "4=fixed:steps=3;5-6=fixed:steps=9;7=fixed:steps=4"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--longest", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--policy", default=DEPTHS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = load_checkpoint(BUNDLED)
    model, tokenizer, slots = checkpoint.model, checkpoint.tokenizer, options.slots
    ids = tokenizer.encode_ordinary((BUNDLED / "sample.txt").read_text(encoding="utf-8"))
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(ids) - 64, (options.prompts,), generator=generator).tolist()
    sizes = torch.randint(8, 65, (options.prompts,), generator=generator).tolist()
    prompts = [ids[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    values: dict[str, Any] = {
        "max_new_tokens": options.longest,
        "stop": tokenizer.encode_ordinary("."),
        "max_loops": 16,
    }
    made: dict[str, list[list[int]]] = {}

    def batches() -> None:
        made["batches"] = [
            text
            for start in range(0, len(prompts), slots)
            for text in model.generate(prompts[start : start + slots], options.policy, seed=start, **values).tokens
        ]

    def refill() -> None:
        made["refill"] = [text.tokens for text in model.generate_stream(prompts, options.policy, slots=slots, **values)]

    times = in_turns({"batches": batches, "refill": refill}, options.repeats)
    lengths = [min(len(text) + 1, options.longest) for text in made["refill"]]  # with the full stop
    total, same = sum(lengths), sum(a == b for a, b in zip(made["batches"], made["refill"], strict=True))
    print(f"{len(prompts)} prompts, {slots} slots; {total} tokens, {min(lengths)} to {max(lengths)} each; {same} equal")
    for name, seconds in times.items():
        print(f"  {name:8}{1e3 / milliseconds(seconds, total):7.1f} tokens per second")
    print(f"  refill is {ratio(times, 'batches', 'refill'):.2f} times as fast")


if __name__ == "__main__":
    main()
