"""What wavefront and speculative generation cost and lose, beside sequential decoding at fixed depths.

    python examples/bench_wavefront.py [--tokens 64] [--prompts 2] [--repeats 3] [--threads 1]

All settings take turns within each repeat, batch 1, temperature 0. Per new token: wall and processor milliseconds (the
median of the repeats), sweeps, blocks called one after the other. ``same``: the share of tokens that are the choice of
the model at 16 steps given the same prefix, by one exact pass over the produced text.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from haltkit.models.checkpoint import BUNDLED, load_checkpoint
from haltkit.models.gpt.decoding import Decoder
from haltkit.models.gpt.model import LoopedGPT, Region
from haltkit.models.gpt.packed import packed
from haltkit.models.gpt.sampling import Sampling
from haltkit.models.gpt.speculative import Speculation, by_shallow_steps, by_wavefront
from haltkit.models.gpt.wavefront import Wavefront
from haltkit.timing import in_turns, milliseconds, turns

FULL = 16
DEPTHS = "4=fixed:steps=3;5-6=fixed:steps=9;7=fixed:steps=4"
SHALLOW = "4=fixed:steps=1;5-6=fixed:steps=2;7=fixed:steps=1"
Clocks = tuple[float, float]  # wall, processor
Text = tuple[list[int], float, float, Clocks]  # tokens, sweeps, sequential layer calls, time after the prompt
Run = Callable[[list[int], int], Text]


def clocks(since: Clocks = (0.0, 0.0)) -> Clocks:
    return time.perf_counter() - since[0], time.process_time() - since[1]


def fixed(model: LoopedGPT, loops: dict[str, int]) -> Run:
    """One token after the other at fixed depths; nothing is looked at."""
    calls = sum(loops[n] * len(r.body.blocks) if isinstance(r, Region) else 1 for n, r in model.layers.items())

    def run(prompt: list[int], count: int) -> Text:
        policies = {name: f"fixed:steps={k}" for name, k in loops.items()}
        decoder = Decoder(model, policies, max_loops=FULL, capacity=len(prompt) + count)
        logits = decoder.prefill(torch.tensor([prompt])).logits
        tokens = [int(logits.argmax())]
        begun = clocks()
        while len(tokens) < count:
            tokens.append(int(decoder.step_fixed(torch.tensor(tokens[-1:]), loops).argmax()))
        return tokens, 0.0, calls * (count - 1), clocks(begun)

    return run


def wavefront(model: LoopedGPT, commit: str, width: int, layout: str, inner: int = 1) -> Run:
    def run(prompt: list[int], count: int) -> Text:
        decoder = Decoder(model, f"fixed:steps={FULL}", layout=layout, max_loops=FULL, capacity=len(prompt) + count)
        first = int(decoder.prefill(torch.tensor([prompt])).logits.argmax())
        begun = clocks()
        one = Wavefront(decoder, commit, width=width, inner=inner)
        found = one.tokens(first, count - 1, sampling=Sampling(0.0))
        tokens = [first, *(t.token for t in found if t.token is not None)]
        return tokens, one.sweeps, one.layer_calls, clocks(begun)

    return run


def verified(model: LoopedGPT, exact: str, draft: str, ahead: int, width: int = 0) -> Run:
    """Drafts by few steps, or by a wavefront of a width under ``draft``; verified under ``exact``."""

    def run(prompt: list[int], count: int) -> Text:
        decoder = Decoder(model, exact, max_loops=FULL, capacity=len(prompt) + count)
        first = int(decoder.prefill(torch.tensor([prompt])).logits.argmax())
        begun = clocks()
        greedy, stop = Sampling(0.0), frozenset[int]()
        wave = Wavefront(decoder, draft, width=width) if width else None
        drafter = by_wavefront(wave, greedy, stop) if wave else by_shallow_steps(decoder, draft, greedy, stop)
        one = Speculation(decoder, drafter, ahead=ahead)
        found = one.tokens(first, count - 1, sampling=greedy)
        tokens = [first, *(t.token for t in found if t.token is not None)]
        return tokens, wave.sweeps if wave else 0.0, 0.0, clocks(begun)

    return run


def _batches(model: LoopedGPT, prompt: list[int], ids: list[int], count: int, repeats: int) -> None:
    """Where the gain ends: several prompts, which the sequential decoder continues together and the others in turn."""
    samplers: dict[str, dict[str, object]] = {
        "sequential": {},
        "speculative": {"sampler": "speculative", "draft": SHALLOW},
        "wavefront": {"sampler": "wavefront", "commit": "norm:tau=0.3", "layout": "last"},
    }
    print(f"{'ms per token, batch of':28}" + "".join(f"{name:>14}" for name in samplers))
    for batch in (1, 2, 4, 8):
        given = [ids[i * 97 : i * 97 + len(prompt)] for i in range(batch)]
        runs = {
            name: partial(model.generate, given, DEPTHS, max_new_tokens=count, temperature=0, max_loops=FULL, **more)
            for name, more in samplers.items()
        }
        times = in_turns(runs, repeats)
        print(f"{batch:<28}" + "".join(f"{milliseconds(times[name], batch * count):14.2f}" for name in samplers))
    print()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = load_checkpoint(BUNDLED)
    model = checkpoint.model
    ids = checkpoint.tokenizer.encode_ordinary((BUNDLED / "sample.txt").read_text(encoding="utf-8"))
    stride = len(ids) // options.prompts
    prompts = [ids[i * stride : i * stride + 64] for i in range(options.prompts)]
    twin = packed(model)
    best = dict(zip(model.regions, (3, 9, 4), strict=True))
    runs: dict[str, Run] = {
        "sequential 16": fixed(model, dict.fromkeys(model.regions, FULL)),
        "sequential 3 9 4": fixed(model, best),
        "sequential 3 9 4, packed": fixed(twin, best),
        "speculative, 16": verified(twin, f"fixed:steps={FULL}", SHALLOW, 4),
        "speculative, 3 9 4": verified(twin, DEPTHS, SHALLOW, 4),
        "speculative, 3 9 4, one step": verified(twin, DEPTHS, "fixed:steps=1", 4),
        "speculative, 3 9 4, 3 ahead": verified(twin, DEPTHS, SHALLOW, 3),
        "wavefront verified, 3 9 4": verified(twin, DEPTHS, "norm:tau=5", 16, 8),
        "last, norm 0.05": wavefront(twin, "norm:tau=0.05", 8, "last"),
        "last, norm 0.3": wavefront(twin, "norm:tau=0.3", 8, "last"),
        "last, norm 0.3, width 4": wavefront(twin, "norm:tau=0.3", 4, "last"),
        "last, norm 0.3, 4, inner 2": wavefront(twin, "norm:tau=0.3", 4, "last", 2),
        "last, norm 1, 4, inner 2": wavefront(twin, "norm:tau=1", 4, "last", 2),
        "last, after 8 sweeps": wavefront(twin, "fixed:steps=8", 8, "last"),
        "depth-indexed, norm 0.3": wavefront(twin, "norm:tau=0.3", 8, "depth-indexed"),
    }
    names = list(runs)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    seen: dict[str, list[tuple[list[int], Text]]] = {}
    new = (options.tokens - 1) * len(prompts)
    for order in turns(len(names), options.repeats):
        for name in (names[i] for i in order):
            seen[name] = [(prompt, runs[name](prompt, options.tokens)) for prompt in prompts]
            for kind, i in ((wall, 0), (cpu, 1)):
                kind[name].append(1e3 * sum(text[3][i] for _, text in seen[name]) / new)
    _batches(model, prompts[0], ids, options.tokens, options.repeats)
    print(f"{'':28}{'wall ms':>9}{'cpu ms':>9}{'sweeps':>8}{'calls':>7}{'same':>7}")
    for name, texts in seen.items():
        same = total = 0
        for prompt, (tokens, *_) in texts:
            logits = model(torch.tensor([prompt + tokens[:-1]]), FULL)[0, len(prompt) - 1 :]
            same += int((logits.argmax(-1) == torch.tensor(tokens)).sum())
            total += len(tokens)
        sweeps, calls = (sum(text[i] for _, text in texts) / new for i in (1, 2))
        times = statistics.median(wall[name]), statistics.median(cpu[name])
        print(f"{name:28}{times[0]:9.2f}{times[1]:9.2f}{sweeps:8.2f}{calls:7.1f}{same / total:7.3f}")


if __name__ == "__main__":
    main()
