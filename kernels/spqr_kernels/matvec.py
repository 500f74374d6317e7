"""Matrix-vector kernel for NVIDIA GPUs (sm_80 and newer): y = W x for batch 1, exact codes on tensor cores, outliers fused.

A warp takes 16 rows and, at a time, 256 columns. A lane's words become exact codes in floating point by one mask each,
and are the A fragment of `mma.m16n8k16` as they stand. At batch 1 seven of the eight columns of B would idle; instead
each holds x of another group (B is block diagonal), so that one product gives the sums over eight groups apart, sum(q x),
and a second one, with A all ones, sum(x). Scales and zeros then apply in float32, each (row, group) in one lane only:
y += s (sum(q x) - z sum(x)). The next words are loaded before the present ones are used. Every sum has one fixed order,
so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import TILE, Layout
from spqr_format.packing import FIELDS, PAIRS, is_spread

from . import ptx
from .lanes import index, load1, load2, load4, row_of_words

BF16 = 8  # flavor of the product: weight_bits for fp16 x, weight_bits + 8 for bf16 x


def positions(bits: int, bfloat: bool) -> tuple[int, ...]:
    """Where in a half word the code of each pair is brought, by a shift that several fields of a word share.

    fp16: a code at bit p < 8 is the subnormal q * 2**(p - 24) as it stands, so one mask is the whole conversion. bf16:
    subnormals would leave the range of fp32 in the product, so the code goes under an exponent, 128 + q * 2**p, p < 5.
    """
    if bfloat:
        top, drops = 7, {2: (0, 8, 12, 4), 3: (0, 6, 12), 4: (0, 4, 8, 12)}[bits]
    else:
        top, drops = (8 if bits == 2 else 10), {2: (0, 8), 3: (0, 6), 4: (0, 8)}[bits]
    found = []
    for half in range(2):
        for _, bit in FIELDS[bits][half]:
            found.append(0 if is_spread(bits, bit) else next(bit - d for d in drops if bit >= d and bit - d + bits <= top))
    # rows l and l + 8 lie in the registers of one accumulator, so the former's places are those of both
    return tuple(found[:PAIRS])


_PLACES = {bits + BF16 * bf: positions(bits, bool(bf)) for bits in (2, 3, 4) for bf in (0, 1)}
# Word, right shift (-1: spread over three words) and mask of a field, by ((flavor * 2) + half) * 8 + pair.
_FIELD = {
    (flavor * 2 + half) * 8 + pair: (
        word,
        -1 if is_spread(flavor % BF16, bit) else bit - place,
        (2 ** (flavor % BF16) - 1) * 0x00010001 << place,
    )
    for flavor, places in _PLACES.items()
    for half in range(2)
    for pair, ((word, bit), place) in enumerate(zip(FIELDS[flavor % BF16][half], places, strict=True))
}
_WORD = gl.constexpr({field: word for field, (word, _, _) in _FIELD.items()})
_SHIFT = gl.constexpr({field: shift for field, (_, shift, _) in _FIELD.items()})
_MASK = gl.constexpr({field: mask for field, (_, _, mask) in _FIELD.items()})
# Pairs at one bit position share an accumulator: class of each pair, how many classes, and what a class counts.
_CLASS = gl.constexpr({flavor: tuple(sorted(set(p)).index(b) for b in p) for flavor, p in _PLACES.items()})
_CLASSES = gl.constexpr({flavor: len(set(p)) for flavor, p in _PLACES.items()})
_WEIGHT_OF_CLASS = gl.constexpr({flavor: tuple(2.0**-b for b in sorted(set(p))) for flavor, p in _PLACES.items()})
_ONES = gl.constexpr({0: 0x00010001, BF16: 0x3F803F80})  # fp16: 2**-24, the unit of the subnormal codes; bf16: 1
_UNDO_OR = gl.constexpr(0xC300C300 - 2**32)  # bf16 pair of -128
_UNIT = gl.constexpr({0: 2.0**24, BF16: 1.0})
_MMA = gl.constexpr({0: ptx.MMA, BF16: ptx.MMA_BF16})
_MMA_REGISTERS = gl.constexpr(ptx.MMA_CONSTRAINTS)
_STATISTICS = gl.constexpr(ptx.EXACT_STATISTICS)
_STATISTICS_REGISTERS = gl.constexpr(ptx.EXACT_STATISTICS_CONSTRAINTS)
_QUAD_SUM = gl.constexpr(ptx.QUAD_SUM)


@gluon.jit
def _pair(words, half: gl.constexpr, i: gl.constexpr, BITS: gl.constexpr, BF: gl.constexpr):
    """Codes of column pair i of row l (half 0) or l + 8 in the floating format of the product (see `positions`)."""
    field: gl.constexpr = ((BITS + BF) * 2 + half) * 8 + i
    if _SHIFT[field] < 0:
        code = (words[0] >> 15) & 0x00010001 | (words[1] >> 14) & 0x00020002 | (words[2] >> 13) & 0x00040004
    else:
        code = (words[_WORD[field]] >> _SHIFT[field]) & _MASK[field]
    if BF:
        code = code | 0x43004300
    return code


@gluon.jit
def _mma(a0, a1, a2, a3, b0, b1, c, BF: gl.constexpr):
    return gl.inline_asm_elementwise(
        _MMA[BF], _MMA_REGISTERS, [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _opaque(value):
    """The same value, of which the compiler knows nothing: a product with it stays a product, and no selection."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _load_chunk(
    weights, stat_codes, tile_stats, block, mine, low, high, blocks, groups,
    BITS: gl.constexpr, VECTOR: gl.constexpr, TILE_STATS: gl.constexpr,
):  # fmt: skip
    """Words of column blocks `block`..+3, and statistics of blocks `mine`, +1, +4, +5 where a group is one block."""
    words = ()
    for k in gl.static_range(BITS):
        words = words + row_of_words(weights + k * 8 * blocks, block, blocks, VECTOR)
    if TILE_STATS:
        if VECTOR:
            first = gl.minimum(mine, blocks - 2)
            second = gl.minimum(mine + 4, blocks - 2)
            words = words + load2(stat_codes + low * groups + first)
            words = words + load2(stat_codes + low * groups + second)
            words = words + load2(stat_codes + high * groups + first)
            words = words + load2(stat_codes + high * groups + second)
            words = words + load4(tile_stats + 2 * first)
            words = words + load4(tile_stats + 2 * second)
        else:
            for plane in gl.static_range(2):
                row = stat_codes + (low if plane == 0 else high) * groups
                for e in gl.static_range(2):
                    for s in gl.static_range(2):
                        words = words + (load1(row + gl.minimum(mine + 4 * e + s, blocks - 1)),)
            for e in gl.static_range(2):
                for s in gl.static_range(2):
                    words = words + load2(tile_stats + 2 * gl.minimum(mine + 4 * e + s, blocks - 1))
    return words


@gluon.jit
def _load_x(x_dense, block, gid, blocks, VECTOR: gl.constexpr):
    """x of the two column blocks that this lane brings to B: 4 t + s or 4 t + 2 + s, s = 0, 1, as 16 words."""
    second = gl.where(gid >= 4, 2, 0)
    words = ()
    for s in gl.static_range(2):
        if VECTOR:
            at = x_dense + (gl.minimum(block, blocks - 4) + second + s) * 8
        else:
            at = x_dense + gl.minimum(block + second + s, blocks - 1) * 8
        words = words + load4(at) + load4(at + 4)
    return words


@gluon.jit
def _multiply_chunk(
    chunk, x, GroupSc, GroupZp, stat_codes, tile_stats, block, mine, gid, tid, low, high, shift, row0, row1, blocks,
    groups, y0, y1,
    BITS: gl.constexpr, BF: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, VECTOR: gl.constexpr,
):  # fmt: skip
    """y0, y1 (rows l and l + 8) plus what the chunk's 256 columns give, without outliers."""
    FLAVOR: gl.constexpr = BITS + BF
    CLASSES: gl.constexpr = _CLASSES[FLAVOR]
    TILE_STATS: gl.constexpr = BILEVEL and BLOCKS_A_GROUP == 1
    zero = y0 * 0.0
    none = gid * 0
    ones = none + _ONES[BF]
    undo = none + _UNDO_OR
    # Column n of B belongs to block 4 t + s (n = t) or 4 t + 2 + s (n = t + 4): lane (gid = n, tid = t) brings its x.
    second = gl.where(gid >= 4, 2, 0)
    inside = block < blocks
    m0 = _opaque(gl.where((gid == tid) & inside, 1, 0))
    m1 = _opaque(gl.where((gid == tid + 4) & inside, 1, 0))
    for s in gl.static_range(2):
        words_a = ()
        words_b = ()
        for k in gl.static_range(BITS):
            words_a = words_a + (chunk[4 * k + s],)
            words_b = words_b + (chunk[4 * k + 2 + s],)
        if not VECTOR:
            there = block + second + s < blocks
            m0 = _opaque(gl.where((gid == tid) & there, 1, 0))
            m1 = _opaque(gl.where((gid == tid + 4) & there, 1, 0))
        sums = ((zero, zero, zero, zero),)
        for _ in gl.static_range(1, CLASSES):
            sums = sums + ((zero, zero, zero, zero),)
        xsum = (zero, zero, zero, zero)
        for i in gl.static_range(8):
            # multiplied, not masked: the unit of logic operations is the busy one
            x0 = x[8 * s + i] * m0
            x1 = x[8 * s + i] * m1
            a0 = _pair(words_a, 0, i, BITS, BF)
            a1 = _pair(words_a, 1, i, BITS, BF)
            b0 = _pair(words_b, 0, i, BITS, BF)
            b1 = _pair(words_b, 1, i, BITS, BF)
            updated = ()
            for c in gl.static_range(CLASSES):
                if _CLASS[FLAVOR][i] == c:
                    total = _mma(a0, a1, b0, b1, x0, x1, sums[c], BF)
                    if BF:
                        total = _mma(undo, undo, undo, undo, x0, x1, total, BF)
                    updated = updated + (total,)
                else:
                    updated = updated + (sums[c],)
            sums = updated
            xsum = _mma(ones, ones, ones, ones, x0, x1, xsum, BF)
        for e in gl.static_range(2):
            dot0 = sums[0][e]
            dot1 = sums[0][2 + e]
            for c in gl.static_range(1, CLASSES):
                dot0 += sums[c][e] * _WEIGHT_OF_CLASS[FLAVOR][c]
                dot1 += sums[c][2 + e] * _WEIGHT_OF_CLASS[FLAVOR][c]
            if BILEVEL:
                if TILE_STATS:
                    code0 = chunk[4 * BITS + 2 * e + s]
                    code1 = chunk[4 * BITS + 4 + 2 * e + s]
                    second0 = chunk[4 * BITS + 8 + 4 * e + 2 * s]
                    second1 = chunk[4 * BITS + 9 + 4 * e + 2 * s]
                else:
                    group = gl.minimum(mine + 4 * e + s, blocks - 1) // BLOCKS_A_GROUP
                    code0 = load1(stat_codes + low * groups + group)
                    code1 = load1(stat_codes + high * groups + group)
                    second0, second1 = load2(tile_stats + 2 * group)
                scale0, zero0, scale1, zero1 = gl.inline_asm_elementwise(
                    _STATISTICS, _STATISTICS_REGISTERS, [code0, code1, shift, second0, second1],
                    dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
                )  # fmt: skip
            else:
                group = gl.minimum(mine + 4 * e + s, blocks - 1) // BLOCKS_A_GROUP
                at0 = row0 * groups + group
                at1 = row1 * groups + group
                scale0 = gl.load(GroupSc + at0).to(gl.float16, bitcast=True).to(gl.float32)
                scale1 = gl.load(GroupSc + at1).to(gl.float16, bitcast=True).to(gl.float32)
                zero0 = gl.load(GroupZp + at0).to(gl.float32)
                zero1 = gl.load(GroupZp + at1).to(gl.float32)
            y0 += scale0 * (dot0 - zero0 * xsum[e])
            y1 += scale1 * (dot1 - zero1 * xsum[2 + e])
    return y0, y1


@gluon.jit
def _entry(Col, Val, at, end, WIDE: gl.constexpr):
    """Column and value of the outlier at `at`, zeros from `end` on."""
    there = at < end
    value = gl.load(Val + at, mask=there, other=0).to(gl.float16, bitcast=True)
    return index(Col + at, there, WIDE), value.to(gl.float32)


@gluon.jit
def matvec_kernel(
    X, XDense, Weight, StatCodes, TileStats, GroupSc, GroupZp, Crow, Col, Val, Bias, Y,
    out_features, blocks, groups,
    BITS: gl.constexpr, BF: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    WIDE_ROWS: gl.constexpr, WIDE_COLUMNS: gl.constexpr, HAS_BIAS: gl.constexpr, VECTOR: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Y[o] = sum_i W[o, i] X[i] (+ Bias[o]).

    X [in] is read by the outliers, XDense [blocks * 16] (permuted and padded where need be) by the codes; both fp16, or bf16
    where BF is 8. Y [out].
    """
    TILE_STATS: gl.constexpr = BILEVEL and BLOCKS_A_GROUP == 1
    STEP: gl.constexpr = 16 * WARPS  # column blocks that the program takes at a time
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    spread: gl.constexpr = gl.BlockedLayout([1, 1, 2], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])  # warp, lane, row half
    inner: gl.constexpr = gl.SliceLayout(0, spread)
    thread = gl.arange(0, 32 * WARPS, layout=layout)
    lane = thread % 32
    warp = thread // 32
    gid = lane // 4
    tid = lane % 4
    tile = gl.program_id(0)
    low = gid * 12 // 32
    high = gl.minimum(low + 1, 2)
    shift = gid * 12 % 32
    tile64 = tile.to(gl.int64)
    weights = Weight + tile64 * (8 * BITS) * blocks + gid * blocks
    stat_codes = StatCodes + tile64 * 3 * groups
    tile_stats = TileStats.to(gl.pointer_type(gl.int32)) + tile64 * 2 * groups
    x_dense = XDense.to(gl.pointer_type(gl.int32))
    row0 = tile * 16 + gid
    row1 = row0 + 8
    last0 = gl.minimum(row0, out_features - 1).to(gl.int64)
    last1 = gl.minimum(row1, out_features - 1).to(gl.int64)

    y0 = gl.zeros([32 * WARPS], gl.float32, layout)
    y1 = y0
    none = gl.zeros([32 * WARPS], gl.int32, layout)
    step = 4 * WARPS
    begin0 = none
    end0 = none
    begin1 = none
    end1 = none
    column0 = none
    column1 = none
    value0 = y0
    value1 = y0
    if OUTLIERS:
        begin0 = index(Crow + row0, row0 < out_features, WIDE_ROWS) + warp * 4 + tid
        end0 = index(Crow + row0 + 1, row0 < out_features, WIDE_ROWS)
        begin1 = index(Crow + row1, row1 < out_features, WIDE_ROWS) + warp * 4 + tid
        end1 = index(Crow + row1 + 1, row1 < out_features, WIDE_ROWS)
        column0, value0 = _entry(Col, Val, begin0, end0, WIDE_COLUMNS)
        column1, value1 = _entry(Col, Val, begin1, end1, WIDE_COLUMNS)

    # D gives a lane the columns n = 2 tid and 2 tid + 1: those of blocks mine + s and mine + 4 + s.
    block = warp * 16 + tid * 4
    mine = warp * 16 + 8 * (tid % 2) + 2 * (tid // 2)
    chunk = _load_chunk(weights, stat_codes, tile_stats, block, mine, low, high, blocks, groups, BITS, VECTOR, TILE_STATS)
    x = _load_x(x_dense, block, gid, blocks, VECTOR)
    # Two chunks a turn, so that the registers of one are free for the next without a copy.
    for _first in range(0, blocks, 2 * STEP):
        for turn in gl.static_range(2):
            following = _load_chunk(
                weights, stat_codes, tile_stats, block + STEP, mine + STEP, low, high, blocks, groups,
                BITS, VECTOR, TILE_STATS,
            )  # fmt: skip
            x_following = _load_x(x_dense, block + STEP, gid, blocks, VECTOR)
            # the outliers of rows l in one turn, of rows l + 8 in the next
            if OUTLIERS and turn == 0:
                gathered = gl.load(X + column0).to(gl.float32) * (1.0 / _UNIT[BF])
                value = value0
                begin0 += step
                column0, value0 = _entry(Col, Val, begin0, end0, WIDE_COLUMNS)
            if OUTLIERS and turn == 1:
                gathered = gl.load(X + column1).to(gl.float32) * (1.0 / _UNIT[BF])
                value = value1
                begin1 += step
                column1, value1 = _entry(Col, Val, begin1, end1, WIDE_COLUMNS)
            y0, y1 = _multiply_chunk(
                chunk, x, GroupSc, GroupZp, stat_codes, tile_stats, block, mine, gid, tid, low, high, shift, last0,
                last1, blocks, groups, y0, y1, BITS, BF, BILEVEL, BLOCKS_A_GROUP, VECTOR,
            )  # fmt: skip
            if OUTLIERS and turn == 0:
                y0 += value * gathered
            if OUTLIERS and turn == 1:
                y1 += value * gathered
            chunk = following
            x = x_following
            block += STEP
            mine += STEP

    if OUTLIERS:
        # rows with more outliers than the loop above had turns
        left = gl.max(gl.maximum(end0 - begin0, end1 - begin1), axis=0)
        for _k in range(0, left, step):
            y0 += value0 * (gl.load(X + column0).to(gl.float32) * (1.0 / _UNIT[BF]))
            y1 += value1 * (gl.load(X + column1).to(gl.float32) * (1.0 / _UNIT[BF]))
            begin0 += step
            begin1 += step
            column0, value0 = _entry(Col, Val, begin0, end0, WIDE_COLUMNS)
            column1, value1 = _entry(Col, Val, begin1, end1, WIDE_COLUMNS)

    y0 = gl.inline_asm_elementwise(_QUAD_SUM, "=f,f", [y0], dtype=gl.float32, is_pure=True, pack=1)
    y1 = gl.inline_asm_elementwise(_QUAD_SUM, "=f,f", [y1], dtype=gl.float32, is_pure=True, pack=1)
    by_warp = gl.convert_layout(gl.reshape(gl.join(y0, y1), [WARPS, 32, 2]), spread)
    total = gl.sum(by_warp, axis=0) * _UNIT[BF]
    lane2 = gl.arange(0, 32, layout=gl.SliceLayout(1, inner))[:, None]
    half2 = gl.arange(0, 2, layout=gl.SliceLayout(0, inner))[None, :]
    row = tile * 16 + lane2 // 4 + 8 * half2
    if HAS_BIAS:
        total += gl.load(Bias + row, mask=row < out_features, other=0).to(gl.float32)
    gl.store(Y + row, total.to(Y.dtype.element_ty), mask=(row < out_features) & (lane2 % 4 == 0))


def linear(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    bias: Tensor | None,
    warps: int | None = None,
) -> Tensor:
    """W x + bias for x fp16 or bf16 [1, in], contiguous, checked operands. Returns [1, out] in x's dtype."""
    dense = x if not layout.permuted else x.index_select(1, tensors["perm"])
    width = layout.blocks * TILE
    if width != layout.in_features:
        dense = torch.nn.functional.pad(dense, (0, width - layout.in_features))
    y = torch.empty(1, layout.out_features, dtype=x.dtype, device=x.device)
    warps = warps or matvec_warps(layout)
    unused = tensors["weight"]
    matvec_kernel[(layout.tile_rows,)](
        x, dense, tensors["weight"], tensors.get("stat_codes", unused), tensors.get("tile_stats", unused),
        tensors.get("group_sc", unused), tensors.get("group_zp", unused), tensors.get("crow_indices", unused),
        tensors.get("col_indices", unused), tensors.get("values", unused), unused if bias is None else bias, y,
        layout.out_features, layout.blocks, layout.groups,
        BITS=layout.weight_bits, BF=BF16 if x.dtype == torch.bfloat16 else 0, BILEVEL=layout.statistics == "bilevel",
        BLOCKS_A_GROUP=layout.group_size // TILE, OUTLIERS=layout.outliers > 0,
        WIDE_ROWS=layout.row_pointer_dtype == "I32", WIDE_COLUMNS=layout.column_dtype == "I32",
        HAS_BIAS=bias is not None, VECTOR=layout.blocks % 4 == 0, WARPS=warps, num_warps=warps,
    )  # fmt: skip
    return y


def matvec_warps(layout: Layout) -> int:
    """Warps that share a tile row: enough to fill an H200, each with a run of columns to stream (best of 1, 2, 4, 8)."""
    wanted = -(-2048 // layout.tile_rows)
    most = max(1, layout.blocks // 16)
    warps = 1
    while warps < wanted and warps < most and warps < 8:
        warps *= 2
    return warps
