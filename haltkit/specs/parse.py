"""From text to specs: one, a list, or one per region."""

from __future__ import annotations

import re
from itertools import accumulate

from haltkit.registry import given_names, known_names, record_of
from haltkit.specs.build import COMBINED, Spec

__all__ = ["Choice", "files_of", "parse_choice", "parse_choices", "parse_spec", "parse_spec_list"]

# What can be asked for at one place: a policy for all regions, or one for each.
Choice = Spec | dict[str, Spec]

_NAME = re.compile(r"[\w.-]+(:[A-Za-z_]\w*)?")
_REGION = re.compile(r"\s*([\w.-]+)=")  # 4=accel:...
_KEY = re.compile(r"(?P<key>[A-Za-z_]\w*)=(?P<value>[^=:]+)")
DEEPEST = 32  # combinations inside one another
# In a list, what can only go on the spec before it: key=value.
_CONTINUATION = re.compile(r"[A-Za-z_]\w*=(?P<value>[^=:|()]+)")


def parse_spec(text: str) -> Spec:
    """Parse one spec (not one with regions).

    Raises:
        ValueError: the text is not a spec, is nested too deeply, or names an unknown policy.
    """
    text = text.strip()
    if max(accumulate({"(": 1, ")": -1}.get(letter, 0) for letter in text), default=0) > DEEPEST:
        raise ValueError(f"{text[:40]!r}...: combinations are nested more than {DEEPEST} deep")
    for name in COMBINED:
        if text.startswith(f"{name}("):
            end = _closing(text, len(name))
            parts = tuple(parse_spec(part) for part in _split(text[len(name) + 1 : end], "|"))
            if len(parts) < 2:
                raise ValueError(f"{text!r}: {name}(...) combines two or more policies, separated by |")
            rest = text[end + 1 :]
            if rest and not rest.startswith(":"):
                raise ValueError(f"{text!r}: {rest!r} after the closing parenthesis is not ':key=value'")
            return Spec(name, _parse_keys(rest[1:], text) if rest else (), parts)
    name, colon, keys = text.partition(":")
    # pkg.mod:Class[:keys], also of a module that has the name of a policy which only this process knows: such a policy
    # prints by its place. A name that every process knows hides a module of the same name.
    if colon and "=" not in keys.partition(":")[0] and name not in given_names():
        attribute, colon, keys = keys.partition(":")
        name = f"{name}:{attribute}"
    if not _NAME.fullmatch(name):
        if _REGION.match(text):
            raise ValueError(f"{text!r} gives one region a policy of its own, and here one policy is for all of them")
        raise ValueError(f"{text!r} is not a policy spec: write name:key=value,key=value, as in accel:tau=1e-3")
    record_of(name)
    return Spec(name, _parse_keys(keys, text) if colon else ())


def parse_choice(text: str) -> Choice:
    """Parse one spec, or ``region=spec;region=spec`` into one per region.

    Raises:
        ValueError: a bad spec, or a region that is given twice.
    """
    if _REGION.match(text) is None:
        return parse_spec(text)
    by_region: dict[str, Spec] = {}
    for item in _split(text, ";"):
        region, equals, spec = item.partition("=")
        if not equals:
            raise ValueError(f"{item!r} in {text!r} is not region=spec")
        if region.strip() in by_region:
            raise ValueError(f"region {region.strip()!r} is given twice in {text!r}")
        by_region[region.strip()] = parse_spec(spec)
    return by_region


def parse_choices(text: str) -> list[str]:
    """Split a comma-separated list where its items begin; ``key=value`` belongs to the spec before it.

    Returns:
        the text of each item, for :func:`parse_choice`.

    Raises:
        ValueError: an empty list or an empty item.
    """
    items: list[str] = []
    for item in map(str.strip, _split(text, ",")):
        if items and _continues(item):
            last = items[-1].rpartition(";")[2].rpartition(")")[2]  # what follows the newest name
            items[-1] += ("," if ":" in last else ":") + item
        else:
            items.append(item)
    if not all(items):
        raise ValueError(f"{text!r}: an empty item in a list of policies")
    return items


def parse_spec_list(text: str) -> list[Spec]:
    """Parse comma-separated specs, none of them with regions.

    Raises:
        ValueError: an empty list, an empty item, or a bad spec.
    """
    return [parse_spec(item) for item in parse_choices(text)]


def _continues(item: str) -> bool:
    """Whether an item of a list goes on with the keys of the spec before it, perhaps the last key of a region's."""
    found = _CONTINUATION.fullmatch(item.partition(";")[0])
    return found is not None and found["value"].strip() not in known_names()  # core=accel begins a new item


def _parse_keys(text: str, whole: str) -> tuple[tuple[str, str], ...]:
    keys: dict[str, str] = {}
    for item in text.split(","):
        match = _KEY.fullmatch(item.strip())
        if match is None:
            raise ValueError(f"{item!r} in {whole!r} is not key=value")
        if match["key"] in keys:
            raise ValueError(f"{match['key']} is given twice in {whole!r}")
        keys[match["key"]] = match["value"].strip()
    return tuple(keys.items())


def _closing(text: str, opening: int) -> int:
    depth = 0
    for index in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError(f"{text!r}: a parenthesis is not closed")


def _split(text: str, separator: str) -> list[str]:
    """Split at separators that stand outside parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def files_of(choice: Choice) -> list[str]:
    """The files of weights that a choice names, as written, each once."""
    specs = [choice] if isinstance(choice, Spec) else choice.values()
    return list(dict.fromkeys(name for spec in specs for name in spec.files))
