"""A parsed spec, and the policy that it builds."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from haltkit.protocol import HaltingPolicy
from haltkit.registry import PolicyRecord, record_of
from haltkit.stepwise import StepTaus, TauByStep
from haltkit.weights import Weights, is_weights
from haltkit.wrappers import AllOf, AnyOf, CheckEvery, MinSteps, Patience, Pooled

__all__ = ["COMBINED", "WRAPPER_KEYS", "Spec", "value_of"]

COMBINED: dict[str, type[AnyOf] | type[AllOf]] = {"any": AnyOf, "all": AllOf}


@dataclass(frozen=True)
class Wrapping:
    """The keys that any policy takes; each is carried out by a wrapper."""

    patience: int = 1
    min_steps: int = 0
    check_every: int = 1
    granularity: Literal["token", "sequence", "batch", "world"] = "token"
    pool: Literal["mean", "max"] = "mean"
    tau_by_step: StepTaus | None = None


WRAPPER_KEYS: dict[str, str] = {
    "patience": "halt after this many hits in a row (the default is listed with the policy)",
    "min_steps": "never halt before this step (0)",
    "check_every": "halt only at multiples of this step (1)",
    "granularity": "token, sequence, batch or world (all processes): which rows decide together (token)",
    "pool": "mean or max: how their scores are pooled (mean)",
    "tau_by_step": "in place of tau: 0.5@4/1.2@9 is 0.5 from step 4 on, 1.2 from step 9 on, no halt before (none)",
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
        """The value of a key as written; None where it is not, and for what the parts of a combination say."""
        return dict(self.keys).get(key)

    def takes(self, key: str) -> bool:
        """Whether the policy has this key, of its own or a wrapper's; a combination, whether any part does."""
        if self.parts:
            return any(part.takes(key) for part in self.parts)
        record = record_of(self.name)
        return key in record.fields or (key in WRAPPER_KEYS and record.wrapped)

    @property
    def open(self) -> bool:
        """Whether a threshold is still to be chosen: the policy takes a ``tau``, or a part does, and has none."""
        if self.parts:
            return any(part.open for part in self.parts)
        return self.takes("tau") and not self._says("tau")

    def _says(self, key: str) -> bool:
        """Whether the policy's own keys settle what a key is about."""
        return self.get(key) is not None or (key == "tau" and self.get("tau_by_step") is not None)

    @property
    def needs_readout(self) -> bool:
        """Whether the policy, or a part of it, looks at logits."""
        return any(part.needs_readout for part in self.parts) if self.parts else record_of(self.name).needs_readout

    @property
    def sweep(self) -> list[Spec]:
        """One spec for each value that a comparison tries of a key that is not ``tau``; empty where there is none."""
        swept = None if self.parts else record_of(self.name).sweep
        if swept is None or self.get(swept[0]) is not None:
            return []
        return [self.with_key(swept[0], value) for value in swept[1]]

    def without(self, key: str) -> Spec:
        """The spec without one of its own keys, which names a sweep over that key."""
        return replace(self, keys=tuple((k, v) for k, v in self.keys if k != key))

    def with_key(self, key: str, value: object) -> Spec:
        """The spec with one key set; in a combination, in every part that takes it.

        Raises:
            ValueError: the key is set to something else already.
        """
        if self.parts:
            return replace(self, parts=tuple(p.with_key(key, value) if p.takes(key) else p for p in self.parts))
        written = self.get(key)
        if written is None:
            keys = (*self.keys, (key, str(value)))
            return replace(self, keys=tuple(sorted(keys, key=lambda item: item[0] in WRAPPER_KEYS)))  # own keys first
        if written != str(value) and not _same_number(written, value):
            raise ValueError(f"{str(self)!r} says {key}={written}, which contradicts {key}={value}: drop one of them")
        return self

    def with_default(self, key: str, value: object) -> Spec:
        """The spec with one key set wherever the policy, or a part of it, takes the key and says nothing."""
        if self.parts:
            return replace(self, parts=tuple(part.with_default(key, value) for part in self.parts))
        return self.with_key(key, value) if self.takes(key) and not self._says(key) else self

    def located(self, folder: Path) -> Spec:
        """The spec with files of weights that it names looked for in a folder, unless their paths are absolute."""
        if self.parts:
            return replace(self, parts=tuple(part.located(folder) for part in self.parts))
        files = self._files
        return replace(self, keys=tuple((k, str(folder / v) if k in files else v) for k, v in self.keys))

    @property
    def files(self) -> tuple[str, ...]:
        """The files of weights that the spec names, as written."""
        if self.parts:
            return tuple(name for part in self.parts for name in part.files)
        return tuple(self._files.values())

    @property
    def _files(self) -> dict[str, str]:
        """Those of this spec's own keys that name files of weights."""
        hints = typing.get_type_hints(record_of(self.name).policy)
        return {key: value for key, value in self.keys if is_weights(hints.get(key))}

    def build(self) -> HaltingPolicy[Any]:
        """The policy.

        Raises:
            ValueError: an unknown name or key (the known ones are listed), a bad value, or a missing one.
        """
        if self.parts:
            wrapping, rest = _split_keys(self, _COMBINATION_KEYS)
            _refuse_unknown(self, rest, (), _COMBINATION_KEYS)
            combined: HaltingPolicy[Any] = COMBINED[self.name](tuple(part.build() for part in self.parts))
            return _wrap(combined, _wrapping(self, wrapping, Wrapping()))
        record = record_of(self.name)
        own = tuple(record.fields)
        shared = tuple(key for key in WRAPPER_KEYS if record.wrapped and key not in own)
        wrapping, rest = _split_keys(self, shared)
        _refuse_unknown(self, rest, own, shared)
        wrap = _wrapping(self, wrapping, Wrapping(patience=1 if "patience" in own else record.patience))
        if wrap.tau_by_step is not None:
            if "tau" in rest or "tau" not in own:
                wrong = f"says tau={rest['tau']} too: drop one" if "tau" in rest else "has no tau that it could replace"
                raise ValueError(f"{str(self)!r}: tau_by_step gives a tau for each step, and {self.name} {wrong}")
            rest["tau"] = repr(wrap.tau_by_step.largest)
        policy: HaltingPolicy[Any] = record.policy(**_values(self, record, rest))
        return _wrap(policy, wrap)


def _wrap(inner: HaltingPolicy[Any], keys: Wrapping) -> HaltingPolicy[Any]:
    if keys.granularity != "token":
        inner = Pooled(typing.cast(Any, inner), keys.granularity, keys.pool)
    if keys.tau_by_step is not None:
        inner = TauByStep(typing.cast(Any, inner), keys.tau_by_step)
    if keys.patience != 1:
        inner = Patience(inner, keys.patience)
    if keys.check_every != 1:
        inner = CheckEvery(inner, keys.check_every)
    if keys.min_steps != 0:
        inner = MinSteps(inner, keys.min_steps)
    return inner


def _split_keys(spec: Spec, shared: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The keys for wrappers, and the others."""
    for_wrappers = {key: value for key, value in spec.keys if key in shared}
    return for_wrappers, {key: value for key, value in spec.keys if key not in shared}


def _refuse_unknown(spec: Spec, keys: Mapping[str, str], own: Sequence[str], shared: Sequence[str]) -> None:
    for key in keys:
        if key not in own:
            known = [*own, *shared]
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"{spec.name} has no key {key!r}{hint}; it has: {', '.join(known)}")


def _values(spec: Spec, record: PolicyRecord, keys: Mapping[str, str]) -> dict[str, Any]:
    hints = typing.get_type_hints(record.policy)
    values = {key: value_of(text, hints[key], key, spec) for key, text in keys.items()}
    for name, field in record.fields.items():
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in values and not optional:
            advice = "; 'haltkit compare' finds a value for your model" if name == "tau" else ""
            raise ValueError(f"{str(spec)!r} needs {name}, for example {spec.name}:{name}=...{advice}")
    return values


def _wrapping(spec: Spec, keys: Mapping[str, str], defaults: Wrapping) -> Wrapping:
    hints = typing.get_type_hints(Wrapping)
    return replace(defaults, **{key: value_of(text, hints[key], key, spec) for key, text in keys.items()})


def value_of(text: str, hint: Any, key: str, spec: Spec) -> Any:
    """A key's value from its text.

    Raises:
        ValueError: the text does not say a value of this type, or a spec cannot write the type.
    """
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
    if is_weights(hint):
        return Weights.load(text)
    if hint == StepTaus | None:
        try:
            return StepTaus.of_text(text)
        except ValueError as error:
            raise ValueError(f"{key}={text} in {str(spec)!r}: {error}") from None
    raise ValueError(f"{key} of {spec.name} is of type {hint}, which a spec cannot write: build it in Python")


def _same_number(written: str, value: object) -> bool:
    try:
        return float(written) == float(str(value))
    except ValueError:
        return False
