"""Wavefront generation with a foreign causal model: several positions of one text loop at the same time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from haltkit import signals
from haltkit.attachment.attach import attach
from haltkit.attachment.description import Loop
from haltkit.attachment.stepping import Stepping
from haltkit.card import Card
from haltkit.front import Committed, Front, Open, Picking, Rows
from haltkit.protocol import Readout, check_count, granularity_of
from haltkit.specs import Policies, policy_for_regions

__all__ = ["ForeignWavefront", "Greedy", "wavefront"]

Layout = Literal["depth-indexed", "last"]


class Greedy:
    """Takes the most likely token."""

    def pick(self, logits: Tensor, positions: Sequence[int]) -> Tensor:
        """See :class:`~haltkit.front.Picking`."""
        return logits.argmax(-1)


def wavefront(
    model: nn.Module,
    prompt: Sequence[int],
    policy: Policies | Card | PathLike[str],
    *,
    max_new_tokens: int = 64,
    stop: Collection[int] = (),
    commit: Policies | None = None,
    width: int = 8,
    inner: int = 1,
    layout: Layout = "last",
    max_steps: int | None = None,
    sampling: Picking | None = None,
    run: Callable[[Tensor], Any] | None = None,
    loop: Loop | None = None,
    readout: Readout | None = None,
    **fields: Any,
) -> Iterator[Committed]:
    """Continue a text with a foreign causal model, several positions at a time::

        for new in haltkit.wavefront(model, ids, "norm:tau=0.1", run=lambda ids: model(ids, use_cache=False)):
            print(new.token, new.steps)

    The parallel sampler of arXiv 2510.14961, with a halting policy in the place of its threshold. A *sweep* is one call
    of the model on the text and its drafts, whose loop goes on from the states that the open positions have; it gives
    each of them one step (or ``inner``). Then the oldest positions are committed as long as the policy calls them
    settled and their own token is final, and one more position is opened. A committed token never changes.

    Nothing is cached: every sweep computes all positions, and one step more than ``inner``, in which the states are put
    in place of the loop's own. What it saves are steps: a token takes some two sweeps in the place of its depth.

    Only a loop that goes on from its state alone can be stepped so. That, and that no position sees a later one, is
    proved on the prompt before anything is generated; other models are refused.

    Args:
        model: a causal model with one loop.
        prompt: token ids.
        policy: as for :func:`haltkit.attach`, token by token. It reads the prompt, and settles new tokens.
        max_new_tokens, stop: the text ends after this many tokens, or with one of ``stop``.
        commit: what settles new tokens, in the place of ``policy``.
        width: greatest number of open positions.
        inner: steps per sweep, at least 1, and fewer than the model's own loop takes.
        layout: ``last``: open positions read final ones as they ended. ``depth-indexed``: as they were at the step that
            the open position is at, as :func:`haltkit.attach` has it; a sweep then computes the text once for each step
            that open positions are at. With it and a width of 1 the text is that of one call inside
            :func:`haltkit.attach` per token, under the same policy.
        max_steps: greatest number of steps of a position, at most as many as the model takes by itself (None: those).
        sampling: how tokens are drawn (None: the most likely one); ``haltkit.models.gpt.sampling.Sampling`` fits.
        run: from token ids ``(B, T)`` to the model's output, which is the logits ``(B, T, V)`` or has them as
            ``.logits``; without a cache. None: the model.
        loop, readout, fields: the description, as for :func:`haltkit.attach`.

    Returns:
        the new tokens, each as soon as it is final, with the steps of the position that it was read from. The model is
        as it was whenever one is handed out.

    Raises:
        CannotStep: the loop does not go on from a state that is put into it, or the model is not causal.
        AttachError: the loop cannot be halted as described.
        ValueError: a bad value, several loops, a model that halts itself, or a policy that pools positions.
    """
    check_count("max_new_tokens", max_new_tokens)
    if not isinstance(stop, Collection):
        raise ValueError(f"stop={stop!r}: a collection of token ids is expected, such as [{stop!r}]")
    front = ForeignWavefront(
        model,
        prompt,
        policy,
        commit=commit,
        width=width,
        inner=inner,
        layout=layout,
        max_steps=max_steps,
        sampling=sampling,
        run=run,
        loop=loop,
        readout=readout,
        **fields,
    )
    return front.generate(max_new_tokens, stop)


@dataclass
class _Open(Open):
    """Open positions of a foreign model.

    Attributes:
        trail: the states of each row after each of its steps, ``(D,)`` each.
    """

    trail: list[list[Tensor]] = field(default_factory=list)

    def keep(self, rows: slice) -> None:
        super().keep(rows)
        self.trail = self.trail[rows]


class ForeignWavefront(Front[_Open]):
    """Continues one text with a foreign causal model whose loop can be stepped; see :func:`wavefront`.

    Attributes:
        first: the prompt's next token, as the prompt's last position gave it.
        standing: what is promised of a policy from a card, or what it is used without.
        positions: positions that the model computed, over all sweeps and entries of the batch.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: Sequence[int],
        policy: Policies | Card | PathLike[str],
        *,
        commit: Policies | None = None,
        width: int = 8,
        inner: int = 1,
        layout: Layout = "last",
        max_steps: int | None = None,
        sampling: Picking | None = None,
        run: Callable[[Tensor], Any] | None = None,
        loop: Loop | None = None,
        readout: Readout | None = None,
        **fields: Any,
    ) -> None:
        check_count("width", width)
        check_count("inner", inner)
        if layout not in ("depth-indexed", "last"):
            raise ValueError(f"layout={layout!r}: allowed are 'depth-indexed' and 'last'")
        if not len(prompt) or not all(isinstance(token, int) for token in prompt):
            raise ValueError("the prompt is a list of at least one token id (integers): of a tensor, ids.tolist()")
        # Nothing runs: it says what is meant.
        with attach(model, policy, loop, readout=readout, max_steps=max_steps, **fields) as session:
            loops, policies, readouts = session.loops, session.policies, session.readouts
            self.standing = session.standing
        if len(loops) != 1:
            what = f"has the loops {', '.join(loops)}" if loops else "halts itself"
            raise ValueError(
                f"a wavefront steps one loop, and this {type(model).__name__} {what}: describe one by body=[...]; "
                "the bundled text model has a wavefront of its own, model.generate(..., sampler='wavefront')"
            )
        [(name, described)] = loops.items()
        settles = policies if commit is None else policy_for_regions(commit, (name,))
        for one in (policies[name], settles[name]):
            if (granularity := granularity_of(one)) != "token":
                raise ValueError(
                    f"a policy with granularity={granularity} cannot settle one position, because other positions are "
                    "at other steps: use granularity=token"
                )
        self.name, self.layout = name, layout
        self.step = Stepping(model, run or model, name, described, readouts.get(name))
        self.sampling = sampling or Greedy()
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        text = torch.tensor([list(prompt)], device=device)
        with torch.no_grad():
            iterations = self.step.proved(text)
            if iterations <= inner:
                raise self.step.refused(f"it takes {iterations} steps, and inner={inner} needs {inner + 1}")
            budget = iterations if max_steps is None else min(max_steps, iterations)
            if budget < inner:
                raise ValueError(f"max_steps={max_steps} is below inner={inner}: a sweep takes inner steps")
            super().__init__(settles, width=width, inner=inner, budget=budget, device=device)
            read = self.step(text, policies[name], max_steps=budget)
        self.text = list(prompt)
        last = read.logits[:, -1]
        self.first = int(self.sampling.pick(last, [len(prompt)])) if bool(signals.finite(last)) else None
        self.prompt_steps = int(read.steps[0, -1])
        # States of final positions after each step, (K, T, D); from its last step on a position keeps its state.
        self.past = torch.stack(read.states[1:] if layout == "depth-indexed" else read.states[-1:])[:, 0]
        self.positions = 0

    def generate(self, count: int, stop: Collection[int] = ()) -> Iterator[Committed]:
        """The prompt's next tokens, each as soon as it is final: ``count`` of them, or up to a stop token, which is
        given."""
        yield Committed(self.first, {self.name: self.prompt_steps})
        if self.first is not None and self.first not in stop:
            yield from self.tokens(self.first, count - 1, sampling=self.sampling, stop=frozenset(stop))

    def _opened(self, token: int) -> _Open:
        return _Open(len(self.text), [token], [0])

    def _commit(self, open_: _Open, row: int) -> None:
        self.text.append(open_.tokens[row])
        trail = open_.trail[row] if self.layout == "depth-indexed" else open_.trail[row][-1:]
        states = torch.stack(trail)  # (K, D)
        deepest = max(len(states), len(self.past))
        self.past = torch.cat([_deepened(self.past, deepest), _deepened(states, deepest).unsqueeze(1)], 1)

    def _advance(self, given: _Open, after: _Open) -> tuple[Tensor, Tensor]:
        first, n, inner = given.first, len(given.tokens), self.inner
        depths = sorted(set(given.k)) if self.layout == "depth-indexed" else [len(self.past)]
        entry = [depths.index(k) if self.layout == "depth-indexed" else 0 for k in given.k]
        ids = torch.tensor([self.text + given.tokens], device=self.device).expand(len(depths), -1)
        old, rows = given.x.get(self.name), torch.arange(n, device=self.device)
        known = 0 if old is None else len(old)
        entries = torch.tensor(entry, device=self.device)
        begun: list[Tensor] = []  # states of the new rows after their last step

        def put(iteration: int, x: Tensor) -> Tensor:
            """Final positions are where they were at that step. The first iteration is only the new rows': the others
            begin at its end, with the states that they have; the new rows have taken their steps one before it."""
            x = x.clone()
            for group, depth in enumerate(depths):
                taken = depth + iteration - (depth > 0)
                x[group, :first] = self.past[min(taken, len(self.past)) - 1]
            if iteration == 1 and old is not None:
                x[:, first : first + known] = old
            if iteration == inner:
                begun.append(x[:, first + known :].clone())
            if iteration == inner + 1:
                x[:, first + known :] = begun[0]
            return x

        ran = self.step(ids, inner + 1, put)
        self.positions += ids.numel()
        logits = ran.logits[entries, first + rows]
        states = torch.stack(ran.states)[:, entries, first + rows]  # (inner + 2, n, D)
        offset = (rows < known).long()
        state, halt = given.judged.get(self.name), self._active[:n]
        x = states[offset, rows]
        trail = [list(row) for row in given.trail] + [[] for _ in range(n - known)]
        for step in range(1, inner + 1):
            before, x = x, states[offset + step, rows]
            for row, one in enumerate(x):
                trail[row].append(one)
            k = [taken + step for taken in given.k]
            read = self._given(logits) if step == inner else self._unknown
            state, halt = self._judge(self.name, state, known if step == 1 else n, k, x, before, read)
        after.x, after.judged, after.trail = {self.name: x}, {self.name: state}, trail
        return logits, halt

    @staticmethod
    def _given(logits: Tensor) -> Rows:
        """The model's own output at the rows' states, in the place of a readout."""
        return lambda rows: lambda _: logits[rows]

    def _unknown(self, rows: slice) -> Readout:
        def readout(x: Tensor) -> Tensor:
            raise ValueError(
                f"inner={self.inner}: this policy looks at logits at every step, which the model gives after the last "
                "step of a sweep only: use inner=1"
            )

        return readout


def _deepened(states: Tensor, depth: int) -> Tensor:
    """States after each step, ``(K, ...)``, with the last one repeated up to ``depth``."""
    return torch.cat([states, states[-1:].expand(depth - len(states), *states.shape[1:])])
