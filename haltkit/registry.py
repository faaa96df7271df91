"""Policies by name: the spec language and the table behind it.

A spec is ``name:key=value,key=value``::

    accel:tau=1e-3                         a built-in
    accel:tau=1e-3,patience=3,min_steps=4  with keys of the wrappers
    kl:tau=5e-4,granularity=sequence       one decision a sequence (mean of its tokens' scores)
    any(accel:tau=1e-3|fixed:steps=8)      the first that halts
    all(accel:tau=1e-3|norm:tau=1e-2)      both at the same step
    mylab.halting:Wobble:tau=0.1           a class of your own by its place
    4=accel:tau=1e-3;5-6=kl:tau=1e-4       a policy for each region

Own policies are also found by name through the entry-point group ``haltkit.policies``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any, Literal

from haltkit import policies
from haltkit.protocol import HaltingPolicy
from haltkit.wrappers import AllOf, AnyOf, CheckEvery, MinSteps, Patience, Pooled

__all__ = [
    "BUILTIN",
    "WRAPPER_KEYS",
    "Spec",
    "known_names",
    "parse_spec",
    "parse_spec_list",
    "policy",
    "policy_class",
    "policy_for_regions",
    "spec_of",
]

BUILTIN: dict[str, type[Any]] = {
    "norm": policies.StepNorm,
    "norm-rel": policies.NormalizedStepNorm,
    "kl": policies.KL,
    "accel": policies.Acceleration,
    "accel-rel": policies.NormalizedAcceleration,
    "speed": policies.StepSizeChange,
    "fixed": policies.Fixed,
}
ENTRY_POINT_GROUP = "haltkit.policies"
_COMBINATIONS: dict[str, type[AnyOf] | type[AllOf]] = {"any": AnyOf, "all": AllOf}
GRANULARITIES = ("token", "sequence", "batch", "world")


@dataclass(frozen=True)
class Wrapping:
    """The keys that any policy takes; each is carried out by a wrapper."""

    patience: int = 1
    min_steps: int = 0
    check_every: int = 1
    granularity: Literal["token", "sequence", "batch", "world"] = "token"
    pool: Literal["mean", "max"] = "mean"


WRAPPER_KEYS: dict[str, str] = {
    "patience": "halt after so many hits in a row (accel and accel-rel: 2, others: 1)",
    "min_steps": "never halt before this step (0)",
    "check_every": "halt only at multiples of this step (1)",
    "granularity": "token, sequence, batch or world (all processes): which rows decide together (token)",
    "pool": "mean or max: how their scores are pooled (mean)",
}
# What a combination takes: pooling belongs to its parts, which have scores of their own.
_COMBINATION_KEYS = ("patience", "min_steps", "check_every")


@dataclass(frozen=True)
class Spec:
    """A parsed spec: a name with keys, or a combination of specs. ``str()`` gives it back."""

    name: str
    keys: tuple[tuple[str, str], ...] = ()
    parts: tuple[Spec, ...] = ()

    def __str__(self) -> str:
        head = f"{self.name}({'|'.join(map(str, self.parts))})" if self.parts else self.name
        return f"{head}:{','.join(f'{k}={v}' for k, v in self.keys)}" if self.keys else head

    def get(self, key: str) -> str | None:
        """The value of a key as written (in a combination: in any of its parts), or None."""
        own = dict(self.keys).get(key)
        return own if own is not None else next(filter(None, (part.get(key) for part in self.parts)), None)

    def takes(self, key: str) -> bool:
        """Whether the policy has this key, of its own or a wrapper's; a combination, whether any part does."""
        if self.parts:
            return any(part.takes(key) for part in self.parts)
        cls = policy_class(self.name)
        return key in _own_keys(cls) or (key in WRAPPER_KEYS and cls is not policies.Fixed)

    def with_key(self, key: str, value: object) -> Spec:
        """The spec with one key set; in a combination, in every part that takes it.

        Raises:
            ValueError: the key is set to something else already.
        """
        if self.parts:
            return replace(self, parts=tuple(p.with_key(key, value) if p.takes(key) else p for p in self.parts))
        written = dict(self.keys).get(key)
        if written is None:
            keys = (*self.keys, (key, str(value)))
            return replace(self, keys=tuple(sorted(keys, key=lambda item: item[0] in WRAPPER_KEYS)))  # own keys first
        if written != str(value) and not _same_number(written, value):
            raise ValueError(f"{str(self)!r} says {key}={written}, which contradicts {key}={value}: drop one of them")
        return self

    def build(self) -> HaltingPolicy[Any]:
        """The policy.

        Raises:
            ValueError: an unknown name or key (the known ones are listed), a bad value, or a missing one.
        """
        if self.parts:
            wrapping, rest = _split_keys(self, _COMBINATION_KEYS)
            _refuse_unknown(self, rest, {}, _COMBINATION_KEYS)
            combined: HaltingPolicy[Any] = _COMBINATIONS[self.name](tuple(part.build() for part in self.parts))
            return _wrap(combined, _typed(Wrapping, wrapping, self))
        cls = policy_class(self.name)
        own = _own_keys(cls)
        if cls is policies.Fixed:  # every row at once, at one step: there is nothing for a wrapper to decide
            _refuse_unknown(self, dict(self.keys), own, ())
            return policies.Fixed(**_values(policies.Fixed, dict(self.keys), self))
        wrapping, rest = _split_keys(self, tuple(key for key in WRAPPER_KEYS if key not in own))
        _refuse_unknown(self, rest, own, tuple(WRAPPER_KEYS))
        leaf: HaltingPolicy[Any] = cls(**_values(cls, rest, self))
        defaults = Wrapping(patience=getattr(cls, "patience", 1) if "patience" not in own else 1)
        return _wrap(leaf, _typed(Wrapping, wrapping, self, defaults))


def _wrap(inner: HaltingPolicy[Any], keys: Wrapping) -> HaltingPolicy[Any]:
    if keys.granularity != "token":
        inner = Pooled(typing.cast(Any, inner), keys.granularity, keys.pool)
    if keys.patience != 1:
        inner = Patience(inner, keys.patience)
    if keys.check_every != 1:
        inner = CheckEvery(inner, keys.check_every)
    if keys.min_steps != 0:
        inner = MinSteps(inner, keys.min_steps)
    return inner


def _split_keys(spec: Spec, wrapper_keys: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    keys = dict(spec.keys)
    return {k: v for k, v in keys.items() if k in wrapper_keys}, {
        k: v for k, v in keys.items() if k not in wrapper_keys
    }


def _refuse_unknown(spec: Spec, keys: Mapping[str, str], own: Mapping[str, object], shared: Sequence[str]) -> None:
    for key in keys:
        if key not in own:
            known = [*own, *(k for k in shared if k not in own)]
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"{spec.name} has no key {key!r}{hint}; it has: {', '.join(known)}")


def _own_keys(cls: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    if not dataclasses.is_dataclass(cls):
        raise ValueError(f"{cls.__module__}:{cls.__qualname__} is not a dataclass: a policy's keys are its fields")
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def _values(cls: type[Any], keys: Mapping[str, str], spec: Spec) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    values = {key: _value(text, hints[key], key, spec) for key, text in keys.items()}
    for name, field in _own_keys(cls).items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in values and not optional:
            advice = "; 'haltkit compare' finds a value for your model" if name == "tau" else ""
            raise ValueError(f"{str(spec)!r} needs {name}, for example {spec.name}:{name}=...{advice}")
    return values


def _typed(cls: type[Wrapping], keys: Mapping[str, str], spec: Spec, defaults: Wrapping | None = None) -> Wrapping:
    return replace(defaults or cls(), **_values(cls, keys, spec))


def _value(text: str, hint: Any, key: str, spec: Spec) -> Any:
    if typing.get_origin(hint) is Literal:
        allowed = typing.get_args(hint)
        if text not in allowed:
            raise ValueError(f"{key}={text} in {str(spec)!r}: allowed are {', '.join(allowed)}")
        return text
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{key}={text} in {str(spec)!r}: true or false is expected")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise ValueError(f"{key}={text} in {str(spec)!r}: {kind} is expected") from None
    if hint is str:
        return text
    raise ValueError(f"{key} of {spec.name} is of type {hint}, which a spec cannot write: build it in Python")


def known_names() -> list[str]:
    """Every policy name: built-ins, then those that installed packages add."""
    return [*BUILTIN, *sorted(e.name for e in entry_points(group=ENTRY_POINT_GROUP) if e.name not in BUILTIN)]


def policy_class(name: str) -> type[Any]:
    """The class behind a policy's name or ``pkg.mod:Class`` place.

    Raises:
        ValueError: nothing there; the known names are listed.
    """
    if name in BUILTIN:
        return BUILTIN[name]
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, SyntaxError, TypeError, ValueError) as error:
            raise ValueError(f"policy {name!r} cannot be loaded: {error}") from None
        if not isinstance(found, type):
            raise ValueError(f"policy {name!r} is not a class")
        return found
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            return typing.cast("type[Any]", entry.load())
    known = [*known_names(), *_COMBINATIONS]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(
        f"unknown policy {name!r}{hint}; known: {', '.join(known_names())}, any(...), all(...), "
        "or your own as pkg.mod:Class"
    )


def _same_number(written: str, value: object) -> bool:
    try:
        return float(written) == float(str(value))
    except ValueError:
        return False


_NAME = re.compile(r"[\w.-]+(:[A-Za-z_]\w*)?")
_REGION = re.compile(r"[\w.-]+=[A-Za-z_]")  # 4=accel:...
_KEY = re.compile(r"(?P<key>[A-Za-z_]\w*)=(?P<value>[^=:]+)")
# In a list, what can only go on the spec before it: key=value, perhaps closing one region's spec.
_CONTINUATION = re.compile(r"[A-Za-z_]\w*=[^=:|()]+")


def parse_spec(text: str) -> Spec:
    """Parse one spec (not one with regions).

    Raises:
        ValueError: the text is not a spec, or names an unknown policy.
    """
    text = text.strip()
    for name in _COMBINATIONS:
        if text.startswith(f"{name}("):
            end = _closing(text, len(name))
            parts = tuple(parse_spec(part) for part in _split(text[len(name) + 1 : end], "|"))
            if len(parts) < 2:
                raise ValueError(f"{text!r}: {name}(...) combines two or more policies, separated by |")
            rest = text[end + 1 :]
            if rest and not rest.startswith(":"):
                raise ValueError(f"{text!r}: {rest!r} after the closing parenthesis is not ':key=value'")
            return Spec(name, _parse_keys(rest[1:], text) if rest else (), parts)
    name, colon, keys = text.partition(":")
    if colon and name not in BUILTIN and "=" not in keys.partition(":")[0]:  # pkg.mod:Class[:keys]
        attribute, colon, keys = keys.partition(":")
        name = f"{name}:{attribute}"
    if not _NAME.fullmatch(name):
        if _REGION.match(text):
            raise ValueError(
                f"{text!r} gives one region a policy of its own, and here one is for all of them; forward_adaptive "
                "and 'haltkit generate' take one for each"
            )
        raise ValueError(f"{text!r} is not a policy spec: write name:key=value,key=value, as in accel:tau=1e-3")
    policy_class(name)
    return Spec(name, _parse_keys(keys, text) if colon else ())


def _parse_keys(text: str, whole: str) -> tuple[tuple[str, str], ...]:
    keys: dict[str, str] = {}
    for item in text.split(","):
        match = _KEY.fullmatch(item.strip())
        if match is None:
            raise ValueError(f"{item!r} in {whole!r} is not key=value")
        if match["key"] in keys:
            raise ValueError(f"{match['key']} is given twice in {whole!r}")
        keys[match["key"]] = match["value"].strip()
    return tuple(keys.items())


def _closing(text: str, opening: int) -> int:
    depth = 0
    for index in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"{text!r}: a parenthesis is not closed")


def _split(text: str, separator: str) -> list[str]:
    """Split at separators that stand outside parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def parse_spec_list(text: str) -> list[Spec]:
    """Parse comma-separated specs; an item ``key=value`` belongs to the spec before it.

    Raises:
        ValueError: an empty list, an empty item, or a bad spec.
    """
    items: list[str] = []
    for item in map(str.strip, _split(text, ",")):
        if items and _CONTINUATION.fullmatch(item):
            items[-1] += ("," if ":" in items[-1].rpartition(")")[2] else ":") + item
        else:
            items.append(item)
    if not all(items):
        raise ValueError(f"{text!r}: an empty item in a list of policies")
    return [parse_spec(item) for item in items]


def policy(spec: str | Spec, **keys: object) -> HaltingPolicy[Any]:
    """Build a policy from a spec, further keys given by name: ``policy("accel", tau=1e-3)``.

    Raises:
        ValueError: see :meth:`Spec.build`.
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    for key, value in keys.items():
        parsed = parsed.with_key(key, value)
    return parsed.build()


def policy_for_regions(
    given: str | HaltingPolicy[Any] | Mapping[str, str | HaltingPolicy[Any]], regions: Sequence[str]
) -> dict[str, HaltingPolicy[Any]]:
    """One policy a region, from one for all, a mapping, or a spec (with regions or without).

    Raises:
        ValueError: a bad spec, an unknown region, or one left out.
    """
    if isinstance(given, str):
        head = re.match(r"\s*([\w.-]+)=", given)
        if head is None:
            given = policy(given)
        else:
            by_region: dict[str, str | HaltingPolicy[Any]] = {}
            for item in _split(given, ";"):
                region, equals, spec = item.partition("=")
                if not equals:
                    raise ValueError(f"{item!r} in {given!r} is not region=spec")
                if region.strip() in by_region:
                    raise ValueError(f"region {region.strip()!r} is given twice in {given!r}")
                by_region[region.strip()] = policy(spec)
            given = by_region
    if not isinstance(given, Mapping):
        return dict.fromkeys(regions, given)
    if given.keys() != set(regions):
        raise ValueError(f"policies for regions {', '.join(given)}; the model's regions are {', '.join(regions)}")
    return {region: policy(p) if isinstance(p, str) else p for region in regions for p in [given[region]]}


def spec_of(built: HaltingPolicy[Any]) -> Spec:
    """The spec of a policy object, granularity and all, such that ``spec_of(p).build() == p``.

    Raises:
        ValueError: wrappers in an order that specs do not have.
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
    pooled = inner if isinstance(inner, Pooled) else None
    if pooled is not None:
        pooling = [("granularity", pooled.over), *([("pool", pooled.reduce)] if pooled.reduce != "mean" else [])]
        keys, inner = [*pooling, *keys], pooled.policy
    default = getattr(type(inner), "patience", 1)
    if patience != default:
        keys = [("patience", str(patience)), *keys]
    if isinstance(inner, (AnyOf, AllOf)):
        name = "any" if isinstance(inner, AnyOf) else "all"
        return Spec(name, tuple(keys), tuple(spec_of(part) for part in inner.policies))
    if isinstance(inner, (MinSteps, CheckEvery, Patience, Pooled)):
        raise ValueError(f"{type(inner).__name__} stands inside a wrapper that specs put inside it")
    cls = type(inner)
    names = {known: name for name, known in BUILTIN.items()}
    own = [
        (f.name, str(getattr(inner, f.name)))
        for f in _own_keys(cls).values()
        if f.default is dataclasses.MISSING or getattr(inner, f.name) != f.default
    ]
    return Spec(names.get(cls, f"{cls.__module__}:{cls.__qualname__}"), (*own, *keys))
