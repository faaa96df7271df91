"""Dataclasses to JSON and back. Their type hints are the schema: a damaged file is refused by the place of its fault.

Known are dataclasses, ``dict[str, X]``, ``tuple[X, ...]``, ``X | None``, ``Literal``, ``str``, ``int``, ``float``,
``bool`` and ``Any`` (plain JSON). A field without a default must be there; keys that no field has are ignored.
"""

from __future__ import annotations

import dataclasses
import math
import types
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from haltkit.diagnostics.errors import DiagnosticError

__all__ = ["FLAT", "SPARSE", "Curve", "check_depth", "decode", "encode"]

T = TypeVar("T")
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


# Metadata of a field that the JSON omits while it equals its default.
SPARSE = {"sparse": True}
# Metadata of a field ``dict[str, X]`` whose entries stand beside the other fields: ``cosine_mean``, ``cosine_std``.
FLAT = {"flat": True}


@dataclass(frozen=True)
class Curve:
    """A signal over k = 1 .. K: its mean, its spread over tokens, and the standard error of the mean.

    The last two are empty where they were not kept.
    """

    mean: tuple[float | None, ...]
    std: tuple[float | None, ...] = field(default=(), metadata=SPARSE)
    se: tuple[float | None, ...] = field(default=(), metadata=SPARSE)


def encode(value: Any) -> Any:
    """Plain values for JSON; those of a dataclass by field name."""
    if isinstance(value, (list, tuple)):
        return [encode(one) for one in value]
    if isinstance(value, dict):
        return {key: encode(one) for key, one in value.items()}
    if not dataclasses.is_dataclass(value):
        return value
    found: dict[str, Any] = {}
    for one in fields(value):
        inner = getattr(value, one.name)
        if one.metadata.get("flat"):
            for name, entry in inner.items():
                found |= {f"{name}_{part}": numbers for part, numbers in encode(entry).items()}
        elif not (one.metadata.get("sparse") and inner == _default(one)):
            found[one.name] = encode(inner)
    return found


def decode(kind: type[T], value: Any, where: str = "") -> T:
    """The value of this type that :func:`encode` made the JSON from.

    Args:
        where: the value's place in the file, for messages.

    Raises:
        DiagnosticError: another type than the schema's, a missing field, or fields that contradict each other; the
            message names the place.
    """
    return cast(T, _decode(kind, value, where))


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        (inner,) = (one for one in get_args(kind) if one is not type(None))
        return None if value is None else _decode(inner, value, where)
    if origin is tuple:
        inner = get_args(kind)[0]
        if not isinstance(value, list):
            raise _wrong(where, "a list", value)
        if inner == float | None and all(one is None or (type(one) is float and math.isfinite(one)) for one in value):
            return tuple(value)  # most of a file is such rows, and no place in them needs naming
        return tuple(_decode(inner, one, f"{where}[{i}]") for i, one in enumerate(value))
    if origin is dict:
        inner = get_args(kind)[1]
        return {key: _decode(inner, one, f"{where}.{key}") for key, one in _object(value, where).items()}
    if origin is Literal:
        if value not in get_args(kind):
            raise _wrong(where, f"one of {', '.join(map(repr, get_args(kind)))}", value)
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, _object(value, where), where)
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or isinstance(value, bool) is not (kind is bool) or not _has_a_float(value):
        raise _wrong(where, _WORDS[kind], value)
    return value


def _decode_fields(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints, found = _hints(kind), {}
    for one in fields(kind):
        place = f"{where}.{one.name}"
        if one.metadata.get("flat"):
            found[one.name] = _decode(hints[one.name], _gathered(kind, get_args(hints[one.name])[1], value), where)
        elif one.name in value:
            found[one.name] = _decode(hints[one.name], value[one.name], place)
        elif _default(one) is MISSING:
            raise DiagnosticError(f"{place.lstrip('.')} is missing")
    try:
        return kind(**found)
    except DiagnosticError as error:  # each field is what its type says, and they contradict each other
        raise DiagnosticError(f"{where.lstrip('.')}: {error}") from None


def _gathered(kind: type[Any], entry: type[Any], value: dict[str, Any]) -> dict[str, Any]:
    """The entries of a flat field from among all keys: ``{"x_mean": [..]}`` to ``{"x": {"mean": [..]}}``."""
    own, parts = {one.name for one in fields(kind)}, {one.name for one in fields(entry)}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        name, line, part = key.rpartition("_")
        if line and part in parts and key not in own:
            found.setdefault(name, {})[part] = inner
    return found


@lru_cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _default(one: dataclasses.Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    return value


def _has_a_float(value: Any) -> bool:
    """False for a number that JSON can write and a float cannot represent."""
    try:
        return not isinstance(value, (int, float)) or math.isfinite(value)
    except OverflowError:
        return False


def _wrong(where: str, expected: str, value: Any) -> DiagnosticError:
    shown = repr(value) if not isinstance(value, (dict, list)) else {dict: "an object", list: "a list"}[type(value)]
    return DiagnosticError(f"{where.lstrip('.') or 'the whole'} must be {expected}, not {shown[:60]}")


def check_depth(value: Any, where: str, deepest: int = 64) -> None:
    """Refuse plain values that are nested deeper than JSON can be written, wherever the writing begins.

    Raises:
        DiagnosticError: nested more than ``deepest`` levels, or in a circle.
    """
    level = [value]
    for _ in range(deepest):
        level = [inner for one in level if isinstance(one, (dict, list, tuple)) for inner in _inside(one)]
        if not level:
            return
    raise DiagnosticError(f"{where} is nested more than {deepest} levels deep")


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value
