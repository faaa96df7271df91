"""Calibration with a guarantee: which threshold is safe, by how much, and exactly what is promised about it."""

from haltkit.calibration.calibrate import calibrate
from haltkit.calibration.certificate import Certificate
from haltkit.calibration.monitor import Monitor
from haltkit.calibration.spot_checks import SpotChecks

__all__ = ["Certificate", "Monitor", "SpotChecks", "calibrate"]
