"""Dequantize kernel for NVIDIA GPUs (sm_80 and newer): W in fp16 or bf16, at the speed of the writes.

A warp takes a chunk of 256 columns of a tile. A lane decodes the words of four column blocks in registers; the result is
turned through shared memory so that a warp writes 512 contiguous bytes of a row. Then the warp writes the places of the
chunk's outliers again, each decoded on its own, with its outlier added before the rounding.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import CELL_COLUMNS, CHUNK, TILE, Layout, ceil_div
from spqr_format.packing import SPREAD

from . import ptx
from .lanes import barrier, funnel, load1, load2, stream4
from .weight_at import EXACT, field_constants, statistics_codes, weight_at

BF16 = 8  # flavor: weight_bits for fp16, weight_bits + 8 for bf16
WARPS = 4
_DECODE = gl.constexpr({bits + BF16 * bf: ptx.decode_lane(bits, bool(bf)) for bits in (2, 3, 4) for bf in (0, 1)})
_REGISTERS = gl.constexpr({bits: ptx.decode_lane_constraints(bits) for bits in (2, 3, 4)})
_STATISTICS = gl.constexpr(ptx.EXACT_STATISTICS)
_SPREAD = gl.constexpr(SPREAD)
_CELLS = gl.constexpr(CHUNK * TILE // CELL_COLUMNS)  # of outliers a chunk
_EARLY = gl.constexpr(2)  # outliers of a chunk by lane: with 1 % of the weights a chunk has 41
_STATISTICS_REGISTERS = gl.constexpr(ptx.EXACT_STATISTICS_CONSTRAINTS)


@gluon.jit
def _join_halves(values, HALF: gl.constexpr):
    joined = ()
    for n in gl.static_range(HALF):
        joined = joined + (gl.join(values[n], values[n + HALF]),)
    return joined


@gluon.jit
def _interleave(values):
    """32 tensors [threads] as one [threads, 2, 2, 2, 2, 2]: the bits of their number, the highest first."""
    values = _join_halves(values, 16)
    values = _join_halves(values, 8)
    values = _join_halves(values, 4)
    values = _join_halves(values, 2)
    return gl.join(values[0], values[1])


@gluon.jit
def _outlier(
    Weight, StatCodes, TileStats, GroupSc, GroupZp, Outliers, Out, at, end, tile64, chunk, chunks, groups, in_features,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, FIELD_WORDS: gl.constexpr,
    FIELD_BITS: gl.constexpr,
):  # fmt: skip
    """The place in Out of outlier number `at` below `end`, of a chunk of a tile, and the weight there with it, in fp32."""
    there = at < end
    entry = gl.load(Outliers + at, mask=there, other=0)
    row = tile64 * 16 + ((entry >> 12) & 15)
    column = chunk * 256 + (entry & 255)
    value = weight_at(
        Weight, StatCodes, TileStats, GroupSc, GroupZp, row, column, there, chunks * 16, groups,
        FIELD_WORDS, FIELD_BITS, BITS, _SPREAD, BLOCKS_A_GROUP * 16, BILEVEL,
    )  # fmt: skip
    value += (entry >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    return Out + row * in_features + column, value


@gluon.jit
def unpack_kernel(
    Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Out, out_features, in_features, chunks, groups,
    BITS: gl.constexpr, BF: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    FIELD_WORDS: gl.constexpr, FIELD_BITS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Out = W for one tile row and WARPS x 256 columns; in_features is chunks * 256."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    # warp, row of the half tile, 32-bit word of the row
    rows: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [WARPS, 1, 1], [2, 1, 0])
    inner: gl.constexpr = gl.SliceLayout(2, rows)
    thread = gl.arange(0, 32 * WARPS, layout=layout)
    lane = thread % 32
    warp = thread // 32
    gid = lane // 4
    tid = lane % 4
    tile = gl.program_id(0)
    first = gl.program_id(1) * (16 * WARPS)
    chunk = gl.minimum(gl.program_id(1) * WARPS + warp, chunks - 1)
    tile64 = tile.to(gl.int64)
    weights = Weight + tile64 * (chunks * (128 * BITS)) + (chunk * (128 * BITS) + lane * 4)
    row0 = gl.minimum(tile * 16 + gid, out_features - 1).to(gl.int64) * groups
    row1 = gl.minimum(tile * 16 + 8 + gid, out_features - 1).to(gl.int64) * groups
    words = ()
    for k in gl.static_range(BITS):
        words = words + (stream4(weights + 128 * k),)
    none = gid * 0
    codes = (none, none, none, none)
    if BILEVEL and BLOCKS_A_GROUP == 1:
        # the set of spec 4.3 that goes with the chunk: groups tid, 4 + tid, 8 + tid, 12 + tid
        stat_codes = StatCodes + tile64 * (chunks * 48) + chunk * 48
        own0 = load1(stat_codes + gid * 4 + tid // 2)
        own1 = load1(stat_codes + gid * 4 + tid // 2 + 2)
        half0 = load1(stat_codes + 32 + gid * 2) >> (tid // 2 * 16)
        half1 = load1(stat_codes + 33 + gid * 2) >> (tid // 2 * 16)
        shift = tid % 2 * 12
        codes = (
            own0 >> shift, own1 >> shift, funnel(own0, half0, none + 24) >> shift, funnel(own1, half1, none + 24) >> shift
        )  # fmt: skip
    if OUTLIERS:  # most are read now, with the rest, and written at the end
        own = Pointers + tile64 * (chunks * _CELLS) + chunk * _CELLS
        begin = gl.load(own)
        end = gl.where(gl.program_id(1) * WARPS + warp < chunks, gl.load(own + _CELLS), begin)
        places = ()
        weights_there = ()
        for i in gl.static_range(_EARLY):
            target, value = _outlier(
                Weight, StatCodes, TileStats, GroupSc, GroupZp, Outliers, Out, begin + 32 * i + lane, end, tile64, chunk,
                chunks, groups, in_features, BITS, BILEVEL, BLOCKS_A_GROUP, FIELD_WORDS, FIELD_BITS,
            )  # fmt: skip
            places = places + (target,)
            weights_there = weights_there + (value,)
    tile_stats = TileStats.to(gl.pointer_type(gl.int32)) + tile64 * 2 * groups
    upper = ()
    lower = ()
    for j in gl.static_range(4):
        block = chunk * 16 + 4 * j + tid
        group = gl.minimum(block // BLOCKS_A_GROUP, groups - 1)
        if BILEVEL:
            if BLOCKS_A_GROUP == 1:
                code = codes[j]
            else:
                code = statistics_codes(StatCodes, tile64, gid, group, groups, none == 0)
            second0, second1 = load2(tile_stats + 2 * group)
            scale0, zero0, scale1, zero1 = gl.inline_asm_elementwise(
                _STATISTICS, _STATISTICS_REGISTERS, [code, code, none, second0, second1],
                dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
            )  # fmt: skip
        else:
            scale0 = gl.load(GroupSc + row0 + group).to(gl.float16, bitcast=True).to(gl.float32)
            scale1 = gl.load(GroupSc + row1 + group).to(gl.float16, bitcast=True).to(gl.float32)
            zero0 = gl.load(GroupZp + row0 + group).to(gl.float32)
            zero1 = gl.load(GroupZp + row1 + group).to(gl.float32)
        lane_words: list = []
        for k in gl.static_range(BITS):
            lane_words = lane_words + [words[k][j]]
        pairs = gl.inline_asm_elementwise(
            _DECODE[BITS + BF], _REGISTERS[BITS], lane_words + [scale0, zero0, scale1, zero1],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32,
                   gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
        for i in gl.static_range(8):
            upper = upper + (pairs[i],)
            lower = lower + (pairs[8 + i],)
    out = Out.to(gl.pointer_type(gl.int32))
    warp2 = gl.arange(0, WARPS, layout=gl.SliceLayout(1, inner))[:, None]
    row2 = gl.arange(0, 8, layout=gl.SliceLayout(0, inner))[None, :]
    word = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(1, rows)))
    word2 = gl.expand_dims(gl.expand_dims(word, 0), 1)
    for half in gl.static_range(2):
        # warp, row, tid, j, word of a block: the block is 4 j + tid
        values = gl.reshape(_interleave(upper if half == 0 else lower), [WARPS, 8, 4, 4, 8])
        values = gl.reshape(gl.permute(values, [0, 1, 3, 2, 4]), [WARPS, 8, 128])
        row = tile * 16 + 8 * half + row2
        start = gl.expand_dims(row.to(gl.int64) * (in_features // 2) + (first * 8 + warp2 * 128), 2)
        column = gl.expand_dims(first * 8 + warp2 * 128 + 0 * row2, 2) + word2
        inside = gl.expand_dims(row + 0 * warp2 < out_features, 2) & (column < in_features // 2)
        gl.store(out + start + word2, gl.convert_layout(values, rows), mask=inside)
    if OUTLIERS:
        barrier()  # what other lanes wrote to these places comes before
        for i in gl.static_range(_EARLY):
            gl.store(places[i], weights_there[i].to(Out.dtype.element_ty), mask=begin + 32 * i + lane < end)
        for first in range(32 * _EARLY, gl.max(end - begin, axis=0), 32):
            target, value = _outlier(
                Weight, StatCodes, TileStats, GroupSc, GroupZp, Outliers, Out, begin + first + lane, end, tile64, chunk, chunks,
                groups, in_features, BITS, BILEVEL, BLOCKS_A_GROUP, FIELD_WORDS, FIELD_BITS,
            )  # fmt: skip
            gl.store(target, value.to(Out.dtype.element_ty), mask=begin + first + lane < end)


def dequantize(weight: Tensor, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Write W into weight fp16 or bf16 [out, in], contiguous; in_features a multiple of 256, no permutation."""
    unused = tensors["weight"]
    field_words, field_bits = field_constants(layout.weight_bits)
    unpack_kernel[(layout.tile_rows, ceil_div(layout.blocks, CHUNK * WARPS))](
        tensors["weight"], tensors.get("stat_codes", unused), tensors.get("tile_stats", unused),
        tensors.get("group_sc", unused), tensors.get("group_zp", unused), tensors.get("outlier_ptr", unused),
        tensors.get("outliers", unused), weight,
        layout.out_features, layout.in_features, layout.blocks // CHUNK, layout.groups,
        BITS=layout.weight_bits, BF=BF16 if weight.dtype == torch.bfloat16 else 0,
        BILEVEL=layout.statistics == "bilevel", BLOCKS_A_GROUP=layout.group_size // TILE,
        OUTLIERS=layout.outliers > 0, FIELD_WORDS=field_words, FIELD_BITS=field_bits, WARPS=WARPS, num_warps=WARPS, **EXACT,
    )  # fmt: skip
