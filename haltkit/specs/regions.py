"""Policies from whatever they are given as: text, objects, one for all regions or one for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from haltkit.protocol import HaltingPolicy
from haltkit.specs.build import Spec
from haltkit.specs.parse import parse_choice, parse_spec

__all__ = ["Policies", "policy", "policy_for_regions", "regions_named"]

Policies = str | Spec | HaltingPolicy[Any] | Mapping[str, str | HaltingPolicy[Any]] | Mapping[str, Spec]


def policy(spec: str | Spec, **keys: object) -> HaltingPolicy[Any]:
    """Build a policy from a spec, further keys given by name: ``policy("accel", tau=1e-3)``.

    Raises:
        ValueError: see :meth:`Spec.build`.
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    for key, value in keys.items():
        parsed = parsed.with_key(key, value)
    return parsed.build()


def regions_named(given: object) -> tuple[str, ...]:
    """The regions that policies are given for, by a mapping or in a spec; none where one policy is for all of them."""
    found = parse_choice(given) if isinstance(given, str) else given
    return tuple(found) if isinstance(found, Mapping) else ()


def policy_for_regions(given: Policies, regions: Sequence[str]) -> dict[str, HaltingPolicy[Any]]:
    """One policy per region, from one for all, a mapping, or a spec (with regions or without).

    Raises:
        ValueError: a bad spec, an unknown region, or a missing one.
    """
    found: Any = parse_choice(given) if isinstance(given, str) else given
    if isinstance(found, Mapping):
        if found.keys() != set(regions):
            raise ValueError(f"policies for regions {', '.join(found)}; the model's regions are {', '.join(regions)}")
        return {region: _built(found[region]) for region in regions}
    return dict.fromkeys(regions, _built(found))


def _built(given: str | Spec | HaltingPolicy[Any]) -> HaltingPolicy[Any]:
    return policy(given) if isinstance(given, (str, Spec)) else given
