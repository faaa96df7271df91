"""What a description's ``on_halt`` makes of the outputs of body modules once rows have halted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from haltkit.attachment.description import Loop
from haltkit.attachment.errors import AttachError
from haltkit.attachment.outputs import first_tensor, map_tensors, with_first_tensor

__all__ = ["act_on_stopped", "identity", "zeroed"]


def act_on_stopped(
    loop: Loop, name: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any], stopped: Tensor
) -> Any:
    """What ``on_halt`` says of a body module, for the rows that had halted when this iteration began.

    Args:
        loop: the description.
        name: of the module.
        output: what it gave.
        args, kwargs: what it was given.
        stopped: those rows, ``(rows...)`` bool.
    """
    action = loop.on_halt.get(name, "replay")
    if action == "replay" or callable(action):
        return output

    def masked(tensor: Tensor) -> Tensor:
        return stopped.view(*stopped.shape, *[1] * (tensor.ndim - stopped.ndim))

    if action == "zero":
        return zeroed(loop, name, output, lambda t: t.masked_fill(masked(t), 0))
    held = identity(loop, name, output, args, kwargs)
    if name == loop.state_module:
        passed_on, computed = loop.state_of(held), loop.state_of(output)
        return loop.with_state(output, torch.where(masked(computed), passed_on, computed))
    before, after = first_tensor(held), first_tensor(output)
    if before is None or after is None:
        return output
    return with_first_tensor(output, torch.where(masked(after), before, after))


def zeroed(loop: Loop, name: str, output: Any, zeros: Callable[[Tensor], Tensor]) -> Any:
    """What the model sums up is zero: the state of the state module, every tensor that another one gives."""
    if name == loop.state_module:
        return loop.with_state(output, zeros(loop.state_of(output)))
    return map_tensors(zeros, output)


def identity(loop: Loop, name: str, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An output of a body module with its own input in place of what it made of it.

    Raises:
        AttachError: where in the output that belongs is not obvious.
    """
    given = _input(loop, name, args, kwargs)
    if name == loop.state_module:
        loop.state_of(output)
        return loop.with_state(output, given)
    if first_tensor(output) is None:
        raise AttachError(
            f"on_halt='identity' for {name!r}: it returns a {type(output).__name__}, in which what it makes of its "
            "input is not obvious. Only a tensor, or a tuple or dataclass that begins with one, can be replaced"
        )
    return with_first_tensor(output, given)


def _input(loop: Loop, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a map of the state is given: for the first module what the description names, or its first argument."""
    where = loop.initial if name == loop.body[0] else 0
    if isinstance(where, str) and where in kwargs:
        return kwargs[where]
    if isinstance(where, int) and where < len(args):
        return args[where]
    return args[0] if args else next(iter(kwargs.values()))
