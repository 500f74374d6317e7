"""Kernel of small batches for NVIDIA GPUs (sm_86 and newer): y = x W^T for 2 .. 16 rows of x, `mma.m16n8k16`, outliers fused.

A warp holds a tile, 16 rows of W. A lane's words become fp16 weights in registers and are the A fragments as they stand; x is
B, and because the order of columns within a product is free, 16 bytes of a row of x are the B fragments of two products.

Outliers are not added to the weights but multiplied on their own, 16 of a chunk at a time: A has the value of outlier k in its
row and zeros in the others, B has x of its column. The products go to the same sums. An infinite x counts as the largest finite
one there, as infinity times zero is NaN: y is infinite by the product of the codes, so where the weight is an outlier its sign
is that of what the outlier was added to.

All shared memory is declared in PTX, for which the compiler puts no barriers: words and statistics are read by the warp that
copied them, and x, which the whole program reads, needs one barrier a chunk.

Every sum has one fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import CELL_COLUMNS, CHUNK, TILE, Layout, ceil_div

from . import outliers, overlap, ptx
from .checks import aligned
from .gemm import finish_kernel, prepare_kernel
from .gemm_plan import Choice, Plan, plan_for
from .joined import Joined
from .launch import LEAVES, REMEMBERED, Launch, addresses, constants_of
from .overlap import await_previous, let_next_begin
from .stage_statistics import (
    STATS_BYTES,
    bilevel_constants,
    bilevel_statistics,
    codes_of_chunk,
    direct_of_chunk,
    stats_at,
    stats_step,
)
from .weights import direct_statistics

X_PITCH = 528  # bytes of a row of x of a chunk: 512 and 16, so that 8 rows lie in different banks
X_STAGES = 2
MOST_SHARED = 49152  # bytes of shared memory that can be declared


def _ask_weights(bits: int) -> str:
    """PTX: copies of chunk $4 to the lane's place $1: words from $2 if it is before $5, statistics from $3 if before $6."""
    lines = [".reg .pred p, q;", "setp.lt.s32 p, $4, $5;", "setp.lt.s32 q, $4, $6;"]
    lines += [f"@p cp.async.cg.shared.global [$1+{512 * k}], [$2+{512 * k}], 16;" for k in range(bits)]
    lines += [f"@q cp.async.cg.shared.global [$1+{512 * bits}], [$3], 16;", "mov.b32 $0, $1;"]
    return "{\n" + "\n".join(lines) + "\n}"


def _ask_outliers(kept: int) -> str:
    """PTX: copies of `kept` words from $2 on to the lane's place $1; zeros from number $3, counted from the lane's first."""
    lines = [".reg .pred p;"]
    for i in range(kept // 32):
        lines += [f"setp.le.s32 p, $3, {32 * i};", f"cp.async.ca.shared.global [$1+{128 * i}], [$2+{128 * i}], 4, p;"]
    return "{\n" + "\n".join([*lines, "mov.b32 $0, $1;"]) + "\n}"


def _sixteen(tiles: int) -> list[str]:
    """PTX: the sums s times 16 outliers, of which a lane has four, w0 .. w3. x of its rows at g, its row in r."""
    lines = []
    for pair in range(2):
        a, b = f"w{2 * pair}", f"w{2 * pair + 1}"
        lines += [
            f"prmt.b32 v, {a}, {b}, 0x7632;",
            f"prmt.b32 t, {a}, {b}, 0x5410;",
            # row xor gid as fp16 numbers, none of them 0 or inf: row gid is 0x0400, row gid + 8 is -0x0400
            "lop3.b32 t, t, 0xF000F000, r, 0x6A;",
            "mov.b32 u, 0x04000400; set.eq.u32.f16x2 u, t, u;",
            "{ .reg .b32 c; mov.b32 c, 0x84008400; set.eq.u32.f16x2 t, t, c; }",
            f"and.b32 a{2 * pair}, v, u;",
            f"and.b32 a{2 * pair + 1}, v, t;",
        ]
    lines += [f"and.b32 w{i}, w{i}, 255; mad.lo.u32 w{i}, w{i}, 2, g;" for i in range(4)]
    for tile in range(tiles):
        lines += [f"ld.shared.b16 h{i}, [w{i}+{8 * X_PITCH * tile}];" for i in range(4)]
        # 65504 for an infinite x, which times the zeros of A would be NaN; it is infinite in the product of the codes
        lines += ["mov.b32 b0, {h0, h1};", "mov.b32 b1, {h2, h3};", "mov.b32 t, 0x7BFF7BFF;"]
        lines += [f"min.xorsign.abs.f16x2 b{i}, b{i}, t;" for i in range(2)]
        sums = "{" + ", ".join(f"s{4 * tile + i}" for i in range(4)) + "}"
        lines.append(f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {sums}, {{a0, a1, a2, a3}}, {{b0, b1}}, {sums};")
    return lines


def _multiply_outliers(kept: int, tiles: int) -> str:
    """PTX: adds the products of the outliers of a chunk to a lane's sums, 4 for each 8 rows of x.

    Inputs behind the sums: the lane's four of the first 16 words in shared memory, how many there are, x of row gid of the
    chunk, gid << 12 in both halves, the outliers in global memory from the first of the chunk on, and 4 tid."""
    n = 4 * tiles
    at, count, x, rows, far, first = (f"${2 * n + i}" for i in range(6))
    lines = [
        ".reg .pred p, q; .reg .b32 w<4>, a<4>, b<2>, t, u, v, g, r, at, end, left, i; .reg .b64 f;",
        ".reg .b16 h<4>; " + f".reg .f32 s<{n}>;",
        *(f"mov.f32 s{i}, ${n + i};" for i in range(n)),
        f"setp.le.s32 p, {count}, 0;", "@p bra DONE;",
        f"mov.b32 g, {x}; or.b32 r, {rows}, 0x04000400;",
        f"mov.b32 at, {at}; min.s32 left, {count}, {kept}; mad.lo.s32 end, left, 4, at;",
        "NEXT:", "ld.shared.v4.b32 {w0, w1, w2, w3}, [at];",
        *_sixteen(tiles),
        "add.u32 at, at, 64;", "setp.lt.s32 p, at, end;", "@p bra NEXT;",
        f"setp.le.s32 p, {count}, {kept};", "@p bra DONE;",
        f"sub.s32 left, {count}, {first}; sub.s32 left, left, {kept}; add.s32 i, {first}, {kept}; mad.wide.s32 f, i, 4, {far};",
        f"sub.s32 i, {count}, {kept};",
        "FAR:",
        *(f"mov.b32 w{i}, 0; setp.gt.s32 q, left, {i}; @q ld.global.nc.b32 w{i}, [f+{4 * i}];" for i in range(4)),
        *_sixteen(tiles),
        "add.s32 i, i, -16; add.s32 left, left, -16; add.u64 f, f, 64;", "setp.gt.s32 p, i, 0;", "@p bra FAR;",
        "DONE:", *(f"mov.f32 ${i}, s{i};" for i in range(n)),
    ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"


def _rooms() -> dict[int, str]:
    """PTX: address $0 of so many bytes of shared memory; $1 is not read."""
    sizes = {
        room_bytes(bits, kept, batch, warps, stages)
        for bits in (2, 3, 4) for kept in KEPT for batch in (8, 16) for warps in (4, 8) for stages in (2, 3, 4)
    }  # fmt: skip
    return {size: f"{{ .shared .align 128 .b8 room[{size}]; mov.u32 $0, room; }}" for size in sizes if size <= MOST_SHARED}


KEPT = (0, 32, 64, 128)  # words of outliers of a chunk and tile that are copied; more are read when their turn comes


def warp_bytes(bits: int, kept: int) -> int:
    """Of shared memory for a chunk of a warp."""
    return 512 * bits + STATS_BYTES + 4 * kept


def room_bytes(bits: int, kept: int, batch: int, warps: int, stages: int) -> int:
    """Of shared memory of a program."""
    return stages * warps * warp_bytes(bits, kept) + X_STAGES * batch * X_PITCH


_ROOMS = gl.constexpr(_rooms())
_X_PITCH = gl.constexpr(X_PITCH)
_STATS_BYTES = gl.constexpr(STATS_BYTES)
_ASK_WEIGHTS = gl.constexpr({bits: _ask_weights(bits) for bits in (2, 3, 4)})
_ASK_OUTLIERS = gl.constexpr({kept: _ask_outliers(kept) for kept in KEPT})
_ASK_X = gl.constexpr("{ .reg .pred p; setp.lt.s32 p, $3, $4; @p cp.async.cg.shared.global [$1], [$2], 16; mov.b32 $0, $1; }")
# Where the outliers of chunk $2 begin, or end those of the one before, if it is not behind $3; else 0.
_BOUND = gl.constexpr(
    "{ .reg .pred p; .reg .b64 a; setp.le.s32 p, $2, $3; mad.wide.u32 a, $2, 8, $1;"
    " mov.b32 $0, 0; @p ld.global.nc.b32 $0, [a]; }"
)
_LANES = {bits: ptx.constants_in_registers(ptx.dequantize_lane(bits), 20 + bits) for bits in (2, 3, 4)}
_LANE = gl.constexpr({bits: lane[0] for bits, lane in _LANES.items()})
_LANE_CONSTANTS = gl.constexpr({bits: lane[1] for bits, lane in _LANES.items()})
_LANE_REGISTERS = gl.constexpr({
    bits: ptx.dequantize_lane_constraints(bits) + ",r" * len(lane[1]) for bits, lane in _LANES.items()
})  # fmt: skip
_SIXTEEN = gl.constexpr((gl.int32,) * 16)
_OUTLIERS = gl.constexpr({kept * 4 + tiles: _multiply_outliers(kept, tiles) for kept in KEPT for tiles in (1, 2)})
_OUTLIERS_REGISTERS = gl.constexpr(
    {tiles: ",".join(["=&f"] * (4 * tiles) + ["f"] * (4 * tiles) + ["r", "r", "r", "r", "l", "r"]) for tiles in (1, 2)}
)
_FLOATS = gl.constexpr({1: (gl.float32,) * 4, 2: (gl.float32,) * 8})
_LOAD4 = gl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];")
_MMA = gl.constexpr(ptx.MMA)
_MMA_REGISTERS = gl.constexpr(ptx.MMA_CONSTRAINTS)
_WAIT = gl.constexpr({
    stages: f"cp.async.wait_group {min(stages - 2, 1)}; bar.sync 0; mov.b32 $0, $1;" for stages in (2, 3, 4)
})  # fmt: skip
_COMMIT = gl.constexpr("cp.async.commit_group; mov.b32 $0, $1;")


@gluon.jit
def _lane_constants(zero, BITS: gl.constexpr):
    """Those of _LANE plus zero, of which the compiler does not know that it is 0."""
    found = ()
    for i in gl.static_range(len(_LANE_CONSTANTS[BITS])):
        found = found + (zero + _LANE_CONSTANTS[BITS][i],)
    return found


@gluon.jit
def _commit(lane):
    gl.inline_asm_elementwise(_COMMIT, "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _load4(at):
    """Four words of shared memory."""
    return gl.inline_asm_elementwise(
        _LOAD4, "=r,=r,=r,=r,r", [at], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1
    )


@gluon.jit
def _ask_x(at, x_at, chunk, ends, BATCH: gl.constexpr, WARPS: gl.constexpr):
    """Begins to copy x of a chunk: a warp copies every WARPS-th row."""
    for i in gl.static_range(BATCH // WARPS):
        gl.inline_asm_elementwise(
            _ASK_X, "=r,r,l,r,r", [at + i * WARPS * _X_PITCH, x_at[i], chunk, ends[i]], dtype=gl.int32, is_pure=False, pack=1
        )  # fmt: skip


@gluon.jit
def _ask_chunk(
    at, words_at, stats_at, chunk, end, stats_end, Outliers, low, high, lane, BITS: gl.constexpr, KEPT: gl.constexpr
):
    """Begins to copy a chunk of the warp's tile. at: the lane's first 16 bytes of the warp's part of a stage."""
    gl.inline_asm_elementwise(
        _ASK_WEIGHTS[BITS], "=r,r,l,l,r,r,r", [at, words_at, stats_at, chunk, end, stats_end], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip
    if KEPT > 0:
        room = at + (512 * BITS + _STATS_BYTES) - lane * 12
        gl.inline_asm_elementwise(
            _ASK_OUTLIERS[KEPT], "=r,r,l,r", [room, Outliers + (low + lane), high - low - lane], dtype=gl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


_INTEGERS = ("batch", "out_features", "tile_rows", "chunks", "groups", "whole", "splits", "a_split")


@gluon.jit(do_not_specialize=_INTEGERS)  # one compiled kernel for all shapes
def small_kernel(
    X, Scale, Weight, StatCodes, TileStats, GroupSc, GroupZp, Pointers, Outliers, Bias, Y, Partial,
    batch, out_features, tile_rows, chunks, groups, whole, splits, a_split,
    BITS: gl.constexpr, BILEVEL: gl.constexpr, BLOCKS_A_GROUP: gl.constexpr, HAS_BIAS: gl.constexpr, SCALED: gl.constexpr,
    SPLIT: gl.constexpr, BATCH: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, KEPT: gl.constexpr,
    ROOM: gl.constexpr, DEPENDENT: gl.constexpr,
):  # fmt: skip
    """Y[n, o] = Scale[n] sum_i X[n, i] W[o, i] (+ Bias[o]), Y [batch, out], batch at most BATCH, X fp16 [batch, chunks * 256].

    A piece of Y is 16 * WARPS of the o. The first `whole` programs make one piece each. Behind them, where SPLIT, `splits`
    programs share a piece: each writes its sum over a_split chunks to Partial fp32 [program - whole, BATCH, 16 * WARPS], for
    `finish_kernel`. KEPT: words of outliers of a chunk that are copied, 0 where the matrix has none.
    """
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    CHUNKS_A_SET: gl.constexpr = BLOCKS_A_GROUP if BILEVEL else 1
    TILES: gl.constexpr = BATCH // 8
    WARP_BYTES: gl.constexpr = 512 * BITS + _STATS_BYTES + 4 * KEPT
    STAGE: gl.constexpr = WARPS * WARP_BYTES
    X_STAGE: gl.constexpr = BATCH * _X_PITCH
    thread = gl.arange(0, 32 * WARPS, layout=layout)
    lane = thread % 32
    warp = thread // 32
    gid = lane // 4
    tid = lane % 4
    none = thread * 0
    piece = gl.program_id(0)
    behind = piece - whole
    begin = 0
    end = chunks
    if SPLIT:  # noqa: SIM102, the compiler's condition and the GPU's
        if behind >= 0:
            piece = whole + behind // splits
            begin = behind % splits * a_split
            end = gl.minimum(begin + a_split, chunks)
    tile = gl.minimum(piece * WARPS + warp, tile_rows - 1)
    tile64 = tile.to(gl.int64)

    room = gl.inline_asm_elementwise(_ROOMS[ROOM], "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)
    own = room + (warp * WARP_BYTES + lane * 16)
    x_own = room + (STAGES * STAGE + warp * _X_PITCH + lane * 16)
    x_read = room + (STAGES * STAGE + gid * _X_PITCH)

    words_at = Weight + tile64 * (chunks * (128 * BITS)) + (begin * (128 * BITS) + lane * 4)
    if BILEVEL:
        stats_from, stats_end = stats_at(StatCodes, TileStats, tile64, begin, end, chunks, lane, CHUNKS_A_SET)
    else:
        stats_from, stats_end = words_at, none
    bounds = ()
    pointer = Pointers + tile64 * (2 * chunks)
    if KEPT > 0:
        for k in gl.static_range(STAGES + 1):
            bounds = bounds + (gl.load(pointer + 2 * gl.minimum(begin + k, end)),)
    for k in gl.static_range(STAGES - 1):
        if KEPT > 0:
            low, high = bounds[k], bounds[k + 1]
        else:
            low, high = none, none
        _ask_chunk(
            own + k * STAGE, words_at, stats_from, none + (begin + k), none + end, stats_end, Outliers, low, high, lane, BITS,
            KEPT,
        )  # fmt: skip
        words_at += 128 * BITS
        stats_from += stats_step(lane, begin + k, BILEVEL, CHUNKS_A_SET)

    x_ends = ()
    for i in gl.static_range(BATCH // WARPS):
        x_ends = x_ends + (gl.where(warp + i * WARPS < batch, end, 0),)
    first = X + warp.to(gl.int64) * (chunks * 256) + (begin * 256 + lane * 8)
    if DEPENDENT:  # x, unlike the matrix, comes from the kernel before
        first = await_previous(first)
    x_at = ()
    for i in gl.static_range(BATCH // WARPS):
        x_at = x_at + (first + i * (chunks * (256 * WARPS)),)
    _ask_x(x_own, x_at, none + begin, x_ends, BATCH, WARPS)
    _commit(lane)
    _commit(lane)  # an empty group, where the loop has that of a chunk

    rows = gid * 0x10001000
    unknown = none + (batch >> 30)
    for_lane = _lane_constants(unknown, BITS)
    if BILEVEL:
        for_statistics = bilevel_constants(unknown, BITS)
    else:
        row0 = gl.minimum(tile * 16 + gid, out_features - 1).to(gl.int64) * groups
        row1 = gl.minimum(tile * 16 + gid + 8, out_features - 1).to(gl.int64) * groups
        direct_next = direct_of_chunk(GroupSc, GroupZp, row0, row1, begin, groups, tid, BLOCKS_A_GROUP)
    zero = gl.zeros([32 * WARPS], gl.float32, layout)
    sums = (zero,) * (4 * TILES)
    now = none
    then = none + (STAGES - 1) * STAGE  # the stage before `now`
    x_now = x_read
    x_then = x_own + X_STAGE
    for chunk in range(begin, end):
        gl.inline_asm_elementwise(_WAIT[STAGES], "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)
        next_at = ()
        for i in gl.static_range(BATCH // WARPS):
            next_at = next_at + (x_at[i] + 256,)
        x_at = next_at
        _ask_x(x_then, x_at, none + (chunk + 1), x_ends, BATCH, WARPS)
        _commit(lane)
        if KEPT > 0:
            low, high = bounds[STAGES - 1], bounds[STAGES]
        else:
            low, high = none, none
        _ask_chunk(
            own + then, words_at, stats_from, none + (chunk + (STAGES - 1)), none + end, stats_end, Outliers, low, high, lane,
            BITS, KEPT,
        )  # fmt: skip
        _commit(lane)
        words_at += 128 * BITS
        stats_from += stats_step(lane, chunk + (STAGES - 1), BILEVEL, CHUNKS_A_SET)
        at = own + now
        words = ()
        for k in gl.static_range(BITS):
            words = words + (_load4(at + 512 * k),)
        if BILEVEL:
            codes, tops = codes_of_chunk(at, lane, chunk, chunks, 512 * BITS, CHUNKS_A_SET)
        else:  # read a chunk ahead
            direct = direct_next
            direct_next = direct_of_chunk(GroupSc, GroupZp, row0, row1, chunk + 1, groups, tid, BLOCKS_A_GROUP)
        x_lane = x_now + tid * 32
        for s in gl.static_range(4):
            if BILEVEL:
                s0, o0, s1, o1 = bilevel_statistics(codes[s], tops, s, for_statistics, BITS, CHUNKS_A_SET)
            else:
                of_slot = direct[s * len(direct) // 4]
                s0, o0 = direct_statistics(of_slot[0], of_slot[1], BITS)
                s1, o1 = direct_statistics(of_slot[2], of_slot[3], BITS)
            slot = ()
            for k in gl.static_range(BITS):
                slot = slot + (words[k][s],)
            w = gl.inline_asm_elementwise(
                _LANE[BITS], _LANE_REGISTERS[BITS], slot + (s0, o0, s1, o1) + for_lane, dtype=_SIXTEEN, is_pure=True, pack=1
            )
            new = ()
            for t in gl.static_range(TILES):
                d = (sums[4 * t], sums[4 * t + 1], sums[4 * t + 2], sums[4 * t + 3])
                for half in gl.static_range(2):
                    b = _load4(x_lane + (8 * _X_PITCH * t + 128 * s + 16 * half))
                    for c in gl.static_range(2):
                        d = gl.inline_asm_elementwise(
                            _MMA, _MMA_REGISTERS,
                            [w[4 * half + 2 * c], w[8 + 4 * half + 2 * c], w[4 * half + 2 * c + 1], w[9 + 4 * half + 2 * c],
                             b[2 * c], b[2 * c + 1], d[0], d[1], d[2], d[3]],
                            dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
                        )  # fmt: skip
                new = new + d
            sums = new
        if KEPT > 0:
            sums = gl.inline_asm_elementwise(
                _OUTLIERS[KEPT * 4 + TILES], _OUTLIERS_REGISTERS[TILES],
                sums + (at + (512 * BITS + _STATS_BYTES) - (lane * 16 - tid * 16), bounds[1] - bounds[0], x_now, rows,
                        (Outliers + bounds[0]).to(gl.int64), tid * 4),
                dtype=_FLOATS[TILES], is_pure=False, pack=1,
            )  # fmt: skip
            later = ()
            for k in gl.static_range(STAGES):
                later = later + (bounds[k + 1],)
            bound = gl.inline_asm_elementwise(
                _BOUND, "=&r,l,r,r", [pointer, none + (chunk + (STAGES + 1)), none + end], dtype=gl.int32, is_pure=False, pack=1
            )
            bounds = later + (bound,)
        then = now
        now = gl.where(now == (STAGES - 1) * STAGE, 0, now + STAGE)
        x_now = 2 * x_read + X_STAGE - x_now
        x_then = 2 * x_own + X_STAGE - x_then
    gl.inline_asm_elementwise("cp.async.wait_all; mov.b32 $0, $1;", "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)
    if DEPENDENT:
        let_next_begin(thread)

    partial = Partial + behind.to(gl.int64) * (16 * WARPS * BATCH)
    for t in gl.static_range(TILES):
        for i in gl.static_range(4):
            near = warp * 16 + gid + i // 2 * 8
            n = tid * 2 + (8 * t + i % 2)
            row = piece * (16 * WARPS) + near
            total = sums[4 * t + i]
            if SPLIT and behind >= 0:
                gl.store(partial + (n * (16 * WARPS) + near), total)
            else:
                if SCALED:
                    total *= gl.load(Scale + n, mask=n < batch, other=0)
                if HAS_BIAS:
                    total += gl.load(Bias + row, mask=row < out_features, other=0).to(gl.float32)
                inside = (row < out_features) & (n < batch)
                gl.store(Y + n.to(gl.int64) * out_features + row, total.to(Y.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Small(Choice):
    """How the kernel runs for a width."""

    stages: int = 3


CHOICES = {8: Small(4, 0, 96, 5, 0.3, 3), 16: Small(4, 0, 104, 4, 0.33, 3)}
WIDEST = max(CHOICES)


class _Launches(NamedTuple):
    """The kernels of a product and its plan: prepare where x must be made anew, finish where programs share pieces."""

    plan: Plan
    prepare: Launch | None
    product: Launch
    finish: Launch | None


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


def stages_and_room(bits: int, kept: int, width: int, choice: Small) -> tuple[int, int]:
    """Stages of a program, fewer where those of the choice do not fit, and their shared memory in bytes."""
    stages = choice.stages
    while stages > 2 and room_bytes(bits, kept, width, choice.warps, stages) > MOST_SHARED:
        stages -= 1
    return stages, room_bytes(bits, kept, width, choice.warps, stages)


@lru_cache(REMEMBERED)
def _launches(
    layout: Layout, kept: int, batch: int, dtype: torch.dtype, bias: torch.dtype | None, device: torch.device, joined: bool,
    choice: Small | None = None, splits: int | None = None,
) -> _Launches:  # fmt: skip
    """layout and kept: as `_without_outliers` has them. joined: whether the stored matrix is one tensor."""
    chunks, columns = layout.blocks // CHUNK, layout.blocks * TILE
    width = next(width for width in CHOICES if width >= batch)
    choice = choice or CHOICES[width]
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    plan = plan_for(batch, layout.tile_rows, chunks, multiprocessors, {width: choice})
    if splits is not None:
        pieces, a_split = ceil_div(layout.tile_rows, choice.warps), ceil_div(chunks, splits)
        plan = Plan(width, 1, pieces, pieces if splits == 1 else 0, ceil_div(chunks, a_split), a_split)
    scaled = dtype == torch.bfloat16  # weights are exact enough in fp16 but not in bf16
    overlaps = overlap.options(device, joined)
    prepare = finish = None
    if scaled or columns != layout.in_features:
        grid = (batch, 1 if scaled else ceil_div(columns, 2048))
        constants = {"SCALED": scaled, "ORDERED": False, "BLOCK": 2048, "num_warps": 4} | overlaps
        dtypes = (dtype, torch.float16, torch.float32)
        prepare = Launch(prepare_kernel, grid, device, dtypes, (layout.in_features, columns), constants)
    common = {"HAS_BIAS": bias is not None, "SCALED": scaled, "BATCH": plan.width} | overlaps
    if plan.splits > 1:
        rows = 16 * choice.warps
        grid = (ceil_div((plan.pieces - plan.whole) * plan.width * rows, 512), 1)
        integers = (batch, layout.out_features, 1, plan.whole, plan.splits)
        dtypes = (torch.float32, torch.float32, bias or dtype, dtype)
        constants = common | {"ROWS": rows, "BLOCK": 512, "num_warps": 4}
        finish = Launch(finish_kernel, grid, device, dtypes, integers, constants)
    dtypes = (torch.float16, torch.float32, *LEAVES.values(), bias or dtype, dtype, torch.float32)
    integers = (
        batch, layout.out_features, layout.tile_rows, chunks, layout.groups, plan.whole, plan.splits, plan.a_split,
    )  # fmt: skip
    stages, room = stages_and_room(layout.weight_bits, kept, plan.width, choice)
    constants = common | constants_of(layout) | {
        "SPLIT": plan.splits > 1, "WARPS": choice.warps, "STAGES": stages, "KEPT": kept, "ROOM": room,
        "num_warps": choice.warps,
    } | ({"maxnreg": choice.registers} if choice.registers else {})  # fmt: skip
    return _Launches(plan, prepare, Launch(small_kernel, (plan.programs, 1), device, dtypes, integers, constants), finish)


def linear(
    x: Tensor, tensors: Mapping[str, Tensor], layout: Layout, bias: Tensor | None, choice: Small | None = None,
    splits: int | None = None,
) -> Tensor:  # fmt: skip
    """x W^T + bias for x fp16 or bf16 [batch, in], batch at most WIDEST, contiguous, and checked operands of a layout of whole
    chunks, not permuted where it has outliers. Returns [batch, out] in x's dtype."""
    batch, dtype = x.shape[0], x.dtype
    given = None if bias is None else bias.dtype
    shape, kept = _without_outliers(layout)
    launches = _launches(shape, kept, batch, dtype, given, x.device, isinstance(tensors, Joined), choice, splits)
    plan, prepare, product, finish = launches
    y = torch.empty(batch, layout.out_features, dtype=dtype, device=x.device)
    added = y if bias is None else aligned(bias)
    scale = partial = y  # where the kernels are told not to look
    x = aligned(x) if not layout.permuted else x.index_select(1, tensors["perm"])
    if prepare is not None:
        if dtype == torch.bfloat16:
            scale = torch.empty(batch, dtype=torch.float32, device=x.device)
        before, x = x, torch.empty(batch, layout.blocks * TILE, dtype=torch.float16, device=x.device)
        prepare(before.data_ptr(), x.data_ptr(), scale.data_ptr())
    if finish is not None:
        partial = torch.empty(
            (plan.programs - plan.whole) * plan.width * finish.constants["ROWS"], dtype=torch.float32, device=x.device
        )
    product(x.data_ptr(), scale.data_ptr(), *addresses(tensors, layout), added.data_ptr(), y.data_ptr(), partial.data_ptr())
    if finish is not None:
        finish(partial.data_ptr(), scale.data_ptr(), added.data_ptr(), y.data_ptr())
    return y
