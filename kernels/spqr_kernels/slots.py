"""x on its way to the tensor cores of `gemm_kernel`: a chunk in shared memory, two halves that Hopper's copy engine fills.

A half is two slots, and a slot 64 columns of WIDTH rows of x, 128 bytes each, as `wgmma` reads them: the 16-byte pieces of
row n stand at their number xor n % 8, and column 16 b + 4 c + 2 h + i of the 64 at 16 c + 8 h + 2 b + i, which is where a
lane's weights are in its words. `prepare.py` writes x so that slots that follow each other are one piece of memory.

Each half has two barriers (`mbarrier`): one tells that it has come, one that all warps are done with it. Warps wait for these
only, never for each other, so one may make weights while others multiply. This is PTX: Gluon would put barriers of the whole
program between what it knows of it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BARRIER_BYTES = 32  # of both halves
_WIDTHS = (32, 64, 128, 256)

# $1: the barriers, of each half that it came and, 8 bytes further, that it is free; $2 how many warps, $3 the thread.
_BEGIN = gl.constexpr(
    "{ .reg .pred p; .reg .b32 a; setp.lt.s32 p, $3, 2; mad.lo.u32 a, $3, 16, $1; @p mbarrier.init.shared::cta.b64 [a], 1;"
    " @p mbarrier.init.shared::cta.b64 [a+8], $2; @p fence.mbarrier_init.release.cluster; bar.sync 0; mov.b32 $0, $3; }"
)


def _ask(width: int) -> str:
    """PTX: where $5 is 0, the first warp waits until the half at $1 with barriers $2 is free, for use number $6 of it, and its
    lane 0 ($7) begins to copy it from slot number $4 of those at $3."""
    slot = 128 * width
    return (
        "{ .reg .pred p, q; .reg .b32 n; .reg .b64 a; setp.ne.s32 p, $5, 0;\n@p bra DONE;\nand.b32 n, $6, 1; xor.b32 n, n, 1;\n"
        f"mad.wide.u32 a, $4, {slot}, $3; setp.eq.s32 p, $7, 0;\n"
        "AGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 q, [$2+8], n;\n@!q bra AGAIN;\n"
        f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$2], {2 * slot};\n"
        f"@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [a], {2 * slot}, [$2];\n"
        "DONE: bar.warp.sync -1; mov.b32 $0, $7; }"
    )


_ASK = gl.constexpr({width: _ask(width) for width in _WIDTHS})
# Waits until the half with barriers $1 has come for use number $2.
_AWAIT = gl.constexpr(
    "{ .reg .pred q; .reg .b32 n; and.b32 n, $2, 1;\n"
    "AGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 q, [$1], n;\n@!q bra AGAIN;\nmov.b32 $0, $1; }"
)
# Lane 0 ($2) tells that its warp is done with the half with barriers $1.
_FREE = gl.constexpr("{ .reg .pred p; setp.eq.s32 p, $2, 0; @p mbarrier.arrive.shared::cta.b64 _, [$1+8]; mov.b32 $0, $1; }")
# What is written to shared memory as usual is there before what the copy engine writes.
_RELEASE = gl.constexpr("fence.proxy.async.shared::cta; bar.sync 0; mov.b32 $0, $1;")


@gluon.jit
def begin_ring(barriers, thread, WARPS: gl.constexpr):
    """Makes the barriers of both halves, 16 bytes each."""
    gl.inline_asm_elementwise(_BEGIN, "=r,r,r,r", [barriers, thread * 0 + WARPS, thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def ask_half(room, barriers, X, half: gl.constexpr, slot, use, warp, lane, WIDTH: gl.constexpr):
    """Begins to copy a half, from slot number `slot` of those in X on, for its use number `use`, once all warps are done with
    what it held. Done by the warp that has number `warp` = 0."""
    none = lane * 0
    gl.inline_asm_elementwise(
        _ASK[WIDTH], "=r,r,r,l,r,r,r,r",
        [room + half * (256 * WIDTH), barriers + half * 16, X.to(gl.int64) + none, none + slot, warp, use, lane],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def await_half(barriers, use, lane):
    """Waits until a half has come for its use number `use`. barriers: its own."""
    gl.inline_asm_elementwise(_AWAIT, "=r,r,r,~{memory}", [barriers, use], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def free_half(barriers, lane):
    """The lane's warp is done with a half. barriers: its own."""
    gl.inline_asm_elementwise(_FREE, "=r,r,r,~{memory}", [barriers, lane], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def release_room(thread):
    """All threads of the program are done with what they wrote to slots and read there, and the copy engine may write."""
    gl.inline_asm_elementwise(_RELEASE, "=r,r,~{memory}", [thread], dtype=gl.int32, is_pure=False, pack=1)
