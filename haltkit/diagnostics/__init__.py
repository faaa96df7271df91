"""Diagnostics: what a loop's path looks like, where it ends, and which of the papers' claims it bears out."""

from haltkit.diagnostics.claims import CLAIMS, Claim, claims_table, judge
from haltkit.diagnostics.compared import load_comparison
from haltkit.diagnostics.diagnosing import Progress, diagnose
from haltkit.diagnostics.diagnosis import Diagnosis
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
from haltkit.diagnostics.judgement import Judgement
from haltkit.diagnostics.layers import LayerStatistics, are_distinct, distinctness, layer_distances
from haltkit.diagnostics.limits import Limit, classify_limits
from haltkit.diagnostics.pca import PCA, fit_pca
from haltkit.diagnostics.plan import Case, Plan, run_plan
from haltkit.diagnostics.results import Snapshot, Survey
from haltkit.diagnostics.stages import StageMatch, match_stages
from haltkit.diagnostics.survey import (
    measure_snapshot,
    survey_attention,
    survey_geometry,
    survey_layers_once,
    survey_limits,
    survey_paths,
    survey_tokens,
)

__all__ = [
    "CLAIMS",
    "PCA",
    "BoundaryStatistics",
    "Case",
    "Claim",
    "Diagnosis",
    "DiagnosticError",
    "Judgement",
    "LayerStatistics",
    "Limit",
    "Plan",
    "Progress",
    "RegionStatistics",
    "Snapshot",
    "StageMatch",
    "Survey",
    "are_distinct",
    "claims_table",
    "classify_limits",
    "contraction_rates",
    "curvatures",
    "diagnose",
    "distances",
    "distinctness",
    "first_below",
    "fit_pca",
    "judge",
    "layer_distances",
    "load_comparison",
    "match_stages",
    "measure_snapshot",
    "run_plan",
    "survey_attention",
    "survey_geometry",
    "survey_layers_once",
    "survey_limits",
    "survey_paths",
    "survey_tokens",
    "turning_angles",
]
