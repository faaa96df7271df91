"""A policy and the loops that it was chosen for, as a small YAML file that ``attach`` loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from haltkit.attachment.description import Loop
from haltkit.attachment.regions import ONE
from haltkit.calibration.certificate import Certificate
from haltkit.card import Card, is_card
from haltkit.identity import Identity
from haltkit.measured import Measured
from haltkit.weights import Weights

__all__ = ["card_at", "check_savable", "load", "load_card", "save"]

# The fields that a file can contain, and their defaults.
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Loop) if not field.metadata.get("code")}


def check_savable(loop: Loop | Mapping[str, Loop]) -> None:
    """Check that a file can contain a description.

    Raises:
        ValueError: it has functions.
    """
    for described in (loop,) if isinstance(loop, Loop) else loop.values():
        if described.functions:
            raise ValueError(
                f"this description has functions ({', '.join(described.functions)}), which a file cannot contain: "
                "save the policy without it, and give attach the description beside the card, as loop= or loops="
            )


def save(
    path: str | PathLike[str],
    spec: str,
    loop: Loop | Mapping[str, Loop] | None = None,
    about: str = "",
    model: str = "",
    regions: Sequence[str] = (),
    identity: Identity | None = None,
    certificate: Certificate | None = None,
    weights: Mapping[str, Weights] | None = None,
    measured: Measured | None = None,
) -> None:
    """Write a policy's spec, and the description, of one loop or of several by region, unless a preset finds it (None).

    Args:
        path: of the file, ``*.yaml``; of the folder, where there is a certificate or weights.
        spec: of the policy, or one per region.
        loop: the description.
        about: how the policy was chosen, for a reader of the file.
        model, regions: the name of the model's class and its regions, by which another model is refused.
        identity, certificate: of the very model, and what is promised of the policy on it.
        weights: in the files that the spec names (see :func:`haltkit.specs.packed`).
        measured: what the policy cost when it was chosen, for a reader of the file.

    Raises:
        ValueError: the description has functions, which a file cannot contain.
    """
    loops: Mapping[str, Loop] = {ONE: loop} if isinstance(loop, Loop) else loop or {}
    check_savable(loops)
    by_region = {name: _written(one) for name, one in loops.items()}
    card = Card(spec, model, tuple(regions), by_region, about, identity, certificate, measured=measured)
    card.save(path, weights)


def _written(loop: Loop) -> dict[str, Any]:
    """The fields that are not at their defaults, as YAML has them."""
    described = {name: getattr(loop, name) for name in _DEFAULTS}
    return {
        name: list(v) if isinstance(v, tuple) else dict(v) if name == "on_halt" else v
        for name, v in described.items()
        if v != _DEFAULTS[name] and v not in ((), {})
    }


def load_card(given: Card | str | PathLike[str]) -> Card:
    """The card that was given, or that is in a file or folder, whose loops can be read.

    Raises:
        ValueError: as :meth:`haltkit.card.Card.load`, or a description with fields that no loop has.
    """
    return load(given)[0]


def card_at(text: str, without_certificate: bool) -> Card | None:
    """The card that a text is the path of, as it is to be used; None: the text is a spec.

    Raises:
        ValueError: as :func:`load_card`.
    """
    if not is_card(text):
        return None
    card = load_card(text)
    return card.without_certificate() if without_certificate else card


def load(given: Card | str | PathLike[str]) -> tuple[Card, dict[str, Loop] | None]:
    """The card, and the descriptions by region (None: find the preset), that :func:`save` wrote.

    Args:
        given: the card, or the path of its file or folder.

    Raises:
        ValueError: not such a file; what is wrong is said.
    """
    card = given if isinstance(given, Card) else Card.load(given)
    return card, {name: _read(_place(given), fields) for name, fields in card.loops.items()} or None


def _place(given: Card | str | PathLike[str]) -> str:
    """What errors call a card."""
    return given.name if isinstance(given, Card) else str(given)


def _read(path: str | PathLike[str], described: Any) -> Loop:
    """A description from its fields."""
    known = list(_DEFAULTS)
    if not isinstance(described, dict) or (unknown := set(described) - set(known)):
        wrong = f" ({', '.join(sorted(map(str, unknown)))})" if isinstance(described, dict) else ""
        raise ValueError(f"{str(path)!r}: loop has fields that are not known{wrong}; allowed are {', '.join(known)}")
    if "body" not in described:
        raise ValueError(f"{str(path)!r}: loop names no body")
    try:
        if described.get("carry") is not None:
            described = {**described, "carry": tuple(described["carry"])}
        loop = Loop.of(described)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r}: loop cannot be read: {error}") from None
    named = [*loop.body, loop.state_module, loop.scope, *loop.reset_on]
    if not all(isinstance(name, str) for name in named) or not isinstance(loop.initial, (int, str, type(None))):
        raise ValueError(f"{str(path)!r}: body, state, scope and reset_on are paths, initial a position or a name")
    return loop
