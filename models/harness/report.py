"""What models of the harness report of their steps: counts for the results, and a line per request."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from haltkit.attachment.saved import card_at
from haltkit.card import Card
from haltkit.files import check_output, write_text
from haltkit.protocol import HaltingPolicy, granularity_of
from haltkit.rows import Outcome
from haltkit.standing import Standing

__all__ = ["Depths", "Histogram", "Report", "asked_policy", "check_batch", "log_standing", "rolling_windows"]

_LOG = logging.getLogger(__name__)


def asked_policy(policy: Any, without_certificate: Any) -> str | Card | None:
    """The policy that ``policy=`` and ``without_certificate=`` name: a card if it is the path of one.

    Raises:
        ValueError: a card that cannot be read; ``without_certificate`` is neither true nor false.
    """
    waived = {"true": True, "false": False}.get(str(without_certificate).lower())
    if waived is None:
        raise ValueError(f"without_certificate={without_certificate}: allowed are True and False")
    return None if policy is None else card_at(policy, waived) or str(policy)


def log_standing(standing: Standing) -> None:
    """Tell in the harness's log what is promised of a card's policy, or what it is used without."""
    if standing.without:
        _LOG.warning("haltkit: the policy is %s", standing)
    elif standing.promise:
        _LOG.info("haltkit: the policy is %s", standing)


def rolling_windows(model: Any, request: Any) -> list[tuple[list[int], list[int]]]:
    """The windows (context, continuation) of a request of ``loglikelihood_rolling``, as the harness cuts them."""
    windows = get_rolling_token_windows(
        token_list=model.tok_encode(request.args[0]),
        prefix_token=model.prefix_token_id,
        max_seq_len=model.max_length,
        context_len=1,
    )
    return [make_disjoint_window(window) for window in windows]


def check_batch(policies: Iterable[HaltingPolicy[Any]], batch_size: Any) -> None:
    """Refuse policies that pool tokens where padding would decide with them.

    Raises:
        ValueError: such a policy, at another batch size than 1.
    """
    pooled = {granularity_of(policy) for policy in policies} - {"token"}
    if pooled and str(batch_size) != "1":
        raise ValueError(
            f"batch_size={batch_size} with granularity={pooled.pop()}: padding and the other texts of a batch would "
            "decide about halting. Use batch_size=1, or granularity=token"
        )


@dataclass(frozen=True)
class Depths:
    """Steps and outcomes of some positions, by region, in order."""

    steps: Mapping[str, list[int]]
    outcomes: Mapping[str, list[int]]

    @classmethod
    def of_row(cls, steps: Mapping[str, Tensor], outcomes: Mapping[str, Tensor], row: int) -> Depths:
        """Those of one entry of the batch, ``(B, T)`` by region."""
        return cls(*({name: one[row].tolist() for name, one in kept.items()} for kept in (steps, outcomes)))

    def __len__(self) -> int:
        """How many positions; 0 where nothing was counted."""
        return max(map(len, self.steps.values()), default=0)

    def cut(self, start: int, end: int) -> Depths:
        """Those of the positions from ``start`` up to ``end``."""
        return Depths(
            {name: values[start:end] for name, values in self.steps.items()},
            {name: values[start:end] for name, values in self.outcomes.items()},
        )


@dataclass
class Histogram:
    """Steps of many tokens, of one region."""

    steps: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    outcomes: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, steps: Sequence[int], outcomes: Sequence[int]) -> None:
        """Count tokens."""
        for step in steps:
            self.steps[step] += 1
        for outcome in outcomes:
            self.outcomes[Outcome(outcome).name.lower()] += 1

    def summary(self) -> dict[str, Any]:
        """Tokens, mean steps, histogram and outcomes, as JSON has them."""
        tokens = sum(self.steps.values())
        total = sum(step * count for step, count in self.steps.items())
        return {
            "tokens": tokens,
            "mean_steps": total / tokens if tokens else None,
            "histogram": {str(step): self.steps[step] for step in sorted(self.steps)},
            "outcomes": dict(sorted(self.outcomes.items())),
        }


# A part of a request: its positions, and how many of the last ones predict the continuation.
Part = tuple[Depths, int]


class Report:
    """The steps of all requests so far.

    Args:
        steps: a JSONL file to write, one line per request: task, document, request, and the steps of each token of its
            context and of its continuation, by region; None: none.

    Raises:
        FileError: ``steps`` cannot be written.
    """

    def __init__(self, steps: str | None) -> None:
        self.steps = None if steps is None else check_output(steps, ("jsonl",))
        self._counts: dict[str, dict[str, Histogram]] = {"context": {}, "continuation": {}}
        self._lines: list[str] = []

    def add(self, requests: Iterable[tuple[Any, Sequence[Part]]]) -> None:
        """Count requests, each with its parts, and write the file anew."""
        for request, parts in requests:
            self._note(request, parts)
        if self.steps is not None:
            write_text(self.steps, "".join(f"{line}\n" for line in self._lines))

    def _note(self, request: Any, parts: Sequence[Part]) -> None:
        line: dict[str, Any] = {"task": request.task_name, "doc": request.doc_id, "request": request.idx}
        for name in ("context", "continuation"):
            values: dict[str, list[int]] = line.setdefault(name, {})
            for depths, continuation in parts:
                border = len(depths) - continuation
                cut = depths.cut(0, border) if name == "context" else depths.cut(border, len(depths))
                for region, steps in cut.steps.items():
                    self._counts[name].setdefault(region, Histogram()).add(steps, cut.outcomes[region])
                    values.setdefault(region, []).extend(steps)
        self._lines.append(json.dumps(line))

    def summary(
        self, given: str | None, policy: str | Card | None, standing: Standing, how: Mapping[str, Any]
    ) -> dict[str, Any]:
        """For the results: policy, card with its certificate, and the steps of context and continuation by region.

        Args:
            given: what names the policy.
            policy: the same, read.
            standing: what is promised of it.
            how: what else was asked for; None of it is left out.
        """
        card = None
        if isinstance(policy, Card):
            card = asdict(replace(policy, folder=None))
            del card["folder"], card["name"]
        counts = {
            name: {region: histogram.summary() for region, histogram in regions.items()}
            for name, regions in self._counts.items()
        }
        asked = {name: value for name, value in how.items() if value is not None}
        return {"policy": given, "standing": str(standing), **asked, "card": card, **counts}
