"""Matrix-vector kernel for NVIDIA GPUs (sm_80 and newer): y = W x for batch 1, exact codes on tensor cores, outliers fused.

A program takes one tile of 16 rows; its warps take pairs of chunks, 512 columns, in turn, each at its own pace; a chunk each
in the last turn where that is enough. All that a
warp multiplies arrives in shared memory by asynchronous copies (`ring`), because bytes in flight in registers cost the warps
that hide latency.

A lane's words become exact codes in floating point by one mask each, and are the A fragment of `mma.m16n8k16` as they
stand. At batch 1 seven of the eight columns of B would idle; instead each holds x of another block of 16 columns (B is block
diagonal: lanes off the diagonal read zeros), so that one product gives the sums over groups apart, sum(q x). Scales and zeros
then apply in float32, each (row, group) in one lane only: y += s (sum(q x) - z sum(x)). Every sum has one fixed order, so
results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import pairwise, permutations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import CHUNK, TILE, Layout, ceil_div
from spqr_format.packing import FIELDS, is_spread

from . import overlap, pair_outliers, ptx
from .checks import aligned
from .joined import Joined
from .lanes import barrier
from .launch import LEAVES, Launch, addresses, constants_of
from .overlap import await_previous, let_next_begin
from .ring import (
    MOST_BYTES,
    X_BYTES,
    ZEROS_BYTES,
    bytes_of_stage,
    bytes_of_warp,
    commit_copies,
    copy_chunk,
    copy_x,
    read1,
    read2,
    read2_long,
    read4,
    read_long,
    read_words,
    room_for_warp,
    room_of_zeros,
    wait_for_copies,
    warp_bytes,
)
from .stage_statistics import group_rows
from .wide_groups import pairs_of, with_last_groups

BF16 = 8  # flavor of the product: weight_bits for fp16 x, weight_bits + 8 for bf16 x


def positions(bits: int, bfloat: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where in a half word each couple of pairs (2c, 2c + 1) is brought, for row l and for row l + 8.

    One shift of a word serves several of its fields. fp16: a code at bit p < 8 is the subnormal q * 2**(p - 24) as it
    stands, so one mask is the whole conversion. bf16: subnormals would leave the range of fp32 in the product, so the code
    goes under an exponent, 128 + q * 2**p, p < 5.
    """
    if bfloat:
        top, drops = 7, {2: (0, 8, 12, 4), 3: (0, 6, 12), 4: (0, 4, 8, 12)}[bits]
    else:
        top, drops = (8 if bits == 2 else 10), {2: (0, 8), 3: (0, 6), 4: (0, 8)}[bits]
    found = []
    for half in range(2):
        row = []
        for word_bit in FIELDS[bits][half]:
            bit = word_bit[1]
            spread = is_spread(bits, bit)
            row.append(1 if spread else next(bit - d for d in drops if bit >= d and bit - d + bits <= top))
        assert row[::2] == row[1::2]
        found.append(tuple(row[::2]))
    return found[0], found[1]


_FLAVORS = {bits + BF16 * bf: positions(bits, bool(bf)) for bits in (2, 3, 4) for bf in (0, 1)}
_LEAST = {flavor: min(upper + lower) for flavor, (upper, lower) in _FLAVORS.items()}
# Orders of the couples in which those of one 16-byte half of x follow each other, so that it is done with sooner: others would
# change their unit less often with bf16, but take more registers.
_HALVED = [(a, b, c, d) for a, b, c, d in permutations(range(4)) if a // 2 == b // 2]


def _follow(flavor: int, order: tuple[int, ...], half: int) -> list[int]:
    return [_FLAVORS[flavor][half][c] for c in order] + [_LEAST[flavor]]


def _changes(flavor: int, order: tuple[int, ...]) -> int:
    """How often the sums change their unit on the way."""
    return sum(a != b for half in range(2) for a, b in pairwise(_follow(flavor, order, half)))


_ORDERS = {flavor: min(_HALVED, key=lambda order, f=flavor: _changes(f, order)) for flavor in _FLAVORS}  # type: ignore[misc]


def _tables() -> tuple[dict[int, int], dict[int, int], dict[int, int], dict[int, float]]:
    """Word, right shift (-1: spread over three words) and mask of a field, by ((flavor * 2) + half) * 8 + pair; and what
    the sums so far are multiplied with after couple n, by ((flavor * 2) + half) * 4 + n."""
    words, shifts, masks, factors = {}, {}, {}, {}
    for flavor, places in _FLAVORS.items():
        bits = flavor % BF16
        for half in range(2):
            for pair, (word, bit) in enumerate(FIELDS[bits][half]):
                field = (flavor * 2 + half) * 8 + pair
                place = places[half][pair // 2]
                words[field] = word
                shifts[field] = -1 if is_spread(bits, bit) else bit - place
                masks[field] = (2**bits - 1) * 0x00010001 << place
            follow = _follow(flavor, _ORDERS[flavor], half)
            for n in range(4):
                factors[(flavor * 2 + half) * 4 + n] = 2.0 ** (follow[n + 1] - follow[n])
    return words, shifts, masks, factors


_WORDS, _SHIFTS, _MASKS, _FACTORS = _tables()
_WORD = gl.constexpr(_WORDS)
_SHIFT = gl.constexpr(_SHIFTS)
_MASK = gl.constexpr(_MASKS)
_FACTOR = gl.constexpr(_FACTORS)
_ORDER = gl.constexpr(_ORDERS)
# What sums x in the unit of the codes: fp16 2**p as a subnormal, bf16 2**p; and what brings that unit to 1 in the end.
_ONES = gl.constexpr({f: 0x3F803F80 + 0x00800080 * p if f >= BF16 else 0x00010001 << p for f, p in _LEAST.items()})
_UNIT = gl.constexpr({f: (1.0 if f >= BF16 else 2.0**24) * 2.0**-p for f, p in _LEAST.items()})
_UNDO_OR = gl.constexpr(0xC300C300 - 2**32)  # bf16 pair of -128
_UNDER_128 = gl.constexpr({mask: f"lop3.b32 $0, $1, {mask:#x}, $2, 0xEA;" for mask in set(_MASKS.values())})
_MMA = gl.constexpr({0: ptx.MMA, BF16: ptx.MMA_BF16})
_MMA_REGISTERS = gl.constexpr(ptx.MMA_CONSTRAINTS)
_QUAD_SUM = gl.constexpr(ptx.QUAD_SUM)
_CODE = gl.constexpr({place: ptx.code_under_exponent(place) for place in ptx.STATISTICS_PLACES})
_EXPONENT = gl.constexpr({place: (150 - place) << 23 for place in ptx.STATISTICS_PLACES})  # float of 2**(23 - place)
_OFFSET = gl.constexpr({place: 2.0 ** (23 - place) for place in ptx.STATISTICS_PLACES})
_FOUR_HALVES = gl.constexpr(ptx.FOUR_HALVES)
_X_BYTES = gl.constexpr(X_BYTES)


@gluon.jit
def _pair(words, half: gl.constexpr, i: gl.constexpr, BITS: gl.constexpr, BF: gl.constexpr):
    """Codes of column pair i of row l (half 0) or l + 8 in the floating format of the product (see `positions`)."""
    field: gl.constexpr = ((BITS + BF) * 2 + half) * 8 + i
    if _SHIFT[field] < 0:
        # multiply-adds, because the unit of shifts and logic is the busy one
        code = _times(words[2] & 0x00010001, 4, _times(words[1] & 0x00010001, 2, words[0] & 0x00010001))
        code = _times(code, 2, code * 0)
        if BF:
            code = code | 0x43004300
    elif BF:
        # one operation on a word and two constants, which the compiler would make two
        code = gl.inline_asm_elementwise(
            _UNDER_128[_MASK[field]], "=r,r,r", [words[_WORD[field]] >> _SHIFT[field], words[0] * 0 + 0x43004300],
            dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        code = (words[_WORD[field]] >> _SHIFT[field]) & _MASK[field]
    return code


@gluon.jit
def _times(a, factor: gl.constexpr, b):
    if factor == 2:
        return gl.inline_asm_elementwise("mad.lo.u32 $0, $1, 2, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)
    else:
        return gl.inline_asm_elementwise("mad.lo.u32 $0, $1, 4, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _mma(a0, a1, a2, a3, b0, b1, c, BF: gl.constexpr):
    return gl.inline_asm_elementwise(
        _MMA[BF], _MMA_REGISTERS, [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _couple(words, b0, b1, dot, c: gl.constexpr, undo, BITS: gl.constexpr, BF: gl.constexpr):
    """dot plus the products of the codes of pairs 2c and 2c + 1 with B."""
    dot = _mma(
        _pair(words, 0, 2 * c, BITS, BF), _pair(words, 1, 2 * c, BITS, BF), _pair(words, 0, 2 * c + 1, BITS, BF),
        _pair(words, 1, 2 * c + 1, BITS, BF), b0, b1, dot, BF,
    )  # fmt: skip
    if BF:
        dot = _mma(undo, undo, undo, undo, b0, b1, dot, BF)
    return dot


@gluon.jit
def _scale(dot, n: gl.constexpr, FLAVOR: gl.constexpr):
    """dot in the unit of the couple that follows couple n of the order."""
    upper: gl.constexpr = _FACTOR[FLAVOR * 8 + n]
    lower: gl.constexpr = _FACTOR[FLAVOR * 8 + 4 + n]
    if upper != 1.0:
        dot = (dot[0] * upper, dot[1] * upper, dot[2], dot[3])
    if lower != 1.0:
        dot = (dot[0], dot[1], dot[2] * lower, dot[3] * lower)
    return dot


@gluon.jit
def _couple_of_both(slots, x, dots, undo, couple: gl.constexpr, n: gl.constexpr, BITS: gl.constexpr, BF: gl.constexpr):
    """Couple n of the order in both chains."""
    i: gl.constexpr = couple % 2 * 2
    h: gl.constexpr = couple // 2
    near = _couple(slots[0], x[h][i], x[h][i + 1], dots[0], couple, undo, BITS, BF)
    far = _couple(slots[2], x[4 + h][i], x[4 + h][i + 1], dots[1], couple, undo, BITS, BF)
    near = _couple(slots[1], x[2 + h][i], x[2 + h][i + 1], near, couple, undo, BITS, BF)
    far = _couple(slots[3], x[6 + h][i], x[6 + h][i + 1], far, couple, undo, BITS, BF)
    return _scale(near, n, BITS + BF), _scale(far, n, BITS + BF)


@gluon.jit
def _products(slots, at0, at1, zero, undo, BITS: gl.constexpr, BF: gl.constexpr):
    """sum(q x) of the chunk's groups 0..7 and 8..15, as D fragments: lanes have those of groups 2 tid, 2 tid + 1.

    at0, at1: where, in shared memory, lanes gid = tid and gid = 4 + tid find x of block gid, and the others zeros. So B of
    slots 0 and 2 has x in its columns 0..3, and that of slots 1 and 3 in columns 4..7, and both go into one sum.
    """
    F: gl.constexpr = BITS + BF
    none = (zero, zero, zero, zero)
    dots = (none, none)
    x = (
        read4(at0), read4(at0 + 16), read4(at1), read4(at1 + 16),
        read4(at0 + 256), read4(at0 + 272), read4(at1 + 256), read4(at1 + 272),
    )  # fmt: skip
    dots = _couple_of_both(slots, x, dots, undo, _ORDER[F][0], 0, BITS, BF)
    dots = _couple_of_both(slots, x, dots, undo, _ORDER[F][1], 1, BITS, BF)
    dots = _couple_of_both(slots, x, dots, undo, _ORDER[F][2], 2, BITS, BF)
    dots = _couple_of_both(slots, x, dots, undo, _ORDER[F][3], 3, BITS, BF)
    return dots


@gluon.jit
def _set_of_codes(codes, lane):
    """The codes of four groups at STATISTICS_PLACES, those of blocks 2 tid, 2 tid + 1, 8 + 2 tid and 9 + 2 tid. codes: where
    the words of spec 4.3 are, of each lane's warp."""
    own = read1(codes + lane * 4)
    half = read1(codes + (128 + lane // 2 * 4)) >> (lane % 2 * 16)
    return own << 11, own >> 1, (half << 19) + ((own >> 13) & 0x7FFFF), half << 7


@gluon.jit
def _wide_codes(codes, StatCodes, tile, chunk, last, chunks, groups, gid, tid, CHUNKS_A_SET: gl.constexpr):
    """The same where a set covers several chunks, of which this is number `chunk` [32 * WARPS], and `last` the largest one."""
    pairs = pairs_of(read4(codes + gid * 16), read2(codes + (128 + gid * 8)), chunk, CHUNKS_A_SET)
    if CHUNKS_A_SET == 2:
        near = gl.where(tid < 2, pairs[0], pairs[1]) >> tid % 2 * 12
        far = gl.where(tid < 2, pairs[2], pairs[3]) >> tid % 2 * 12
    else:
        near = pairs[0] >> tid // 2 * 12
        far = pairs[1] >> tid // 2 * 12
    near, far = with_last_groups(
        (near, far), StatCodes, tile, chunk, last, chunks, groups, gid, 2 * tid, 8 // CHUNKS_A_SET, CHUNKS_A_SET
    )
    near = near << 11
    far = far << 11
    return near, near, far, far


@gluon.jit
def _tops(tops, tid, CHUNKS_A_SET: gl.constexpr):
    """Tile statistics of the groups of the same four blocks, eight bytes each. tops: where those of a chunk are."""
    if CHUNKS_A_SET == 1:
        near = read2_long(tops + tid * 16)
        far = read2_long(tops + (64 + tid * 16))
        return near[0], near[1], far[0], far[1]
    else:
        near = read_long(tops + 2 * tid // CHUNKS_A_SET * 8)
        far = read_long(tops + (2 * tid // CHUNKS_A_SET * 8 + 64 // CHUNKS_A_SET))
        return near, near, far, far


@gluon.jit
def _statistic(t, exponent, offset, P: gl.constexpr):
    """code - offset', where the code is at bit P of t and offset is offset' + 2**(23 - P)."""
    code = gl.inline_asm_elementwise(_CODE[P], "=f,r,r", [t, exponent], dtype=gl.float32, is_pure=True, pack=1)
    return code - offset


@gluon.jit
def _statistics_at(StatCodes, TileStats, tile, chunk, chunks, lane, CHUNKS_A_SET: gl.constexpr):
    """Which 16 bytes of a chunk's statistics a lane copies, those of the codes up to lane 11 and then those of the tiles; and
    whether there are any. Where a set of codes covers several chunks, it is copied whole."""
    code = chunk // CHUNKS_A_SET * 48 + lane * 4
    codes_at = StatCodes + tile.to(gl.int64) * (chunks * (48 // CHUNKS_A_SET)) + code
    tops_at = TileStats.to(gl.pointer_type(gl.int32)) + tile.to(gl.int64) * (chunks * (32 // CHUNKS_A_SET))
    tops_at += chunk * (32 // CHUNKS_A_SET) + (lane - 12) * 4
    there = lane < 12 + 8 // CHUNKS_A_SET
    if CHUNKS_A_SET > 1:
        there = there & ((lane >= 12) | (code < chunks * (48 // CHUNKS_A_SET)))
    return gl.where(lane < 12, codes_at, tops_at), there.to(gl.int32)


@gluon.jit
def _x_sums(x, lane, ones, zero, BF: gl.constexpr):
    """sum(x) of the groups of blocks 2 tid, 2 tid + 1, 8 + 2 tid, 9 + 2 tid: B with x of block gid in column gid, A of ones."""
    near = read2(x + lane * 8)
    far = read2(x + (256 + lane * 8))
    none = (zero, zero, zero, zero)
    near_sums = _mma(ones, ones, ones, ones, near[0], near[1], none, BF)
    far_sums = _mma(ones, ones, ones, ones, far[0], far[1], none, BF)
    return near_sums[0], near_sums[1], far_sums[0], far_sums[1]


@gluon.jit
def _add_bilevel(y0, y1, dot0, dot1, x_sum, codes, tops, exponents):
    """y0 and y1 plus the part of a group, from its statistics codes and tile statistics. exponents: 2**(23 - P) as floats, for
    P of 11, 14, 17 and 20."""
    ss, sz, zs, zz = gl.inline_asm_elementwise(
        _FOUR_HALVES, "=f,=f,=f,=f,l", [tops], dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1
    )
    a = zs * x_sum
    t0 = dot0 - _statistic(codes, exponents[1], zz + _OFFSET[14], 14) * a
    t1 = dot1 - _statistic(codes, exponents[3], zz + _OFFSET[20], 20) * a
    y0 += ss * (_statistic(codes, exponents[0], sz + _OFFSET[11], 11) * t0)
    y1 += ss * (_statistic(codes, exponents[2], sz + _OFFSET[17], 17) * t1)
    return y0, y1


@gluon.jit
def _direct_of_chunk(GroupSc, GroupZp, row0, row1, chunk, groups, tid, BLOCKS_A_GROUP: gl.constexpr):
    """Scale and zero of row gid and of row gid + 8, as stored, of the groups of blocks 2 tid, 2 tid + 1, 8 + 2 tid, 9 + 2 tid:
    one for all of them, one for each two, or four; behind the last group that one's. row0, row1: as `group_rows` has them."""
    PARTS: gl.constexpr = 1 if BLOCKS_A_GROUP % 16 == 0 else 2 if BLOCKS_A_GROUP % 2 == 0 else 4
    found = ()
    for n in gl.static_range(PARTS):
        block = chunk * 16 + 2 * tid + (8 * n if PARTS < 4 else 8 * (n // 2) + n % 2)
        group = gl.minimum(block // BLOCKS_A_GROUP, groups - 1)
        found = found + (
            gl.load(GroupSc + (row0 + group)), gl.load(GroupZp + (row0 + group)),
            gl.load(GroupSc + (row1 + group)), gl.load(GroupZp + (row1 + group)),
        )  # fmt: skip
    return found


@gluon.jit
def _add_direct(y0, y1, dots, x_sums, direct):
    """y0 and y1 plus the parts of four blocks, with their scales and zeros as `_direct_of_chunk` has them."""
    PARTS: gl.constexpr = len(direct) // 4
    BLOCKS: gl.constexpr = 4 // PARTS
    for n in gl.static_range(PARTS):
        dot0 = dots[n * BLOCKS // 2][n * BLOCKS % 2]
        dot1 = dots[n * BLOCKS // 2][2 + n * BLOCKS % 2]
        x_sum = x_sums[n * BLOCKS]
        for k in gl.static_range(n * BLOCKS + 1, (n + 1) * BLOCKS):
            dot0 += dots[k // 2][k % 2]
            dot1 += dots[k // 2][2 + k % 2]
            x_sum += x_sums[k]
        scale0 = direct[4 * n].to(gl.float16, bitcast=True).to(gl.float32)
        scale1 = direct[4 * n + 2].to(gl.float16, bitcast=True).to(gl.float32)
        y0 += scale0 * (dot0 - direct[4 * n + 1].to(gl.float32) * x_sum)
        y1 += scale1 * (dot1 - direct[4 * n + 3].to(gl.float32) * x_sum)
    return y0, y1


@gluon.jit
def _x_of_slots(pair, zeros_at, gid, tid):
    """Where `_products` finds x of the first chunk of a pair."""
    at = pair + gid * 32
    return gl.where(gid == tid, at, zeros_at), gl.where(gid == 4 + tid, at, zeros_at)


@gluon.jit
def _add_chunk(
    y0, y1, stage, x, x0, x1, tile, chunk, last, StatCodes, GroupSc, GroupZp, row0, row1, chunks, groups, lane, constants,
    BITS: gl.constexpr, BF: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr,
):  # fmt: skip
    """y0 and y1 plus a lane's part of a chunk without its outliers, which is in a stage, its x at `x`; x0 and x1 as `_products`
    has them. last: the largest number of a chunk of any warp. constants: ones, what undoes 128, `_add_bilevel`'s."""
    CHUNKS_A_SET: gl.constexpr = BLOCKS_A_GROUP if BILEVEL else 1
    WARPS: gl.constexpr = lane.shape[0] // 32
    gid = lane // 4
    tid = lane % 4
    zero = gl.zeros([32 * WARPS], gl.float32, gl.BlockedLayout([1], [32], [WARPS], [0]))
    if CHUNKS_A_SET > 1:  # before the products, whose sums would be held over the condition
        codes = _wide_codes(stage + 512 * BITS, StatCodes, tile, chunk, last, chunks, groups, gid, tid, CHUNKS_A_SET)
    if not BILEVEL:  # from global memory, while the products run
        direct = _direct_of_chunk(GroupSc, GroupZp, row0, row1, chunk, groups, tid, BLOCKS_A_GROUP)
    dots = _products(read_words(stage + lane * 16, BITS), x0, x1, zero, constants[1], BITS, BF)
    x_sums = _x_sums(x, lane, constants[0], zero, BF)
    if BILEVEL:
        if CHUNKS_A_SET == 1:
            codes = _set_of_codes(stage + 512 * BITS, lane)
        tops = _tops(stage + (512 * BITS + 192), tid, CHUNKS_A_SET)
        for n in gl.static_range(4):
            dot0 = dots[n // 2][n % 2]
            dot1 = dots[n // 2][2 + n % 2]
            y0, y1 = _add_bilevel(y0, y1, dot0, dot1, x_sums[n], codes[n], tops[n], constants[2])
    else:
        y0, y1 = _add_direct(y0, y1, dots, x_sums, direct)
    return y0, y1


@gluon.jit
def product_of_tile(
    tile, X, XDense, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y,
    out_features, chunks, groups, all_outliers,
    BITS: gl.constexpr, BF: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    SOME: gl.constexpr, PERMUTED: gl.constexpr, HAS_BIAS: gl.constexpr, WHOLE: gl.constexpr, WARPS: gl.constexpr,
    ENTRIES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Y[o] = sum_i W[o, i] X[i] (+ Bias[o]) for the 16 rows o of a tile.

    XDense [chunks * 256] is x in stored order, X [chunks * 256] in the original order, and read only where these are not the
    same, PERMUTED, and there are outliers; both fp16, or bf16 where BF is 8. Y [out]. Statistics: direct, or bilevel with
    groups of 16, 32 or 64. SOME: the matrix has no outliers, and no pointers to them, where all_outliers is 0. WHOLE: chunks is
    a multiple of 2 * WARPS. ENTRIES: see `pair_outliers.entries`.
    """
    FLAVOR: gl.constexpr = BITS + BF
    CHUNKS_A_SET: gl.constexpr = BLOCKS_A_GROUP if BILEVEL else 1
    OWN_X: gl.constexpr = PERMUTED and OUTLIERS
    STAGE: gl.constexpr = bytes_of_stage(BITS, BILEVEL)
    A_WARP: gl.constexpr = bytes_of_warp(BITS, BILEVEL, ENTRIES if OUTLIERS else 0, OWN_X)
    SPARSE_X_AT: gl.constexpr = _X_BYTES if OWN_X else 0  # within a pair
    OUTLIERS_AT: gl.constexpr = SPARSE_X_AT + _X_BYTES
    PAIR: gl.constexpr = OUTLIERS_AT + (128 * ENTRIES if OUTLIERS else 0)
    STEP: gl.constexpr = 2 * WARPS  # chunks from a pair of a warp to its next one
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    spread: gl.constexpr = gl.BlockedLayout([1, 1, 2], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])  # warp, lane, row half
    inner: gl.constexpr = gl.SliceLayout(0, spread)
    # The compiler would compute what it knows of a thread again in every chunk. What is added is 0, which it cannot know.
    thread = gl.arange(0, 32 * WARPS, layout=layout) + (chunks >> 30)
    lane = thread % 32
    warp = thread // 32
    gid = lane // 4
    tid = lane % 4
    tile64 = tile.to(gl.int64)
    zero = gl.zeros([32 * WARPS], gl.float32, layout)
    none = gl.zeros([32 * WARPS], gl.int32, layout)
    exponents = (none + _EXPONENT[11], none + _EXPONENT[14], none + _EXPONENT[17], none + _EXPONENT[20])
    constants = (none + _ONES[FLAVOR], none + _UNDO_OR, exponents)
    row0, row1 = group_rows(tile, gid, out_features, groups)

    if OUTLIERS:  # first of all, because what they point to waits for it
        pointers = Pointers + tile64 * (2 * chunks)
        cells = 2 * chunks
        if SOME:
            cells = gl.where(all_outliers > 0, cells, 0)
        fours = all_outliers & -4
        held = pair_outliers.hold_bounds((none, none), 0, lane, warp, pointers, cells, WARPS)

    chunk = 2 * warp
    in_pairs = chunks
    if not WHOLE:
        in_pairs = gl.maximum(chunks - WARPS, 0)
        chunk = gl.where(in_pairs > 0, chunk, warp)
    words_at = Weight + (tile64 * chunks * (128 * BITS) + (chunk * (128 * BITS) + lane * 4))
    statistics_at = words_at
    has_statistics = none
    if BILEVEL:
        statistics_at, has_statistics = _statistics_at(StatCodes, TileStats, tile, chunk, chunks, lane, CHUNKS_A_SET)
    statistics_step = gl.where(lane < 12, 48, 32)  # words, of a chunk
    room = room_for_warp(warp, lane, A_WARP, WARPS)
    own = room + lane * 16
    pairs = room + 2 * STAGE
    copy_chunk(own, words_at, statistics_at, (chunk < chunks).to(gl.int32), has_statistics, BITS, BILEVEL)
    if OUTLIERS:
        sums = pair_outliers.clear_sums(room + 2 * (STAGE + PAIR), lane)
        begin, end = pair_outliers.bounds(held, 0)
        pair_outliers.copy(pairs + OUTLIERS_AT, Outliers, begin, end, fours, lane, ENTRIES)
    zeros_at = room_of_zeros(thread)
    barrier()
    x_at = XDense.to(gl.pointer_type(gl.int32)) + (chunk * 128 + lane * 4)
    if DEPENDENT:  # x, unlike the matrix, comes from the kernel before
        x_at = await_previous(x_at)
    copy_x(pairs + lane * 16, x_at, chunk, chunks)
    if OWN_X:
        sparse_x_at = X.to(gl.pointer_type(gl.int32)) + (chunk * 128 + lane * 4)
        copy_x(pairs + SPARSE_X_AT + lane * 16, sparse_x_at, chunk, chunks)
    commit_copies(lane)

    y0 = zero
    y1 = zero
    step = 1
    now = 0  # which of two pairs is multiplied
    for first in range(0, in_pairs, STEP):
        pair = pairs + now
        x0, x1 = _x_of_slots(pair, zeros_at, gid, tid)
        for half in gl.static_range(2):
            wait_for_copies(lane)
            # Which chunk is copied now, how much further that is, and whether it is there.
            if half == 0:
                further = 1
                ahead = chunk + 1
                there = none + 1
                if not WHOLE:
                    there = (ahead < chunks).to(gl.int32)
            elif WHOLE:
                further = STEP - 1
                ahead = chunk + (STEP - 1)
                there = none + (first + STEP < chunks).to(gl.int32)
            else:
                ahead = (first + STEP) + gl.where(first + STEP < in_pairs, 2 * warp, warp)
                further = ahead - chunk
                there = (ahead < chunks).to(gl.int32)
            words_at += further * 128 * BITS
            if BILEVEL:
                if CHUNKS_A_SET == 1:
                    statistics_at += further * statistics_step
                else:
                    statistics_at, has_statistics = _statistics_at(
                        StatCodes, TileStats, tile, ahead, chunks, lane, CHUNKS_A_SET
                    )
            copy_chunk(own + (1 - half) * STAGE, words_at, statistics_at, there, has_statistics, BITS, BILEVEL)
            if half == 1:
                x_chunk = ahead
                if WHOLE:
                    x_chunk = none + (first + STEP)
                pair_then = pairs + (PAIR - now)
                x_at += (further + 1) * 128
                copy_x(pair_then + lane * 16, x_at, x_chunk, chunks)
                if OWN_X:
                    sparse_x_at += (further + 1) * 128
                    copy_x(pair_then + SPARSE_X_AT + lane * 16, sparse_x_at, x_chunk, chunks)
                if OUTLIERS:
                    held = pair_outliers.hold_bounds(held, step, lane, warp, pointers, cells, WARPS)
                    next_begin, next_end = pair_outliers.bounds(held, step)
                    pair_outliers.copy(pair_then + OUTLIERS_AT, Outliers, next_begin, next_end, fours, lane, ENTRIES)
                    step += 1
            commit_copies(lane)
            y0, y1 = _add_chunk(
                y0, y1, room + half * STAGE, pair + 512 * half, x0 + 512 * half, x1 + 512 * half, tile, chunk,
                first + (STEP - 2 + half), StatCodes, GroupSc, GroupZp, row0, row1, chunks, groups, lane, constants,
                BITS, BF, BILEVEL, BLOCKS_A_GROUP,
            )  # fmt: skip
            if half == 0:
                chunk = ahead
        if OUTLIERS:
            pair_outliers.add_products(
                sums, pair + SPARSE_X_AT, pair + OUTLIERS_AT, Outliers, begin, end, fours, lane, 512, ENTRIES, BF
            )
            begin = next_begin
            end = next_end
        chunk = ahead
        now = PAIR - now

    wait_for_copies(lane)
    if not WHOLE:
        left = chunks - gl.cdiv(in_pairs, STEP) * STEP
        if left > 0:
            pair = pairs + now
            x0, x1 = _x_of_slots(pair, zeros_at, gid, tid)
            y0, y1 = _add_chunk(
                y0, y1, room, pair, x0, x1, tile, chunk, chunks - 1, StatCodes, GroupSc, GroupZp, row0, row1, chunks,
                groups, lane, constants, BITS, BF, BILEVEL, BLOCKS_A_GROUP,
            )  # fmt: skip
            if OUTLIERS:
                pair_outliers.add_products(
                    sums, pair + SPARSE_X_AT, pair + OUTLIERS_AT, Outliers, begin, end, fours, lane, 256, ENTRIES, BF
                )
    if OUTLIERS:
        sum0, sum1 = pair_outliers.sums_of_rows(sums, lane)
        y0 += sum0 * (1.0 / _UNIT[FLAVOR])
        y1 += sum1 * (1.0 / _UNIT[FLAVOR])
    if DEPENDENT:
        let_next_begin(none)
    y0 = gl.inline_asm_elementwise(_QUAD_SUM, "=f,f", [y0], dtype=gl.float32, is_pure=True, pack=1)
    y1 = gl.inline_asm_elementwise(_QUAD_SUM, "=f,f", [y1], dtype=gl.float32, is_pure=True, pack=1)
    by_warp = gl.convert_layout(gl.reshape(gl.join(y0, y1), [WARPS, 32, 2]), spread)
    total = gl.sum(by_warp, axis=0) * _UNIT[FLAVOR]
    lane2 = gl.arange(0, 32, layout=gl.SliceLayout(1, inner))[:, None]
    half2 = gl.arange(0, 2, layout=gl.SliceLayout(0, inner))[None, :]
    row = tile * 16 + lane2 // 4 + 8 * half2
    if HAS_BIAS:
        total += gl.load(Bias + row, mask=row < out_features, other=0).to(gl.float32)
    gl.store(Y + row, total.to(Y.dtype.element_ty), mask=(row < out_features) & (lane2 % 4 == 0))


@gluon.jit
def matvec_kernel(
    X, XDense, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y,
    out_features, chunks, groups, all_outliers,
    BITS: gl.constexpr, BF: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    PERMUTED: gl.constexpr, HAS_BIAS: gl.constexpr, WHOLE: gl.constexpr, WARPS: gl.constexpr, ENTRIES: gl.constexpr,
    DEPENDENT: gl.constexpr,
):  # fmt: skip
    """`product_of_tile` for every tile of a matrix, a program each."""
    product_of_tile(
        gl.program_id(0), X, XDense, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y,
        out_features, chunks, groups, all_outliers, BITS, BF, BILEVEL, BLOCKS_A_GROUP, OUTLIERS, False, PERMUTED, HAS_BIAS,
        WHOLE, WARPS, ENTRIES, DEPENDENT,
    )  # fmt: skip


@cache
def launch_for(layout: Layout, dtype: torch.dtype, bias: torch.dtype | None, device: torch.device, joined: bool) -> Launch:
    """Of x in the original and in stored order, LEAVES, bias or what is not read, and y. joined: whether the stored matrix is
    one tensor."""
    dtypes = (dtype, dtype, *LEAVES.values(), bias or dtype, dtype)
    integers = (layout.out_features, layout.blocks // CHUNK, layout.groups, layout.outliers)
    constants = {
        "PERMUTED": layout.permuted, "HAS_BIAS": bias is not None,
        **row_constants(layout, pair_outliers.entries(layout), layout.tile_rows, dtype), **overlap.options(device, joined),
    }  # fmt: skip
    return Launch(matvec_kernel, (layout.tile_rows, 1), device, dtypes, integers, constants)


def linear(x: Tensor, tensors: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """W x + bias for x fp16 or bf16 [1, in], contiguous, and checked operands of a layout of whole chunks.

    Returns [1, out] in x's dtype.
    """
    y = x.new_empty((1, layout.out_features))
    original = x = aligned(x)
    if layout.permuted:
        x = x.index_select(1, tensors["perm"])
    if layout.in_features % TILE:
        padding = (0, layout.blocks * TILE - layout.in_features)
        x = torch.nn.functional.pad(x, padding)
        original = torch.nn.functional.pad(original, padding) if layout.permuted else x
    added = y if bias is None else aligned(bias)
    launch = launch_for(layout, x.dtype, None if bias is None else bias.dtype, x.device, isinstance(tensors, Joined))
    launch(original.data_ptr(), x.data_ptr(), *addresses(tensors, layout), added.data_ptr(), y.data_ptr())
    return y


def row_constants(layout: Layout, entries: int, tiles: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """What `product_of_tile` is compiled with for x of this dtype and a launch of so many tiles, and the warps of a program.
    entries: as `pair_outliers.entries` has them."""
    warps = warps_for(tiles, layout, entries)
    constants = constants_of(layout) | {
        "BF": BF16 if dtype == torch.bfloat16 else 0, "OUTLIERS": entries > 0, "WARPS": warps,
        "WHOLE": layout.blocks // CHUNK % (2 * warps) == 0, "ENTRIES": max(entries, 1), "num_warps": warps,
    }  # fmt: skip
    registers = registers_for(constants, tiles)
    return constants | ({"maxnreg": registers} if registers else {})


# What follows was measured on an H200, of 132 multiprocessors.
_MANY_WARPS = 132 * 16  # of all tiles; from there on it counts how many a multiprocessor holds
_FEW_TILES = 255  # up to which 8 warps share one
_MANY_TILES = 600  # from which two warps are enough for up to _SHORT chunks
_SHORT = 16


def registers_for(constants: Mapping[str, int | bool], tiles: int) -> int | None:
    """The limit of a thread's registers, where one was faster than the compiler's choice: 80, for 24 warps a multiprocessor,
    where there are so many, and with 4 bits and direct statistics 96, for 20. The other kinds would spill or need fewer."""
    if constants["BF"]:
        return None
    if not constants["BILEVEL"]:
        return 96 if constants["BITS"] == 4 and constants["BLOCKS_A_GROUP"] % 2 == 0 else None
    return 80 if constants["BLOCKS_A_GROUP"] == 1 and tiles * constants["WARPS"] > _MANY_WARPS else None


def warps_for(tiles: int, layout: Layout, entries: int) -> int:
    """Warps that share a tile, for a launch of so many: as many as have a pair of chunks each, and room."""
    chunks = layout.blocks // CHUNK
    warps = 8 if tiles <= _FEW_TILES else 2 if tiles >= _MANY_TILES and chunks <= _SHORT else 4
    a_warp = warp_bytes(layout.weight_bits, layout.statistics == "bilevel", entries, layout.permuted and entries > 0)
    for_sums = 256  # of a warp, to add up what the warps have
    while warps > 1 and (warps > ceil_div(chunks, 2) or warps * (a_warp + for_sums) + ZEROS_BYTES > MOST_BYTES):
        warps //= 2
    return warps
