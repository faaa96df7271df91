"""Text token by token, each region looping until its policy halts it, with a cache of varying depth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from haltkit import signals
from haltkit.loop import run_loop
from haltkit.models.cache import CacheMemory, DecodeRows, LayerCache, parse_layout
from haltkit.models.execution import Policies, check_budget, run_policies, share_budget
from haltkit.models.gpt import LoopedGPT, Region
from haltkit.models.memory import CompactRegionLoop
from haltkit.policies import Fixed
from haltkit.protocol import HaltingPolicy, granularity_of
from haltkit.registry import policy_for_regions
from haltkit.wrappers import MinSteps

__all__ = ["Decoded", "Decoder", "Emission", "Generation", "GenerationError", "Sampling", "generate", "stream"]

Reason = Literal["stop", "length", "context", "nonfinite"]


class GenerationError(ValueError):
    """Prompts, policies or settings that text cannot be generated from."""


def _least_steps(policy: HaltingPolicy[Any]) -> int:
    """Steps that a policy takes whatever it measures, as far as its own fields say."""
    least = policy.steps if isinstance(policy, (Fixed, MinSteps)) else 1
    inner = getattr(policy, "policy", None)
    return least if inner is None else max(least, _least_steps(inner))


@dataclass(frozen=True)
class Decoded:
    """What decoding one token a sequence came to: logits ``(B, V)``; steps and outcome by region, ``(B,)``."""

    logits: Tensor
    steps: dict[str, Tensor]
    outcome: dict[str, Tensor]


class Decoder:
    """A cache for ``B`` sequences and the way to add to it: a prompt first, then a token at a time.

    Args:
        policy: as in :meth:`~haltkit.models.gpt.LoopedGPT.forward_adaptive`; token by token only.
        layout: ``depth-indexed`` (exact), ``last`` or ``modulo:M``; see :mod:`haltkit.models.cache`.
        max_loops, total_loops: budgets of each region and of a token over all regions.
        capacity: longest sequence, at most the model's context (None: that).

    Raises:
        GenerationError: a policy that decides for more than a token, or takes more steps than ``max_loops``.
        ValueError: a bad spec, layout or budget.
    """

    def __init__(
        self,
        model: LoopedGPT,
        policy: Policies,
        *,
        layout: str = "depth-indexed",
        max_loops: int | Mapping[str, int] = 32,
        total_loops: int | None = None,
        capacity: int | None = None,
    ) -> None:
        self.max_loops = check_budget(model, max_loops, total_loops)  # by region
        self.model, self.layout = model, parse_layout(layout)
        self.policies = policy_for_regions(policy, list(model.regions))
        for region, one in self.policies.items():
            if (granularity := granularity_of(one)) != "token":
                raise GenerationError(
                    f"region {region}: a policy with granularity={granularity} cannot decode token by token, because "
                    "other tokens' loops are over: use granularity=token, or forward_adaptive on the whole text"
                )
            if (least := _least_steps(one)) > self.max_loops[region]:
                raise GenerationError(
                    f"region {region}: the policy takes at least {least} steps and max_loops is "
                    f"{self.max_loops[region]}: raise max_loops, or ask for fewer steps"
                )
        self.total_loops = total_loops
        self.capacity = model.block_size if capacity is None else min(capacity, model.block_size)
        self.lengths: list[int] = []
        self.careful = False
        self._caches: dict[str, list[LayerCache]] = {}

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
        self._caches, self.careful = {}, False
        x, steps, outcome = run_policies(
            self.model, tokens, self.policies, max_loops=self.max_loops, total_loops=self.total_loops, rows=rows,
            execution="compact", keeper=self,
        )  # fmt: skip
        last = (torch.arange(batch, device=x.device), ends - 1)
        return Decoded(
            self.model.readout(x[last]),
            {name: taken[last] for name, taken in steps.items()},
            {name: ended[last] for name, ended in outcome.items()},
        )

    def keep(self, name: str, blocks: Sequence[Sequence[Tensor]], steps: Tensor | None, careful: bool) -> None:
        """Cache what the prompts' layer ``name`` computed, as the layout says: see :class:`Keeper`."""
        layout = self.layout if steps is not None else parse_layout("last")
        self._caches[name] = []
        for after in blocks:
            batch = len(self.lengths)
            cache = LayerCache(layout, batch, self.capacity, after[0].shape[-1], after[0])
            cache.fill(after, steps, len(after[0]) // batch)
            self._caches[name].append(cache)
        self.careful |= careful

    @torch.inference_mode()
    def step(self, tokens: Tensor, active: Tensor | None = None) -> Decoded:
        """Add one token a sequence, ``(B,)``. Sequences that are not ``active``, ``(B,)`` bool, do not loop or grow.

        Raises:
            GenerationError: a sequence is at the end of its context, or there is no prompt yet.
        """
        if not self.lengths:
            raise GenerationError("the cache is empty: give it a prompt with prefill first")
        running = [True] * len(self.lengths) if active is None else active.tolist()
        if any(going and n >= self.capacity for going, n in zip(running, self.lengths, strict=True)):
            raise GenerationError(f"the context of {self.capacity} tokens is full")
        model = self.model
        places = [min(n, self.capacity - 1) for n in self.lengths]
        positions = torch.tensor(places, device=tokens.device)
        rows = DecodeRows(places, positions, careful=self.careful)
        x = model.embed(tokens.unsqueeze(-1), positions.unsqueeze(-1)).squeeze(1)  # (B, D)
        steps: dict[str, Tensor] = {}
        outcome: dict[str, Tensor] = {}
        spent: Tensor | None = None
        later = len(model.regions)
        for name, layer in model.layers.items():
            caches = self._caches[name]
            if not isinstance(layer, Region):
                memory = CacheMemory(caches[0], rows)
                out = layer(x, memory)
                if not rows.careful and memory.doubt is not None and not math.isfinite(float(memory.doubt)):
                    rows.careful = True
                    out = layer(x, memory)
                x = out
                continue
            later -= 1
            budget = share_budget(self.total_loops, spent, later, self.max_loops[name])
            at_hand = rows.all_at_hand()
            memories = [CacheMemory(cache, at_hand) for cache in caches]
            result = run_loop(
                CompactRegionLoop(layer, x, positions, model.noise, at_hand, memories),
                layer.initial_state(x, lambda region, k, like: model.noise.at(region, k, positions, like)),
                self.policies[name],
                max_steps=self.max_loops[name],
                readout=model.readout,
                rows=active,
                name=name,
                budget=None if budget is None else budget.to(x.device).expand(positions.shape),
                execution="compact",
            )
            rows.careful |= at_hand.careful
            x, steps[name], outcome[name] = layer.leave(result.x), result.steps, result.outcome
            spent = steps[name] if spent is None else spent + steps[name]
        self.careful = rows.careful
        self.lengths = [n + going for n, going in zip(self.lengths, running, strict=True)]
        return Decoded(model.readout(x), steps, outcome)

    @torch.inference_mode()
    def step_fixed(self, tokens: Tensor, loops: Mapping[str, int]) -> Tensor:
        """Add one token a sequence at fixed loop counts, with no policy and nothing looked at; logits ``(B, V)``.

        What halting is to be measured against: the same cache, and the bare loop.
        """
        if max(self.lengths) >= self.capacity:
            raise GenerationError(f"the context of {self.capacity} tokens is full")
        model = self.model
        positions = torch.tensor(self.lengths, device=tokens.device)
        rows = DecodeRows(self.lengths, positions, careful=self.careful)
        x = model.embed(tokens.unsqueeze(-1), positions.unsqueeze(-1)).squeeze(1)  # (B, D)

        def noise(region: str, k: int, like: Tensor) -> Tensor:
            return model.noise.at(region, k, positions, like)

        for name, layer in model.layers.items():
            memories = [CacheMemory(cache, rows) for cache in self._caches[name]]
            if not isinstance(layer, Region):
                rows.k = 1
                x = layer(x, memories[0])
                continue
            h = layer.initial_state(x, noise)
            for rows.k in range(1, loops[name] + 1):
                h = layer.step(h, x, rows.k, noise, memories)
            x = layer.leave(h)
        self.lengths = [n + 1 for n in self.lengths]
        return model.readout(x)

    def nbytes(self) -> int:
        """Bytes of the cache that hold something."""
        return sum(cache.nbytes(self.lengths) for caches in self._caches.values() for cache in caches)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among so many most likely tokens only.
        top_p: draw among the fewest most likely tokens that together have at least this probability.
        seed: of the draws. Each sequence has draws of its own, whatever is in the batch beside it.
        vocabulary: draw among so many first tokens only, where a tokenizer has fewer than the model (None: all).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise GenerationError(f"temperature={self.temperature}: it must be 0 (most likely token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise GenerationError(f"top_k={self.top_k}: it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p={self.top_p}: it must be above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise GenerationError(f"seed={self.seed}: it must be 0 or more and below 2**63")
        if self.vocabulary is not None and self.vocabulary < 1:
            raise GenerationError(f"vocabulary={self.vocabulary}: it must be at least 1")

    def draws(self, batch: int, count: int) -> Tensor:
        """Uniform numbers for ``count`` tokens of each sequence, ``(B, count)``; row ``i`` from seed ``seed + i``."""
        each = [torch.Generator().manual_seed((self.seed + i) % 2**63) for i in range(batch)]
        return torch.stack([torch.rand(count, generator=generator, dtype=torch.float64) for generator in each])

    def choose(self, logits: Tensor, u: Tensor) -> Tensor:
        """Tokens ``(B,)`` from logits ``(B, V)`` and uniform numbers ``(B,)``, by the inverse of the distribution.

        Raises:
            GenerationError: logits that are not finite.
        """
        sound = signals.finite(logits[:, : self.vocabulary]).tolist()
        if not all(sound):
            raise GenerationError(
                f"logits of sequence {sound.index(False) + 1} are not finite: there is no token to choose"
            )
        return self.pick(logits, u)

    def pick(self, logits: Tensor, u: Tensor) -> Tensor:
        """:meth:`choose`, of logits that are known to be finite."""
        logits = signals.measured(logits)[:, : self.vocabulary]
        if self.temperature == 0 or self.top_k == 1:
            return logits.argmax(-1)
        # Before dividing, and in float64, where every temperature has a value: a small one must not overflow.
        scaled = (logits - logits.amax(-1, keepdim=True)).double() / self.temperature
        if self.top_k is None and self.top_p is None:
            probabilities, tokens = scaled.softmax(-1), None
        else:
            count = logits.shape[-1] if self.top_k is None else min(self.top_k, logits.shape[-1])
            scaled, tokens = scaled.topk(count, -1)  # the most likely first
            probabilities = scaled.softmax(-1)
            if self.top_p is not None:  # a token stays if those before it do not reach top_p
                before = probabilities.cumsum(-1) - probabilities
                probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        reached = probabilities.cumsum(-1)
        target = u.to(logits.device).unsqueeze(-1) * reached[:, -1:]
        place = torch.searchsorted(reached, target, right=True).clamp_max(reached.shape[-1] - 1)
        return (place if tokens is None else tokens.gather(-1, place)).squeeze(-1)


@dataclass(frozen=True)
class Emission:
    """One new token a sequence.

    Attributes:
        tokens: an id each; None for a sequence that had finished, or whose logits are not finite.
        steps: by region, the steps that the model took to come to it.
        finished: why the sequence is finished with this token, or None. A stop token is given but is not text.
    """

    tokens: list[int | None]
    steps: dict[str, list[int]]
    finished: list[Reason | None]


@dataclass(frozen=True)
class Generation:
    """New tokens of each sequence, the steps each took by region, and why it ended; stop tokens are left out."""

    tokens: list[list[int]]
    steps: dict[str, list[list[int]]]
    finished: list[Reason]


def check_prompts(model: LoopedGPT, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that cannot be continued.

    Raises:
        GenerationError: none, an empty one, one that fills the context, or a token that the model does not have.
    """
    if not prompts:
        raise GenerationError("no prompt")
    for i, prompt in enumerate(prompts):
        where = f"prompt {i + 1}" if len(prompts) > 1 else "the prompt"
        given: object = prompt  # callers without a type checker give a text, a tensor, a single id
        if not isinstance(given, Sequence) or not all(isinstance(token, int) for token in given):
            raise GenerationError(f"{where} is not a list of token ids (integers), as tokenizer.encode gives")
        if not prompt:
            raise GenerationError(f"{where} is empty: give at least one token")
        if len(prompt) >= model.block_size:
            raise GenerationError(
                f"{where} has {len(prompt)} tokens and the model's context {model.block_size}: shorten it to at most "
                f"{model.block_size - 1}, to leave room for one more"
            )
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise GenerationError(f"{where} has a token outside the vocabulary of {model.vocab_size}")


def stream(
    model: LoopedGPT,
    prompts: Sequence[Sequence[int]],
    policy: Policies,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    layout: str = "depth-indexed",
    max_loops: int | Mapping[str, int] = 32,
    total_loops: int | None = None,
) -> Iterator[Emission]:
    """Generate, giving each token as soon as it is there; arguments as :meth:`LoopedGPT.generate`."""
    check_prompts(model, prompts)
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens={max_new_tokens}: it must be at least 1")
    if unknown := [token for token in stop if not 0 <= token < model.vocab_size]:
        raise GenerationError(f"stop token {unknown[0]} is outside the vocabulary of {model.vocab_size}")
    sampling = sampling or Sampling()
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    capacity = min(model.block_size, longest + max_new_tokens)
    decoder = Decoder(
        model, policy, layout=layout, max_loops=max_loops, total_loops=total_loops, capacity=capacity
    )  # fmt: skip
    return _stream(decoder, prompts, max_new_tokens, sampling, frozenset(stop))


def _stream(
    decoder: Decoder, prompts: Sequence[Sequence[int]], count: int, sampling: Sampling, stop: frozenset[int]
) -> Iterator[Emission]:
    model, device = decoder.model, decoder.model.wte.weight.device
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    seen = decoder.prefill(tokens.to(device), lengths)
    draws = sampling.draws(len(prompts), count)
    active = [True] * len(prompts)
    for i in range(count):
        # What a sequence comes to when its numbers break, or after its end, is no other sequence's concern.
        sound = signals.finite(seen.logits)  # (B,)
        broken = (~sound).tolist()
        logits = seen.logits.masked_fill(~sound.unsqueeze(-1), 0.0) if any(broken) else seen.logits
        chosen = sampling.pick(logits, draws[:, i])
        ids: list[int] = chosen.tolist()
        finished: list[Reason | None] = [None] * len(ids)
        for b, token in enumerate(ids):
            if broken[b]:
                finished[b] = "nonfinite"
            elif token in stop:
                finished[b] = "stop"
            elif i + 1 == count:
                finished[b] = "length"
            elif lengths[b] + i + 1 >= model.block_size:
                finished[b] = "context"
        yield Emission(
            [token if going and not bad else None for token, going, bad in zip(ids, active, broken, strict=True)],
            {name: steps.tolist() for name, steps in seen.steps.items()},
            [reason if going else None for reason, going in zip(finished, active, strict=True)],
        )
        active = [going and reason is None for going, reason in zip(active, finished, strict=True)]
        if not any(active):
            return
        seen = decoder.step(chosen, None if all(active) else torch.tensor(active, device=device))


def generate(
    model: LoopedGPT,
    prompts: Sequence[Sequence[int]],
    policy: Policies,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop: Sequence[int] = (),
    layout: str = "depth-indexed",
    max_loops: int | Mapping[str, int] = 32,
    total_loops: int | None = None,
) -> Generation:
    """:meth:`~haltkit.models.gpt.LoopedGPT.generate`."""
    texts: list[list[int]] = [[] for _ in prompts]
    depths: dict[str, list[list[int]]] = {name: [[] for _ in prompts] for name in model.regions}
    reasons: list[Reason] = ["length"] * len(prompts)
    for emission in stream(
        model, prompts, policy, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, layout=layout,
        max_loops=max_loops, total_loops=total_loops,
    ):  # fmt: skip
        for b, (token, reason) in enumerate(zip(emission.tokens, emission.finished, strict=True)):
            if reason is not None:
                reasons[b] = reason
            if token is not None and reason != "stop":
                texts[b].append(token)
                for name, steps in emission.steps.items():
                    depths[name][b].append(steps[b])
    return Generation(texts, depths, reasons)
