"""The quantizer's inner loops on a GPU: scales, zeros and codes of one group of columns, for many rows at once.

The same searches as `spqr_converters.statistics`, which is their oracle and says what they look for: there every step is an
operation of torch over [rows, candidates], here a row stays in registers from its weights to its codes. Sums run in another
order, so that the two agree up to the last bits of a loss. Nothing here waits for another program: same operands, same bits.

Weights are columns first, float32 [n, R]; `U` is the upper triangular root of the group's inverse metric (float32
[n, n], or None for the identity); `free` bool [n, R] marks outliers. n is at most
FIT_COLUMNS: a column takes registers of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from spqr_format.layout import TILE

from .dispatch import FIT_COLUMNS

T = TypeVar("T")
ROWS = 64  # of a program that works row by row
TILES = 4  # of a program that fits grids to tiles


@triton.jit
def _whole(x, top):
    """The nearest code 0..top, halves to even: from 1.5 * 2**23 on a float32 has no fraction."""
    return (tl.minimum(tl.maximum(x, 0.0), top) + 12582912.0) - 12582912.0


@triton.jit
def _half(x):
    """x rounded to a finite float16 value, as float32; a NaN becomes 0."""
    x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16).to(tl.float32)


@triton.jit
def _columns(X, rows, inside, R, N: tl.constexpr):
    """The N columns of some rows, a tuple of float32."""
    columns = ()
    for j in tl.static_range(N):
        columns = columns + (tl.load(X + j * R + rows, mask=inside, other=0).to(tl.float32),)
    return columns


@triton.jit
def _outliers(Free, rows, inside, R, N: tl.constexpr, HAS_FREE: tl.constexpr):
    """Bit j of a row's int32: column j is an outlier."""
    bits = tl.zeros(rows.shape, tl.int32)
    if HAS_FREE:
        for j in tl.static_range(N):
            bits |= tl.load(Free + j * R + rows, mask=inside, other=0).to(tl.int32) << j
    return bits


@triton.jit
def _kept(x, bits, j: tl.constexpr):
    """x, but 0 where column j is an outlier."""
    return tl.where(((bits >> j) & 1) != 0, 0.0, x)


@triton.jit
def _solved(x, U, before, j: tl.constexpr, N: tl.constexpr, HAS_U: tl.constexpr):
    """Entry j of U^-T x, from those before it."""
    if HAS_U:
        for i in tl.static_range(j):
            x -= tl.load(U + i * N + j) * before[i]
        x = x / tl.load(U + j * N + j)
    return x


@triton.jit
def _inverse(scale):
    return tl.where(scale == 0.0, 0.0, 1.0 / scale)


@triton.jit
def _loss(w, bits, U, scale, zero, top, N: tl.constexpr, HAS_U: tl.constexpr):
    """Loss of candidates [rows, candidates] with codes by error feedback; w: N times [rows, 1]."""
    inverse = _inverse(scale)
    errors = ()
    loss = scale * 0.0
    for j in tl.static_range(N):
        target = tl.broadcast_to(w[j], loss.shape)
        if HAS_U:
            for i in tl.static_range(j):
                target -= tl.load(U + i * N + j) * errors[i]
        error = target - (_whole(target * inverse + zero, top) - zero) * scale
        if HAS_U:
            error = error / tl.load(U + j * N + j)
        error = _kept(error, bits, j)
        loss += error * error
        errors = errors + (error,)
    return loss


@triton.jit
def _assign(w, bits, U, scale, zero, top, N: tl.constexpr, HAS_U: tl.constexpr):
    """Codes (a tuple) and loss for a scale and zero a row, by error feedback, and what a refit needs: x A x, x A 1, x A w,
    1 A 1 and 1 A w for x = code - zero, outliers left out. A = (U^T U)^-1, so that a A b is the product of U^-T a and U^-T b.
    """
    inverse = _inverse(scale)
    codes = ()
    errors = ()
    xs = ()
    ones = ()
    ws = ()
    loss = scale * 0.0
    xx = scale * 0.0
    x1 = scale * 0.0
    xw = scale * 0.0
    oo = scale * 0.0
    ow = scale * 0.0
    for j in tl.static_range(N):
        target = w[j]
        if HAS_U:
            for i in tl.static_range(j):
                target -= tl.load(U + i * N + j) * errors[i]
        code = _whole(target * inverse + zero, top)
        error = target - (code - zero) * scale
        if HAS_U:
            error = error / tl.load(U + j * N + j)
        error = _kept(error, bits, j)
        loss += error * error
        codes = codes + (code,)
        errors = errors + (error,)
        x = _solved(_kept(code - zero, bits, j), U, xs, j, N, HAS_U)
        one = _solved(_kept(scale * 0.0 + 1.0, bits, j), U, ones, j, N, HAS_U)
        own = _solved(_kept(w[j], bits, j), U, ws, j, N, HAS_U)
        xs = xs + (x,)
        ones = ones + (one,)
        ws = ws + (own,)
        xx += x * x
        x1 += x * one
        xw += x * own
        oo += one * one
        ow += one * own
    return codes, loss, xx, x1, xw, oo, ow


@triton.jit
def search_kernel(
    W, Free, U, Scale, Zero, WeightS, WeightZ, Loss, R, top, stride,
    N: tl.constexpr, SHRINKS: tl.constexpr, REFITS: tl.constexpr, HAS_U: tl.constexpr, HAS_FREE: tl.constexpr,
    LEAVE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`search_rows`. With LEAVE, program (.., i) takes column i - 1 as an outlier (0: none) and stores only the loss.

    stride is 0: all candidates share U. Were it known, the compiler would hold all of U in registers that there are not.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < R
    w = _columns(W, rows, inside, R, N)
    bits = _outliers(Free, rows, inside, R, N, HAS_FREE)
    left = tl.program_id(1)
    if LEAVE:
        bits |= (1 << left) >> 1
    low = tl.full([ROWS], float("inf"), tl.float32)
    high = tl.full([ROWS], float("-inf"), tl.float32)
    for j in tl.static_range(N):
        free = ((bits >> j) & 1) != 0
        low = tl.where(free, low, tl.minimum(low, w[j]))
        high = tl.where(free, high, tl.maximum(high, w[j]))
    none = low > high  # every column is an outlier
    low = tl.where(none, 0.0, low)
    high = tl.where(none, 0.0, high)
    flat = high - low <= 1e-6 * tl.maximum(tl.abs(high), tl.abs(low))
    low = tl.where(flat, tl.minimum(low, 0.0), low)
    high = tl.where(flat, tl.maximum(high, 0.0), high)
    middle = (low + high) / 2
    half = (high - low) / 2
    scale = 2 * half / top
    zero = tl.where(scale == 0.0, 0.0, (half - middle) / scale)
    next_scale = scale
    next_zero = zero
    weight_s = scale * 0.0
    weight_z = scale * 0.0
    best = tl.full([ROWS], float("inf"), tl.float32)
    # shrunk min-max ranges, then the least squares of the best codes so far
    for k in range(SHRINKS + REFITS):
        p = 1.0 - 0.35 * k / (SHRINKS - 1)
        s = tl.where(k < SHRINKS, 2 * half / top * p, next_scale)
        z = tl.where(k < SHRINKS, tl.where(s == 0.0, 0.0, (half * p - middle) / s), next_zero)
        _, loss, xx, x1, xw, oo, ow = _assign(w, bits, U + k * stride, s, z, top, N, HAS_U)
        determinant = xx * oo - x1 * x1
        refit = (xw * oo - ow * x1) / determinant
        shift = (xw * x1 - ow * xx) / determinant / refit
        good = (tl.abs(refit) < float("inf")) & (tl.abs(shift) < float("inf")) & (refit != 0.0)
        good &= determinant > 1e-6 * xx * oo
        better = loss < best
        best = tl.where(better, loss, best)
        scale = tl.where(better, s, scale)
        zero = tl.where(better, z, zero)
        next_scale = tl.where(better, tl.where(good, refit, s), next_scale)
        next_zero = tl.where(better, tl.where(good, z + shift, z), next_zero)
        weight_s = tl.where(better, xx, weight_s)
        weight_z = tl.where(better, s * s * oo, weight_z)
    if LEAVE:
        tl.store(Loss + left * R + rows, best, mask=inside)
    else:
        tl.store(Scale + rows, scale, mask=inside)
        tl.store(Zero + rows, zero, mask=inside)
        tl.store(WeightS + rows, weight_s, mask=inside)
        tl.store(WeightZ + rows, weight_z, mask=inside)


@triton.jit
def _solve_affine(codes, alpha, beta, a, b, AXIS: tl.constexpr):
    """Least squares of sum alpha v^2 - 2 beta v over v = a' * (codes - b'), along AXIS; (a, b) where singular."""
    cc = tl.sum(alpha * codes * codes, AXIS)
    c1 = tl.sum(alpha * codes, AXIS)
    n1 = tl.sum(alpha, AXIS)
    bc = tl.sum(beta * codes, AXIS)
    b1 = tl.sum(beta, AXIS)
    determinant = cc * n1 - c1 * c1
    slope = (bc * n1 - b1 * c1) / determinant
    shift = -((b1 * cc - bc * c1) / determinant) / slope
    good = (tl.abs(slope) < float("inf")) & (tl.abs(shift) < 2048.0) & (slope != 0.0) & (determinant > 1e-6 * cc * n1)
    return tl.where(good, slope, a), tl.where(good, shift, b)


@triton.jit
def _affine_grid(v, weight):
    """(a, b) of the grid a * (code - b), code 0..7, that fits values v [tiles, 16] with the least weighted squared error."""
    low = tl.min(v, 1)
    high = tl.max(v, 1)
    span = tl.maximum(high - low, 0.05 * tl.maximum(tl.abs(high), tl.abs(low)))
    weight = weight / tl.maximum(tl.max(weight, 1), 1e-30)[:, None] + 1e-6
    best_a = span * 0.0
    best_b = span * 0.0
    best = span * 0.0 + float("inf")
    for k in range(4):
        p = 1.0 - 0.1 * k
        a = span * p / 7
        b = -((low + high) / 2 - span * p / 2) / a
        for _ in tl.static_range(3):
            a_half = _half(a)
            b_half = _half(b)
            inverse = tl.where(a_half == 0.0, 0.0, 1.0 / a_half)
            codes = _whole(v * inverse[:, None] + b_half[:, None], 7.0)
            error = v - a_half[:, None] * (codes - b_half[:, None])
            loss = tl.sum(weight * error * error, 1)
            better = loss < best
            best_a = tl.where(better, a_half, best_a)
            best_b = tl.where(better, b_half, best_b)
            best = tl.where(better, loss, best)
            a, b = _solve_affine(codes, weight, weight * v, a, b, 1)
    return best_a, best_b


@triton.jit
def tile_start_kernel(Scale, Zero, WeightS, WeightZ, Stats, R, TILES: tl.constexpr):
    """The tile statistics [R / 16, 4] that come nearest to the rows' own scales and zeros, weighted."""
    tiles = tl.program_id(0) * TILES + tl.arange(0, TILES)
    rows = tiles[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = rows < R
    scale = tl.load(Scale + rows, mask=inside, other=1.0)
    zero = tl.load(Zero + rows, mask=inside, other=0.0)
    ss, sz = _affine_grid(scale, tl.load(WeightS + rows, mask=inside, other=1.0))
    zs, zz = _affine_grid(zero, tl.load(WeightZ + rows, mask=inside, other=1.0))
    there = tiles * 16 < R
    tl.store(Stats + tiles * 4, ss, mask=there)
    tl.store(Stats + tiles * 4 + 1, sz, mask=there)
    tl.store(Stats + tiles * 4 + 2, zs, mask=there)
    tl.store(Stats + tiles * 4 + 3, zz, mask=there)


@triton.jit
def round_kernel(
    W, Free, U, Stats, BestStats, BestScales, BestZeros, BestCodes, BestLoss, R, top, stride,
    N: tl.constexpr, HAS_U: tl.constexpr, HAS_FREE: tl.constexpr,
):  # fmt: skip
    """One round of `fit_bilevel` for a tile: all 64 pairs of codes tried for Stats, the best so far kept, Stats refitted.
    stride as in `search_kernel`."""
    tile = tl.program_id(0)
    rows = tile * 16 + tl.arange(0, 16)
    inside = rows < R
    w = _columns(W, rows, inside, R, N)
    bits = _outliers(Free, rows, inside, R, N, HAS_FREE)
    ss = tl.load(Stats + tile * 4)
    sz = tl.load(Stats + tile * 4 + 1)
    zs = tl.load(Stats + tile * 4 + 2)
    zz = tl.load(Stats + tile * 4 + 3)

    # every pair of codes: those of the zero side by side, those of the scale one after the other
    wide = ()
    for j in tl.static_range(N):
        wide = wide + (w[j][:, None],)
    z_codes = tl.arange(0, 8)[None, :]
    zeros = tl.zeros([16, 8], tl.float32) + zs * (z_codes.to(tl.float32) - zz)
    least = tl.full([16, 8], float("inf"), tl.float32)
    pair = tl.zeros([16, 8], tl.int32) + z_codes
    for k in range(8):
        scales = tl.zeros([16, 8], tl.float32) + ss * (k - sz)
        loss = _loss(wide, bits[:, None], U + k * stride, scales, zeros, top, N, HAS_U)
        better = loss < least
        least = tl.where(better, loss, least)
        pair = tl.where(better, 8 * k + z_codes, pair)
    pairs = tl.min(tl.where(least == tl.min(least, 1)[:, None], pair, 63), 1)
    sq = (pairs // 8).to(tl.float32)
    zq = (pairs % 8).to(tl.float32)
    scale = ss * (sq - sz)
    zero = zs * (zq - zz)
    codes, losses, xx, x1, xw, oo, ow = _assign(w, bits, U, scale, zero, top, N, HAS_U)

    total = tl.sum(losses, 0)
    known = tl.load(BestLoss + tile)
    better = total < known
    rows_better = tl.zeros([16], tl.float32) + total < known
    tl.store(BestLoss + tile, total, mask=better)
    tl.store(BestStats + tile * 4, ss, mask=better)
    tl.store(BestStats + tile * 4 + 1, sz, mask=better)
    tl.store(BestStats + tile * 4 + 2, zs, mask=better)
    tl.store(BestStats + tile * 4 + 3, zz, mask=better)
    tl.store(BestScales + rows, sq.to(tl.uint8), mask=rows_better)
    tl.store(BestZeros + rows, zq.to(tl.uint8), mask=rows_better)
    for j in tl.static_range(N):
        tl.store(BestCodes + j * R + rows, codes[j].to(tl.uint8), mask=rows_better)

    # the least squares of the tile's four numbers with all codes held: scales first, then zeros
    ss, sz = _solve_affine(sq, xx, xw, ss, sz, 0)
    ss = _half(ss)
    sz = _half(sz)
    scale = ss * (sq - sz)
    zs, zz = _solve_affine(zq, scale * scale * oo, scale * (scale * (x1 + zero * oo) - ow), zs, zz, 0)
    tl.store(Stats + tile * 4, ss)
    tl.store(Stats + tile * 4 + 1, sz)
    tl.store(Stats + tile * 4 + 2, _half(zs))
    tl.store(Stats + tile * 4 + 3, _half(zz))


@triton.jit
def residual_kernel(
    W, Decoded, Free, U, Values, Errors, Loss, R,
    N: tl.constexpr, HAS_U: tl.constexpr, HAS_FREE: tl.constexpr, STORE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`residuals` with STORE, else `loss_of`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < R
    w = _columns(W, rows, inside, R, N)
    decoded = _columns(Decoded, rows, inside, R, N)
    bits = _outliers(Free, rows, inside, R, N, HAS_FREE)
    errors = ()
    loss = w[0] * 0.0
    for j in tl.static_range(N):
        now = w[j]
        if HAS_U:
            for i in tl.static_range(j):
                now -= tl.load(U + i * N + j) * errors[i]
        error = now - decoded[j]
        if STORE:
            value = tl.where(((bits >> j) & 1) != 0, _half(error), 0.0)
            tl.store(Values + j * R + rows, value, mask=inside)
            error -= value
        else:
            error = _kept(error, bits, j)
        if HAS_U:
            error = error / tl.load(U + j * N + j)
        if STORE:
            tl.store(Errors + j * R + rows, error, mask=inside)
        loss += error * error
        errors = errors + (error,)
    if not STORE:
        tl.store(Loss + rows, loss, mask=inside)


def _beside_its_operands(function: Callable[..., T]) -> Callable[..., T]:
    """The function with the device of its first argument as the current one, where Triton launches."""

    @wraps(function)
    def run(w: Tensor, *args: Any, **kwargs: Any) -> T:
        with torch.cuda.device_of(w):
            return function(w, *args, **kwargs)

    return run


def _operands(w: Tensor, free: Tensor | None, U: Tensor | None) -> tuple[tuple[Tensor, ...], dict[str, int | bool]]:
    """Contiguous operands, something in the place of those that are None, and what the kernels know when compiled."""
    if len(w) > FIT_COLUMNS:
        raise ValueError(f"{len(w)} columns, at most {FIT_COLUMNS}")
    w = w.contiguous()
    given = tuple(w if x is None else x.contiguous() for x in (free, U))
    return (w, *given), {"N": len(w), "HAS_U": U is not None, "HAS_FREE": free is not None}


@_beside_its_operands
def tile_start(w: Tensor, U: Tensor | None, top: int, free: Tensor | None) -> Tensor:
    """Tile statistics to begin with, float32 [R / 16, 4], each an fp16 number: the grids nearest to the best scale and zero of
    each row."""
    R = w.shape[1]
    operands, kind = _operands(w, free, U)
    rows = w.new_empty(4, R)  # scale, zero, and how much an error of each matters
    search_kernel[(triton.cdiv(R, ROWS), 1)](
        *operands, *rows, rows, R, float(top), 0, SHRINKS=8, REFITS=2, LEAVE=False, ROWS=ROWS, num_warps=2, **kind
    )
    stats = w.new_empty(R // TILE, 4)
    tile_start_kernel[(triton.cdiv(len(stats), TILES),)](*rows, stats, R, TILES=TILES, num_warps=2)
    return stats


@_beside_its_operands
def leave_one_out(w: Tensor, U: Tensor | None, top: int, shrinks: int, refits: int) -> Tensor:
    """Loss of each row with all its columns, and then without column 0, 1, ..: float32 [n + 1, R]."""
    n, R = w.shape
    operands, kind = _operands(w, None, U)
    loss = w.new_empty(n + 1, R)
    search_kernel[(triton.cdiv(R, ROWS), n + 1)](
        *operands, loss, loss, loss, loss, loss, R, float(top), 0,
        SHRINKS=shrinks, REFITS=refits, LEAVE=True, ROWS=ROWS, num_warps=2, **kind,
    )  # fmt: skip
    return loss


@_beside_its_operands
def bilevel_rounds(
    w: Tensor, U: Tensor | None, top: int, free: Tensor | None, rounds: int, stats: Tensor,
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`rounds` of `fit_bilevel` that begin at tile statistics float32 [R / 16, 4]: the best tile statistics, scale and zero
    codes uint8 [R], and codes uint8 [n, R]. best: scale and zero codes and codes that belong to `stats`, and their loss
    [R / 16], which no tile exceeds."""
    n, R = w.shape
    tiles = R // TILE
    operands, kind = _operands(w, free, U)
    found, stats = stats.clone(), stats.clone()
    if best is None:
        scales, zeros, codes = (w.new_zeros(shape, dtype=torch.uint8) for shape in ((R,), (R,), (n, R)))
        loss = w.new_full((tiles,), torch.inf)
    else:
        scales, zeros, codes, loss = (x.clone(memory_format=torch.contiguous_format) for x in best)
    for _ in range(rounds):
        round_kernel[(tiles,)](*operands, stats, found, scales, zeros, codes, loss, R, float(top), 0, num_warps=2, **kind)
    return found, scales, zeros, codes


@_beside_its_operands
def loss_of(w: Tensor, U: Tensor | None, decoded: Tensor, free: Tensor | None) -> Tensor:
    """Loss [R] of decoded values [n, R]; an outlier takes up what the columns before it leave over."""
    R = w.shape[1]
    (w, free_, U_), kind = _operands(w, free, U)
    loss = w.new_empty(R)
    residual_kernel[(triton.cdiv(R, ROWS),)](
        w, decoded.contiguous(), free_, U_, loss, loss, loss, R, STORE=False, ROWS=ROWS, num_warps=2, **kind
    )
    return loss


@_beside_its_operands
def residuals(w: Tensor, U: Tensor, decoded: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Outliers' values (float32 [n, R], each exactly an fp16 number, 0 elsewhere), and the errors that then remain in units
    of the root, [n, R]."""
    R = w.shape[1]
    (w, free_, U_), kind = _operands(w, free, U)
    values, errors = torch.empty_like(w), torch.empty_like(w)
    residual_kernel[(triton.cdiv(R, ROWS),)](
        w, decoded.contiguous(), free_, U_, values, errors, errors, R, STORE=True, ROWS=ROWS, num_warps=2, **kind
    )
    return values, errors
