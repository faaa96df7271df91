"""OpenMythos: one block with loop-index embedding, LoRA and injection, and an ACT sum over iterations."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from haltkit.attachment.description import Loop
from haltkit.protocol import Heads, Readout

__all__ = ["describe"]


def describe(model: nn.Module) -> tuple[Loop, Readout | None]:
    """The recurrent block. Its result is a weighted sum over iterations, so the ACT head adds zero after the halt.

    That head is the gate; the model itself stops by ``gate:rule=sum`` with ``tau = 1 - act_threshold``.
    """
    mythos: Any = model
    act = mythos.recurrent.act

    def gate(x: Tensor) -> Tensor:
        return act.halt(x).squeeze(-1)  # type: ignore[no-any-return]

    body = tuple(f"recurrent.{name}" for name in ("norm", "block", "lora", "injection", "act"))
    loop = Loop(
        body=body,
        state="recurrent.injection",
        initial=None,  # the first module sees the state with the loop's index and the input mixed in
        scope="recurrent",
        on_halt={"recurrent.act": "zero"},
        carry=("recurrent.injection", 0),
    )
    return loop, Heads(None, gate)
