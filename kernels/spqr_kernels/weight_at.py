"""One stored weight, s (q - z), by its row and stored column: for kernels that take weights one by one, portable or not."""

from __future__ import annotations

import triton
import triton.language as tl

from spqr_format.packing import FIELDS, PAIRS


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
def statistics_codes(StatCodes, tile, lane, group, groups, inside):
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
def weight_at(
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
        codes = statistics_codes(StatCodes, tile, lane, group, groups, inside) >> (6 * (r // 8))
        stats = TileStats + (tile * groups + group) * 4
        scale = _half(stats, inside) * ((codes & 7).to(tl.float32) - _half(stats + 1, inside))
        zero = _half(stats + 2, inside) * (((codes >> 3) & 7).to(tl.float32) - _half(stats + 3, inside))
    else:
        scale = _half(GroupSc + row * groups + group, inside)
        zero = tl.load(GroupZp + row * groups + group, mask=inside, other=0).to(tl.float32)
    return scale * (q.to(tl.float32) - zero)
