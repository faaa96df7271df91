"""A diagnosis as a value: all that was found out about a model, with its controls, to JSON and back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from haltkit.comparison import Comparison
from haltkit.diagnostics.compared import read_comparison
from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.judgement import Judgement
from haltkit.diagnostics.results import Cell, Control, Snapshot, Survey
from haltkit.diagnostics.schema import check_depth, decode, encode
from haltkit.files import read_json, write_text

__all__ = ["FORMAT", "RESULTS_FILE", "Diagnosis"]

RESULTS_FILE = "diagnose.json"
FORMAT, _OLD_FORMAT = "haltkit-diagnose-3", "haltkit-diagnose-2"


@dataclass(frozen=True)
class Diagnosis:
    """What was found out about a model. Whatever was not run is empty, so that a reader need not ask first.

    Attributes:
        about: what is known of the model, plain values: ``model``, ``text`` and ``dtype`` (texts), ``tokens_seen``.
        trained: the model itself.
        untrained: the same shape with fresh weights, the control of every finding.
        snapshots: the model across its training, by tokens seen.
        control: a model without loops, for stages of inference.
        grid: untrained blocks by norm, injection and number of layers.
        comparison: of policies, made beforehand.
        claims: the papers' claims, judged on all this.
        partial: the run was cut short.

    Raises:
        DiagnosticError: an ``about`` that is not of plain values.
    """

    about: dict[str, Any] = field(default_factory=dict)
    trained: Survey = field(default_factory=Survey)
    untrained: Survey = field(default_factory=Survey)
    snapshots: tuple[Snapshot, ...] = ()
    control: Control | None = None
    grid: tuple[Cell, ...] = ()
    comparison: Comparison | None = None
    claims: tuple[Judgement, ...] = ()
    partial: bool = False

    def __post_init__(self) -> None:
        try:
            json.dumps(self.about, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise DiagnosticError(f"'about' goes into JSON, so give plain values: {error}") from None
        check_depth(self.about, "about")
        decode(dict[str, Any], self.about, "about")
        decode(cast(Any, float | None), self.about.get("tokens_seen"), "about.tokens_seen")
        for name in ("model", "text", "dtype"):
            decode(cast(Any, str | None), self.about.get(name), f"about.{name}")
        by_age = tuple(sorted(self.snapshots, key=lambda one: one.tokens_seen))
        object.__setattr__(self, "snapshots", by_age)

    @property
    def models(self) -> dict[str, Survey]:
        """The surveys that have data, by name: ``trained`` and ``untrained``."""
        pairs = {"trained": self.trained, "untrained": self.untrained}
        return {name: survey for name, survey in pairs.items() if survey != Survey()}

    @property
    def name(self) -> str:
        """The model's."""
        return str(self.about.get("model") or "a model")

    @property
    def tokens_seen(self) -> float:
        """Tokens of training; 0 if it is not known."""
        return float(self.about.get("tokens_seen") or 0)

    @property
    def heading(self) -> str:
        """One line: the model, its training, and whether the run was cut short."""
        seen = self.about.get("tokens_seen")
        return self.name + (f", {seen:,} tokens seen" if seen else "") + (" (partial: interrupted)" * self.partial)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON, with the format's name and version."""
        return {
            "format": FORMAT,
            "partial": self.partial,
            "about": self.about,
            "models": encode(self.models),
            "snapshots": encode(self.snapshots),
            "control": encode(self.control),
            "grid": encode(self.grid),
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "claims": encode(self.claims),
        }

    @classmethod
    def from_json(cls, value: Any) -> Diagnosis:
        """The diagnosis that :meth:`to_json` made this of; the format before is read too.

        Raises:
            DiagnosticError: another format, or damaged; the message names the place.
        """
        made_by = value.get("format") if isinstance(value, dict) else None
        if made_by not in (FORMAT, _OLD_FORMAT):
            named = f"of the format {made_by!r}" if isinstance(made_by, str) else "without a format"
            raise DiagnosticError(f"results {named}, where {FORMAT!r} or {_OLD_FORMAT!r} can be read: run it again")
        if made_by == _OLD_FORMAT:
            value = _upgraded(value)
        found: dict[str, Any] = {}
        for name, kind in (
            ("about", dict[str, Any]),
            ("partial", bool),
            ("snapshots", tuple[Snapshot, ...]),
            ("control", Control | None),
            ("grid", tuple[Cell, ...]),
            ("claims", tuple[Judgement, ...]),
        ):
            if name in value:
                found[name] = decode(cast(Any, kind), value[name], name)
        models = decode(dict[str, Survey], value.get("models") or {}, "models")
        if unknown := models.keys() - {"trained", "untrained"}:
            raise DiagnosticError(f"models.{min(unknown)} is neither 'trained' nor 'untrained'")
        found |= models
        if value.get("comparison") is not None:
            try:
                found["comparison"] = read_comparison(value["comparison"])
            except DiagnosticError as error:
                raise DiagnosticError(f"comparison: {error}") from None
        return cls(**found)

    @classmethod
    def load(cls, path: Path) -> Diagnosis:
        """The diagnosis in a file.

        Raises:
            ValueError: not JSON, another format, or damaged; the message names the file and the place.
        """
        value = read_json(path, "the diagnosis", dict)
        try:
            return cls.from_json(value)
        except DiagnosticError as error:
            raise DiagnosticError(f"{str(path)!r} is not what this 'haltkit diagnose' writes: {error}") from None

    def save(self, path: Path) -> None:
        """Write compact JSON, atomically: most of it is rows of numbers."""
        write_text(path, json.dumps(self.to_json(), separators=(",", ":"), allow_nan=False) + "\n")


def _upgraded(value: dict[str, Any]) -> dict[str, Any]:
    """The format before in today's names."""
    claims = value.get("claims") or []
    if isinstance(claims, list):
        claims = [
            {("ruling" if key == "verdict" else key): inner for key, inner in one.items()}
            if isinstance(one, dict)
            else one
            for one in claims
        ]
    return {
        **value,
        "snapshots": value.get("checkpoints") or [],
        "grid": value.get("grid") or [],
        "claims": claims,
    }
