"""Quantized matrix to a dense one, exact in fp32 before the one rounding to the wanted dtype.

Two portable Triton kernels: the first writes s (q - z) for all weights, the second goes over the outliers alone and
writes their places again, with the outlier added before the rounding. On NVIDIA GPUs `unpack_kernel` of unpack.py does
both in one, faster.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from spqr_format.layout import CHUNK, TILE, Layout, ceil_div
from spqr_format.packing import SPREAD

from .weight_at import EXACT, field_constants, weight_at

CELLS, ENTRIES = 8, 32  # cells of outliers a program, and outliers of each at a time: with 1 % of the weights a cell has 20


@triton.jit
def dense_kernel(
    Weight, StatCodes, TileStats, GroupSc, GroupZp, Perm, Out, out_features, in_features, blocks, groups,
    WORDS: tl.constexpr, BITS_AT: tl.constexpr, BITS: tl.constexpr, SPREAD_BIT: tl.constexpr, GROUP: tl.constexpr,
    BILEVEL: tl.constexpr, PERMUTED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Out[row, perm[c]] = s (q - z). One program a tile row and COLUMNS columns."""
    row = tl.program_id(0).to(tl.int64) * 16 + tl.arange(0, 16)[:, None]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < out_features) & (c < in_features)
    value = weight_at(
        Weight, StatCodes, TileStats, GroupSc, GroupZp, row, c, inside, blocks, groups,
        WORDS, BITS_AT, BITS, SPREAD_BIT, GROUP, BILEVEL,
    )  # fmt: skip
    if PERMUTED:
        column = tl.load(Perm + c, mask=c < in_features, other=0)
    else:
        column = c
    tl.store(Out + row * in_features + column, value.to(Out.dtype.element_ty), mask=inside)


@triton.jit
def outliers_kernel(
    Weight, StatCodes, TileStats, GroupSc, GroupZp, Place, OutlierPtr, Outliers, Out, out_features, in_features, blocks, groups,
    WORDS: tl.constexpr, BITS_AT: tl.constexpr, BITS: tl.constexpr, SPREAD_BIT: tl.constexpr, GROUP: tl.constexpr,
    BILEVEL: tl.constexpr, PERMUTED: tl.constexpr, CELLS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Out[row, column] = s (q - z) + value at every outlier (spec 5.3), for CELLS cells. Place: stored column of a column."""
    cells_a_tile = (in_features + 127) // 128
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    known = cell < ((out_features + 15) // 16) * cells_a_tile
    begin = tl.load(OutlierPtr + cell, mask=known, other=0)
    end = tl.load(OutlierPtr + cell + 1, mask=known, other=0)
    longest = tl.max(end - begin, axis=0)
    first_row = (cell // cells_a_tile).to(tl.int64)[:, None] * 16
    panel = (cell % cells_a_tile)[:, None] // 32 * 4096
    for first in range(0, longest, ENTRIES):
        at = begin[:, None].to(tl.int64) + first + tl.arange(0, ENTRIES)[None, :]
        inside = at < end[:, None]
        word = tl.load(Outliers + at, mask=inside, other=0)
        row = first_row + ((word >> 12) & 15)
        column = panel + (word & 4095)
        if PERMUTED:
            c = tl.load(Place + column, mask=inside, other=0).to(tl.int32)
        else:
            c = column
        value = weight_at(
            Weight, StatCodes, TileStats, GroupSc, GroupZp, row, c, inside, blocks, groups,
            WORDS, BITS_AT, BITS, SPREAD_BIT, GROUP, BILEVEL,
        )  # fmt: skip
        value += (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        tl.store(Out + row * in_features + column, value.to(Out.dtype.element_ty), mask=inside)


def dequantize(tensors: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    """W of the given dtype [out, in] on the tensors' device, which Triton must drive. Operands must have been checked."""
    device = tensors["weight"].device
    weight = torch.empty(layout.out_features, layout.in_features, dtype=dtype, device=device)
    from .dispatch import has_tensor_cores  # here, because that module imports this one

    fast = layout.in_features % (TILE * CHUNK) == 0 and not layout.permuted and dtype.itemsize == 2
    if fast and has_tensor_cores(device):
        from . import unpack

        unpack.dequantize(weight, tensors, layout)
        return weight
    words, bits_at = field_constants(layout.weight_bits)
    unused = tensors["weight"]
    stored = [tensors.get(leaf, unused) for leaf in ("weight", "stat_codes", "tile_stats", "group_sc", "group_zp")]
    sizes = (layout.out_features, layout.in_features, layout.blocks, layout.groups)
    constants = {
        "WORDS": words, "BITS_AT": bits_at, "BITS": layout.weight_bits, "SPREAD_BIT": SPREAD, "GROUP": layout.group_size,
        "BILEVEL": layout.statistics == "bilevel", "PERMUTED": layout.permuted,
    }  # fmt: skip
    columns = min(128, triton.next_power_of_2(layout.blocks * TILE))
    grid = (layout.tile_rows, ceil_div(layout.in_features, columns))
    dense_kernel[grid](*stored, tensors.get("perm", unused), weight, *sizes, **constants, COLUMNS=columns, num_warps=4, **EXACT)
    if layout.outliers:
        place = unused
        if layout.permuted:
            perm = tensors["perm"].to(torch.int64)
            place = torch.empty_like(perm).scatter_(0, perm, torch.arange(perm.numel(), device=device))
        outliers_kernel[(ceil_div(layout.cells, CELLS),)](
            *stored, place, tensors["outlier_ptr"], tensors["outliers"], weight, *sizes, **constants,
            CELLS=CELLS, ENTRIES=ENTRIES, num_warps=4, **EXACT,
        )  # fmt: skip
    return weight
