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
    chunk = chunk + own0 * 0
    # Of the upper eight groups the high byte of a word goes on in a half word; of the lower eight all is in the word.
    behind = chunk % CHUNKS_A_SET // (CHUNKS_A_SET // 2) * 24
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
def full_sets_end(groups, CHUNKS_A_SET: gl.constexpr):
    """The first chunk behind the last full set, whose codes lie in another order; where there is none, more than any."""
    return gl.where(groups % 16 > 0, groups // 16 * CHUNKS_A_SET, 1 << 30)


@gluon.jit
def codes_behind_sets(StatCodes, tile, gid, group, groups, there):
    """A lane's codes of a group behind the last full set (spec 4.3), at bit 0 and others above them: three words a group, read
    where `there`. All but StatCodes and groups are [32 * WARPS]."""
    behind = groups % 16
    at = tile.to(gl.int64) * (3 * groups) + (groups // 16 * 48 + group % 16)
    word = gid * 12 // 32
    low = gl.load(StatCodes + at + word * behind, mask=there, other=0)
    high = gl.load(StatCodes + at + gl.minimum(word + 1, 2) * behind, mask=there, other=0)
    return funnel(low, high, gid * 12 % 32)
