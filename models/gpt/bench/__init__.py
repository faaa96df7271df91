"""The honest cost of halting: what deciding costs, what retiring rows saves, and how much of it is theory.

Everything that is compared runs in turns (see :mod:`haltkit.timing`).
"""

from haltkit.models.gpt.bench.caching import approximate_layouts, position_cost
from haltkit.models.gpt.bench.deciding import choose_policies, policy_cost
from haltkit.models.gpt.bench.retiring import Scripted, break_even, full_depth_overhead, slowest_row
from haltkit.models.gpt.bench.samplers import sampler_speed
from haltkit.models.gpt.bench.speed import decode_speed, forward_speed
from haltkit.models.gpt.bench.work import flops

__all__ = [
    "Scripted",
    "approximate_layouts",
    "break_even",
    "choose_policies",
    "decode_speed",
    "flops",
    "forward_speed",
    "full_depth_overhead",
    "policy_cost",
    "position_cost",
    "sampler_speed",
    "slowest_row",
]
