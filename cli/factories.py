"""``pkg.mod:function`` on the command line: a function of the user's that says what to work on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["call_factory"]


def call_factory(path: str, kind: type[Any] | tuple[type[Any], ...], what: str) -> Any:
    """What the function returns; modules in the current folder are found.

    Args:
        path: ``pkg.mod:function``.
        kind: what it must return, or one of which.
        what: begins every message: the option or argument.

    Raises:
        ValueError: an unknown module or function, or one that returns something else.
    """
    import importlib
    import sys

    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"{what}: write it as pkg.mod:function")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except (ModuleNotFoundError, TypeError) as error:  # a relative name is a TypeError
        raise ValueError(f"{what}: {error}") from None
    finally:
        sys.path.remove(str(Path.cwd()))
    function = getattr(found, name, None)
    if not callable(function):
        raise ValueError(f"{what}: {module} has no function {name!r}")
    made = function()
    if not isinstance(made, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        named = " or a ".join(f"{one.__module__}.{one.__qualname__}" for one in kinds)
        raise ValueError(f"{what}: it must return a {named}, not a {type(made).__name__}")
    return made
