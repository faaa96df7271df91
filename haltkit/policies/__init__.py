"""The built-in policies, one signal a file."""

from haltkit.policies.acceleration import Acceleration
from haltkit.policies.cosine import CosineDistance
from haltkit.policies.entropy import EntropyChange
from haltkit.policies.fixed import Fixed
from haltkit.policies.gate import Gate
from haltkit.policies.kl import KL
from haltkit.policies.margin import Margin
from haltkit.policies.normalized_acceleration import NormalizedAcceleration
from haltkit.policies.normalized_step_norm import NormalizedStepNorm
from haltkit.policies.probe import Probe
from haltkit.policies.settling import Settling
from haltkit.policies.stable import Stable
from haltkit.policies.step_norm import StepNorm
from haltkit.policies.step_size_change import StepSizeChange
from haltkit.policies.table import Table

__all__ = [
    "KL",
    "Acceleration",
    "CosineDistance",
    "EntropyChange",
    "Fixed",
    "Gate",
    "Margin",
    "NormalizedAcceleration",
    "NormalizedStepNorm",
    "Probe",
    "Settling",
    "Stable",
    "StepNorm",
    "StepSizeChange",
    "Table",
]
