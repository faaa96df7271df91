"""The spec language: what parses, what it builds, how it prints, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import haltkit
from haltkit import registry
from haltkit.policies import Acceleration, Fixed, StepNorm
from haltkit.protocol import LoopStep, Verdict
from haltkit.registry import parse_spec, parse_spec_list, policy_for_regions, spec_of
from haltkit.wrappers import AllOf, AnyOf, CheckEvery, MinSteps, Patience, Pooled


@dataclass(frozen=True)
class Nervous:
    """A policy of a user's own: halts at once, unless told to be calm."""

    calm: bool = False
    mood: str = "uneasy"

    def init(self, x0: Tensor) -> None:
        return None

    def update(self, state: None, step: LoopStep) -> tuple[None, Verdict]:
        score = torch.full_like(step.x[..., 0], float(self.calm))
        return None, Verdict(score, score < 0.5)


def test_specs_build_what_they_say() -> None:
    assert haltkit.policy("norm:tau=1e-3") == StepNorm(1e-3)
    assert haltkit.policy("accel", tau=1e-3) == Patience(Acceleration(1e-3), 2)
    assert haltkit.policy("accel:tau=1e-3,patience=1") == Acceleration(1e-3)
    assert haltkit.policy("fixed:steps=8") == Fixed(8)
    assert haltkit.policy("norm:tau=1,granularity=sequence,pool=max") == Pooled(StepNorm(1.0), "sequence", "max")
    assert haltkit.policy("norm:tau=1,patience=3,min_steps=4,check_every=2") == MinSteps(
        CheckEvery(Patience(StepNorm(1.0), 3), 2), 4
    )
    assert haltkit.policy("any(norm:tau=1|fixed:steps=8)") == AnyOf((StepNorm(1.0), Fixed(8)))
    nested = haltkit.policy("all(norm:tau=1|any(norm:tau=2|fixed:steps=3)):patience=2")
    assert nested == Patience(AllOf((StepNorm(1.0), AnyOf((StepNorm(2.0), Fixed(3))))), 2)


def test_a_policy_for_one_region_is_none_for_all() -> None:
    with pytest.raises(ValueError, match="is for all of them; forward_adaptive"):
        parse_spec_list("4=accel:tau=1;5-6=norm:tau=1")
    with pytest.raises(ValueError, match="not a policy spec"):
        parse_spec("accel tau")


def test_a_class_of_ones_own_by_its_place() -> None:
    assert haltkit.policy("test_registry:Nervous") == Nervous()
    assert haltkit.policy("test_registry:Nervous:calm=true,mood=fine,min_steps=3") == MinSteps(Nervous(True, "fine"), 3)
    assert str(spec_of(Nervous(calm=True))) == "test_registry:Nervous:calm=True"


def test_a_class_of_ones_own_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [EntryPoint("nervous", "test_registry:Nervous", registry.ENTRY_POINT_GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)
    assert haltkit.policy("nervous:calm=true") == Nervous(calm=True)
    assert "nervous" in registry.known_names()


tau = st.floats(1e-9, 1e3).map(lambda v: float(f"{v:.3g}"))
leaves = st.builds(
    lambda name, tau, keys: f"{name}:tau={tau!r}" + "".join(f",{k}={v}" for k, v in keys.items()),
    st.sampled_from(["norm", "norm-rel", "kl", "accel", "accel-rel", "speed"]),
    tau,
    st.fixed_dictionaries(
        {},
        optional={
            "patience": st.integers(1, 4),
            "min_steps": st.integers(0, 9),
            "check_every": st.integers(1, 5),
            "granularity": st.sampled_from(["token", "sequence", "batch", "world"]),
            "pool": st.sampled_from(["mean", "max"]),
        },
    ),
)
specs = st.recursive(
    leaves,
    lambda inner: st.builds(
        lambda kind, parts: f"{kind}({'|'.join(parts)})",
        st.sampled_from(["any", "all"]),
        st.lists(inner, min_size=2, max_size=3),
    ),
    max_leaves=5,
)


@given(specs)
def test_the_spec_of_a_policy_builds_it_again(spec: str) -> None:
    built = haltkit.policy(spec)
    assert spec_of(built).build() == built
    assert parse_spec(str(parse_spec(spec))) == parse_spec(spec)


@given(st.lists(specs, min_size=1, max_size=4))
def test_a_list_of_specs_splits_where_specs_begin(many: list[str]) -> None:
    assert [spec.build() for spec in parse_spec_list(",".join(many))] == [haltkit.policy(spec) for spec in many]


def test_lists() -> None:
    assert [str(s) for s in parse_spec_list("accel, kl ,norm")] == ["accel", "kl", "norm"]
    assert [str(s) for s in parse_spec_list("accel,patience=3,any(norm:tau=1|kl:tau=2),min_steps=2,fixed:steps=3")] == [
        "accel:patience=3", "any(norm:tau=1|kl:tau=2):min_steps=2", "fixed:steps=3",
    ]  # fmt: skip


def test_a_policy_for_each_region() -> None:
    both = policy_for_regions("4=accel:tau=1e-3,patience=3;5-6=norm:tau=1", ["4", "5-6"])
    assert both == {"4": Patience(Acceleration(1e-3), 3), "5-6": StepNorm(1.0)}
    assert policy_for_regions("norm:tau=1", ["4", "7"]) == {"4": StepNorm(1.0), "7": StepNorm(1.0)}
    with pytest.raises(ValueError, match="the model's regions are 4, 7"):
        policy_for_regions("4=norm:tau=1", ["4", "7"])
    with pytest.raises(ValueError, match="given twice"):
        policy_for_regions("4=norm:tau=1;4=norm:tau=2", ["4"])
    with pytest.raises(ValueError, match="not region=spec"):
        policy_for_regions("4=norm:tau=1;kl", ["4"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acel:tau=1", "did you mean accel"),
        ("wobble", "known: norm, norm-rel, kl, accel, accel-rel, speed, fixed"),
        ("norm:tua=1", "did you mean tau"),
        ("norm", "needs tau"),
        ("norm:tau", "not key=value"),
        ("norm:tau=", "not key=value"),
        ("norm:tau=1,tau=2", "given twice"),
        ("norm:tau=small", "a number is expected"),
        ("fixed:steps=2.5", "a whole number is expected"),
        ("fixed:steps=0", "at least 1 step"),
        ("fixed:steps=3,patience=2", "fixed has no key 'patience'"),
        ("norm:tau=1,patience=0", "at least 1"),
        ("norm:tau=1,granularity=word", "allowed are token, sequence, batch, world"),
        ("kl:tau=1,direction=sideways", "allowed are current_previous, previous_current"),
        ("any(norm:tau=1)", "two or more"),
        ("any(norm:tau=1|kl:tau=1", "not closed"),
        ("any(norm:tau=1|kl:tau=1)x", "after the closing parenthesis"),
        ("any(norm:tau=1|kl:tau=1):pool=max", "any has no key 'pool'"),
        ("", "not a policy spec"),
        ("no.such.module:Policy", "cannot be loaded"),
        ("haltkit.registry:BUILTIN", "is not a class"),
        ("test_registry:Nervous:calm=perhaps", "true or false"),
    ],
)
def test_bad_specs_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        haltkit.policy(text)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="contradicts"):
        haltkit.policy("norm:tau=1", tau=2)
    assert haltkit.policy("norm:tau=1", tau="1") == StepNorm(1.0)
    with pytest.raises(ValueError, match="an empty item"):
        parse_spec_list("accel,,kl")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Specs name this file's classes by module."""
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return
