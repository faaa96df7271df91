"""What wavefront and speculative generation cost and lose, beside sequential decoding at fixed depths.

    python examples/bench_wavefront.py [--tokens 64] [--prompts 2] [--repeats 3] [--threads 1] [--only 'NAME;NAME']
    python examples/bench_wavefront.py --checkpoint DIR --full 32    # another text model, such as a deep loop

All settings take turns within each repeat, batch 1, temperature 0. Per new token: wall and processor milliseconds (the
median of the repeats), sweeps, blocks called one after the other. ``faster``: how many times as fast as the best fixed
depths, the median of the ratios within a repeat, in processor time. ``same``: the share of tokens that are the choice
of the model at full depth given the same prefix, by one exact pass over the produced text.

The best fixed depths of the bundled model are 3 9 4 by region. Those of a model with one region are found: the fewest
steps at which 0.99 of the predictions on the sample are those of full depth. For others say ``--depths``.

    haltkit prepare CORPUS --out data --train-tokenizer 1024 && haltkit train deep-loop --data data --out run

trains a model with one region of two layers in minutes on a CPU (models/configs/deep-loop.yaml).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch

from haltkit.models.checkpoint import BUNDLED, load_checkpoint
from haltkit.models.gpt.decoding import Decoder
from haltkit.models.gpt.model import LoopedGPT, Region
from haltkit.models.gpt.packed import packed
from haltkit.models.gpt.sampling import Sampling
from haltkit.models.gpt.speculative import Speculation, by_shallow_steps, by_wavefront
from haltkit.models.gpt.wavefront import Wavefront
from haltkit.timing import in_turns, milliseconds, turns

BEST, SHALLOW = (3, 9, 4), (1, 2, 1)  # of the bundled model: the best fixed depths by region, and of drafts
Clocks = tuple[float, float]  # wall, processor
Text = tuple[list[int], float, float, Clocks]  # tokens, sweeps, sequential layer calls, time after the prompt
Run = Callable[[list[int], int], Text]
Loops = dict[str, int]


def clocks(since: Clocks = (0.0, 0.0)) -> Clocks:
    return time.perf_counter() - since[0], time.process_time() - since[1]


def spec(loops: Loops) -> str:
    """Fixed depths as a policy by region."""
    return ";".join(f"{name}=fixed:steps={k}" for name, k in loops.items())


def found_depth(model: LoopedGPT, texts: list[list[int]], full: int) -> Loops:
    """The fewest steps of the only region at which 0.99 of the predictions are those of full depth."""
    tokens = torch.tensor(texts)
    exact = model(tokens, full).argmax(-1)
    same = ((model(tokens, k).argmax(-1) == exact).double().mean() >= 0.99 for k in range(1, full + 1))
    return dict.fromkeys(model.regions, 1 + next(k for k, enough in enumerate(same) if enough))


def fixed(model: LoopedGPT, loops: Loops) -> Run:
    """One token after the other at fixed depths; nothing is looked at."""
    calls = sum(loops[n] * len(r.body.blocks) if isinstance(r, Region) else 1 for n, r in model.layers.items())

    def run(prompt: list[int], count: int) -> Text:
        decoder = Decoder(model, spec(loops), max_loops=max(loops.values()), capacity=len(prompt) + count)
        logits = decoder.prefill(torch.tensor([prompt])).logits
        tokens = [int(logits.argmax())]
        begun = clocks()
        while len(tokens) < count:
            tokens.append(int(decoder.step_fixed(torch.tensor(tokens[-1:]), loops).argmax()))
        return tokens, 0.0, calls * (count - 1), clocks(begun)

    return run


def wavefront(model: LoopedGPT, full: int, commit: str, width: int, layout: str, inner: int = 1) -> Run:
    def run(prompt: list[int], count: int) -> Text:
        decoder = Decoder(model, f"fixed:steps={full}", layout=layout, max_loops=full, capacity=len(prompt) + count)
        first = int(decoder.prefill(torch.tensor([prompt])).logits.argmax())
        begun = clocks()
        one = Wavefront(decoder, commit, width=width, inner=inner)
        found = one.tokens(first, count - 1, sampling=Sampling(0.0))
        tokens = [first, *(t.token for t in found if t.token is not None)]
        return tokens, one.sweeps, one.layer_calls, clocks(begun)

    return run


def verified(model: LoopedGPT, exact: Loops, draft: str, ahead: int, width: int = 0) -> Run:
    """Drafts by few steps, or by a wavefront of a width under ``draft``; verified at the depths ``exact``."""

    def run(prompt: list[int], count: int) -> Text:
        decoder = Decoder(model, spec(exact), max_loops=max(exact.values()), capacity=len(prompt) + count)
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


def _batches(model: LoopedGPT, prompt: list[int], ids: list[int], best: Loops, shallow: str, given: Options) -> None:
    """Where the gain ends: several prompts, which the sequential decoder continues together and the others in turn."""
    samplers: dict[str, dict[str, object]] = {
        "sequential": {},
        "speculative": {"sampler": "speculative", "draft": shallow},
        "wavefront": {"sampler": "wavefront", "commit": "norm:tau=0.3", "layout": "last"},
    }
    print(f"{'ms per token, batch of':28}" + "".join(f"{name:>14}" for name in samplers))
    common = {"max_new_tokens": given.tokens, "temperature": 0, "max_loops": given.full}
    for batch in (1, 2, 4, 8):
        prompts = [ids[i * 97 : i * 97 + len(prompt)] for i in range(batch)]
        runs = {name: partial(model.generate, prompts, spec(best), **common, **more) for name, more in samplers.items()}
        times = in_turns(runs, given.repeats)
        print(f"{batch:<28}" + "".join(f"{milliseconds(times[name], batch * given.tokens):14.2f}" for name in samplers))
    print()


def settings(model: LoopedGPT, best: Loops, shallow: str, full: int) -> dict[str, Run]:
    """What is compared, by name; the first is full depth, the second the best fixed depths."""
    twin, everywhere = packed(model), dict.fromkeys(model.regions, full)
    name = " ".join(map(str, best.values()))
    return {
        f"sequential {full}": fixed(model, everywhere),
        f"sequential {name}": fixed(model, best),
        f"sequential {name}, packed": fixed(twin, best),
        f"speculative, {full}": verified(twin, everywhere, shallow, 4),
        f"speculative, {name}": verified(twin, best, shallow, 4),
        f"speculative, {name}, one step": verified(twin, best, "fixed:steps=1", 4),
        f"speculative, {name}, 3 ahead": verified(twin, best, shallow, 3),
        f"wavefront verified, {full}": verified(twin, everywhere, "norm:tau=2", 8, 8),
        f"wavefront verified, {name}": verified(twin, best, "norm:tau=2", 8, 8),
        "last, norm 0.05": wavefront(twin, full, "norm:tau=0.05", 8, "last"),
        "last, norm 0.3": wavefront(twin, full, "norm:tau=0.3", 8, "last"),
        "last, norm 1": wavefront(twin, full, "norm:tau=1", 8, "last"),
        "last, norm 0.3, width 4": wavefront(twin, full, "norm:tau=0.3", 4, "last"),
        "last, norm 0.3, 4, inner 2": wavefront(twin, full, "norm:tau=0.3", 4, "last", 2),
        "last, norm 1, 4, inner 2": wavefront(twin, full, "norm:tau=1", 4, "last", 2),
        "last, after 8 sweeps": wavefront(twin, full, "fixed:steps=8", 8, "last"),
        "depth-indexed, norm 0.3": wavefront(twin, full, "norm:tau=0.3", 8, "depth-indexed"),
    }


@dataclass
class Options(argparse.Namespace):
    """The command line."""

    checkpoint: Path = BUNDLED
    full: int = 16
    depths: str = ""
    tokens: int = 64
    prompts: int = 2
    repeats: int = 3
    threads: int = 1
    only: str = ""


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in fields(Options):
        kind = Path if option.name == "checkpoint" else type(option.default)
        parser.add_argument(f"--{option.name}", type=kind, default=option.default)
    options = parser.parse_args(namespace=Options())
    torch.set_num_threads(options.threads)
    checkpoint = load_checkpoint(options.checkpoint)
    model, full = checkpoint.model, options.full
    ids = checkpoint.tokenizer.encode_ordinary((BUNDLED / "sample.txt").read_text(encoding="utf-8"))
    stride, length = len(ids) // options.prompts, min(64, model.block_size // 2)
    if options.tokens > model.block_size - length:
        parser.error(f"--tokens {options.tokens}: the context has room for {model.block_size - length}")
    prompts = [ids[i * stride : i * stride + length] for i in range(options.prompts)]
    bundled = options.checkpoint == BUNDLED
    if options.depths or bundled:
        depths = options.depths.split(",") if options.depths else BEST
        best = dict(zip(model.regions, map(int, depths), strict=True))
    elif len(model.regions) == 1:
        best = found_depth(model, [ids[i * length : (i + 1) * length] for i in range(16)], full)
    else:
        parser.error(f"--depths: say the best fixed depth of each of the regions {', '.join(model.regions)}")
    shallow = spec(dict(zip(model.regions, SHALLOW, strict=True))) if bundled else "fixed:steps=1"
    runs = settings(model, best, shallow, full)
    base = list(runs)[1]
    if options.only:
        runs = {name: run for name, run in runs.items() if name == base or name in options.only.split(";")}
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
    if not options.only:
        _batches(model, prompts[0], ids, best, shallow, options)
    print(f"{'':32}{'wall ms':>9}{'cpu ms':>9}{'faster':>8}{'sweeps':>8}{'calls':>7}{'same':>7}")
    for name, texts in seen.items():
        same = total = 0
        for prompt, (tokens, *_) in texts:
            logits = model(torch.tensor([prompt + tokens[:-1]]), full)[0, len(prompt) - 1 :]
            same += int((logits.argmax(-1) == torch.tensor(tokens)).sum())
            total += len(tokens)
        sweeps, calls = (sum(text[i] for _, text in texts) / new for i in (1, 2))
        times = statistics.median(wall[name]), statistics.median(cpu[name])
        faster = statistics.median(slow / fast for slow, fast in zip(cpu[base], cpu[name], strict=True))
        print(f"{name:32}{times[0]:9.2f}{times[1]:9.2f}{faster:8.2f}{sweeps:8.2f}{calls:7.1f}{same / total:7.3f}")


if __name__ == "__main__":
    main()
