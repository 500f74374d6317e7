"""Converters: readers of other checkpoints and the quantizer."""

from .calibration import Calibration
from .job import convert
from .options import SolverOptions
from .prediction import Prediction, predict
from .report import ModuleReport, Report

__all__ = ["Calibration", "ModuleReport", "Prediction", "Report", "SolverOptions", "convert", "predict"]
