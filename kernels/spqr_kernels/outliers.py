"""How the tensor-core kernels come by their outliers: cells of a tile and 128 columns (spec 5.3), through shared memory.

A warp puts the outliers of a cell into zeros, each where the lane that holds its weight will look for it, and the lanes add
what they find to their weights before the product: `fetch`, `put`, `add`, `clear`. This costs the same for any batch; for few
rows of x products of their own are faster (`pair_outliers`, `outlier_products`).

Gluon gives no address within shared memory, so this memory is declared in PTX; a warp uses its part alone, and waits for its
own lanes only."""

from __future__ import annotations

from functools import cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import CELL_COLUMNS, TILE, Layout

CELL_BYTES = 2 * TILE * CELL_COLUMNS  # of fp16
ENTRIES = (1, 2, 4)  # outliers that a lane may fetch at once

_CELL_BYTES = gl.constexpr(CELL_BYTES)
# Shared memory, by its size in bytes, aligned for `_AT`. $0 its address; $1 is not read.
_ROOMS = gl.constexpr({
    size: f"{{ .shared .align 32 .b8 room[{size}]; mov.u32 $0, room; }}"
    for size in (CELL_BYTES * warps for warps in (1, 2, 4, 8))
})  # fmt: skip
# Bytes, a power of two, that are more than so many KB and the rest of one.
_POWER_ABOVE = gl.constexpr({kb: 1 << (1024 * (kb + 1)).bit_length() - (kb & (kb + 1) == 0) for kb in range(49)})
_NONE = gl.constexpr(0xF000)  # a word of no outlier: its value is 0


# Room for a cell is [16 rows][128 columns] of fp16, in pieces of 16 bytes whose lowest bit is flipped in odd rows: the pieces
# that a quarter of a warp reads at once then lie in different banks. PTX: address $0 of the outlier of word $1 (spec 5.3: bits
# 0 .. 6 its column in the cell, 12 .. 15 its row) in the room at $2.
_AT = gl.constexpr("""{
.reg .b32 t, u;
and.b32 t, $1, 127;
mad.lo.u32 t, t, 2, $2;
shr.u32 u, $1, 4;
and.b32 u, u, 0xF00;
add.u32 t, t, u;
shr.u32 u, $1, 8;
and.b32 u, u, 16;
xor.b32 $0, t, u;
}""")
# Value of the word $2 to address $1, unless it is 0; zero there again.
_PUT = gl.constexpr(
    "{ .reg .pred p; .reg .b16 l, h; mov.b32 {l, h}, $2; setp.gt.u32 p, $2, 0xFFFF; @p st.shared.b16 [$1], h; mov.b32 $0, $1; }"
)
_TAKE = gl.constexpr(
    "{ .reg .pred p; .reg .b16 z; mov.b16 z, 0; setp.gt.u32 p, $2, 0xFFFF; @p st.shared.b16 [$1], z; mov.b32 $0, $1; }"
)
_WAIT = gl.constexpr("bar.warp.sync -1; mov.b32 $0, $1;")
_CLEAR = gl.constexpr(
    "{ .reg .b32 z; mov.b32 z, 0; "
    + " ".join(f"st.shared.v4.b32 [$1+{512 * q}], {{z, z, z, z}};" for q in range(CELL_BYTES // 512))
    + " bar.warp.sync -1; mov.b32 $0, $1; }"
)
# $0 .. $15: the weights $16 .. $31 (half2) plus what stands at $32 (columns 0 .. 7) and $33 (8 .. 15), and 8 rows further.
_ADD = gl.constexpr("{ .reg .b32 a, b, c, d;\n" + "\n".join(
    line for q in range(4) for line in (
        f"ld.shared.v4.b32 {{a, b, c, d}}, [${32 + q % 2}+{2048 * (q // 2)}];",
        *(f"add.rn.f16x2 ${4 * q + i}, ${16 + 4 * q + i}, {'abcd'[i]};" for i in range(4)),
    )
) + "\n}")  # fmt: skip
_ADD_REGISTERS = gl.constexpr(",".join(["=&r"] * 16 + ["r"] * 18))


@gluon.jit
def opt_in(OWN: gl.constexpr, SHARED: gl.constexpr):
    """A launch is allowed more than 48 KB of shared memory only where Triton's own part, SHARED bytes, is more: makes it so
    where OWN bytes of ours bring the sum above that."""
    if OWN + SHARED + 512 > 49152 and SHARED <= 49152:  # 512 for the scratch of reductions
        spare: gl.constexpr = _POWER_ABOVE[(49152 - SHARED) // 1024]
        memory = gl.allocate_shared_memory(gl.int32, [spare // 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        memory._keep_alive()


@gluon.jit
def room_for_cells(SHARED: gl.constexpr, warp, lane):
    """Address, for each lane, of room for a cell of its warp, all zeros. SHARED: bytes of shared memory of the kernel
    beside."""
    WARPS: gl.constexpr = warp.shape[0] // 32
    opt_in(_CELL_BYTES * WARPS, SHARED)
    room = gl.inline_asm_elementwise(_ROOMS[_CELL_BYTES * WARPS], "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)
    return cleared(room + warp * _CELL_BYTES, lane)


@gluon.jit
def cleared(room, lane):
    """A warp's room for a cell, all zeros."""
    done = gl.inline_asm_elementwise(_CLEAR, "=r,r", [room + lane * 16], dtype=gl.int32, is_pure=False, pack=1)
    return done - lane * 16


@gluon.jit
def fetch(Outliers, begin, end, lane, ENTRIES: gl.constexpr):
    """A lane's words of the cell begin .. end - 1, of which ENTRIES * 32 are fetched."""
    words = ()
    for i in gl.static_range(ENTRIES):
        at = begin + lane + 32 * i
        words = words + (gl.load(Outliers + at, mask=at < end, other=_NONE),)
    return words


@gluon.jit
def put(room, words, ENTRIES: gl.constexpr):
    """The fetched outliers into the room, for all lanes of the warp to see. Returns the room and where each was put."""
    places = ()
    for i in gl.static_range(ENTRIES):
        at = gl.inline_asm_elementwise(_AT, "=&r,r,r", [words[i], room], dtype=gl.int32, is_pure=True, pack=1)
        at = gl.inline_asm_elementwise(_PUT, "=r,r,r", [at, words[i]], dtype=gl.int32, is_pure=False, pack=1)
        places = places + (at,)
    room = gl.inline_asm_elementwise(_WAIT, "=r,r", [room], dtype=gl.int32, is_pure=False, pack=1)
    return room, places


@gluon.jit
def clear(room, words, places, ENTRIES: gl.constexpr):
    """Zeros again where `put` put them, once all lanes have added theirs."""
    room = gl.inline_asm_elementwise(_WAIT, "=r,r", [room], dtype=gl.int32, is_pure=False, pack=1)
    for i in gl.static_range(ENTRIES):
        gl.inline_asm_elementwise(_TAKE, "=r,r,r", [places[i], words[i]], dtype=gl.int32, is_pure=False, pack=1)
    return gl.inline_asm_elementwise(_WAIT, "=r,r", [room], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def add(weights, room, lane, slot: gl.constexpr):
    """16 words of fp16 weights of a lane (pairs 0 .. 7 of row l, of row l + 8) plus the outliers of slot 0 or 1 of the room."""
    odd = lane // 4 % 2 * 16
    own = room + (lane // 4 * 256 + lane % 4 * 32 + slot * 128)
    return gl.inline_asm_elementwise(
        _ADD, _ADD_REGISTERS, weights + (own + odd, own + (16 - odd)),
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32,
               gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False, pack=1,
    )  # fmt: skip


def outliers_a_lane(layout: Layout) -> int:
    """Outliers of a cell that a lane fetches, 1, 2 or 4: enough for nearly all cells of a matrix whose outliers lie
    anywhere. What does not fit is added by a slow way."""
    mean = TILE * CELL_COLUMNS * layout.outliers / (layout.out_features * layout.in_features)
    return next((n for n in ENTRIES if mean + 5 * mean**0.5 <= 32 * n), ENTRIES[-1])


@cache
def without_outliers(layout: Layout) -> tuple[Layout, int]:
    """What the kernels know of a layout: its geometry without outliers, and how many outliers a lane fetches of a cell, 0 where
    there are none. The same for all layers of a shape, which is what compiled launches are looked up by."""
    return layout.with_outliers(0), outliers_a_lane(layout) if layout.outliers else 0
