"""A lane's weights in fp16, for `gemm` and `decode`: its words, and the statistics of their groups, to 16 words of two.

Each weight is rounded three times: its scale, its offset (middle - zero) * scale, and the sum of both.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import ptx
from .lanes import for_all_rows, for_lane_groups, funnel, warp_bases, words_of_chunk
from .wide_groups import group_pairs, with_last_groups

_LANE = gl.constexpr({bits: ptx.dequantize_lane(bits) for bits in (2, 3, 4)})
_LANE_REGISTERS = gl.constexpr({bits: ptx.dequantize_lane_constraints(bits) for bits in (2, 3, 4)})
_BY = {bits: ptx.constants_in_registers(ptx.dequantize_lane(bits), 20 + bits) for bits in (2, 3, 4)}
_LANE_BY = gl.constexpr({bits: lane[0] for bits, lane in _BY.items()})
_CONSTANTS = gl.constexpr({bits: lane[1] for bits, lane in _BY.items()})
_BY_REGISTERS = gl.constexpr({
    bits: ptx.dequantize_lane_constraints(bits) + ",r" * len(lane[1]) for bits, lane in _BY.items()
})  # fmt: skip
_BILEVEL = gl.constexpr({bits: ptx.half_statistics(bits) for bits in (2, 3, 4)})
_BILEVEL_REGISTERS = gl.constexpr(ptx.HALF_STATISTICS_CONSTRAINTS)
_MIDDLE = gl.constexpr({2: 0x40004000, 3: 0x44004400, 4: 0x48004800})  # half2 of 2, 4, 8
_DIRECT = gl.constexpr(
    # $0 scale, $1 offset as half2; $2 scale (raw fp16), $3 zero point (integer), $4 half2 of middle
    "{ .reg .b32 z; .reg .b16 h; mov.b32 z, $3; cvt.rn.f16.u32 h, z; mov.b32 z, {h, h};"
    " prmt.b32 $0, $2, $2, 0x1010; sub.rn.f16x2 z, $4, z; mul.rn.f16x2 $1, z, $0; }"
)


@gluon.constexpr_function
def groups_read(warps, groups):
    """Layout in which `four_groups` takes [warps, groups]."""
    a_block = groups // 4  # groups of blocks 4 j .. 4 j + 3
    lanes = [[0, step * a_block // 4] for step in (1, 2)] + [[0, 0]] * 3
    return gl.DistributedLinearLayout([[0, a_block], [0, 2 * a_block]], lanes, warp_bases(warps), [], [warps, groups])


@gluon.jit
def four_groups(tile, layout: gl.constexpr):
    """[WARPS, groups of a chunk] to four [32 * WARPS]: those of blocks tid, 4 + tid, 8 + tid, 12 + tid."""
    N: gl.constexpr = tile.shape[1] // 4
    even, odd = gl.split(gl.permute(gl.reshape(tile, [tile.shape[0], 2, 2, N]), [0, 3, 1, 2]))
    w0, w2 = gl.split(even)
    w1, w3 = gl.split(odd)
    return for_all_rows(w0, layout), for_all_rows(w1, layout), for_all_rows(w2, layout), for_all_rows(w3, layout)


@gluon.jit
def _spread_pairs(value, layout: gl.constexpr):
    """[WARPS, 8 gid, 2], the last dimension tid // 2, to [32 * WARPS]."""
    WARPS: gl.constexpr = value.shape[0]
    twice: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1], [1, 8, 2, 2], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    value = gl.expand_dims(gl.convert_layout(value, gl.SliceLayout(3, twice), assert_trivial=True), 3)
    value = value + gl.zeros([WARPS, 8, 2, 2], value.dtype, twice)
    return gl.convert_layout(gl.reshape(value, [32 * WARPS]), layout, assert_trivial=True)


@gluon.jit
def set_of_codes(codes, tid, layout: gl.constexpr):
    """Words of spec 4.3 [WARPS, 64] to four [32 * WARPS] with the codes of groups tid, 4 + tid, 8 + tid, 12 + tid at bit 0."""
    WARPS: gl.constexpr = codes.shape[0]
    bases: gl.constexpr = warp_bases(WARPS)
    words: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 2]], [[0, 0], [0, 1], [0, 4], [0, 8], [0, 16]], bases, [], [WARPS, 32]
    )
    halves: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1]], [[0, 0], [0, 0], [0, 2], [0, 4], [0, 8]], bases, [], [WARPS, 16]
    )
    own = gl.permute(gl.reshape(codes.slice(0, 32, 1).load(words), [WARPS, 8, 2, 2]), [0, 1, 3, 2])
    own0, own1 = gl.split(own)
    own0 = _spread_pairs(own0, layout)
    own1 = _spread_pairs(own1, layout)
    half0, half1 = gl.split(gl.reshape(codes.slice(32, 16, 1).load(halves), [WARPS, 8, 2]))
    side = tid // 2 * 16
    half0 = for_lane_groups(half0, layout) >> side
    half1 = for_lane_groups(half1, layout) >> side
    shift = tid % 2 * 12
    behind = tid * 0 + 24  # the high byte of a lane's word goes on in its half word
    return own0 >> shift, own1 >> shift, funnel(own0, half0, behind) >> shift, funnel(own1, half1, behind) >> shift


@gluon.jit
def wide_codes(codes, StatCodes, tile, chunk, last, chunks, groups, gid, tid, layout: gl.constexpr, CHUNKS_A_SET: gl.constexpr):
    """What `set_of_codes` has, where a set covers several chunks: the codes of the groups of blocks tid, 4 + tid, 8 + tid,
    12 + tid. The arguments are those of `lane_of_chunk`."""
    pairs = group_pairs(codes, chunk, layout, CHUNKS_A_SET)
    if CHUNKS_A_SET == 2:
        shift = tid // 2 * 12
        found = (pairs[0] >> shift, pairs[1] >> shift, pairs[2] >> shift, pairs[3] >> shift)
    else:
        found = (pairs[0], pairs[0] >> 12, pairs[1], pairs[1] >> 12)
    return with_last_groups(found, StatCodes, tile, chunk, last, chunks, groups, gid, tid, 4 // CHUNKS_A_SET, CHUNKS_A_SET)


@gluon.jit
def lane_of_chunk(
    room, StatCodes, tile, chunk, last, chunks, groups, gid, tid, layout: gl.constexpr, BITS: gl.constexpr,
    BILEVEL: gl.constexpr, CHUNKS_A_SET: gl.constexpr,
):  # fmt: skip
    """What a lane holds of the chunk in `room_for_chunks`: four slots of BITS words, and where BILEVEL the four words of
    `set_of_codes` and statistics of `four_groups` (else zeros).

    tile and chunk: its tile and number, of each lane or of all; last: the largest number of the program's lanes.
    """
    WARPS: gl.constexpr = tid.shape[0] // 32
    slots = words_of_chunk(room, layout, BITS, WARPS)
    none = tid * 0
    codes = (none, none, none, none)
    tops = (none, none, none, none)
    if BILEVEL:
        if CHUNKS_A_SET == 1:
            codes = set_of_codes(room[BITS], tid, layout)
        else:
            codes = wide_codes(room[BITS], StatCodes, tile, chunk, last, chunks, groups, gid, tid, layout, CHUNKS_A_SET)
        tops = four_groups(room[BITS + 1].load(groups_read(WARPS, 16 // CHUNKS_A_SET)), layout)
    return slots, codes, tops


@gluon.jit
def direct_statistics(scale, zero, BITS: gl.constexpr):
    """Scale and offset, as half2, of a group: from what GroupSc (raw fp16) and GroupZp have of it, int32."""
    middle = scale * 0 + _MIDDLE[BITS]
    return gl.inline_asm_elementwise(
        _DIRECT, "=&r,=&r,r,r,r", [scale, zero, middle], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def direct_half_statistics(
    GroupSc, GroupZp, row0, row1, out_features, groups, block, BLOCKS_A_GROUP: gl.constexpr, BITS: gl.constexpr
):  # fmt: skip
    """Scale and offset, as half2, of rows row0 and row1 in the group of column block `block`, from GroupSc and GroupZp."""
    group = gl.minimum(block // BLOCKS_A_GROUP, groups - 1)
    at0 = gl.minimum(row0, out_features - 1).to(gl.int64) * groups + group
    at1 = gl.minimum(row1, out_features - 1).to(gl.int64) * groups + group
    s0, o0 = direct_statistics(gl.load(GroupSc + at0).to(gl.int32), gl.load(GroupZp + at0).to(gl.int32), BITS)
    s1, o1 = direct_statistics(gl.load(GroupSc + at1).to(gl.int32), gl.load(GroupZp + at1).to(gl.int32), BITS)
    return s0, o0, s1, o1


@gluon.jit
def half_statistics(
    codes, tops, GroupSc, GroupZp, row0, row1, out_features, groups, block, BLOCKS_A_GROUP: gl.constexpr, BITS: gl.constexpr,
    BILEVEL: gl.constexpr,
):  # fmt: skip
    """Scale and offset, as half2, of rows l and l + 8 in the group that column block `block` of the lane belongs to: from
    the words of `set_of_codes` and the statistics of `four_groups`, or from GroupSc and GroupZp where not BILEVEL."""
    none = block * 0
    if BILEVEL:
        top0, top1 = gl.inline_asm_elementwise(
            "mov.b64 {$0, $1}, $2;", "=r,=r,l", [tops], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
        return gl.inline_asm_elementwise(
            _BILEVEL[BITS], _BILEVEL_REGISTERS, [codes, codes, none, top0, top1],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return direct_half_statistics(GroupSc, GroupZp, row0, row1, out_features, groups, block, BLOCKS_A_GROUP, BITS)


@gluon.jit
def dequantize_lane(words, s0, o0, s1, o1, BITS: gl.constexpr):
    """A lane's BITS words of a block, and scale and offset of rows l and l + 8 (half2), to 16 words of two fp16 weights: pairs
    0 .. 7 of row l, then of row l + 8."""
    return gl.inline_asm_elementwise(
        _LANE[BITS], _LANE_REGISTERS[BITS], words + (s0, o0, s1, o1),
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32,
               gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def lane_constants(zero, BITS: gl.constexpr):
    """What `dequantize_by` takes, plus zero, of which the compiler does not know that it is 0."""
    found = ()
    for i in gl.static_range(len(_CONSTANTS[BITS])):
        found = found + (zero + _CONSTANTS[BITS][i],)
    return found


@gluon.jit
def dequantize_by(constants, words, s0, o0, s1, o1, BITS: gl.constexpr):
    """`dequantize_lane` with its constants in registers, those of `lane_constants`: the assembler makes the others anew again
    and again."""
    return gl.inline_asm_elementwise(
        _LANE_BY[BITS], _BY_REGISTERS[BITS], words + (s0, o0, s1, o1) + constants,
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32,
               gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip
