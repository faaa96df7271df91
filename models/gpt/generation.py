"""Continue texts token by token: what may be asked for, a stream of tokens, and whole texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

import torch
from torch import nn

from haltkit import signals
from haltkit.models.gpt.decoding import Decoder
from haltkit.models.gpt.packed import packed
from haltkit.models.gpt.passes import Network
from haltkit.models.gpt.sampling import GenerationError, Sampling
from haltkit.models.gpt.settings import Settings
from haltkit.models.gpt.speculative import Speculation, by_shallow_steps, by_wavefront, check_speculation
from haltkit.models.gpt.wavefront import Committed, Wavefront, check_budget, check_wavefront
from haltkit.specs import Policies

__all__ = ["Emission", "Generation", "Reason", "Settings", "generate", "stream"]

Reason = Literal["stop", "length", "context", "nonfinite"]


@dataclass(frozen=True)
class Emission:
    """One new token for each sequence.

    Attributes:
        tokens: an id per sequence; None for a sequence that had finished, or whose logits are not finite.
        steps: by region, the steps that the model took for it.
        finished: why the sequence is finished with this token, or None. A stop token is given but is not text.
        outcomes: by region, the :class:`haltkit.Outcome` of the token; empty for the samplers that verify drafts.
    """

    tokens: list[int | None]
    steps: dict[str, list[int]]
    finished: list[Reason | None]
    outcomes: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """New tokens of each sequence, the steps each took by region, and why it ended; without stop tokens."""

    tokens: list[list[int]]
    steps: dict[str, list[list[int]]]
    finished: list[Reason]


def check_prompts(model: Network, prompts: Sequence[Sequence[int]]) -> None:
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
    model: Network, prompts: Sequence[Sequence[int]], policy: Policies, settings: Settings | None = None
) -> Iterator[Emission]:
    """Generate, giving each token as soon as it is there; arguments as :meth:`LoopedGPT.generate`.

    Raises:
        GenerationError: prompts, stop tokens or policies that do not work; the message says what does.
        ValueError: a bad spec, layout or budget.
    """
    settings = settings or Settings()
    check_prompts(model, prompts)
    if unknown := [token for token in settings.stop if not 0 <= token < model.vocab_size]:
        raise GenerationError(f"stop token {unknown[0]} is outside the vocabulary of {model.vocab_size}")
    if settings.sampler != "sequential" and isinstance(model, nn.Module):
        model = cast(Network, packed(model))  # several rows at a time
    decoder = Decoder(
        model,
        policy,
        layout=settings.layout,
        max_loops=settings.max_loops,
        total_loops=settings.total_loops,
        capacity=min(model.block_size, max(len(prompt) for prompt in prompts) + settings.max_new_tokens),
    )
    if settings.sampler == "sequential":
        return _stream(decoder, prompts, settings)
    return _stream_one_by_one(decoder, _samplers(decoder, settings), prompts, settings)


class _Sampler(Protocol):
    """Continues one text after its first new token."""

    def tokens(
        self, first: int, count: int, *, sampling: Sampling, stop: frozenset[int] = ...
    ) -> Iterator[Committed]: ...


def _samplers(decoder: Decoder, settings: Settings) -> Callable[[Sampling], _Sampler]:
    """What makes each text's sampler from its draws, once its prompt is in the cache; settings are checked before.

    Raises:
        GenerationError: settings that do not go together.
    """
    stop = frozenset(settings.stop)
    if settings.sampler == "speculative":
        ahead = 4 if settings.ahead is None else settings.ahead
        check_speculation(settings.layout, ahead)
        draft: Policies = "fixed:steps=1" if settings.draft is None else settings.draft
        decoder.under(draft)
        return lambda sampling: Speculation(decoder, by_shallow_steps(decoder, draft, sampling, stop), ahead=ahead)
    model = decoder.model
    commit = decoder.policies if settings.commit is None else decoder.checked(settings.commit)
    width, inner = 8 if settings.width is None else settings.width, 1 if settings.inner is None else settings.inner
    check_wavefront(model.regions, width, inner, settings.layout)
    check_budget(decoder.budgets, inner)
    if not settings.verify:
        return lambda _: Wavefront(decoder, commit, width=width, inner=inner)
    ahead = 16 if settings.ahead is None else settings.ahead
    check_speculation(settings.layout, ahead)

    def verified(sampling: Sampling) -> Speculation:
        wavefront = Wavefront(decoder, commit, width=width, inner=inner)
        return Speculation(decoder, by_wavefront(wavefront, sampling, stop), ahead=ahead)

    return verified


def _stream(decoder: Decoder, prompts: Sequence[Sequence[int]], settings: Settings) -> Iterator[Emission]:
    model, count, sampling, stop = decoder.model, settings.max_new_tokens, settings.sampling, frozenset(settings.stop)
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    seen = decoder.prefill(tokens.to(device), lengths)
    active = [True] * len(prompts)
    for i in range(count):
        # What a sequence comes to when its numbers break, or after its end, is no other sequence's concern.
        sound = signals.finite(seen.logits)  # (B,)
        broken = (~sound).tolist()
        logits = seen.logits.masked_fill(~sound.unsqueeze(-1), 0.0) if any(broken) else seen.logits
        chosen = sampling.pick(logits, decoder.lengths, range(len(prompts)))
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
            {name: outcome.tolist() for name, outcome in seen.outcome.items()},
        )
        active = [going and reason is None for going, reason in zip(active, finished, strict=True)]
        if not any(active):
            return
        seen = decoder.step(chosen, None if all(active) else torch.tensor(active, device=device))


def _stream_one_by_one(
    decoder: Decoder, sampler: Callable[[Sampling], _Sampler], prompts: Sequence[Sequence[int]], settings: Settings
) -> Iterator[Emission]:
    """One text after the other; the others' entries are None, and their steps 0."""
    model, stop = decoder.model, frozenset(settings.stop)
    device = decoder.device

    def emission(b: int, token: int | None, steps: Mapping[str, int], reason: Reason | None) -> Emission:
        numbers = range(len(prompts))
        return Emission(
            [token if i == b else None for i in numbers],
            {name: [k if i == b else 0 for i in numbers] for name, k in steps.items()},
            [reason if i == b else None for i in numbers],
        )

    for b, prompt in enumerate(prompts):
        count = min(settings.max_new_tokens, model.block_size - len(prompt))
        limit: Reason = "length" if count == settings.max_new_tokens else "context"
        seen = decoder.prefill(torch.tensor([list(prompt)], device=device))
        steps = {name: int(taken) for name, taken in seen.steps.items()}
        if not bool(signals.finite(seen.logits)):
            yield emission(b, None, steps, "nonfinite")
            continue
        own = settings.sampling.of(b)
        token: int | None = int(own.pick(seen.logits, decoder.lengths))
        rest = sampler(own).tokens(int(token or 0), count - 1, sampling=own, stop=stop)
        for i in range(count):
            reason: Reason | None = None
            if token is None:
                reason = "nonfinite"
            elif token in stop:
                reason = "stop"
            elif i + 1 == count:
                reason = limit
            yield emission(b, token, steps, reason)
            if reason is not None:
                break
            found = next(rest)
            token, steps = found.token, found.steps


def generate(
    model: Network, prompts: Sequence[Sequence[int]], policy: Policies, settings: Settings | None = None
) -> Generation:
    """:func:`stream`, gathered to whole texts."""
    texts: list[list[int]] = [[] for _ in prompts]
    depths: dict[str, list[list[int]]] = {name: [[] for _ in prompts] for name in model.regions}
    reasons: list[Reason] = ["length"] * len(prompts)
    for emission in stream(model, prompts, policy, settings):
        for b, (token, reason) in enumerate(zip(emission.tokens, emission.finished, strict=True)):
            if reason is not None:
                reasons[b] = reason
            if token is not None and reason != "stop":
                texts[b].append(token)
                for name, steps in emission.steps.items():
                    depths[name][b].append(steps[b])
    return Generation(texts, depths, reasons)
