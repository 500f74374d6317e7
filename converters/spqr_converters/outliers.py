"""Which weights are worth 32 bits more: leave-one-out search in each group. [SpQR section 3.2 and algorithm 2]"""

from __future__ import annotations

import torch

from spqr_kernels.dispatch import has_fit_kernels

from .options import SolverOptions
from .statistics import loss_of, search_rows

# Floats that one search holds at a time, about: what stays in a cache; on a GPU what hides the cost of its launches.
_SEARCH_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
_SHRINKS, _REFITS = 4, 1


def leave_one_out(w: torch.Tensor, U: torch.Tensor | None, top: int) -> torch.Tensor:
    """How much a row's loss falls when column j is stored apart and the others are fitted without it: float32 [n, R]."""
    n, R = w.shape
    if has_fit_kernels(w):
        from spqr_kernels import fit

        loss = fit.leave_one_out(w, U, top, _SHRINKS, _REFITS)
        return loss[0] - loss[1:]
    # The rows stand n + 1 times side by side, once whole and once without each column: one search instead of n + 1.
    step = max(1, _SEARCH_ELEMENTS.get(w.device.type, 1 << 26) // (4 * n * (n + 1)))
    gains = torch.empty_like(w)
    free = torch.cat([torch.zeros(n, 1, dtype=torch.bool), torch.eye(n, dtype=torch.bool)], 1).to(w.device)
    for first in range(0, R, step):
        rows = w[:, first : first + step]
        many = rows.repeat(1, n + 1)
        loss = _loss(many, U, top, free.repeat_interleave(rows.shape[1], 1)).view(n + 1, -1)
        gains[:, first : first + step] = loss[0] - loss[1:]
    return gains


def _loss(w: torch.Tensor, U: torch.Tensor | None, top: int, free: torch.Tensor) -> torch.Tensor:
    scale, zero, codes = search_rows(w, U, top, free, _SHRINKS, _REFITS)
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
