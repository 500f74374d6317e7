"""What a warp of the one-row kernel has in shared memory: chunks of the stored matrix and x on their way to it.

Gluon puts a barrier of the whole program between a copy to shared memory and what reads it. A warp that reads what its own
lanes copied has to wait for these only, so this memory is declared in PTX, and copied to and read in PTX: the warps of a
program run freely, and one that waits for its chunk does not hold up the others.

A warp takes its chunks in pairs, 512 columns that follow each other, and for each of a pair there is a stage. x and outliers
are copied for a pair at once, for the next pair while this one is multiplied, so there is room for two. From L1, where x would
be too, a lane would wait for it in every chunk, and behind a miss much longer.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import TILE

SET_BYTES = 192  # of the statistics codes of 16 groups (spec 4.3)
TOPS_BYTES = 128  # of the tile statistics of 16 groups
X_BYTES = 1024  # of x of a pair
SUMS_BYTES = 32 * TILE * 4  # of a warp: its lanes' sums of each row over the outliers
ENTRIES = (1, 2, 3, 4, 6)  # outliers of a pair, of each lane, for which there may be room
MOST_BYTES = 48 << 10  # that a program may declare


def stage_bytes(bits: int, bilevel: bool) -> int:
    """Bytes of a chunk: its words, then the codes and the tile statistics of 16 groups."""
    return 512 * bits + (SET_BYTES + TOPS_BYTES) * bilevel


def warp_bytes(bits: int, bilevel: bool, entries: int, permuted: bool) -> int:
    """Bytes of a warp: two stages; twice x of a pair, x of its outliers where the columns are permuted, and its outliers; sums
    where there are any."""
    return 2 * (stage_bytes(bits, bilevel) + X_BYTES * (1 + permuted) + 128 * entries) + SUMS_BYTES * (entries > 0)


_WARPS = (1, 2, 4, 8)
_KINDS = [(b, s, e, p) for b in (2, 3, 4) for s in (False, True) for e in (0, *ENTRIES) for p in (False, True)]
_STAGE_BYTES = gl.constexpr({(bits, bilevel): stage_bytes(bits, bilevel) for bits, bilevel, _, _ in _KINDS})
_WARP_BYTES = gl.constexpr({kind: warp_bytes(*kind) for kind in _KINDS})
# $0 its address; $1 is not read.
_ROOMS = gl.constexpr({
    size: f"{{ .shared .align 128 .b8 ring[{size}]; mov.u32 $0, ring; }}"
    for size in {warp_bytes(*kind) * warps for kind in _KINDS for warps in _WARPS}
})  # fmt: skip
# 832 zeros behind 48 bytes: lanes that read them and lanes that read x then do so from different banks. $1 the thread.
ZEROS_BYTES = 896
_ZEROS = gl.constexpr(
    f"{{ .shared .align 128 .b8 zeros[{ZEROS_BYTES}]; .reg .pred p; .reg .b32 a, z; mov.u32 a, zeros; mov.b32 z, 0;\n"
    f"mad.lo.u32 a, $1, 32, a; setp.lt.s32 p, $1, {ZEROS_BYTES // 32};\n"
    "@p st.shared.v4.b32 [a], {z, z, z, z}; @p st.shared.v4.b32 [a+16], {z, z, z, z};\n"
    "mov.u32 a, zeros; add.u32 $0, a, 48; }"
)


def _copy(bits: int, bilevel: bool) -> str:
    """PTX: begins the copies of a chunk to $1 (16 bytes further on from lane to lane). $2 the lane's part of the first word of
    all blocks, $3 its part of codes or tile statistics, if $5 is not 0. What is not there, where $4 is 0, becomes zeros."""
    lines = [".reg .pred p, q;", ".reg .b32 n;", "setp.ne.s32 p, $4, 0;", "selp.b32 n, 16, 0, p;"]
    lines += [f"cp.async.cg.shared.global [$1+{512 * k}], [$2+{512 * k}], 16, n;" for k in range(bits)]
    if bilevel:
        lines += ["setp.ne.s32 q, $5, 0;", f"@q cp.async.cg.shared.global [$1+{512 * bits}], [$3], 16, n;"]
    return "{\n" + "\n".join([*lines, "mov.b32 $0, $1;"]) + "\n}"


_COPY = gl.constexpr({(bits, bilevel): _copy(bits, bilevel) for bits in (2, 3, 4) for bilevel in (False, True)})
# 16 bytes of x to $1 from $2, zeros where $3 is 0: by L1, as all programs read them.
_COPY_X = gl.constexpr(
    "{ .reg .pred p; .reg .b32 n; setp.ne.s32 p, $3, 0; selp.b32 n, 16, 0, p;"
    " cp.async.ca.shared.global [$1], [$2], 16, n; mov.b32 $0, $1; }"
)
_COMMIT = gl.constexpr("cp.async.commit_group; mov.b32 $0, $1;")
_WAIT = gl.constexpr("cp.async.wait_group 0; bar.warp.sync -1; mov.b32 $0, $1;")
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


@gluon.constexpr_function
def bytes_of_warp(bits, bilevel, entries, permuted):
    """`warp_bytes`, in a kernel."""
    return _WARP_BYTES.value[(bits, bilevel, entries, permuted)]


@gluon.jit
def room_for_warp(warp, lane, BYTES: gl.constexpr, WARPS: gl.constexpr):
    """Address of BYTES of each lane's warp, a multiple of 128."""
    room = gl.inline_asm_elementwise(_ROOMS[BYTES * WARPS], "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)
    return room + warp * BYTES


@gluon.jit
def room_of_zeros(thread):
    """Address of 832 bytes that are zeros once all threads have come to a barrier: 48 bytes behind a multiple of 128."""
    return gl.inline_asm_elementwise(_ZEROS, "=&r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def copy_chunk(own, words_at, statistics_at, there, has_statistics, BITS: gl.constexpr, BILEVEL: gl.constexpr):
    """Begins the copies of a chunk to a stage; zeros where not `there`.

    own: the lane's first 16 bytes of the stage. words_at: its first four words. statistics_at: of the 16 bytes of statistics of
    those lanes that `has_statistics`, which follow each other."""
    gl.inline_asm_elementwise(
        _COPY[(BITS, BILEVEL)], "=r,r,l,l,r,r", [own, words_at, statistics_at, there, has_statistics],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def copy_x(own, x_at, chunk, chunks):
    """Begins to copy x of a pair, zeros where a chunk is not below `chunks`. own, x_at: the lane's first 16 bytes of x."""
    for half in gl.static_range(2):
        there = (chunk + half < chunks).to(gl.int32)
        gl.inline_asm_elementwise(
            _COPY_X, "=r,r,l,r", [own + half * 512, x_at + half * 128, there], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def commit_copies(lane):
    """What the lane has begun to copy is waited for together."""
    gl.inline_asm_elementwise(_COMMIT, "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_copies(lane):
    """Waits until all copies of the warp have arrived, for all its lanes to see."""
    gl.inline_asm_elementwise(_WAIT, "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def read_words(at, BITS: gl.constexpr):
    """What a lane holds of its blocks tid, 4 + tid, 8 + tid and 12 + tid: BITS words of each. at: its first 16 bytes."""
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
    return gl.inline_asm_elementwise(_READ2, "=r,=r,r", [at], dtype=(gl.int32, gl.int32), is_pure=False, pack=1)


@gluon.jit
def read4(at):
    """Four words."""
    return gl.inline_asm_elementwise(
        _READ4, "=r,=r,=r,=r,r", [at], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1
    )


@gluon.jit
def read_long(at):
    """Eight bytes."""
    return gl.inline_asm_elementwise(_READ1_LONG, "=l,r", [at], dtype=gl.int64, is_pure=False, pack=1)


@gluon.jit
def read2_long(at):
    """Eight bytes, and the next eight."""
    return gl.inline_asm_elementwise(_READ2_LONG, "=l,=l,r", [at], dtype=(gl.int64, gl.int64), is_pure=False, pack=1)
