"""Ctrl-C at any line of attaching or detaching leaves the model as it was."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haltkit
from cases import WIDTH, Refiner, state_of
from haltkit.attachment.description import Loop

pytestmark = [
    pytest.mark.slow,
    # Where the line is in a callback that the collection of garbage calls, Python itself swallows what is raised.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line (from 0) that Python runs."""

    def __init__(self, at: int) -> None:
        self.at, self.lines = at, 0
        self.place = ""

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines > self.at:
                sys.settrace(None)
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self

    def run(self, action: Callable[[], Any]) -> Any:
        """Do it under tracing."""
        before = sys.gettrace()
        sys.settrace(self)
        try:
            return action()
        finally:
            sys.settrace(before)


def with_own_forward(model: Refiner) -> Refiner:
    """As accelerate leaves a module: forward is an attribute of the instance."""
    core = model.core
    model.head.__dict__["forward"] = lambda x: nn.Linear.forward(core, x)[..., :3]
    return model


def attach(model: Refiner, policy: str | None) -> haltkit.Session:
    loops = {"core": Loop(("core", "head"), state="core"), "head": Loop(("head",), reset_on=("core",))}
    return haltkit.attach(model, policy, loops=loops, observer=haltkit.Recorder())


KINDS = pytest.mark.parametrize(
    ("prepare", "policy"),
    [(lambda m: m, "fixed:steps=3"), (with_own_forward, "fixed:steps=3"), (lambda m: m, None)],
    ids=["class", "attribute", "hooks"],
)


def same(model: Refiner, before: list[Any], own: Any, plain: Tensor, x: Tensor) -> bool:
    """Classes, attributes and hooks are what they were, the attribute the same object, and so is what it computes."""
    return (
        state_of(model) == before
        and model.head.__dict__.get("forward") is own
        and not any("_haltkit" in type(m).__dict__ for m in model.modules())
        and torch.equal(model(x), plain)
    )


@torch.no_grad()
@KINDS
def test_interrupted_at_any_line_attaching_leaves_nothing_behind(prepare: Any, policy: str | None) -> None:
    model, x = prepare(Refiner().eval()), torch.ones(2, WIDTH)
    attach(model, policy).detach()  # imports what is imported at first use
    before, own, plain = state_of(model), model.head.__dict__.get("forward"), model(x)
    for line in itertools.count():
        interrupter = Interrupter(line)
        try:
            interrupter.run(lambda: attach(model, policy)).detach()
        except KeyboardInterrupt:
            assert same(model, before, own, plain, x), interrupter.place
        else:
            if not interrupter.place:
                break  # it takes fewer lines
    assert line > 100


@torch.no_grad()
@KINDS
def test_interrupted_at_any_line_detaching_restores_the_model(prepare: Any, policy: str | None) -> None:
    """At once, unless the interrupt came before the first line inside; and in any case when detached again."""
    model, x = prepare(Refiner().eval()), torch.ones(2, WIDTH)
    attach(model, policy).detach()
    before, own, plain = state_of(model), model.head.__dict__.get("forward"), model(x)
    for line in itertools.count():
        interrupter, session = Interrupter(line), attach(model, policy)
        try:
            interrupter.run(session.detach)
        except KeyboardInterrupt:
            if line > 1:
                assert same(model, before, own, plain, x), interrupter.place
            session.detach()
            assert same(model, before, own, plain, x), interrupter.place
        else:
            if not interrupter.place:
                break  # it takes fewer lines
    assert line > 10
