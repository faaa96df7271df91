"""The results of all loops of a session: a histogram of steps, outcomes, and what was skipped."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from haltkit.loop import Outcome

__all__ = ["Tally"]

FEW = 64


class Tally:
    """Counts over completed loops; safe to add to from several threads.

    Attributes:
        loops: passes through the loop.
        computed, skipped: iterations that ran, and iterations that were given from the tape.
        mean_steps: the mean over its rows of each loop's steps, added up.
        seconds: time inside the body's modules of the iterations that ran, as the host saw it.
    """

    def __init__(self) -> None:
        self.computed = self.skipped = self.loops = 0
        self.mean_steps = 0.0
        self.seconds = 0.0
        self._histogram: Counter[int] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._paused = 0

    def add(self, steps: Tensor, outcome: Tensor, computed: int, skipped: int, seconds: float) -> None:
        """Count a finished loop: steps and outcome of its rows, ``(...)`` each, and what it cost."""
        with self._lock:
            if self._paused:
                return
            self.loops += 1
            self.computed += computed
            self.skipped += skipped
            self.seconds += seconds
            taken = _counts(steps)
            self.mean_steps += sum(k * rows for k, rows in taken.items()) / max(1, steps.numel())
            self._histogram.update(taken)
            self._outcomes.update({Outcome(value).name: count for value, count in _counts(outcome).items()})

    def observed(self, steps: int, rows: int) -> None:
        """A loop that nothing halts is over: all of its rows took ``steps``."""
        with self._lock:
            if not self._paused:
                self.loops += 1
                self.computed += steps
                self.mean_steps += steps
                self._histogram[steps] += rows
                self._outcomes[Outcome.BUDGET.name] += rows

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Loops that end meanwhile do not count."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    @property
    def saved(self) -> float:
        """Seconds that the skipped iterations would have taken at the mean of the computed ones."""
        return self.seconds / self.computed * self.skipped if self.computed else 0.0

    def __str__(self) -> str:
        total = sum(self._histogram.values())
        if not total:
            return "no loop has run inside this session" if not self.loops else "all batches were empty: no row has run"
        widest = max(self._histogram.values())
        lines = [
            f"{steps:5d} steps {count:8d} rows {'#' * max(1, round(30 * count / widest))}"
            for steps, count in sorted(self._histogram.items())
        ]
        lines.append(", ".join(f"{name} {count / total:.1%}" for name, count in self._outcomes.most_common()))
        share = self.skipped / max(1, self.computed + self.skipped)
        iterations = f"iterations: {self.computed} computed, {self.skipped} skipped ({share:.0%})"
        if self.skipped and self.seconds:
            each = 1e3 * self.seconds / self.computed
            iterations += f", about {self.saved:.3g} s saved at {each:.3g} ms per iteration (host time)"
        return "\n".join([*lines, iterations])


def _counts(values: Tensor) -> dict[int, int]:
    """How often each number is in a tensor. Where there are many they are counted without a look at each."""
    if values.numel() <= FEW:
        return Counter(values.flatten().tolist())
    found, counts = torch.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))
