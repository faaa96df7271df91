"""Run a model once and propose the description of its loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from haltkit.attachment.errors import AttachError
from haltkit.attachment.frame import _tensors

__all__ = ["Candidate", "Discovery", "discover"]


@dataclass(frozen=True)
class Candidate:
    """A group of modules that run again and again, and how often an iteration of it comes.

    ``state`` is where the loop's state seems to come out: the last module whose output keeps one shape and enters
    the next iteration, or the last one of the group.
    """

    body: tuple[str, ...]
    iterations: int
    period: int
    scope: str
    state: str

    def call(self) -> str:
        """The ``attach`` call to copy."""
        parts = [f"body={list(self.body)!r}"]
        if self.state != self.body[-1]:
            parts.append(f"state={self.state!r}")
        if self.period > 1:
            parts.append(f"period={self.period}")
        if self.scope:
            parts.append(f"scope={self.scope!r}")
        return f"haltkit.attach(model, policy, {', '.join(parts)})"


@dataclass(frozen=True)
class Discovery:
    """What was seen, the likeliest loop first. ``str()`` is a table and the call to copy."""

    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        rows = [f"{'iterations':>10}  {'period':>6}  state, body"]
        rows += [f"{c.iterations:10d}  {c.period:6d}  {c.state}, [{', '.join(c.body)}]" for c in self.candidates]
        return "\n".join([*rows, "", "to copy:", f"  {self.candidates[0].call()}"])


def discover(model: nn.Module, run: Callable[[], Any]) -> Discovery:
    """Propose how to attach to a model, from one run of it.

    Modules that are called more than once are grouped under the module that calls them; the modules that a repeated
    module calls inside itself are left out. The proposal is a starting point: ``verify`` tells whether it is right.

    Args:
        model: any module.
        run: calls the model on some input.

    Raises:
        AttachError: no module was called more than once.
    """
    calls: list[tuple[str, tuple[str, ...]]] = []  # (module, modules that were running when it was called)
    running: list[str] = []
    outputs: dict[str, list[tuple[int, ...]]] = {}

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls.append((name, tuple(running)))
            running.append(name)

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            running.pop()
            outputs.setdefault(name, []).append(tuple(_tensors(output)[0].shape) if _tensors(output) else ())

        return hook

    handles = []
    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(enter(name)))
                handles.append(module.register_forward_hook(leave(name), always_call=False))
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[str, list[str]] = {}
    for name, stack in calls:
        groups.setdefault(stack[-1] if stack else "", []).append(name)
    found = [c for scope, names in groups.items() for c in [_candidate(scope, names, outputs)] if c is not None]
    # What a repeated module repeats inside itself, once a call, is not a loop of its own.
    entered = {name: sum(1 for called, _ in calls if called == name) for name in groups if name}
    found = [c for c in found if c.iterations > entered.get(c.scope, 1)]
    if not found:
        raise AttachError("no module is called more than once in one run: there is no loop of modules to halt")
    return Discovery(tuple(sorted(found, key=lambda c: (-c.iterations, c.scope))))


def _candidate(scope: str, names: list[str], outputs: dict[str, list[tuple[int, ...]]]) -> Candidate | None:
    """The loop among the calls that one module makes: those of modules that it calls more than once."""
    repeated = [name for name in names if names.count(name) > 1]
    if not repeated:
        return None
    body = tuple(dict.fromkeys(repeated))
    iterations = min(repeated.count(name) for name in body)
    period = repeated.count(body[-1]) // iterations
    shapes = {name: set(outputs.get(name, [])) for name in body}
    largest = max((len(shape) for sizes in shapes.values() for shape in sizes), default=0)
    states = [name for name in body if len(shapes[name]) == 1 and len(next(iter(shapes[name]))) == largest]
    return Candidate(body, iterations, period, scope, states[-1] if states else body[-1])
