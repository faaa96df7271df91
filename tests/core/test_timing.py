"""Timing in turns, on a clock of its own."""

from __future__ import annotations

import pytest

from haltkit.timing import in_turns


def test_what_comes_before_each_run_is_called_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], ""
    monkeypatch.setattr("haltkit.timing.settled", lambda: now[0])

    def spends(name: str, seconds: float) -> None:
        nonlocal order
        order, now[0] = order + name, now[0] + seconds

    runs = {"a": lambda: spends("a", 1.0), "b": lambda: spends("b", 2.0)}
    assert in_turns(runs, 2, before=lambda: spends("-", 10.0)) == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert order == "-a-b-b-a"
