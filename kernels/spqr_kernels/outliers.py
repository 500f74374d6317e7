"""How the tensor-core kernels come by their outliers: cells of a tile and 128 columns (spec 5.3), through shared memory.

Batches: a warp puts the outliers of a cell into zeros, each where the lane that holds its weight will look for it, and the
lanes add what they find to their weights before the product: `fetch`, `put`, `add`, `clear`. This costs the same for any
batch.

Batch 1: the outliers of a tile are copied to shared memory on the way (`ask`) and multiplied with x at the end (`products`).
Each lane has a sum of its own for each of the 16 rows, so that no two lanes meet, and the order of every sum is fixed.

Gluon gives no address within shared memory, so this memory is declared in PTX; a warp uses its part alone, and waits for its
own lanes only."""

from __future__ import annotations

from functools import cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import CELL_COLUMNS, TILE, Layout

CELL_BYTES = 2 * TILE * CELL_COLUMNS  # of fp16
# Outliers of a tile that `ask` may copy: if there are more, these are read when their turn comes. 6144 is what leaves a
# program of 4 warps within 48 KB.
KEPT = (2048, 6144)

_CELL_BYTES = gl.constexpr(CELL_BYTES)
# Shared memory, by its size in bytes. $0 its address; $1 is not read.
_ROOMS = gl.constexpr({
    size: f"{{ .shared .align 16 .b8 room[{size}]; mov.u32 $0, room; }}"
    for warps in (1, 2, 4, 8) for size in (CELL_BYTES * warps, *(4 * kept + 2048 * warps for kept in KEPT))
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
    room += warp * _CELL_BYTES
    cleared = gl.inline_asm_elementwise(_CLEAR, "=r,r", [room + lane * 16], dtype=gl.int32, is_pure=False, pack=1)
    return cleared - lane * 16


@gluon.jit
def fetch(Outliers, begin, end, lane, ENTRIES: gl.constexpr):
    """A lane's words of the cell begin .. end - 1, of which ENTRIES * 32 are fetched."""
    words = ()
    for i in gl.static_range(ENTRIES):
        at = begin + lane + 32 * i
        words = words + (gl.load(Outliers + at, mask=at < end, other=_NONE),)
    return words


@gluon.jit
def most_in_a_cell(Pointers, begin, cells, lane):
    """How many outliers the fullest of `cells` cells from `begin` on has, of those that the lane looks at."""
    most = lane * 0
    for first in range(0, cells, 32):
        there = first + lane < cells
        at = Pointers + begin + first + lane
        most = gl.maximum(most, gl.load(at + 1, mask=there, other=0) - gl.load(at, mask=there, other=0))
    return most


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
    return next((n for n in (1, 2) if mean + 5 * mean**0.5 <= 32 * n), 4)


@cache
def without_outliers(layout: Layout) -> tuple[Layout, int, int]:
    """What the kernels of batches and of experts know of a layout: its geometry without outliers, how many of a cell a lane
    fetches, and how many of a tile are kept; 0 and 0 where there are none. The same for all layers of a shape, which is what
    compiled launches are looked up by."""
    some = layout.outliers > 0
    return layout.with_outliers(0), some * outliers_a_lane(layout), some * outliers_kept(layout)


# Copies the outliers $2 from place $3 on and below $4, $7 at most, to the room $1 with the group of copies that is committed
# next; $5 the thread, $6 threads. Places are multiples of 4. $0 is $1.
_ASK = gl.constexpr("""{
.reg .pred p;
.reg .b32 i, a, end;
.reg .b64 g;
add.s32 end, $3, $7;
min.s32 end, end, $4;
mad.lo.s32 a, $5, 16, $1;
mad.lo.s32 i, $5, 4, $3;
NEXT:
setp.ge.s32 p, i, end;
@p bra DONE;
mad.wide.s32 g, i, 4, $2;
cp.async.cg.shared.global [a], [g], 16;
mad.lo.s32 i, $6, 4, i;
mad.lo.s32 a, $6, 16, a;
bra NEXT;
DONE:
mov.b32 $0, $1;
}""")


def _products(bfloat: bool) -> str:
    """PTX: a thread's outliers times x, added to its sum of their row. It has four in a row of every 4 * threads.

    Inputs: $1 the thread's sums, 128 bytes from row to row; $2 the kept outliers, from place $3 on; $4 all of them; $5 first
    place and $6 end; $7 the thread, $8 threads; $9 x of the first column of their panel; $10 place behind
    the kept. $0 is $1."""
    kind = "bf16" if bfloat else "f16"
    lines = [
        ".reg .pred p, q;", ".reg .b32 i, n, a, c, m;", ".reg .b64 g;",
        *(f".reg .b32 w{n}, a{n}; .reg .b16 l{n}, h{n}, x{n}; .reg .f32 v{n}, f{n}, s{n}; .reg .pred p{n};" for n in range(4)),
        # place of the thread's first four, as multiple of 4
        "and.b32 i, $5, -4;", "mad.lo.s32 i, $7, 4, i;", "sub.s32 n, $6, $5;",
        "MORE:", "setp.ge.s32 p, i, $6;", "@p bra DONE;",
        "sub.s32 m, i, $5;",
        *(line for n in range(4) for line in (f"add.s32 c, m, {n};", f"setp.lt.u32 p{n}, c, n;")),
        "setp.ge.s32 q, i, $10;", "@q bra FAR;",
        "sub.s32 a, i, $3;", "mad.lo.s32 a, a, 4, $2;", "ld.shared.v4.b32 {w0, w1, w2, w3}, [a];", "bra THERE;",
        "FAR:", "mad.wide.s32 g, i, 4, $4;",
        *(f"mov.b32 w{n}, 0;\n@p{n} ld.global.nc.b32 w{n}, [g+{4 * n}];" for n in range(4)),
        "THERE:",
    ]  # fmt: skip
    for n in range(4):
        lines += [
            f"and.b32 c, w{n}, 0xFFF;",
            "mad.wide.u32 g, c, 2, $9;",
            f"mov.b16 x{n}, 0;",
            f"@p{n} ld.global.b16 x{n}, [g];",
        ]
    for n in range(4):
        lines += [
            f"shr.u32 c, w{n}, 5;", "and.b32 c, c, 0x780;", f"add.u32 a{n}, c, $1;", f"ld.shared.f32 s{n}, [a{n}];",
            f"mov.b32 {{l{n}, h{n}}}, w{n};", f"cvt.f32.f16 v{n}, h{n};", f"cvt.f32.{kind} f{n}, x{n};",
            f"fma.rn.f32 s{n}, v{n}, f{n}, s{n};", f"st.shared.f32 [a{n}], s{n};",
        ]  # fmt: skip
    lines += ["mad.lo.s32 i, $8, 4, i;", "bra MORE;", "DONE:", "mov.b32 $0, $1;"]
    return "{\n" + "\n".join(lines) + "\n}"


_PRODUCTS = gl.constexpr({0: _products(False), 8: _products(True)})
# Sums of a warp over eight lanes: $0 of the row at $2, $1 of the row eight further. Lanes of the quad add to the sum of all.
_GATHER = gl.constexpr("{ .reg .f32 a, b, c, d, s;\nbar.warp.sync -1;\n" + "\n".join(
    "mov.f32 s, 0f00000000;\n" + "\n".join(
        f"ld.shared.v4.f32 {{a, b, c, d}}, [$2+{1024 * half + 16 * part}];\n"
        + "".join(f"add.f32 s, s, {word};\n" for word in "abcd")
        for part in range(2)
    ) + f"\nmov.f32 ${half}, s;" for half in range(2)
) + "\n}")  # fmt: skip
_ZERO_SUMS = gl.constexpr(
    "{ .reg .f32 z; mov.f32 z, 0f00000000; " + " ".join(f"st.shared.v4.f32 [$1+{512 * i}], {{z, z, z, z}};" for i in range(4))
    + " bar.warp.sync -1; mov.b32 $0, $1; }"
)  # fmt: skip


@gluon.jit
def room_for_products(SHARED: gl.constexpr, thread, KEPT: gl.constexpr):
    """Address of the room of `ask` and `products`. SHARED: bytes of shared memory of the kernel beside."""
    WARPS: gl.constexpr = thread.shape[0] // 32
    opt_in(4 * KEPT + 2048 * WARPS, SHARED)
    return gl.inline_asm_elementwise(_ROOMS[4 * KEPT + 2048 * WARPS], "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _fours(outliers):
    """Behind the last place that is copied: copies are of four outliers, and none reads behind the array."""
    return outliers // 4 * 4


@gluon.jit
def ask(room, Outliers, begin, end, outliers, thread, KEPT: gl.constexpr):
    """Begins to copy the outliers begin .. end - 1 of a tile, KEPT at most, of `outliers` in all, with the group of copies that
    is committed next."""
    none = thread * 0
    return gl.inline_asm_elementwise(
        _ASK, "=r,r,l,r,r,r,r,r",
        [room, Outliers + none, none + begin // 4 * 4, none + gl.minimum(end, _fours(outliers)), thread,
         none + thread.shape[0], none + KEPT],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def products(
    room, Pointers, Outliers, X, tile, cells, first, outliers, thread, KEPT: gl.constexpr, BF: gl.constexpr
):  # fmt: skip
    """Sums of the outliers of a tile, from place `first` on, of `outliers` in all, times x [in]: a lane's share of those of
    rows gid and gid + 8, to be added over the quad and the warps."""
    none = thread * 0
    lane = thread % 32
    sums = room + (4 * KEPT + thread // 32 * 2048)
    own = gl.inline_asm_elementwise(_ZERO_SUMS, "=r,r", [sums + lane * 16], dtype=gl.int32, is_pure=False, pack=1) - lane * 12
    pointers = Pointers + tile.to(gl.int64) * cells
    begin = first
    for panel in range(0, cells, 32):  # 4096 columns
        end = gl.load(pointers + gl.minimum(panel + 32, cells))
        own = gl.inline_asm_elementwise(
            _PRODUCTS[BF], "=r,r,r,r,l,r,r,r,r,l,r",
            [own, room, none + first // 4 * 4, Outliers + none, none + begin, none + end, thread, none + thread.shape[0],
             X + (none + panel * 128), none + gl.minimum(first // 4 * 4 + KEPT, _fours(outliers))],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        begin = end
    return gl.inline_asm_elementwise(
        _GATHER,
        "=&f,=&f,r",
        [own - lane * 4 + (lane // 4 * 128 + lane % 4 * 32)],
        dtype=(gl.float32, gl.float32),
        is_pure=False,
        pack=1,
    )


def outliers_kept(layout: Layout) -> int:
    """How many outliers of a tile `ask` copies: nearly always all of them, unless there are very many."""
    mean = TILE * layout.outliers / layout.out_features
    return next((kept for kept in KEPT if mean + 5 * mean**0.5 <= kept), KEPT[-1])
