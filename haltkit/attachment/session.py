"""What :func:`haltkit.attach` returns: one public shape for every kind of model."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from haltkit.attachment.description import Loop
from haltkit.attachment.joining import QueueOutput
from haltkit.attachment.tally import Tally
from haltkit.attachment.verify import NOTHING, ByRegion, Probe, Report, verify
from haltkit.card import Card
from haltkit.loop import LoopObserver
from haltkit.protocol import HaltingPolicy, Readout, granularity_of
from haltkit.recording.recorder import Recorder
from haltkit.recording.trajectory import Trajectory
from haltkit.standing import PLAIN, Standing

__all__ = ["Session", "next_number", "trajectory_of"]

_numbers = itertools.count()
NOTHING_RAN = "no loop has run inside this session yet: call the model inside the with block"


def next_number() -> int:
    """Sessions are numbered in the order they come, which is the reverse of the order they must be detached in."""
    return next(_numbers)


class Session(ABC):
    """A policy attached to each region of a model. A context manager; made by :func:`haltkit.attach`.

    A region is a loop by name: the one that was described is called ``"loop"``, several have the names they were given,
    and a model that halts itself names its own. What comes of a session is always by region.

    Attributes:
        model: the model.
        regions: names of the loops, an outer one before those inside it, others in the order given.
        policies: what judges, by region; empty where the loops are only observed.
        loops: the descriptions in force; empty for a model that halts itself.
        readouts: from the state to logits, for regions that have one.
        tally: counts over all loops of the session, by region.
        standing: what is promised of the policies, or what they are used without, where they came from a card; its
            text is one line, empty where there is nothing to say.
        card: that the policies are from; None: they are not from a card.
    """

    model: nn.Module
    regions: tuple[str, ...]
    policies: Mapping[str, HaltingPolicy[Any]]
    loops: Mapping[str, Loop]
    readouts: Mapping[str, Readout]
    tally: Mapping[str, Tally]
    card: Card | None = None
    standing: Standing = PLAIN

    def __repr__(self) -> str:
        judged = {name: self.policies.get(name) for name in self.regions}
        said = ", ".join(name if policy is None else f"{name}: {policy!r}" for name, policy in judged.items())
        told = f"; {self.standing}" if str(self.standing) else ""
        return f"<{type(self).__name__} of {type(self.model).__name__}, {said}{told}>"

    @abstractmethod
    def detach(self) -> None:
        """Restore the model: classes, methods, attributes and hooks are what they were. Harmless if repeated.

        Raises:
            DetachOrder: a session attached later still wraps one of the same modules.
        """

    @abstractmethod
    def detached(self) -> AbstractContextManager[None]:
        """Detach for the length of a ``with`` block: calls pass through as if nothing were attached."""

    def at_full_depth(self) -> AbstractContextManager[Any]:
        """Run every loop to its full depth for the length of a ``with`` block: to its budget, or as deep as it goes.

        What happens inside is neither counted nor remembered.
        """
        return self.detached()

    @property
    @abstractmethod
    def steps(self) -> dict[str, Tensor]:
        """Steps of each row in the newest loop (of any thread) of every region that ran, ``(...)`` int64 each.

        Raises:
            ValueError: no loop has run to its end yet.
        """

    @property
    @abstractmethod
    def outcome(self) -> dict[str, Tensor]:
        """An :class:`~haltkit.loop.Outcome` for each row of the newest loops, by region, ``(...)`` int8 each.

        Raises:
            ValueError: no loop has run to its end yet.
        """

    @property
    @abstractmethod
    def trajectory(self) -> Trajectory:
        """The newest loops by region: of the :class:`~haltkit.Recorder` that was given as observer, or as kept.

        Raises:
            ValueError: nothing has run yet; or there was no recorder, and the loops are only observed or were too large
                to keep (64 MiB each), or the model wrote over its states.
        """

    @abstractmethod
    def _probe(
        self,
        policies: ByRegion,
        keep: tuple[int, ...] = (),
        disturb_before: Mapping[str, int] = NOTHING,
        state_only: bool = False,
    ) -> AbstractContextManager[Probe]:
        """Another session beside this one, with other policies; see :func:`haltkit.attachment.verify.verify`."""

    def queue(
        self,
        items: Iterable[Any],
        call: Callable[[Any], Any],
        slots: int = 64,
        *,
        ordered: bool = True,
        ahead: int | None = None,
    ) -> Iterator[QueueOutput]:
        """Run the model on each item of a queue, ``slots`` items at a time::

            with haltkit.attach(model, "norm:tau=0.2,granularity=sequence", body=["core"]) as session:
                for done in session.queue(boards, lambda board: model(board[None])):
                    done.index, done.output, done.steps, done.outcome

        Every item gets what it gets alone, to rounding. When one has halted, the next takes its place at once, so time
        follows the mean number of steps. Each item runs the model in a thread of its own, one at a time, and calls of
        the body's modules are made together; which dimension is the batch is found by trying and proved on two items.
        It runs without gradients. Items of different shapes may be mixed; only those alike are computed together.

        Args:
            items: any iterable, also one without an end. It is read as in :func:`haltkit.run_queue`.
            call: runs the model on one item, as a batch of its own.
            slots, ordered, ahead: see :func:`haltkit.run_queue`.

        Returns:
            the results. An ``Exception`` that ``call`` raises is the ``error`` of that item's result.

        Raises:
            ValueError: ``slots`` below 1, ``ahead`` below ``slots``, several loops, a session that halts nothing or
                whose model halts itself, an observer, or another queue in progress.
            AttachError: while results are drawn: rows of different items see each other, the body is given a cache, or
                the model keeps something of a call on itself (the first item is run alone, and compared).
        """
        raise ValueError(
            "a queue takes a policy attached to a loop of modules; this session only observes, or its model halts "
            "itself: see haltkit.run_queue"
        )

    @property
    def computed(self) -> int:
        """Iterations that ran, over all loops and regions of the session."""
        return sum(tally.computed for tally in self.tally.values())

    @property
    def skipped(self) -> int:
        """Iterations that were skipped, over all loops and regions of the session."""
        return sum(tally.skipped for tally in self.tally.values())

    def summary(self) -> str:
        """Histogram of steps, outcomes, iterations computed and skipped and the time that saved, by region.

        Of a policy from a card the last line says what is promised, or what it is used without.
        """
        one = len(self.regions) == 1
        parts = [str(self.tally[name]) if one else f"{name}:\n{self.tally[name]}" for name in self.regions]
        return "\n".join([*parts, *filter(None, [str(self.standing)])])

    def verify(
        self,
        run: Callable[[], Any],
        k: int | Mapping[str, int],
        run_at: Callable[[Any], Any] | None = None,
        *,
        rows: bool | None = None,
    ) -> Report:
        """Prove on this model that attaching is neutral and that a halt at ``k`` is right.

        The session itself is not used for it: what it counts and remembers stays as it is.
        See :func:`haltkit.attachment.verify.verify`; ``rows``: whether rows or entries halt one by one, None: as the
        session's policies do.

        Raises:
            ValueError: nothing halts in this session.
        """
        if not self.policies:
            raise ValueError("this session only observes, and halts nothing: attach a policy to verify a halt")
        if rows is None:
            rows = any(granularity_of(policy) not in ("batch", "world") for policy in self.policies.values())
        whole = [name for name, loop in self.loops.items() if loop.halts_whole]
        return verify(self.regions, self.detached, self._probe, run, k, run_at, rows, whole)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.detach()
        if kind is None:
            self._check_ran()

    def _check_ran(self) -> None:
        """After the session, which has ended well: was there anything to halt?"""
        return


def trajectory_of(observer: LoopObserver | None) -> Trajectory:
    """The recording of a recorder that was given as observer.

    Raises:
        ValueError: there is none, or it has recorded nothing.
    """
    if not isinstance(observer, Recorder):
        raise ValueError("nothing is recorded: attach(..., observer=haltkit.Recorder()) keeps the newest trajectory")
    return observer.trajectory
