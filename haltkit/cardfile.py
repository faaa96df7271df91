"""Reading cards that somebody may have handed over: what is in the files, checked, and nothing is run.

A card is YAML without tags, a certificate JSON, weights are safetensors. A card names no file outside its own folder.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from haltkit.calibration.certificate import Certificate
from haltkit.files import read_yaml
from haltkit.identity import Identity
from haltkit.measured import Measured
from haltkit.specs import Choice, files_of, parse_choice
from haltkit.trust import CodeRefused, reading

__all__ = ["CARD", "CERTIFICATE_FILE", "VERSION", "read_card"]

CARD, CERTIFICATE_FILE = "card.yaml", "certificate.json"
VERSION = 1  # a card that does not say its version, as older ones do not, is of this one
# What a card may contain, and the type of it.
_KEYS: dict[str, type | tuple[type, ...]] = {
    "version": int,
    "policy": (str, dict),
    "model": str,
    "regions": list,
    "loop": (dict, type(None)),
    "loops": (dict, type(None)),
    "weights": (dict, type(None)),
    "identity": (dict, type(None)),
    "certified": bool,
    "measured": object,  # which says itself what is wrong
    "about": str,
}


def read_card(path: Path) -> dict[str, Any]:
    """The fields of a :class:`haltkit.card.Card` from its file, or from its folder.

    Raises:
        ValueError: as :meth:`haltkit.card.Card.load`.
        CodeRefused: as there.
    """
    file = path / CARD if path.is_dir() else path
    values: Any = read_yaml(file, "the card", object)
    try:
        fields = _fields(values, file)
    except CodeRefused:
        raise
    except ValueError as error:
        raise ValueError(f"{str(file)!r}: {error}") from None
    return {**fields, "folder": file.parent, "name": path.stem}


def _fields(values: Any, file: Path) -> dict[str, Any]:
    _check_keys(values)
    policy, model, about = _policy(values["policy"]), values.get("model", ""), values.get("about", "")
    regions = tuple(map(str, values.get("regions", [])))
    loops = {"loop": values["loop"]} if values.get("loop") is not None else values.get("loops") or {}
    for described in loops.values():
        if not isinstance(described, dict):
            raise ValueError("a loop is described by the fields of haltkit.Loop, by name")
    if len(set(regions)) < len(regions):
        raise ValueError(f"a region is named more than once: {', '.join(regions)}")
    with reading(f"the card {str(file)!r}"):
        choice = parse_choice(policy)
    identity, certificate = _certified(file, values.get("identity"), values.get("certified", False))
    return {
        "policy": policy,
        "model": model,
        "regions": regions,
        "loops": {str(name): described for name, described in loops.items()},
        "about": about,
        "identity": identity,
        "certificate": certificate,
        "weights": _weights(file.parent, choice, values.get("weights")),
        "measured": None if values.get("measured") is None else Measured.of_fields(values["measured"]),
    }


def _check_keys(values: Any) -> None:
    """Check that this is a card of a version that can be read, with known keys of the right types.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(values, dict) or "policy" not in values or {"loop", "loops"} <= set(values):
        raise ValueError(
            "it must contain 'policy: SPEC' and may contain 'loop:', the fields of haltkit.Loop, or 'loops:', those of "
            "several by region"
        )
    _check_printable(values)
    version = values.get("version", VERSION)
    if type(version) is not int or version < 1:
        raise ValueError(f"version: {version!r} is none: a card says a whole number from 1, or nothing")
    if version > VERSION:
        raise ValueError(f"a card of version {version}: this haltkit reads version {VERSION}; upgrade it")
    if unknown := sorted(str(key) for key in values if key not in _KEYS):
        raise ValueError(
            f"{', '.join(unknown)}: a card has no such key. It must contain 'policy: SPEC' and may contain "
            f"{', '.join(key for key in _KEYS if key != 'policy')}"
        )
    for key, value in values.items():
        if not isinstance(value, _KEYS[key]):
            raise ValueError(f"{key} is not what a card has there: {_MEANING[key]}")


def _check_printable(values: Any) -> None:
    """Refuse texts that could steer the terminal where they are shown: controls and changes of direction.

    Raises:
        ValueError: there is such a text.
    """
    waiting = [values]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str) and not one.replace("\n", " ").replace("\t", " ").isprintable():
            raise ValueError(f"{one!r} has characters that cannot be printed, and could steer a terminal")
        if isinstance(one, (dict, list)):
            waiting += [*one, *one.values()] if isinstance(one, dict) else one


_MEANING = {
    "policy": "it must contain 'policy: SPEC', or a mapping from regions to specs",
    "model": "the name of the model's class",
    "regions": "a list of names",
    "loop": "a loop is described by the fields of haltkit.Loop, by name",
    "loops": "a mapping from regions to the fields of haltkit.Loop",
    "weights": "a mapping from files to the SHA-256 of each",
    "identity": "a mapping",
    "certified": "true or false",
    "about": "text",
}


def _policy(written: Any) -> str:
    """The policy's text: as it stands, or from a mapping from regions to specs."""
    if isinstance(written, str):
        return written
    if not written or not all(isinstance(spec, str) for spec in written.values()):
        raise ValueError(f"policy: {_MEANING['policy']}")
    return ";".join(f"{region}={spec}" for region, spec in written.items())


def _weights(folder: Path, choice: Choice, known: Any) -> dict[str, str]:
    """The files of weights that a card's policy names, and the SHA-256 of each, which the card knows."""
    found = {}
    for name in files_of(choice):
        if Path(name).name != name or name == "..":
            raise ValueError(f"the weights {name!r} are not beside the card: it may name files in its own folder only")
        if not isinstance(known, dict) or not isinstance(known.get(name), str):
            raise ValueError(
                f"the card does not say which weights are its own, by the SHA-256 of {name!r} under 'weights': run "
                "'haltkit fit' to make it again"
            )
        if (folder / name).exists() and not (folder / name).is_file():  # such as a device, which has no end
            raise ValueError(f"the card's weights, {name!r}, are not a regular file")
        try:
            found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise ValueError(f"the card's weights, {name!r}, cannot be read: {error.strerror}") from None
        if found[name] != known[name]:
            raise ValueError(
                f"{name!r} holds other weights than those that the card is about: restore them, or run 'haltkit fit' "
                "to make the card again"
            )
    return found


def _certified(card: Path, identity: Any, certified: bool) -> tuple[Identity | None, Certificate | None]:
    """The identity in a card, and the certificate in the file beside it, which a card that is certified has."""
    found = None if identity is None else Identity.of_fields(identity)
    path = card.parent / CERTIFICATE_FILE
    if not certified:
        return found, None
    if not path.is_file():
        raise ValueError(f"the certificate that belongs to the card, {CERTIFICATE_FILE}, is not beside it")
    try:
        return found, Certificate.from_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"the certificate beside the card, {CERTIFICATE_FILE}, is not text") from None
