"""Ouro (``OuroForCausalLM``, arXiv 2510.25741): all layers and the final norm, ``total_ut_steps`` times.

The published code runs every step and then chooses, for each token, the step whose state goes to the LM head: the first
at which the exit probabilities of its gate add up to ``early_exit_threshold``. Its own rule is
``gate:tau=...,rule=cumulative`` with ``tau = 1 - early_exit_threshold``, and here the steps after it are not computed.
In a step after the halt the model is given the same state and gate again, so its own choice among the steps (a
threshold, or the mean weighted by the exit distribution) is that of the model run with as many steps.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from haltkit.attachment.description import Loop
from haltkit.protocol import Heads, Readout

__all__ = ["describe"]


def describe(model: nn.Module) -> tuple[Loop, Readout | None]:
    """The loop of ``OuroModel``; the state is the norm's output, which the LM head and the gate read as it is."""
    ouro: Any = model
    prefix, base = ("model.", ouro.model) if hasattr(ouro, "lm_head") else ("", ouro)
    gate_of = base.early_exit_gate

    def gate(x: Tensor) -> Tensor:
        return gate_of(x).squeeze(-1)  # type: ignore[no-any-return]

    body = (*(f"{prefix}layers.{i}" for i in range(len(base.layers))), f"{prefix}norm")
    return Loop(body=body, scope=prefix.rstrip(".")), Heads(getattr(ouro, "lm_head", None), gate)
