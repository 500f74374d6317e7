"""Several matrices in one launch, at batch 1 each: projections that share x (q, k, v; gate, up), and the experts of tokens.

The programs of one launch keep the GPU full where those of a small matrix would not, and a launch costs its start and its
end once. Each program computes as in `matvec`, with the warps that suit the tiles of all: sums may be added in another order
than in a launch of one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import CHUNK, TILE, Layout

from . import outliers, overlap, pair_outliers
from .checks import aligned
from .dispatch import TOGETHER
from .experts import Table
from .joined import places
from .launch import REMEMBERED, Launch
from .matvec import product_of_tile, row_constants
from .overlap import await_previous


@gluon.jit
def _product_in(
    Joined, tile, X, Bias, Y, at_scales, at_zeros, at_pointers, at_outliers, out_features, chunks, groups, all_outliers,
    BITS: gl.constexpr, BF: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    HAS_BIAS: gl.constexpr, WHOLE: gl.constexpr, WARPS: gl.constexpr, ENTRIES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """`product_of_tile` of the matrix that lies in `Joined`, its statistics and outliers at these words of it."""
    scales = Joined + at_scales
    zero_points = Joined + at_zeros
    product_of_tile(
        tile, X, X, Joined, scales, zero_points.to(gl.pointer_type(gl.int16)), scales.to(gl.pointer_type(gl.int16)),
        zero_points.to(gl.pointer_type(gl.uint8)), Joined + at_pointers, Joined + at_outliers, Bias, Y,
        out_features, chunks, groups, all_outliers, BITS, BF, BILEVEL, BLOCKS_A_GROUP, OUTLIERS, True, False, HAS_BIAS, WHOLE,
        WARPS, ENTRIES, DEPENDENT,
    )  # fmt: skip


@gluon.jit
def siblings_kernel(
    X, Joined0, Joined1, Joined2, Bias0, Bias1, Bias2, Y0, Y1, Y2,
    chunks, groups, first1, first2,
    at_scales0, at_zeros0, at_pointers0, at_outliers0, out_features0, outliers0,
    at_scales1, at_zeros1, at_pointers1, at_outliers1, out_features1, outliers1,
    at_scales2, at_zeros2, at_pointers2, at_outliers2, out_features2, outliers2,
    BITS: gl.constexpr, BF: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    HAS_BIAS: gl.constexpr, WHOLE: gl.constexpr, WARPS: gl.constexpr, ENTRIES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Y0, Y1 and Y2 from one X [chunks * 256]; programs from first1 and from first2 on are those of the second and the third
    matrix. Where there are but two, first2 is the number of programs."""
    program = gl.program_id(0)
    second = program >= first1
    third = program >= first2
    tile = program - gl.where(third, first2, gl.where(second, first1, 0))
    joined = gl.where(third, Joined2, gl.where(second, Joined1, Joined0))
    bias = gl.where(third, Bias2, gl.where(second, Bias1, Bias0))
    y = gl.where(third, Y2, gl.where(second, Y1, Y0))
    at_scales = gl.where(third, at_scales2, gl.where(second, at_scales1, at_scales0))
    at_zeros = gl.where(third, at_zeros2, gl.where(second, at_zeros1, at_zeros0))
    at_pointers = gl.where(third, at_pointers2, gl.where(second, at_pointers1, at_pointers0))
    at_outliers = gl.where(third, at_outliers2, gl.where(second, at_outliers1, at_outliers0))
    out_features = gl.where(third, out_features2, gl.where(second, out_features1, out_features0))
    all_outliers = gl.where(third, outliers2, gl.where(second, outliers1, outliers0))
    _product_in(
        joined, tile, X, bias, y, at_scales, at_zeros, at_pointers, at_outliers, out_features, chunks, groups,
        all_outliers, BITS, BF, BILEVEL, BLOCKS_A_GROUP, OUTLIERS, HAS_BIAS, WHOLE, WARPS, ENTRIES, DEPENDENT,
    )  # fmt: skip


def _words(layout: Layout) -> list[int]:
    """At which word of the joined tensor scales, zeros (or what there is of two levels), pointers and outliers begin."""
    found = places(layout)
    statistics = ("stat_codes", "tile_stats") if layout.statistics == "bilevel" else ("group_sc", "group_zp")
    sparse = ("outlier_ptr", "outliers") if layout.outliers else ()
    begins = [found[leaf].begin * found[leaf].dtype.itemsize // 4 for leaf in (*statistics, *sparse)]
    return begins + [0] * (4 - len(begins))


@cache
def _siblings(layouts: tuple[Layout, ...], dtype: torch.dtype, bias: torch.dtype | None, device: torch.device) -> Launch:
    tiles = [layout.tile_rows for layout in layouts]
    first = layouts[0]
    dtypes = (dtype, *[torch.int32] * TOGETHER, *[bias or dtype] * TOGETHER, *[dtype] * TOGETHER)
    integers = [first.blocks // CHUNK, first.groups, tiles[0], tiles[0] + tiles[1]]
    for layout in (*layouts, *[layouts[-1]] * (TOGETHER - len(layouts))):
        integers += [*_words(layout), layout.out_features, layout.outliers]
    entries = max(pair_outliers.entries(layout) for layout in layouts)
    constants = {"HAS_BIAS": bias is not None, **row_constants(first, entries, sum(tiles), dtype), **overlap.options(device)}
    return Launch(siblings_kernel, (sum(tiles), 1), device, dtypes, integers, constants)


def siblings(x: Tensor, joined: Sequence[Tensor], layouts: tuple[Layout, ...], biases: Sequence[Tensor]) -> list[Tensor]:
    """W x + bias for each of two or three matrices that one launch can take (`dispatch.in_one_launch`).

    x: fp16 or bf16 [1, in], contiguous. joined: what `joined.join` makes of each. biases: one of a dtype for each, or none.
    Returns [1, out] of each in x's dtype.
    """
    x = aligned(x)
    dense = x
    if x.shape[1] % TILE:
        dense = torch.nn.functional.pad(x, (0, layouts[0].blocks * TILE - x.shape[1]))
    results = [torch.empty(1, layout.out_features, dtype=x.dtype, device=x.device) for layout in layouts]
    added = [aligned(bias) for bias in biases] if biases else results
    addresses = [[tensor.data_ptr() for tensor in each] for each in (joined, added, results)]
    if len(layouts) < TOGETHER:  # the last one stands in for a third
        addresses = [[*each, each[-1]] for each in addresses]
    launch = _siblings(layouts, x.dtype, biases[0].dtype if biases else None, x.device)
    launch(dense.data_ptr(), *addresses[0], *addresses[1], *addresses[2])
    return results


@gluon.jit
def experts_kernel(
    X, Ids, Table, Stored, Y,
    chunks, groups, tiles, out_features, experts, parts, pairs_a_row, at_scales, at_zeros, at_pointers, at_outliers,
    BITS: gl.constexpr, BF: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    WHOLE: gl.constexpr, WARPS: gl.constexpr, ENTRIES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Y[pair, part, o] = sum_i W[Ids[pair], part][o, i] X[pair // pairs_a_row, i] where Table has that matrix; NaN
    for an id that is no expert.

    X [rows, chunks * 256]; Ids int64 [pairs]; Table int64 [experts, parts, 2] as in `experts.Table`."""
    pair = gl.program_id(1)
    part = gl.program_id(0) // tiles
    tile = gl.program_id(0) % tiles
    ids_at = Ids + pair
    if DEPENDENT:  # the router's choice comes from a kernel before
        ids_at = await_previous(ids_at)
    expert = gl.load(ids_at)
    known = (expert >= 0) & (expert < experts)
    entry = Table + (expert * parts + part) * 2
    begin = gl.load(entry, mask=known, other=-1)
    y = Y + (pair.to(gl.int64) * parts + part) * out_features
    if begin >= 0:
        all_outliers = gl.load(entry + 1).to(gl.int32)
        row = (pair // pairs_a_row).to(gl.int64)
        _product_in(
            Stored + gl.multiple_of(begin, 32), tile, X + row * (chunks * 256), y, y, at_scales, at_zeros, at_pointers,
            at_outliers, out_features, chunks, groups, all_outliers, BITS, BF, BILEVEL, BLOCKS_A_GROUP, OUTLIERS, False, WHOLE,
            WARPS, ENTRIES, DEPENDENT,
        )  # fmt: skip
    if not known:
        row_of_y = tile * 16 + gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
        nothing = gl.full([32 * WARPS], float("nan"), gl.float32, gl.BlockedLayout([1], [32], [WARPS], [0]))
        gl.store(y + row_of_y, nothing.to(Y.dtype.element_ty), mask=(row_of_y < tile * 16 + 16) & (row_of_y < out_features))


@lru_cache(REMEMBERED)
def _experts(
    layout: Layout, entries: int, number: int, parts: int, pairs: int, rows: int, dtype: torch.dtype, device: torch.device
) -> Launch:
    """layout without outliers; entries: as `pair_outliers.entries` has them."""
    tiles = layout.tile_rows
    dtypes = (dtype, torch.int64, torch.int64, torch.int32, dtype)
    words = _words(layout.with_outliers(int(entries > 0)))
    integers = (layout.blocks // CHUNK, layout.groups, tiles, layout.out_features, number, parts, pairs // rows, *words)
    constants = row_constants(layout, entries, tiles * parts * pairs, dtype) | overlap.options(device)
    return Launch(experts_kernel, (tiles * parts, pairs), device, dtypes, integers, constants)


def experts(x: Tensor, ids: Tensor, stored: Tensor, tables: Sequence[Table]) -> Tensor:
    """Products of each row of x with the parts of its experts' matrices, side by side.

    x: fp16 or bf16 [rows, in], contiguous. ids: int64 [pairs], the experts of row 0, then of row 1, ...; as many for each,
    one that is no expert gives NaN. stored: int32, all matrices. tables: one for each kind, of whole chunks, not permuted.
    Returns [pairs, parts * out] in x's dtype.
    """
    layout, parts = tables[0].layout, tables[0].begins.shape[1]
    if x.shape[1] != layout.blocks * TILE:
        x = torch.nn.functional.pad(x, (0, layout.blocks * TILE - x.shape[1]))
    x = aligned(x)
    pairs = ids.numel()
    y = torch.empty(pairs, parts * layout.out_features, dtype=x.dtype, device=x.device)
    for table in tables:
        shape, _ = outliers.without_outliers(table.layout)
        entries = pair_outliers.entries(table.layout)
        launch = _experts(shape, entries, len(table.begins), parts, pairs, x.shape[0], x.dtype, x.device)
        launch(x.data_ptr(), ids.data_ptr(), table.begins.data_ptr(), stored.data_ptr(), y.data_ptr())
    return y
