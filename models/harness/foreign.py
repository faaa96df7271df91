"""Models of transformers in the harness: ``HFLM`` with the loops of its passes halted from outside."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor

from haltkit.attachment.attach import attach
from haltkit.attachment.counting import Taken
from haltkit.attachment.generating import generation
from haltkit.models.harness.report import (
    Depths,
    Report,
    asked_policy,
    check_batch,
    log_standing,
    rolling_windows,
)
from haltkit.standing import PLAIN

__all__ = ["HaltedLM"]


class HaltedLM(HFLM):
    """A model of transformers whose loops halt, as the harness wants it.

    Args:
        policy: a spec, or the path of a card that ``haltkit compare --save`` wrote; None: the model's own depth.
        without_certificate: use the card also on another model than its own; see
            :meth:`haltkit.card.Card.without_certificate`.
        max_steps, kv: as for :func:`haltkit.attach`.
        steps: a JSONL file to write, one line per request: task, document, request, and the steps of each token of its
            context and of its continuation, by region.
        arguments: those of ``HFLM``: ``pretrained``, ``batch_size``, ``dtype``, ...

    Raises:
        ValueError: a policy that pools tokens, at another batch size than 1: padding would change scores; a card for
            another model, or for another full depth than ``max_steps``; ``steps`` in several processes.
        FileError: ``steps`` cannot be written.
    """

    def __init__(
        self,
        *arguments: Any,
        policy: str | None = None,
        without_certificate: bool = False,
        max_steps: int | None = None,
        kv: Any = "refuse",
        steps: str | None = None,
        **named: Any,
    ) -> None:
        self.given, self.policy = policy, asked_policy(policy, without_certificate)
        self.report, self.standing = Report(steps), PLAIN
        self.how: dict[str, Any] = {} if policy is None else {"max_steps": max_steps, "kv": kv}
        if policy is None and (max_steps is not None or kv != "refuse"):
            raise ValueError("max_steps and kv say how a policy halts: give policy= too, such as policy=fixed:steps=8")
        super().__init__(*arguments, **named)
        if steps is not None and self.world_size > 1:
            raise ValueError(
                f"steps={steps} is one file, and {self.world_size} processes share the requests: run one process, or "
                "leave steps= out"
            )
        self._halting = self._settled(named.get("batch_size", 1))
        self._seen: dict[tuple[int, ...], Depths] = {}  # by what the model was given
        self._generated: dict[str, list[Depths]] = defaultdict(list)  # by context
        self._newest: tuple[Tensor, Taken] | None = None
        self._row, self._contexts = 0, list[str]()
        self._pairs: list[tuple[Depths, int]] = []  # of the requests scored last, with the length of the continuation

    def _settled(self, batch_size: Any) -> dict[str, Any]:
        """How :func:`haltkit.attach` halts each call: a card is read, and held against the model's weights, once."""
        if self.policy is None:
            return {"policy": None}
        with attach(self.model, self.policy, **self.how) as session:
            session.detach()
        self.standing = session.standing
        log_standing(self.standing)
        check_batch(session.policies.values(), batch_size)
        found = {"loops": session.loops, "readout": session.readouts} if session.loops else {}  # it halts itself
        return {**self.how, "policy": session.policies, **found}

    # --- passes

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        taken = Taken()
        with attach(self.model, observer=taken, **self._halting):
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
        self._newest, self._row = (inps, taken), 0
        return logits

    def _select_cont_toks(self, logits: Tensor, contlen: int | None = None, inplen: int | None = None) -> Tensor:
        """The harness takes the rows of the newest pass in order; ``inplen`` is a row's length without padding."""
        if self._newest is not None and inplen is not None:
            inputs, taken = self._newest
            given = tuple(inputs[self._row, :inplen].tolist())
            self._seen[given] = Depths.of_row(taken.steps, taken.outcomes, self._row).cut(0, inplen)
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
        named["custom_generate"] = generation(**self._halting)
        output: Any = super()._model_generate(context, max_length, stop, return_dict_in_generate=True, **named)
        sequences: Tensor = output.sequences
        for row, text in enumerate(self._contexts):
            count = self._kept(sequences[row, context.shape[1] :].tolist(), stop)
            steps, outcomes = (
                {name: values[row, :count, i].tolist() for i, name in enumerate(output.regions)}
                for values in (output.steps, output.outcome)
            )
            self._generated[text].append(Depths(steps, outcomes))
        return sequences

    def _kept(self, tokens: list[int], stop: list[str]) -> int:
        """How many tokens of a continuation come before its end, with the one that completes a text of ``stop``: the
        other texts of the batch may go on after it."""

        def ended(count: int) -> bool:
            text = self.tok_decode(tokens[:count], skip_special_tokens=False)
            return any(word in text for word in stop if word)

        return bisect_left(range(1, len(tokens)), True, key=ended) + 1

    # --- requests

    def loglikelihood(self, requests: Any, *arguments: Any, **named: Any) -> Any:
        self._pairs.clear()
        answers = super().loglikelihood(requests, *arguments, **named)
        self.report.add((request, [pair]) for request, pair in zip(requests, self._pairs, strict=True))
        return answers

    def loglikelihood_rolling(self, requests: Any, *arguments: Any, **named: Any) -> Any:
        self._pairs.clear()
        answers = super().loglikelihood_rolling(requests, *arguments, **named)
        pairs = iter(self._pairs)
        self.report.add((request, [next(pairs) for _ in rolling_windows(self, request)]) for request in requests)
        return answers

    def generate_until(self, requests: Any, *arguments: Any, **named: Any) -> Any:
        """The harness's own continuations.

        Raises:
            ValueError: the model cannot generate.
        """
        if not self.model.can_generate():
            raise ValueError(
                f"{requests[0].task_name} is a task that generates, and {type(self.model).__name__} cannot: it is no "
                "GenerationMixin of transformers. Choose tasks that score texts (output_type multiple_choice, "
                "loglikelihood or loglikelihood_rolling)"
            )
        self._generated.clear()
        answers = super().generate_until(requests, *arguments, **named)
        found = ((request, self._generated.get(request.args[0])) for request in requests)
        self.report.add((request, [(one, len(one))]) for request, kept in found if kept for one in [kept.pop(0)])
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """What HFLM tells, and ``haltkit``: policy, card, and the steps of context and continuation by region."""
        return {
            **super().get_model_info(),
            "haltkit": self.report.summary(self.given, self.policy, self.standing, self.how),
        }

    @property
    def model(self) -> Any:
        return super().model
