"""A front: the open positions of one text, which step together; the oldest settled ones are committed.

What is the same for every model: drafts, commits, the budget and the policy's judgement. How a position steps is the
model's: :class:`Front` has two subclasses, for the bundled text model and for foreign ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from haltkit import signals
from haltkit.protocol import HaltingPolicy, LoopStep, Readout, judge, map_state

__all__ = ["Committed", "Front", "Open", "Picking"]


@dataclass(frozen=True)
class Committed:
    """One token that is final.

    Attributes:
        token: its id; None if the logits of its position are not finite, and then the text ends.
        steps: how many steps the position that it was read from took in each region.
    """

    token: int | None
    steps: dict[str, int]


class Picking(Protocol):
    """How tokens are drawn."""

    def pick(self, logits: Tensor, positions: Sequence[int]) -> Tensor:
        """Tokens ``(n,)`` from logits ``(n, V)``, for these positions of the text."""
        ...


@dataclass
class Open:
    """The open positions ``first .. first + len(tokens) - 1``: the input and the state of each.

    Attributes:
        tokens: input of each; k: steps that each has taken.
        stale: the first row whose embedding is not that of its token; ``len(tokens)``: none.
        x: state of each by region, ``(n, D)``, or one fewer before the newest row's first step.
        judged: the policy's state by region, of the same rows.
    """

    first: int
    tokens: list[int] = field(default_factory=list)
    k: list[int] = field(default_factory=list)
    stale: int = 0
    x: dict[str, Tensor] = field(default_factory=dict)
    judged: dict[str, Any] = field(default_factory=dict)

    def keep(self, rows: slice) -> None:
        """Only these rows stay open."""
        self.first += rows.start or 0
        self.tokens, self.k = self.tokens[rows], self.k[rows]
        self.stale = max(0, min(len(self.tokens), self.stale - (rows.start or 0)))
        self.x = {name: x[rows] for name, x in self.x.items()}
        self.judged = {name: map_state(lambda part: part[rows], state) for name, state in self.judged.items()}


O = TypeVar("O", bound=Open)  # noqa: E741
Rows = Callable[[slice], Readout]


class Front(ABC, Generic[O]):
    """Continues one text.

    Args:
        commit: what settles a token, by region; token by token only.
        width: greatest number of open positions.
        inner: steps per sweep in each region.
        budget: greatest number of steps of a position in each region.
        device: of the states.

    Attributes:
        sweeps: how many there have been.
        rows: positions computed, summed over the sweeps.
        drafts: when a token has been handed out, those that the open positions have for the places after it.
    """

    def __init__(
        self,
        commit: Mapping[str, HaltingPolicy[Any]],
        *,
        width: int,
        inner: int,
        budget: int,
        device: torch.device,
    ) -> None:
        self.commit = commit
        self.width, self.inner, self.budget = width, inner, budget
        self.device = device
        self.sweeps = self.rows = 0
        self.drafts: list[int] = []
        self._active = torch.ones(width, dtype=torch.bool, device=device)

    @abstractmethod
    def _opened(self, token: int) -> O:
        """The first position that is not final, open, with this token."""

    @abstractmethod
    def _advance(self, given: O, after: O) -> tuple[Tensor, Tensor]:
        """Give every row ``inner`` steps in each region, from ``given`` into ``after``.

        Returns:
            logits ``(n, V)``, and which rows the policy calls settled in every region, ``(n,)`` bool.
        """

    @abstractmethod
    def _commit(self, open_: O, row: int) -> None:
        """A row's position is final; rows before it were committed before."""

    @torch.inference_mode()
    def tokens(
        self, first: int, count: int, *, sampling: Picking, stop: frozenset[int] = frozenset()
    ) -> Iterator[Committed]:
        """The tokens that follow ``first``, each as soon as it is final: ``count`` of them, or up to a stop token.

        Args:
            first: the prompt's next token, which is final.
            sampling: of this sequence.
        """
        open_ = self._opened(first)
        while count:
            (settled, drafts, finite), open_ = self._sweep(open_, sampling)
            done = 0
            for row, draft in enumerate(drafts):
                last_step = open_.k[row] + self.inner > self.budget
                steps = dict.fromkeys(self.commit, open_.k[row])
                if not finite[row]:
                    yield Committed(None, steps)
                    return
                if not (settled[row] or last_step):
                    break
                self._commit(open_, row)
                done += 1
                count -= 1
                self.drafts = drafts[row + 1 :]
                yield Committed(draft, steps)
                if draft in stop or not count:
                    return
                if row + 1 < len(drafts) and open_.tokens[row + 1] != draft:
                    break  # the next position was given another token
            self._redraft(open_, drafts, done)
            if len(open_.tokens) < self.width and len(open_.tokens) < count and drafts[-1] not in stop:
                open_.tokens.append(drafts[-1])
                open_.k.append(0)

    @staticmethod
    def _redraft(open_: O, drafts: Sequence[int], done: int) -> None:
        """Give each row the draft of the row before it, and close the first ``done`` rows."""
        for row, draft in enumerate(drafts[:-1], 1):
            if open_.tokens[row] != draft:
                open_.tokens[row] = draft
                open_.stale = min(open_.stale, row)
        open_.keep(slice(done, None))

    def _sweep(self, given: O, sampling: Picking) -> tuple[tuple[list[int], list[int], list[int]], O]:
        """One sweep over all open rows: which are settled, their drafts, which are finite; and the rows after it.

        A row that is not finite would reach earlier ones through a masked product. The sweep is then repeated with the
        oldest row alone; the others are opened again later.
        """
        found, after = self._try(given, sampling)
        if not all(found[2]) and len(given.tokens) > 1:
            given.keep(slice(0, 1))
            found, after = self._try(given, sampling)
        return found, after

    def _try(self, given: O, sampling: Picking) -> tuple[tuple[list[int], list[int], list[int]], O]:
        first, n = given.first, len(given.tokens)
        after = copy(given)
        after.tokens, after.k, after.stale = list(given.tokens), [k + self.inner for k in given.k], n
        after.x, after.judged = {}, {}
        self.sweeps += 1
        self.rows += n
        logits, settled = self._advance(given, after)
        drafts = sampling.pick(logits, range(first + 1, first + n + 1))
        looked = torch.stack([settled.to(drafts.dtype), drafts, signals.finite(logits).to(drafts.dtype)])
        # The only look at the device.
        return cast(tuple[list[int], list[int], list[int]], tuple(looked.tolist())), after

    def _judge(
        self, name: str, state: Any, known: int, k: Sequence[int], x: Tensor, before: Tensor, readout: Rows
    ) -> tuple[Any, Tensor]:
        """The policy's new state and which rows it halts. Rows from ``known`` on are judged apart: they begin here.

        Args:
            readout: gives the function from the states of the rows ``start .. stop - 1`` to their logits.
        """
        policy, answers = self.commit[name], []
        for start, stop in ((0, known), (known, len(k))):
            if start == stop:
                continue
            own = k[start:stop]
            step_k = own[0] if len(set(own)) == 1 else torch.tensor(own, device=self.device)
            now, then = x[start:stop], before[start:stop]
            step = LoopStep(step_k, now, then, self._active[start:stop], readout(slice(start, stop)), region=name)
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
