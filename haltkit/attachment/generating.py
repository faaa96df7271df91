"""transformers' ``generate`` with a policy: ``model.generate(..., custom_generate=haltkit.generation(policy))``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment.attach import attach
from haltkit.attachment.counting import Taken
from haltkit.attachment.description import Loop
from haltkit.attachment.kv import KVMode
from haltkit.card import Card
from haltkit.loop import Outcome
from haltkit.protocol import Readout
from haltkit.specs import Policies

__all__ = ["Generation", "generation"]

SUPPORTED = ("greedy_search", "sample")


def generation(
    policy: Policies | Card | PathLike[str],
    *prepared: Any,
    max_steps: int | Mapping[str, int] | None = None,
    total_steps: int | None = None,
    loop: Loop | None = None,
    loops: Mapping[str, Loop] | None = None,
    readout: Readout | Mapping[str, Readout] | None = None,
    kv: KVMode = "refuse",
    kv_stride: int | None = None,
    check: bool = True,
    **fields: Any,
) -> Generation:
    """What transformers' ``generate`` takes as ``custom_generate``, to halt the model's loops while it generates::

        out = model.generate(
            **inputs,
            custom_generate=haltkit.generation("norm:tau=0.2", max_steps=32, kv="copy"),
            return_dict_in_generate=True,
        )
        out.sequences, out.steps, out.outcome

    The loop over tokens is transformers' own, so greedy decoding, sampling, padded batches, logits processors, stopping
    criteria and streamers are what they are without haltkit. (Not so ``stop_strings=``: transformers hands no tokenizer
    on to a callable. Give ``stopping_criteria=[StopStringCriteria(tokenizer, [...])]``.) The model is attached for the
    time of the call.

    With ``return_dict_in_generate=True`` the output has more fields, for the position that each new token was
    read from. ``steps``, ``(batch, new tokens, regions)`` int64: the steps it took, over all turns of a loop that runs
    inside another one. ``outcome``, of the same shape, int8: an :class:`~haltkit.Outcome` each, of the newest turn.
    ``regions``: their names, in that order. ``standing``: what is promised of a policy from a card, or what it is used
    without, as text. Entries that have ended go on as padding, and are counted; a region that
    did not run for a token has 0 steps, ``ABSENT``.

    Args:
        policy, max_steps, total_steps, loop, loops, readout, kv, kv_stride, check, fields: as for
            :func:`haltkit.attach`. A cache whose slots belong to iterations needs a ``kv`` other than ``refuse`` where
            the depth varies from token to token. Without one (``use_cache=False``) every token is exact at its own
            depth.
        prepared: nothing. It is what ``generate`` hands over where this function was given without a call of it.

    Returns:
        a callable, to be used in as many calls, and on as many models, as it fits.

    Raises:
        AttachError: from ``generate``: the model's loop cannot be halted as described.
        ValueError: an observer. From ``generate``: beam search, assisted generation, an encoder-decoder, or attention
            that is not causal; a bad policy; this function in place of what it returns.
    """
    if prepared:
        raise ValueError(
            "custom_generate=haltkit.generation is the function itself: call it with a policy, as in "
            "custom_generate=haltkit.generation('norm:tau=0.2', max_steps=32)"
        )
    if "observer" in fields:
        raise ValueError(
            "haltkit.generation counts steps by an observer of its own: use haltkit.attach(model, policy, "
            "observer=...) around model.generate(...) to record"
        )
    how = dict(fields, max_steps=max_steps, total_steps=total_steps, loop=loop, loops=loops, readout=readout)
    return Generation(policy, {**how, "kv": kv, "kv_stride": kv_stride, "check": check})


@dataclass(frozen=True)
class Generation:
    """See :func:`generation`.

    Attributes:
        policy: what decides.
        how: the other arguments of :func:`haltkit.attach`.
    """

    policy: Policies | Card | PathLike[str]
    how: Mapping[str, Any]

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding method that ``generate`` calls, with what it has prepared."""
        given = _arguments_of_generate()
        _check_mode(model, generation_config, given)
        taken = Taken()
        with attach(model, self.policy, observer=taken, **self.how) as session:
            counter = _Counter(len(input_ids), taken, session.regions)
            calls = model.register_forward_pre_hook(counter.call_begins)
            try:
                output = model._sample(
                    input_ids,
                    logits_processor=type(logits_processor)([counter, *logits_processor]),
                    stopping_criteria=stopping_criteria,
                    generation_config=generation_config,
                    streamer=given.get("streamer", streamer),
                    **model_kwargs,
                )
            finally:
                calls.remove()
        if generation_config.return_dict_in_generate:
            new = output.sequences.shape[1] - input_ids.shape[1]
            output["regions"], output["standing"] = session.regions, str(session.standing)
            output["steps"] = torch.stack(counter.steps, 1)[:, :new]
            output["outcome"] = torch.stack(counter.outcomes, 1)[:, :new]
        return output


def _arguments_of_generate() -> Mapping[str, Any]:
    """What ``generate`` was called with: it does not hand ``streamer`` and ``assistant_model`` on to a callable."""
    from transformers import GenerationMixin

    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return {} if frame is None else frame.f_locals


def _check_mode(model: Any, config: Any, given: Mapping[str, Any]) -> None:
    """Whether tokens are chosen one at a time, from one model that is causal.

    Raises:
        ValueError: they are not.
    """
    mode = config.get_generation_mode(given.get("assistant_model")).value
    if mode not in SUPPORTED:
        raise ValueError(
            f"haltkit.generation does not do {mode.replace('_', ' ')}: use greedy decoding or sampling (num_beams=1, "
            "no assistant_model, no prompt lookup)"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"haltkit.generation is for causal models, and {type(model).__name__} is an encoder and a decoder: use "
            "haltkit.attach around model.generate(...)"
        )
    flags = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    if flags and not any(flags):
        raise ValueError(
            f"haltkit.generation is for causal models, and every position of this {type(model).__name__} sees those "
            "after it: each new token would change the steps of all others. Make a decoder of it (config.is_decoder), "
            "or use haltkit.attach around calls of the model"
        )


class _Counter:
    """Steps of each new token: the first logits processor, which is called once per token.

    Later processors may call the model themselves (classifier-free guidance): these loops choose no token.

    Attributes:
        taken: observes the loops.
        steps, outcomes: of each token, ``(batch, regions)``.
    """

    def __init__(self, batch: int, taken: Taken, regions: Sequence[str]) -> None:
        self.batch, self.taken, self.regions = batch, taken, regions
        self.steps, self.outcomes = list[Tensor](), list[Tensor]()

    def call_begins(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """The model is called; a long prompt may take several calls, of which the last one gives the token."""
        self.taken.clear()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A token is about to be chosen: note what the loops came to at the last position, from which it is read."""
        steps, outcomes = zip(*(self._last(name, scores.device) for name in self.regions), strict=True)
        self.steps.append(torch.stack(steps, -1))
        self.outcomes.append(torch.stack(outcomes, -1))
        return scores

    def _last(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Steps and outcome of a region at the last position, ``(batch,)`` each; none where it has not run."""
        if name not in self.taken.steps:
            none = torch.zeros(self.batch, dtype=torch.int64, device=device)
            return none, torch.full_like(none, Outcome.ABSENT, dtype=torch.int8)
        steps, outcome = self.taken.steps[name], self.taken.outcomes[name]
        if steps.ndim != 2 or len(steps) != self.batch:
            raise ValueError(
                f"region {name!r}: its state has rows {tuple(steps.shape)}, and (batch, tokens) with batch "
                f"{self.batch} is needed to know which of them a new token is read from"
            )
        return steps[:, -1], outcome[:, -1]
