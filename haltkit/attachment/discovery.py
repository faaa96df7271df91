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
    module calls inside itself are left out. The proposal is a starting point, and ``verify`` tells whether it is right:
    what a run does not show has to be added, such as ``period`` where one module plays several roles in an iteration,
    ``on_halt`` for accumulators, or ``reset_on`` of an inner loop.

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
    found = [c for scope, names in groups.items() for c in _candidates(scope, names, outputs)]
    # What a repeated module repeats inside itself, once a call, is not a loop of its own.
    entered = {name: sum(1 for called, _ in calls if called == name) for name in groups if name}
    found = [c for c in found if c.iterations > entered.get(c.scope, 1)]
    if not found:
        raise AttachError("no module is called more than once in one run: there is no loop of modules to halt")
    return Discovery(tuple(sorted(found, key=lambda c: (-c.iterations, c.scope))))


def _candidates(scope: str, names: list[str], outputs: dict[str, list[tuple[int, ...]]]) -> list[Candidate]:
    """The loops among the calls that one module makes: those of modules that it calls more than once.

    Modules whose calls take turns belong to one loop; where one set is done before the next begins, there are two.
    """
    spans: list[tuple[set[str], int, int]] = []  # modules of a loop, its first and its last call
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            calls = [i for i, called in enumerate(names) if called == name]
            spans.append(({name}, calls[0], calls[-1]))
    merged: list[tuple[set[str], int, int]] = []
    for modules, first, last in spans:  # in the order of their first calls
        if merged and first < merged[-1][2]:
            before, start, end = merged[-1]
            merged[-1] = before | modules, start, max(end, last)
        else:
            merged.append((modules, first, last))
    return [_candidate(scope, [n for n in names if n in modules], outputs) for modules, _, _ in merged]


def _candidate(scope: str, names: list[str], outputs: dict[str, list[tuple[int, ...]]]) -> Candidate:
    """The loop that calls these modules, in this order."""
    body = tuple(dict.fromkeys(names))
    iterations = min(names.count(name) for name in body)
    shapes = {name: set(outputs.get(name, [])) for name in body}
    largest = max((len(shape) for sizes in shapes.values() for shape in sizes), default=0)
    states = [name for name in body if len(shapes[name]) == 1 and len(next(iter(shapes[name]))) == largest]
    state = states[-1] if states else body[-1]
    return Candidate(body, iterations, names.count(state) // iterations, scope, state)
