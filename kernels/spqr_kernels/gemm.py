"""Batched kernel for NVIDIA Hopper (sm_90): y = x W^T with `wgmma`, outliers fused, from 17 rows of x to prefill.

A warp group of 4 warps holds 4 tiles, 64 rows of W: a lane's words become fp16 weights in registers, and these are the A
operand of `wgmma` as they stand; x is B, in shared memory (`slots`), read once for the 64 rows. A warp's chunks come to stages
of its own (`stages`), so no warp waits for the others but for x that they still read, and the next weights are made while the
tensor cores work. Outliers are added to the weights before the product (`outliers`).

Programs, as many as run at once, share the product evenly (`shares`), and go through their pieces from the last to the first:
the part of a piece that another program adds up is made first, and so is there when that one comes to it, last. Where pieces
are so few that two or more programs can have each, these are a cluster, and add up in shared memory (`clusters`). Every sum has
one fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from spqr_format.layout import CHUNK, Layout

from . import clusters, outliers, overlap
from .checks import aligned
from .gemm_plan import CHOICES, WINDOW_BYTES, Plan, plan_for, room_bytes
from .joined import Joined
from .lanes import barrier, reinterpret
from .launch import LEAVES, REMEMBERED, Launch, addresses, constants_of
from .overlap import await_previous, let_next_begin
from .pieces import add_parts, add_rest, finish, opaque_zero, rest_of, store_part
from .prepare import prepare_launch, prepared
from .ring import commit_copies, read1, read4, wait_for_copies
from .shares import await_parts, last_position, publish
from .slots import ask_half, await_half, begin_ring, free_half, release_room
from .stage_statistics import (
    STATS_BYTES,
    bilevel_constants,
    bilevel_statistics,
    codes_of_chunk,
    direct_of_chunk,
    group_rows,
    statistics_begin,
    statistics_step,
)
from .stages import ask_outliers, ask_weights, first_chunks, room_of_program
from .weights import dequantize_by, direct_half_statistics, direct_statistics, lane_constants

_STATS_BYTES = gl.constexpr(STATS_BYTES)
_CELL_BYTES = gl.constexpr(outliers.CELL_BYTES)
_WINDOW_BYTES = gl.constexpr(WINDOW_BYTES)
# To the window, which no lane of the warp reads any more, for all of its lanes to read.
_HOLD = gl.constexpr("bar.warp.sync -1; st.shared.v4.b32 [$1], {$2, $3, $4, $4}; bar.warp.sync -1; mov.b32 $0, $1;")


@gluon.jit
def _operand(a, A: gl.constexpr):
    """16 words a lane ([32 * WARPS] each: pairs 0..7 of row l, of row l + 8, of block tid) to fp16 [16 * WARPS, 64], where
    column 16 c + 8 h + 2 tid + i is column 4 c + 2 h + i of block tid."""
    WARPS: gl.constexpr = a[0].shape[0] // 32
    halves = ()
    for k in gl.static_range(16):
        low, high = gl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [a[k]], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
        )
        halves = halves + (gl.join(low, high),)
    couples = ()
    for c in gl.static_range(4):
        upper = gl.join(halves[2 * c], halves[2 * c + 1])
        lower = gl.join(halves[8 + 2 * c], halves[9 + 2 * c])
        couples = couples + (gl.join(upper, lower),)
    t = gl.join(gl.join(couples[0], couples[1]), gl.join(couples[2], couples[3]))
    # warp, gid, tid, i, h, half, c % 2, c // 2
    t = gl.permute(gl.reshape(t, [WARPS, 8, 4, 2, 2, 2, 2, 2]), [0, 5, 1, 7, 6, 4, 2, 3])
    return gl.convert_layout(gl.reshape(t, [16 * WARPS, 64]), A, assert_trivial=True)


@gluon.jit
def _hold_bounds(window, most, Pointers, cell, last_cell, chunks, lane):
    """Where the outliers of 32 chunks begin and end, from the one that begins with `cell` on, each of two cells: to the warp's
    `window` in shared memory. Returns the most that a lane saw in a cell, of the first so many chunks and before."""
    own = cell + 2 * lane
    begin = gl.load(Pointers + gl.minimum(own, last_cell))
    middle = gl.load(Pointers + gl.minimum(own + 1, last_cell))
    end = gl.load(Pointers + gl.minimum(own + 2, last_cell))
    gl.inline_asm_elementwise(
        _HOLD, "=r,r,r,r,r", [window + lane * 16, begin, middle, end], dtype=gl.int32, is_pure=False, pack=1
    )
    return gl.maximum(most, gl.where(lane < chunks, gl.maximum(middle - begin, end - middle), 0))


@gluon.jit
def _ask_cells(to, bounds, there, Outliers, lane, ENTRIES: gl.constexpr):
    """Begins to copy the outliers of both cells of a chunk; zeros where not there. bounds: as `_hold_bounds` put them."""
    begin, middle, end, _ = bounds
    ask_outliers(to, Outliers, begin, gl.where(there, middle, begin), lane, 32 * ENTRIES)
    ask_outliers(to + 128 * ENTRIES, Outliers, middle, gl.where(there, end, middle), lane, 32 * ENTRIES)


@gluon.jit
def _slot_of(piece, chunk, chunks, parts):
    """Number of the first slot of x of a chunk."""
    return (gl.maximum(piece, 0) % parts * chunks + chunk) * 4


@gluon.jit
def _read_chunk(at, lane, chunk, chunks, BITS: gl.constexpr, BILEVEL: gl.constexpr, CHUNKS_A_SET: gl.constexpr):
    """What a lane needs of a chunk whose copies have come to the stage `at`: its words, statistics codes, and where its tile
    statistics are."""
    words = ()
    for k in gl.static_range(BITS):
        words = words + (read4(at + (512 * k) + lane * 16),)
    codes = (lane, lane, lane, lane)
    tops = lane
    if BILEVEL:
        codes, tops = codes_of_chunk(at + lane * 16, lane, chunk, chunks, 512 * BITS, CHUNKS_A_SET)
    return words, codes, tops


@gluon.jit
def _read_cell(at, lane, ENTRIES: gl.constexpr):
    """The lane's outliers of a cell, from where they were copied to."""
    found = ()
    for i in gl.static_range(ENTRIES):
        found = found + (read1(at + (128 * i) + lane * 4),)
    return found


@gluon.jit
def _exchange(room_of_cell, found, places, following, ENTRIES: gl.constexpr):
    """The outliers of the following cell into the warp's room, in place of those that were found, once all lanes have added
    theirs. Returns the room and their places."""
    room_of_cell = outliers.clear(room_of_cell, found, places, ENTRIES)
    return outliers.put(room_of_cell, following, ENTRIES)


@gluon.jit
def _group_rows(piece, warp, gid, parts, tile_rows, out_features, groups, WARPS: gl.constexpr):
    """`group_rows` of the warp's tile in a piece; behind the last piece any."""
    return group_rows(gl.minimum(gl.maximum(piece, 0) // parts * WARPS + warp, tile_rows - 1), gid, out_features, groups)


@gluon.jit
def _advance(piece, chunk, end, first_piece, first_chunk, chunks):
    """The position behind a chunk of a piece that ends at `end`: piece, chunk, where that piece ends, whether it is new."""
    new = chunk + 1 == end
    piece = gl.where(new, piece - 1, piece)
    chunk = gl.where(new, gl.where(piece == first_piece, first_chunk, 0), chunk + 1)
    return piece, chunk, gl.where(new, chunks, end), new


@gluon.jit
def share_of_product(
    program, X, Scale, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y, Partial, flags,
    batch, out_features, tile_rows, chunks, groups, parts, base, extra,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    HAS_BIAS: gl.constexpr, SCALED: gl.constexpr, BATCH: gl.constexpr, WARPS: gl.constexpr, ROOM: gl.constexpr,
    ENTRIES: gl.constexpr, DEPENDENT: gl.constexpr, BESIDE: gl.constexpr = 1, CLUSTER: gl.constexpr = 1,
):  # fmt: skip
    """What a program does of Y[n, o] = Scale[n] sum_i X[n, i] W[o, i] (+ Bias[o]), Y [batch, BESIDE * out].

    A piece of Y is BATCH of the n and 16 * WARPS of the o; pieces are counted along n first, in `parts`. Positions, base and
    extra: as `shares` has them. What a program has of a piece that ends in another goes to Partial fp32
    [programs, 16 * WARPS * BATCH] in the order of its registers, with one of the flags, 8 bytes a program.
    X fp16 as `prepare.py` makes it. ENTRIES: outliers of a cell that a lane copies; those beyond are added in the end, one
    by one. CLUSTER: where more than 1, so many programs have a piece, each some of its chunks, and nothing else: base and
    extra are not looked at, nor is Partial.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BATCH, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    CHUNKS_A_SET: gl.constexpr = BLOCKS_A_GROUP if BILEVEL else 1
    # Shared memory: four slots of x; of each warp room for a cell and the window of bounds, then two stages; barriers. In a
    # stage words and statistics of a chunk stand before the outliers of its two cells.
    FIRST_CELL: gl.constexpr = 512 * BITS + _STATS_BYTES
    STAGE: gl.constexpr = FIRST_CELL + 256 * ENTRIES * OUTLIERS
    CELL: gl.constexpr = (_CELL_BYTES + _WINDOW_BYTES) * OUTLIERS
    OWN: gl.constexpr = CELL + 2 * STAGE
    SLOT: gl.constexpr = 128 * BATCH
    # Two slots' products take less time than x to come, so a half is told free, and asked for, as soon as can be. And for 256
    # rows the registers are not there that hold outliers from long before they are put, and direct statistics, which come from
    # global memory, from a chunk before.
    BRIEF: gl.constexpr = BATCH <= 128
    AHEAD: gl.constexpr = BRIEF and not BILEVEL
    # With several programs a multiprocessor the next kernels' take the places of those that end: 1 to 5 % faster; else no
    # difference, or with 256 rows 3 % slower.
    EARLY: gl.constexpr = BATCH <= 32
    thread = gl.arange(0, 32 * WARPS, layout=layout)
    lane = thread % 32
    warp = thread // 32
    gid = lane // 4
    tid = lane % 4
    none = thread * 0
    if CLUSTER == 1:
        first = last_position(program - 1, base, extra)
        last = last_position(program, base, extra)
    else:
        rank = program % CLUSTER
        piece_begin = program // CLUSTER * chunks
        first = piece_begin + chunks * rank // CLUSTER
        last = piece_begin + chunks * (rank + 1) // CLUSTER
    first_piece = first // chunks
    first_chunk = first - first_piece * chunks
    piece = (last - 1) // chunks
    begin = gl.where(piece == first_piece, first_chunk, 0)
    end = last - piece * chunks
    left = last - first  # positions that are not multiplied yet

    # The one room of the kernel, so that it begins where all shared memory does.
    memory = gl.allocate_shared_memory(gl.int32, [ROOM // 1024, 256], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    x_ring = reinterpret(memory, gl.float16, [4, BATCH, 64], gl.NVMMASharedLayout(128, 16, 2))
    room = room_of_program(thread)
    cell_room = room + (4 * SLOT + warp * OWN)
    window = cell_room + _CELL_BYTES
    own = cell_room + CELL  # the warp's stages
    barriers = room + (4 * SLOT + WARPS * OWN)
    begin_ring(barriers, thread, WARPS)

    # What is copied next: the chunk after the next one.
    ask_piece = piece
    ask_chunk = begin
    ask_end = end
    words_at = Weight + lane * 4
    stats_at = statistics_begin(StatCodes, TileStats, lane)
    stats_step = statistics_step(lane, CHUNKS_A_SET)
    before = first_chunks(piece // parts, warp, tile_rows, chunks, 1, WARPS)
    x_slot = _slot_of(piece, begin, chunks, parts)
    ask_slot = x_slot
    if OUTLIERS:
        last_cell = tile_rows * chunks * 2
        most = none
        room_of_cell = outliers.cleared(cell_room, lane)
        held_from = begin - 32
    for k in gl.static_range(2):
        if k == 1:
            ask_piece, ask_chunk, ask_end, new = _advance(ask_piece, ask_chunk, ask_end, first_piece, first_chunk, chunks)
            ask_slot += 4
            if new:
                before = first_chunks(gl.maximum(ask_piece, 0) // parts, warp, tile_rows, chunks, 1, WARPS)
                ask_slot = _slot_of(ask_piece, ask_chunk, chunks, parts)
        ask_weights(
            own + (k * STAGE) + lane * 16, words_at, stats_at, stats_step, ask_chunk, before, chunks, none + k, none + left,
            lane, BITS, BILEVEL, CHUNKS_A_SET, STAGE,
        )  # fmt: skip
        if OUTLIERS:
            if k == 0 or new:
                held_from = ask_chunk
                cell = (before[0] + ask_chunk) * 2
                most = _hold_bounds(window, most, Pointers, cell, last_cell, ask_end - ask_chunk, lane)
            bounds = read4(window + (ask_chunk - held_from) * 16)
            _ask_cells(own + (k * STAGE + FIRST_CELL), bounds, left > k, Outliers, lane, ENTRIES)
        commit_copies(lane)
    next_chunk = ask_chunk
    next_slot = ask_slot

    if DEPENDENT:  # x, unlike the matrix, comes from the kernel before
        await_previous(X + thread)
    use = none
    ask_half(room, barriers, X, 0, x_slot, use, warp, lane, BATCH)

    unknown = none + (batch >> 30)
    for_lane = lane_constants(unknown, BITS)
    if BILEVEL:
        for_statistics = bilevel_constants(unknown, BITS)
    wait_for_copies(lane)
    words, codes, tops = _read_chunk(own, lane, begin, chunks, BITS, BILEVEL, CHUNKS_A_SET)
    if AHEAD:
        rows = _group_rows(piece, warp, gid, parts, tile_rows, out_features, groups, WARPS)
        direct = direct_of_chunk(GroupSc, GroupZp, rows[0], rows[1], begin, groups, tid, BLOCKS_A_GROUP)
    if OUTLIERS:
        found = _read_cell(own + FIRST_CELL, lane, ENTRIES)
        if BRIEF:
            second = _read_cell(own + (FIRST_CELL + 128 * ENTRIES), lane, ENTRIES)
        room_of_cell, places = outliers.put(room_of_cell, found, ENTRIES)
    stage = 0
    while piece >= first_piece:
        acc = gl.zeros([16 * WARPS, BATCH], gl.float32, mma)
        if DEPENDENT and EARLY and piece == first_piece:
            let_next_begin(thread)
        if not BILEVEL and not AHEAD:
            row0 = gl.minimum(piece // parts * WARPS + warp, tile_rows - 1) * 16 + gid
        for chunk in range(begin, end):
            if BRIEF:
                ask_half(room, barriers, X, 1, x_slot + 2, use, warp, lane, BATCH)
            for s in gl.static_range(4):
                slot = ()
                for k in gl.static_range(BITS):
                    slot = slot + (words[k][s],)
                if BILEVEL:
                    s0, o0, s1, o1 = bilevel_statistics(codes[s], tops, s, for_statistics, BITS, CHUNKS_A_SET)
                elif AHEAD:
                    of_slot = direct[s * len(direct) // 4]
                    s0, o0 = direct_statistics(of_slot[0], of_slot[1], BITS)
                    s1, o1 = direct_statistics(of_slot[2], of_slot[3], BITS)
                else:
                    s0, o0, s1, o1 = direct_half_statistics(
                        GroupSc, GroupZp, row0, row0 + 8, out_features, groups, chunk * 16 + 4 * s + tid, BLOCKS_A_GROUP, BITS
                    )
                weights = dequantize_by(for_lane, slot, s0, o0, s1, o1, BITS)
                if OUTLIERS:
                    weights = outliers.add(weights, room_of_cell, lane, s % 2)
                a = _operand(weights, operand)
                if s % 2 == 0:
                    await_half(barriers + s // 2 * 16, use, lane)
                acc = hopper.warpgroup_mma(a, x_ring.index(s).permute((1, 0)), acc, is_async=True)
                # The rest is done while the tensor cores work.
                if s == 0 and not BRIEF:
                    ask_half(room, barriers, X, 1, x_slot + 2, use, warp, lane, BATCH)
                if s == 2:
                    ask_half(room, barriers, X, 0, next_slot, use + 1, gl.where(left > 1, warp, 1), lane, BATCH)
                at = own + stage
                if OUTLIERS and s == 1:
                    if not BRIEF:
                        second = _read_cell(at + (FIRST_CELL + 128 * ENTRIES), lane, ENTRIES)
                    room_of_cell, places = _exchange(room_of_cell, found, places, second, ENTRIES)
                    found = second
                if s == 3:
                    wait_for_copies(lane)
                    other = own + (STAGE - stage)
                    if OUTLIERS:
                        following = _read_cell(other + FIRST_CELL, lane, ENTRIES)
                        if BRIEF:
                            second = _read_cell(other + (FIRST_CELL + 128 * ENTRIES), lane, ENTRIES)
                    words, codes, tops = _read_chunk(other, lane, next_chunk, chunks, BITS, BILEVEL, CHUNKS_A_SET)
                    if AHEAD:
                        if chunk + 1 == end:
                            rows = _group_rows(piece - 1, warp, gid, parts, tile_rows, out_features, groups, WARPS)
                        direct = direct_of_chunk(GroupSc, GroupZp, rows[0], rows[1], next_chunk, groups, tid, BLOCKS_A_GROUP)
                    if OUTLIERS and not BRIEF:
                        room_of_cell, places = _exchange(room_of_cell, found, places, following, ENTRIES)
                        found = following
                    if BRIEF:
                        acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
                        free_half(barriers + 16, lane)
                    # The chunk after the next one, to this one's stage.
                    ask_piece, ask_chunk, ask_end, new = _advance(
                        ask_piece, ask_chunk, ask_end, first_piece, first_chunk, chunks
                    )
                    ask_slot += 4
                    if new:
                        before = first_chunks(gl.maximum(ask_piece, 0) // parts, warp, tile_rows, chunks, 1, WARPS)
                        ask_slot = _slot_of(ask_piece, ask_chunk, chunks, parts)
                    if OUTLIERS:
                        if new | (ask_chunk - held_from >= 32):
                            held_from = ask_chunk
                            cell = (before[0] + ask_chunk) * 2
                            most = _hold_bounds(window, most, Pointers, cell, last_cell, ask_end - ask_chunk, lane)
                        bounds = read4(window + (ask_chunk - held_from) * 16)
                    ask_weights(
                        at + lane * 16, words_at, stats_at, stats_step, ask_chunk, before, chunks, none + 2, none + left, lane,
                        BITS, BILEVEL, CHUNKS_A_SET, STAGE,
                    )  # fmt: skip
                    if OUTLIERS:
                        _ask_cells(at + FIRST_CELL, bounds, left > 2, Outliers, lane, ENTRIES)
                    commit_copies(lane)
                    if OUTLIERS and BRIEF:
                        room_of_cell, places = _exchange(room_of_cell, found, places, following, ENTRIES)
                        found = following
                    x_slot = next_slot
                    next_slot = ask_slot
                    next_chunk = ask_chunk
                    left -= 1
                if s == 1 or (s == 3 and not BRIEF):
                    acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
                    free_half(barriers + s // 2 * 16, lane)
            stage = STAGE - stage
            use += 1
        if DEPENDENT and not EARLY and piece == first_piece:
            let_next_begin(thread)

        first_tile = piece // parts * WARPS
        first_row = piece % parts * BATCH
        near_row = gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(1, mma))[:, None]
        near_n = gl.arange(0, BATCH, layout=gl.SliceLayout(0, mma))[None, :]
        zero = opaque_zero(piece)
        own_part = Partial + program.to(gl.int64) * (16 * WARPS * BATCH)
        if CLUSTER > 1:
            clusters.meet(thread)  # none reads its x any more
            clusters.send(acc, rank, near_row, near_n, zero, CLUSTER)
            if OUTLIERS:  # noqa: SIM102, the compiler's condition and the GPU's
                if gl.max(most, axis=0) > 32 * ENTRIES:
                    barrier()
                    for each in range(WARPS):
                        rest, rest_row, rest_n = rest_of(
                            X, Pointers, Outliers, first_tile + each, begin, end, first_row, batch, tile_rows, chunks, BATCH,
                            WARPS, 32 * ENTRIES,
                        )  # fmt: skip
                        clusters.add(rest, rank, each * 16 + rest_row, rest_n, BATCH, WARPS, CLUSTER)
            clusters.meet(thread)
            EACH: gl.constexpr = BATCH // CLUSTER
            part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, EACH, 16])
            row = gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(1, part))[:, None]
            n = gl.arange(0, EACH, layout=gl.SliceLayout(0, part))[None, :]
            total = clusters.receive(row, n, zero, CLUSTER, WARPS)
            finish(
                total, room, Scale, Bias, Y, row, n, first_row + rank * EACH, first_tile * 16, batch, out_features, thread,
                zero, SCALED, HAS_BIAS, 2 * SLOT, BESIDE,
            )  # fmt: skip
        elif end < chunks:
            store_part(acc, own_part, near_row, near_n, zero)
        else:
            if begin > 0:
                await_parts(flags, program, first - first_chunk, base, extra, thread)
                acc = add_parts(acc, Partial, program, first - first_chunk, base, extra, near_row, near_n, zero)
            finish(
                acc, room, Scale, Bias, Y, near_row, near_n, first_row, first_tile * 16, batch, out_features, thread, zero,
                SCALED, HAS_BIAS, 2 * SLOT, BESIDE,
            )  # fmt: skip
        if OUTLIERS and CLUSTER == 1:  # noqa: SIM102, the compiler's condition and the GPU's
            if gl.max(most, axis=0) > 32 * ENTRIES:
                barrier()
                for each in range(WARPS):
                    add_rest(
                        Y, own_part, X, Scale, Pointers, Outliers, first_tile, each, begin, end, first_row, batch, out_features,
                        tile_rows, chunks, SCALED, BATCH, WARPS, 32 * ENTRIES, BESIDE,
                    )  # fmt: skip
        if CLUSTER == 1 and end < chunks:
            publish(flags + program + none, thread)
        release_room(thread)
        piece -= 1
        begin = gl.where(piece == first_piece, first_chunk, 0)
        end = chunks
    wait_for_copies(lane)


_INTEGERS = ("batch", "out_features", "tile_rows", "chunks", "groups", "parts", "base", "extra")


@gluon.jit(do_not_specialize=_INTEGERS)
def gemm_kernel(
    X, Scale, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y, Partial,
    batch, out_features, tile_rows, chunks, groups, parts, base, extra,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    HAS_BIAS: gl.constexpr, SCALED: gl.constexpr, BATCH: gl.constexpr, WARPS: gl.constexpr, ROOM: gl.constexpr,
    ENTRIES: gl.constexpr, CLUSTER: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """`share_of_product` for every program. The flags stand behind all of Partial."""
    flags = Partial.to(gl.pointer_type(gl.int64)) + gl.num_programs(0) * (8 * WARPS * BATCH)
    share_of_product(
        gl.program_id(0), X, Scale, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y, Partial, flags,
        batch, out_features, tile_rows, chunks, groups, parts, base, extra, BITS, BILEVEL, BLOCKS_A_GROUP, OUTLIERS, HAS_BIAS,
        SCALED, BATCH, WARPS, ROOM, ENTRIES, DEPENDENT, 1, CLUSTER,
    )  # fmt: skip


class Launches(NamedTuple):
    """The kernels of a product and its plan."""

    plan: Plan
    prepare: Launch
    product: Launch


def constants_for(layout: Layout, entries: int, width: int) -> dict[str, Any]:
    """What `share_of_product` is compiled with for so many rows of x, and Triton's options. entries: as in `_launches`."""
    choice = CHOICES[width]
    return constants_of(layout) | {
        "OUTLIERS": entries > 0, "ENTRIES": max(entries, 1), "BATCH": width, "WARPS": choice.warps,
        "ROOM": room_bytes(layout.weight_bits, entries, width, choice.warps), "num_warps": choice.warps,
    } | ({"maxnreg": choice.registers} if choice.registers else {})  # fmt: skip


def plan_of(
    layouts: Sequence[Layout], entries: int, batch: int, dtype: torch.dtype, device: torch.device, joined: bool
) -> tuple[Plan, Launch, dict[str, Any]]:
    """How x is multiplied with matrices of a kind: the plan, the launch that makes x anew, and what the kernel of the product
    is compiled with. entries, joined: as in `_launches`."""
    layout = layouts[0]
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    tiles = [each.tile_rows for each in layouts]
    plan = plan_for(batch, tiles, layout.blocks // CHUNK, multiprocessors, entries > 0)
    overlaps = overlap.options(device, joined)
    constants = {"SCALED": dtype == torch.bfloat16, "CLUSTER": plan.cluster} | overlaps
    constants |= constants_for(layout, entries, plan.width)
    return plan, prepare_launch(layout, batch, dtype, device, plan.width, overlaps), constants


@lru_cache(REMEMBERED)
def _launches(
    layout: Layout, entries: int, batch: int, dtype: torch.dtype, bias: torch.dtype | None, device: torch.device, joined: bool
) -> Launches:
    """layout and entries: as `outliers.without_outliers` has them. joined: whether the stored matrix is one tensor."""
    plan, prepare, constants = plan_of((layout,), entries, batch, dtype, device, joined)
    dtypes = (torch.float16, torch.float32, *LEAVES.values(), bias or dtype, dtype, torch.float32)
    integers = (
        batch, layout.out_features, layout.tile_rows, layout.blocks // CHUNK, layout.groups, plan.parts, plan.shares[0].base,
        plan.shares[0].extra,
    )  # fmt: skip
    constants |= {"HAS_BIAS": bias is not None}
    product = Launch(gemm_kernel, (plan.programs, 1), device, dtypes, integers, constants, plan.cluster)
    return Launches(plan, prepare, product)


def linear(x: Tensor, tensors: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """x W^T + bias for x fp16 or bf16 [batch, in], contiguous, and checked operands of a layout of whole chunks, not
    permuted where it has outliers. Returns [batch, out] in x's dtype."""
    batch, dtype = x.shape[0], x.dtype
    shape, entries = outliers.without_outliers(layout)
    given = None if bias is None else bias.dtype
    plan, prepare, product = _launches(shape, entries, batch, dtype, given, x.device, isinstance(tensors, Joined))
    y = x.new_empty((batch, layout.out_features))
    added = y if bias is None else aligned(bias)
    x = aligned(x) if not layout.permuted else x.index_select(1, tensors["perm"])
    x, scale = prepared(prepare, x, layout, plan.parts * plan.width)
    partial = torch.empty(plan.partial, dtype=torch.float32, device=x.device) if plan.partial else scale
    product(x.data_ptr(), scale.data_ptr(), *addresses(tensors, layout), added.data_ptr(), y.data_ptr(), partial.data_ptr())
    return y
