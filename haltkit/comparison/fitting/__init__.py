"""Fit a policy on a subject: learn on some samples, choose on others, report on the rest."""

from haltkit.comparison.fitting.fitted import Fitted
from haltkit.comparison.fitting.linear import fit_gate, fit_probe
from haltkit.comparison.fitting.table import fit_table
from haltkit.comparison.oracle import Oracle

__all__ = ["Fitted", "Oracle", "fit_gate", "fit_probe", "fit_table"]
