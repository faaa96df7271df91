"""Calibration with a guarantee: which threshold is safe, by how much, and exactly what is promised about it."""

from haltkit.calibration.calibrate import calibrate
from haltkit.calibration.certificate import Certificate
from haltkit.calibration.monitor import Monitor

__all__ = ["Certificate", "Monitor", "calibrate"]
