"""Portable Triton kernel: quantized matrix to a dense one. One program a tile row and a run of column blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from spqr_format.layout import TILE, Layout, ceil_div
from spqr_format.packing import FIELDS, PAIRS, SPREAD

from .reference import add_outliers


def _nibbles(values: list[int]) -> int:
    """Sixteen 4-bit numbers in one constant, so that a kernel finds entry f by a shift."""
    packed = sum(value << (4 * f) for f, value in enumerate(values))
    return packed - 2**64 if packed >= 2**63 else packed


def field_constants(bits: int) -> tuple[int, int]:
    """Table 4.2 as two constants: word and bit of field f = 8 * half + pair, four bits an entry."""
    flat = [FIELDS[bits][half][pair] for half in range(2) for pair in range(PAIRS)]
    return _nibbles([word for word, _ in flat]), _nibbles([bit for _, bit in flat])


@triton.jit
def _half(pointer, mask):
    """fp16 stored as int16, as float32."""
    return tl.load(pointer, mask=mask, other=0).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _dequantize_kernel(
    Weight, StatCodes, TileStats, GroupSc, GroupZp, Perm, Out, out_features, in_features, blocks, groups,
    WORDS: tl.constexpr, BITS_AT: tl.constexpr, BITS: tl.constexpr, SPREAD_BIT: tl.constexpr, GROUP: tl.constexpr,
    BILEVEL: tl.constexpr, PERMUTED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, 16)[:, None]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tile * 16 + r
    inside = (row < out_features) & (c < in_features)
    lane = r % 8
    # codes
    field = (r // 8) * 8 + (c % 16) // 2
    word = ((WORDS >> (4 * field.to(tl.int64))) & 15).to(tl.int32)
    bit = ((BITS_AT >> (4 * field.to(tl.int64))) & 15).to(tl.int32)
    at = (tile * (8 * BITS) + lane) * blocks + c // 16
    half_shift = 16 * (c % 2)
    w = tl.load(Weight + at + word * (8 * blocks), mask=inside, other=0)
    q = (w >> (bit + half_shift)) & ((1 << BITS) - 1)
    if BITS == 3:
        spread = inside & (bit == SPREAD_BIT)
        s0 = tl.load(Weight + at, mask=spread, other=0) >> (SPREAD_BIT + half_shift)
        s1 = tl.load(Weight + at + 8 * blocks, mask=spread, other=0) >> (SPREAD_BIT + half_shift)
        s2 = tl.load(Weight + at + 16 * blocks, mask=spread, other=0) >> (SPREAD_BIT + half_shift)
        q = tl.where(spread, (s0 & 1) | ((s1 & 1) << 1) | ((s2 & 1) << 2), q)
    # statistics
    group = c // GROUP
    if BILEVEL:
        first = 12 * lane
        at_codes = StatCodes + (tile * 3 + first // 32) * groups + group
        low = (tl.load(at_codes, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF) >> (first % 32)
        straddles = (first % 32) > 20
        high = tl.load(at_codes + groups, mask=inside & straddles, other=0).to(tl.int64) << (32 - first % 32)
        codes = ((low | high) >> (6 * (r // 8))).to(tl.int32)
        stats = TileStats + (tile * groups + group) * 4
        scale = _half(stats, inside) * ((codes & 7).to(tl.float32) - _half(stats + 1, inside))
        zero = _half(stats + 2, inside) * (((codes >> 3) & 7).to(tl.float32) - _half(stats + 3, inside))
    else:
        scale = _half(GroupSc + row * groups + group, inside)
        zero = tl.load(GroupZp + row * groups + group, mask=inside, other=0).to(tl.float32)
    value = scale * (q.to(tl.float32) - zero)
    if PERMUTED:
        column = tl.load(Perm + c, mask=c < in_features, other=0)
    else:
        column = c
    tl.store(Out + row * in_features + column, value.to(Out.dtype.element_ty), mask=inside)


def dequantize(tensors: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype) -> Tensor:
    """W of the given dtype [out, in] on the tensors' device. Outliers are added in float32 before the rounding to dtype.

    The device must be one that Triton drives. Shapes and dtypes must have been checked (dispatch.check_tensors).
    """
    # Outliers add to D before it is rounded, so with outliers the dense part is kept in float32 until they are in.
    exact = torch.float32 if layout.outliers else dtype
    weight = torch.empty(layout.out_features, layout.in_features, dtype=exact, device=tensors["weight"].device)
    words, bits_at = field_constants(layout.weight_bits)
    unused = tensors["weight"]
    columns = min(256, triton.next_power_of_2(layout.blocks * TILE))
    grid = (layout.tile_rows, ceil_div(layout.in_features, columns))
    _dequantize_kernel[grid](
        tensors["weight"], tensors.get("stat_codes", unused), tensors.get("tile_stats", unused),
        tensors.get("group_sc", unused), tensors.get("group_zp", unused), tensors.get("perm", unused), weight,
        layout.out_features, layout.in_features, layout.blocks, layout.groups,
        WORDS=words, BITS_AT=bits_at, BITS=layout.weight_bits, SPREAD_BIT=SPREAD, GROUP=layout.group_size,
        BILEVEL=layout.statistics == "bilevel", PERMUTED=layout.permuted, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    if layout.outliers:
        add_outliers(weight, tensors)
    return weight.to(dtype)
