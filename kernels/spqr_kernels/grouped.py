"""The experts of tokens in one launch: a row of x each with its own few of many matrices.

The programs of one launch keep the GPU full where those of a small matrix would not, and a launch costs its start and its
end once. Each program computes as in `matvec`, with the warps that suit the tiles of all: sums may be added in another order
than in a launch of one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import CHUNK, TILE, Layout

from . import outliers, overlap, pair_outliers
from .checks import aligned
from .experts import Table
from .joined_words import leaves_in, words_of
from .launch import REMEMBERED, Launch
from .matvec import product_of_tile, row_constants
from .overlap import await_previous


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
        x = X + row * (chunks * 256)
        leaves = leaves_in(Stored + gl.multiple_of(begin, 32), (at_scales, at_zeros, at_pointers, at_outliers))
        product_of_tile(
            tile, x, x, *leaves, y, y, out_features, chunks, groups, all_outliers, BITS, BF, BILEVEL, BLOCKS_A_GROUP, OUTLIERS,
            True, False, False, WHOLE, WARPS, ENTRIES, DEPENDENT,
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
    words = words_of(layout.with_outliers(int(entries > 0)))
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
