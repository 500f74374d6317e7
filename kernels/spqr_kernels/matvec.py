"""Matrix-vector kernel for NVIDIA GPUs (sm_80 and newer): y = W x for batch 1, exact codes on tensor cores, outliers fused.

A program takes one tile of 16 rows; its warps take the chunks of 256 columns in turn, each at its own pace. Chunks arrive in
shared memory by asynchronous copies (`ring`), because bytes in flight in registers cost the warps that hide latency.

A lane's words become exact codes in floating point by one mask each, and are the A fragment of `mma.m16n8k16` as they
stand. At batch 1 seven of the eight columns of B would idle; instead each holds x of another block of 16 columns (B is block
diagonal: lanes off the diagonal read zeros), so that one product gives the sums over eight groups apart, sum(q x). Scales
and zeros then apply in float32, each (row, group) in one lane only: y += s (sum(q x) - z sum(x)). Every sum has one fixed
order, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import pairwise, permutations
from threading import Thread

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.errors import SpqrError
from spqr_format.layout import CHUNK, TILE, Layout
from spqr_format.packing import FIELDS, is_spread

from . import outliers, overlap, ptx
from .checks import aligned
from .joined import Joined
from .lanes import load2, load4
from .launch import LEAVES, Launch, addresses, constants_of
from .overlap import await_previous, let_next_begin
from .ring import (
    bytes_of_stage,
    copy_chunk,
    read1,
    read2,
    read2_long,
    read4,
    read_long,
    read_words,
    room_for_ring,
    stage_bytes,
    wait_for_chunk,
)
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
# Orders of the couples in which those of one 16-byte half of x follow each other.
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
def _couple_of_all(slots, x, dots, undo, couple: gl.constexpr, n: gl.constexpr, BITS: gl.constexpr, BF: gl.constexpr):
    """Couple n of the order in all four chains."""
    i: gl.constexpr = couple % 2 * 2
    near = x[couple // 2]
    far = x[2 + couple // 2]
    return (
        _scale(_couple(slots[0], near[i], near[i + 1], dots[0], couple, undo, BITS, BF), n, BITS + BF),
        _scale(_couple(slots[1], near[i], near[i + 1], dots[1], couple, undo, BITS, BF), n, BITS + BF),
        _scale(_couple(slots[2], far[i], far[i + 1], dots[2], couple, undo, BITS, BF), n, BITS + BF),
        _scale(_couple(slots[3], far[i], far[i + 1], dots[3], couple, undo, BITS, BF), n, BITS + BF),
    )  # fmt: skip


@gluon.jit
def _products(slots, at, tid, zero, undo, BITS: gl.constexpr, BF: gl.constexpr):
    """sum(q x) of the chunk's groups 0..7 and 8..15, as D fragments: lanes have those of groups 2 tid, 2 tid + 1.

    at: where lanes gid % 4 = tid find x of block gid (the other lanes: zeros). Slots 2 h and 2 h + 1 are multiplied with the
    same B, which has x of blocks 8 h .. 8 h + 7 in its columns: of the first, columns 0..3 are the sums, of the second 4..7.
    Four chains of products side by side, for the latency of each.
    """
    F: gl.constexpr = BITS + BF
    none = (zero, zero, zero, zero)
    dots = (none, none, none, none)
    x = (load4(at), load4(at + 4), load4(at + 64), load4(at + 68))
    dots = _couple_of_all(slots, x, dots, undo, _ORDER[F][0], 0, BITS, BF)
    dots = _couple_of_all(slots, x, dots, undo, _ORDER[F][1], 1, BITS, BF)
    dots = _couple_of_all(slots, x, dots, undo, _ORDER[F][2], 2, BITS, BF)
    dots = _couple_of_all(slots, x, dots, undo, _ORDER[F][3], 3, BITS, BF)
    return _chosen(tid < 2, dots[0], dots[1]), _chosen(tid < 2, dots[2], dots[3])


@gluon.jit
def _chosen(first, a, b):
    return gl.where(first, a[0], b[0]), gl.where(first, a[1], b[1]), gl.where(first, a[2], b[2]), gl.where(first, a[3], b[3])


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
def product_of_tile(
    tile, X, XDense, Zeros, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y,
    out_features, chunks, groups, all_outliers,
    BITS: gl.constexpr, BF: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    SOME: gl.constexpr, HAS_BIAS: gl.constexpr, WHOLE: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr,
    ENTRIES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Y[o] = sum_i W[o, i] X[i] (+ Bias[o]) for the 16 rows o of a tile.

    X [in] is read by the outliers, XDense [chunks * 256], permuted where need be, by the codes; both fp16, or bf16 where BF is
    8. Zeros: 512 bytes of 0. Y [out]. Statistics: direct, or bilevel with groups of 16, 32 or 64. SOME: the matrix has no
    outliers, and no pointers to them, where all_outliers is 0. WHOLE: chunks is a multiple of WARPS. ENTRIES: see
    `outliers.entries_of_chunk`.
    """
    FLAVOR: gl.constexpr = BITS + BF
    CHUNKS_A_SET: gl.constexpr = BLOCKS_A_GROUP if BILEVEL else 1
    STAGE: gl.constexpr = bytes_of_stage(BITS, BILEVEL)
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
    row0 = tile * 16 + gid
    row1 = row0 + 8
    zero = gl.zeros([32 * WARPS], gl.float32, layout)
    none = gl.zeros([32 * WARPS], gl.int32, layout)
    ones = none + _ONES[FLAVOR]
    undo = none + _UNDO_OR

    if OUTLIERS:  # first of all, because what they point to waits for it
        pointers = Pointers + tile64 * (2 * chunks)
        sparse_chunks = chunks
        if SOME:
            sparse_chunks = gl.where(all_outliers > 0, chunks, 0)
        first_begin, first_end = outliers.bounds(pointers, warp, sparse_chunks)
        begin, end = outliers.bounds(pointers, warp + WARPS, sparse_chunks)

    words_at = Weight + (tile64 * chunks * (128 * BITS) + (warp * (128 * BITS) + lane * 4))
    statistics_at = words_at
    has_statistics = none
    if BILEVEL:
        statistics_at, has_statistics = _statistics_at(StatCodes, TileStats, tile, warp, chunks, lane, CHUNKS_A_SET)
    statistics_step = gl.where(lane < 12, 48 * WARPS, 32 * WARPS)
    ring = room_for_ring(warp, lane, BITS, BILEVEL, WARPS, STAGES)
    ahead = warp
    for j in gl.static_range(STAGES - 1):
        copied = (ahead < chunks).to(gl.int32)
        copy_chunk(ring + j * STAGE, lane, words_at, statistics_at, copied, has_statistics, BITS, BILEVEL)
        words_at += WARPS * 128 * BITS
        ahead += WARPS
        if BILEVEL:
            if CHUNKS_A_SET == 1:
                statistics_at += statistics_step
            else:
                statistics_at, has_statistics = _statistics_at(StatCodes, TileStats, tile, ahead, chunks, lane, CHUNKS_A_SET)
    if OUTLIERS:
        sums = outliers.room_for_sums(warp, lane)

    # Lanes gid % 4 = tid bring x of block gid, the others zeros.
    zeros_at = Zeros.to(gl.pointer_type(gl.int32)) + none
    x_at = XDense.to(gl.pointer_type(gl.int32)) + (warp * 128 + gid * 8)
    if DEPENDENT:  # x, unlike the matrix, comes from the kernel before
        x_at = await_previous(x_at)
    diagonal = gl.where(gid % 4 == tid, x_at, zeros_at)
    diagonal_step = gl.where(gid % 4 == tid, 128 * WARPS, 0)
    sums_at = x_at + tid * 2

    exponent11 = none + _EXPONENT[11]
    exponent14 = none + _EXPONENT[14]
    exponent17 = none + _EXPONENT[17]
    exponent20 = none + _EXPONENT[20]
    y0 = zero
    y1 = zero
    chunk = warp
    now = 0
    then = (STAGES - 1) * STAGE
    if OUTLIERS:
        words, _, _ = outliers.fetch_chunk(
            Outliers, first_begin, first_end, pointers, warp, WARPS, sparse_chunks, sums, X, lane, ENTRIES, BF
        )
    for first in range(0, chunks, WARPS):
        wait_for_chunk(lane, STAGES - 2)
        if WHOLE:
            copied = none + (first + WARPS * (STAGES - 1) < chunks).to(gl.int32)
        else:
            copied = (ahead < chunks).to(gl.int32)
        copy_chunk(ring + then, lane, words_at, statistics_at, copied, has_statistics, BITS, BILEVEL)
        words_at += WARPS * 128 * BITS
        ahead += WARPS
        if BILEVEL:
            if CHUNKS_A_SET == 1:
                statistics_at += statistics_step
            else:
                statistics_at, has_statistics = _statistics_at(StatCodes, TileStats, tile, ahead, chunks, lane, CHUNKS_A_SET)
        if OUTLIERS:
            words_ahead, begin, end = outliers.fetch_chunk(
                Outliers, begin, end, pointers, chunk + WARPS, WARPS, sparse_chunks, sums, X, lane, ENTRIES, BF
            )
        stage = ring + now
        then = now
        now = gl.where(now == (STAGES - 1) * STAGE, 0, now + STAGE)
        if WHOLE:
            at = diagonal
            ones_at = sums_at
        else:  # past the end the words are zeros, and so must x be
            at = gl.where(chunk < chunks, diagonal, zeros_at)
            ones_at = gl.where(chunk < chunks, sums_at, zeros_at)
        diagonal += diagonal_step
        sums_at += 128 * WARPS
        if CHUNKS_A_SET > 1:  # before the products, whose sums would be held over the condition
            codes = _wide_codes(
                stage + 512 * BITS, StatCodes, tile, chunk, first + (WARPS - 1), chunks, groups, gid, tid, CHUNKS_A_SET
            )
        # B with x of block gid in column gid and A of ones: sum(x) of groups 2 tid and 2 tid + 1 in each row of D
        natural0 = load2(ones_at)
        natural1 = load2(ones_at + 64)
        dots = _products(read_words(stage, lane, BITS), at, tid, zero, undo, BITS, BF)
        blank = (zero, zero, zero, zero)
        sums0 = _mma(ones, ones, ones, ones, natural0[0], natural0[1], blank, BF)
        sums1 = _mma(ones, ones, ones, ones, natural1[0], natural1[1], blank, BF)
        x_sums = (sums0[0], sums0[1], sums1[0], sums1[1])
        if BILEVEL:
            if CHUNKS_A_SET == 1:
                codes = _set_of_codes(stage + 512 * BITS, lane)
            tops = _tops(stage + (512 * BITS + 192), tid, CHUNKS_A_SET)
        for n in gl.static_range(4):
            dot0 = dots[n // 2][n % 2]
            dot1 = dots[n // 2][2 + n % 2]
            if BILEVEL:
                t = codes[n]
                ss, sz, zs, zz = gl.inline_asm_elementwise(
                    _FOUR_HALVES, "=f,=f,=f,=f,l", [tops[n]], dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
                    is_pure=True, pack=1,
                )  # fmt: skip
                a = zs * x_sums[n]
                t0 = dot0 - _statistic(t, exponent14, zz + _OFFSET[14], 14) * a
                t1 = dot1 - _statistic(t, exponent20, zz + _OFFSET[20], 20) * a
                y0 += ss * (_statistic(t, exponent11, sz + _OFFSET[11], 11) * t0)
                y1 += ss * (_statistic(t, exponent17, sz + _OFFSET[17], 17) * t1)
            else:
                block = chunk * 16 + (8 * (n // 2) + n % 2) + 2 * tid
                group = gl.minimum(block // BLOCKS_A_GROUP, groups - 1)
                place0 = gl.minimum(row0, out_features - 1).to(gl.int64) * groups + group
                place1 = gl.minimum(row1, out_features - 1).to(gl.int64) * groups + group
                scale0 = gl.load(GroupSc + place0).to(gl.float16, bitcast=True).to(gl.float32)
                scale1 = gl.load(GroupSc + place1).to(gl.float16, bitcast=True).to(gl.float32)
                y0 += scale0 * (dot0 - gl.load(GroupZp + place0).to(gl.float32) * x_sums[n])
                y1 += scale1 * (dot1 - gl.load(GroupZp + place1).to(gl.float32) * x_sums[n])
        chunk += WARPS
        if OUTLIERS:
            outliers.add_products(sums, words, X, chunk - WARPS, lane, ENTRIES, BF)
            words = words_ahead

    wait_for_chunk(lane, 0)
    if OUTLIERS:
        sum0, sum1 = outliers.sums_of_rows(sums, lane)
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
    X, XDense, Zeros, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y,
    out_features, chunks, groups, all_outliers,
    BITS: gl.constexpr, BF: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    HAS_BIAS: gl.constexpr, WHOLE: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, ENTRIES: gl.constexpr,
    DEPENDENT: gl.constexpr,
):  # fmt: skip
    """`product_of_tile` for every tile of a matrix, a program each."""
    product_of_tile(
        gl.program_id(0), X, XDense, Zeros, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y,
        out_features, chunks, groups, all_outliers, BITS, BF, BILEVEL, BLOCKS_A_GROUP, OUTLIERS, False, HAS_BIAS, WHOLE, WARPS,
        STAGES, ENTRIES, DEPENDENT,
    )  # fmt: skip


@cache
def zeros(device: torch.device) -> Tensor:
    """512 bytes of 0 that live as long as the process. SpqrError E509 while a CUDA graph is captured: they would be zeros only
    once it has run, so the first product of a process must come before.

    Made by a thread of its own: torch.compile's CUDA graphs give the memory that the calling thread allocates to their pool,
    where nothing may stay alive between runs.
    """
    if torch.cuda.is_current_stream_capturing():
        raise SpqrError("E509", "linear", "a CUDA graph is being captured: run a product once before")
    made: list[Tensor] = []

    def make() -> None:
        made.append(torch.zeros(512, dtype=torch.uint8, device=device))
        torch.cuda.current_stream(device).synchronize()

    thread = Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


@cache
def _launch(layout: Layout, dtype: torch.dtype, bias: torch.dtype | None, device: torch.device, joined: bool) -> Launch:
    dtypes = (dtype, dtype, torch.uint8, *LEAVES.values(), bias or dtype, dtype)
    integers = (layout.out_features, layout.blocks // CHUNK, layout.groups, layout.outliers)
    _, _, entries = outliers.without_outliers(layout)
    constants = {
        "HAS_BIAS": bias is not None,
        **row_constants(layout, entries, layout.tile_rows, dtype),
        **overlap.options(device, joined),
    }
    return Launch(matvec_kernel, (layout.tile_rows, 1), device, dtypes, integers, constants)


def linear(x: Tensor, tensors: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """W x + bias for x fp16 or bf16 [1, in], contiguous, and checked operands of a layout of whole chunks.

    Returns [1, out] in x's dtype.
    """
    x = aligned(x)
    dense = x if not layout.permuted else x.index_select(1, tensors["perm"])
    if layout.in_features % TILE:
        dense = torch.nn.functional.pad(dense, (0, layout.blocks * TILE - layout.in_features))
    y = torch.empty(1, layout.out_features, dtype=x.dtype, device=x.device)
    added = None if bias is None else aligned(bias)
    launch = _launch(layout, x.dtype, None if bias is None else bias.dtype, x.device, isinstance(tensors, Joined))
    launch(
        x.data_ptr(), dense.data_ptr(), zeros(x.device).data_ptr(), *addresses(tensors, layout),
        (y if added is None else added).data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return y


def row_constants(layout: Layout, entries: int, tiles: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """What `product_of_tile` is compiled with for x of this dtype and a launch of so many tiles, and the warps of a program.
    entries: of outliers, as `outliers.without_outliers` has it."""
    warps = warps_for(tiles, layout, entries > 0)
    constants = constants_of(layout) | {
        "BF": BF16 if dtype == torch.bfloat16 else 0, "OUTLIERS": entries > 0, "WARPS": warps, "STAGES": STAGES,
        "WHOLE": layout.blocks // CHUNK % warps == 0, "ENTRIES": max(entries, 1), "num_warps": warps,
    }  # fmt: skip
    registers = registers_for(constants)
    return constants | ({"maxnreg": registers} if registers else {})


def registers_for(constants: Mapping[str, int | bool]) -> int | None:
    """The limit of a thread's registers, where one was faster than the compiler's choice: 80 are 6 programs of 4 warps a
    multiprocessor. The other kinds would spill or need fewer."""
    plain = constants["BILEVEL"] and constants["BLOCKS_A_GROUP"] == 1 and not constants["BF"]
    return 80 if plain and constants["OUTLIERS"] and constants["ENTRIES"] > 1 and constants["WARPS"] == 4 else None


STAGES = 2  # 3 were slower nearly everywhere
_SHARED_BYTES = 48 << 10  # of a program, without asking for more


# Tiles of a launch up to which 8 warps share one: with more, an H200 is full of programs of 4. With outliers, where a warp has
# more to wait for, up to what it holds of programs of 8: at 384 tiles 4 warps took 7 us, and 8 took 10.
_FEW_TILES = {False: 255, True: 264}


def warps_for(tiles: int, layout: Layout, outliers_too: bool) -> int:
    """Warps that share a tile, for a launch of so many (measured)."""
    most = max(1, layout.blocks // CHUNK)
    a_warp = STAGES * stage_bytes(layout.weight_bits, layout.statistics == "bilevel") + outliers.SUMS_BYTES + 256  # for sums
    warps = 8 if tiles <= _FEW_TILES[outliers_too] and 8 * a_warp <= _SHARED_BYTES else 4
    while warps > most:
        warps //= 2
    return warps
