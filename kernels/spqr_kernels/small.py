"""Kernel of small batches for NVIDIA GPUs (sm_90 and newer): y = x W^T for 2 .. 32 rows of x, `mma.m16n8k16`, outliers fused.

A warp holds one or two tiles, each 16 rows of W. A lane's words become fp16 weights in registers (`scaled_codes`) and are the A
fragments as they stand; x is B, and because the order of columns within a product is free, 16 bytes of a row of x are the B
fragments of two products for each tile.

Outliers are not added to the weights but multiplied on their own (`outlier_products.py`). The products go to the same sums. An
infinite x counts as the largest finite one there, as infinity times zero is NaN: y is infinite by the product of the codes, so
where the weight is an outlier its sign is that of what the outlier was added to.

Shared memory is read and written in PTX, for which the compiler puts no barriers: words and statistics are read by the warp
that copied them, and x, which the whole program reads, needs one barrier a chunk, and one more where it is turned for outliers.
A program asks for weights first, then for x, then for outliers, whose bounds must have arrived: it waits for a chunk's outliers
when three quarters of its codes are multiplied, and so for those of its first chunk hardly at all.

Programs, as many as run at once, have equal shares of the chunks of all pieces of Y. Where a piece is shared, the program that
has its last chunk adds up the parts of the others: it waits for programs before it alone, and those began before it. Every sum
has one fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import CELL_COLUMNS, CHUNK, TILE, Layout, ceil_div

from . import outliers, overlap, ptx, scaled_codes
from .checks import aligned
from .joined import Joined
from .launch import LEAVES, REMEMBERED, Launch, addresses, constants_of
from .outlier_products import KEPT, PLANE, X_PITCH, multiply_first, multiply_more, turn
from .overlap import await_previous, let_next_begin
from .prepare import prepare_launch, prepared
from .ring import commit_copies, read4
from .shares import Share, await_parts, last_position, publish, share_out
from .stage_statistics import (
    STATS_BYTES,
    codes_of_chunk,
    direct_of_chunk,
    group_rows,
    statistics_begin,
    statistics_step,
)
from .stages import ask_outliers, ask_weights, first_chunks, room_of_program

X_STAGES = 2


def tile_bytes(bits: int, kept: int) -> int:
    """Of shared memory for a chunk of a tile: a multiple of 128, as places of x, which lie behind, are xored below that."""
    return 512 * bits + STATS_BYTES + 4 * kept


def room_bytes(bits: int, kept: int, batch: int, warps: int, tall: int, stages: int) -> int:
    """Of shared memory of a program, four for each of its threads."""
    used = stages * warps * tall * tile_bytes(bits, kept) + X_STAGES * batch * X_PITCH
    if kept:
        used += batch // 8 * PLANE
    return ceil_div(used, 128 * warps) * 128 * warps


_X_PITCH = gl.constexpr(X_PITCH)
_PLANE = gl.constexpr(PLANE)
_STATS_BYTES = gl.constexpr(STATS_BYTES)
# Copies 16 bytes of x of chunk $3, from $2 + 512 $3, if $4 is before $5.
_ASK_X = gl.constexpr(
    "{ .reg .pred p; .reg .b64 a; setp.lt.s32 p, $4, $5; mad.wide.u32 a, $3, 512, $2;"
    " @p cp.async.cg.shared.global [$1], [a], 16; mov.b32 $0, $1; }"
)
# Where the outliers of chunk $3 begin and end, if $4 is before $5, else 0; from those of the tile's first on at $2.
_BOUNDS = gl.constexpr(
    "{ .reg .pred p; .reg .b64 a; setp.lt.s32 p, $4, $5; mad.wide.u32 a, $3, 8, $2;"
    " mov.b32 $0, 0; mov.b32 $1, 0; @p ld.global.nc.b32 $0, [a]; @p ld.global.nc.b32 $1, [a+8]; }"
)
_TILES = (1, 2, 4)  # eights of rows of x
_FIRST = gl.constexpr({kept + tiles: multiply_first(kept, tiles) for kept in KEPT for tiles in _TILES})
_MORE = gl.constexpr({kept + tiles: multiply_more(kept, tiles) for kept in KEPT for tiles in _TILES})
_FIRST_REGISTERS, _MORE_REGISTERS = (
    gl.constexpr({n: ",".join(["=&f"] * (4 * n) + ["f"] * (4 * n) + inputs) for n in _TILES})
    for inputs in (["r"] * 5, ["r"] * 6 + ["l", "l", "r"])
)
_TURN = gl.constexpr({8 * tiles + warps: turn(tiles, warps) for tiles in _TILES for warps in (1, 2, 4, 8)})
_FLOATS = gl.constexpr({n: (gl.float32,) * (4 * n) for n in _TILES})
_MMA = gl.constexpr(ptx.MMA)
_MMA_REGISTERS = gl.constexpr(ptx.MMA_CONSTRAINTS)
# Waits for all groups of copies but the last, and for the barrier.
_WAIT = gl.constexpr("cp.async.wait_group 1; bar.sync 0; mov.b32 $0, $1;")
# The same but for the last two, and for copies only if $1 is $2.
_WAIT_OUTLIERS = gl.constexpr("{ .reg .pred p; setp.eq.s32 p, $1, $2; @p cp.async.wait_group 2; bar.sync 0; mov.b32 $0, $1; }")


@gluon.jit
def _ask_x(at, x_at, chunk, chunks, rows, BATCH: gl.constexpr, WARPS: gl.constexpr):
    """Begins to copy x of a chunk: a warp copies every WARPS-th row of so many, counted from its first."""
    for i in gl.static_range(BATCH // WARPS):
        gl.inline_asm_elementwise(
            _ASK_X, "=r,r,l,r,r,r",
            [(at ^ i * WARPS % 8 * 16) + i * WARPS * _X_PITCH, x_at, chunk + i * WARPS * chunks, rows * 0 + i * WARPS, rows],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def _place(position, chunks, reciprocal):
    """The piece of a position, below 2^31, and its chunk. Without a division, for which the first copies would wait; reciprocal
    times chunks is less than 2^31 by chunks at most, so the piece is found too low by 1 at most."""
    piece = (position.to(gl.int64) * reciprocal >> 31).to(gl.int32)
    piece += (position - piece * chunks >= chunks).to(gl.int32)
    return piece, position - piece * chunks


@gluon.jit
def _ask_outliers_of(at, Outliers, bounds, lane, BITS: gl.constexpr, KEPT: gl.constexpr, TILE_BYTES: gl.constexpr):
    """The same of the outliers between the bounds of each tile."""
    room = at + (512 * BITS + _STATS_BYTES) - lane * 16
    for t in gl.static_range(len(bounds)):
        ask_outliers(room + t * TILE_BYTES, Outliers, bounds[t][0], bounds[t][1], lane, KEPT)


@gluon.jit
def _bounds(pointers_at, chunk, before, position, last):
    """Where the outliers of a chunk of each tile begin and end; 0 and 0 from position last on."""
    found = ()
    for t in gl.static_range(len(before)):
        low, high = gl.inline_asm_elementwise(
            _BOUNDS, "=&r,=&r,l,r,r,r", [pointers_at, before[t] + chunk, position, last], dtype=(gl.int32, gl.int32),
            is_pure=False, pack=1,
        )  # fmt: skip
        found = found + ((low, high),)
    return found


@gluon.jit
def _add_products(
    sums, outliers, mine, planes, rows, one, further, KEPT: gl.constexpr, TILES: gl.constexpr, TILE_BYTES: gl.constexpr
):  # fmt: skip
    """The sums of each tile with products of its outliers: the first ones', or those behind them where there are further inputs
    for each tile. one: 1 in the units of the sums, as half2."""
    after = ()
    MORE: gl.constexpr = len(further[0]) > 0
    for t in gl.static_range(len(sums)):
        new = gl.inline_asm_elementwise(
            _MORE[KEPT + TILES] if MORE else _FIRST[KEPT + TILES], _MORE_REGISTERS[TILES] if MORE else _FIRST_REGISTERS[TILES],
            sums[t][: 4 * TILES] + (outliers + t * TILE_BYTES, mine + t * TILE_BYTES, planes, rows, one) + further[t],
            dtype=_FLOATS[TILES], is_pure=False, pack=1,
        )  # fmt: skip
        after = after + (sums[t][4 * TILES :] + new,)
    return after


@gluon.jit
def _counts(bounds):
    """How many outliers are between them."""
    found = ()
    for t in gl.static_range(len(bounds)):
        found = found + (bounds[t][1] - bounds[t][0],)
    return found


@gluon.jit
def _write(
    sums, Scale, Bias, Y, tile, batch, out_features, gid, tid, SCALED: gl.constexpr, HAS_BIAS: gl.constexpr,
    TILES: gl.constexpr, TALL: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """A piece of Y from the sums of its lanes. tile: the warp's first."""
    for k in gl.static_range(TALL * TILES):
        for i in gl.static_range(4):
            n = tid * 2 + (k % TILES * 8 + i % 2)
            row = tile * 16 + (k // TILES * 16 + gid + i // 2 * 8)
            total = sums[4 * k + i]
            if SCALED:
                total *= gl.load(Scale + n, mask=n < batch, other=0)
            if HAS_BIAS:
                total += gl.load(Bias + row, mask=row < out_features, other=0).to(gl.float32)
            inside = (row < out_features) & (n < batch)
            gl.store(Y + n.to(gl.int64) * (BESIDE * out_features) + row, total.to(Y.dtype.element_ty), mask=inside)


@gluon.jit
def _group_rows(tile, gid, out_features, groups, TALL: gl.constexpr):
    """`group_rows` of each of the tiles from `tile` on."""
    found = ()
    for t in gl.static_range(TALL):
        found = found + (group_rows(tile + t, gid, out_features, groups),)
    return found


@gluon.jit
def _direct_of_chunk(GroupSc, GroupZp, rows, chunk, groups, tid, BLOCKS_A_GROUP: gl.constexpr):
    """`direct_of_chunk` of each tile's rows."""
    found = ()
    for t in gl.static_range(len(rows)):
        found = found + (direct_of_chunk(GroupSc, GroupZp, rows[t][0], rows[t][1], chunk, groups, tid, BLOCKS_A_GROUP),)
    return found


@gluon.jit
def share_of_product(
    program, X, Scale, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y, Partial, flags,
    batch, out_features, tile_rows, chunks, groups, reciprocal, base, extra,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SCALED: gl.constexpr,
    BATCH: gl.constexpr, WARPS: gl.constexpr, TALL: gl.constexpr, STAGES: gl.constexpr, KEPT: gl.constexpr,
    SETS: gl.constexpr, ROOM: gl.constexpr, DEPENDENT: gl.constexpr, BESIDE: gl.constexpr = 1,
):  # fmt: skip
    """What a program does of Y[n, o] = Scale[n] sum_i X[n, i] W[o, i] (+ Bias[o]), Y [batch, BESIDE * out], batch at most
    BATCH, X fp16 [batch, chunks * 256].

    A warp holds TALL tiles, and what it reads of x serves all of them. A piece of Y is 16 * TALL * WARPS of the o. All chunks
    of all pieces, piece after piece, are a line of positions, of which the first `extra` programs take base + 1 each and the
    others base. What a program has of a piece that others share goes to Partial fp32 [programs, 2, 16 * TALL * WARPS * BATCH]:
    0 where the next programs go on, with one of the flags, 8 bytes a program; 1 where it has the piece's end, until it adds the
    parts of the programs before, which publish theirs before they wait. KEPT: words of outliers of a chunk and tile that are
    copied, 0 where the matrix has none. SETS: of sums that a lane has for each product, 1 or 2, so that products need not wait
    for each other.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    CHUNKS_A_SET: gl.constexpr = BLOCKS_A_GROUP if BILEVEL else 1
    TILES: gl.constexpr = BATCH // 8
    SUMS: gl.constexpr = 4 * TILES  # of a tile
    TILE_BYTES: gl.constexpr = 512 * BITS + _STATS_BYTES + 4 * KEPT
    STAGE: gl.constexpr = WARPS * TALL * TILE_BYTES
    X_STAGE: gl.constexpr = BATCH * _X_PITCH
    THREADS: gl.constexpr = 32 * WARPS
    thread = gl.arange(0, THREADS, layout=layout)
    lane = thread % 32
    warp = thread // 32
    gid = lane // 4
    tid = lane % 4
    none = thread * 0
    first = last_position(program - 1, base, extra)
    last = last_position(program, base, extra)
    first_piece, first_chunk = _place(first, chunks, reciprocal)

    # The one room of the kernel, so that it begins where all shared memory does. It would not be there without a use: at its
    # end, where nothing is copied to before the first barrier.
    memory = gl.allocate_shared_memory(gl.int32, [ROOM // (4 * THREADS), THREADS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    memory.index(ROOM // (4 * THREADS) - 1).store(thread)
    room = room_of_program(thread)
    own = room + (warp * (TALL * TILE_BYTES) + lane * 16)
    x_own = room + (STAGES * STAGE + warp * _X_PITCH + (lane ^ warp) * 16)
    x_read = room + (STAGES * STAGE + gid * _X_PITCH)

    if KEPT > 0:  # x is turned to planes
        planes = room + (STAGES * STAGE + 2 * X_STAGE)
        unit = warp * (32 // WARPS) + lane // 8
        turn_offset = lane % 8 * _X_PITCH + unit // 8 * 128 + (unit % 8 ^ lane % 8) * 16 - gid * _X_PITCH
        plane_own = planes + (warp * (_PLANE // WARPS) + lane * 16)
        plane_read = planes + lane // 16 * _PLANE
        # the lane is asked for column k = lane % 16 of a product, which is that of word 4 (k % 8 / 2) + 2 (k / 8) + k % 2
        mine_offset = lane % 8 // 2 * 16 + lane % 16 // 8 * 8 + lane % 2 * 4 - tid * 16

    # What is copied next: chunk `ask` of piece `ask_piece`, behind the chunks `before` of all tiles before the warp's.
    ask = first_chunk
    ask_piece = first_piece
    before = first_chunks(ask_piece, warp, tile_rows, chunks, TALL, WARPS)
    words_at = Weight + lane * 4
    stats_at = statistics_begin(StatCodes, TileStats, lane)
    stats_step = statistics_step(lane, CHUNKS_A_SET)
    pointers_at = Pointers.to(gl.int64) + none.to(gl.int64)
    outliers_at = Outliers.to(gl.int64) + none.to(gl.int64)
    lasts = none + last
    asked = ()
    counts = ()
    if KEPT > 0:
        bounds = _bounds(pointers_at, ask, before, none + first, lasts)
    for k in gl.static_range(STAGES - 1):
        ask_weights(
            own + k * STAGE, words_at, stats_at, stats_step, ask, before, chunks, none + (first + k), lasts, lane, BITS,
            BILEVEL, CHUNKS_A_SET, TILE_BYTES,
        )  # fmt: skip
        ask += 1
        if ask == chunks:
            ask = 0
            ask_piece += 1
            before = first_chunks(ask_piece, warp, tile_rows, chunks, TALL, WARPS)
        if KEPT > 0:
            asked = asked + (bounds,)
            counts = counts + (_counts(bounds),)
            bounds = _bounds(pointers_at, ask, before, none + (first + (k + 1)), lasts)
    x_at = X + warp.to(gl.int64) * (chunks * 256) + lane * 8
    if DEPENDENT:  # x, unlike the matrix, comes from the kernel before
        x_at = await_previous(x_at)
    _ask_x(x_own, x_at, none + first_chunk, chunks, batch - warp, BATCH, WARPS)
    commit_copies(lane)
    if KEPT > 0:  # last, as their bounds must have arrived; the first chunk's codes are multiplied meanwhile
        for k in gl.static_range(STAGES - 1):
            _ask_outliers_of(own + k * STAGE, Outliers, asked[k], lane, BITS, KEPT, TILE_BYTES)
    commit_copies(lane)

    if BILEVEL:  # of a group for each lane, of the first tile for half of them and of the last one for the others
        reach_offset = lane // 16 * (TALL - 1) * TILE_BYTES + lane % 16 // CHUNKS_A_SET * 8 + (512 * BITS + 192) - lane * 16
    rows = gid * 0x10001000
    unknown = none + (batch >> 30)
    for_weights = scaled_codes.constants(unknown, BITS, BILEVEL)
    if not BILEVEL:
        direct_rows = _group_rows((first_piece * WARPS + warp) * TALL, gid, out_features, groups, TALL)
        direct_next = _direct_of_chunk(GroupSc, GroupZp, direct_rows, first_chunk, groups, tid, BLOCKS_A_GROUP)
    zero = gl.zeros([THREADS], gl.float32, layout)
    now = 0
    then = (STAGES - 1) * STAGE  # the stage before `now`
    x_now = x_read
    x_then = x_own + X_STAGE
    position = first
    begin = first_chunk
    piece = first_piece
    while position < last:
        end = gl.minimum(begin + (last - position), chunks)
        sums = ((zero,) * (SUMS * SETS),) * TALL
        units = scaled_codes.first_units(unknown)
        tile_chunks = first_chunks(piece, warp, tile_rows, chunks, TALL, WARPS)
        for chunk in range(begin, end):
            gl.inline_asm_elementwise(_WAIT, "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)
            following = gl.where(chunk + 1 == chunks, 0, chunk + 1)
            x_rows = gl.where(position + 1 < last, batch - warp, 0)
            _ask_x(x_then, x_at, none + following, chunks, x_rows, BATCH, WARPS)
            if STAGES > 2:  # a group of x and one of all else, which the next chunk does not wait for
                commit_copies(lane)
            ask_weights(
                own + then, words_at, stats_at, stats_step, ask, before, chunks, none + (position + (STAGES - 1)), lasts, lane,
                BITS, BILEVEL, CHUNKS_A_SET, TILE_BYTES,
            )  # fmt: skip
            if STAGES == 2:  # a group that the next chunk waits for, and one of outliers
                commit_copies(lane)
            if KEPT > 0:
                _ask_outliers_of(own + then, Outliers, bounds, lane, BITS, KEPT, TILE_BYTES)
                counts = counts + (_counts(bounds),)
            commit_copies(lane)
            ask += 1
            if ask == chunks:
                ask = 0
                ask_piece += 1
                before = first_chunks(ask_piece, warp, tile_rows, chunks, TALL, WARPS)
            if KEPT > 0:
                bounds = _bounds(pointers_at, ask, before, none + (position + STAGES), lasts)
            at = own + now
            words = ()
            for t in gl.static_range(TALL):
                its = ()
                for k in gl.static_range(BITS):
                    its = its + (read4(at + (t * TILE_BYTES + 512 * k)),)
                words = words + (its,)
            if BILEVEL:
                codes = ()
                tops = ()
                for t in gl.static_range(TALL):
                    its, tops_at = codes_of_chunk(at + t * TILE_BYTES, lane, chunk, chunks, 512 * BITS, CHUNKS_A_SET)
                    codes = codes + (its,)
                    tops = tops + (tops_at,)
                most = scaled_codes.reach(at + reach_offset)
            else:  # read a chunk ahead
                direct = direct_next
                if chunk + 1 == chunks:
                    direct_rows = _group_rows(((piece + 1) * WARPS + warp) * TALL, gid, out_features, groups, TALL)
                direct_next = _direct_of_chunk(GroupSc, GroupZp, direct_rows, following, groups, tid, BLOCKS_A_GROUP)
                most = scaled_codes.reach_of_direct(direct)
            if KEPT > 0:
                gl.inline_asm_elementwise(
                    _TURN[8 * TILES + WARPS], "=r,r,r", [x_now + turn_offset, plane_own], dtype=gl.int32, is_pure=False, pack=1
                )
            sums, units = scaled_codes.grow(sums, units, most, BITS)  # a branch, which nothing should wait behind
            x_lane = x_now + (2 * tid ^ gid) * 16
            for s in gl.static_range(4):
                w = ()
                for t in gl.static_range(TALL):
                    slot = ()
                    for k in gl.static_range(BITS):
                        slot = slot + (words[t][k][s],)
                    if BILEVEL:
                        tops_at = tops[t] + 32 // CHUNKS_A_SET * s
                        of_tile = scaled_codes.bilevel_weights(slot, codes[t][s], tops_at, units, for_weights, BITS)
                    else:
                        of_slot = direct[t][s * len(direct[t]) // 4]
                        of_tile = scaled_codes.direct_weights(slot, of_slot, units, for_weights, BITS)
                    w = w + (of_tile,)
                for half in gl.static_range(2):
                    after = ((),) * TALL
                    for n in gl.static_range(TILES):
                        b = read4((x_lane ^ 16 * half) + (8 * _X_PITCH * n + 128 * s))
                        new = ()
                        for t in gl.static_range(TALL):
                            d = (sums[t][4 * n], sums[t][4 * n + 1], sums[t][4 * n + 2], sums[t][4 * n + 3])
                            for c in gl.static_range(2):
                                d = gl.inline_asm_elementwise(
                                    _MMA, _MMA_REGISTERS,
                                    [w[t][4 * half + 2 * c], w[t][8 + 4 * half + 2 * c], w[t][4 * half + 2 * c + 1],
                                     w[t][9 + 4 * half + 2 * c], b[2 * c], b[2 * c + 1], d[0], d[1], d[2], d[3]],
                                    dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
                                )  # fmt: skip
                            new = new + (after[t] + d,)
                        after = new
                    new = ()
                    for t in gl.static_range(TALL):
                        new = new + (sums[t][SUMS:] + after[t],)
                    sums = new
                if KEPT > 0 and s == 2:  # x is turned by all warps by now
                    # with more than two stages, x came after a chunk's outliers: but for those of a program's first chunk
                    waited = position if STAGES == 2 else first
                    gl.inline_asm_elementwise(
                        _WAIT_OUTLIERS, "=r,r,r", [none + position, none + waited], dtype=gl.int32, is_pure=False, pack=1
                    )
            if KEPT > 0:
                outliers = at + (512 * BITS + _STATS_BYTES) - (lane * 16 - tid * 16)
                mine = outliers + mine_offset
                further = ()
                for t in gl.static_range(TALL):
                    further = further + ((counts[0][t], outliers_at, pointers_at, tile_chunks[t] + chunk),)
                one = scaled_codes.one_in_units(units, BITS)
                sums = _add_products(sums, outliers, mine, plane_read, rows, one, ((),) * TALL, KEPT, TILES, TILE_BYTES)
                sums = _add_products(sums, outliers, mine, plane_read, rows, one, further, KEPT, TILES, TILE_BYTES)
                counts = counts[1:]
            then = now
            now = gl.where(now == (STAGES - 1) * STAGE, 0, now + STAGE)
            x_now = 2 * x_read + X_STAGE - x_now
            x_then = 2 * x_own + X_STAGE - x_then
            position += 1
        one_unit = scaled_codes.unit_of(units, BITS)
        total = ()
        for t in gl.static_range(TALL):
            for i in gl.static_range(SUMS):
                if SETS == 2:
                    total = total + ((sums[t][i] + sums[t][SUMS + i]) * one_unit,)
                else:
                    total = total + (sums[t][i] * one_unit,)
        if (begin == 0) & (end == chunks):
            tile = (piece * WARPS + warp) * TALL
            _write(total, Scale, Bias, Y, tile, batch, out_features, gid, tid, SCALED, HAS_BIAS, TILES, TALL, BESIDE)
        else:
            part = Partial + (2 * program + (end == chunks).to(gl.int32)) * (TALL * SUMS * THREADS) + thread
            for i in gl.static_range(TALL * SUMS):
                gl.store(part + i * THREADS, total[i])
            if end < chunks:
                publish(flags + program + none, thread)
        begin = 0
        piece += 1
    gl.inline_asm_elementwise("cp.async.wait_all; mov.b32 $0, $1;", "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)
    if DEPENDENT:
        let_next_begin(thread)

    if (first_chunk > 0) & (first_chunk + (last - first) >= chunks):
        piece_begin = first - first_chunk  # the position of the piece's first chunk
        own_part = Partial + (2 * program + 1) * (TALL * SUMS * THREADS) + thread
        total = ()
        for i in gl.static_range(TALL * SUMS):
            total = total + (gl.load(own_part + i * THREADS),)
        await_parts(flags, program, piece_begin, base, extra, thread)
        PARTS: gl.constexpr = min(8, 64 // (TALL * SUMS))  # so many at once are on their way, as registers hold
        other = program - 1
        while last_position(other, base, extra) > piece_begin:
            parts = ()
            for k in gl.static_range(PARTS):
                part = Partial + 2 * (other - k) * (TALL * SUMS * THREADS) + thread
                there = none + last_position(other - k, base, extra) > piece_begin
                for i in gl.static_range(TALL * SUMS):
                    parts = parts + (gl.load(part + i * THREADS, mask=there, other=0, cache_modifier=".cg"),)
            for k in gl.static_range(PARTS):
                new = ()
                for i in gl.static_range(TALL * SUMS):
                    new = new + (total[i] + parts[k * TALL * SUMS + i],)
                total = new
            other -= PARTS
        tile = (first_piece * WARPS + warp) * TALL
        _write(total, Scale, Bias, Y, tile, batch, out_features, gid, tid, SCALED, HAS_BIAS, TILES, TALL, BESIDE)


_INTEGERS = ("batch", "out_features", "tile_rows", "chunks", "groups", "reciprocal", "base", "extra")


@gluon.jit(do_not_specialize=_INTEGERS)  # one compiled kernel for all shapes
def small_kernel(
    X, Scale, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y, Partial,
    batch, out_features, tile_rows, chunks, groups, reciprocal, base, extra,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SCALED: gl.constexpr,
    BATCH: gl.constexpr, WARPS: gl.constexpr, TALL: gl.constexpr, STAGES: gl.constexpr, KEPT: gl.constexpr,
    SETS: gl.constexpr, ROOM: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """`share_of_product` for every program. The flags stand behind all of Partial."""
    flags = Partial.to(gl.pointer_type(gl.int64)) + gl.num_programs(0) * (16 * TALL * WARPS * BATCH)
    share_of_product(
        gl.program_id(0), X, Scale, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y, Partial, flags,
        batch, out_features, tile_rows, chunks, groups, reciprocal, base, extra, BITS, BILEVEL, BLOCKS_A_GROUP, HAS_BIAS,
        SCALED, BATCH, WARPS, TALL, STAGES, KEPT, SETS, ROOM, DEPENDENT,
    )  # fmt: skip


@dataclass(frozen=True)
class Small:
    """How the kernel runs for a width, the rows of x that a program multiplies with."""

    warps: int
    tall: int  # tiles of a warp
    registers: int  # the limit of a thread's
    resident: int  # programs that a multiprocessor holds
    stages: int  # of chunks in shared memory
    sets: int  # of sums
    least: int  # chunks of a program


WIDTHS = (8, 16, 32)
# Chunks of all tiles, of a matrix without outliers and with them, up to which this kernel is faster with more than 16 rows of x
# than `gemm`, which has to make x anew: those of 4096 x 11008, and of 5120 x 5120, where both take as long; but not those of
# 8192 x 8192 and 4096 x 8192.
WIDE = {False: 256 * 43, True: 320 * 20}
WIDE_BF16 = 128 * 16  # the same for bf16, which is made anew for both: those of 2048 x 4096, with outliers or without
# Chunks of all tiles from which two tiles of a warp leave enough programs: those of 8192 x 8192, and with 16 rows of x and
# outliers those of 11008 x 4096.
LARGE, LARGE_FOR_16 = 512 * 32, 688 * 16
CHOICES = {  # by width, measured on an H200
    8: Small(4, 1, 128, 4, 2, 2, 3), 16: Small(4, 1, 128, 4, 3, 1, 2), 32: Small(4, 1, 168, 3, 2, 1, 2),
}  # fmt: skip
# Of large matrices with bilevel statistics; direct ones wait in registers for a chunk, and for two tiles the loop would spill.
LARGE_CHOICES = {8: Small(4, 2, 128, 4, 2, 1, 2), 16: Small(4, 2, 168, 3, 2, 1, 2)}


class Launches(NamedTuple):
    """The kernels of a product: prepare where x must be made anew. parts: numbers that Partial has."""

    prepare: Launch | None
    product: Launch
    parts: int


@cache
def most_rows(layouts: tuple[Layout, ...], dtype: torch.dtype) -> int:
    """Rows of x up to which this kernel is faster than `gemm` for matrices that share a launch."""
    chunks = sum(layout.tile_rows * (layout.blocks // CHUNK) for layout in layouts)
    wide = WIDE_BF16 if dtype == torch.bfloat16 else WIDE[any(layout.outliers for layout in layouts)]
    return WIDTHS[-1] if chunks <= wide else WIDTHS[-2]


def is_large(width: int, chunks: int, outliers: bool) -> bool:
    """Whether a launch of so many chunks, of all tiles, is large for so many rows of x."""
    return chunks >= (LARGE_FOR_16 if width == 16 and outliers else LARGE)


def choice_for(width: int, bilevel: bool, large: bool) -> Small:
    """How a kernel for so many rows of x runs. large: as `is_large` has it."""
    return LARGE_CHOICES[width] if bilevel and large and width in LARGE_CHOICES else CHOICES[width]


def outliers_of_a_chunk(layout: Layout) -> int:
    """Which of KEPT: enough for nearly all chunks of a matrix whose outliers lie anywhere; 0 where there are none."""
    if not layout.outliers:
        return 0
    mean = 2 * TILE * CELL_COLUMNS * layout.outliers / (layout.out_features * layout.in_features)
    return next((kept for kept in KEPT[1:] if mean + 3 * mean**0.5 <= kept), KEPT[-1])


@cache
def _without_outliers(layout: Layout) -> tuple[Layout, int]:
    """What the launches of a matrix are looked up by: its layout without outliers, as `outliers.without_outliers` has it, and
    `outliers_of_a_chunk`."""
    return outliers.without_outliers(layout)[0], outliers_of_a_chunk(layout)


class Plan(NamedTuple):
    """How matrices of a kind are multiplied with x: the programs of each, what makes x anew where need be, and what the kernel
    is compiled with. sizes: chunks, groups and reciprocal, as the kernel has them."""

    shares: tuple[Share, ...]
    prepare: Launch | None
    constants: dict[str, Any]
    sizes: tuple[int, int, int]

    @property
    def programs(self) -> int:
        """Of all matrices."""
        return sum(share.programs for share in self.shares)

    @property
    def parts(self) -> int:
        """Numbers that Partial has."""
        return self.programs * (2 * 16 * self.constants["WARPS"] * self.constants["TALL"] * self.constants["BATCH"] + 2)


def constants_for(layout: Layout, kept: int, width: int, choice: Small) -> dict[str, Any]:
    """What `share_of_product` is compiled with for so many rows of x, and Triton's options. kept: `outliers_of_a_chunk`."""
    return constants_of(layout) | {
        "BATCH": width, "WARPS": choice.warps, "TALL": choice.tall, "STAGES": choice.stages, "KEPT": kept, "SETS": choice.sets,
        "ROOM": room_bytes(layout.weight_bits, kept, width, choice.warps, choice.tall, choice.stages),
        "num_warps": choice.warps, "maxnreg": choice.registers,
    }  # fmt: skip


def plan_of(layouts: Sequence[Layout], kept: int, batch: int, dtype: torch.dtype, device: torch.device, joined: bool) -> Plan:
    """kept, joined: as in `_launches`."""
    layout = layouts[0]
    chunks, columns = layout.blocks // CHUNK, layout.blocks * TILE
    width = next(width for width in WIDTHS if width >= batch)
    large = is_large(width, sum(each.tile_rows for each in layouts) * chunks, kept > 0)
    choice = choice_for(width, layout.statistics == "bilevel", large)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    every = [ceil_div(each.tile_rows, choice.warps * choice.tall) * chunks for each in layouts]
    shares = share_out(every, max(1, min(multiprocessors * choice.resident, sum(every) // choice.least)))
    scaled = dtype == torch.bfloat16
    overlaps = overlap.options(device, joined)
    prepare = None
    if scaled or columns != layout.in_features:
        prepare = prepare_launch(layout, batch, dtype, device, 0, overlaps)
    constants = {"SCALED": scaled} | overlaps | constants_for(layout, kept, width, choice)
    return Plan(shares, prepare, constants, (chunks, layout.groups, (2**31 - 1) // chunks))


@lru_cache(REMEMBERED)
def _launches(
    layout: Layout, kept: int, batch: int, dtype: torch.dtype, bias: torch.dtype | None, device: torch.device, joined: bool
) -> Launches:  # fmt: skip
    """layout and kept: as `_without_outliers` has them. joined: whether the stored matrix is one tensor."""
    plan = plan_of((layout,), kept, batch, dtype, device, joined)
    dtypes = (torch.float16, torch.float32, *LEAVES.values(), bias or dtype, dtype, torch.float32)
    share = plan.shares[0]
    integers = (batch, layout.out_features, layout.tile_rows, *plan.sizes, share.base, share.extra)
    constants = {"HAS_BIAS": bias is not None} | plan.constants
    product = Launch(small_kernel, (plan.programs, 1), device, dtypes, integers, constants)
    return Launches(plan.prepare, product, plan.parts)


def linear(x: Tensor, tensors: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """x W^T + bias for x fp16 or bf16 [batch, in], batch at most 32, contiguous, and checked operands of a layout of whole
    chunks, not permuted where it has outliers. Returns [batch, out] in x's dtype."""
    batch, dtype = x.shape[0], x.dtype
    given = None if bias is None else bias.dtype
    shape, kept = _without_outliers(layout)
    prepare, product, parts = _launches(shape, kept, batch, dtype, given, x.device, isinstance(tensors, Joined))
    y = x.new_empty((batch, layout.out_features))
    added = y if bias is None else aligned(bias)
    scale = y  # where the kernels are told not to look
    x = aligned(x) if not layout.permuted else x.index_select(1, tensors["perm"])
    if prepare is not None:
        x, scale = prepared(prepare, x, layout, batch)
    partial = torch.empty(parts, dtype=torch.float32, device=x.device)
    product(x.data_ptr(), scale.data_ptr(), *addresses(tensors, layout), added.data_ptr(), y.data_ptr(), partial.data_ptr())
    return y
