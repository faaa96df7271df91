"""What a wavefront over a foreign model saves: x-transformers' looped decoder with random weights, without a cache.

    python examples/bench_attach_wavefront.py [--steps 16] [--tokens 32] [--repeats 3] [--threads 1]

All ways take turns within each repeat; times are wall clock, ratios are medians within a repeat. ``same``: the
share of places at which the text has the token that the model at full depth puts there; what follows another token
counts as well, so it is a lower bound of the agreement given the same prefix.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
import x_transformers
from torch import Tensor

import haltkit
from haltkit.attachment.wavefront import ForeignWavefront
from haltkit.models.gpt.sampling import Sampling
from haltkit.timing import in_turns, milliseconds, ratio

POLICY, LENGTH, VOCABULARY = "norm:tau=0.3", 64, 1000
SAMPLING = Sampling(temperature=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"steps": 16, "tokens": 32, "repeats": 3, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    layers = x_transformers.Decoder(dim=256, heads=4, attn_dim_head=64, depth=2, pre_and_post_norm=True)
    model = x_transformers.TransformerWrapper(
        num_tokens=VOCABULARY, max_seq_len=LENGTH + options.tokens, attn_layers=layers, looped=True
    ).eval()
    loop = haltkit.Loop(["attn_layers", "exit_gate"], state="attn_layers")
    prompt = torch.randint(0, VOCABULARY, (LENGTH,)).tolist()

    def run(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, looped_steps=options.steps)
        return logits

    @torch.no_grad()
    def sequential() -> list[int]:
        text = list(prompt)
        for _ in range(options.tokens):
            text.append(int(SAMPLING.pick(run(torch.tensor([text]))[:, -1], [len(text)])))
        return text[LENGTH:]

    def attached() -> list[int]:
        with haltkit.attach(model, POLICY, loop, check=False):
            return sequential()

    def wavefront(**values: object) -> Callable[[], list[int | None]]:
        how = {"run": run, "loop": loop, "sampling": SAMPLING, **values}
        return lambda: [new.token for new in ForeignWavefront(model, prompt, POLICY, **how).generate(options.tokens)]

    ways: dict[str, Callable[[], list[int] | list[int | None]]] = {
        "full depth": sequential,
        POLICY: attached,
        "wavefront": wavefront(),
        "wavefront, inner 2": wavefront(inner=2),
        "wavefront, depth-indexed": wavefront(layout="depth-indexed"),
        "one position, depth-indexed": wavefront(layout="depth-indexed", width=1),
    }
    texts: dict[str, list[int] | list[int | None]] = {}

    def kept(name: str) -> None:
        texts[name] = ways[name]()

    times = in_turns({name: partial(kept, name) for name in ways}, options.repeats)
    print(f"{options.steps} steps, {LENGTH} + {options.tokens} tokens\n{'':32}{'ms':>9}{'faster':>8}{'same':>7}")
    for name, text in texts.items():
        same = statistics.mean(a == b for a, b in zip(texts["full depth"], text, strict=True))
        spent = milliseconds(times[name], options.tokens)
        print(f"{name:32}{spent:9.2f}{ratio(times, 'full depth', name):8.2f}{same:7.3f}")


if __name__ == "__main__":
    main()
