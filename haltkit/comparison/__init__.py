"""Comparing policies with fixed depths at equal quality."""

from haltkit.comparison.comparing import compare
from haltkit.comparison.conclusions import Conclusion, Finding, conclude, within
from haltkit.comparison.rows import Row, sweep_spread
from haltkit.comparison.table import Comparison

__all__ = ["Comparison", "Conclusion", "Finding", "Row", "compare", "conclude", "sweep_spread", "within"]
