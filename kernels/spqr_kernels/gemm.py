"""Batched kernel for NVIDIA Hopper (sm_90): y = x W^T with `wgmma`, outliers fused, from small batches to prefill.

A warp group of 4 warps holds 4 tiles, 64 rows of W: a lane's words become fp16 weights in registers, and these are the A
operand of `wgmma` as they stand; x is B, in shared memory, read once for the 64 rows. The next weights are made while the
tensor cores work. Outliers are added to the weights before the product (`outliers`).

Every sum has one fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from spqr_format.layout import CHUNK, TILE, Layout, ceil_div

from . import outliers
from .checks import aligned
from .lanes import (
    CHUNK_BYTES,
    barrier,
    chunks_at,
    commit_copies,
    copy_async,
    copy_chunks,
    reinterpret,
    room_for_chunks,
    wait_copies,
)
from .weights import dequantize_lane, half_statistics, lane_of_chunk


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
def _add_rest(
    Y, X, Scale, Pointers, Outliers, tile, begin, end, first_row, batch, out_features, tile_rows, cells,
    SCALED: gl.constexpr, ORDERED: gl.constexpr, BATCH: gl.constexpr, WARPS: gl.constexpr, FETCHED: gl.constexpr,
):  # fmt: skip
    """Y += Scale * x times those outliers of a tile's cells begin .. end - 1 that `fetch` left, one by one."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    n = first_row + gl.arange(0, BATCH, layout=gl.SliceLayout(0, layout))
    x_row = X + n.to(gl.int64) * (cells * 128)
    total = gl.zeros([16, BATCH], gl.float32, layout)
    if tile < tile_rows:
        own = Pointers + tile.to(gl.int64) * cells
        for cell in range(begin, end):
            for at in range(gl.load(own + cell) + FETCHED, gl.load(own + cell + 1)):
                word = gl.load(Outliers + at)
                column = word & 127
                if ORDERED:
                    column = (
                        column // 64 * 64 + column % 16 // 4 * 16 + column % 4 // 2 * 8 + column % 64 // 16 * 2 + column % 2
                    )
                x = gl.load(x_row + (cell * 128 + column), mask=n < batch, other=0).to(gl.float32)
                value = (word >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
                total += gl.where(row == ((word >> 12) & 15), value, 0.0)[:, None] * x[None, :]
        if SCALED:
            total *= gl.load(Scale + n, mask=n < batch, other=0)[None, :]
        at2 = Y + n.to(gl.int64)[None, :] * out_features + (tile * 16 + row)[:, None]
        inside = ((tile * 16 + row) < out_features)[:, None] & (n < batch)[None, :]
        gl.store(at2, (gl.load(at2, mask=inside, other=0).to(gl.float32) + total).to(Y.dtype.element_ty), mask=inside)


@gluon.jit
def gemm_kernel(
    X, Scale, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y,
    batch, out_features, tile_rows, chunks, groups, a_split,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    HAS_BIAS: gl.constexpr, SCALED: gl.constexpr, PARTIAL: gl.constexpr, ORDERED: gl.constexpr,
    BATCH: gl.constexpr, WARPS: gl.constexpr, TURN: gl.constexpr,
    ENTRIES: gl.constexpr,
):  # fmt: skip
    """Y[n, o] = Scale[n] sum_i X[n, i] W[o, i] (+ Bias[o]) for BATCH of the n; the sum over chunks of a split where PARTIAL.

    X fp16 [batch, chunks * 256], in the order of `prepare_kernel` where ORDERED. Y [batch, out], or fp32 [splits, batch, out]
    where PARTIAL, without Scale and Bias. TURN slots of 64 columns follow each other between two barriers.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    x_copy: gl.constexpr = gl.BlockedLayout([1, 4 if ORDERED else 1], [4, 8] if ORDERED else [1, 32], [WARPS, 1], [1, 0])
    x_words: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    x_halves: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BATCH, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    # Slots of x in shared memory, and how many turns ahead they are asked for. The products of one slot may still read
    # when the next turn begins, where a turn is one slot.
    RING: gl.constexpr = 8 if TURN == 4 else 4
    AHEAD: gl.constexpr = 2 if TURN == 1 else 1
    thread = gl.arange(0, 32 * WARPS, layout=layout)
    lane = thread % 32
    warp = thread // 32
    gid = lane // 4
    tid = lane % 4
    first_tile = gl.program_id(1) * WARPS
    first_row = gl.program_id(0) * BATCH
    split = gl.program_id(2)
    begin = split * a_split
    end = gl.minimum(begin + a_split, chunks)
    tile = gl.minimum(first_tile + warp, tile_rows - 1)
    row0 = tile * 16 + gid
    row1 = row0 + 8

    words_at, codes_at, tops_at, _, _, _, codes_lane = chunks_at(
        Weight, StatCodes, TileStats, first_tile, tile_rows, chunks, begin, BITS, WARPS, WARPS
    )
    x_row = first_row + gl.arange(0, BATCH, layout=gl.SliceLayout(1, x_copy))[:, None]
    x_word = gl.arange(0, 32, layout=gl.SliceLayout(0, x_copy))[None, :]
    if not ORDERED:  # word 8 c + 4 h + tid of a slot is word 8 tid + 2 c + h of x
        x_word = x_word % 4 * 8 + x_word // 8 * 2 + x_word // 4 % 2
    x_there = x_row < batch
    x_at = X.to(gl.pointer_type(gl.int32)) + gl.minimum(x_row, batch - 1).to(gl.int64) * (chunks * 128) + (begin * 128 + x_word)

    ring = (room_for_chunks(BITS, BILEVEL, WARPS), room_for_chunks(BITS, BILEVEL, WARPS))
    x_ring = ()
    for _ in gl.static_range(RING):
        x_ring = x_ring + (gl.allocate_shared_memory(gl.int32, [BATCH, 32], x_words),)

    there = begin < end
    for turn in gl.static_range(AHEAD):
        if turn == 0:
            copy_chunks(ring[0], words_at, codes_at, tops_at, codes_lane, there, there, there, BITS, BILEVEL)
        for k in gl.static_range(TURN):
            copy_async(x_ring[turn * TURN + k], x_at, mask=x_there & there)
            x_at += 32
        commit_copies()

    if OUTLIERS:
        room = outliers.room_for_cells(2 * WARPS * CHUNK_BYTES[2 * BITS + BILEVEL] + RING * 128 * BATCH, warp, lane)
        cell = (tile * chunks + begin) * 2
        most = outliers.most_in_a_cell(Pointers, cell, (end - begin) * 2, lane)
        rest = gl.max(most, axis=0) > 32 * ENTRIES
        last_cell = tile_rows * chunks * 2
        bound0 = gl.load(Pointers + cell)
        bound1 = gl.load(Pointers + cell + 1)
        bound2 = gl.load(Pointers + cell + 2)
        next0 = outliers.fetch(Outliers, bound0, bound1, lane, ENTRIES)
        if TURN == 4:
            next1 = outliers.fetch(Outliers, bound1, bound2, lane, ENTRIES)
            cell = gl.minimum(cell + 2, last_cell)
            bound0 = bound2
            bound1 = gl.load(Pointers + gl.minimum(cell + 1, last_cell))
            bound2 = gl.load(Pointers + gl.minimum(cell + 2, last_cell))

    acc = gl.zeros([16 * WARPS, BATCH], gl.float32, mma)
    for chunk in range(begin, end, 2):
        for j in gl.static_range(2):
            for s in gl.static_range(4):
                if s % TURN == 0:
                    wait_copies(AHEAD - 1)
                    hopper.fence_async_shared()
                    # what is asked for now: slots TURN * AHEAD further on
                    wanted = chunk + (4 * j + s + TURN * AHEAD) // 4 < end
                    if (4 * j + s + TURN * AHEAD) % 4 == 0:
                        words_at += 128 * BITS
                        codes_at += 48
                        tops_at += 16
                        copy_chunks(
                            ring[(4 * j + s + TURN * AHEAD) // 4 % 2], words_at, codes_at, tops_at, codes_lane, wanted, wanted,
                            wanted, BITS, BILEVEL,
                        )  # fmt: skip
                    for k in gl.static_range(TURN):
                        copy_async(x_ring[(4 * j + s + TURN * AHEAD + k) % RING], x_at, mask=x_there & wanted)
                        x_at += 32
                    commit_copies()
                if s == 0:
                    slots, codes, tops = lane_of_chunk(ring[j], tid, layout, BITS, BILEVEL)
                if OUTLIERS:
                    if TURN == 4:
                        if s == 0:
                            # Those of the next chunk now, right behind the fence: the next fence would wait for them.
                            words0 = next0
                            words1 = next1
                            next0 = outliers.fetch(Outliers, bound0, bound1, lane, ENTRIES)
                            next1 = outliers.fetch(Outliers, bound1, bound2, lane, ENTRIES)
                            cell = gl.minimum(cell + 2, last_cell)
                            bound0 = bound2
                            bound1 = gl.load(Pointers + gl.minimum(cell + 1, last_cell))
                            bound2 = gl.load(Pointers + gl.minimum(cell + 2, last_cell))
                    elif s % 2 == 0:  # those of the next half, for want of registers
                        words0 = next0
                        words1 = next0
                        next0 = outliers.fetch(Outliers, bound1, bound2, lane, ENTRIES)
                        bound1 = bound2
                        cell += 1
                        bound2 = gl.load(Pointers + gl.minimum(cell + 2, last_cell))
                    if s == 0:
                        room, places = outliers.put(room, words0, ENTRIES)
                    if s == 2:
                        room, places = outliers.put(room, words1, ENTRIES)
                block = (chunk + j) * 16 + 4 * s + tid
                s0, o0, s1, o1 = half_statistics(
                    codes[s], tops[s], GroupSc, GroupZp, row0, row1, out_features, groups, block, BLOCKS_A_GROUP, BITS, BILEVEL
                )
                weights = dequantize_lane(slots[s], s0, o0, s1, o1, BITS)
                if OUTLIERS:
                    weights = outliers.add(weights, room, lane, s % 2)
                    if s == 1:
                        room = outliers.clear(room, words0, places, ENTRIES)
                    if s == 3:
                        room = outliers.clear(room, words1, places, ENTRIES)
                a = _operand(weights, operand)
                x = reinterpret(x_ring[(4 * j + s) % RING], gl.float16, [BATCH, 64], x_halves)
                acc = hopper.warpgroup_mma(a, x.permute((1, 0)), acc, is_async=True)
                # The product before is done; of this turn's last one the next turn must not overwrite x. And none is left at
                # the end of the loop: the assembler was seen to read the sums above a wait that follows the loop.
                if (AHEAD == 1 and s % TURN == TURN - 1) or (j == 1 and s == 3):
                    acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
                else:
                    acc = hopper.warpgroup_mma_wait(1, deps=(acc,))
    wait_copies(0)
    total = hopper.warpgroup_mma_wait(0, deps=(acc,))

    row = first_tile * 16 + gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(1, mma))[:, None]
    n = first_row + gl.arange(0, BATCH, layout=gl.SliceLayout(0, mma))[None, :]
    inside = (row < out_features) & (n < batch)
    if PARTIAL:
        Y += split.to(gl.int64) * batch * out_features
    else:
        if SCALED:
            total *= gl.load(Scale + n, mask=n < batch, other=0)
        if HAS_BIAS:
            total += gl.load(Bias + row, mask=row < out_features, other=0).to(gl.float32)
    gl.store(Y + n.to(gl.int64) * out_features + row, total.to(Y.dtype.element_ty), mask=inside)
    if OUTLIERS:  # noqa: SIM102, the compiler's condition and the GPU's
        if rest:
            barrier()
            for each in range(WARPS):
                _add_rest(
                    Y, X, Scale, Pointers, Outliers, first_tile + each, 2 * begin, 2 * end, first_row, batch, out_features,
                    tile_rows, 2 * chunks,
                    SCALED and not PARTIAL, ORDERED, BATCH, WARPS, 32 * ENTRIES,
                )  # fmt: skip


@gluon.jit
def finish_kernel(
    Partial, Scale, Bias, Y, size, out_features, splits,
    SCALED: gl.constexpr, HAS_BIAS: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Y [batch, out] = Scale * (sum over splits of Partial) + Bias; size is batch * out."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    at = gl.program_id(0).to(gl.int64) * BLOCK + gl.arange(0, BLOCK, layout=layout)
    inside = at < size
    total = gl.zeros([BLOCK], gl.float32, layout)
    source = Partial + at
    for _ in range(splits):
        total += gl.load(source, mask=inside, other=0)
        source += size
    if SCALED:
        total *= gl.load(Scale + at // out_features, mask=inside, other=0)
    if HAS_BIAS:
        total += gl.load(Bias + at % out_features, mask=inside, other=0).to(gl.float32)
    gl.store(Y + at, total.to(Y.dtype.element_ty), mask=inside)


@gluon.jit
def prepare_kernel(
    X, Out, Scale, in_features, columns,
    SCALED: gl.constexpr, ORDERED: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """A row of X [batch, in_features] in fp16, Out [batch, columns], zeros behind in_features.

    SCALED: by a power of two that brings its largest value below 2**15, with the inverse in Scale; exact for all that is
    within 2**-29 of the largest. ORDERED: column 16 b + 4 c + 2 h + i of each 64 stands at 16 c + 8 h + 2 b + i. A program
    takes BLOCK columns, or a whole row where SCALED."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    row = gl.program_id(0).to(gl.int64)
    begin = gl.program_id(1) * BLOCK
    end = begin + BLOCK
    near = gl.arange(0, BLOCK, layout=layout)
    factor = 1.0
    if SCALED:
        end = columns
        largest = gl.zeros([BLOCK], gl.float32, layout)
        for at in range(0, in_features, BLOCK):
            x = gl.load(X + row * in_features + at + near, mask=at + near < in_features, other=0)
            largest = gl.maximum(largest, gl.abs(x.to(gl.float32)))
        # fields of the exponent: 268 - e brings 2**(e - 127) to 2**14; 253 at most, for its inverse to be no subnormal
        exponent = gl.minimum(268 - (gl.max(largest, axis=0).to(gl.int32, bitcast=True) >> 23), 253)
        factor = (exponent << 23).to(gl.float32, bitcast=True)
        gl.store(Scale + row, ((254 - exponent) << 23).to(gl.float32, bitcast=True))
    for at in range(begin, end, BLOCK):
        to = at + near
        source = to
        if ORDERED:
            source = to // 64 * 64 + to % 8 // 2 * 16 + to % 64 // 16 * 4 + to % 16 // 8 * 2 + to % 2
        x = gl.load(X + row * in_features + source, mask=source < in_features, other=0)
        gl.store(Out + row * columns + to, (x.to(gl.float32) * factor).to(gl.float16), mask=to < columns)


# By the rows of x that a program multiplies with: warps, slots a turn, the limit of registers, and how many programs are wanted
# before the columns are split no further (measured on an H200).
CHOICES = {
    8: (4, 4, 128, 512), 16: (4, 4, 128, 512), 32: (4, 2, 128, 384), 64: (4, 4, 168, 256), 128: (8, 1, None, 96),
    256: (8, 1, None, 1),
}  # fmt: skip
_FULL = 100  # programs of 256 that fill the GPU; for fewer, those of 128
_LEAST_CHUNKS = 4  # of a split
IN_ORDER = 32  # from this batch on, copies of 16 bytes of a reordered x are faster than copies of 4 bytes


def linear(x: Tensor, tensors: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """x W^T + bias for x fp16 or bf16 [batch, in], contiguous, and checked operands of a layout of whole chunks, not
    permuted where it has outliers. Returns [batch, out] in x's dtype."""
    out_dtype = x.dtype
    batch = x.shape[0]
    padded = next((n for n in CHOICES if n >= batch), 256)
    if padded == 256 and ceil_div(layout.tile_rows, CHOICES[256][0]) * ceil_div(batch, 256) < _FULL:
        padded = 128
    warps, turn, registers, programs = CHOICES[padded]
    ordered = padded >= IN_ORDER
    if layout.permuted:
        x = x.index_select(1, tensors["perm"])
    columns = layout.blocks * TILE
    scaled = x.dtype == torch.bfloat16  # weights are exact enough in fp16 but not in bf16
    scale = torch.empty(batch, dtype=torch.float32, device=x.device) if scaled else None
    if scaled or ordered or columns != layout.in_features:
        given, x = x, torch.empty(batch, columns, dtype=torch.float16, device=x.device)
        prepare_kernel[(batch, 1 if scaled else ceil_div(columns, 2048))](
            given,
            x,
            x if scale is None else scale,
            layout.in_features,
            columns,
            SCALED=scaled,
            ORDERED=ordered,
            BLOCK=2048,
            num_warps=4,
        )
    x = aligned(x)
    chunks = layout.blocks // CHUNK
    tiles, parts = ceil_div(layout.tile_rows, warps), ceil_div(batch, padded)
    splits = 1
    while tiles * parts * splits < programs and chunks >= 2 * splits * _LEAST_CHUNKS:
        splits *= 2
    a_split = ceil_div(chunks, splits)
    splits = ceil_div(chunks, a_split)
    y = torch.empty(batch, layout.out_features, dtype=out_dtype, device=x.device)
    out = y if splits == 1 else torch.empty(splits, batch, layout.out_features, dtype=torch.float32, device=x.device)
    unused = tensors["weight"]
    limit = {"maxnreg": registers} if registers else {}
    gemm_kernel[(parts, tiles, splits)](
        x, unused if scale is None else scale, tensors["weight"], tensors.get("stat_codes", unused),
        tensors.get("tile_stats", unused), tensors.get("group_sc", unused), tensors.get("group_zp", unused),
        tensors.get("outlier_ptr", unused), tensors.get("outliers", unused), unused if bias is None else bias, out,
        batch, layout.out_features, layout.tile_rows, chunks, layout.groups, a_split,
        BITS=layout.weight_bits, BILEVEL=layout.statistics == "bilevel", BLOCKS_A_GROUP=layout.group_size // TILE,
        OUTLIERS=layout.outliers > 0, HAS_BIAS=bias is not None, SCALED=scale is not None,
        PARTIAL=splits > 1, ORDERED=ordered, BATCH=padded, WARPS=warps, TURN=turn,
        ENTRIES=outliers.outliers_a_lane(layout), num_warps=warps, **limit,
    )  # fmt: skip
    if splits > 1:
        size = batch * layout.out_features
        finish_kernel[(ceil_div(size, 512),)](
            out, unused if scale is None else scale, unused if bias is None else bias, y, size, layout.out_features, splits,
            SCALED=scale is not None, HAS_BIAS=bias is not None, BLOCK=512, num_warps=4,
        )  # fmt: skip
    return y
