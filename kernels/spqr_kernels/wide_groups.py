"""Statistics codes of bilevel groups of 32 and 64 columns, for the tensor-core kernels.

16 groups are a set (spec 4.3) and 16 blocks of 16 columns a chunk, so a set of such groups covers CHUNKS_A_SET = 2 or 4 chunks:
a chunk has 16 / CHUNKS_A_SET groups of it, and which ones is known only when the kernel runs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .lanes import for_lane_groups, funnel, warp_bases


@gluon.jit
def group_pairs(codes, chunk, layout: gl.constexpr, CHUNKS_A_SET: gl.constexpr):
    """Words of a full set [WARPS, 64] to 8 / CHUNKS_A_SET words [32 * WARPS]: word j has a lane's codes of groups 2 j and
    2 j + 1 of the chunk, counted from its first, at bits 0 and 12, and others above them.

    chunk: its number, of each lane or of all.
    """
    WARPS: gl.constexpr = codes.shape[0]
    bases: gl.constexpr = warp_bases(WARPS)
    words: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2]], [[0, 0], [0, 0], [0, 4], [0, 8], [0, 16]], bases, [], [WARPS, 32]
    )
    halves: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1]], [[0, 0], [0, 0], [0, 2], [0, 4], [0, 8]], bases, [], [WARPS, 16]
    )
    even, odd = gl.split(gl.reshape(codes.slice(0, 32, 1).load(words), [WARPS, 8, 2, 2]))
    own0, own2 = gl.split(even)
    own1, own3 = gl.split(odd)
    own0 = for_lane_groups(own0, layout)
    own1 = for_lane_groups(own1, layout)
    own2 = for_lane_groups(own2, layout)
    own3 = for_lane_groups(own3, layout)
    half0, half1 = gl.split(gl.reshape(codes.slice(32, 16, 1).load(halves), [WARPS, 8, 2]))
    half0 = for_lane_groups(half0, layout)
    half1 = for_lane_groups(half1, layout)
    return pairs_of((own0, own1, own2, own3), (half0, half1), chunk, CHUNKS_A_SET)


@gluon.jit
def pairs_of(own, half, chunk, CHUNKS_A_SET: gl.constexpr):
    """What `group_pairs` has, of words 4 gid .. 4 gid + 3 of a set and of 32 + 2 gid and 33 + 2 gid, with their half words."""
    own0, own1, own2, own3 = own
    half0, half1 = half
    # Of the upper eight groups the high byte of a word goes on in a half word; of the lower eight all is in the word.
    behind = own0 * 0 + chunk % CHUNKS_A_SET // (CHUNKS_A_SET // 2) * 24
    if CHUNKS_A_SET == 2:
        return (
            funnel(own0, half0, behind), funnel(own1, half0 >> 16, behind),
            funnel(own2, half1, behind), funnel(own3, half1 >> 16, behind),
        )  # fmt: skip
    else:
        later = chunk % 2 > 0
        half = gl.where(later, half1, half0)
        return funnel(gl.where(later, own2, own0), half, behind), funnel(gl.where(later, own3, own1), half >> 16, behind)


@gluon.jit
def with_last_groups(
    codes, StatCodes, tile, chunk, last, chunks, groups, gid, block, STEP: gl.constexpr, CHUNKS_A_SET: gl.constexpr
):
    """`codes` of a lane at bit 0, one word a group, with those read anew that lie behind the last full set, in another order
    (spec 4.3). This happens in one to three chunks of a product, and the copies have brought the words to L2.

    tile and chunk: numbers, of each lane or of all; last: the largest chunk of all. The groups are that of block `block`
    [32 * WARPS] of the chunk and those STEP, 2 * STEP .. behind it.
    """
    full_end = gl.where(groups % 16 > 0, groups // 16 * CHUNKS_A_SET, 1 << 30)
    if last >= full_end:
        own = chunk + gid * 0
        there = (own >= full_end) & (own < chunks)
        apart = groups % 16
        word = gid * 12 // 32
        group = own % CHUNKS_A_SET * (16 // CHUNKS_A_SET) + block // CHUNKS_A_SET
        low_at = StatCodes + (tile + gid * 0).to(gl.int64) * (3 * groups) + (groups // 16 * 48 + word * apart + group)
        high_at = low_at + gl.where(word < 2, apart, 0)
        found = ()
        for j in gl.static_range(len(codes)):
            low = gl.load(low_at + j * STEP, mask=there, other=0)
            high = gl.load(high_at + j * STEP, mask=there, other=0)
            found = found + (gl.where(there, funnel(low, high, gid * 12 % 32), codes[j]),)
        codes = found
    return codes
