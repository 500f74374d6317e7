"""Which weights are worth 32 bits more: leave-one-out search in each group. [SpQR section 3.2 and algorithm 2]"""

from __future__ import annotations

import torch

from .options import SolverOptions
from .statistics import loss_of, search_rows

_SEARCH_ELEMENTS = 1 << 22  # floats that one search holds at a time, about


def leave_one_out(w: torch.Tensor, U: torch.Tensor | None, top: int) -> torch.Tensor:
    """How much a row's loss falls when column j is stored apart and the others are fitted without it: float32 [n, R]."""
    n, R = w.shape
    # The rows stand n + 1 times side by side, once whole and once without each column: one search instead of n + 1.
    step = max(1, _SEARCH_ELEMENTS // (4 * n * (n + 1)))
    gains = torch.empty_like(w)
    free = torch.cat([torch.zeros(n, 1, dtype=torch.bool), torch.eye(n, dtype=torch.bool)], 1).to(w.device)
    for first in range(0, R, step):
        rows = w[:, first : first + step]
        many = rows.repeat(1, n + 1)
        loss = _loss(many, U, top, free.repeat_interleave(rows.shape[1], 1)).view(n + 1, -1)
        gains[:, first : first + step] = loss[0] - loss[1:]
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
