"""transformers' ``generate`` with a policy: ``model.generate(..., custom_generate=haltkit.generation(policy))``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from haltkit.attachment.attach import attach
from haltkit.attachment.description import Loop
from haltkit.attachment.kv import KVMode
from haltkit.protocol import Readout
from haltkit.specs import Policies

__all__ = ["Generation", "generation"]

SUPPORTED = ("greedy_search", "sample")


def generation(
    policy: Policies | PathLike[str],
    *,
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
    criteria and streamers are what they are without haltkit. The model is attached for the time of the call.

    With ``return_dict_in_generate=True`` the output has three more fields, for the position that each new token was
    read from. ``steps``, ``(batch, new tokens, regions)`` int64: the steps it took, over all turns of a loop that runs
    inside another one. ``outcome``, of the same shape, int8: an :class:`~haltkit.Outcome` each, of the newest turn.
    ``regions``: their names, in that order. Entries that have ended go on as padding, and are counted.

    Args:
        policy, max_steps, total_steps, loop, loops, readout, kv, kv_stride, check, fields: as for
            :func:`haltkit.attach`. A cache whose slots belong to iterations needs a ``kv`` other than ``refuse`` where
            the depth varies from token to token. Without one (``use_cache=False``) every token is exact at its own
            depth.

    Returns:
        a callable, to be used in as many calls, and on as many models, as it fits.

    Raises:
        AttachError: from ``generate``: the model's loop cannot be halted as described.
        ValueError: from ``generate``: beam search, assisted generation, an encoder-decoder, or attention that is not
            causal; a bad policy.
    """
    how = dict(fields, max_steps=max_steps, total_steps=total_steps, loop=loop, loops=loops, readout=readout)
    return Generation(policy, {**how, "kv": kv, "kv_stride": kv_stride, "check": check})


@dataclass(frozen=True)
class Generation:
    """See :func:`generation`.

    Attributes:
        policy: what decides.
        how: the other arguments of :func:`haltkit.attach`.
    """

    policy: Policies | PathLike[str]
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
        counter = _Counter(len(input_ids))
        with attach(model, self.policy, observer=counter, **self.how) as session:
            calls = model.register_forward_pre_hook(counter.call_begins)
            try:
                output = model._sample(
                    input_ids,
                    logits_processor=type(logits_processor)([*logits_processor, counter]),
                    stopping_criteria=stopping_criteria,
                    generation_config=generation_config,
                    streamer=given.get("streamer", streamer),
                    **model_kwargs,
                )
            finally:
                calls.remove()
        if generation_config.return_dict_in_generate:
            new = output.sequences.shape[1] - input_ids.shape[1]
            output["regions"] = session.regions
            output["steps"] = counter.stacked(counter.steps, session.regions)[:, :new]
            output["outcome"] = counter.stacked(counter.outcomes, session.regions)[:, :new]
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


@dataclass
class _Counter:
    """Steps of each new token: it observes the loops, and is the last logits processor, called once per token."""

    batch: int
    steps: dict[str, list[Tensor]] = field(default_factory=dict)
    outcomes: dict[str, list[Tensor]] = field(default_factory=dict)
    _newest: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of the call in progress, by region

    def begin(self, name: str, x0: Tensor) -> None:
        """A loop starts."""

    def step(self, name: str, k: int, x: Tensor) -> None:
        """A loop has taken a step."""

    def end(self, name: str, steps: Tensor, outcome: Tensor) -> None:
        """A loop is over: what it came to at the last position, from which the next token is read."""
        if steps.ndim != 2 or len(steps) != self.batch:
            raise ValueError(
                f"region {name!r}: its state has rows {tuple(steps.shape)}, and (batch, tokens) with batch "
                f"{self.batch} is needed to know which of them a new token is read from"
            )
        before, _ = self._newest.get(name, (0, None))
        self._newest[name] = before + steps[:, -1], outcome[:, -1]

    def call_begins(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """The model is called; a long prompt may take several calls, of which the last one gives the token."""
        self._newest.clear()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A token is about to be chosen."""
        for name, (steps, outcome) in self._newest.items():
            self.steps.setdefault(name, []).append(steps)
            self.outcomes.setdefault(name, []).append(outcome)
        return scores

    @staticmethod
    def stacked(found: Mapping[str, list[Tensor]], regions: tuple[str, ...]) -> Tensor:
        """``(batch, new tokens, regions)``."""
        return torch.stack([torch.stack(found[name], 1) for name in regions], -1)
