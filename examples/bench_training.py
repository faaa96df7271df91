"""How fast a training step is: against GPT-2 implementations with the loops off, against the machine with them on.

    python examples/bench_training.py [--config small] [--nanogpt PATH/TO/model.py]

One table, from one run on one machine, with rounds of all contestants interleaved: tokens/s and the fraction of the
machine's measured matmul peak in the precision of the steps (model operations only: what recomputation or masking
repeats does not count).
"Loops off" has the same width, depth, batch, precision, optimizer and clipping for everybody; transformers'
GPT2LMHeadModel (and nanoGPT's model, whose file is not part of haltkit) are compiled whole, haltkit's as it trains.
Then the activations that one step keeps, by backprop depth and loop count, and what recomputing steps trades.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.models.checkpoint import build_model
from haltkit.models.gpt.config import ModelConfig
from haltkit.models.gpt.cost import saved_bytes, step_flops
from haltkit.models.gpt.draws import TrainingNoise
from haltkit.models.training.config import load_config
from haltkit.models.training.distributed import Objective
from haltkit.models.training.precision import choose_precision
from haltkit.models.training.step import compile_for_training, head_loss
from haltkit.timing import settled

Step = Callable[[], None]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(step: Step) -> float:
    started = settled()
    step()
    return settled() - started


def matmul_peak(repeats: int, dtype: torch.dtype) -> float:
    """The most operations per second that a matrix product of this dtype reaches here, over a few shapes."""
    best = 0.0
    for rows, inner, columns in ((2048, 1024, 1024), (2048, 1024, 4096), (4096, 2048, 2048)):
        a = torch.randn(rows, inner, device=DEVICE).to(dtype)
        b = torch.randn(inner, columns, device=DEVICE).to(dtype)
        fastest = min(seconds(lambda a=a, b=b: torch.mm(a, b)) for _ in range(3 + repeats))
        best = max(best, 2 * rows * inner * columns / fastest)
    return best


def optimizing(module: nn.Module, loss: Callable[[], Tensor], bf16: bool) -> Step:
    """A whole training step: forward, backward, clipping, AdamW."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(config: ModelConfig, windows: Tensor, loops: int, depth: int, compiled: bool, bf16: bool) -> Step:
    model = build_model(config).to(DEVICE)
    objective = Objective(model, compile_for_training(model) if compiled else head_loss, head_loss)
    counts = dict.fromkeys(model.regions, loops)
    return optimizing(model, lambda: objective(windows, counts, TrainingNoise(0, range(len(windows))), depth), bf16)


def huggingface(config: ModelConfig, windows: Tensor, compiled: bool, bf16: bool) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.d_model,
            n_layer=config.n_layer,
            n_head=config.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).to(DEVICE)
    run: Any = torch.compile(model) if compiled else model
    inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def loss() -> Tensor:
        logits = run(input_ids=inputs).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return optimizing(model, loss, bf16)


def nanogpt(path: Path, config: ModelConfig, windows: Tensor, compiled: bool, bf16: bool) -> Step:
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    model = module.GPT(
        module.GPTConfig(
            block_size=config.block_size,
            vocab_size=config.vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.d_model,
            dropout=0.0,
            bias=False,
        )
    ).to(DEVICE)
    run = torch.compile(model) if compiled else model
    inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    return optimizing(model, lambda: run(inputs, targets)[1], bf16)


def kept(
    config: ModelConfig, windows: Tensor, loops: int, depth: int, recompute: bool, bf16: bool
) -> tuple[int, float]:
    """Bytes that a forward pass keeps for its backward pass, and the seconds of both; not compiled."""
    model = build_model(config).to(DEVICE)
    objective = Objective(model, head_loss, head_loss)
    counts = dict.fromkeys(model.regions, loops)
    noise = TrainingNoise(0, range(len(windows)))
    started = settled()
    with saved_bytes(model.parameters()) as measured, torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
        loss = objective(windows, counts, noise, depth, recompute)
    loss.backward()
    return measured.value, settled() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="small", help="a training config; its batch, width and depth are used")
    parser.add_argument("--batch", type=int, help="[default: the config's]")
    parser.add_argument("--nanogpt", type=Path, help="nanoGPT's model.py")
    parser.add_argument("--layers", type=int, help="fewer layers for the comparison with the loops off")
    parser.add_argument("--loops", type=int, help="[default: the config's mean]")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contestant")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--no-loops", action="store_true", help="only the comparison with the loops off")
    parser.add_argument("--no-memory", action="store_true", help="leave the activations out")
    arguments = parser.parse_args()

    config = load_config(arguments.config)
    train, compiled = config.train, not arguments.eager
    batch = arguments.batch or train.batch_size
    choice = choose_precision(train.precision, DEVICE)
    print(f"precision {choice.precision}: {choice.reason}", flush=True)
    bf16 = choice.precision == "bf16"
    torch.manual_seed(0)
    model = config.model
    windows = torch.randint(0, model.vocab_size, (batch, model.block_size + 1), device=DEVICE)
    plain = replace(model, regions=(), n_layer=arguments.layers or model.n_layer)
    loops = arguments.loops or model.mean_loops
    counts = dict.fromkeys(model.regions, loops)

    looped = f"haltkit, {loops} loops"
    flops = {"haltkit": step_flops(plain, {}).total}
    contestants: dict[str, Step] = {"haltkit": ours(plain, windows, 1, train.backprop_depth, compiled, bf16)}
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: no GPT2LMHeadModel (pip install transformers)")
    else:
        contestants["GPT2LMHeadModel"] = huggingface(plain, windows, compiled, bf16)
    if arguments.nanogpt is None:
        print("no --nanogpt: its model is left out")
    else:
        contestants["nanoGPT"] = nanogpt(arguments.nanogpt, plain, windows, compiled, bf16)
    if model.regions and not arguments.no_loops:
        contestants[looped] = ours(model, windows, loops, train.backprop_depth, compiled, bf16)
        flops[looped] = step_flops(model, counts, train.backprop_depth).total

    # In the precision that is timed: where bf16 is not computed in hardware its peak says nothing and takes minutes.
    peak = matmul_peak(arguments.rounds, torch.bfloat16 if bf16 else torch.float32)
    for name, step in contestants.items():
        spent = [seconds(step) for _ in range(2)]  # compiles, then settles
        print(f"{name}: first step {spent[0]:.1f} s, second {spent[1]:.3f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(arguments.rounds):
        for name, step in contestants.items():
            times[name].append(seconds(step))

    tokens = windows[:, 1:].numel()
    print(
        f"{arguments.config}: batch {batch} x {model.block_size}, width {model.d_model}, {plain.n_layer} "
        f"layers with the loops off, {choice.precision}, {'compiled' if compiled else 'not compiled'}; {DEVICE.type}, "
        f"{torch.get_num_threads()} threads; measured {choice.precision} matmul peak {peak / 1e9:,.0f} GFLOP/s"
    )
    print(f"{'':24}{'tokens/s':>10}{'half range':>12}{'MFLOP/token':>13}{'of the peak':>13}{'haltkit is':>12}")
    speed = {name: tokens / statistics.median(found) for name, found in times.items()}
    for name, found in times.items():
        operations = flops.get(name, flops["haltkit"])
        spread = (max(found) - min(found)) / 2 / statistics.median(found)
        ratio = f"{speed['haltkit'] / speed[name]:.2f}x" if name not in flops else ""
        used = operations * speed[name] / peak
        print(f"{name:24}{speed[name]:10,.0f}{spread:12.0%}{operations / 1e6:13,.1f}{used:13.1%}{ratio:>12}")
    if looped in speed:
        relative = flops[looped] * speed[looped] / (flops["haltkit"] * speed["haltkit"])
        print(f"utilisation with loops, relative to loops off: {relative:.2f}")
    if arguments.no_memory or not model.regions:
        return
    print("\nactivations kept for the backward pass (not compiled), MB; seconds of forward and backward")
    print(f"{'loops':>6}{'backprop depth':>16}{'kept':>10}{'s':>8}{'recomputing: kept':>20}{'s':>8}")
    for count, depth in ((8, 4), (8, 8), (24, 4), (24, 8)):
        stored, time_stored = kept(model, windows, count, depth, False, bf16)
        again, time_again = kept(model, windows, count, depth, True, bf16)
        print(f"{count:6}{depth:16}{stored / 1e6:10,.1f}{time_stored:8.2f}{again / 1e6:20,.1f}{time_again:8.2f}")


if __name__ == "__main__":
    main()
