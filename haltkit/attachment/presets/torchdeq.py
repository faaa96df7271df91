"""torchdeq: a solver calls the user's ``f`` until the residual is small; ``f``'s modules are the loop's body.

Two solvers carry nothing from one iteration to the next but ``f``'s own output: ``fixed_point_iter`` with ``tau`` 1 and
``simple_fixed_point_iter`` (which has the same ``tau``). The others mix earlier iterates in, outside every module, so a
halt of ``f`` does not halt them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from haltkit.attachment.description import Loop
from haltkit.attachment.errors import AttachError, GlueDrift
from haltkit.protocol import Readout

__all__ = ["describe", "find_deq"]

ALLOWED = ("fixed_point_iter", "simple_fixed_point_iter")


def find_deq(model: nn.Module) -> str | None:
    """The path of the DEQ module that ``get_deq`` made, if there is one."""
    found = (path for path, m in model.named_modules() if any(c.__name__ == "DEQBase" for c in type(m).__mro__))
    return next(iter(found), None)


def describe(model: nn.Module, body: Sequence[str] = (), deq: str | None = None) -> tuple[Loop, Readout | None]:
    """The solver's forward loop around ``body``, the modules that ``f`` calls, in call order.

    The first of them is given the state, the last one's output is ``f``'s. Whether a halt gives what the solver returns
    with that many iterations also depends on its choice of the iterate with the smallest residual: ``verify`` tells.

    Raises:
        AttachError: ``body`` is missing, or there is no DEQ module.
        GlueDrift: the solver is not one that can be halted.
    """
    path = find_deq(model) if deq is None else deq
    if path is None:
        raise AttachError(f"there is no DEQ module of torchdeq in {type(model).__name__}")
    solver = getattr(model.get_submodule(path).f_solver, "__name__", "another")
    if solver not in ALLOWED:
        raise GlueDrift(
            f"the solver {solver} mixes earlier iterates into the next one, outside every module: halting its function "
            f"would not halt it. Use {' or '.join(ALLOWED)}, or record it only"
        )
    if not body:
        raise AttachError(
            "torchdeq calls a function of yours, so haltkit cannot know its modules: say attach(model, policy, "
            "haltkit.attachment.presets.torchdeq.describe(model, body=[modules that your function calls])[0])"
        )
    return Loop(body=tuple(body), scope=path, refuse=_damped), None


def _damped(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    options = kwargs.get("solver_kwargs") or (args[2] if len(args) > 2 else None) or {}
    if options.get("tau", 1.0) != 1.0:
        raise GlueDrift(
            f"the solver is damped (tau={options['tau']}): it mixes the last iterate into the next one, outside every "
            "module, so halting its function would not halt it. Use tau=1"
        )
