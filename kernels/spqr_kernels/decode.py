"""Decode kernel for NVIDIA GPUs (sm_80 and newer): y = x W^T for a small batch, on tensor cores, outliers fused.

One program a tile row of 16 rows; its warps share the columns. A lane loads its words of four column blocks with 16-byte loads,
brings the codes to fp16 weights in registers, and these registers are already the A fragment of `mma.m16n8k16`: no shared
memory, no shuffles. The batch is the N of the product. Every sum has one fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import TILE, Layout

from . import ptx
from .lanes import index, load1, load2, load4, load4_or_zero, row_of_words

_LANE = gl.constexpr({bits: ptx.dequantize_lane(bits) for bits in (2, 3, 4)})
_LANE_REGISTERS = gl.constexpr({bits: ptx.dequantize_lane_constraints(bits) for bits in (2, 3, 4)})
_BILEVEL = gl.constexpr({bits: ptx.half_statistics(bits) for bits in (2, 3, 4)})
_BILEVEL_REGISTERS = gl.constexpr(ptx.HALF_STATISTICS_CONSTRAINTS)
_MMA = gl.constexpr(ptx.MMA)
_MMA_REGISTERS = gl.constexpr(ptx.MMA_CONSTRAINTS)
_QUAD_SUM = gl.constexpr(ptx.QUAD_SUM)
_MIDDLE = gl.constexpr({2: 0x40004000, 3: 0x44004400, 4: 0x48004800})  # half2 of 2, 4, 8
_DIRECT = gl.constexpr(
    # $0 scale, $1 offset as half2; $2 scale (raw fp16), $3 zero point (integer), $4 half2 of middle
    "{ .reg .b32 z; .reg .b16 h; mov.b32 z, $3; cvt.rn.f16.u32 h, z; mov.b32 z, {h, h};"
    " prmt.b32 $0, $2, $2, 0x1010; sub.rn.f16x2 z, $4, z; mul.rn.f16x2 $1, z, $0; }"
)


@gluon.jit
def _dequantize_lane(words, s0, o0, s1, o1, BITS: gl.constexpr):
    return gl.inline_asm_elementwise(
        _LANE[BITS], _LANE_REGISTERS[BITS], words + (s0, o0, s1, o1),
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32,
               gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _mma(a, b, i: gl.constexpr, x, c):
    return gl.inline_asm_elementwise(
        _MMA, _MMA_REGISTERS,
        [a[i], a[8 + i], b[i], b[8 + i], x[0], x[1], c[0], c[1], c[2], c[3]],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _load_chunk(
    weights, stat_codes, tile_stats, block, low, high, blocks, groups,
    BITS: gl.constexpr, VECTOR: gl.constexpr, TILE_STATS: gl.constexpr,
):  # fmt: skip
    """Words of column blocks `block`..+3, and their statistics where a group is one block."""
    words = ()
    for k in gl.static_range(BITS):
        words = words + row_of_words(weights + k * 8 * blocks, block, blocks, VECTOR)
    if TILE_STATS:
        words = words + row_of_words(stat_codes + low * groups, block, blocks, VECTOR)
        words = words + row_of_words(stat_codes + high * groups, block, blocks, VECTOR)
        if VECTOR:
            at = tile_stats + 2 * gl.minimum(block, blocks - 4)
            words = words + load4(at) + load4(at + 4)
        else:
            for j in gl.static_range(4):
                words = words + load2(tile_stats + 2 * gl.minimum(block + j, blocks - 1))
    return words


@gluon.jit
def _multiply_chunk(
    chunk, XDense, GroupSc, GroupZp, stat_codes, tile_stats, block, gid, low, high, shift, row0, row1, batch, blocks, groups,
    acc, middle,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, TILES_N: gl.constexpr,
):  # fmt: skip
    """The accumulators plus what the chunk's 256 columns give."""
    for pair in gl.static_range(2):
        fragments = ()
        for e in gl.static_range(2):
            if BILEVEL:
                if BLOCKS_A_GROUP == 1:
                    code0 = chunk[4 * BITS + 2 * pair + e]
                    code1 = chunk[4 * BITS + 4 + 2 * pair + e]
                    second0 = chunk[4 * BITS + 8 + 4 * pair + 2 * e]
                    second1 = chunk[4 * BITS + 9 + 4 * pair + 2 * e]
                else:
                    group = gl.minimum(block + 2 * pair + e, blocks - 1) // BLOCKS_A_GROUP
                    code0 = load1(stat_codes + low * groups + group)
                    code1 = load1(stat_codes + high * groups + group)
                    second0, second1 = load2(tile_stats + 2 * group)
                s0, o0, s1, o1 = gl.inline_asm_elementwise(
                    _BILEVEL[BITS], _BILEVEL_REGISTERS, [code0, code1, shift, second0, second1],
                    dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
                )  # fmt: skip
            else:
                group = gl.minimum(block + 2 * pair + e, blocks - 1) // BLOCKS_A_GROUP
                raw0 = gl.load(GroupSc + row0 * groups + group).to(gl.int32)
                raw1 = gl.load(GroupSc + row1 * groups + group).to(gl.int32)
                zero0 = gl.load(GroupZp + row0 * groups + group).to(gl.int32)
                zero1 = gl.load(GroupZp + row1 * groups + group).to(gl.int32)
                s0, o0 = gl.inline_asm_elementwise(
                    _DIRECT, "=&r,=&r,r,r,r", [raw0, zero0, middle], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
                )
                s1, o1 = gl.inline_asm_elementwise(
                    _DIRECT, "=&r,=&r,r,r,r", [raw1, zero1, middle], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
                )
            lane_words = ()
            for k in gl.static_range(BITS):
                lane_words = lane_words + (chunk[4 * k + 2 * pair + e],)
            fragments = fragments + (_dequantize_lane(lane_words, s0, o0, s1, o1, BITS),)
        updated = ()
        for t in gl.static_range(TILES_N):
            n = gid + 8 * t
            c = acc[t]
            xs = ()
            for e in gl.static_range(2):
                column = block + 2 * pair + e
                there = ((n < batch) & (column < blocks)).to(gl.int32)
                at = XDense.to(gl.pointer_type(gl.int32)) + (n * blocks + column) * 8
                xs = xs + (load4_or_zero(at, there) + load4_or_zero(at + 4, there),)
            for i in gl.static_range(8):
                c = _mma(fragments[0], fragments[1], i, (xs[0][i], xs[1][i]), c)
            updated = updated + (c,)
        acc = updated
    return acc


@gluon.jit
def decode_kernel(
    X, XDense, Weight, StatCodes, TileStats, GroupSc, GroupZp, Crow, Col, Val, Bias, Y,
    batch, out_features, in_features, blocks, groups,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    WIDE_ROWS: gl.constexpr, WIDE_COLUMNS: gl.constexpr, HAS_BIAS: gl.constexpr, VECTOR: gl.constexpr,
    BATCH: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Y[n, o] = sum_i X[n, i] W[o, i] (+ Bias[o]), n < batch <= BATCH.

    X fp16 [batch, in] is read by the outliers, XDense fp16 [batch, blocks * 16], permuted and padded
    where need be, by the codes.
    Y [batch, out], contiguous.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    spread: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])  # warp, lane, value
    inner: gl.constexpr = gl.SliceLayout(0, spread)
    thread = gl.arange(0, 32 * WARPS, layout=layout)
    lane = thread % 32
    warp = thread // 32
    gid = lane // 4
    tid = lane % 4
    tile = gl.program_id(0)
    TILES_N: gl.constexpr = (BATCH + 7) // 8
    TILE_STATS: gl.constexpr = BILEVEL and BLOCKS_A_GROUP == 1
    zero = gl.zeros([32 * WARPS], gl.float32, layout)
    middle = gl.full([32 * WARPS], _MIDDLE[BITS], gl.int32, layout)
    first_bit = gid * 12
    low = first_bit // 32
    high = gl.minimum(low + 1, 2)
    shift = first_bit % 32
    tile64 = tile.to(gl.int64)
    weights = Weight + tile64 * (8 * BITS) * blocks + gid * blocks
    stat_codes = StatCodes + tile64 * 3 * groups
    tile_stats = TileStats.to(gl.pointer_type(gl.int32)) + tile64 * 2 * groups
    row0 = gl.minimum(tile * 16 + gid, out_features - 1).to(gl.int64)
    row1 = gl.minimum(tile * 16 + 8 + gid, out_features - 1).to(gl.int64)

    acc = ((zero, zero, zero, zero),)
    for t in gl.static_range(1, TILES_N):
        acc = acc + ((zero, zero, zero, zero),)

    block = warp * 16 + tid * 4
    chunk = _load_chunk(weights, stat_codes, tile_stats, block, low, high, blocks, groups, BITS, VECTOR, TILE_STATS)
    # Two chunks a turn, so that the registers of one are free for the next without a copy.
    for _first in range(0, blocks, 32 * WARPS):
        for turn in gl.static_range(2):
            following = _load_chunk(
                weights, stat_codes, tile_stats, block + 16 * WARPS, low, high, blocks, groups, BITS, VECTOR, TILE_STATS
            )
            acc = _multiply_chunk(
                chunk, XDense, GroupSc, GroupZp, stat_codes, tile_stats, block, gid, low, high, shift, row0, row1, batch,
                blocks, groups, acc, middle, BITS, BILEVEL, BLOCKS_A_GROUP, TILES_N,
            )  # fmt: skip
            chunk = following
            block += 16 * WARPS

    if OUTLIERS:
        rows = Crow + tile * 16 + gid
        begin0 = index(rows, tile * 16 + gid < out_features, WIDE_ROWS)
        end0 = index(rows + 1, tile * 16 + gid < out_features, WIDE_ROWS)
        begin1 = index(rows + 8, tile * 16 + 8 + gid < out_features, WIDE_ROWS)
        end1 = index(rows + 9, tile * 16 + 8 + gid < out_features, WIDE_ROWS)
        begins = (begin0, begin1)
        ends = (end0, end1)
        longest = gl.max(gl.maximum(end0 - begin0, end1 - begin1), axis=0)
        for h in gl.static_range(2):
            sums = (zero,)
            for n in gl.static_range(1, BATCH):
                sums = sums + (zero,)
            for k in range(0, longest, 4 * WARPS):
                at = begins[h] + k + warp * 4 + tid
                there = at < ends[h]
                column = index(Col + at, there, WIDE_COLUMNS)
                value = gl.load(Val + at, mask=there, other=0).to(gl.float16, bitcast=True).to(gl.float32)
                more = ()
                for n in gl.static_range(BATCH):
                    xv = gl.load(X + n * in_features + column, mask=there & (n < batch), other=0).to(gl.float32)
                    more = more + (sums[n] + value * xv,)
                sums = more
            updated = ()
            for t in gl.static_range(TILES_N):
                c = acc[t]
                extra = (zero, zero)
                for n in gl.static_range(8):
                    if 8 * t + n < BATCH:
                        total = gl.inline_asm_elementwise(
                            _QUAD_SUM, "=f,f", [sums[8 * t + n]], dtype=gl.float32, is_pure=True, pack=1
                        )
                        mine = gl.where(tid == n // 2, total, 0.0)
                        if n % 2 == 0:
                            extra = (extra[0] + mine, extra[1])
                        else:
                            extra = (extra[0], extra[1] + mine)
                if h == 0:
                    updated = updated + ((c[0] + extra[0], c[1] + extra[1], c[2], c[3]),)
                else:
                    updated = updated + ((c[0], c[1], c[2] + extra[0], c[3] + extra[1]),)
            acc = updated

    for t in gl.static_range(TILES_N):
        c = acc[t]
        # [threads, row half, batch parity]
        values = gl.join(gl.join(c[0], c[2]), gl.join(c[1], c[3]))
        by_warp = gl.convert_layout(gl.reshape(values, [WARPS, 32, 4]), spread)
        sums4 = gl.sum(by_warp, axis=0)
        lane2 = gl.arange(0, 32, layout=gl.SliceLayout(1, inner))[:, None]
        e2 = gl.arange(0, 4, layout=gl.SliceLayout(0, inner))[None, :]
        row = tile * 16 + lane2 // 4 + 8 * (e2 // 2)
        n = 8 * t + 2 * (lane2 % 4) + e2 % 2
        if HAS_BIAS:
            sums4 += gl.load(Bias + row, mask=row < out_features, other=0).to(gl.float32)
        gl.store(
            Y + n.to(gl.int64) * out_features + row,
            sums4.to(Y.dtype.element_ty),
            mask=(row < out_features) & (n < batch),
        )


def linear(x: Tensor, tensors: Mapping[str, Tensor], layout: Layout, bias: Tensor | None, warps: int | None = None) -> Tensor:
    """x W^T + bias for x fp16 or bf16 [batch, in], contiguous, batch 1..16, checked operands. Returns [batch, out]."""
    out_dtype = x.dtype
    batch = x.shape[0]
    exponent = None
    if x.dtype == torch.bfloat16:
        # Weights are exact enough in fp16 but not in bf16, so x goes to fp16 by a power of two for each row: exact for all
        # that is within 2**-29 of the row's largest.
        exponent = torch.frexp(x.abs().amax(dim=1, keepdim=True).float()).exponent
        x = torch.ldexp(x.float(), 15 - exponent).to(torch.float16)
    dense = x if not layout.permuted else x.index_select(1, tensors["perm"])
    width = layout.blocks * TILE
    if width != layout.in_features:
        dense = torch.nn.functional.pad(dense, (0, width - layout.in_features))
    y = torch.empty(batch, layout.out_features, dtype=torch.float32 if exponent is not None else out_dtype, device=x.device)
    warps = warps or (8 if layout.blocks >= 128 else 4 if layout.blocks >= 64 else 2)
    unused = tensors["weight"]
    decode_kernel[(layout.tile_rows,)](
        x, dense, tensors["weight"], tensors.get("stat_codes", unused), tensors.get("tile_stats", unused),
        tensors.get("group_sc", unused), tensors.get("group_zp", unused), tensors.get("crow_indices", unused),
        tensors.get("col_indices", unused), tensors.get("values", unused), unused if bias is None else bias, y,
        batch, layout.out_features, layout.in_features, layout.blocks, layout.groups,
        BITS=layout.weight_bits, BILEVEL=layout.statistics == "bilevel", BLOCKS_A_GROUP=layout.group_size // TILE,
        OUTLIERS=layout.outliers > 0, WIDE_ROWS=layout.row_pointer_dtype == "I32",
        WIDE_COLUMNS=layout.column_dtype == "I32", HAS_BIAS=bias is not None and exponent is None,
        VECTOR=layout.blocks % 4 == 0, BATCH=1 << (batch - 1).bit_length(), WARPS=warps, num_warps=warps,
    )  # fmt: skip
    if exponent is not None:
        y = torch.ldexp(y, exponent - 15)
        y = (y if bias is None else y + bias).to(out_dtype)
    return y
