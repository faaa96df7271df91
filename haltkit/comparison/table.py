"""A comparison as a value: its rows, what they were measured on, and its JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, get_args

from haltkit.comparison.against import AgainstOracle, against_oracle
from haltkit.comparison.conclusions import AGREEMENT_LEVELS, NATS_LEVELS, SHARES, Conclusion, conclude
from haltkit.comparison.possible import Possible
from haltkit.comparison.rows import Decided, Row, policies_of
from haltkit.headroom import Regret
from haltkit.measured import LEVEL
from haltkit.setting import Setting

__all__ = ["FORMAT", "VERSION", "Comparison"]

FORMAT, VERSION = "haltkit-comparison", 2
# What rows were called while every comparison was of cross-entropy per token, in files without a version.
_OLD_NAMES = {"ce": "loss", "delta_ce": "delta", "delta_ce_se": "delta_se", "ms_per_token": "ms"}
_OLD_COUNTS = {"tokens": "items", "timed_tokens": "timed_items"}
_FIXED = re.compile(r"([^=;]+=)?fixed:steps=\d+(;[^=;]+=fixed:steps=\d+)*")
# Standard errors of a single sequence are infinite, which JSON cannot say: null there.
_ERRORS = {"delta_se": "delta", "agreement_se": "agreement"}
_CLUSTERED = ("wasted_error", "early_error")  # NaN of a single sequence


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` measured.

    Attributes:
        rows: one per setting, full depth first.
        items, sequences: what quality was measured on, entries of the loss and how many sequences they make.
        timed_items: entries that each timing covers.
        metric: names the loss, as ``CE``.
        item: what one entry of the loss is for, as ``token``.
        levels: losses above full depth that conclusions are drawn at, in the loss's unit, the middle one being what a
            winner is chosen at.
        agreement_levels: the same for agreement with full depth.
        about: model, text, device and what else is known, plain values.
        headroom: what halting could save at best, by region; empty where it is not known.
        no_headroom: why it is not known.
    """

    rows: tuple[Row, ...]
    items: int
    sequences: int
    timed_items: int
    metric: str = "loss"
    item: str = "item"
    levels: tuple[float, ...] = NATS_LEVELS
    agreement_levels: tuple[float, ...] = AGREEMENT_LEVELS
    about: dict[str, Any] = field(default_factory=dict)
    headroom: dict[str, Possible] = field(default_factory=dict)
    no_headroom: str = ""

    def __post_init__(self) -> None:
        if not self.rows or not self.levels:
            raise ValueError("a comparison has at least one row and one level")

    @property
    def unit(self) -> str:
        """Of the loss."""
        return self.rows[0].unit

    @property
    def regions(self) -> tuple[str, ...]:
        """The looped regions, in the order they run."""
        return tuple(self.rows[0].steps)

    @cached_property
    def _conclusion(self) -> Conclusion:
        return conclude(self.rows, self.levels, self.agreement_levels)

    @property
    def policies(self) -> list[str]:
        """The policies by name, in the order of their rows; fixed depths and the oracle are none."""
        return policies_of(self.rows)

    def conclusion(self) -> Conclusion:
        """The conclusion from the rows, at each quality."""
        return self._conclusion

    def against_oracle(self) -> tuple[AgainstOracle, ...]:
        """Each policy's regret by region, and the share of the headroom that it realises; empty where it is unknown."""
        return against_oracle(self.rows, self._conclusion, self.headroom)

    @property
    def certified(self) -> tuple[Row, ...]:
        """Settings of which a certificate about this model promises something."""
        return tuple(row for row in self.rows if row.promise)

    def winner(self) -> Row | None:
        """The fastest setting of any policy within the middle level for sure; None: no policy is that good."""
        return self._conclusion.winner

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rows", "about", "headroom")}
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        return {
            "format": FORMAT,
            "version": VERSION,
            "about": self.about,
            **plain,
            "unit": self.unit,
            "headroom": {name: known.to_json() for name, known in self.headroom.items()},
            "rows": [_row_to_json(row) for row in self.rows],
            "conclusion": self._concluded(),
        }

    def _concluded(self) -> dict[str, Any]:
        """The conclusion as plain values for whoever reads the file; it follows from the rows and is not read back."""
        said = self._conclusion
        known = {name: one.headroom for name, one in self.headroom.items()}
        return {
            "level": said.level,
            "headroom_level": LEVEL,
            "winner": None if said.winner is None else said.winner.label,
            "fixed": None if said.fixed is None else said.fixed.label,
            "fixed_serves_best": said.fixed_serves_best,
            "undecided": said.undecided,
            "headroom": {
                name: {
                    "headroom": one.headroom(LEVEL),
                    "fixed_depth": one.fixed_depth(LEVEL),
                    "conclusion": self.headroom[name].conclusion(LEVEL),
                }
                for name, one in known.items()
            },
            "against_oracle": [asdict(one) for one in self.against_oracle()],
            "certified": [{"setting": row.label, "promise": row.promise} for row in self.certified],
        }

    @classmethod
    def from_json(cls, values: Any) -> Comparison:
        """A comparison from the values of its JSON, also of the files without a version that came before.

        Raises:
            ValueError: results of another version, or values that are not a comparison's.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("rows"), Sequence) or not values["rows"]:
            raise ValueError("this is not what 'haltkit compare --json' writes: it has no rows")
        if "version" not in values and "format" not in values:
            values = _from_old(values)
        if values.get("format") != FORMAT or values.get("version") != VERSION:
            raise ValueError(
                f"these results are {values.get('format')!r} of version {values.get('version')!r}, and this haltkit "
                f"reads {FORMAT!r} of version {VERSION}: measure again with 'haltkit compare --json'"
            )
        try:
            values = {"headroom": {}, "no_headroom": "", **values}  # of this version, but before there was headroom
            made: dict[str, Any] = {f.name: values[f.name] for f in fields(cls)}
            made["rows"] = tuple(_row_from_json(row) for row in made["rows"])
            made["about"] = dict(made["about"])
            made["headroom"] = {name: Possible.from_json(known) for name, known in made["headroom"].items()}
            for name in ("levels", "agreement_levels"):
                made[name] = tuple(map(float, made[name]))
            return cls(**made)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"this is not what 'haltkit compare --json' writes: {error!r}") from None

    @classmethod
    def levels_for(cls, unit: str, full_loss: float) -> tuple[float, ...]:
        """The levels that conclusions are drawn at unless a subject says its own."""
        if unit == "nats":
            return NATS_LEVELS
        return tuple(float(f"{abs(full_loss) * share:.2g}") for share in SHARES)


def _row_to_json(row: Row) -> dict[str, Any]:
    values = asdict(replace(row, setting=None))
    del values["setting"]
    for name in _ERRORS:
        if values[name] is not None and not math.isfinite(values[name]):
            values[name] = None
    for one in values["regret"].values():
        for name in _CLUSTERED:
            one[name] = one[name] if math.isfinite(one[name]) else None
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def _row_from_json(values: Mapping[str, Any]) -> Row:
    known = "policy" if values.get("depth") is None else "depth"  # in files of before there were depths by kind
    values = {"regret": {}, "promise": "", "without": "", "decided": known, **values}
    if values["decided"] not in get_args(Decided):
        raise ValueError(f"decided={values['decided']!r}: known are {', '.join(get_args(Decided))}")
    made = {f.name: values[f.name] for f in fields(Row) if f.name != "setting"}
    made["regret"] = {
        name: Regret(**{**one, **{e: math.nan if one[e] is None else one[e] for e in _CLUSTERED}})
        for name, one in made["regret"].items()
    }
    for name, of in _ERRORS.items():
        if made[name] is None and made[of] is not None:
            made[name] = math.inf
    for name in ("loss", "delta", "ms", "speedup"):
        made[name] = float(made[name])
    low, high = made["ms_spread"]
    made |= {"ms_spread": (low, high), "ms_repeats": tuple(made["ms_repeats"])}
    return Row(**made)


def _from_old(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file without a version, as this version writes them: of text, with a perplexity, unless not."""
    try:
        text = values["rows"][0].get("ppl") is not None
        about = {k: v for k, v in values.items() if k not in ("rows", "sequences", *_OLD_COUNTS)}
        rows = []
        for row in values["rows"]:
            new = {_OLD_NAMES.get(name, name): value for name, value in row.items()}
            new |= {"unit": "nats" if text else "loss", **_old_setting(row)}
            rows.append({"causal": True, "outcomes": {}, **new})
        counts = {new: values.get(old, 0) for old, new in _OLD_COUNTS.items()}
        levels = Comparison.levels_for("nats" if text else "loss", rows[0]["loss"])
        named = {"metric": "CE", "item": "token"} if text else {"metric": "loss", "item": "item"}
        extra = {"levels": list(levels), "agreement_levels": list(AGREEMENT_LEVELS)}
        counts["sequences"] = values.get("sequences", 0)
        return {"format": FORMAT, "version": VERSION, "about": about, **counts, **named, **extra, "rows": rows}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"this is not what 'haltkit compare --json' writes: {error!r}") from None


def _old_setting(row: Mapping[str, Any]) -> dict[str, Any]:
    """``depth`` and ``label`` of an old row; only fixed depths are parsed: other specs may name modules to import."""
    if _FIXED.fullmatch(row["spec"]):
        setting = Setting.of(row["spec"], list(row["steps"]))
        return {"depth": None if setting.depth is None else dict(setting.depth.steps), "label": setting.label}
    return {"depth": None, "label": row["spec"] if row["tau"] is None else f"{row['policy']} tau={row['tau']:g}"}
