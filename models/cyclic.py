"""What governs the cycle: untrained looped blocks over norm placement, input injection and number of layers.

The grid of "A Mechanistic Analysis of Looped Reasoning Language Models" (arXiv 2604.11791, [M]): random weights only,
so that what is found cannot be training's.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from haltkit.diagnostics.layers import are_distinct, distinctness, record_layers
from haltkit.diagnostics.limits import classify_limits, limit_counts
from haltkit.models.gpt import LoopedGPT

__all__ = ["INJECTIONS", "LAYERS", "NORMS", "cyclic_grid", "untrained_block"]

# pre: x + f(n(x)). branch: x + n(f(n(x))), Ouro's. residual: n(x + f(n(x))), Huginn's. branch+state: branch, and a
# norm without gain on the state at the end of each recurrence, as the bundled model has it.
Norm = Literal["pre", "branch", "residual", "branch+state"]
Injection = Literal["every_step", "first_step", "never"]
NORMS = get_args(Norm)
INJECTIONS = get_args(Injection)
LAYERS = (1, 2, 4)


def untrained_block(norm: Norm, injection: Injection, layers: int, *, width: int = 64, tokens: int = 24) -> LoopedGPT:
    """A model that is one looped block of random weights (from torch's global generator).

    Without injection the loop starts at its input, which it would not see otherwise. The scale of the branches is that
    of training, set by the number of layers and the default loop count.
    """
    model = LoopedGPT(
        vocab_size=256,
        block_size=tokens,
        n_layer=layers,
        n_head=4,
        d_model=width,
        regions=(f"1-{layers}" if layers > 1 else "1",),
        norm_placement="residual" if norm == "residual" else "branch",
        state_norm=norm == "branch+state",
        exit_norm=False,
        injection=injection,
        injection_init="identity",
        initial_state="input" if injection == "never" else "noise",
    )
    if norm == "pre":
        scale = 1 / math.sqrt(2 * model.effective_depth)
        for region in model.regions.values():
            for block in region.body.blocks:
                block.n2, block.n4 = nn.Identity(), nn.Identity()
                for part in (block.attn, block.mlp):  # without a norm after them, their scale is in the projections
                    cast(Any, part).proj.weight.data.mul_(scale)
    return model.eval()


@torch.no_grad()
def cyclic_grid(
    *, seeds: int = 3, loops: int = 128, sequences: int = 2, tick: Callable[[], None] | None = None
) -> list[dict[str, Any]]:
    """The limit type found for each cell, judged by cosine on the last layer's state over all tokens and seeds.

    Returns:
        a cell each: ``norm``, ``injection``, ``layers``, ``counts`` of tokens by limit type, ``fixed`` (share at a
        fixed point), ``least_cosine`` (mean, between the layers' states after the last recurrence) and ``distinct``
        (share of tokens with distinct fixed points; both None for one layer) and ``limit``: the type of most tokens,
        fixed points of several layers being ``cyclic fixed points`` or a ``degenerate fixed point``.
    """
    cells = []
    for norm, injection, layers in itertools.product(NORMS, INJECTIONS, LAYERS):
        counts: Counter[str] = Counter()
        cosines: list[Tensor] = []
        distinct: list[Tensor] = []
        for seed in range(seeds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = untrained_block(norm, injection, layers)
                ids = torch.randint(0, model.vocab_size, (sequences, model.block_size))
            name, region = next(iter(model.regions.items()))
            paths = [f"layers.{name}.body.blocks.{i}" for i in range(layers)]
            with record_layers(model, paths) as kept:
                region.unroll(model.embed(ids), loops, model.noise)
            counts.update(limit_counts(classify_limits(torch.stack(kept[paths[-1]]))[0]))
            if layers > 1:
                ends = [kept[path][-1] for path in paths]
                cosines.append(distinctness(ends).flatten())
                distinct.append(are_distinct([kept[path][loops // 2 - 1] for path in paths], ends).flatten())
            if tick is not None:
                tick()
        share = float(torch.cat(distinct).double().mean()) if distinct else None
        most = counts.most_common(1)[0][0]
        if most == "fixed point" and share is not None:
            most = "cyclic fixed points" if share > 0.5 else "degenerate fixed point"
        cells.append(
            {
                "norm": norm,
                "injection": injection,
                "layers": layers,
                "counts": dict(counts),
                "fixed": round(counts["fixed point"] / sum(counts.values()), 4),
                "least_cosine": round(float(torch.cat(cosines).mean()), 7) if cosines else None,
                "distinct": None if share is None else round(share, 4),
                "limit": most,
            }
        )
    return cells
