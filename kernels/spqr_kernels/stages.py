"""Chunks of a warp's tiles on their way to its stages in shared memory: words, then statistics (`stage_statistics`).

In PTX: Gluon would put a barrier of the whole program between these copies and what reads them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .stage_statistics import statistics_number


def _ask_weights(bits: int) -> str:
    """PTX: copies of a chunk to the lane's place $1: words from $2 + 512 bits $3 if $7 is before $8, statistics from
    $4 + $5 $6 if before $9."""
    lines = [".reg .pred p, q; .reg .b64 a, b;", "setp.lt.s32 p, $7, $8;", "setp.lt.s32 q, $7, $9;"]
    lines += [f"mad.wide.u32 a, $3, {512 * bits}, $2;", "mad.wide.u32 b, $5, $6, $4;"]
    lines += [f"@p cp.async.cg.shared.global [$1+{512 * k}], [a+{512 * k}], 16;" for k in range(bits)]
    lines += [f"@q cp.async.cg.shared.global [$1+{512 * bits}], [b], 16;", "mov.b32 $0, $1;"]
    return "{\n" + "\n".join(lines) + "\n}"


def _ask_outliers(kept: int) -> str:
    """PTX: copies of `kept` words from $2 on to the lane's place $1; zeros from number $3, counted from the lane's first."""
    lines = [".reg .pred p;"]
    for i in range(kept // 32):
        lines += [f"setp.le.s32 p, $3, {32 * i};", f"cp.async.ca.shared.global [$1+{128 * i}], [$2+{128 * i}], 4, p;"]
    return "{\n" + "\n".join([*lines, "mov.b32 $0, $1;"]) + "\n}"


# The shared memory of a program, in the compiler's name for it: Gluon gives no addresses.
_ROOM = gl.constexpr("mov.u32 $0, global_smem; // $1")
_ASK_WEIGHTS = gl.constexpr({bits: _ask_weights(bits) for bits in (2, 3, 4)})
_ASK_OUTLIERS = gl.constexpr({kept: _ask_outliers(kept) for kept in range(32, 257, 32)})


@gluon.jit
def room_of_program(thread):
    """Address, for each thread, where all shared memory begins that Gluon allocates: of a kernel's one allocation."""
    return gl.inline_asm_elementwise(_ROOM, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def first_chunks(piece, warp, tile_rows, chunks, TALL: gl.constexpr, WARPS: gl.constexpr):
    """How many chunks are before each of the warp's tiles of a piece; a tile behind the last is that once more."""
    found = ()
    for t in gl.static_range(TALL):
        found = found + (gl.minimum((piece * WARPS + warp) * TALL + t, tile_rows - 1) * chunks,)
    return found


@gluon.jit
def ask_weights(
    at, words_at, stats_at, stats_step, chunk, before, chunks, position, last, lane, BITS: gl.constexpr, BILEVEL: gl.constexpr,
    CHUNKS_A_SET: gl.constexpr, TILE_BYTES: gl.constexpr,
):  # fmt: skip
    """Begins to copy a chunk of the tiles that have `before` chunks before them, if position is before last.

    at: the lane's first 16 bytes of the warp's part of a stage, TILE_BYTES from tile to tile. words_at: the lane's part of the
    first words of all; stats_at, stats_step: of `statistics_begin` and `statistics_step`."""
    for t in gl.static_range(len(before)):
        asked = before[t] + chunk
        if BILEVEL:
            number, there = statistics_number(asked, chunk, chunks, lane, CHUNKS_A_SET)
            stats_last = gl.where(there, last, 0)
        else:
            number, stats_last = asked, lane * 0
        gl.inline_asm_elementwise(
            _ASK_WEIGHTS[BITS], "=r,r,l,r,l,r,r,r,r,r",
            [at + t * TILE_BYTES, words_at, asked, stats_at, number, stats_step, position, last, stats_last],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def ask_outliers(place, Outliers, begin, end, lane, KEPT: gl.constexpr):
    """Begins to copy the words of outliers begin .. end - 1, of which KEPT are copied, to `place` of the lane's warp; behind
    them zeros."""
    gl.inline_asm_elementwise(
        _ASK_OUTLIERS[KEPT], "=r,r,l,r", [place + lane * 4, Outliers + (begin + lane), end - begin - lane], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
