"""The table of halting policies: one record per policy, and everything else about it follows from the record.

A policy with a record is listed by ``haltkit policies``, can be written in a spec by its name, is timed by ``haltkit
bench`` and is put through the laws that the tests state for every policy. A user's own class gets a record from
:func:`register`; without one it is known by its place, ``pkg.mod:Class``, with the defaults of
:class:`PolicyRecord`. Installed packages add policies through the entry-point group ``haltkit.policies``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import Any, TypeVar

from haltkit import policies
from haltkit.trust import check_import

__all__ = [
    "COMBINATIONS",
    "ENTRY_POINT_GROUP",
    "PolicyRecord",
    "given_names",
    "known_names",
    "place_of",
    "record_of",
    "records",
    "register",
]

ENTRY_POINT_GROUP = "haltkit.policies"
COMBINATIONS = ("any", "all")
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
C = TypeVar("C", bound=type[Any])


@dataclass(frozen=True)
class PolicyRecord:
    """What haltkit knows of a policy beside its class.

    Args:
        name: in specs.
        policy: the class, a frozen dataclass whose fields are the keys of its specs.
        formula: of the signal, for the listing; empty: the first line of the class's docstring.
        scale: unit and range of the signal.
        patience: hits in a row that it asks for unless a spec says otherwise.
        needs_readout: whether it looks at logits, so that a model without a readout cannot use it.
        wrapped: whether the keys that wrappers carry out (patience, granularity, ...) apply to it.
        swept: whether a comparison tries it when it is not told which policies to compare.
        examples: keys of specs under which it halts within some 20 steps on the maps of order one that the laws are
            tested on. The first one is also the example in the listing.
        cost: keys of a spec that never halts, to time an update with; None: it is not timed.
        sweep: a key that is not ``tau`` and the values that a comparison tries where a spec does not say it.
        greatest_tau: the greatest threshold that it takes; infinite where there is none.
        source: of the formula, for the listing; empty: none is named.
    """

    name: str
    policy: type[Any]
    formula: str = ""
    scale: str = "its own"
    patience: int = 1
    needs_readout: bool = False
    wrapped: bool = True
    swept: bool = False
    examples: tuple[str, ...] = ()
    cost: str | None = None
    sweep: tuple[str, tuple[object, ...]] | None = None
    greatest_tau: float = math.inf
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.policy, type):
            raise ValueError(f"policy {self.name!r} is not a class")
        if not dataclasses.is_dataclass(self.policy):
            where = f"{self.policy.__module__}:{self.policy.__qualname__}"
            raise ValueError(f"{where} is not a dataclass: a policy's keys are its fields")
        if self.patience < 1:
            raise ValueError(f"patience={self.patience} of policy {self.name!r}: it must be at least 1")
        if not self.formula:
            first, *_ = (self.policy.__doc__ or self.name).strip().split("\n")
            object.__setattr__(self, "formula", first)

    @property
    def fields(self) -> dict[str, dataclasses.Field[Any]]:
        """The keys of its specs, by name, without those of the wrappers."""
        return {f.name: f for f in dataclasses.fields(self.policy) if f.init}


@dataclass
class _Table:
    """Records by name, in the order of the listing."""

    rows: dict[str, PolicyRecord] = field(default_factory=dict)

    def add(self, record: PolicyRecord) -> None:
        known = self.rows.get(record.name)
        if known is not None and known.policy is not record.policy:
            places = {(cls.__module__, cls.__qualname__) for cls in (known.policy, record.policy)}
            same_place = len(places) == 1
            if not same_place:  # the same place again: its module was loaded anew
                raise ValueError(
                    f"the name {record.name!r} belongs to {known.policy.__module__}:{known.policy.__qualname__}: "
                    "choose another one"
                )
        if not _NAME.fullmatch(record.name) or record.name in COMBINATIONS:
            raise ValueError(f"{record.name!r} cannot name a policy: give a word that is neither 'any' nor 'all'")
        self.rows[record.name] = record


_STATE = "that of the state's norm; [0, inf)"
_BUILTIN = (
    PolicyRecord(
        "norm",
        policies.StepNorm,
        "||d_k||",
        _STATE,
        swept=True,
        examples=("tau=0.05",),
        cost="tau=1e-12",
        source="arXiv 2509.23314, Eq. 3",
    ),
    PolicyRecord(
        "norm-rel",
        policies.NormalizedStepNorm,
        "||d_k|| / (||x_{k-1}|| + eps)",
        "a ratio; [0, inf)",
        examples=("tau=0.03", "tau=0.03,denominator=current"),
        cost="tau=1e-12",
        source="arXiv 2509.23314, section 4; with denominator=current the code of arXiv 2502.05171",
    ),
    PolicyRecord(
        "kl",
        policies.KL,
        "KL(p_k || p_{k-1}), p = softmax(readout(x) / temperature)",
        "nats; [0, inf)",
        needs_readout=True,
        swept=True,
        cost="tau=1e-12",
        examples=("tau=1e-3", "tau=1e-3,direction=previous_current,temperature=0.5", "tau=1e-3,min_p=0.1"),
        source="arXiv 2509.23314, Eq. 4; with min_p=0.1 minp-kl in the code of arXiv 2502.05171",
    ),
    PolicyRecord(
        "accel",
        policies.Acceleration,
        "||d_k - d_{k-1}||",
        _STATE,
        patience=2,
        swept=True,
        examples=("tau=0.05",),
        cost="tau=1e-12",
        source="arXiv 2509.23314, Eq. 5",
    ),
    PolicyRecord(
        "accel-rel",
        policies.NormalizedAcceleration,
        "||d_k - d_{k-1}|| / (||d_k|| + ||d_{k-1}|| + eps)",
        "a ratio; [0, 1] (denominator=steps), [0, inf) (state)",
        patience=2,
        examples=("tau=0.2", "tau=0.05,denominator=state"),
        cost="tau=1e-12",
        source="arXiv 2509.23314, Eq. 6; with denominator=state the code of arXiv 2502.05171",
    ),
    PolicyRecord(
        "speed",
        policies.StepSizeChange,
        "abs(||d_k|| - ||d_{k-1}||)",
        _STATE,
        examples=("tau=0.05",),
        cost="tau=1e-12",
        source="the words of the abstract of arXiv 2509.23314",
    ),
    PolicyRecord(
        "settle",
        policies.Settling,
        "||d_k|| r / |1 - r e^(i angle)|, r and angle of d_k beside d_{k-1}; 0 on an orbit in a plane",
        _STATE,
        patience=2,
        examples=("tau=0.05", "tau=0.05,slack=0.1,turn=45"),
        cost="tau=1e-12",
        source="haltkit's own",
    ),
    PolicyRecord(
        "cosine",
        policies.CosineDistance,
        "1 - cos(x_k, x_{k-1})",
        "one minus a cosine; [0, 2]",
        examples=("tau=1e-3",),
        cost="tau=1e-12",
        source="cosine in the code of arXiv 2502.05171; saturation in CALM, arXiv 2207.07061",
    ),
    PolicyRecord(
        "entropy",
        policies.EntropyChange,
        "abs(H_k - H_{k-1}), H = entropy of softmax(readout(x) / temperature)",
        "nats; [0, log V]",
        needs_readout=True,
        examples=("tau=1e-3",),
        cost="tau=1e-12",
        source="entropy-diff in the code of arXiv 2502.05171",
    ),
    PolicyRecord(
        "margin",
        policies.Margin,
        "1 - (p_(1) - p_(2)), p = softmax(readout(x) / temperature)",
        "a probability; [0, 1]",
        needs_readout=True,
        examples=("tau=0.8",),
        cost="tau=1e-12",
        source="CALM, arXiv 2207.07061",
    ),
    PolicyRecord(
        "stable",
        policies.Stable,
        "1 / (1 + steps in a row without a change of argmax readout(x))",
        "a reciprocal count; (0, 1]",
        needs_readout=True,
        examples=("times=3",),
        cost="times=1000000",
        sweep=("times", (1, 2, 3, 4, 6, 8)),
        source="argmax-stability in the code of arXiv 2502.05171",
    ),
    PolicyRecord(
        "probe",
        policies.Probe,
        "P(the prediction will change) = sigmoid(-(w x_k + u f_k + b)), w, u, b of 'haltkit fit'",
        "a probability; [0, 1]",
        greatest_tau=1.0,
        source="haltkit's own",
    ),
    PolicyRecord(
        "gate",
        policies.Gate,
        "1 - lambda_k, lambda_k = sigmoid(gate(x_k)); prod_j (1 - lambda_j) (cumulative); 1 - sum_j lambda_j (sum)",
        "a probability; [0, 1]",
        examples=("tau=0.3", "tau=0.1,rule=cumulative", "tau=0.1,rule=sum"),
        cost="tau=1e-12,rule=cumulative",
        greatest_tau=1.0,
        source="TRM (arXiv 2510.04871), HRM (2506.21734), PonderNet (2107.05407), Ouro (2510.25741), ACT (1603.08983)",
    ),
    PolicyRecord(
        "table",
        policies.Table,
        "depth[kind of row], looked up before the loop; of 'haltkit fit --policy table'",
        "steps; from 1",
        wrapped=False,
        source="haltkit's own",
    ),
    PolicyRecord(
        "fixed",
        policies.Fixed,
        "steps - k",
        "steps left; counts down to 0",
        wrapped=False,
        examples=("steps=4",),
    ),
)
_TABLE = _Table({record.name: record for record in _BUILTIN})


def register(
    name: str,
    *,
    formula: str = "",
    scale: str = "its own",
    patience: int = 1,
    needs_readout: bool = False,
    wrapped: bool = True,
    swept: bool = False,
    examples: tuple[str, ...] = (),
    cost: str | None = None,
    sweep: tuple[str, tuple[object, ...]] | None = None,
    greatest_tau: float = math.inf,
    source: str = "",
) -> Callable[[C], C]:
    """Give a policy a name and a record, as a decorator of its class::

        @haltkit.register("cosine", formula="1 - cos(x_k, x_{k-1})", scale="[0, 2]", examples=("tau=0.01",))
        @dataclass(frozen=True)
        class Cosine:
            tau: float

    The arguments are the fields of :class:`PolicyRecord`.

    Raises:
        ValueError: the name belongs to another class or cannot stand in a spec, or the class is not a dataclass.
    """

    def decorate(policy: C) -> C:
        _TABLE.add(
            PolicyRecord(
                name,
                policy,
                formula=formula,
                scale=scale,
                patience=patience,
                needs_readout=needs_readout,
                wrapped=wrapped,
                swept=swept,
                examples=examples,
                cost=cost,
                sweep=sweep,
                greatest_tau=greatest_tau,
                source=source,
            )
        )
        return policy

    return decorate


def records() -> list[PolicyRecord]:
    """Every policy that has a name: built-in ones, registered ones, then those that installed packages add.

    Raises:
        ValueError: an installed package names something that is not a policy's class.
    """
    return [_named(name) for name in known_names()]


def known_names() -> list[str]:
    """Their names, without loading what installed packages add."""
    rows = _TABLE.rows
    return [*rows, *sorted(e.name for e in entry_points(group=ENTRY_POINT_GROUP) if e.name not in rows)]


def given_names() -> list[str]:
    """Names that mean the same policy in every process: haltkit's own, then those that installed packages give."""
    return [*(record.name for record in _BUILTIN), *(e.name for e in entry_points(group=ENTRY_POINT_GROUP))]


def place_of(record: PolicyRecord) -> str:
    """What names a policy in every process: its name if haltkit or an installed package gives it, else its place."""
    policy = record.policy
    return record.name if record.name in given_names() else f"{policy.__module__}:{policy.__qualname__}"


def record_of(policy: str | type[Any]) -> PolicyRecord:
    """The record of a policy by its name, its ``pkg.mod:Class`` place or its class.

    Raises:
        ValueError: there is nothing of this name; the known names are listed.
    """
    if isinstance(policy, str):
        return _named(policy)
    known = next((record for record in _TABLE.rows.values() if record.policy is policy), None)
    return known or PolicyRecord(f"{policy.__module__}:{policy.__qualname__}", policy)


def _named(name: str) -> PolicyRecord:
    if name in _TABLE.rows:
        return _TABLE.rows[name]
    if ":" in name:
        module, _, attribute = name.partition(":")
        for record in _TABLE.rows.values():
            if (record.policy.__module__, record.policy.__qualname__) == (module, attribute):
                return replace(record, name=name)
        check_import(name)
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, SyntaxError, TypeError, ValueError) as error:
            raise ValueError(f"policy {name!r} cannot be loaded: {error}") from None
        return _loaded(name, found)
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name == name:
            return _loaded(name, entry.load())
    close = difflib.get_close_matches(name, [*known_names(), *COMBINATIONS], n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise ValueError(
        f"unknown policy {name!r}{hint}; known: {', '.join(known_names())}, any(...), all(...), "
        "or your own as pkg.mod:Class"
    )


def _loaded(name: str, found: Any) -> PolicyRecord:
    """The record of what a name led to: that of the class, if loading its module has registered it."""
    if not isinstance(found, type):
        raise ValueError(f"policy {name!r} is not a class")
    return replace(record_of(found), name=name)
