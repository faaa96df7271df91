"""The lm-evaluation-harness with a halting policy: the model ``haltkit`` of ``lm-eval``.

``haltkit lm-eval run --model haltkit --model_args pretrained=DIR,policy=norm:tau=0.2,max_steps=32 --tasks ...`` runs
the harness itself, with its own scoring: the model is ``HFLM`` with the loops of its passes halted.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows
from torch import Tensor, nn

from haltkit.attachment.attach import attach
from haltkit.attachment.generating import generation
from haltkit.card import Card, is_card
from haltkit.files import check_output, write_text
from haltkit.protocol import granularity_of
from haltkit.rows import Outcome

__all__ = ["HaltedLM", "Histogram"]


@dataclass(frozen=True)
class Depths:
    """Steps and outcomes of some positions, by region, in order."""

    steps: Mapping[str, list[int]]
    outcomes: Mapping[str, list[int]]

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


class Depth:
    """Observes the loops of one call of the model: steps of every row, over all turns of a loop inside another one."""

    def __init__(self) -> None:
        self.steps: dict[str, Tensor] = {}
        self.outcomes: dict[str, Tensor] = {}

    def begin(self, name: str, x0: Tensor) -> None:
        """A loop starts."""

    def step(self, name: str, k: int, x: Tensor) -> None:
        """A loop has taken a step."""

    def end(self, name: str, steps: Tensor, outcome: Tensor) -> None:
        """A loop is over."""
        before = self.steps.get(name)
        self.steps[name] = steps if before is None else before + steps
        self.outcomes[name] = outcome

    def row(self, index: int) -> Depths:
        """What one entry of the batch came to."""
        return Depths(
            {name: steps[index].tolist() for name, steps in self.steps.items()},
            {name: outcome[index].tolist() for name, outcome in self.outcomes.items()},
        )


class HaltedLM(HFLM):
    """A model of transformers whose loops halt, as the harness wants it.

    Args:
        policy: a spec, or the path of a card that ``haltkit compare --save`` wrote; None: the model's own depth.
        max_steps, kv: as for :func:`haltkit.attach`.
        steps: a JSONL file to write, one line per request: task, document, request, and the steps of each token of its
            context and of its continuation, by region.
        arguments: those of ``HFLM``: ``pretrained``, ``batch_size``, ``dtype``, ...

    Raises:
        ValueError: a policy that pools tokens, at another batch size than 1: padding would change scores.
        FileError: ``steps`` cannot be written.
    """

    def __init__(
        self,
        *arguments: Any,
        policy: str | None = None,
        max_steps: int | None = None,
        kv: Any = "refuse",
        steps: str | None = None,
        **named: Any,
    ) -> None:
        self.policy, self.steps = policy, None if steps is None else check_output(steps, ("jsonl",))
        self.how: dict[str, Any] = {} if policy is None else {"max_steps": max_steps, "kv": kv}
        if policy is None and (max_steps is not None or kv != "refuse"):
            raise ValueError("max_steps and kv say how a policy halts: give policy= too, such as policy=fixed:steps=8")
        super().__init__(*arguments, **named)
        self._check_batch(named.get("batch_size", 1))
        self._counts: dict[str, dict[str, Histogram]] = {"context": {}, "continuation": {}}
        self._lines: list[str] = []
        self._seen: dict[tuple[int, ...], Depths] = {}  # by what the model was given
        self._generated: dict[str, list[Depths]] = defaultdict(list)  # by context
        self._newest: tuple[Tensor, Depth] | None = None
        self._row, self._contexts = 0, list[str]()
        self._pairs: list[tuple[Depths, int]] = []  # of the requests scored last, with the length of the continuation

    def _check_batch(self, batch_size: Any) -> None:
        if self.policy is None:
            return
        with attach(self.model, self.policy, **self.how) as session:
            pooled = {granularity_of(policy) for policy in session.policies.values()} - {"token"}
            session.detach()
        if pooled and str(batch_size) != "1":
            raise ValueError(
                f"batch_size={batch_size} with granularity={pooled.pop()}: padding and the other texts of a batch "
                "would decide about halting. Use batch_size=1, or granularity=token"
            )

    # --- passes

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        depth = Depth()
        with attach(self.model, self.policy, observer=depth, **self.how):
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
        self._newest, self._row = (inps, depth), 0
        return logits

    def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Tensor:
        """The harness takes the rows of the newest pass in order; ``inplen`` is a row's length without padding."""
        if self._newest is not None and inplen is not None:
            inputs, depth = self._newest
            self._seen[tuple(inputs[self._row, :inplen].tolist())] = depth.row(self._row).cut(0, inplen)
            self._row += 1
        chosen: Tensor = super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)
        return chosen

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **named: Any) -> Any:
        answers = super()._loglikelihood_tokens(requests, *arguments, **named)
        for _, context, continuation in requests:
            given = (context + continuation)[-(self.max_length + 1) :][:-1]
            self._pairs.append((self._seen[tuple(given)], len(continuation)))
        self._seen.clear()
        return answers

    def tok_batch_encode(self, strings: Any, *arguments: Any, **named: Any) -> Any:
        self._contexts = list(strings)
        return super().tok_batch_encode(strings, *arguments, **named)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **named: Any) -> Tensor:
        if self.policy is None:
            tokens: Tensor = super()._model_generate(context, max_length, stop, **named)
            return tokens
        named["custom_generate"] = generation(self.policy, **self.how)
        output: Any = super()._model_generate(context, max_length, stop, return_dict_in_generate=True, **named)
        for row, text in enumerate(self._contexts):
            found = {"steps": output.steps[row], "outcome": output.outcome[row]}
            steps, outcomes = (
                {name: values[:, i].tolist() for i, name in enumerate(output.regions)} for values in found.values()
            )
            self._generated[text].append(Depths(steps, outcomes))
        sequences: Tensor = output.sequences
        return sequences

    # --- requests

    def loglikelihood(self, requests: Any, *arguments: Any, **named: Any) -> Any:
        self._pairs.clear()
        answers = super().loglikelihood(requests, *arguments, **named)
        for request, (depths, continuation) in zip(requests, self._pairs, strict=True):
            self._note(request, [(depths, continuation)])
        self._write()
        return answers

    def loglikelihood_rolling(self, requests: Any, *arguments: Any, **named: Any) -> Any:
        self._pairs.clear()
        answers = super().loglikelihood_rolling(requests, *arguments, **named)
        pairs = iter(self._pairs)
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(
                token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            self._note(request, [next(pairs) for _ in windows])
        self._write()
        return answers

    def generate_until(self, requests: Any, *arguments: Any, **named: Any) -> Any:
        self._generated.clear()
        answers = super().generate_until(requests, *arguments, **named)
        for request in requests:
            if found := self._generated.get(request.args[0]):
                depths = found.pop(0)
                self._note(request, [(depths, max(map(len, depths.steps.values()), default=0))])
        self._write()
        return answers

    # --- what is reported

    def _note(self, request: Any, parts: Sequence[tuple[Depths, int]]) -> None:
        """Count a request's tokens, and keep its line: the last positions read predict the continuation."""
        line: dict[str, Any] = {"task": request.task_name, "doc": request.doc_id, "request": request.idx}
        for part in ("context", "continuation"):
            values: dict[str, list[int]] = line.setdefault(part, {})
            for depths, continuation in parts:
                length = max(map(len, depths.steps.values()), default=0)
                border = length - continuation
                cut = depths.cut(0, border) if part == "context" else depths.cut(border, length)
                for name, steps in cut.steps.items():
                    self._counts[part].setdefault(name, Histogram()).add(steps, cut.outcomes[name])
                    values.setdefault(name, []).extend(steps)
        self._lines.append(json.dumps(line))

    def _write(self) -> None:
        if self.steps is not None:
            write_text(self.steps, "".join(f"{line}\n" for line in self._lines))

    def get_model_info(self) -> dict[str, Any]:
        """What HFLM tells, and ``haltkit``: policy, card, and the steps of context and continuation by region."""
        card = None
        if self.policy is not None and is_card(self.policy):
            found = Card.load(self.policy)
            card = {"policy": found.policy, "model": found.model, "regions": list(found.regions), "about": found.about}
        counts = {
            part: {name: histogram.summary() for name, histogram in regions.items()}
            for part, regions in self._counts.items()
        }
        how = {name: value for name, value in self.how.items() if value is not None}
        return {**super().get_model_info(), "haltkit": {"policy": self.policy, **how, "card": card, **counts}}

    @property
    def model(self) -> nn.Module:
        found: nn.Module = super().model
        return found
