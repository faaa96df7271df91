"""A policy and the loop that it was chosen for, as a small YAML file that ``attach`` loads."""

from __future__ import annotations

import dataclasses
from os import PathLike
from pathlib import Path
from typing import Any

from haltkit.attachment.description import Loop

__all__ = ["check_savable", "load", "save"]

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Loop)}
_FUNCTIONS = ("select", "put", "refuse")


def check_savable(loop: Loop) -> None:
    """Whether a file can hold a description.

    Raises:
        ValueError: it holds functions.
    """
    functions = [name for name in _FUNCTIONS if getattr(loop, name) is not None]
    functions += ["initial"] if callable(loop.initial) else []
    if functions:
        raise ValueError(
            f"this description holds functions ({', '.join(functions)}), which a file cannot: save the spec alone "
            "and give the description to attach as loop="
        )


def save(path: str | PathLike[str], spec: str, loop: Loop | None = None, about: str = "") -> None:
    """Write a policy's spec, and the description unless a preset finds it (None).

    Raises:
        ValueError: the description holds functions, which a file cannot.
    """
    import yaml

    values: dict[str, Any] = {"policy": spec}
    if loop is not None:
        check_savable(loop)
        described = {f.name: getattr(loop, f.name) for f in dataclasses.fields(loop) if f.name not in _FUNCTIONS}
        plain = {
            name: list(v) if isinstance(v, tuple) else dict(v) if name == "on_halt" else v
            for name, v in described.items()
            if v != _DEFAULTS.get(name, ()) and v not in ((), {})
        }
        values["loop"] = plain
    text = yaml.safe_dump(values, sort_keys=False)
    Path(path).write_text("".join(f"# {line}\n" for line in about.splitlines()) + text, encoding="utf-8")


def load(path: str | PathLike[str]) -> tuple[str, Loop | None]:
    """The spec and the description (None: find the preset) that :func:`save` wrote.

    Raises:
        ValueError: not such a file; what is wrong is said.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"no file {str(path)!r}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not isinstance(values.get("policy"), str) or set(values) - {"policy", "loop"}:
        raise ValueError(f"{str(path)!r} must hold 'policy: SPEC' and may hold 'loop:', the fields of haltkit.Loop")
    described = values.get("loop")
    if described is None:
        return values["policy"], None
    known = [name for name in _DEFAULTS if name not in _FUNCTIONS]
    if not isinstance(described, dict) or (unknown := set(described) - set(known)):
        wrong = f" ({', '.join(sorted(unknown))})" if isinstance(described, dict) else ""
        raise ValueError(f"{str(path)!r}: loop has fields that are not known{wrong}; allowed are {', '.join(known)}")
    if "body" not in described:
        raise ValueError(f"{str(path)!r}: loop names no body")
    try:
        if described.get("carry") is not None:
            described["carry"] = tuple(described["carry"])
        loop = Loop(**described)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r}: loop cannot be read: {error}") from None
    named = [*loop.body, loop.state_module, loop.scope, *loop.reset_on]
    if not all(isinstance(name, str) for name in named) or not isinstance(loop.initial, (int, str, type(None))):
        raise ValueError(f"{str(path)!r}: body, state, scope and reset_on are paths, initial a position or a name")
    return values["policy"], loop
