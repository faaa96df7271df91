"""Which modules of a model look like an exit head: a guess by name and shape."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

__all__ = ["ExitHead", "exit_heads"]

SURE = re.compile(r"halt|exit|ponder|(^|_)q_(head|halt)", re.IGNORECASE)
GATE = re.compile(r"gate", re.IGNORECASE)


@dataclass(frozen=True)
class ExitHead:
    """A linear map from the state to one number or two whose name speaks of halting.

    Attributes:
        path: of the linear map.
        outputs: 1: the logit to exit. 2: to halt and to go on, in this order (as HRM has them).
    """

    path: str
    outputs: int

    @property
    def advice(self) -> str:
        """What to do with it, in a line."""
        module = "model." + re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", self.path)
        logit = f"{module}(x).squeeze(-1)" if self.outputs == 1 else f"-{module}(x).diff(dim=-1).squeeze(-1)"
        return (
            f"{self.path} looks like an exit head, by its name alone. If it is one, and reads the state as it is, halt "
            f"by it: readout=haltkit.Heads(None, lambda x: {logit}), policy gate:tau=0.5"
        )


def exit_heads(model: nn.Module, bodies: Sequence[str]) -> tuple[ExitHead, ...]:
    """The linear maps of a model that look like exit heads.

    Args:
        model: the model.
        bodies: paths of modules that loops call. What is called a gate inside one of these, such as what mixes the
            branches of a layer, is not taken for an exit.
    """
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module.out_features > 2:
            continue
        callers = [body for body in bodies if path == body or path.startswith(f"{body}.")]
        if SURE.search(path) or (GATE.search(path) and all(GATE.search(body) for body in callers)):
            found.append(ExitHead(path, module.out_features))
    return tuple(found)
