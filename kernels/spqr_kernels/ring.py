"""Chunks of the stored matrix on their way to a warp: a ring of stages in shared memory that each warp has for itself.

Gluon puts a barrier of the whole program between a copy to shared memory and what reads it. A warp that reads what its own
lanes copied has to wait for these only, so this memory is declared in PTX, and copied to and read in PTX: the warps of a
program run freely, and one that waits for its chunk does not hold up the others.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SET_BYTES = 192  # of the statistics codes of 16 groups (spec 4.3)
TOPS_BYTES = 128  # of the tile statistics of 16 groups


def stage_bytes(bits: int, bilevel: bool) -> int:
    """Bytes of a chunk: its words, then the codes and the tile statistics of 16 groups."""
    return 512 * bits + (SET_BYTES + TOPS_BYTES) * bilevel


_STAGES = (2, 3)
_WARPS = (1, 2, 4, 8)
_STAGE_BYTES = gl.constexpr({(bits, bilevel): stage_bytes(bits, bilevel) for bits in (2, 3, 4) for bilevel in (False, True)})
# $0 its address; $1 is not read.
_ROOMS = gl.constexpr({
    size: f"{{ .shared .align 16 .b8 ring[{size}]; mov.u32 $0, ring; }}"
    for size in {stage_bytes(b, bool(s)) * w * n for b in (2, 3, 4) for s in (0, 1) for w in _WARPS for n in _STAGES}
})  # fmt: skip


def _copy(bits: int, bilevel: bool) -> str:
    """PTX: begins the copies of a chunk to $1 (16 bytes further on from lane to lane) and commits them. $2 the lane's part of
    the first word of all blocks, $3 its part of codes or tile statistics, if $5 is not 0. What is not there, where $4 is 0,
    becomes zeros."""
    lines = [".reg .pred p, q;", ".reg .b32 n;", "setp.ne.s32 p, $4, 0;", "selp.b32 n, 16, 0, p;"]
    lines += [f"cp.async.cg.shared.global [$1+{512 * k}], [$2+{512 * k}], 16, n;" for k in range(bits)]
    if bilevel:
        lines += ["setp.ne.s32 q, $5, 0;", f"@q cp.async.cg.shared.global [$1+{512 * bits}], [$3], 16, n;"]
    return "{\n" + "\n".join([*lines, "cp.async.commit_group;", "mov.b32 $0, $1;"]) + "\n}"


_COPY = gl.constexpr({(bits, bilevel): _copy(bits, bilevel) for bits in (2, 3, 4) for bilevel in (False, True)})
_WAIT = gl.constexpr({left: f"cp.async.wait_group {left}; bar.warp.sync -1; mov.b32 $0, $1;" for left in (0, 1)})
# The four words of each lane at the address behind them.
_WORDS = gl.constexpr({
    bits: "\n".join(
        f"ld.shared.v4.b32 {{{', '.join(f'${4 * k + i}' for i in range(4))}}}, [${4 * bits}+{512 * k}];" for k in range(bits)
    ) for bits in (2, 3, 4)
})  # fmt: skip
_WORDS_REGISTERS = gl.constexpr({bits: ",".join(["=&r"] * (4 * bits) + ["r"]) for bits in (2, 3, 4)})
_READ1 = gl.constexpr("ld.shared.b32 $0, [$1];")
_READ2 = gl.constexpr("ld.shared.v2.b32 {$0, $1}, [$2];")
_READ4 = gl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];")
_READ2_LONG = gl.constexpr("ld.shared.v2.b64 {$0, $1}, [$2];")
_READ1_LONG = gl.constexpr("ld.shared.b64 $0, [$1];")


@gluon.constexpr_function
def bytes_of_stage(bits, bilevel):
    """`stage_bytes`, in a kernel."""
    return _STAGE_BYTES.value[(bits, bilevel)]


@gluon.jit
def room_for_ring(warp, lane, BITS: gl.constexpr, BILEVEL: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr):
    """Address of the stages of each lane's warp, one behind the other."""
    BYTES: gl.constexpr = bytes_of_stage(BITS, BILEVEL) * STAGES
    room = gl.inline_asm_elementwise(_ROOMS[BYTES * WARPS], "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)
    return room + warp * BYTES


@gluon.jit
def copy_chunk(stage, lane, words_at, statistics_at, there, has_statistics, BITS: gl.constexpr, BILEVEL: gl.constexpr):
    """Begins the copies of a chunk to `stage`, an address for each warp, and commits them; zeros where not `there`.

    words_at: of each lane's first four words. statistics_at: of the 16 bytes of statistics of those lanes that
    `has_statistics`, which follow each other."""
    gl.inline_asm_elementwise(
        _COPY[(BITS, BILEVEL)], "=r,r,l,l,r,r",
        [stage + lane * 16, words_at, statistics_at, lane * 0 + there, lane * 0 + has_statistics],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def wait_for_chunk(lane, LEFT: gl.constexpr):
    """Waits until all but the last LEFT copies of the warp have arrived, for all its lanes to see."""
    gl.inline_asm_elementwise(_WAIT[LEFT], "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def read_words(stage, lane, BITS: gl.constexpr):
    """What a lane holds of its blocks tid, 4 + tid, 8 + tid and 12 + tid: BITS words of each."""
    at = stage + lane * 16
    if BITS == 2:
        w = gl.inline_asm_elementwise(_WORDS[2], _WORDS_REGISTERS[2], [at], dtype=(gl.int32,) * 8, is_pure=False, pack=1)
        return (w[0], w[4]), (w[1], w[5]), (w[2], w[6]), (w[3], w[7])
    elif BITS == 3:
        w = gl.inline_asm_elementwise(_WORDS[3], _WORDS_REGISTERS[3], [at], dtype=(gl.int32,) * 12, is_pure=False, pack=1)
        return (w[0], w[4], w[8]), (w[1], w[5], w[9]), (w[2], w[6], w[10]), (w[3], w[7], w[11])
    else:
        w = gl.inline_asm_elementwise(_WORDS[4], _WORDS_REGISTERS[4], [at], dtype=(gl.int32,) * 16, is_pure=False, pack=1)
        return (
            (w[0], w[4], w[8], w[12]), (w[1], w[5], w[9], w[13]), (w[2], w[6], w[10], w[14]), (w[3], w[7], w[11], w[15])
        )  # fmt: skip


@gluon.jit
def read1(at):
    """One word."""
    return gl.inline_asm_elementwise(_READ1, "=r,r", [at], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def read2(at):
    """Two words."""
    return gl.inline_asm_elementwise(_READ2, "=&r,=&r,r", [at], dtype=(gl.int32, gl.int32), is_pure=False, pack=1)


@gluon.jit
def read4(at):
    """Four words."""
    return gl.inline_asm_elementwise(
        _READ4, "=&r,=&r,=&r,=&r,r", [at], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1
    )


@gluon.jit
def read_long(at):
    """Eight bytes."""
    return gl.inline_asm_elementwise(_READ1_LONG, "=l,r", [at], dtype=gl.int64, is_pure=False, pack=1)


@gluon.jit
def read2_long(at):
    """Eight bytes, and the next eight."""
    return gl.inline_asm_elementwise(_READ2_LONG, "=&l,=&l,r", [at], dtype=(gl.int64, gl.int64), is_pure=False, pack=1)
