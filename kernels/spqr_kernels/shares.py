"""Programs that share a product evenly. All chunks of all pieces of Y, piece after piece, are a line of positions, of which the
first `extra` programs take base + 1 each and the others base. Where a piece is shared, each program leaves its part in global
memory, and the one that has the piece's last chunk adds them up, in one order.

A program waits only for programs before it, and those began before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .lanes import barrier

# A part is there where its flag is this, a nan; one that is not is no sum of a kernel before, nor left by one: who reads a part
# clears its flag. Memory that nobody wrote is this by chance in one of 2**64 cases.
_MAGIC = 0x7FC0_5351_9E37_79B9
_PUBLISH = gl.constexpr(
    f"{{ .reg .pred p; .reg .b64 m; mov.b64 m, {_MAGIC:#x}; setp.eq.s32 p, $2, 0; @p st.release.gpu.global.b64 [$1], m;"
    " mov.b32 $0, $2; }"
)
# Waits for flag $1 and clears it, if $2 is before $3.
_AWAIT = gl.constexpr(
    f"{{ .reg .pred p, q; .reg .b64 f, m; mov.b64 m, {_MAGIC:#x}; mov.b64 f, m; setp.lt.s32 q, $2, $3;\nAGAIN:\n"
    "@q ld.acquire.gpu.global.b64 f, [$1];\nsetp.ne.b64 p, f, m;\n@p bra AGAIN;\n"
    "mov.b64 m, 0; @q st.global.b64 [$1], m; mov.b32 $0, $2; }"
)


@dataclass(frozen=True)
class Share:
    """How many programs share the positions of a matrix, and what each has: base, the first `extra` of them one more."""

    programs: int
    base: int
    extra: int


def share_out(positions: Sequence[int], programs: int) -> tuple[Share, ...]:
    """About so many programs for matrices of so many positions: in proportion, and one for each at least. programs: at most
    half of all positions, so that each has work."""
    found, begin, passed = [], 0, 0
    for count in positions:
        passed += count
        end = max(begin + 1, passed * programs // sum(positions))
        found.append(Share(end - begin, *divmod(count, end - begin)))
        begin = end
    return tuple(found)


@gluon.jit
def last_position(program, base, extra):
    """The position behind a program's last one; no position is before those of program 0."""
    return (program + 1) * base + gl.minimum(program + 1, extra)


@gluon.jit
def publish(flag, thread):
    """What all threads of the program have written is there for who awaits the flag, eight bytes."""
    barrier()
    gl.inline_asm_elementwise(_PUBLISH, "=r,l,r,~{memory}", [flag, thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_parts(flags, program, piece_begin, base, extra, thread):
    """Waits for the flags of all programs before this one that have a position from piece_begin on."""
    THREADS: gl.constexpr = thread.shape[0]
    other = program - 1
    while last_position(other, base, extra) > piece_begin:
        mine = other - thread
        gl.inline_asm_elementwise(
            _AWAIT, "=r,l,r,r,~{memory}", [flags + mine, thread * 0 + piece_begin, last_position(mine, base, extra)],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        other -= THREADS
    barrier()
