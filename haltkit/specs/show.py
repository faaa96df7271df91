"""From policies to text."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from haltkit.protocol import HaltingPolicy
from haltkit.registry import PolicyRecord, place_of, record_of
from haltkit.specs.build import COMBINED, Spec, value_of
from haltkit.stepwise import TauByStep
from haltkit.weights import Weights, held_by
from haltkit.wrappers import AllOf, AnyOf, CheckEvery, MinSteps, Patience, Pooled

__all__ = ["UnprintablePolicy", "packed", "spec_of", "text_of"]

_VALUE = re.compile(r"[^=:,;|()\s]+")


class UnprintablePolicy(ValueError):
    """A policy object that no spec can say; use the object itself."""


def spec_of(built: HaltingPolicy[Any], files: Mapping[Weights, str] = MappingProxyType({})) -> Spec:
    """The spec of a policy object, granularity and all, such that ``spec_of(p).build() == p``.

    Args:
        built: the policy.
        files: what to call the file of some of its weights, in place of the one that they came from.

    Raises:
        UnprintablePolicy: wrappers in an order that specs do not have, a class or a value that a spec cannot name, or
            weights that are in no file.
    """
    keys: list[tuple[str, str]] = []
    inner: Any = built
    if isinstance(inner, MinSteps):
        keys, inner = [("min_steps", str(inner.steps)), *keys], inner.policy
    if isinstance(inner, CheckEvery):
        keys, inner = [("check_every", str(inner.every)), *keys], inner.policy
    patience = 1
    if isinstance(inner, Patience):
        patience, inner = inner.count, inner.policy
    by_step = isinstance(inner, TauByStep)
    if by_step:
        keys, inner = [("tau_by_step", str(inner.taus)), *keys], inner.policy
    pooled = inner if isinstance(inner, Pooled) else None
    if pooled is not None:
        pooling = [("granularity", pooled.over), *([("pool", pooled.reduce)] if pooled.reduce != "mean" else [])]
        keys, inner = [*pooling, *keys], pooled.policy
    if isinstance(inner, (AnyOf, AllOf)):
        if pooled is not None:
            raise UnprintablePolicy("a combination cannot be pooled in a spec: pool its parts")
        name = next(name for name, kind in COMBINED.items() if isinstance(inner, kind))
        shown = [("patience", str(patience)), *keys] if patience != 1 else keys
        return Spec(name, tuple(shown), tuple(spec_of(part, files) for part in inner.policies))
    if isinstance(inner, (MinSteps, CheckEvery, Patience, Pooled, TauByStep)):
        raise UnprintablePolicy(f"{type(inner).__name__} stands inside a wrapper that specs put inside it")
    record = _record(inner)
    default = 1 if "patience" in record.fields else record.patience
    if patience != default:
        keys = [("patience", str(patience)), *keys]
    if keys and not record.wrapped:
        raise UnprintablePolicy(f"{record.name} takes no {keys[0][0]} in a spec")
    own = _own(inner, record, files)
    if by_step:
        if "tau" not in record.fields:
            raise UnprintablePolicy(f"{record.name} has no key tau that a spec could give by step")
        own = [(key, text) for key, text in own if key != "tau"]
    return Spec(place_of(record), (*own, *keys))


def text_of(policies: Mapping[str, HaltingPolicy[Any]], files: Mapping[Weights, str] = MappingProxyType({})) -> str:
    """The text of one policy per region: a single spec where all regions have equal ones; ``files`` as there.

    Raises:
        UnprintablePolicy: as :func:`spec_of`.
    """
    specs = {region: str(spec_of(policy, files)) for region, policy in policies.items()}
    if len(set(specs.values())) == 1:
        return next(iter(specs.values()))
    return ";".join(f"{region}={spec}" for region, spec in specs.items())


def packed(policies: Mapping[str, HaltingPolicy[Any]]) -> tuple[str, dict[str, Weights]]:
    """One policy per region as it is handed on: its text, in which weights are in files beside it, and those by name.

    Raises:
        UnprintablePolicy: as :func:`spec_of`; weights need be in no file.
    """
    named: dict[str, str] = {}
    files: dict[str, Weights] = {}
    names: dict[Weights, str] = {}
    for one in (one for policy in policies.values() for one in held_by(policy)):
        number = f"-{len(named) + 1}" if named else ""
        names[one] = named.setdefault(one.sha256, f"weights{number}.safetensors")
        files[names[one]] = one
    return text_of(policies, names), files


def _record(policy: Any) -> PolicyRecord:
    cls = type(policy)
    if "<locals>" in cls.__qualname__ or "." in cls.__qualname__ or not dataclasses.is_dataclass(cls):
        raise UnprintablePolicy(
            f"a {cls.__qualname__} cannot be printed as a spec: only a dataclass at the top level of a module has a "
            "name there"
        )
    return record_of(cls)


def _own(policy: Any, record: PolicyRecord, files: Mapping[Weights, str]) -> list[tuple[str, str]]:
    """The keys of the policy's own fields that differ from their defaults."""
    hints = typing.get_type_hints(record.policy)
    found = []
    for name, field in record.fields.items():
        value = getattr(policy, name)
        if isinstance(value, Weights):
            source = files.get(value, value.source)
            if source is None:
                raise UnprintablePolicy(
                    f"the {record.name} policy cannot be printed as a spec: its {name} are in no file (Weights.save "
                    "puts them in one)"
                )
            text = source
        else:
            default = field.default_factory() if callable(field.default_factory) else field.default
            if value == default:
                continue
            text = str(value)
        _check(policy, record, name, text, hints[name], value)
        found.append((name, text))
    return found


def _check(policy: Any, record: PolicyRecord, name: str, text: str, hint: Any, value: Any) -> None:
    """Refuse a value that does not come back from its text."""
    same = _VALUE.fullmatch(text) is not None
    if same and not isinstance(value, Weights):
        try:
            same = value_of(text, hint, name, Spec(record.name)) == value
        except ValueError:
            same = False
    if not same:
        raise UnprintablePolicy(f"{name}={text!r} of the {record.name} policy cannot be written in a spec")
