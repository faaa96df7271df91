"""A cache of varying depth and the pass that adds to it: tokens one by one, each looping until its policy halts it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from haltkit import signals
from haltkit.loop import Execution, Outcome
from haltkit.models.gpt.cache import DecodeRows, LayerCache, NewRows, parse_layout
from haltkit.models.gpt.chunk import ChunkRows
from haltkit.models.gpt.draws import EvaluationNoise
from haltkit.models.gpt.layers import Region
from haltkit.models.gpt.memory import CompactRegionLoop, run_once
from haltkit.models.gpt.passes import Budgets, CompactMemories, Network, fixed_pass, halting_pass
from haltkit.models.gpt.sampling import GenerationError
from haltkit.policies import Fixed
from haltkit.protocol import HaltingPolicy, granularity_of
from haltkit.specs import Policies, policy_for_regions
from haltkit.wrappers import MinSteps

__all__ = ["CacheMemories", "Decoded", "Decoder"]


def _least_steps(policy: HaltingPolicy[Any]) -> int:
    """Steps that a policy takes whatever it measures, as far as its own fields say."""
    least = policy.steps if isinstance(policy, (Fixed, MinSteps)) else 1
    inner = getattr(policy, "policy", None)
    return least if inner is None else max(least, _least_steps(inner))


@dataclass(frozen=True)
class Decoded:
    """The result of decoding one token per sequence: logits ``(B, V)``; steps and outcome by region, ``(B,)``."""

    logits: Tensor
    steps: dict[str, Tensor]
    outcome: dict[str, Tensor]

    def of(self, sequences: Sequence[int]) -> Decoded:
        """The same of these sequences alone."""
        index = list(sequences)
        parts = ({name: value[index] for name, value in part.items()} for part in (self.steps, self.outcome))
        return Decoded(self.logits[index], *parts)


class CacheMemories:
    """New rows, which read the others in the cache: the newest token of each sequence, or several of one.

    Args:
        caches: one for each layer, by the name it has in the network.
        rows: the new rows; ``guarded`` once something was not finite.
        looking: guard what is not finite; False computes and looks at nothing.
    """

    execution: Execution = "compact"

    def __init__(
        self,
        caches: Mapping[str, Sequence[LayerCache]],
        rows: NewRows,
        noise: EvaluationNoise,
        *,
        looking: bool,
    ) -> None:
        self.caches, self.rows, self.noise, self.looking = caches, rows, noise, looking

    def once(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        memory = self.rows.memory(self.caches[name][0])
        if self.looking:
            return run_once(layer, x, memory, self.rows)
        out: Tensor = layer(x, memory)
        return out

    def begin(self, name: str, region: Region, e: Tensor) -> tuple[CompactRegionLoop, Tensor]:
        rows = self.rows.all_present()
        memories = [rows.memory(cache) for cache in self.caches[name]]
        body = CompactRegionLoop(region, e, rows.positions, self.noise, rows, memories)
        return body, region.initial_state(e, body.noise_at)

    def end(self, name: str, body: CompactRegionLoop, steps: Tensor | None) -> None:
        self.rows.guarded |= body.rows.guarded


class Decoder:
    """A cache for ``B`` sequences and the way to add to it: a prompt first, then one token at a time.

    Args:
        policy: as in :meth:`~haltkit.models.gpt.model.LoopedGPT.forward_adaptive`; token by token only.
        layout: ``depth-indexed`` (exact), ``last`` or ``modulo:M``; see :mod:`haltkit.models.gpt.cache`.
        max_loops, total_loops: budgets of each region and of a token over all regions.
        capacity: longest sequence, at most the model's context (None: that).

    Raises:
        GenerationError: a policy that decides for more than a token, or takes more steps than ``max_loops``.
        ValueError: a bad spec, layout or budget.
    """

    def __init__(
        self,
        model: Network,
        policy: Policies,
        *,
        layout: str = "depth-indexed",
        max_loops: int | Mapping[str, int] = 32,
        total_loops: int | None = None,
        capacity: int | None = None,
    ) -> None:
        self.budgets = Budgets.of(model, max_loops, total_loops)
        self.model = model
        self.layout = parse_layout(layout).within(max(self.budgets.by_region.values(), default=1))
        self.policies = self.checked(policy)
        self.capacity = model.block_size if capacity is None else min(capacity, model.block_size)
        self.lengths: list[int] = []
        self.guarded = False  # something in the cache is not finite
        self._caches: dict[str, list[LayerCache]] = {}

    def checked(self, policy: Policies) -> dict[str, HaltingPolicy[Any]]:
        """The policy of each region, if tokens can loop under it here.

        Raises:
            GenerationError, ValueError: as for a new decoder.
        """
        policies = policy_for_regions(policy, list(self.model.regions))
        for region, one in policies.items():
            if (granularity := granularity_of(one)) != "token":
                raise GenerationError(
                    f"region {region}: a policy with granularity={granularity} cannot decode token by token, because "
                    "other tokens' loops are over: use granularity=token, or forward_adaptive on the whole text"
                )
            if (least := _least_steps(one)) > (most := self.budgets.by_region[region]):
                raise GenerationError(
                    f"region {region}: the policy takes at least {least} steps and max_loops is {most}: raise "
                    "max_loops, or ask for fewer steps"
                )
        return policies

    def under(self, policy: Policies) -> Decoder:
        """Another decoder on this one's cache, whose tokens loop under another policy: for drafts.

        What it adds is in the cache behind the positions of both; each overwrites what the other adds there.

        Raises:
            GenerationError, ValueError: as for a new decoder.
        """
        other = copy(self)
        other.policies, other.lengths = self.checked(policy), list(self.lengths)
        return other

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Decoded:
        """Take the prompts, ``(B, T)`` padded at the end to the longest of ``lengths``; compact, then cached.

        The logits, steps and outcomes are those of each prompt's last token.

        Raises:
            GenerationError: prompts longer than the context, or ``lengths`` that are not theirs.
        """
        batch, longest = tokens.shape
        self.lengths = [longest] * batch if lengths is None else list(lengths)
        if len(self.lengths) != batch or not all(1 <= n <= longest for n in self.lengths):
            raise GenerationError(f"lengths {self.lengths}: one for each of {batch} prompts, from 1 to {longest}")
        if longest > self.capacity:
            raise GenerationError(f"{longest} tokens do not fit the context of {self.capacity}")
        ends = torch.tensor(self.lengths, device=tokens.device)
        rows = None
        if min(self.lengths) < longest:
            rows = torch.arange(longest, device=tokens.device) < ends.unsqueeze(-1)
        self._caches, self.guarded = {}, False
        memories = CompactMemories(batch, longest, self.model.noise, keeper=self)
        seen = halting_pass(self.model, self.model.embed(tokens), self.policies, self.budgets, memories, rows=rows)
        last = (torch.arange(batch, device=tokens.device), ends - 1)
        return Decoded(
            self.model.readout(seen.x[last]),
            {name: taken[last] for name, taken in seen.steps.items()},
            {name: ended[last] for name, ended in seen.outcome.items()},
        )

    @torch.inference_mode()
    def admit(self, rows: Sequence[int], tokens: Tensor, lengths: Sequence[int] | None = None) -> Decoded:
        """Take new prompts in the place of the sequences ``rows``, which are dropped; the others stay as they are.

        Args:
            rows: which sequence each prompt replaces.
            tokens, lengths: as for :meth:`prefill`, of the new prompts alone; so is what is returned.

        Raises:
            GenerationError: as :meth:`prefill`, or rows that are not one sequence per prompt.
        """
        if not len(rows) == len(set(rows)) == len(tokens) or not all(0 <= row < len(self.lengths) for row in rows):
            raise GenerationError(
                f"rows {list(rows)}: one of the {len(self.lengths)} sequences for each of {len(tokens)} prompts"
            )
        new = copy(self)
        new.capacity = min(self.capacity, tokens.shape[1])
        seen = new.prefill(tokens, lengths)
        for name, caches in self._caches.items():
            for cache, other in zip(caches, new._caches[name], strict=True):
                cache.place(rows, other)
        for row, length in zip(rows, new.lengths, strict=True):
            self.lengths[row] = length
        if self.guarded:  # what was not finite may have left
            kept = (cache.kv for caches in self._caches.values() for cache in caches)
            self.guarded = not all(bool(signals.finite(kv).all()) for kv in kept)
        self.guarded |= new.guarded
        return seen

    def keep(self, name: str, blocks: Sequence[Sequence[Tensor]], steps: Tensor | None, guarded: bool) -> None:
        """Cache what the prompts' layer ``name`` computed, as the layout says; see ``Keeper`` in ``passes``."""
        layout = self.layout if steps is not None else parse_layout("last")
        self._caches[name] = []
        for after in blocks:
            batch = len(self.lengths)
            cache = LayerCache(layout, batch, self.capacity, after[0].shape[-1], after[0])
            cache.fill(after, steps, len(after[0]) // batch)
            self._caches[name].append(cache)
        self.guarded |= guarded

    @torch.inference_mode()
    def step(self, tokens: Tensor, active: Tensor | None = None) -> Decoded:
        """Add one token to each sequence, ``(B,)``. Sequences not ``active``, ``(B,)`` bool, do not loop or grow.

        Raises:
            GenerationError: a sequence is at the end of its context, or there is no prompt yet.
        """
        growing = [True] * len(self.lengths) if active is None else active.tolist()
        x, memories = self._next(tokens, growing, looking=True)
        seen = halting_pass(self.model, x, self.policies, self.budgets, memories, rows=active)
        self.guarded = memories.rows.guarded
        self.lengths = [n + grows for n, grows in zip(self.lengths, growing, strict=True)]
        return Decoded(self.model.readout(seen.x), seen.steps, seen.outcome)

    @torch.inference_mode()
    def extend(self, tokens: Tensor) -> Decoded:
        """Add several tokens ``(n,)`` to the only sequence in one pass: logits ``(n, V)``, steps and outcome ``(n,)``.

        The same as :meth:`step` for one after the other, up to rounding.

        Raises:
            GenerationError: another number of sequences than one, or tokens that the context has no room for.
        """
        if len(self.lengths) != 1:
            raise GenerationError(f"extend adds to one sequence, and the cache has {len(self.lengths)}")
        [start] = self.lengths
        if start + len(tokens) > self.capacity:
            raise GenerationError(f"{start} + {len(tokens)} tokens do not fit the context of {self.capacity}")
        rows = ChunkRows(start, len(tokens), tokens.device, guarded=self.guarded)
        x = self.model.embed(tokens.unsqueeze(0), rows.positions.unsqueeze(0))[0]
        at_depths = self._extended_at_depths(x, rows)
        if at_depths is not None:
            self.lengths = [rows.end]
            return at_depths
        memories = CacheMemories(self._caches, rows, self.model.noise, looking=True)
        seen = halting_pass(self.model, x, self.policies, self.budgets, memories)
        self.guarded = rows.guarded
        self.lengths = [rows.end]
        return Decoded(self.model.readout(seen.x), seen.steps, seen.outcome)

    def _extended_at_depths(self, x: Tensor, rows: ChunkRows) -> Decoded | None:
        """What :meth:`extend` gives where every policy is a fixed depth, without asking them: one look at the end.

        Returns:
            None, and what was cached is to be overwritten, if there is another policy, a budget that could end before
            it, a layout that does not keep all that is to be looked at, or something that is not finite.
        """
        depths = {name: one.steps for name, one in self.policies.items() if isinstance(one, Fixed)}
        known = len(depths) == len(self.policies) and self.budgets.total is None and self.layout.slots is None
        if not known or rows.guarded:
            return None
        memories = CacheMemories(self._caches, rows, self.model.noise, looking=False)
        logits = self.model.readout(fixed_pass(self.model.layers, x, depths, self.model.noise, memories=memories))
        start, total = rows.end - len(x), logits.sum()
        for cache in (cache for caches in self._caches.values() for cache in caches):
            total = total + cache.kv[: cache.filled, 0, start : rows.end].sum()
        if not math.isfinite(float(total)):
            return None
        steps = {name: torch.full((len(x),), k, device=x.device) for name, k in depths.items()}
        ended = torch.full((len(x),), Outcome.CONVERGED, dtype=torch.int8, device=x.device)
        return Decoded(logits, steps, dict.fromkeys(depths, ended))

    @torch.inference_mode()
    def step_fixed(self, tokens: Tensor, loops: Mapping[str, int]) -> Tensor:
        """Add one token to each sequence at fixed loop counts, no policy, nothing looked at; logits ``(B, V)``.

        What halting is to be measured against: the same cache, and the bare loop.

        Raises:
            GenerationError: as :meth:`step`.
        """
        x, memories = self._next(tokens, [True] * len(self.lengths), looking=False)
        x = fixed_pass(self.model.layers, x, loops, self.model.noise, memories=memories)
        self.lengths = [n + 1 for n in self.lengths]
        return self.model.readout(x)

    def _next(self, tokens: Tensor, growing: Sequence[bool], *, looking: bool) -> tuple[Tensor, CacheMemories]:
        """The newest tokens embedded, ``(B, D)``, and what their pass reads and writes."""
        if not self.lengths:
            raise GenerationError("the cache is empty: give it a prompt with prefill first")
        if any(grows and n >= self.capacity for grows, n in zip(growing, self.lengths, strict=True)):
            raise GenerationError(f"the context of {self.capacity} tokens is full")
        places = [min(n, self.capacity - 1) for n in self.lengths]
        positions = torch.tensor(places, device=tokens.device)
        rows = DecodeRows(places, positions, guarded=self.guarded)
        x = self.model.embed(tokens.unsqueeze(-1), positions.unsqueeze(-1)).squeeze(1)
        return x, CacheMemories(self._caches, rows, self.model.noise, looking=looking)

    def rewind(self, count: int | Sequence[int]) -> None:
        """Drop the newest positions of each sequence, as if they had never been added; the next step overwrites them.

        For text that was tried and is not kept, as in speculative decoding. A region's cache keeps the depth that it
        has grown to, and a cache that was guarded stays so.

        Args:
            count: how many positions: one number for all sequences, or one for each.

        Raises:
            GenerationError: a negative number, more positions than a sequence has, or not one number per sequence.
        """
        counts = [count] * len(self.lengths) if isinstance(count, int) else list(count)
        if len(counts) != len(self.lengths):
            raise GenerationError(f"rewind has {len(counts)} counts; the cache has {len(self.lengths)} sequences")
        for b, (dropped, length) in enumerate(zip(counts, self.lengths, strict=True)):
            if not 0 <= dropped <= length:
                raise GenerationError(f"rewind by {dropped}: sequence {b + 1} has {length} positions, so 0 to {length}")
        self.lengths = [n - dropped for n, dropped in zip(self.lengths, counts, strict=True)]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def caches(self) -> Mapping[str, Sequence[LayerCache]]:
        """The caches of each layer's blocks, by the layer's name; empty before the prompt."""
        return self._caches

    def nbytes(self) -> int:
        """Bytes of the cache that are in use."""
        return sum(cache.nbytes(self.lengths) for caches in self._caches.values() for cache in caches)
