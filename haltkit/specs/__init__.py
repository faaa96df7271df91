"""The spec language: policies as text.

A spec is ``name:key=value,key=value``::

    accel:tau=1e-3                         a built-in policy
    accel:tau=1e-3,patience=3,min_steps=4  with keys of the wrappers
    kl:tau=5e-4,granularity=sequence       one decision per sequence (the mean of its tokens' scores)
    norm:tau_by_step=0.5@4/1.2@9           a threshold from step 4 on, another from step 9 on
    any(accel:tau=1e-3|fixed:steps=8)      halts when one of them does
    all(accel:tau=1e-3|norm:tau=1e-2)      halts when both do at the same step
    mylab.halting:Wobble:tau=0.1           a class of your own by its place
    4=accel:tau=1e-3;5-6=kl:tau=1e-4       a policy for each region
"""

from haltkit.specs.build import WRAPPER_KEYS, Spec
from haltkit.specs.parse import Choice, files_of, parse_choice, parse_choices, parse_spec, parse_spec_list
from haltkit.specs.regions import (
    Policies,
    PolicyLike,
    other_regions,
    policy,
    policy_for_regions,
    policy_of,
    regions_named,
)
from haltkit.specs.show import UnprintablePolicy, packed, spec_of, text_of

__all__ = [
    "WRAPPER_KEYS",
    "Choice",
    "Policies",
    "PolicyLike",
    "Spec",
    "UnprintablePolicy",
    "files_of",
    "other_regions",
    "packed",
    "parse_choice",
    "parse_choices",
    "parse_spec",
    "parse_spec_list",
    "policy",
    "policy_for_regions",
    "policy_of",
    "regions_named",
    "spec_of",
    "text_of",
]
