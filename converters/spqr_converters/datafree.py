"""The quantizer without data: the least squared error of the weights themselves."""

from __future__ import annotations

import torch

from spqr_format.matrix import SpqrMatrix

from .options import SolverOptions
from .outliers import choose, leave_one_out
from .solution import Solution, check_finite, padded_rows
from .statistics import FITS, to_half

# Rows that are fitted together: what stays in a processor's cache; on a GPU what hides the cost of its launches.
_ROWS_AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 20}


def quantize(weight: torch.Tensor, options: SolverOptions | None = None, name: str = "weight") -> SpqrMatrix:
    """Quantise weight [out, in] (any float dtype, any device) for least squared weight error.

    Errors: E502 a weight is not finite, or the tensor is no matrix.
    """
    return solve(weight, options or SolverOptions(), name)[0]


def solve(weight: torch.Tensor, options: SolverOptions, name: str = "weight") -> tuple[SpqrMatrix, dict[str, float]]:
    """`quantize`, and its figures: weight_error, the relative Frobenius norm of the error."""
    check_finite(weight, name)
    weight = weight.detach().float()
    layout = options.layout(*weight.shape)
    w = padded_rows(weight)
    solution = Solution.empty(layout, weight.device)
    n, rows = w.shape
    size = options.group_size
    # Groups of full width are independent and alike: many are solved as rows of one.
    at_once = max(1, _ROWS_AT_ONCE.get(weight.device.type, 1 << 20) // rows)
    full = n // size
    chunks = [range(first, min(first + at_once, full)) for first in range(0, full, at_once)]
    if n % size:
        chunks.append(range(full, full + 1))

    def stacked(x: torch.Tensor, groups: range) -> torch.Tensor:
        width = min(size, n - groups.start * size)
        part = x[groups.start * size : groups.start * size + width * len(groups)]
        return part.view(len(groups), width, rows).transpose(0, 1).reshape(width, -1)

    def unstacked(x: torch.Tensor, groups: range) -> torch.Tensor:
        return x.view(len(x), len(groups), rows).transpose(0, 1).reshape(-1, rows)

    if options.keeps_outliers:
        gains = torch.empty_like(w)
        for groups in chunks:
            gain = leave_one_out(stacked(w, groups), None, options.top)
            gains[groups.start * size : groups.start * size + gain.numel() // rows] = unstacked(gain, groups)
        unit = float(w[:, : layout.out_features].var(1, unbiased=False).mean())
        solution.free = choose(gains, options, layout.out_features, unit)
        solution.values = torch.zeros_like(w)
    for groups in chunks:
        part = stacked(w, groups)
        free = None if solution.free is None else stacked(solution.free, groups)
        fit = FITS[options.statistics](part, None, options.top, free, rounds=options.rounds)
        columns = slice(groups.start * size, groups.start * size + part.numel() // rows)
        if free is not None and solution.values is not None:
            solution.values[columns] = unstacked(torch.where(free, to_half(part - fit.decode()), 0), groups)
        solution.put_groups(groups.start, len(groups), fit)
    error = (weight - solution.decoded()).norm() / weight.norm().clamp_min(1e-30)
    return solution.matrix(), {"weight_error": float(error)}
