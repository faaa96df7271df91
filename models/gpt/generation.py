"""Continue texts token by token: what may be asked for, a stream of tokens, whole texts, and a queue of prompts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

import torch
from torch import nn

from haltkit import signals
from haltkit.front import Committed
from haltkit.loop import Outcome
from haltkit.models.gpt.decoding import Decoded, Decoder
from haltkit.models.gpt.packed import packed
from haltkit.models.gpt.passes import Network
from haltkit.models.gpt.sampling import GenerationError, Sampling
from haltkit.models.gpt.settings import Settings
from haltkit.models.gpt.speculative import Speculation, by_shallow_steps, by_wavefront, check_speculation
from haltkit.models.gpt.wavefront import Wavefront, check_budget, check_wavefront
from haltkit.queue import check_slots, in_turn
from haltkit.specs import Policies

__all__ = ["Continuation", "Emission", "Generation", "Reason", "Settings", "generate", "generate_stream", "stream"]

Reason = Literal["stop", "length", "context", "nonfinite"]


@dataclass(frozen=True)
class Emission:
    """One new token for each sequence.

    Attributes:
        tokens: an id per sequence; None for a sequence that had finished, or whose logits are not finite.
        steps: by region, the steps that the model took for it.
        finished: why the sequence is finished with this token, or None. A stop token is given but is not text.
        outcomes: by region, the :class:`haltkit.Outcome` of the token; empty for all samplers but the sequential one.
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


@dataclass(frozen=True)
class Continuation:
    """One prompt's new tokens, without a stop token.

    Attributes:
        index: the prompt's number, from 0.
        steps: by region, those that each token took.
        finished: why the text ended; None where there is an ``error``.
        error: why this prompt cannot be continued, or None.
    """

    index: int
    tokens: list[int]
    steps: dict[str, list[int]]
    finished: Reason | None
    error: Exception | None = None


@dataclass(frozen=True)
class _New:
    """A new token of prompt ``index``; the others as in :class:`Emission`."""

    index: int
    token: int | None
    steps: dict[str, int]
    finished: Reason | None
    outcomes: dict[str, int] = field(default_factory=dict)


# Prompts that wait for a slot, each with its number.
_Pending = list[tuple[int, Sequence[int]]]


def check_prompt(model: Network, prompt: Sequence[int], where: str = "the prompt") -> None:
    """Refuse a prompt that cannot be continued; ``where`` names it.

    Raises:
        GenerationError: an empty one, one that fills the context, or a token that the model does not have.
    """
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


def check_prompts(model: Network, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts if there is none, or one that cannot be continued.

    Raises:
        GenerationError: see :func:`check_prompt`.
    """
    if not prompts:
        raise GenerationError("no prompt")
    for i, prompt in enumerate(prompts):
        check_prompt(model, prompt, f"prompt {i + 1}" if len(prompts) > 1 else "the prompt")


def stream(
    model: Network, prompts: Sequence[Sequence[int]], policy: Policies, settings: Settings | None = None
) -> Iterator[Emission]:
    """Generate, giving each token as soon as it is there; arguments as :meth:`LoopedGPT.generate`.

    Raises:
        GenerationError: prompts, stop tokens or policies that do not work; the message says what does.
        ValueError: a bad spec, layout or budget.
    """
    texts = _texts_of(model, prompts, policy, settings or Settings())
    return _emissions(texts, len(prompts), list(model.regions))


def _emissions(texts: _Texts, count: int, regions: Sequence[str]) -> Iterator[Emission]:
    while texts.running:
        one = Emission([None] * count, {name: [0] * count for name in regions}, [None] * count)
        for new in texts.round():
            one.tokens[new.index], one.finished[new.index] = new.token, new.finished
            for name, steps in new.steps.items():
                one.steps[name][new.index] = steps
            for name, outcome in new.outcomes.items():
                one.outcomes.setdefault(name, [int(Outcome.ABSENT)] * count)[new.index] = outcome
        yield one


class _Texts:
    """Texts that are continued side by side, round by round: a batch of :func:`haltkit.queue.in_turn`."""

    def __init__(self, model: Network, policy: Policies, settings: Settings, slots: int, capacity: int | None) -> None:
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
            capacity=capacity,
        )
        self._pending: _Pending = []
        if settings.sampler == "sequential":
            self._rounds = _in_slots(decoder, self._pending, slots, settings)
        else:
            self._rounds = _one_by_one(decoder, _samplers(decoder, settings), self._pending, settings)
        self._regions = list(model.regions)
        self._begun: dict[int, tuple[list[int], dict[str, list[int]]]] = {}
        self.running = 0

    def admit(self, items: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Further prompts, each with its number; never more than have room."""
        self._pending += items
        self.running += len(items)

    def round(self) -> list[_New]:
        """The next tokens: one of each text that runs, or that has just begun."""
        found = next(self._rounds)
        self.running -= sum(new.finished is not None for new in found)
        return found

    def step(self) -> list[tuple[int, Continuation]]:
        """The texts that end with the next tokens."""
        return [(new.index, text) for new in self.round() if (text := self._gathered(new))]

    def _gathered(self, new: _New) -> Continuation | None:
        """The text that ends with this token, or None."""
        tokens, steps = self._begun.setdefault(new.index, ([], {name: [] for name in self._regions}))
        if new.token is not None and new.finished != "stop":
            tokens.append(new.token)
            for name, taken in new.steps.items():
                steps[name].append(taken)
        if new.finished is None:
            return None
        del self._begun[new.index]
        return Continuation(new.index, tokens, steps, new.finished)

    def clear(self) -> None:
        """Give up what still runs."""
        self._rounds.close()
        self._begun.clear()


def _texts_of(model: Network, prompts: Sequence[Sequence[int]], policy: Policies, settings: Settings) -> _Texts:
    """Prompts that all begin at once."""
    check_prompts(model, prompts)
    capacity = max(len(prompt) for prompt in prompts) + settings.max_new_tokens
    texts = _Texts(model, policy, settings, len(prompts), capacity)
    texts.admit(list(enumerate(prompts)))
    return texts


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
    ahead = 8 if settings.ahead is None else settings.ahead
    check_speculation(settings.layout, ahead)

    def verified(sampling: Sampling) -> Speculation:
        wavefront = Wavefront(decoder, commit, width=width, inner=inner)
        return Speculation(decoder, by_wavefront(wavefront, sampling, stop), ahead=ahead)

    return verified


def _in_slots(decoder: Decoder, pending: _Pending, slots: int, settings: Settings) -> Generator[list[_New]]:
    """A token of every running sequence per round; pending prompts take the slots of those that have ended."""
    stop, block_size = frozenset(settings.stop), decoder.model.block_size
    running: dict[int, int] = {}  # the prompt in each slot
    left: dict[int, int] = {}  # tokens that each prompt may still get
    newest = [0] * slots
    while True:
        free = [slot for slot in range(len(decoder.lengths) or slots) if slot not in running]
        if pending:
            new = pending[: len(free)]
            del pending[: len(new)]
            rows = free[: len(new)]
            running.update((row, index) for row, (index, _) in zip(rows, new, strict=True))
            left.update((index, settings.max_new_tokens) for index, _ in new)
            seen = _begin(decoder, rows, [prompt for _, prompt in new])
        elif running:
            rows = sorted(running)
            active = torch.tensor([slot in running for slot in range(len(decoder.lengths))], device=decoder.device)
            tokens = torch.tensor(newest[: len(decoder.lengths)], device=decoder.device)
            seen = decoder.step(tokens, active if free else None)
            if free:
                seen = seen.of(rows)
        else:
            yield []
            continue
        # What a sequence comes to when its numbers break is no other sequence's concern.
        sound = signals.finite(seen.logits)  # (n,)
        logits = seen.logits.masked_fill(~sound.unsqueeze(-1), 0.0)
        indices, places = [running[row] for row in rows], [decoder.lengths[row] for row in rows]
        chosen = settings.sampling.pick(logits, places, indices).tolist()
        steps, whole = {name: taken.tolist() for name, taken in seen.steps.items()}, sound.tolist()
        outcomes = {name: outcome.tolist() for name, outcome in seen.outcome.items()}
        round_ = []
        for i, (row, index) in enumerate(zip(rows, indices, strict=True)):
            newest[row] = chosen[i]
            left[index] -= 1
            limit: Reason | None = "length" if not left[index] else "context" if places[i] + 1 >= block_size else None
            token = chosen[i] if whole[i] else None
            reason = _reason(token, stop, limit)
            taken, ended = ({name: all_[i] for name, all_ in found.items()} for found in (steps, outcomes))
            round_.append(_New(index, token, taken, reason, ended))
            if reason is not None:
                del running[row], left[index]
        yield round_
        decoder.rewind([0 if row in running else n for row, n in enumerate(decoder.lengths)])  # so no row reads as far


def _reason(token: int | None, stop: frozenset[int], limit: Reason | None) -> Reason | None:
    """Why a text ends with this token, or None. ``limit``: why it may not be longer, if it may not."""
    if token is None:
        return "nonfinite"
    return "stop" if token in stop else limit


def _begin(decoder: Decoder, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> Decoded:
    """Prompts into the slots ``rows``; at first into all there are to be."""
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(decoder.device)
    return decoder.admit(rows, tokens, lengths) if decoder.lengths else decoder.prefill(tokens, lengths)


def _one_by_one(
    decoder: Decoder, sampler: Callable[[Sampling], _Sampler], pending: _Pending, settings: Settings
) -> Generator[list[_New]]:
    """A token per round, one text after the other."""
    stop, block_size = frozenset(settings.stop), decoder.model.block_size
    while True:
        if not pending:
            yield []
            continue
        index, prompt = pending.pop(0)
        count = min(settings.max_new_tokens, block_size - len(prompt))
        limit: Reason = "length" if count == settings.max_new_tokens else "context"
        seen = decoder.prefill(torch.tensor([list(prompt)], device=decoder.device))
        steps = {name: int(taken) for name, taken in seen.steps.items()}
        if not bool(signals.finite(seen.logits)):
            yield [_New(index, None, steps, "nonfinite")]
            continue
        own = settings.sampling.of(index)
        token: int | None = int(own.pick(seen.logits, decoder.lengths))
        rest = sampler(own).tokens(int(token or 0), count - 1, sampling=own, stop=stop)
        for i in range(count):
            reason = _reason(token, stop, limit if i + 1 == count else None)
            yield [_New(index, token, steps, reason)]
            if reason is not None:
                break
            found = next(rest)
            token, steps = found.token, found.steps


def generate(
    model: Network, prompts: Sequence[Sequence[int]], policy: Policies, settings: Settings | None = None
) -> Generation:
    """:func:`stream`, gathered to whole texts."""
    running = _texts_of(model, prompts, policy, settings or Settings())
    ended: dict[int, Continuation] = {}
    while running.running:
        ended.update(running.step())
    texts = [ended[index] for index in range(len(prompts))]
    depths = {name: [text.steps[name] for text in texts] for name in model.regions}
    return Generation([text.tokens for text in texts], depths, [text.finished for text in texts if text.finished])


def generate_stream(
    model: Network,
    prompts: Iterable[Sequence[int]],
    policy: Policies,
    settings: Settings | None = None,
    *,
    slots: int = 8,
    ordered: bool = True,
    ahead: int | None = None,
) -> Iterator[Continuation]:
    """Continue prompts of any iterable, ``slots`` at a time; arguments as :meth:`LoopedGPT.generate_stream`."""
    window = check_slots(slots, ordered, ahead)
    settings = settings or Settings()
    texts = _Texts(model, policy, settings, slots, None)

    def prepare(prompt: Sequence[int]) -> Sequence[int]:
        check_prompt(model, prompt)
        return prompt

    def failed(index: int, error: Exception) -> Continuation:
        return Continuation(index, [], {name: [] for name in model.regions}, None, error)

    slots = slots if settings.sampler == "sequential" else 1
    return in_turn(texts, iter(prompts), slots, window, prepare, failed)
