"""How the lanes of the tensor-core kernels come by what they compute with: words into registers, copies into shared memory."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from . import ptx

# Triton 3.9 renamed them.
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
commit_copies = async_copy.commit_group
wait_copies = async_copy.wait_group

# Functions and no constants: Triton compares every constant that a kernel reads at each launch.


@gluon.constexpr_function
def warp_bases(warps):
    """Bases of a linear layout [warps, ..] along its warps."""
    return [[1 << bit, 0] for bit in range(warps.bit_length() - 1)]


@gluon.constexpr_function
def quads(warps):
    """Layout of [warps, 128] words: four a lane."""
    return gl.BlockedLayout([1, 4], [1, 32], [warps, 1], [1, 0])


@gluon.constexpr_function
def codes_copy(warps):
    """Layout of the copy of a chunk's statistics codes, [warps, 64] words, of which 48 are a set."""
    lanes = [[0, 4], [0, 8], [0, 16], [0, 32], [0, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2]], lanes, warp_bases(warps), [], [warps, 64])


@gluon.constexpr_function
def tops_copy(warps, groups):
    """Layout of the copy of a chunk's tile statistics, [warps, groups] of eight bytes."""
    lanes = [[0, step if step < groups else 0] for step in (2, 4, 8, 16, 16)]
    return gl.DistributedLinearLayout([[0, 1]], lanes, warp_bases(warps), [], [warps, groups])


@gluon.constexpr_function
def chunk_bytes(bits, bilevel, chunks_a_set):
    """Bytes of `room_for_chunks`, for a warp."""
    return 512 * bits + (256 + 128 // chunks_a_set) * int(bilevel)


@gluon.constexpr_function
def codes_step(chunks, chunks_a_set):
    """By how many words `codes_at` of `copy_chunks` rises over so many chunks."""
    return 48 * chunks if chunks_a_set == 1 else 0


_STREAM4 = gl.constexpr(ptx.load(4, ".nc.L1::no_allocate"))  # weights are read once
_LOAD4_REGISTERS = gl.constexpr(ptx.load_constraints(4))
_LOAD2 = gl.constexpr(ptx.load(2))
_LOAD2_REGISTERS = gl.constexpr(ptx.load_constraints(2))
_LOAD1 = gl.constexpr(ptx.load(1, ".nc"))
_LOAD1_REGISTERS = gl.constexpr(ptx.load_constraints(1))


@gluon.jit
def stream4(pointer):
    """Four words at a 16-byte boundary, not kept in L1."""
    return gl.inline_asm_elementwise(
        _STREAM4, _LOAD4_REGISTERS, [pointer], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1
    )


@gluon.jit
def load2(pointer):
    """Two words at an 8-byte boundary."""
    return gl.inline_asm_elementwise(_LOAD2, _LOAD2_REGISTERS, [pointer], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)


@gluon.jit
def load1(pointer):
    """One word."""
    return gl.inline_asm_elementwise(_LOAD1, _LOAD1_REGISTERS, [pointer], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def funnel(low, high, shift):
    """Bits shift .. shift + 31 of (high, low), shift below 32."""
    return gl.inline_asm_elementwise(
        "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def four_words(tile, layout: gl.constexpr):
    """[WARPS, 128] words to four [32 * WARPS]: what each lane holds of its blocks tid, 4 + tid, 8 + tid, 12 + tid."""
    even, odd = gl.split(gl.reshape(tile, [tile.shape[0] * 32, 2, 2]))
    w0, w2 = gl.split(even)
    w1, w3 = gl.split(odd)
    return (
        gl.convert_layout(w0, layout, assert_trivial=True), gl.convert_layout(w1, layout, assert_trivial=True),
        gl.convert_layout(w2, layout, assert_trivial=True), gl.convert_layout(w3, layout, assert_trivial=True),
    )  # fmt: skip


@gluon.jit
def for_all_rows(value, layout: gl.constexpr):
    """[WARPS, N], where N is 4 (tid), 2 (tid // 2) or 1, equal in all lane groups, to [32 * WARPS]."""
    WARPS: gl.constexpr = value.shape[0]
    N: gl.constexpr = value.shape[1]
    if N == 4:
        cube: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])
        value = gl.expand_dims(gl.convert_layout(value, gl.SliceLayout(1, cube), assert_trivial=True), 1)
        value = value + gl.zeros([WARPS, 8, 4], value.dtype, cube)
    else:
        hyper: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1], [1, 8, N, 4 // N], [WARPS, 1, 1, 1], [3, 2, 1, 0])
        value = gl.convert_layout(value, gl.SliceLayout(1, gl.SliceLayout(3, hyper)), assert_trivial=True)
        value = gl.expand_dims(gl.expand_dims(value, 1), 3) + gl.zeros([WARPS, 8, N, 4 // N], value.dtype, hyper)
    return gl.convert_layout(gl.reshape(value, [32 * WARPS]), layout, assert_trivial=True)


@gluon.jit
def for_lane_groups(value, layout: gl.constexpr):
    """[WARPS, 8 gid] to [32 * WARPS]."""
    WARPS: gl.constexpr = value.shape[0]
    cube: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])
    value = gl.expand_dims(gl.convert_layout(value, gl.SliceLayout(2, cube), assert_trivial=True), 2)
    value = value + gl.zeros([WARPS, 8, 4], value.dtype, cube)
    return gl.convert_layout(gl.reshape(value, [32 * WARPS]), layout, assert_trivial=True)


@gluon.jit
def room_for_chunks(BITS: gl.constexpr, BILEVEL: gl.constexpr, CHUNKS_A_SET: gl.constexpr, WARPS: gl.constexpr):
    """Shared memory for one chunk a warp: words [WARPS, 128] each of BITS, then statistics codes and tile statistics."""
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    room = ()
    for _k in gl.static_range(BITS):
        room = room + (gl.allocate_shared_memory(gl.int32, [WARPS, 128], shared),)
    if BILEVEL:
        room = room + (gl.allocate_shared_memory(gl.int32, [WARPS, 64], shared),)
        room = room + (gl.allocate_shared_memory(gl.int64, [WARPS, 16 // CHUNKS_A_SET], shared),)
    return room


@gluon.jit
def words_of_chunk(room, layout: gl.constexpr, BITS: gl.constexpr, WARPS: gl.constexpr):
    """What each lane holds of the words in `room_for_chunks`: BITS words of each of its blocks, as `four_words` has them."""
    slots = ((), (), (), ())
    for k in gl.static_range(BITS):
        four = four_words(room[k].load(quads(WARPS)), layout)
        slots = (slots[0] + (four[0],), slots[1] + (four[1],), slots[2] + (four[2],), slots[3] + (four[3],))
    return slots


@gluon.jit
def chunks_at(
    Weight, StatCodes, TileStats, first_tile, tile_rows, chunks, first_chunk, BITS: gl.constexpr, CHUNKS_A_SET: gl.constexpr,
    WARPS: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Where the chunk lies that each warp copies first: first_chunk + warp // TILES of tile first_tile + warp % TILES.

    Returns pointers to its words, statistics codes and tile statistics as `copy_chunks` takes them, the number of the chunk in
    the shape of each, and the codes' lane. CHUNKS_A_SET: blocks of a group with bilevel statistics, because 16 groups are a set
    (spec 4.3) and 16 blocks a chunk.
    """
    GROUPS: gl.constexpr = 16 // CHUNKS_A_SET
    words_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, quads(WARPS)))[:, None]
    words_lane = gl.arange(0, 128, layout=gl.SliceLayout(0, quads(WARPS)))[None, :]
    words_tile = gl.minimum(first_tile + words_warp % TILES, tile_rows - 1).to(gl.int64)
    words_chunk = first_chunk + words_warp // TILES
    words_at = Weight + words_tile * (chunks * (128 * BITS)) + (words_chunk * (128 * BITS) + words_lane)
    codes_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, codes_copy(WARPS)))[:, None]
    codes_lane = gl.arange(0, 64, layout=gl.SliceLayout(0, codes_copy(WARPS)))[None, :]
    codes_tile = gl.minimum(first_tile + codes_warp % TILES, tile_rows - 1).to(gl.int64)
    codes_chunk = first_chunk + codes_warp // TILES
    codes_at = StatCodes + codes_tile * (chunks * (3 * GROUPS))
    if CHUNKS_A_SET == 1:
        codes_at += codes_chunk * 48 + codes_lane
    tops_warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, tops_copy(WARPS, GROUPS)))[:, None]
    tops_lane = gl.arange(0, GROUPS, layout=gl.SliceLayout(0, tops_copy(WARPS, GROUPS)))[None, :]
    tops_tile = gl.minimum(first_tile + tops_warp % TILES, tile_rows - 1).to(gl.int64)
    tops_chunk = first_chunk + tops_warp // TILES
    tops_at = TileStats.to(gl.pointer_type(gl.int64)) + tops_tile * (chunks * GROUPS) + (tops_chunk * GROUPS + tops_lane)
    return words_at, codes_at, tops_at, words_chunk, codes_chunk, tops_chunk, codes_lane


@gluon.jit
def copy_chunks(
    room, words_at, codes_at, tops_at, codes_lane, words_there, codes_there, tops_there, codes_chunk, chunks,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, CHUNKS_A_SET: gl.constexpr,
):  # fmt: skip
    """Begins the copies into `room_for_chunks`; what is not there becomes zeros. Of 64 words of codes 48 are a set.

    Where a set covers several chunks, codes_at is that of the tile, codes_chunk says which chunk, and the whole set is copied:
    the lanes choose in `wide_groups.group_pairs`."""
    for k in gl.static_range(BITS):
        copy_async(room[k], words_at + 128 * k, mask=words_there)
    if BILEVEL:
        if CHUNKS_A_SET == 1:
            copy_async(room[BITS], codes_at, mask=codes_there & (codes_lane < 48))
        else:
            place = codes_chunk // CHUNKS_A_SET * 48 + codes_lane
            copy_async(room[BITS], codes_at + place, mask=(place < chunks * (48 // CHUNKS_A_SET)) & (codes_lane < 48))
        copy_async(room[BITS + 1], tops_at, mask=tops_there)
