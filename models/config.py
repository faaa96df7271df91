"""From plain values (YAML, JSON) to frozen config dataclasses and back, checked field by field.

A config is unpacked at the door (command line, builders, checkpoints); the classes behind it take flat arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import reprlib
import typing
from typing import Any, Literal, TypeVar

__all__ = ["ConfigError", "from_dict", "to_dict"]

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says which field and what is allowed."""


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain lists, dicts and scalars, ready for YAML or JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def _shown(value: Any) -> str:
    """A value for a message: YAML's references can make a short file's value a very long one."""
    short = reprlib.Repr()
    short.maxstring, short.maxlist, short.maxlevel = 80, 8, 3
    return short.repr(value)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}={_shown(value)}: allowed are {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}={_shown(value)}: a list is expected")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise ConfigError(f"{where}={_shown(value)}: exactly {len(kinds)} entries are expected")
        return tuple(_coerce(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = float(value)
    # YAML 1.1 reads 6e-4 (no dot) as a string: accept what is plainly a number.
    if hint is float and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    # YAML reads an unquoted region such as 4 as a number.
    if hint is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{where}={_shown(value)}: a finite number is expected")
    if type(value) is not hint:
        raise ConfigError(f"{where}={_shown(value)}: {hint.__name__} expected, got {type(value).__name__}")
    return value


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """Build a config dataclass from plain values.

    Raises:
        ConfigError: an unknown field (the known ones are listed), a value of the wrong kind, or a
            value that the dataclass itself refuses.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'config'}: a mapping of fields is expected, got {_shown(values)}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(typing.cast(Any, cls))]
    built: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else str(name)
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"unknown config field {path}{hint}; known here: {', '.join(known)}")
        if dataclasses.is_dataclass(hints[name]):
            built[name] = from_dict(typing.cast("type[Any]", hints[name]), value, path)
        else:
            built[name] = _coerce(value, hints[name], path)
    return cls(**built)
