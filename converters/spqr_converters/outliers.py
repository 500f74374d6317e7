"""Which weights are worth 32 bits more: leave-one-out search in each group. [SpQR section 3.2 and algorithm 2]"""

from __future__ import annotations

import torch

from .options import SolverOptions
from .statistics import loss_of, search_rows


def leave_one_out(w: torch.Tensor, U: torch.Tensor | None, top: int) -> torch.Tensor:
    """How much a row's loss falls when column j is stored apart and the others are fitted without it: float32 [n, R]."""
    n, _ = w.shape
    free = torch.zeros_like(w, dtype=torch.bool)
    whole = _loss(w, U, top, free)
    gains = torch.empty_like(w)
    for j in range(n):
        free[j] = True
        gains[j] = whole - _loss(w, U, top, free)
        free[j] = False
    return gains


def _loss(w: torch.Tensor, U: torch.Tensor | None, top: int, free: torch.Tensor) -> torch.Tensor:
    scale, zero, codes = search_rows(w, U, top, free, shrinks=4, refits=1)
    return loss_of(w, U, scale * (codes - zero), free)


def choose(gains: torch.Tensor, options: SolverOptions, out_features: int, unit: float) -> torch.Tensor:
    """Bool [in, rows]: the outliers. Either the `outlier_share` * out * in best gains, or those above
    `outlier_threshold` * unit; rows from `out_features` on are padding and hold none."""
    chosen = torch.zeros_like(gains, dtype=torch.bool)
    real = gains[:, :out_features]
    if options.outlier_threshold is not None:
        chosen[:, :out_features] = real > options.outlier_threshold * unit
        return chosen
    count = round((options.outlier_share or 0.0) * real.numel())
    if count:
        flat = torch.zeros(real.numel(), dtype=torch.bool, device=gains.device)
        flat[real.reshape(-1).sort(descending=True, stable=True).indices[:count]] = True
        chosen[:, :out_features] = flat.view(real.shape)
    return chosen
