"""What wavefront and speculative generation cost and lose, beside sequential decoding at fixed depths.

    python examples/bench_wavefront.py [--tokens 64] [--prompts 2] [--repeats 3] [--only 'speculative;last']
    python examples/bench_wavefront.py --checkpoint DIR --full 32    # another text model, such as a deep loop

All settings take turns within each repeat, batch 1, temperature 0. Per new token: wall-clock milliseconds (the median
of the repeats), sweeps, blocks called one after the other. ``faster``: how many times as fast as the best fixed
depths, the median of the ratios within a repeat. ``--only`` takes beginnings of names. Of the text: ``same``, the
share of tokens that are the choice of the model at full depth given the same prefix, by one exact pass over it;
``equal``, the share of places that have the token of full depth's own text; ``CE``, its cross-entropy under the model
at full depth, in nats.

The best fixed depths take the fewest block calls among those whose choices are full depth's in 0.99 of the places,
given the same prefix, in what full depth writes after ``--chosen`` prompts, and after those alone that are timed.
``--depths`` says others. At the end each wavefront of a norm is held against committing after the fewest sweeps that
are the same in no smaller share.

    haltkit prepare CORPUS --out data --train-tokenizer 1024 && haltkit train deep-loop --data data --out run

trains a model with one region of two layers in minutes on a CPU (models/configs/deep-loop.yaml).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from haltkit.comparison.baselines import refine
from haltkit.models.checkpoint import BUNDLED, load_checkpoint
from haltkit.models.gpt.decoding import Decoder
from haltkit.models.gpt.model import LoopedGPT, Region
from haltkit.models.gpt.packed import packed
from haltkit.models.gpt.sampling import Sampling
from haltkit.models.gpt.speculative import Speculation, by_shallow_steps, by_wavefront
from haltkit.models.gpt.wavefront import Wavefront
from haltkit.timing import Times, in_turns, milliseconds, ratio, settled, turns

SHALLOW = (1, 2, 1)  # of the bundled model: steps by region that draft
LEAST = 0.99  # share of full depth's choices that the best fixed depths make
SWEEPS = (4, 6, 8, 10, 12, 16)
Text = tuple[list[int], float, float, float]  # tokens, sweeps, sequential layer calls, seconds after the prompt
Run = Callable[[list[int], int], Text]
Loops = dict[str, int]


def spec(loops: Loops) -> str:
    """Fixed depths as a policy by region."""
    return ";".join(f"{name}=fixed:steps={k}" for name, k in loops.items())


def best_depths(model: LoopedGPT, prompts: list[list[int]], count: int, full: int, timed: int) -> Loops:
    """The fixed depths of the fewest calls that make enough of full depth's choices, given the same prefix.

    Args:
        prompts: of one length; the first ``timed`` of them must have enough by themselves, too.
        count: new tokens of each.
    """
    length, regions = len(prompts[0]), model.regions
    made = model.generate(prompts, f"fixed:steps={full}", max_new_tokens=count, temperature=0, max_loops=full).tokens
    texts = torch.tensor([prompt + new for prompt, new in zip(prompts, made, strict=True)])

    def agreement(point: tuple[int, ...]) -> float:
        logits = model(texts[:, :-1], dict(zip(regions, point, strict=True)))[:, length - 1 :]
        same = (logits.argmax(-1) == texts[:, length:]).double()
        return min(float(same.mean()), float(same[:timed].mean()))

    blocks = [len(region.body.blocks) for region in regions.values()]
    return dict(zip(regions, refine(agreement, blocks, full, LEAST), strict=True))


def fixed(model: LoopedGPT, loops: Loops) -> Run:
    """One token after the other at fixed depths; nothing is looked at."""
    calls = sum(loops[n] * len(r.body.blocks) if isinstance(r, Region) else 1 for n, r in model.layers.items())

    def run(prompt: list[int], count: int) -> Text:
        decoder = Decoder(model, spec(loops), max_loops=max(loops.values()), capacity=len(prompt) + count)
        logits = decoder.prefill(torch.tensor([prompt])).logits
        tokens = [int(logits.argmax())]
        begun = settled()
        while len(tokens) < count:
            tokens.append(int(decoder.step_fixed(torch.tensor(tokens[-1:]), loops).argmax()))
        return tokens, 0.0, calls * (count - 1), settled() - begun

    return run


def wavefront(model: LoopedGPT, full: int, commit: str, width: int, layout: str, inner: int = 1) -> Run:
    def run(prompt: list[int], count: int) -> Text:
        decoder = Decoder(model, f"fixed:steps={full}", layout=layout, max_loops=full, capacity=len(prompt) + count)
        first = int(decoder.prefill(torch.tensor([prompt])).logits.argmax())
        begun = settled()
        one = Wavefront(decoder, commit, width=width, inner=inner)
        found = one.tokens(first, count - 1, sampling=Sampling(0.0))
        tokens = [first, *(t.token for t in found if t.token is not None)]
        return tokens, one.sweeps, one.layer_calls, settled() - begun

    return run


def verified(model: LoopedGPT, exact: Loops, draft: str, ahead: int, width: int = 0) -> Run:
    """Drafts by few steps, or by a wavefront of a width under ``draft``; verified at the depths ``exact``."""

    def run(prompt: list[int], count: int) -> Text:
        decoder = Decoder(model, spec(exact), max_loops=max(exact.values()), capacity=len(prompt) + count)
        first = int(decoder.prefill(torch.tensor([prompt])).logits.argmax())
        begun = settled()
        greedy, stop = Sampling(0.0), frozenset[int]()
        wave = Wavefront(decoder, draft, width=width) if width else None
        drafter = by_wavefront(wave, greedy, stop) if wave else by_shallow_steps(decoder, draft, greedy, stop)
        one = Speculation(decoder, drafter, ahead=ahead)
        found = one.tokens(first, count - 1, sampling=greedy)
        tokens = [first, *(t.token for t in found if t.token is not None)]
        return tokens, wave.sweeps if wave else 0.0, 0.0, settled() - begun

    return run


def _batches(model: LoopedGPT, prompt: list[int], ids: list[int], best: Loops, shallow: str, given: Options) -> None:
    """Where the gain ends: several prompts, which the sequential decoder continues together and the others in turn."""
    samplers: dict[str, dict[str, object]] = {
        "sequential": {},
        "speculative": {"sampler": "speculative", "draft": shallow},
        "wavefront": {"sampler": "wavefront", "commit": "norm:tau=0.3", "layout": "last"},
    }
    print(f"{'ms per token, prompt and all':28}" + "".join(f"{name:>14}" for name in samplers))
    common = {"max_new_tokens": given.tokens, "temperature": 0, "max_loops": given.full}
    for batch in (1, 2, 4, 8):
        prompts = [ids[i * 97 : i * 97 + len(prompt)] for i in range(batch)]
        runs = {name: partial(model.generate, prompts, spec(best), **common, **more) for name, more in samplers.items()}
        times = in_turns(runs, given.repeats)
        print(
            f"{f'batch of {batch}':28}"
            + "".join(f"{milliseconds(times[name], batch * given.tokens):14.2f}" for name in samplers)
        )
    print()


def after(sweeps: int) -> str:
    """The name of a wavefront that commits after so many sweeps, whatever has settled."""
    return f"last, after {sweeps} sweeps"


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
        **{after(k): wavefront(twin, full, f"fixed:steps={k}", 8, "last") for k in SWEEPS if k <= full},
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
    chosen: int = 16
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
    length = min(64, model.block_size // 2)
    count = max(options.prompts, options.chosen)
    if options.tokens > model.block_size - length:
        parser.error(f"--tokens {options.tokens}: the context has room for {model.block_size - length}")
    # Those that are timed are spread over the text, and so are the others between them.
    order = [i * count // options.prompts for i in range(options.prompts)]
    order += [i for i in range(count) if i not in order]
    texts = [ids[at : at + length] for at in (i * (len(ids) // count) for i in order)]
    prompts = texts[: options.prompts]
    if options.depths:
        best = dict(zip(model.regions, map(int, options.depths.split(",")), strict=True))
    else:
        best = best_depths(model, texts, options.tokens, full, options.prompts)
    print(f"best fixed depths by region: {' '.join(map(str, best.values()))}", flush=True)
    bundled = options.checkpoint == BUNDLED
    shallow = spec(dict(zip(model.regions, SHALLOW, strict=True))) if bundled else "fixed:steps=1"
    runs = settings(model, best, shallow, full)
    reference, base = list(runs)[:2]
    if options.only:
        asked = (reference, base, *options.only.split(";"))
        runs = {name: run for name, run in runs.items() if name.startswith(asked)}
    names = list(runs)
    times: Times = {name: [] for name in names}
    seen: dict[str, list[tuple[list[int], Text]]] = {}
    for places in turns(len(names), options.repeats):
        for name in (names[i] for i in places):
            seen[name] = [(prompt, runs[name](prompt, options.tokens)) for prompt in prompts]
            times[name].append(sum(text[3] for _, text in seen[name]))
    if not options.only:
        _batches(model, prompts[0], ids, best, shallow, options)
    new = (options.tokens - 1) * len(prompts)
    print(f"{'':32}{'ms':>9}{'faster':>8}{'sweeps':>8}{'calls':>7}{'same':>7}{'equal':>7}{'CE':>7}")
    agreed: dict[str, float] = {}
    for name, written in seen.items():
        same = equal = lost = 0.0
        for (prompt, (tokens, *_)), (_, (full_tokens, *_)) in zip(written, seen[reference], strict=True):
            chosen = torch.tensor(tokens)
            logits = model(torch.tensor([prompt + tokens[:-1]]), full)[0, len(prompt) - 1 :]
            same += float((logits.argmax(-1) == chosen).double().mean()) / len(prompts)
            equal += float((torch.tensor(full_tokens) == chosen).double().mean()) / len(prompts)
            lost += float(F.cross_entropy(logits, chosen)) / len(prompts)
        agreed[name] = same
        sweeps, calls = (sum(text[i] for _, text in written) / new for i in (1, 2))
        print(
            f"{name:32}{milliseconds(times[name], new):9.2f}{ratio(times, base, name):8.2f}{sweeps:8.2f}{calls:7.1f}"
            f"{same:7.3f}{equal:7.3f}{lost:7.3f}"
        )
    _against_sweeps(times, agreed)


def _against_sweeps(times: Times, agreed: dict[str, float]) -> None:
    """Each wavefront of a norm against committing after a fixed number of sweeps, at equal agreement."""
    fixed_sweeps = [after(k) for k in SWEEPS if after(k) in times]
    for name in (name for name in times if name.startswith("last, norm") and "inner" not in name):
        enough = next((one for one in fixed_sweeps if agreed[one] >= agreed[name]), None)
        if enough is None:
            print(f"{name}: no number of sweeps that was tried is the same in {agreed[name]:.3f}")
        else:
            print(f"{name}: {ratio(times, enough, name):.2f} times as fast as {enough}, same {agreed[enough]:.3f}")


if __name__ == "__main__":
    main()
