"""The one place where the diagnostics read what ``haltkit compare --json`` wrote."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from haltkit.comparison import Comparison, Row
from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.schema import check_depth, decode
from haltkit.files import read_json

__all__ = ["load_comparison", "read_comparison"]


def load_comparison(path: Path) -> Comparison:
    """The comparison in a file.

    Raises:
        ValueError: the file is not what ``haltkit compare --json`` writes; the message names the file.
    """
    document = read_json(path, "the comparison", dict)
    try:
        return read_comparison(document)
    except DiagnosticError as error:
        raise DiagnosticError(f"{str(path)!r}: {error}. Remove it, or compare again") from None


def read_comparison(document: Any) -> Comparison:
    """The comparison in a JSON document, of this version or before versions, every row checked to its last number.

    Raises:
        DiagnosticError: the document is not one that ``haltkit compare --json`` writes.
    """
    try:
        check_depth(document, "the comparison")
        found = Comparison.from_json(document)
        for i, row in enumerate(found.to_json()["rows"]):
            for name, kind in _kinds().items():
                decode(kind, row[name], f"rows[{i}].{name}")
        for name in ("metric", "item"):
            decode(str, getattr(found, name), name)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise DiagnosticError(str(error)) from None
    return found


@cache
def _kinds() -> dict[str, Any]:
    """What JSON has in each field of a row: a standard error that is infinite is null there, and no setting is."""
    kinds = get_type_hints(Row) | {"delta_se": float | None, "agreement_se": float | None}
    del kinds["setting"]
    return kinds
