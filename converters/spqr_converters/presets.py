"""Budgets with names, and what a budget may be spent on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .options import SolverOptions

# Stored bits for each quantized weight, outliers and statistics included.
PRESETS = {
    "near-lossless": 4.65,  # mostly 4 bits in groups of 16
    "balanced": 3.9,  # 3 and 4 bits in groups of 16
    "small": 3.15,  # 2 to 4 bits in groups of 16 to 64
}
_NARROW = 3.6  # a budget from here on is met with groups of 16; the kernels were fast for no others when it was chosen


def candidates(bits_per_weight: float, base: SolverOptions) -> list[SolverOptions]:
    """What a module may be stored as under this budget: `base` with other bits, group sizes and outlier shares."""
    sizes: Sequence[int] = (16,) if bits_per_weight >= _NARROW else (16, 32, 64)
    shares: Sequence[float] = (0.0, 0.001, 0.003, 0.01) if bits_per_weight >= _NARROW else (0.0, 0.003)
    return [
        replace(base, weight_bits=bits, group_size=size, statistics="bilevel", outlier_share=share, outlier_threshold=None)
        for bits in (2, 3, 4)
        for size in sizes
        for share in shares
    ]
