"""A proposal of how to describe a loop, and how it is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from haltkit.attachment.description import Action
from haltkit.attachment.exits import ExitHead
from haltkit.attachment.leaf import Leaf, replaced_text

__all__ = ["Candidate", "Discovery", "Ending", "Flag"]


@dataclass(frozen=True)
class Flag:
    """A truth in an output, one or a tensor of them, that says that the model's own loop is over.

    Attributes:
        leaf: where it is.
        over: what it is then.
    """

    leaf: Leaf
    over: bool

    def set(self, output: Any, over: bool) -> Any:
        """The output with the flag saying that the loop is over, or that it is not."""
        found, value = self.leaf.get(output), self.over if over else not self.over
        return self.leaf.put(output, torch.full_like(found, value) if isinstance(found, Tensor) else value)

    def text(self, output: Any) -> str:
        """What says that the loop is over, as code; ``output``: an example of what it is in."""
        if not isinstance(self.leaf.get(output), Tensor):
            return str(self.over)
        return f"torch.{'ones' if self.over else 'zeros'}_like({self.leaf.text('out')})"


@dataclass(frozen=True)
class Ending:
    """The flags by which a loop ends, as a function for ``on_halt``, and as the code of one."""

    flags: tuple[Flag, ...]
    code: str

    @classmethod
    def of(cls, flags: Sequence[Flag], output: Any) -> Ending:
        """``output``: an example of what the flags are in."""
        return cls(tuple(flags), replaced_text("out", {flag.leaf: flag.text(output) for flag in flags}))

    def __call__(self, output: Any) -> Any:
        for flag in self.flags:
            output = flag.set(output, over=True)
        return output

    def goes_on(self, output: Any) -> Any:
        """The output with every flag saying that the loop is not over."""
        for flag in self.flags:
            output = flag.set(output, over=False)
        return output

    def __repr__(self) -> str:
        return f"lambda out: {self.code}"


@dataclass(frozen=True)
class Candidate:
    """A group of modules that run again and again, and what was found about the loop that calls them.

    Attributes:
        body, period, scope, state, initial, on_halt, reset_on: see :class:`~haltkit.attachment.description.Loop`.
        iterations: of the loop, in one call of the scope.
        leaf: where the state is in the state module's output, if :class:`Loop` would not look there by itself.
        irregular: modules of the body that also run outside of the loop.
        copies: the model changes what it got in place, so copies must be kept.
        halted_at: the step at which a halt was tried on the model; 0: none was.
        problem: why that halt did not hold; empty if it did.
        compared: the halt was compared with the model run with as many steps.
        together: entries of the batch must halt together, because the loop carries more than its state.
        around: the loop is outside of the model: the description is one of :class:`haltkit.LoopAround`, whose part
            ``"model"`` is the model.
        check: False where the halt equals that, and yet something that the body is given goes on changing.
    """

    body: tuple[str, ...]
    iterations: int
    period: int
    scope: str
    state: str
    initial: int | str | None = 0
    on_halt: dict[str, Action] = field(default_factory=dict)
    reset_on: tuple[str, ...] = ()
    leaf: Leaf | None = None
    irregular: tuple[str, ...] = ()
    copies: bool = False
    halted_at: int = 0
    problem: str = ""
    compared: bool = False
    check: bool = True
    together: bool = False
    around: bool = False

    @property
    def holds(self) -> bool:
        """A halt was tried, and holds."""
        return self.halted_at > 0 and not self.problem

    @property
    def verdict(self) -> str:
        """What trying a halt has shown, in a sentence."""
        if self.problem:
            return (
                f"A halt at {self.halted_at} does not hold yet: {self.problem}. If no description fits, put the loop "
                "alone into a module, a method or a run of its own, and discover that"
            )
        where = ". The loop is around the model: session.model(...) runs it, with what run takes" if self.around else ""
        if self.halted_at:
            how = "equals the model run with as many" if self.compared else "holds; run_at= compares what it gives"
            rest = ""
            if self.together:
                rest = "; entries of a batch cannot halt alone, so halt whole batches (granularity=batch)"
            elif any(callable(action) for action in self.on_halt.values()):
                rest = "; it ends by what the model says, so halt whole batches (granularity=batch)"
            return f"A halt at {self.halted_at} of {self.iterations} {how}{rest}{where}"
        return f"No halt was tried, for that takes three iterations{where}"

    def fields(self) -> dict[str, Any]:
        """The description by fields: ``attach(model, policy, **candidate.fields())``; see ``around``."""
        found: dict[str, Any] = {"body": list(self.body)}
        if self.state != self.body[-1]:
            found["state"] = self.state
        others = {"period": self.period, "scope": self.scope, "on_halt": self.on_halt}
        found |= {name: value for name, value in others.items() if value not in (1, "", {})}
        if self.copies:
            found["copies"] = True
        if not self.check:
            found["check"] = False
        if self.initial != 0 or self.initial is None:
            found["initial"] = self.initial
        if self.reset_on:
            found["reset_on"] = list(self.reset_on)
        if self.leaf is not None:
            found["select"], found["put"] = self.leaf.get, self.leaf.put
        return found

    def call(self) -> str:
        """The ``attach`` call to copy."""
        parts = {name: repr(value) for name, value in self.fields().items()}
        if self.leaf is not None:
            parts["select"], parts["put"] = self.leaf.select_text(), self.leaf.put_text()
        model = "haltkit.LoopAround(model, run)" if self.around else "model"
        return f"haltkit.attach({model}, policy, {', '.join(f'{name}={value}' for name, value in parts.items())})"


@dataclass(frozen=True)
class Discovery:
    """What was seen, the likeliest loop first. ``str()`` is a table and the call to copy.

    Attributes:
        candidates: the loops.
        heads: what looks like an exit head of the model.
    """

    candidates: tuple[Candidate, ...]
    heads: tuple[ExitHead, ...] = ()

    def __str__(self) -> str:
        rows = [f"{'iterations':>10}  {'period':>6}  state, body"]
        rows += [f"{c.iterations:10d}  {c.period:6d}  {c.state}, [{', '.join(c.body)}]" for c in self.candidates]
        first = self.candidates[0]
        what = "Likeliest, and not right yet" if first.problem else "To copy"
        heads = ["", *(head.advice for head in self.heads)] if self.heads else []
        return "\n".join([*rows, "", f"{first.verdict}. {what}:", f"  {first.call()}", *heads])
