"""Diagnostics: what a loop's path looks like, where it ends, and which of the papers' claims it bears out."""

from haltkit.diagnostics.errors import DiagnosticError
from haltkit.diagnostics.geometry import (
    BoundaryStatistics,
    RegionStatistics,
    contraction_rates,
    curvatures,
    distances,
    first_below,
    turning_angles,
)
from haltkit.diagnostics.layers import LayerStatistics, are_distinct, distinctness, layer_distances, record_layers
from haltkit.diagnostics.limits import Limit, classify_limits
from haltkit.diagnostics.pca import PCA, fit_pca
from haltkit.diagnostics.plan import Case, Plan, run_plan
from haltkit.diagnostics.stages import StageMatch, match_stages
from haltkit.diagnostics.subject import Subject
from haltkit.diagnostics.survey import (
    survey_attention,
    survey_geometry,
    survey_limits,
    survey_paths,
    survey_tokens,
)

__all__ = [
    "PCA",
    "BoundaryStatistics",
    "Case",
    "DiagnosticError",
    "LayerStatistics",
    "Limit",
    "Plan",
    "RegionStatistics",
    "StageMatch",
    "Subject",
    "are_distinct",
    "classify_limits",
    "contraction_rates",
    "curvatures",
    "distances",
    "distinctness",
    "first_below",
    "fit_pca",
    "layer_distances",
    "match_stages",
    "record_layers",
    "run_plan",
    "survey_attention",
    "survey_geometry",
    "survey_limits",
    "survey_paths",
    "survey_tokens",
    "turning_angles",
]
