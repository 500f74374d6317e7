"""Scales and zeros of groups, fitted so that the values that a file STORES decode with the least error.

Every function works on many rows of one group at once, columns first: weights are float32 [n, R] for n columns and R
rows, R a multiple of 16 where tiles are involved. `U` is the upper triangular root of the group's inverse metric
(float32 [n, n], (U^T U)^-1 is the metric A), or None for A = I. The loss of a row is e A e^T with e = w - d, in squared
units of the output; written as a sum over columns it is what GPTQ's error feedback minimises greedily.
[SpQR section 4 for bilevel statistics; GPTQ section 3 for the feedback]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spqr_kernels.dispatch import has_fit_kernels

CODES = 8  # values of a 3-bit scale or zero code
TILE_ROWS = 16
_FP16_MAX = 65504.0
_SEARCH_ELEMENTS = 1 << 25  # rows are cut so that one search holds at most about this many floats


@dataclass
class GroupFit:
    """Statistics and codes of R rows of one group. `codes` uint8 [n, R]; `scale`, `zero` float32 [R] exactly as decoded
    from the stored numbers; `loss` float32 [R]; bilevel: `tile_stats` float16 [R/16, 4] in the order ss, sz, zs, zz
    and `scale_codes`, `zero_codes` uint8 [R]; direct: `group_scales` float16 [R], `group_zeros` uint8 [R]."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    loss: torch.Tensor
    tile_stats: torch.Tensor | None = None
    scale_codes: torch.Tensor | None = None
    zero_codes: torch.Tensor | None = None
    group_scales: torch.Tensor | None = None
    group_zeros: torch.Tensor | None = None

    def decode(self) -> torch.Tensor:
        """D = s * (q - z), float32 [n, R], each operation rounded on its own as the spec demands."""
        return self.scale * (self.codes.float() - self.zero)


def feedback(
    w: torch.Tensor, U: torch.Tensor | None, scale: torch.Tensor, zero: torch.Tensor, top: int, free: torch.Tensor | None
) -> torch.Tensor:
    """Loss [R, K] of each of K candidate (scale, zero) pairs, float32 [R, K], with codes chosen by error feedback.

    `top` is the largest code; `free` bool [n, R] marks outliers, whose error is taken as zero.
    """
    n, R = w.shape
    K = scale.shape[1]
    # Without U there is nothing to feed back, and no errors are kept.
    errors = torch.empty(0 if U is None else n, R * K, dtype=w.dtype, device=w.device)
    loss = torch.zeros_like(scale)
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    for j in range(n):
        target = w[j].unsqueeze(1)
        if U is not None and j:
            target = target - (U[:j, j] @ errors[:j]).view(R, K)
        code = torch.addcmul(zero, target, inverse).round_().clamp_(0, top)
        error = target - code.sub_(zero).mul_(scale)
        if U is not None:
            error = error.div_(U[j, j])
        if free is not None:
            error = error.masked_fill_(free[j].unsqueeze(1), 0)
        loss.addcmul_(error, error)
        if U is not None:
            errors[j] = error.reshape(-1)
    return loss


def assign(
    w: torch.Tensor, U: torch.Tensor | None, scale: torch.Tensor, zero: torch.Tensor, top: int, free: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (float32 whole numbers [n, R]) and loss [R] for one (scale, zero) a row, by error feedback."""
    n = len(w)
    codes = torch.empty_like(w)
    errors = torch.empty_like(w)
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    for j in range(n):
        target = w[j] if U is None or j == 0 else w[j] - U[:j, j] @ errors[:j]
        code = torch.addcmul(zero, target, inverse).round_().clamp_(0, top)
        error = target - (code - zero) * scale
        if U is not None:
            error = error / U[j, j]
        if free is not None:
            error = error.masked_fill(free[j], 0)
        codes[j], errors[j] = code, error
    return codes, errors.square().sum(0)


def loss_of(w: torch.Tensor, U: torch.Tensor | None, decoded: torch.Tensor, free: torch.Tensor | None) -> torch.Tensor:
    """Loss [R] of decoded values [n, R]; an outlier takes up what the columns before it leave over."""
    if free is None:
        errors = w - decoded
        if U is not None:
            errors = torch.linalg.solve_triangular(U.T, errors, upper=False)
        return errors.square().sum(0)
    errors = torch.empty_like(w)
    for j in range(len(w)):
        target = w[j] if U is None or j == 0 else w[j] - U[:j, j] @ errors[:j]
        error = target - decoded[j] if U is None else (target - decoded[j]) / U[j, j]
        errors[j] = error.masked_fill(free[j], 0)
    return errors.square().sum(0)


def metric(U: torch.Tensor | None) -> torch.Tensor | None:
    """A = (U^T U)^-1, float32 [n, n]; None stands for the identity."""
    if U is None:
        return None
    inverse = torch.linalg.solve_triangular(U.double(), torch.eye(len(U), dtype=torch.float64, device=U.device), upper=True)
    return (inverse @ inverse.T).float()


def _dot(a: torch.Tensor, A: torch.Tensor | None, b: torch.Tensor) -> torch.Tensor:
    """a^T A b for each row, [R]."""
    return (a * (b if A is None else A @ b)).sum(0)


def _masked(x: torch.Tensor, free: torch.Tensor | None) -> torch.Tensor:
    return x if free is None else x.masked_fill(free, 0)


def search_rows(
    w: torch.Tensor, U: torch.Tensor | None, top: int, free: torch.Tensor | None, shrinks: int = 8, refits: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The least-loss scale and zero of each row, unrounded: float32 [R], [R], and the codes [n, R].

    A grid of shrunk min-max ranges, then alternating least squares of (scale, zero) and codes.
    """
    A = metric(U)
    if free is None:
        low, high = w.amin(0), w.amax(0)
    else:
        low = w.masked_fill(free, torch.inf).amin(0).nan_to_num(posinf=0.0)
        high = w.masked_fill(free, -torch.inf).amax(0).nan_to_num(neginf=0.0)
        low, high = torch.minimum(low, high), torch.maximum(low, high)
    flat = high - low <= 1e-6 * torch.maximum(high.abs(), low.abs())
    # A flat group: zero lies at code 0 (or `top`), the value at the other end.
    low, high = torch.where(flat, low.clamp_max(0), low), torch.where(flat, high.clamp_min(0), high)
    p = torch.linspace(1.0, 0.65, shrinks, device=w.device, dtype=w.dtype)
    middle = (low + high) / 2
    half = (high - low) / 2
    scale = (2 * half / top).unsqueeze(1) * p
    zero = torch.where(scale == 0, torch.zeros_like(scale), (half.unsqueeze(1) * p - middle.unsqueeze(1)) / scale)
    best = feedback(w, U, scale, zero, top, free).argmin(1, keepdim=True)
    scale, zero = scale.gather(1, best).squeeze(1), zero.gather(1, best).squeeze(1)
    codes, loss = assign(w, U, scale, zero, top, free)
    ones = _masked(torch.ones_like(w), free)
    target = _masked(w, free)
    for _ in range(refits):
        x = _masked(codes, free)
        xx, x1, ones2 = _dot(x, A, x), _dot(x, A, ones), _dot(ones, A, ones)
        xw, w1 = _dot(x, A, target), _dot(ones, A, target)
        determinant = xx * ones2 - x1 * x1
        s = (xw * ones2 - w1 * x1) / determinant
        z = (xw * x1 - w1 * xx) / determinant / s
        good = torch.isfinite(s) & torch.isfinite(z) & (s != 0) & (determinant > 1e-6 * xx * ones2)
        s, z = torch.where(good, s, scale), torch.where(good, z, zero)
        c, new_loss = assign(w, U, s, z, top, free)
        better = new_loss < loss
        scale, zero, loss = torch.where(better, s, scale), torch.where(better, z, zero), torch.where(better, new_loss, loss)
        codes = torch.where(better, c, codes)
    return scale, zero, codes


def to_half(x: torch.Tensor) -> torch.Tensor:
    """x rounded to a finite float16 value, as float32."""
    return x.nan_to_num(0.0).clamp(-_FP16_MAX, _FP16_MAX).half().float()


def _affine_grid(v: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, b) of the grid a * (code - b), code 0..7, that fits values v [T, 16] with the least weighted squared error."""
    low, high = v.amin(1), v.amax(1)
    span = torch.maximum(high - low, 0.05 * torch.maximum(high.abs(), low.abs()))
    weight = weight / weight.amax(1, keepdim=True).clamp_min(1e-30) + 1e-6
    best_a, best_b, best_loss = torch.zeros_like(span), torch.zeros_like(span), torch.full_like(span, torch.inf)
    for p in (1.0, 0.9, 0.8, 0.7):
        a = span * p / (CODES - 1)
        b = -((low + high) / 2 - span * p / 2) / a
        for round_ in range(3):
            a_half, b_half = to_half(a), to_half(b)
            inverse = torch.where(a_half == 0, torch.zeros_like(a_half), 1 / a_half)
            codes = (v * inverse.unsqueeze(1) + b_half.unsqueeze(1)).round().clamp(0, CODES - 1)
            loss = (weight * (v - a_half.unsqueeze(1) * (codes - b_half.unsqueeze(1))).square()).sum(1)
            better = loss < best_loss
            best_a, best_b = torch.where(better, a_half, best_a), torch.where(better, b_half, best_b)
            best_loss = torch.where(better, loss, best_loss)
            if round_ < 2:
                a, b = _solve_affine(codes, weight, weight * v, a, b)
    return best_a, best_b


def _solve_affine(
    codes: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares of sum alpha v^2 - 2 beta v over v = a' * (codes - b'), [T, 16] -> [T]; (a, b) where singular."""
    cc, c1, n1 = (alpha * codes * codes).sum(1), (alpha * codes).sum(1), alpha.sum(1)
    bc, b1 = (beta * codes).sum(1), beta.sum(1)
    determinant = cc * n1 - c1 * c1
    slope = (bc * n1 - b1 * c1) / determinant
    offset = (b1 * cc - bc * c1) / determinant
    shift = -offset / slope
    good = torch.isfinite(slope) & torch.isfinite(shift) & (slope != 0) & (determinant > 1e-6 * cc * n1)
    good &= shift.abs() < 2048
    return torch.where(good, slope, a), torch.where(good, shift, b)


def _tile_values(stats: torch.Tensor, codes: torch.Tensor, offset: int) -> torch.Tensor:
    """Decoded scales (offset 0) or zeros (offset 2) of rows [R] from stats float32 [T, 4] and codes [R]."""
    T = len(stats)
    return (stats[:, offset : offset + 1] * (codes.view(T, TILE_ROWS) - stats[:, offset + 1 : offset + 2])).view(-1)


def fit_bilevel(
    w: torch.Tensor,
    U: torch.Tensor | None,
    top: int,
    free: torch.Tensor | None = None,
    rounds: int = 3,
    start: GroupFit | None = None,
) -> GroupFit:
    """Statistics and codes of whole tiles of 16 rows, fitted jointly: for the stored (fp16) tile statistics all 64
    pairs of scale and zero codes of a row are tried, each with its own error feedback; then the four tile statistics
    are refitted by least squares, rounded, and tried again. Keeps the best of all rounds for each tile.

    With `start` the search begins at those tile statistics, and the result is never worse than `start` in this metric.
    """
    if has_fit_kernels(w):
        return _fit_by_kernels(w, U, top, free, rounds, start)
    n, R = w.shape
    T = R // TILE_ROWS
    A = metric(U)
    ones = _masked(torch.ones_like(w), free)
    target = _masked(w, free)
    grid = torch.arange(CODES, device=w.device, dtype=w.dtype)
    pair_s, pair_z = grid.repeat_interleave(CODES), grid.repeat(CODES)
    if start is None or start.tile_stats is None or start.scale_codes is None or start.zero_codes is None:
        scale, zero, codes = search_rows(w, U, top, free)
        x = _masked(codes - zero, free)
        weight_s = _dot(x, A, x)
        weight_z = scale * scale * _dot(ones, A, ones)
        ss, sz = _affine_grid(scale.view(T, -1), weight_s.view(T, -1))
        zs, zz = _affine_grid(zero.view(T, -1), weight_z.view(T, -1))
        stats = torch.stack([ss, sz, zs, zz], 1)
        best_loss = torch.full((T,), torch.inf, device=w.device)
        best = [stats.clone(), torch.zeros(R, device=w.device), torch.zeros(R, device=w.device), torch.zeros_like(w)]
    else:
        stats = start.tile_stats.float()
        best = [stats.clone(), start.scale_codes.float(), start.zero_codes.float(), start.codes.float()]
        best_loss = loss_of(w, U, start.decode(), free).view(T, -1).sum(1)
    step = max(TILE_ROWS, _SEARCH_ELEMENTS // (n * CODES * CODES) // TILE_ROWS * TILE_ROWS)
    for round_ in range(rounds):
        pairs = torch.empty(R, dtype=torch.int64, device=w.device)
        s_grid = stats[:, 0:1] * (grid - stats[:, 1:2])  # [T, 8]
        z_grid = stats[:, 2:3] * (grid - stats[:, 3:4])
        for first in range(0, R, step):
            rows = slice(first, min(first + step, R))
            tiles = slice(rows.start // TILE_ROWS, rows.stop // TILE_ROWS)
            s = s_grid[tiles].repeat_interleave(CODES, 1).repeat_interleave(TILE_ROWS, 0)
            z = z_grid[tiles].repeat(1, CODES).repeat_interleave(TILE_ROWS, 0)
            pairs[rows] = feedback(w[:, rows], U, s, z, top, None if free is None else free[:, rows]).argmin(1)
        sq, zq = pair_s[pairs], pair_z[pairs]
        scale, zero = _tile_values(stats, sq, 0), _tile_values(stats, zq, 2)
        codes, loss = assign(w, U, scale, zero, top, free)
        loss = loss.view(T, -1).sum(1)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        rows_better = better.repeat_interleave(TILE_ROWS)
        best = [
            torch.where(better.unsqueeze(1), stats, best[0]),
            torch.where(rows_better, sq, best[1]),
            torch.where(rows_better, zq, best[2]),
            torch.where(rows_better, codes, best[3]),
        ]
        if round_ + 1 < rounds:
            stats = _refit(target, ones, A, stats, sq, zq, codes, free)
    stats, sq, zq, codes = best
    scale, zero = _tile_values(stats, sq, 0), _tile_values(stats, zq, 2)
    return GroupFit(
        codes.to(torch.uint8), scale, zero, loss_of(w, U, scale * (codes - zero), free),
        tile_stats=stats.half(), scale_codes=sq.to(torch.uint8), zero_codes=zq.to(torch.uint8),
    )  # fmt: skip


def _fit_by_kernels(w, U, top, free, rounds, start: GroupFit | None) -> GroupFit:
    """The same search by the kernels of spqr_kernels.fit."""
    from spqr_kernels import fit

    if start is None or start.tile_stats is None or start.scale_codes is None or start.zero_codes is None:
        stats, best = fit.tile_start(w, U, top, free), None
    else:
        loss = fit.loss_of(w, U, start.decode(), free).view(-1, TILE_ROWS).sum(1)
        stats, best = start.tile_stats.float(), (start.scale_codes, start.zero_codes, start.codes, loss)
    stats, sq, zq, codes = fit.bilevel_rounds(w, U, top, free, rounds, stats, best)
    scale, zero = _tile_values(stats, sq.float(), 0), _tile_values(stats, zq.float(), 2)
    loss = fit.loss_of(w, U, scale * (codes.float() - zero), free)
    return GroupFit(codes, scale, zero, loss, tile_stats=stats.half(), scale_codes=sq, zero_codes=zq)


def _refit(target, ones, A, stats, sq, zq, codes, free) -> torch.Tensor:
    """New tile statistics, rounded to fp16 (float32 [T, 4]), by least squares with all codes held."""
    T = len(stats)
    scale_codes, zero_codes = sq.view(T, -1), zq.view(T, -1)
    zero = _tile_values(stats, zq, 2)
    x = _masked(codes - zero, free)
    alpha, beta = _dot(x, A, x), _dot(x, A, target)
    ss, sz = _solve_affine(scale_codes, alpha.view(T, -1), beta.view(T, -1), stats[:, 0], stats[:, 1])
    ss, sz = to_half(ss), to_half(sz)
    scale = (ss.unsqueeze(1) * (scale_codes - sz.unsqueeze(1))).view(-1)
    rest = scale * _masked(codes, free) - target
    alpha, beta = scale * scale * _dot(ones, A, ones), scale * _dot(ones, A, rest)
    zs, zz = _solve_affine(zero_codes, alpha.view(T, -1), beta.view(T, -1), stats[:, 2], stats[:, 3])
    return torch.stack([ss, sz, to_half(zs), to_half(zz)], 1)


def fit_direct(
    w: torch.Tensor,
    U: torch.Tensor | None,
    top: int,
    free: torch.Tensor | None = None,
    rounds: int = 2,
    start: GroupFit | None = None,
) -> GroupFit:
    """One fp16 scale and one whole zero 0..255 a row: whole zeros near the best unrounded one are tried with refitted
    scales. With `start` the result is never worse than `start` in this metric."""
    R = w.shape[1]
    A = metric(U)
    target = _masked(w, free)
    scale, zero, _ = search_rows(w, U, top, free, shrinks=16)
    best: list[torch.Tensor] | None = None
    best_loss = torch.full((R,), torch.inf, device=w.device)
    if start is not None:
        best = [start.scale.clone(), start.zero.clone(), start.codes.float()]
        best_loss = loss_of(w, U, start.decode(), free)
    for shift in (0, 1, -1):
        z = (zero.round() + shift).clamp(0, 255)
        s = to_half(scale)
        for round_ in range(rounds + 1):
            codes, loss = assign(w, U, s, z, top, free)
            if best is None:
                best, best_loss = [s, z, codes], loss
            else:
                better = loss < best_loss
                best_loss = torch.where(better, loss, best_loss)
                best = [torch.where(better, new, old) for new, old in zip((s, z, codes), best, strict=True)]
            if round_ < rounds:
                x = _masked(codes - z, free)
                xx = _dot(x, A, x)
                s = torch.where(xx > 0, to_half(_dot(x, A, target) / xx), s)
    assert best is not None
    s, z, codes = best
    return GroupFit(
        codes.to(torch.uint8), s, z, loss_of(w, U, s * (codes - z), free), group_scales=s.half(), group_zeros=z.to(torch.uint8)
    )  # fmt: skip


FITS = {"bilevel": fit_bilevel, "direct": fit_direct}
