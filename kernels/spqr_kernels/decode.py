"""Decode kernel for NVIDIA GPUs (sm_80 and newer): y = x W^T for a small batch, on tensor cores, outliers fused.

A program takes TILES tiles of 16 rows; WARPS / TILES warps share the columns of each. Chunks of 256 columns and the part of x
that meets them arrive in shared memory by asynchronous copies. A lane brings its words to fp16 weights in registers, and
these are the A fragment of `mma.m16n8k16` as they stand; the batch is the N of the product, and one 16-byte read of x in
shared memory is B of two products. Every sum has one fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import CHUNK, TILE, Layout, ceil_div

from . import outliers, ptx
from .checks import aligned
from .lanes import (
    chunk_bytes,
    chunks_at,
    codes_step,
    commit_copies,
    copy_async,
    copy_chunks,
    room_for_chunks,
    wait_copies,
)
from .launch import LEAVES, REMEMBERED, Launch, addresses, constants_of
from .weights import dequantize_lane, half_statistics, lane_of_chunk

REGISTERS = {64: 255}  # limit for a thread by padded batch, where the compiler's own choice spills
_MMA = gl.constexpr(ptx.MMA)
_MMA_REGISTERS = gl.constexpr(ptx.MMA_CONSTRAINTS)


def _bases(first: int, last: int, dim: int, rank: int = 2) -> list[list[int]]:
    """Bases of a linear layout: powers of two from first on and below last, along dim."""
    found = []
    while first < last:
        found.append([first if d == dim else 0 for d in range(rank)])
        first *= 2
    return found


# Layouts by warps * 16 + tiles: warps along parts of the columns (dim 1, a part is 32 words) but not along tiles.
_PARTS = gl.constexpr({
    warps * 16 + tiles: [[0, 0]] * (tiles.bit_length() - 1) + _bases(32, 32 * warps // tiles, 1)
    for warps in (1, 2, 4, 8, 16) for tiles in (1, 2, 4, 8) if tiles <= warps
})  # fmt: skip
_X_SHARED = gl.constexpr({
    split * 256 + batch: [[0, 1], [0, 2], [0, 8], [0, 16], [1, 0], [2, 0], [4, 0], [0, 4], *_bases(32, 32 * split, 1),
                          *_bases(8, batch, 0)]
    for split in (1, 2, 4, 8) for batch in (8, 16, 32, 64)
})  # fmt: skip


@gluon.jit
def _to_lanes(value, TILES: gl.constexpr, layout: gl.constexpr):
    """[parts, 8 gid, 4 tid], equal for all tiles, to [32 * WARPS]."""
    SPLIT: gl.constexpr = value.shape[0]
    hyper: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1], [1, 1, 8, 4], [SPLIT, TILES, 1, 1], [3, 2, 1, 0])
    value = gl.expand_dims(gl.convert_layout(value, gl.SliceLayout(1, hyper), assert_trivial=True), 1)
    value = value + gl.zeros([SPLIT, TILES, 8, 4], value.dtype, hyper)
    return gl.convert_layout(gl.reshape(value, [32 * SPLIT * TILES]), layout, assert_trivial=True)


@gluon.jit
def _eight_of_x(buffer, TILES: gl.constexpr, SPLIT: gl.constexpr, read: gl.constexpr, layout: gl.constexpr):
    """[8 of the batch, parts * 32] words to the eight of block tid for batch column gid."""
    t = gl.permute(gl.reshape(buffer.load(read), [8, SPLIT, 4, 2, 2, 2]), [1, 0, 2, 3, 4, 5])
    even, odd = gl.split(t)
    w0, w2 = gl.split(even)
    w1, w3 = gl.split(odd)
    x0, x4 = gl.split(w0)
    x1, x5 = gl.split(w1)
    x2, x6 = gl.split(w2)
    x3, x7 = gl.split(w3)
    return (
        _to_lanes(x0, TILES, layout), _to_lanes(x1, TILES, layout), _to_lanes(x2, TILES, layout),
        _to_lanes(x3, TILES, layout), _to_lanes(x4, TILES, layout), _to_lanes(x5, TILES, layout),
        _to_lanes(x6, TILES, layout), _to_lanes(x7, TILES, layout),
    )  # fmt: skip


@gluon.jit
def _multiply(a, x, c):
    """c plus the product of the weights of one block with x."""
    for i in gl.static_range(4):
        c = gl.inline_asm_elementwise(
            _MMA, _MMA_REGISTERS,
            [a[2 * i], a[8 + 2 * i], a[2 * i + 1], a[9 + 2 * i], x[2 * i], x[2 * i + 1], c[0], c[1], c[2], c[3]],
            dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    return c


@gluon.jit
def decode_kernel(
    X, Scale, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y,
    batch, out_features, tile_rows, chunks, groups,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    HAS_BIAS: gl.constexpr, SCALED: gl.constexpr, WHOLE: gl.constexpr, FULL: gl.constexpr,
    BATCH: gl.constexpr, WARPS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
    ENTRIES: gl.constexpr,
):  # fmt: skip
    """Y[n, o] = Scale[n] sum_i X[n, i] W[o, i] (+ Bias[o]), n < batch <= BATCH, a multiple of 8.

    X fp16 [batch, chunks * 256], permuted where need be. Scale fp32 [batch] where SCALED. Y [batch, out], contiguous.
    Statistics: direct, or bilevel with groups of 16, 32 or 64. WHOLE: chunks is a multiple of STAGES * WARPS / TILES. FULL:
    batch is BATCH."""
    SPLIT: gl.constexpr = WARPS // TILES
    CHUNKS_A_SET: gl.constexpr = BLOCKS_A_GROUP if BILEVEL else 1
    NT: gl.constexpr = BATCH // 8
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    x_copy: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    x_shared: gl.constexpr = gl.SharedLinearLayout(_X_SHARED[SPLIT * 256 + BATCH])
    parts: gl.constexpr = _PARTS[WARPS * 16 + TILES]
    x_read: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], parts, [], [8, 32 * SPLIT]
    )
    spread: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 1, 32, 1], [SPLIT, TILES, 1, 1], [3, 2, 1, 0])
    final: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    thread = gl.arange(0, 32 * WARPS, layout=layout)
    lane = thread % 32
    warp = thread // 32
    gid = lane // 4
    tid = lane % 4
    first_tile = gl.program_id(0) * TILES
    tile = gl.minimum(first_tile + warp % TILES, tile_rows - 1)
    part = warp // TILES
    row0 = tile * 16 + gid
    row1 = row0 + 8
    zero = gl.zeros([32 * WARPS], gl.float32, layout)

    words_at, codes_at, tops_at, words_chunk, codes_chunk, tops_chunk, codes_lane = chunks_at(
        Weight, StatCodes, TileStats, first_tile, tile_rows, chunks, 0, BITS, CHUNKS_A_SET, WARPS, TILES
    )
    x_row = gl.arange(0, BATCH, layout=gl.SliceLayout(1, x_copy))[:, None]
    x_word = gl.arange(0, 32 * SPLIT, layout=gl.SliceLayout(0, x_copy))[None, :]
    x_part = x_word // 32
    x_at = X.to(gl.pointer_type(gl.int32)) + x_row.to(gl.int64) * (chunks * 128) + (x_part * 128 + x_word % 32)

    ring = ()
    x_ring = ()
    for _ in gl.static_range(STAGES):
        ring = ring + (room_for_chunks(BITS, BILEVEL, CHUNKS_A_SET, WARPS),)
        blocks = ()
        for _j in gl.static_range(4):
            blocks = blocks + (gl.allocate_shared_memory(gl.int32, [BATCH, 32 * SPLIT], x_shared),)
        x_ring = x_ring + (blocks,)
    for j in gl.static_range(STAGES - 1):
        copy_chunks(
            ring[j], words_at, codes_at, tops_at, codes_lane, SPLIT * j + words_chunk < chunks,
            SPLIT * j + codes_chunk < chunks, SPLIT * j + tops_chunk < chunks, SPLIT * j + codes_chunk, chunks, BITS, BILEVEL,
            CHUNKS_A_SET,
        )  # fmt: skip
        for k in gl.static_range(4):
            copy_async(x_ring[j][k], x_at + 32 * k, mask=(SPLIT * j + x_part < chunks) & (x_row < batch))
        commit_copies()
        words_at += SPLIT * 128 * BITS
        codes_at += codes_step(SPLIT, CHUNKS_A_SET)
        tops_at += SPLIT * (16 // CHUNKS_A_SET)
        x_at += SPLIT * 128

    if OUTLIERS:
        room = outliers.room_for_cells(
            STAGES * (WARPS * chunk_bytes(BITS, BILEVEL, CHUNKS_A_SET) + 512 * BATCH * SPLIT), warp, lane
        )
        cell = (tile * chunks + part) * 2  # the next one to be fetched
        last_cell = tile_rows * chunks * 2 - 2
        begin0 = gl.load(Pointers + gl.minimum(cell, last_cell))
        begin1 = gl.load(Pointers + gl.minimum(cell, last_cell) + 1)
        begin2 = gl.load(Pointers + gl.minimum(cell, last_cell) + 2)
        words = outliers.fetch(Outliers, begin0, begin1, lane, ENTRIES)
        most = begin1 - begin0

    acc = ((zero, zero, zero, zero),)
    for _ in gl.static_range(1, NT):
        acc = acc + ((zero, zero, zero, zero),)
    chunk = part
    for begin in range(0, chunks, SPLIT * STAGES):
        for j in gl.static_range(STAGES):
            wait_copies(STAGES - 2)
            now = ring[j]
            x_now = x_ring[j]
            then = ring[(j + STAGES - 1) % STAGES]
            x_then = x_ring[(j + STAGES - 1) % STAGES]
            ahead = begin + SPLIT * (j + STAGES - 1)
            if WHOLE:
                more = ahead < chunks
                copy_chunks(
                    then, words_at, codes_at, tops_at, codes_lane, more, more, more, ahead + codes_chunk, chunks, BITS, BILEVEL,
                    CHUNKS_A_SET,
                )  # fmt: skip
                for k in gl.static_range(4):
                    if FULL:
                        copy_async(x_then[k], x_at + 32 * k, mask=more)
                    else:
                        copy_async(x_then[k], x_at + 32 * k, mask=more & (x_row < batch))
            else:
                copy_chunks(
                    then, words_at, codes_at, tops_at, codes_lane, ahead + words_chunk < chunks,
                    ahead + codes_chunk < chunks, ahead + tops_chunk < chunks, ahead + codes_chunk, chunks, BITS, BILEVEL,
                    CHUNKS_A_SET,
                )  # fmt: skip
                for k in gl.static_range(4):
                    copy_async(x_then[k], x_at + 32 * k, mask=(ahead + x_part < chunks) & (x_row < batch))
            commit_copies()
            words_at += SPLIT * 128 * BITS
            codes_at += codes_step(SPLIT, CHUNKS_A_SET)
            tops_at += SPLIT * (16 // CHUNKS_A_SET)
            x_at += SPLIT * 128
            slots, codes, tops = lane_of_chunk(
                now, StatCodes, tile, chunk, begin + SPLIT * (j + 1) - 1, chunks, groups, gid, tid, layout, BITS, BILEVEL,
                CHUNKS_A_SET,
            )  # fmt: skip
            for k in gl.static_range(4):
                if OUTLIERS and k % 2 == 0:
                    room, places = outliers.put(room, words, ENTRIES)
                    put_words = words
                    if k == 0:
                        words = outliers.fetch(Outliers, begin1, begin2, lane, ENTRIES)
                        most = gl.maximum(most, begin2 - begin1)
                        cell += 2 * SPLIT
                        begin0 = gl.load(Pointers + gl.minimum(cell, last_cell))
                        begin1 = gl.load(Pointers + gl.minimum(cell, last_cell) + 1)
                        begin2 = gl.load(Pointers + gl.minimum(cell, last_cell) + 2)
                    else:
                        words = outliers.fetch(Outliers, begin0, begin1, lane, ENTRIES)
                        most = gl.maximum(most, begin1 - begin0)
                s0, o0, s1, o1 = half_statistics(
                    codes[k], tops[k], GroupSc, GroupZp, row0, row1, out_features, groups, chunk * 16 + 4 * k + tid,
                    BLOCKS_A_GROUP, BITS, BILEVEL,
                )  # fmt: skip
                weights = dequantize_lane(slots[k], s0, o0, s1, o1, BITS)
                if OUTLIERS:
                    weights = outliers.add(weights, room, lane, k % 2)
                    if k % 2 == 1:
                        room = outliers.clear(room, put_words, places, ENTRIES)
                updated = ()
                for t in gl.static_range(NT):
                    x = _eight_of_x(x_now[k].slice(8 * t, 8, 0), TILES, SPLIT, x_read, layout)
                    updated = updated + (_multiply(weights, x, acc[t]),)
                acc = updated
            chunk += SPLIT

    wait_copies(0)
    if OUTLIERS:  # noqa: SIM102, the compiler's condition and the GPU's
        if gl.max(most, axis=0) > 32 * ENTRIES:  # what did not fit, one by one
            own = Pointers + tile.to(gl.int64) * (2 * chunks)
            for which in range(0, 2 * chunks):
                cell_first = gl.load(own + which)
                cell_end = gl.load(own + which + 1)
                for extra in range(32 * ENTRIES, gl.max(cell_end - cell_first, axis=0)):
                    there = (cell_first + extra < cell_end) & (which // 2 % SPLIT == part)
                    word = gl.load(Outliers + cell_first + extra, mask=there, other=0)
                    value = (word >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
                    value0 = gl.where(((word >> 12) & 15) == gid, value, 0.0)
                    value1 = gl.where(((word >> 12) & 15) == gid + 8, value, 0.0)
                    x_cell = X + (word & 127) + which * 128
                    updated = ()
                    for part8 in gl.static_range(NT):
                        x_row8 = 8 * part8 + 2 * tid
                        extra0 = gl.load(
                            x_cell + x_row8.to(gl.int64) * (chunks * 256), mask=there & (x_row8 < batch), other=0
                        ).to(gl.float32)
                        extra1 = gl.load(
                            x_cell + (x_row8 + 1).to(gl.int64) * (chunks * 256), mask=there & (x_row8 + 1 < batch), other=0
                        ).to(gl.float32)
                        sums8 = acc[part8]
                        updated = updated + (
                            (
                                sums8[0] + value0 * extra0,
                                sums8[1] + value0 * extra1,
                                sums8[2] + value1 * extra0,
                                sums8[3] + value1 * extra1,
                            ),
                        )
                    acc = updated
    lane2 = gl.arange(0, 32 * TILES, layout=gl.SliceLayout(1, final))[:, None]
    value2 = gl.arange(0, 4, layout=gl.SliceLayout(0, final))[None, :]
    out_row = (first_tile + lane2 // 32) * 16 + lane2 % 32 // 4 + 8 * (value2 // 2)
    for t in gl.static_range(NT):
        c = acc[t]
        # [parts, tiles, lanes, row half, batch parity]
        values = gl.reshape(gl.join(gl.join(c[0], c[2]), gl.join(c[1], c[3])), [SPLIT, TILES, 32, 4])
        total = gl.reshape(gl.sum(gl.convert_layout(values, spread), axis=0), [TILES * 32, 4])
        total = gl.convert_layout(total, final)
        n = 8 * t + 2 * (lane2 % 4) + value2 % 2
        there = (out_row < out_features) & (n < batch)
        if SCALED:
            total *= gl.load(Scale + n, mask=n < batch, other=0)
        if HAS_BIAS:
            total += gl.load(Bias + out_row, mask=out_row < out_features, other=0).to(gl.float32)
        gl.store(Y + n.to(gl.int64) * out_features + out_row, total.to(Y.dtype.element_ty), mask=there)


def tiles_and_warps(layout: Layout, batch: int) -> tuple[int, int]:
    """Tiles of a program and its warps: few tiles fill the GPU, many read x less often (measured on an H200)."""
    tiles = 8 if batch > 4 and layout.tile_rows >= 600 else 4
    warps = 8
    while warps > tiles and warps // tiles > max(1, layout.blocks // CHUNK):
        warps //= 2
    return tiles, warps


@lru_cache(REMEMBERED)
def _launch(
    layout: Layout, entries: int, batch: int, dtype: torch.dtype, bias: torch.dtype | None, device: torch.device
) -> Launch:
    """layout and entries: as `outliers.without_outliers` has them."""
    padded = max(8, 1 << (batch - 1).bit_length())
    (tiles, warps), stages = tiles_and_warps(layout, batch), 2
    chunks = layout.blocks // CHUNK
    dtypes = (torch.float16, torch.float32, *LEAVES.values(), bias or dtype, dtype)
    integers = (batch, layout.out_features, layout.tile_rows, chunks, layout.groups)
    constants = constants_of(layout) | {
        "OUTLIERS": entries > 0, "HAS_BIAS": bias is not None, "SCALED": dtype == torch.bfloat16,
        "WHOLE": chunks % (warps // tiles * stages) == 0, "FULL": padded == batch, "BATCH": padded, "WARPS": warps,
        "TILES": tiles, "STAGES": stages, "ENTRIES": max(entries, 1), "num_warps": warps,
    } | ({"maxnreg": REGISTERS[padded]} if padded in REGISTERS else {})  # fmt: skip
    return Launch(decode_kernel, (ceil_div(layout.tile_rows, tiles), 1), device, dtypes, integers, constants)


def linear(x: Tensor, tensors: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """x W^T + bias for x fp16 or bf16 [batch, in], contiguous, batch 1..64, and checked operands of a layout of
    whole chunks. Returns [batch, out] in x's dtype."""
    out_dtype = x.dtype
    batch = x.shape[0]
    scale = None
    if x.dtype == torch.bfloat16:
        # Weights are exact enough in fp16 but not in bf16, so x goes to fp16 by a power of two for each row: exact for all
        # that is within 2**-29 of the row's largest.
        exponent = torch.frexp(x.abs().amax(dim=1, keepdim=True).float()).exponent
        scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 15)
        x = torch.ldexp(x.float(), 15 - exponent).to(torch.float16)
    dense = aligned(x) if not layout.permuted else x.index_select(1, tensors["perm"])
    if layout.in_features % TILE:
        dense = torch.nn.functional.pad(dense, (0, layout.blocks * TILE - layout.in_features))
    y = torch.empty(batch, layout.out_features, dtype=out_dtype, device=x.device)
    added = None if bias is None else aligned(bias)
    shape, entries = outliers.without_outliers(layout)
    launch = _launch(shape, entries, batch, out_dtype, None if bias is None else bias.dtype, x.device)
    launch(
        dense.data_ptr(), (y if scale is None else scale).data_ptr(), *addresses(tensors, layout),
        (y if added is None else added).data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return y
