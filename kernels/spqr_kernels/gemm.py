"""Batched kernel for NVIDIA Hopper (sm_90): y = x W^T with `wgmma`, outliers fused, from 17 rows of x to prefill.

A warp group of 4 warps holds 4 tiles, 64 rows of W: a lane's words become fp16 weights in registers, and these are the A
operand of `wgmma` as they stand; x is B, in shared memory, read once for the 64 rows. The next weights are made while the
tensor cores work. Outliers are added to the weights before the product (`outliers`).

Every sum has one fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from spqr_format.layout import CHUNK, TILE, Layout, ceil_div

from . import outliers, overlap
from .checks import aligned
from .gemm_plan import CHOICES, Plan, plan_for
from .joined import Joined
from .lanes import (
    barrier,
    chunk_bytes,
    chunks_at,
    codes_step,
    commit_copies,
    copy_box,
    copy_chunks,
    reinterpret,
    room_for_chunks,
    wait_copies,
)
from .launch import LEAVES, REMEMBERED, Launch, addresses, constants_of
from .overlap import await_previous, let_next_begin
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
    Y, stride, X, Scale, Pointers, Outliers, tile, begin, end, first_row, batch, out_features, tile_rows, cells,
    SCALED: gl.constexpr, BATCH: gl.constexpr, WARPS: gl.constexpr, FETCHED: gl.constexpr,
):  # fmt: skip
    """Y += Scale * x times those outliers of a tile's cells begin .. end - 1 that `fetch` left, one by one. Y points to the
    tile's first row in the first row of x, and from one row of x to the next it is `stride`."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    near = gl.arange(0, BATCH, layout=gl.SliceLayout(0, layout))
    n = first_row + near
    x_row = X + n.to(gl.int64) * (cells * 128)
    total = gl.zeros([16, BATCH], gl.float32, layout)
    if tile < tile_rows:
        own = Pointers + tile.to(gl.int64) * cells
        for cell in range(begin, end):
            for at in range(gl.load(own + cell) + FETCHED, gl.load(own + cell + 1)):
                word = gl.load(Outliers + at)
                column = word & 127
                column = column // 64 * 64 + column % 16 // 4 * 16 + column % 4 // 2 * 8 + column % 64 // 16 * 2 + column % 2
                x = gl.load(x_row + (cell * 128 + column), mask=n < batch, other=0).to(gl.float32)
                value = (word >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
                total += gl.where(row == ((word >> 12) & 15), value, 0.0)[:, None] * x[None, :]
        if SCALED:
            total *= gl.load(Scale + n, mask=n < batch, other=0)[None, :]
        at2 = Y + near.to(gl.int64)[None, :] * stride + row[:, None]
        inside = ((tile * 16 + row) < out_features)[:, None] & (n < batch)[None, :]
        gl.store(at2, (gl.load(at2, mask=inside, other=0).to(gl.float32) + total).to(Y.dtype.element_ty), mask=inside)


@gluon.jit
def _expect(arrived, asked: gl.constexpr, chunk, begin, end, TURN: gl.constexpr, RING: gl.constexpr, BATCH: gl.constexpr):
    """Tells the barrier of TURN slots of x, from number `asked` on behind those before `chunk`, what `_ask` will copy."""
    waited = chunk + asked // 4 < begin + (end - begin + 1) // 2 * 2  # by a pair of chunks
    mbarrier.expect(arrived[asked % RING // TURN], TURN * BATCH * 128, pred=waited)


@gluon.jit
def _ask(
    Map, arrived, x_ring, asked: gl.constexpr, chunk, first_row, begin, end,
    TURN: gl.constexpr, RING: gl.constexpr, BATCH: gl.constexpr,
):  # fmt: skip
    """Begins to copy the slots of x that `_expect` told of. What is not there becomes zeros."""
    waited = chunk + asked // 4 < begin + (end - begin + 1) // 2 * 2
    row = gl.where(chunk + asked // 4 < end, first_row, 1 << 30)  # outside of the map are zeros
    turn: gl.constexpr = asked % RING // TURN
    slots: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)
    room = reinterpret(x_ring[turn], gl.float16, [TURN, BATCH, 64], slots)
    copy_box(Map, [chunk * 4 + asked, row, 0], arrived[turn], room, pred=waited)


@gluon.jit
def gemm_kernel(
    X, Map, Scale, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y, Partial,
    batch, out_features, tile_rows, chunks, groups, parts, whole, splits, a_split,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, OUTLIERS: gl.constexpr,
    HAS_BIAS: gl.constexpr, SCALED: gl.constexpr, SPLIT: gl.constexpr,
    BATCH: gl.constexpr, WARPS: gl.constexpr, TURN: gl.constexpr, ENTRIES: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Y[n, o] = Scale[n] sum_i X[n, i] W[o, i] (+ Bias[o]), Y [batch, out].

    A piece of Y is BATCH of the n and 16 * WARPS of the o; pieces are counted along n first, in `parts`. The first `whole`
    programs make one piece each. Behind them, where SPLIT, `splits` programs share a piece: each writes its sum over a_split
    chunks to Partial fp32 [program - whole, BATCH, 16 * WARPS], for `finish_kernel`.
    X fp16 [batch, chunks * 256] in the order of `prepare_kernel`, and Map is its tensor map, by which it is copied. TURN
    slots of 64 columns, 1 or 2, follow each other between two barriers.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    x_halves: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BATCH, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    # Slots of x in shared memory, and how many turns ahead they are asked for. The products of one slot may still read
    # when the next turn begins, where a turn is one slot.
    RING: gl.constexpr = 4
    AHEAD: gl.constexpr = 2 if TURN == 1 else 1
    CHUNKS_A_SET: gl.constexpr = BLOCKS_A_GROUP if BILEVEL else 1
    thread = gl.arange(0, 32 * WARPS, layout=layout)
    lane = thread % 32
    warp = thread // 32
    gid = lane // 4
    tid = lane % 4
    piece = gl.program_id(0)
    behind = piece - whole
    begin = 0
    end = chunks
    if SPLIT:  # noqa: SIM102, the compiler's condition and the GPU's
        if behind >= 0:
            piece = whole + behind // splits
            begin = behind % splits * a_split
            end = gl.minimum(begin + a_split, chunks)
    first_tile = piece // parts * WARPS
    first_row = piece % parts * BATCH
    tile = gl.minimum(first_tile + warp, tile_rows - 1)
    row0 = tile * 16 + gid
    row1 = row0 + 8

    words_at, codes_at, tops_at, _, _, _, codes_lane = chunks_at(
        Weight, StatCodes, TileStats, first_tile, tile_rows, chunks, begin, BITS, CHUNKS_A_SET, WARPS, WARPS
    )
    ring = (room_for_chunks(BITS, BILEVEL, CHUNKS_A_SET, WARPS), room_for_chunks(BITS, BILEVEL, CHUNKS_A_SET, WARPS))
    # Memory of its own for all that is copied at once: the compiler puts a barrier between two copies to one.
    x_ring = ()
    for _ in gl.static_range(RING // TURN):
        x_ring = x_ring + (gl.allocate_shared_memory(gl.float16, [TURN * BATCH, 64], x_halves),)
    there = begin < end
    copy_chunks(
        ring[0], words_at, codes_at, tops_at, codes_lane, there, there, there, begin, chunks, BITS, BILEVEL, CHUNKS_A_SET
    )
    if OUTLIERS:
        room = outliers.room_for_cells(2 * WARPS * chunk_bytes(BITS, BILEVEL, CHUNKS_A_SET) + RING * 128 * BATCH, warp, lane)
        cell = (tile * chunks + begin) * 2
        most = outliers.most_in_a_cell(Pointers, cell, (end - begin) * 2, lane)
        rest = gl.max(most, axis=0) > 32 * ENTRIES
        last_cell = tile_rows * chunks * 2
        bound0 = gl.load(Pointers + cell)
        bound1 = gl.load(Pointers + cell + 1)
        bound2 = gl.load(Pointers + cell + 2)
        words = outliers.fetch(Outliers, bound0, bound1, lane, ENTRIES)
        room, places = outliers.put(room, words, ENTRIES)

    commit_copies()
    # Each in memory of its own: the compiler puts fewer barriers between what is done to them then.
    arrived = ()
    for turn in gl.static_range(RING // TURN):
        arrived = arrived + (gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),)
        mbarrier.init(arrived[turn], count=1)
    barrier()
    for turn in gl.static_range(AHEAD):
        _expect(arrived, turn * TURN, begin, begin, end, TURN, RING, BATCH)
    barrier()
    if DEPENDENT:  # x, unlike the matrix, comes from the kernel before
        await_previous(X + thread)
    for turn in gl.static_range(AHEAD):
        _ask(Map, arrived, x_ring, turn * TURN, begin, first_row, begin, end, TURN, RING, BATCH)

    acc = gl.zeros([16 * WARPS, BATCH], gl.float32, mma)
    for chunk in range(begin, end, 2):
        for j in gl.static_range(2):
            for s in gl.static_range(4):
                if s % TURN == 0:
                    # What is asked for now: x of slots TURN * AHEAD further on, and the weights of the next chunk.
                    _expect(arrived, 4 * j + s + TURN * AHEAD, chunk, begin, end, TURN, RING, BATCH)
                    if s == 0:
                        wait_copies(0)
                    mbarrier.wait(arrived[(4 * j + s) % RING // TURN], j)
                    barrier()  # all warps are done with what is overwritten
                    _ask(Map, arrived, x_ring, 4 * j + s + TURN * AHEAD, chunk, first_row, begin, end, TURN, RING, BATCH)
                    if s == 0:
                        wanted = chunk + j + 1 < end
                        words_at += 128 * BITS
                        codes_at += codes_step(1, CHUNKS_A_SET)
                        tops_at += 16 // CHUNKS_A_SET
                        copy_chunks(
                            ring[(j + 1) % 2], words_at, codes_at, tops_at, codes_lane, wanted, wanted, wanted, chunk + j + 1,
                            chunks, BITS, BILEVEL, CHUNKS_A_SET,
                        )  # fmt: skip
                        commit_copies()
                if s == 0:
                    slots, codes, tops = lane_of_chunk(
                        ring[j], StatCodes, tile, chunk + j, chunk + j, chunks, groups, gid, tid, layout, BITS, BILEVEL,
                        CHUNKS_A_SET,
                    )  # fmt: skip
                if OUTLIERS and s % 2 == 0:  # those of the next half of a chunk
                    later = outliers.fetch(Outliers, bound1, bound2, lane, ENTRIES)
                    bound1 = bound2
                    cell += 1
                    bound2 = gl.load(Pointers + gl.minimum(cell + 2, last_cell))
                block = (chunk + j) * 16 + 4 * s + tid
                s0, o0, s1, o1 = half_statistics(
                    codes[s], tops[s], GroupSc, GroupZp, row0, row1, out_features, groups, block, BLOCKS_A_GROUP, BITS, BILEVEL
                )
                weights = dequantize_lane(slots[s], s0, o0, s1, o1, BITS)
                if OUTLIERS:
                    weights = outliers.add(weights, room, lane, s % 2)
                a = _operand(weights, operand)
                x = x_ring[(4 * j + s) % RING // TURN].slice(s % TURN * BATCH, BATCH)
                acc = hopper.warpgroup_mma(a, x.permute((1, 0)), acc, is_async=True)
                if OUTLIERS and s % 2 == 1:  # while the tensor cores work
                    room = outliers.clear(room, words, places, ENTRIES)
                    words = later
                    room, places = outliers.put(room, words, ENTRIES)
                # The product before is done; of this turn's last one the next turn must not overwrite x. And none is left at
                # the end of the loop: the assembler was seen to read the sums above a wait that follows the loop.
                if (AHEAD == 1 and s % TURN == TURN - 1) or (j == 1 and s == 3):
                    acc = hopper.warpgroup_mma_wait(0, deps=(acc,))
                else:
                    acc = hopper.warpgroup_mma_wait(1, deps=(acc,))
    wait_copies(0)
    if DEPENDENT:
        let_next_begin(thread)
    total = hopper.warpgroup_mma_wait(0, deps=(acc,))

    near_row = gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(1, mma))[:, None]
    near_n = gl.arange(0, BATCH, layout=gl.SliceLayout(0, mma))[None, :]
    row = first_tile * 16 + near_row
    n = first_row + near_n
    inside = (row < out_features) & (n < batch)
    partial = Partial + behind.to(gl.int64) * (16 * WARPS * BATCH)
    if SPLIT and behind >= 0:
        gl.store(partial + (near_n * (16 * WARPS) + near_row), total)
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
                one = first_tile + each
                if SPLIT and behind >= 0:
                    _add_rest(
                        partial + each * 16, 16 * WARPS, X, Scale, Pointers, Outliers, one, 2 * begin, 2 * end, first_row,
                        batch, out_features, tile_rows, 2 * chunks, False, BATCH, WARPS, 32 * ENTRIES,
                    )  # fmt: skip
                else:
                    _add_rest(
                        Y + first_row.to(gl.int64) * out_features + one * 16, out_features, X, Scale, Pointers, Outliers,
                        one, 2 * begin, 2 * end, first_row, batch, out_features, tile_rows, 2 * chunks, SCALED, BATCH,
                        WARPS, 32 * ENTRIES,
                    )  # fmt: skip


@gluon.jit
def finish_kernel(
    Partial, Scale, Bias, Y, batch, out_features, parts, whole, splits,
    SCALED: gl.constexpr, HAS_BIAS: gl.constexpr, BATCH: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr,
    DEPENDENT: gl.constexpr,
):  # fmt: skip
    """The pieces of Y that several programs of `gemm_kernel` shared: Scale * (sum of Partial) + Bias. ROWS is 16 * WARPS."""
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    at = gl.program_id(0).to(gl.int64) * BLOCK + gl.arange(0, BLOCK, layout=layout)
    shared = at // (ROWS * BATCH)
    near = (at % (ROWS * BATCH)).to(gl.int32)
    piece = whole + shared.to(gl.int32)
    row = piece // parts * ROWS + near % ROWS
    n = piece % parts * BATCH + near // ROWS
    inside = (row < out_features) & (n < batch)
    total = gl.zeros([BLOCK], gl.float32, layout)
    source = Partial + shared * splits * (ROWS * BATCH) + near
    if DEPENDENT:
        let_next_begin(near)
        source = await_previous(source)
    for _ in range(splits):
        total += gl.load(source, mask=inside, other=0)
        source += ROWS * BATCH
    if SCALED:
        total *= gl.load(Scale + n, mask=inside, other=0)
    if HAS_BIAS:
        total += gl.load(Bias + row, mask=inside, other=0).to(gl.float32)
    gl.store(Y + n.to(gl.int64) * out_features + row, total.to(Y.dtype.element_ty), mask=inside)


@gluon.jit
def prepare_kernel(
    X, Out, Scale, in_features, columns,
    SCALED: gl.constexpr, ORDERED: gl.constexpr, BLOCK: gl.constexpr, DEPENDENT: gl.constexpr,
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
    if DEPENDENT:
        await_previous(X + near)
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


X_LAYOUT = gl.NVMMASharedLayout(128, 16, 3)  # of slots of x in shared memory
WIDEST_OVERLAP = 64


@lru_cache(REMEMBERED)
def _plan(batch: int, tile_rows: int, chunks: int, device: torch.device) -> Plan:
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return plan_for(batch, tile_rows, chunks, multiprocessors)


def prepare_launch(
    layout: Layout, batch: int, dtype: torch.dtype, device: torch.device, ordered: bool, overlaps: dict[str, bool]
) -> Launch:
    """`prepare_kernel` for x of this dtype, [batch, in]: scaled from bf16, as weights are exact enough in fp16 but not in
    bf16."""
    scaled, columns = dtype == torch.bfloat16, layout.blocks * TILE
    grid = (batch, 1 if scaled else ceil_div(columns, 2048))
    constants = {"SCALED": scaled, "ORDERED": ordered, "BLOCK": 2048, "num_warps": 4} | overlaps
    return Launch(prepare_kernel, grid, device, (dtype, torch.float16, torch.float32), (layout.in_features, columns), constants)


def prepared(prepare: Launch, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """x as `prepare` makes it, fp16 [batch, blocks * 16], and what the rows of the product are multiplied with, float32
    [batch] for bf16; else it is not read."""
    made = torch.empty(x.shape[0], layout.blocks * TILE, dtype=torch.float16, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device) if x.dtype == torch.bfloat16 else made
    prepare(x.data_ptr(), made.data_ptr(), scale.data_ptr())
    return made, scale


class _Launches(NamedTuple):
    """The kernels of a product and its plan; finish where programs share pieces."""

    plan: Plan
    prepare: Launch
    product: Launch
    finish: Launch | None


@lru_cache(REMEMBERED)
def _launches(
    layout: Layout, entries: int, batch: int, dtype: torch.dtype, bias: torch.dtype | None, device: torch.device, joined: bool
) -> _Launches:
    """layout and entries: as `outliers.without_outliers` has them. joined: whether the stored matrix is one tensor."""
    chunks = layout.blocks // CHUNK
    plan = _plan(batch, layout.tile_rows, chunks, device)
    choice = CHOICES[plan.width]
    scaled = dtype == torch.bfloat16
    # Beside programs of wide pieces, one a multiprocessor, those of the next product only take places unevenly.
    overlaps = overlap.options(device, joined and plan.width <= WIDEST_OVERLAP)
    prepare = prepare_launch(layout, batch, dtype, device, True, overlaps)
    finish = None
    common = {"HAS_BIAS": bias is not None, "SCALED": scaled, "BATCH": plan.width} | overlaps
    if plan.splits > 1:
        rows = 16 * choice.warps
        grid = (ceil_div((plan.pieces - plan.whole) * plan.width * rows, 512), 1)
        integers = (batch, layout.out_features, plan.parts, plan.whole, plan.splits)
        dtypes = (torch.float32, torch.float32, bias or dtype, dtype)
        constants = common | {"ROWS": rows, "BLOCK": 512, "num_warps": 4}
        finish = Launch(finish_kernel, grid, device, dtypes, integers, constants)
    dtypes = (torch.float16, torch.float16, torch.float32, *LEAVES.values(), bias or dtype, dtype, torch.float32)
    integers = (
        batch, layout.out_features, layout.tile_rows, chunks, layout.groups, plan.parts, plan.whole, plan.splits, plan.a_split,
    )  # fmt: skip
    constants = common | constants_of(layout) | {
        "OUTLIERS": entries > 0, "SPLIT": plan.splits > 1, "WARPS": choice.warps,
        "TURN": choice.turn, "ENTRIES": max(entries, 1), "num_warps": choice.warps,
    } | ({"maxnreg": choice.registers} if choice.registers else {})  # fmt: skip
    product = Launch(gemm_kernel, (plan.programs, 1), device, dtypes, integers, constants)
    return _Launches(plan, prepare, product, finish)


def linear(x: Tensor, tensors: Mapping[str, Tensor], layout: Layout, bias: Tensor | None) -> Tensor:
    """x W^T + bias for x fp16 or bf16 [batch, in], contiguous, and checked operands of a layout of whole chunks, not
    permuted where it has outliers. Returns [batch, out] in x's dtype."""
    batch, dtype = x.shape[0], x.dtype
    shape, entries = outliers.without_outliers(layout)
    given = None if bias is None else bias.dtype
    launches = _launches(shape, entries, batch, dtype, given, x.device, isinstance(tensors, Joined))
    plan, prepare, product, finish = launches
    y = torch.empty(batch, layout.out_features, dtype=dtype, device=x.device)
    added = y if bias is None else aligned(bias)
    partial = y  # where the kernels are told not to look
    x, scale = prepared(prepare, aligned(x) if not layout.permuted else x.index_select(1, tensors["perm"]), layout)
    # slots of 64 columns, one behind the other
    choice, columns = CHOICES[plan.width], x.shape[1]
    x_map = TensorDescriptor(x, [columns // 64, batch, 64], [64, columns, 1], [choice.turn, plan.width, 64], X_LAYOUT)
    if finish is not None:
        shared = (plan.pieces - plan.whole) * plan.splits * plan.width * 16 * choice.warps
        partial = torch.empty(shared, dtype=torch.float32, device=x.device)
    product(
        x.data_ptr(), x_map, scale.data_ptr(), *addresses(tensors, layout), added.data_ptr(), y.data_ptr(), partial.data_ptr()
    )
    if finish is not None:
        finish(partial.data_ptr(), scale.data_ptr(), added.data_ptr(), y.data_ptr())
    return y
