"""What governs the cycle: untrained looped blocks over norm placement, input injection and number of layers.

The grid of "A Mechanistic Analysis of Looped Reasoning Language Models" (arXiv 2604.11791, [M]): random weights only,
so that what is found cannot be training's.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized
from statistics import fmean
from typing import Any, Literal, cast, get_args

import torch
from torch import nn

from haltkit.diagnostics.layers import are_distinct, distinctness
from haltkit.diagnostics.limits import TOLERANCE, Measure, classify_limits, limit_counts, norm_growth
from haltkit.diagnostics.numbers import rounded
from haltkit.diagnostics.results import Cell, Seed
from haltkit.models.gpt.model import LoopedGPT
from haltkit.recording.layers import record_layers

__all__ = ["INJECTIONS", "LAYERS", "NORMS", "Grid", "untrained_block"]

# pre: x + f(n(x)). branch: x + n(f(n(x))). residual: n(x + f(n(x))), Huginn's. branch+state: branch, and a norm on the
# state at the end of each step, as Ouro and the bundled model have it (here without a gain).
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


class Grid(Sized, Iterable[Cell]):
    """Every cell of the grid, run one at a time as they are asked for: what ``diagnose(..., grid=Grid())`` takes.

    Args:
        seeds: blocks per cell.
        loops: steps of each.
        sequences: of random tokens, for each.
    """

    def __init__(self, *, seeds: int = 3, loops: int = 128, sequences: int = 2) -> None:
        self.seeds, self.loops, self.sequences = seeds, loops, sequences

    def __len__(self) -> int:
        return len(NORMS) * len(INJECTIONS) * len(LAYERS)

    def __iter__(self) -> Iterator[Cell]:
        for norm, injection, layers in itertools.product(NORMS, INJECTIONS, LAYERS):
            found = [_one_seed(seed, norm, injection, layers, self.loops, self.sequences) for seed in range(self.seeds)]
            yield Cell(
                norm,
                injection,
                layers,
                _most(Counter(one.limit for one in found)),
                {
                    "cosine": _mean(_fixed_share(one.cosine) for one in found),
                    "distance": _mean(_fixed_share(one.distance) for one in found),
                },
                _mean(one.growth for one in found),
                _mean(one.least_cosine for one in found),
                _mean(one.distinct for one in found),
                tuple(found),
            )


@torch.no_grad()
def _one_seed(seed: int, norm: Norm, injection: Injection, layers: int, loops: int, sequences: int) -> Seed:
    """One block of random weights on random tokens, judged on the last layer's state.

    The limit is the type of most tokens by cosine, ``mixed`` on a tie. Fixed points of several layers are ``cyclic
    fixed points`` or a ``degenerate fixed point``; where the norm keeps growing there is no fixed point, only one in
    direction.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = untrained_block(norm, injection, layers)
        ids = torch.randint(0, model.vocab_size, (sequences, model.block_size))
    name, region = next(iter(model.regions.items()))
    paths = [f"layers.{name}.body.blocks.{i}" for i in range(layers)]
    with record_layers(model, paths) as kept:
        region.unroll(model.embed(ids), loops, model.noise)
    states = torch.stack(kept[paths[-1]])
    by = {measure: limit_counts(classify_limits(states, measure=measure)[0]) for measure in get_args(Measure)}
    growth = float(norm_growth(states).mean())
    half_way, end = ([kept[path][k - 1] for path in paths] for k in (loops // 2, loops))
    distinct = float(are_distinct(half_way, end).double().mean()) if layers > 1 else None
    limit = _most(Counter(by["cosine"]))
    if limit == "fixed point" and growth > 1 + TOLERANCE:
        limit = "fixed in direction, norm grows"
    elif limit == "fixed point" and distinct is not None:
        limit = "cyclic fixed points" if distinct > 0.5 else "degenerate fixed point"
    return Seed(
        limit,
        by["cosine"],
        by["distance"],
        rounded(growth),
        rounded(distinctness(end).mean(), 7) if layers > 1 else None,
        None if distinct is None else rounded(distinct),
    )


def _most(counts: Counter[str]) -> str:
    (first, many), *rest = counts.most_common()
    return "mixed" if rest and rest[0][1] == many else first


def _fixed_share(counts: Mapping[str, int]) -> float:
    return counts["fixed point"] / sum(counts.values())


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean; None if one of the values is not defined."""
    found = list(values)
    known = [value for value in found if value is not None]
    return rounded(fmean(known)) if len(known) == len(found) else None
