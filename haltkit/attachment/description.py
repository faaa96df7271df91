"""The description of a loop in a foreign model, as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from haltkit.attachment.errors import AttachError, ScriptModuleUnsupported, StateShapeChanged, UnknownModule
from haltkit.attachment.outputs import first_tensor, with_first_tensor
from haltkit.protocol import check_count

__all__ = ["Action", "Initial", "Loop", "call_parts", "check_model", "find_call", "find_module"]

CODE = {"code": True}  # marks the fields for functions, which no file can contain

Action = Literal["replay", "zero", "identity"] | Callable[[Any], Any]
# From the positional and keyword arguments of the body's first call to x_0.
Initial = Callable[[tuple[Any, ...], dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Loop:
    """A loop, described by the modules that it calls.

    Args:
        body: dotted paths of the modules that one iteration calls, in call order, including those called after the
            state (an exit head). A module called several times per iteration is named once. Everything that carries
            the loop's state from one iteration to the next must pass through them. ``"module:method"`` names a method
            other than ``forward``, and ``":method"`` one of the model itself: a method that takes one whole step can
            be the body where the state changes outside of any module (``h = h + e; h = h + f(h)``).
        state: the module whose output is the state ``x_k``; the last of ``body`` if None.
        select: from that module's output to the state; None takes a tensor as it is, the first entry of a tuple or
            of a dataclass. The state's first dimension is the batch and its last the features: where the model has
            them elsewhere (time first, say), ``select``, ``put`` and ``initial`` move them.
        put: from (output, new state) to the output that carries it; only needed with ``select``.
        initial: where ``x_0`` is: the position or name of an argument of the first module's first call, a function
            of its arguments and keyword arguments, or None if it is not among them (``d_1`` is then not defined).
        period: outputs of the state module that make one iteration, the last of which is ``x_k``.
        scope: ``"module"`` or ``"module:method"``: entering it starts a new loop.
        reset_on: modules of an enclosing loop whose call ends this loop, so that the next one is new.
        on_halt: what a body module gives after the halt. ``replay`` (the default): its output of the last complete
            iteration. ``zero``: zeros, for what is accumulated over iterations. ``identity``: its own input. A
            function: what it makes of that last output, for a loop that goes on until the output says that it is over
            (``while not carry.halted.all()``); all rows of such a loop have to halt together.
        carry: (body module, position of an argument) where the state enters the next iteration, for the check that
            nothing drifts after the halt; by default every tensor that a body module is given. Needed where those
            change for another reason, such as a loop-index embedding.
        copies: the model or the body changes states in place (``x += ...``): keep copies of what the body's modules
            return, at the cost of one more copy of each output in every iteration.
        refuse: is given the arguments of each call of the scope; raises where the loop cannot be halted.
    """

    body: Sequence[str]
    state: str | None = None
    select: Callable[[Any], Tensor] | None = field(default=None, metadata=CODE)
    put: Callable[[Any, Tensor], Any] | None = field(default=None, metadata=CODE)
    initial: int | str | Initial | None = 0
    period: int = 1
    scope: str = ""
    reset_on: Sequence[str] = ()
    on_halt: Mapping[str, Action] = field(default_factory=dict)
    carry: tuple[str, int] | None = None
    copies: bool = False
    refuse: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = field(default=None, metadata=CODE)

    def __post_init__(self) -> None:
        if isinstance(self.body, str) or not isinstance(self.body, Iterable) or not self.body:
            raise ValueError(f"body={self.body!r}: a list of module paths is expected, in call order")
        if not isinstance(self.reset_on, Iterable):
            raise ValueError(f"reset_on={self.reset_on!r}: a list of module paths is expected")
        object.__setattr__(self, "body", tuple(self.body))
        object.__setattr__(
            self, "reset_on", (self.reset_on,) if isinstance(self.reset_on, str) else tuple(self.reset_on)
        )
        paths = (*self.body, *self.reset_on, self.state_module, self.scope)
        if wrong := [path for path in paths if not isinstance(path, str)]:
            raise ValueError(f"{wrong[0]!r} is no path of a module: paths are texts, such as 'layers.0'")
        if len(set(self.body)) != len(self.body):
            raise ValueError(f"body={list(self.body)}: name each module once, also one that is called several times")
        if self.state_module not in self.body:
            raise ValueError(f"state={self.state!r} is not one of the body's modules: {', '.join(self.body)}")
        check_count("period", self.period)
        if (self.select is None) != (self.put is None):
            raise ValueError("select and put belong together: one takes the state out of the output, one puts it back")
        if self.carry is not None and self.carry[0] not in self.body:
            raise ValueError(f"carry names {self.carry[0]!r}, which is not one of the body's modules")
        for name, action in self.on_halt.items():
            if name not in self.body:
                raise ValueError(f"on_halt names {name!r}, which is not one of the body's modules")
            if action not in ("replay", "zero", "identity") and not callable(action):
                raise ValueError(f"on_halt={action!r} for {name!r}: allowed are replay, zero, identity, or a function")

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Loop:
        """A description from its fields by name.

        Raises:
            ValueError: no body, or a name that is not a field's (the known ones are listed).
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in fields if name not in known]:
            raise ValueError(f"a loop is not described by {', '.join(unknown)}; its fields are {', '.join(known)}")
        if "body" not in fields:
            raise ValueError(
                f"{', '.join(fields)} belong to a description by fields, which needs body=; a Loop, a saved choice and "
                "a preset have their own"
            )
        return cls(**fields)

    @property
    def functions(self) -> list[str]:
        """The fields of this description that are functions, or have them."""
        found = [field.name for field in dataclasses.fields(self) if callable(getattr(self, field.name))]
        return [*found, *(["on_halt"] if self.halts_whole else [])]

    @property
    def halts_whole(self) -> bool:
        """All rows have to halt together, because the loop goes on until an output says that it is over."""
        return any(callable(action) for action in self.on_halt.values())

    @property
    def state_module(self) -> str:
        """The path of the module whose output is the state."""
        return self.body[-1] if self.state is None else self.state

    @property
    def scope_module(self) -> str:
        return call_parts(self.scope)[0]

    @property
    def scope_method(self) -> str:
        return call_parts(self.scope)[1]

    def state_of(self, output: Any) -> Tensor:
        """The state inside the state module's output."""
        if self.select is not None:
            return self.select(output)
        found = first_tensor(output)
        if found is not None:
            return found
        raise AttachError(
            f"the output of {self.state_module!r} is a {type(output).__name__}, in which the state is not obvious: "
            "say select=, from the output to the state, and put=, from (output, state) to the output"
        )

    def with_state(self, output: Any, x: Tensor) -> Any:
        """The output with another state in it, of the same type."""
        if self.put is not None:
            return self.put(output, x)
        return with_first_tensor(output, x)

    def initial_state(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """``x_0``, from the arguments of the first body call."""
        if self.initial is None:
            return None
        if callable(self.initial):
            return self.initial(args, kwargs)
        found: Any = None
        if isinstance(self.initial, str):
            found = kwargs.get(self.initial)
        elif self.initial < len(args):
            found = args[self.initial]
        if not isinstance(found, Tensor):
            raise AttachError(
                f"argument {self.initial!r} of {self.body[0]!r} is not a tensor, so it is not x_0: say initial=, the "
                "argument's position or name, a function of the arguments, or None if x_0 cannot be had"
            )
        return found

    def start(self, x0: Tensor | None, x1: Tensor) -> Tensor:
        """Where the first step begins, which gave ``x1``: at ``x0``, or at infinity where it cannot be had.

        Without an ``x_0`` the first step is not defined: an infinite one makes every signal of it +inf.

        Raises:
            StateShapeChanged: the two have different shapes, so one of them is not the state.
        """
        if x0 is None:
            return torch.full_like(x1, torch.inf)
        if x0.shape != x1.shape:
            raise StateShapeChanged(
                f"x_0, taken from the first call of {self.body[0]!r}, is {tuple(x0.shape)}, and the state "
                f"{tuple(x1.shape)}. One of the two is not what the loop carries: say state= (and select=) if it is "
                "the output, initial= if it is the argument, or initial=None if x_0 cannot be had"
            )
        return x0.detach()


def call_parts(path: str) -> tuple[str, str]:
    """The module and the method that ``"module:method"`` names; ``"module"`` is its ``forward``."""
    module, _, method = path.partition(":")
    return module, method or "forward"


def check_model(model: Any) -> None:
    """Refuse what has no modules to attach to.

    Raises:
        ValueError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is a {type(model).__name__}: a torch.nn.Module is expected")


def find_call(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module and the method that ``"module:method"`` names in a model.

    Raises:
        UnknownModule: no such module, or it has no such method.
        ScriptModuleUnsupported: the module is scripted.
    """
    name, method = call_parts(path)
    module = find_module(model, name)
    if not callable(getattr(module, method, None)) or isinstance(getattr(module, method), nn.Module):
        raise UnknownModule(f"{path!r}: {name or type(module).__name__} has no method {method!r}")
    return module, method


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path; ``""`` is the model.

    Raises:
        UnknownModule: none there; what is there instead is listed.
        ScriptModuleUnsupported: it is scripted.
    """
    module = model
    for part in path.split(".") if path else []:
        children = dict(module.named_children())
        if part not in children:
            known = ", ".join(children) or "none"
            raise UnknownModule(f"no module {path!r} in {type(model).__name__}: {part!r} is not one of {known}")
        module = children[part]
    if isinstance(module, torch.jit.ScriptModule):
        raise ScriptModuleUnsupported(f"{path!r} is a scripted module: attach to the model before scripting it")
    return module
