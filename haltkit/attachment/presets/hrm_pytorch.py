"""hrm-pytorch (``HRM`` of ``HRM.hrm`` and of ``HRM.hrm_with_act``): networks of a hierarchy, the lowest the most often.

A reasoning step ends with a call of the highest network, whose output is the state. With ACT the model halts a whole
sequence at the end of the first such step at which the probability to halt is above the one to go on. That is
``gate:tau=0.5,granularity=sequence``, and the model is then called with ``adaptive_compute=False``: where it halts by
itself, it takes sequences out of the batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from haltkit.attachment.description import Loop
from haltkit.protocol import Heads, Readout

__all__ = ["describe"]


def describe(model: nn.Module) -> tuple[Loop, Readout | None]:
    """The reasoning steps; the gate is the halt logit minus the continue logit, where the model has them."""
    hrm: Any = model
    body = tuple(f"{name}.{i}" for i in range(len(hrm.networks)) for name in ("hidden_combiners", "networks"))
    loop = Loop(body=body, initial=None)  # the first module is given all states side by side
    if not hasattr(hrm, "to_q_halt_continue"):
        return loop, hrm.to_pred

    def gate(x: Tensor) -> Tensor:
        halts, goes_on = hrm.to_q_halt_continue(x)
        return (halts - goes_on).unsqueeze(-1).expand(x.shape[:-1])  # type: ignore[no-any-return]

    return loop, Heads(hrm.to_logits, gate)
