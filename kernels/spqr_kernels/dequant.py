"""Quantized matrix to a dense one, exact in fp32 before the one rounding to the wanted dtype.

Two portable Triton kernels: the first writes s (q - z) for all weights, the second goes over the outliers alone and
writes their places again, with the outlier added before the rounding. On NVIDIA GPUs `unpack_kernel` of unpack.py does
the first part faster.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from spqr_format.layout import TILE, Layout, ceil_div
from spqr_format.packing import FIELDS, PAIRS, SPREAD


def _nibbles(values: list[int]) -> int:
    """Sixteen 4-bit numbers in one constant, so that a kernel finds entry f by a shift."""
    packed = sum(value << (4 * f) for f, value in enumerate(values))
    return packed - 2**64 if packed >= 2**63 else packed


def field_constants(bits: int) -> tuple[int, int]:
    """Table 4.2 as two constants: word and bit of field f = 8 * half + pair, four bits an entry."""
    flat = [FIELDS[bits][half][pair] for half in range(2) for pair in range(PAIRS)]
    return _nibbles([word for word, _ in flat]), _nibbles([bit for _, bit in flat])


# The spec rounds every operation on its own, so a product and a sum are not to become one fma.
EXACT = {"enable_fp_fusion": False}

CELLS, ENTRIES = 8, 32  # cells of outliers a program, and outliers of each at a time: with 1 % of the weights a cell has 20


@triton.jit
def _half(pointer, mask):
    """fp16 stored as int16, as float32."""
    return tl.load(pointer, mask=mask, other=0).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _first_word(tile, lane, block, blocks, BITS: tl.constexpr):
    """Place of word 0 of a lane and block, and how far apart its words are (spec 4.2)."""
    chunks = blocks // 16
    b = block % 16
    n = blocks % 16
    full = block // 16 < chunks
    in_chunk = tl.where(full, lane * 16 + (b % 4) * 4 + b // 4, lane * n + b)
    at = tile * (8 * BITS) * blocks + (block // 16).to(tl.int64) * (128 * BITS) + in_chunk
    return at, tl.where(full, 128, 8 * n)


@triton.jit
def _statistics_codes(StatCodes, tile, lane, group, groups, inside):
    """The 12 bits of a lane and group (spec 4.3), int32 with others above them."""
    sets = groups // 16
    n = groups % 16
    full = group // 16 < sets
    r = group % 16
    i = 4 * lane + r % 8 // 2
    half = 32 + i // 2
    odd = r % 2
    begin = 12 * lane  # of the 96 bits of a group behind the last set
    # the word with the lowest of the bits, and the one with the others
    low_in_set = tl.where((r >= 8) & (odd == 1), half, i)
    shift_in_set = tl.where(r < 8, 12 * odd, tl.where(odd == 1, 16 * (i % 2) + 4, 24))
    low_at = tl.where(full, low_in_set, begin // 32 * n + r)
    low_shift = tl.where(full, shift_in_set, begin % 32)
    two = tl.where(full, (r >= 8) & (odd == 0), begin % 32 > 20)
    high_at = tl.where(full, half, (begin // 32 + 1) * n + r)
    high_shift = tl.where(full, 16 * (i % 2), 0)
    high_up = tl.where(full, 8, 32 - begin % 32)
    codes = StatCodes + tile * 3 * groups + (group // 16).to(tl.int64) * 48
    low = (tl.load(codes + low_at, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF) >> low_shift
    high = (tl.load(codes + high_at, mask=inside & two, other=0).to(tl.int64) & 0xFFFFFFFF) >> high_shift
    return (low | (high << high_up)).to(tl.int32)


@triton.jit
def _decode(
    Weight, StatCodes, TileStats, GroupSc, GroupZp, row, c, inside, blocks, groups,
    WORDS: tl.constexpr, BITS_AT: tl.constexpr, BITS: tl.constexpr, SPREAD_BIT: tl.constexpr, GROUP: tl.constexpr,
    BILEVEL: tl.constexpr,
):  # fmt: skip
    """s (q - z) float32 at rows int64 `row` and stored columns `c`, both of one shape or broadcast to it."""
    tile = row // 16
    r = (row % 16).to(tl.int32)
    lane = r % 8
    # codes
    field = (r // 8) * 8 + (c % 16) // 2
    word = ((WORDS >> (4 * field.to(tl.int64))) & 15).to(tl.int32)
    bit = ((BITS_AT >> (4 * field.to(tl.int64))) & 15).to(tl.int32)
    at, apart = _first_word(tile, lane, c // 16, blocks, BITS)
    half_shift = 16 * (c % 2)
    w = tl.load(Weight + at + word * apart, mask=inside, other=0)
    q = (w >> (bit + half_shift)) & ((1 << BITS) - 1)
    if BITS == 3:
        spread = inside & (bit == SPREAD_BIT)
        s0 = tl.load(Weight + at, mask=spread, other=0) >> (SPREAD_BIT + half_shift)
        s1 = tl.load(Weight + at + apart, mask=spread, other=0) >> (SPREAD_BIT + half_shift)
        s2 = tl.load(Weight + at + 2 * apart, mask=spread, other=0) >> (SPREAD_BIT + half_shift)
        q = tl.where(spread, (s0 & 1) | ((s1 & 1) << 1) | ((s2 & 1) << 2), q)
    # statistics
    group = c // GROUP
    if BILEVEL:
        codes = _statistics_codes(StatCodes, tile, lane, group, groups, inside) >> (6 * (r // 8))
        stats = TileStats + (tile * groups + group) * 4
        scale = _half(stats, inside) * ((codes & 7).to(tl.float32) - _half(stats + 1, inside))
        zero = _half(stats + 2, inside) * (((codes >> 3) & 7).to(tl.float32) - _half(stats + 3, inside))
    else:
        scale = _half(GroupSc + row * groups + group, inside)
        zero = tl.load(GroupZp + row * groups + group, mask=inside, other=0).to(tl.float32)
    return scale * (q.to(tl.float32) - zero)


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
    value = _decode(
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
        value = _decode(
            Weight, StatCodes, TileStats, GroupSc, GroupZp, row, c, inside, blocks, groups,
            WORDS, BITS_AT, BITS, SPREAD_BIT, GROUP, BILEVEL,
        )  # fmt: skip
        value += (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        tl.store(Out + row * in_features + column, value.to(Out.dtype.element_ty), mask=inside)


def dequantize(tensors: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    """W of the given dtype [out, in] on the tensors' device, which Triton must drive. Operands must have been checked."""
    device = tensors["weight"].device
    weight = torch.empty(layout.out_features, layout.in_features, dtype=dtype, device=device)
    words, bits_at = field_constants(layout.weight_bits)
    unused = tensors["weight"]
    stored = [tensors.get(leaf, unused) for leaf in ("weight", "stat_codes", "tile_stats", "group_sc", "group_zp")]
    sizes = (layout.out_features, layout.in_features, layout.blocks, layout.groups)
    constants = {
        "WORDS": words, "BITS_AT": bits_at, "BITS": layout.weight_bits, "SPREAD_BIT": SPREAD, "GROUP": layout.group_size,
        "BILEVEL": layout.statistics == "bilevel", "PERMUTED": layout.permuted,
    }  # fmt: skip
    from .dispatch import has_tensor_cores, whole_chunks  # here, because that module imports this one

    fast = whole_chunks(layout) and layout.in_features % TILE == 0 and not layout.permuted and dtype.itemsize == 2
    if fast and has_tensor_cores(device):
        from . import unpack

        unpack.dense(weight, tensors, layout)
    else:
        columns = min(128, triton.next_power_of_2(layout.blocks * TILE))
        grid = (layout.tile_rows, ceil_div(layout.in_features, columns))
        dense_kernel[grid](
            *stored, tensors.get("perm", unused), weight, *sizes, **constants, COLUMNS=columns, num_warps=4, **EXACT
        )
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
