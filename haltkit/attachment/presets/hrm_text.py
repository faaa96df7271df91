"""HRM-text (transformers): ``L_cycles`` passes of the L module, then one of the H module, ``H_cycles`` times.

:func:`describe` is the outer loop, whose state is ``z_H``; :func:`describe_inner` the inner one, whose state is
``z_L``. One policy for the model halts the outer one; ``"high=...;low=..."`` halts both.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from haltkit.attachment.description import Loop
from haltkit.protocol import Readout

__all__ = ["describe", "describe_inner", "regions"]


def _base(model: Any) -> tuple[str, Any]:
    return ("model.", model.model) if hasattr(model, "lm_head") else ("", model)


def describe(model: nn.Module) -> tuple[Loop, Readout | None]:
    """The outer loop; the final norm is inside the stack, so the LM head reads any state."""
    prefix, base = _base(model)

    def initial(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return args[0] - base.z_L_init.to(args[0])  # type: ignore[no-any-return]  # the first input is z_L + z_H

    loop = Loop(body=(f"{prefix}L_module", f"{prefix}H_module"), initial=initial, scope=prefix.rstrip("."))
    return loop, getattr(model, "lm_head", None)


def describe_inner(model: nn.Module) -> tuple[Loop, Readout | None]:
    """The inner loop, which starts over at every call of the H module; its ``x_0`` is not passed to any module."""
    prefix, _ = _base(model)
    loop = Loop(body=(f"{prefix}L_module",), initial=None, scope=prefix.rstrip("."), reset_on=(f"{prefix}H_module",))
    return loop, None


def regions(model: nn.Module) -> dict[str, tuple[Loop, Readout | None]]:
    """Both loops by name."""
    return {"high": describe(model), "low": describe_inner(model)}
