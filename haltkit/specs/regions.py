"""Policies from whatever they are given as: text, objects, one for all regions or one for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from haltkit.protocol import HaltingPolicy
from haltkit.specs.build import Spec
from haltkit.specs.parse import parse_choice, parse_spec

__all__ = ["Policies", "PolicyLike", "other_regions", "policy", "policy_for_regions", "policy_of", "regions_named"]

PolicyLike = str | Spec | HaltingPolicy[Any]
Policies = PolicyLike | Mapping[str, str | HaltingPolicy[Any]] | Mapping[str, Spec]


def policy(spec: str | Spec, **keys: object) -> HaltingPolicy[Any]:
    """Build a policy from a spec, further keys given by name: ``policy("accel", tau=1e-3)``.

    Raises:
        ValueError: something that is no spec, or see :meth:`Spec.build`.
    """
    if not isinstance(spec, (str, Spec)):
        raise ValueError(f"policy({spec!r}): a spec is expected, such as 'norm:tau=0.1'")
    parsed = parse_spec(spec) if isinstance(spec, str) else spec
    for key, value in keys.items():
        parsed = parsed.with_key(key, value)
    return parsed.build()


def policy_of(given: PolicyLike) -> HaltingPolicy[Any]:
    """The policy that was given as text, as a spec, or as itself.

    Raises:
        ValueError: a bad spec, or something that is no policy.
    """
    if isinstance(given, (str, Spec)):
        return policy(given)
    if not isinstance(given, HaltingPolicy) or isinstance(given, type):
        raise ValueError(
            f"policy={given!r} is none: give a spec such as 'norm:tau=0.1', or an object with init and update"
        )
    return given


def regions_named(given: object) -> tuple[str, ...]:
    """The regions that policies are given for, by a mapping or in a spec; none where one policy is for all of them."""
    found = parse_choice(given) if isinstance(given, str) else given
    return tuple(found) if isinstance(found, Mapping) else ()


def other_regions(given: Iterable[str], regions: Sequence[str]) -> str:
    """What is wrong with policies for other regions than the model has, and what to write instead."""
    instead = "give one policy, without a name"
    if len(regions) > 1:
        instead = f"give each of them one, as in '{';'.join(f'{name}=SPEC' for name in regions)}', or one for all"
    return f"policies for regions {', '.join(given)}; the model's regions are {', '.join(regions)}: {instead}"


def policy_for_regions(given: Policies, regions: Sequence[str]) -> dict[str, HaltingPolicy[Any]]:
    """One policy per region, from one for all, a mapping, or a spec (with regions or without).

    Raises:
        ValueError: a bad spec, something that is no policy, an unknown region, or a missing one.
    """
    found: Any = parse_choice(given) if isinstance(given, str) else given
    if isinstance(found, Mapping):
        if found.keys() != set(regions):
            raise ValueError(other_regions(found, regions))
        return {region: policy_of(found[region]) for region in regions}
    return dict.fromkeys(regions, policy_of(found))
