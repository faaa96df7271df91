"""Surveys: run a model over windows of text and gather the diagnostics, in memory that does not grow with the text."""

from haltkit.diagnostics.survey.attention import survey_attention, survey_layers_once
from haltkit.diagnostics.survey.geometry import measure_snapshot, survey_geometry
from haltkit.diagnostics.survey.limits import DEEP_LOOPS, SMALL_STEP, survey_limits
from haltkit.diagnostics.survey.paths import survey_paths
from haltkit.diagnostics.survey.tokens import survey_tokens

__all__ = [
    "DEEP_LOOPS",
    "SMALL_STEP",
    "measure_snapshot",
    "survey_attention",
    "survey_geometry",
    "survey_layers_once",
    "survey_limits",
    "survey_paths",
    "survey_tokens",
]
