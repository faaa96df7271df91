"""Wavefront generation: several positions of one text loop at the same time; the oldest settled ones are committed.

The parallel sampler of arXiv 2510.14961, with a halting policy in the place of its threshold. A *sweep* gives every
open position one step (or ``inner`` steps) in each region, in order, and reads a draft token from each. Where a draft
has changed, the next position is embedded anew and keeps its states. Then the oldest positions are committed as long as
the policy calls them settled in every region and their own token is final, and one more position is opened.

A committed position's keys and values are final. A position at its own step ``k`` reads those that committed position
``j`` computed during its step ``min(k, K_j)``, where ``K_j`` is the step that ``j`` was committed at; and the newest of
open positions. So with one region and a width of 1 this is the sequential decoder under the same policy. With more it
is another function: a region is fed the unsettled state of the region before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from haltkit.front import Front, Open
from haltkit.models.gpt.decoding import Decoder
from haltkit.models.gpt.layers import Region
from haltkit.models.gpt.open_rows import OpenMemory, OpenRows
from haltkit.models.gpt.passes import Budgets
from haltkit.models.gpt.sampling import GenerationError
from haltkit.specs import Policies

__all__ = ["Wavefront", "check_budget", "check_wavefront"]


@dataclass
class _Open(Open):
    """Open positions of the text model.

    Attributes:
        before: what the first region is fed, ``(rows that are not stale, D)``.
    """

    before: Tensor | None = None

    def keep(self, rows: slice) -> None:
        super().keep(rows)
        self.before = None if self.before is None else self.before[rows]


def check_wavefront(regions: Mapping[str, Region], width: int, inner: int, layout: str) -> None:
    """Refuse what cannot be a wavefront.

    Raises:
        GenerationError: a width or ``inner`` below 1, a layout or a region that does not go with it.
    """
    if width < 1:
        raise GenerationError(f"width={width}: a wavefront has at least 1 open position")
    if inner < 1:
        raise GenerationError(f"inner={inner}: a sweep gives each open position at least 1 step")
    if layout not in ("depth-indexed", "last"):
        raise GenerationError(
            f"layout={layout} does not go with sampler=wavefront, whose positions are at different steps: use "
            "layout=depth-indexed or layout=last"
        )
    if width == 1 and len(regions) == 1:
        return
    for name, region in regions.items():
        if region.injection != "every_step":
            raise GenerationError(
                f"region {name} has injection={region.injection}: an input that changes during its loop would not "
                "reach it. A wavefront needs injection=every_step, or width=1 and one region"
            )
        if region.noise_every_step:
            raise GenerationError(
                f"region {name} has noise=every_step: a wavefront's rows are at different steps. Use sampler=sequential"
            )


def check_budget(budgets: Budgets, inner: int) -> int:
    """How many steps an open position may take: the least of the regions' budgets, as it steps in all of them alike.

    Raises:
        GenerationError: fewer than a sweep takes, or a budget over all regions.
    """
    if budgets.total is not None:
        raise GenerationError(
            "total_loops does not go with sampler=wavefront, which steps all regions alike: use max_loops"
        )
    least = min(budgets.by_region.values(), default=inner)
    if least < inner:
        raise GenerationError(f"max_loops={least} is below inner={inner}: a sweep takes inner steps")
    return least


class Wavefront(Front[_Open]):
    """Continues one text whose prompt a :class:`~haltkit.models.gpt.decoding.Decoder` has taken.

    Args:
        decoder: of one sequence; its caches are written to, and it cannot step afterwards.
        commit: what settles a token; token by token only.
        width: greatest number of open positions; never more than the context has room for.
        inner: steps per sweep in each region.

    Attributes:
        layer_calls: blocks called one after the other, whatever their number of rows.

    Raises:
        GenerationError: see :func:`check_wavefront` and :class:`~haltkit.models.gpt.decoding.Decoder`; ``max_loops``
            below ``inner``, a budget over all regions, or a prompt whose states are not finite.
    """

    def __init__(self, decoder: Decoder, commit: Policies, *, width: int = 8, inner: int = 1) -> None:
        model = decoder.model
        check_wavefront(model.regions, width, inner, decoder.layout.name)
        budget = check_budget(decoder.budgets, inner)
        if decoder.guarded:
            raise GenerationError("the prompt's states are not finite: a wavefront cannot continue it")
        self.decoder, self.model = decoder, model
        [taken] = decoder.lengths
        super().__init__(
            decoder.checked(commit),
            width=max(1, min(width, decoder.capacity - taken)),
            inner=inner,
            budget=budget,
            device=decoder.device,
        )
        dtype = next(model.parameters()).dtype
        bias = torch.full((decoder.capacity, decoder.capacity), -math.inf, dtype=dtype, device=self.device)
        self.at = OpenRows(bias.triu_(1), self.width)
        self.memories = {
            name: [OpenMemory(cache, self.at, loops=name in model.regions) for cache in caches]
            for name, caches in decoder.caches.items()
        }
        names = list(model.layers)
        entry = next((i for i, name in enumerate(names) if name in model.regions), 0)
        self.leading, self.following = names[:entry], names[entry:]
        self.layer_calls = 0
        self._positions = torch.arange(decoder.capacity, device=self.device)

    def _opened(self, token: int) -> _Open:
        [start] = self.decoder.lengths
        return _Open(start, [token], [0])

    def _commit(self, open_: _Open, row: int) -> None:
        for memories in self.memories.values():
            for memory in memories:
                memory.commit(open_.first + row, open_.k[row])

    def _advance(self, given: _Open, after: _Open) -> tuple[Tensor, Tensor]:
        e = self._lead(given)
        after.before = e
        h, settled = e, self._active[: len(e)]
        for name in self.following:
            layer = self.model.layers[name]
            if isinstance(layer, Region):
                h, halt = self._loop(name, layer, h, given, after)
                settled = settled & halt
            else:
                self.at.at(given.first)
                h = self._call(name, h)
        return self.model.readout(h), settled

    def _lead(self, given: _Open) -> Tensor:
        """What the first region is fed, ``(n, D)``: computed from the first row on whose token has changed."""
        n, stale, kept = len(given.tokens), given.stale, given.before
        if kept is not None and stale >= n:
            return kept
        if kept is None:
            stale = 0
        places = self._positions[given.first + stale : given.first + n]
        tokens = torch.tensor(given.tokens[stale:], device=self.device)
        e = self.model.embed(tokens.unsqueeze(0), places.unsqueeze(0))[0]
        self.at.at(given.first + stale)
        for name in self.leading:
            e = self._call(name, e)
        return e if kept is None or not stale else torch.cat([kept[:stale], e])

    def _call(self, name: str, x: Tensor) -> Tensor:
        self.layer_calls += 1
        out: Tensor = self.model.layers[name](x, self.memories[name][0])
        return out

    def _loop(self, name: str, region: Region, e: Tensor, given: _Open, after: _Open) -> tuple[Tensor, Tensor]:
        """``inner`` steps of a region for all rows: what it hands on, ``(n, D)``, and which rows halt, ``(n,)``."""
        n = len(e)
        places = self._positions[given.first : given.first + n]

        def noise(region: str, step: int, like: Tensor) -> Tensor:
            return self.model.noise.at(region, step, places[n - len(like) :], like)

        x, state = given.x.get(name), given.judged.get(name)
        known = 0 if x is None else len(x)
        if x is None or known < n:
            new = region.initial_state(e[known:], noise)
            x = new if x is None else torch.cat([x, new])
        halt = self._active[:n]
        for inner in range(1, self.inner + 1):
            k = [taken + inner for taken in given.k]
            self.at.at(given.first, k)
            self.layer_calls += len(region.body.blocks)
            before, x = x, region.step(x, e, k[0], noise, self.memories[name])
            state, halt = self._judge(name, state, known, k, x, before, lambda _: self.model.readout)
            known = n
        after.x[name], after.judged[name] = x, state
        return region.exit(x), halt
