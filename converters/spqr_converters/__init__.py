"""Converters: readers of other checkpoints and the quantizer."""

from .calibration import Calibration
from .job import convert
from .options import SolverOptions
from .prediction import Prediction, predict
from .report import ModuleReport, Report
from .tuning import TuningOptions, TuningReport, tune

__all__ = [
    "Calibration",
    "ModuleReport",
    "Prediction",
    "Report",
    "SolverOptions",
    "TuningOptions",
    "TuningReport",
    "convert",
    "predict",
    "tune",
]
