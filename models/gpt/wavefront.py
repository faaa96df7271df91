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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from haltkit import signals
from haltkit.models.gpt.decoding import Decoder
from haltkit.models.gpt.layers import Region
from haltkit.models.gpt.open_rows import OpenMemory, OpenRows
from haltkit.models.gpt.passes import Budgets
from haltkit.models.gpt.sampling import GenerationError, Sampling
from haltkit.protocol import LoopStep, judge, map_state
from haltkit.specs import Policies

__all__ = ["Committed", "Wavefront", "check_budget", "check_wavefront"]


@dataclass(frozen=True)
class Committed:
    """One token that is final.

    Attributes:
        token: its id; None if the logits of its position are not finite, and then the text ends.
        steps: how many steps the position that it was read from took in each region.
    """

    token: int | None
    steps: dict[str, int]


@dataclass
class _Open:
    """The open positions ``first .. first + len(tokens) - 1``: the input and the state of each.

    Attributes:
        tokens: input of each; k: steps that each has taken.
        stale: the first row whose embedding is not that of its token; ``len(tokens)``: none.
        before: what the first region is fed, ``(rows that are not stale, D)``.
        x: state of each by region, ``(n, D)``, or one fewer before the newest row's first step.
        judged: the policy's state by region, of the same rows.
    """

    first: int
    tokens: list[int] = field(default_factory=list)
    k: list[int] = field(default_factory=list)
    stale: int = 0
    before: Tensor | None = None
    x: dict[str, Tensor] = field(default_factory=dict)
    judged: dict[str, Any] = field(default_factory=dict)

    def keep(self, rows: slice) -> None:
        """Only these rows stay open."""
        self.first += rows.start or 0
        self.tokens, self.k = self.tokens[rows], self.k[rows]
        self.stale = max(0, min(len(self.tokens), self.stale - (rows.start or 0)))
        self.before = None if self.before is None else self.before[rows]
        self.x = {name: x[rows] for name, x in self.x.items()}
        self.judged = {name: map_state(lambda part: part[rows], state) for name, state in self.judged.items()}


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


class Wavefront:
    """Continues one text whose prompt a :class:`~haltkit.models.gpt.decoding.Decoder` has taken.

    Args:
        decoder: of one sequence; its caches are written to, and it cannot step afterwards.
        commit: what settles a token; token by token only.
        width: greatest number of open positions; never more than the context has room for.
        inner: steps per sweep in each region.

    Attributes:
        sweeps: how many there have been.
        layer_calls: blocks called one after the other, whatever their number of rows.
        rows: positions computed, summed over the sweeps.

    Raises:
        GenerationError: see :func:`check_wavefront` and :class:`~haltkit.models.gpt.decoding.Decoder`; ``max_loops``
            below ``inner``, a budget over all regions, or a prompt whose states are not finite.
    """

    def __init__(self, decoder: Decoder, commit: Policies, *, width: int = 8, inner: int = 1) -> None:
        model = decoder.model
        check_wavefront(model.regions, width, inner, decoder.layout.name)
        self.budget = check_budget(decoder.budgets, inner)
        if decoder.guarded:
            raise GenerationError("the prompt's states are not finite: a wavefront cannot continue it")
        self.decoder, self.model, self.commit = decoder, model, decoder.checked(commit)
        [taken] = decoder.lengths
        self.width, self.inner = max(1, min(width, decoder.capacity - taken)), inner
        parameter = next(model.parameters())
        self.device = parameter.device
        bias = torch.full((decoder.capacity, decoder.capacity), -math.inf, dtype=parameter.dtype, device=self.device)
        self.at = OpenRows(bias.triu_(1), self.width)
        self.memories = {
            name: [OpenMemory(cache, self.at, loops=name in model.regions) for cache in caches]
            for name, caches in decoder.caches.items()
        }
        names = list(model.layers)
        entry = next((i for i, name in enumerate(names) if name in model.regions), 0)
        self.leading, self.following = names[:entry], names[entry:]
        self.sweeps = self.layer_calls = self.rows = 0
        self._active = torch.ones(self.width, dtype=torch.bool, device=self.device)
        self._positions = torch.arange(decoder.capacity, device=self.device)

    @torch.inference_mode()
    def tokens(
        self, first: int, count: int, *, sampling: Sampling, stop: frozenset[int] = frozenset()
    ) -> Iterator[Committed]:
        """The tokens that follow ``first``, each as soon as it is final: ``count`` of them, or up to a stop token.

        Args:
            first: the prompt's next token, which is final.
            sampling: of this sequence.
        """
        [start] = self.decoder.lengths
        open_ = _Open(start, [first], [0])
        while count:
            found, open_ = self._sweep(open_, sampling)
            settled, drafts, finite = found
            done = 0
            for row, draft in enumerate(drafts):
                last_step = open_.k[row] + self.inner > self.budget
                if not finite[row]:
                    yield Committed(None, self._steps(open_.k[row]))
                    return
                if not (settled[row] or last_step):
                    break
                self._commit(open_.first + row, open_.k[row])
                done += 1
                count -= 1
                yield Committed(draft, self._steps(open_.k[row]))
                if draft in stop or not count:
                    return
                if row + 1 < len(drafts) and open_.tokens[row + 1] != draft:
                    break  # the next position was given another token
            self._redraft(open_, drafts, done)
            if len(open_.tokens) < self.width and len(open_.tokens) < count and drafts[-1] not in stop:
                open_.tokens.append(drafts[-1])
                open_.k.append(0)

    def _steps(self, k: int) -> dict[str, int]:
        return dict.fromkeys(self.model.regions, k)

    def _commit(self, position: int, steps: int) -> None:
        for memories in self.memories.values():
            for memory in memories:
                memory.commit(position, steps)

    def _redraft(self, open_: _Open, drafts: Sequence[int], done: int) -> None:
        """Give each row the draft of the row before it, and close the first ``done`` rows."""
        for row, draft in enumerate(drafts[:-1], 1):
            if open_.tokens[row] != draft:
                open_.tokens[row] = draft
                open_.stale = min(open_.stale, row)
        open_.keep(slice(done, None))

    def _sweep(self, given: _Open, sampling: Sampling) -> tuple[tuple[list[int], list[int], list[int]], _Open]:
        """One sweep over all open rows: which are settled, their drafts, which are finite; and the rows after it.

        A row that is not finite would reach earlier ones through a masked product. The sweep is then repeated with the
        oldest row alone; the others are opened again later.
        """
        after = _Open(given.first, list(given.tokens), [k + self.inner for k in given.k], len(given.tokens))
        found = self._try(given, after, sampling)
        if not all(found[2]) and len(given.tokens) > 1:
            given.keep(slice(0, 1))
            after = _Open(given.first, list(given.tokens), [k + self.inner for k in given.k], 1)
            found = self._try(given, after, sampling)
        return found, after

    def _try(self, given: _Open, after: _Open, sampling: Sampling) -> tuple[list[int], list[int], list[int]]:
        first, n = given.first, len(given.tokens)
        self.sweeps += 1
        self.rows += n
        e = self._lead(given)
        after.before = e
        h, settled = e, self._active[:n]
        for name in self.following:
            layer = self.model.layers[name]
            if isinstance(layer, Region):
                h, halt = self._loop(name, layer, h, given, after)
                settled = settled & halt
            else:
                self.at.at(first)
                h = self._call(name, h)
        logits = self.model.readout(h)
        drafts = sampling.pick(logits, range(first + 1, first + n + 1))
        looked = torch.stack([settled.to(drafts.dtype), drafts, signals.finite(logits).to(drafts.dtype)])
        return cast(tuple[list[int], list[int], list[int]], tuple(looked.tolist()))  # the only look at the device

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
            state, halt = self._judge(name, state, known, k, x, before)
            known = n
        after.x[name], after.judged[name] = x, state
        return region.exit(x), halt

    def _judge(
        self, name: str, state: Any, known: int, k: Sequence[int], x: Tensor, before: Tensor
    ) -> tuple[Any, Tensor]:
        """The policy's new state and which rows it halts. Rows from ``known`` on are judged apart: they begin here."""
        policy, answers = self.commit[name], []
        for start, stop in ((0, known), (known, len(k))):
            if start == stop:
                continue
            own = k[start:stop]
            step_k = own[0] if len(set(own)) == 1 else torch.tensor(own, device=self.device)
            now, then = x[start:stop], before[start:stop]
            step = LoopStep(step_k, now, then, self._active[start:stop], self.model.readout, region=name)
            answers.append(judge(policy, policy.init(then) if start == known else state, step))
        [(state, verdict), *rest] = answers
        if not rest:
            return state, verdict.halt
        [(new, verdict_new)] = rest
        return _joined(state, new), torch.cat([verdict.halt, verdict_new.halt])


def _joined(state: Any, new: Any) -> Any:
    """A policy's state with the rows of another one after its own."""
    if isinstance(state, Tensor):
        return torch.cat([state, new])
    if isinstance(state, tuple):
        parts = [_joined(a, b) for a, b in zip(state, new, strict=True)]
        return cast(Any, type(state))(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state
