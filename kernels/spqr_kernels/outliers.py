"""How the tensor-core kernels come by their outliers: cells of a tile and 128 columns (spec 5.3), through shared memory.

Batches: a warp puts the outliers of a cell into zeros, each where the lane that holds its weight will look for it, and the
lanes add what they find to their weights before the product: `fetch`, `put`, `add`, `clear`. This costs the same for any
batch.

Batch 1: a warp multiplies the outliers of each of its chunks, two cells, with x beside the chunk (`fetch_chunk`,
`add_products`). They are asked for a chunk ahead, and what points to them two. Each lane has a sum of its own for each of
the 16 rows, so that no two lanes meet, and the order of every sum is fixed.

Gluon gives no address within shared memory, so this memory is declared in PTX; a warp uses its part alone, and waits for its
own lanes only."""

from __future__ import annotations

from functools import cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import CELL_COLUMNS, CHUNK, TILE, Layout

CELL_BYTES = 2 * TILE * CELL_COLUMNS  # of fp16
SUMS_BYTES = 32 * TILE * 4  # of a warp: its lanes' sums of each row
ENTRIES = (1, 2, 4)  # outliers that a lane may fetch at once

_CELL_BYTES = gl.constexpr(CELL_BYTES)
_SUMS_BYTES = gl.constexpr(SUMS_BYTES)
# Shared memory, by its size in bytes, aligned for `_AT`. $0 its address; $1 is not read.
_ROOMS = gl.constexpr({
    size: f"{{ .shared .align 32 .b8 room[{size}]; mov.u32 $0, room; }}"
    for warps in (1, 2, 4, 8) for size in (CELL_BYTES * warps, SUMS_BYTES * warps)
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
    return next((n for n in ENTRIES if mean + 5 * mean**0.5 <= 32 * n), ENTRIES[-1])


def entries_of_chunk(layout: Layout) -> int:
    """The same for a chunk at batch 1, where what does not fit costs less: enough for most chunks."""
    mean = TILE * CHUNK * TILE * layout.outliers / (layout.out_features * layout.in_features)
    return next((n for n in ENTRIES if mean + 2 * mean**0.5 <= 32 * n), ENTRIES[-1])


@cache
def without_outliers(layout: Layout) -> tuple[Layout, int, int]:
    """What the kernels know of a layout: its geometry without outliers, and how many outliers a lane fetches of a cell and, at
    batch 1, of a chunk; 0 and 0 where there are none. The same for all layers of a shape, which is what compiled launches are
    looked up by."""
    some = layout.outliers > 0
    return layout.with_outliers(0), some * outliers_a_lane(layout), some * entries_of_chunk(layout)


def _product(bfloat: bool, n: int, x: str, before: str, sums: str) -> tuple[list[str], list[str]]:
    """PTX: the outlier of word w{n} times x, added to the thread's sum of its row: what asks for x, and what waits for it.

    x: of the first column, `before` bytes before that of the outlier's chunk. sums: the thread's, 128 bytes from row to row."""
    return [
        f"setp.gt.u32 p{n}, w{n}, 0xFFFF;", f"and.b32 c, w{n}, 255;", f"mad.lo.u32 c, c, 2, {before};", "cvt.u64.u32 g, c;",
        f"add.s64 g, {x}, g;", f"@p{n} ld.global.b16 x{n}, [g];",
    ], [
        f"and.b32 c, w{n}, 0xF000;", "shr.u32 c, c, 5;", f"add.u32 c, c, {sums};", f"ld.shared.f32 s{n}, [c];",
        f"mov.b32 {{l, h}}, w{n};", f"cvt.f32.f16 v{n}, h;", f"cvt.f32.{'bf16' if bfloat else 'f16'} f{n}, x{n};",
        f"@p{n} fma.rn.f32 s{n}, v{n}, f{n}, s{n};", f"st.shared.f32 [c], s{n};",
    ]  # fmt: skip


def _registers(entries: int) -> list[str]:
    """Those that `_product` of so many outliers names."""
    lines = [".reg .b32 c;", ".reg .b64 g;", ".reg .b16 l, h;"]
    return lines + [f".reg .b32 w{n}; .reg .b16 x{n}; .reg .f32 v{n}, f{n}, s{n}; .reg .pred p{n};" for n in range(entries)]


def _fetch_chunk(bfloat: bool, entries: int) -> str:
    """PTX: fetches a lane's outliers of the chunk whose bounds are known, and the bounds of the chunk after it; and adds the
    products of those outliers of the chunk for which there are no registers, one a lane after the other.

    Outputs: words of `entries` outliers, 0 where there are none; first place of the chunk after it and its end, 0 and 0
    where there is none. Inputs: first place and end, the lane, all outliers, where the bounds are to be read, and their
    chunk's number and all chunks; sums, x and the bytes before the chunk as `_product` has them."""
    words = [f"${n}" for n in range(entries)]
    begin, end, lane, outliers, at, chunk, chunks, sums, x, before = (f"${entries + 2 + i}" for i in range(10))
    first, last = f"${entries}", f"${entries + 1}"
    ask, wait = _product(bfloat, 0, x, before, sums)
    lines = [".reg .pred p;", ".reg .b32 n, i;", *_registers(1)]
    lines += [f"sub.s32 n, {end}, {begin};", f"add.s32 i, {begin}, {lane};", f"mad.wide.s32 g, i, 4, {outliers};"]
    for k, word in enumerate(words):
        lines += [f"mov.b32 {word}, 0;", f"setp.lt.s32 p, {lane}, n;", f"@p ld.global.nc.b32 {word}, [g+{128 * k}];"]
        lines.append("sub.s32 n, n, 32;")
    lines += [f"mov.b32 {first}, 0;", f"mov.b32 {last}, 0;", f"setp.lt.s32 p, {chunk}, {chunks};"]
    lines += [f"@p ld.global.nc.b32 {first}, [{at}];", f"@p ld.global.nc.b32 {last}, [{at}+8];"]
    lines += [
        "setp.gt.s32 p, n, 0;", "@!p bra DONE;", f"add.s32 i, i, {32 * entries};",
        "MORE:", f"setp.lt.s32 p, i, {end};", "@!p bra DONE;", f"mad.wide.s32 g, i, 4, {outliers};",
        "ld.global.nc.b32 w0, [g];", *ask, *wait, "add.s32 i, i, 32;", "bra MORE;", "DONE:",
    ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"


def _add_products(bfloat: bool, entries: int) -> str:
    """PTX: a thread's `entries` outliers of a chunk times x, each added to the thread's sum of its row. Inputs: $1 sums, $2 x,
    $3 the bytes before the chunk as `_product` has them; then the words. $0 is $1."""
    lines = _registers(entries) + [f"mov.b32 w{n}, ${4 + n};" for n in range(entries)]
    products = [_product(bfloat, n, "$2", "$3", "$1") for n in range(entries)]
    lines += [line for ask, _ in products for line in ask] + [line for _, wait in products for line in wait]
    return "{\n" + "\n".join([*lines, "mov.b32 $0, $1;"]) + "\n}"


_FETCH_CHUNK = gl.constexpr({(bf, n): _fetch_chunk(bool(bf), n) for bf in (0, 8) for n in ENTRIES})
_FETCH_CHUNK_REGISTERS = gl.constexpr({n: ",".join(["=&r"] * (n + 2) + list("rrrllrrrlr")) for n in ENTRIES})
_ADD_PRODUCTS = gl.constexpr({(bf, n): _add_products(bool(bf), n) for bf in (0, 8) for n in ENTRIES})
_ADD_PRODUCTS_REGISTERS = gl.constexpr({n: ",".join(["=r", "r", "l", "r"] + ["r"] * n) for n in ENTRIES})
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
def room_for_sums(warp, lane):
    """Address of a lane's sums, one for each of the 16 rows, all zeros."""
    WARPS: gl.constexpr = warp.shape[0] // 32
    room = gl.inline_asm_elementwise(_ROOMS[_SUMS_BYTES * WARPS], "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1)
    at = room + warp * _SUMS_BYTES
    return gl.inline_asm_elementwise(_ZERO_SUMS, "=r,r", [at + lane * 16], dtype=gl.int32, is_pure=False, pack=1) - lane * 12


@gluon.jit
def bounds(pointers, chunk, chunks):
    """Where the outliers of a chunk begin and end, 0 and 0 where `chunk` is not below `chunks`. pointers: of the tile's cells,
    of which a chunk has two."""
    there = chunk < chunks
    at = pointers + 2 * chunk
    return gl.load(at, mask=there, other=0), gl.load(at + 2, mask=there, other=0)


@gluon.jit
def fetch_chunk(
    Outliers, begin, end, pointers, chunk, step, chunks, sums, X, lane, ENTRIES: gl.constexpr, BF: gl.constexpr
):  # fmt: skip
    """A lane's words of the chunk's outliers begin .. end - 1, for `add_products`, and the `bounds` of the chunk `step` behind
    it. A lane fetches ENTRIES of them; if there are more, their products with x are added to the sums here."""
    none = lane * 0
    later = chunk + step
    found = gl.inline_asm_elementwise(
        _FETCH_CHUNK[(BF, ENTRIES)], _FETCH_CHUNK_REGISTERS[ENTRIES],
        [begin, end, lane, Outliers + none, pointers + 2 * later, later, none + chunks, sums, X + none, chunk * 512],
        dtype=(gl.int32,) * (ENTRIES + 2), is_pure=False, pack=1,
    )  # fmt: skip
    words = ()
    for n in gl.static_range(ENTRIES):
        words = words + (found[n],)
    return words, found[ENTRIES], found[ENTRIES + 1]


@gluon.jit
def add_products(sums, words, X, chunk, lane, ENTRIES: gl.constexpr, BF: gl.constexpr):
    """The outliers of a chunk that `fetch_chunk` fetched times x, added to the lane's sums."""
    gl.inline_asm_elementwise(
        _ADD_PRODUCTS[(BF, ENTRIES)], _ADD_PRODUCTS_REGISTERS[ENTRIES], (sums, X + lane * 0, chunk * 512) + words,
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def sums_of_rows(sums, lane):
    """A lane's share of the warp's sums of rows gid and gid + 8, to be added over the quad."""
    return gl.inline_asm_elementwise(
        _GATHER, "=&f,=&f,r", [sums - lane * 4 + (lane // 4 * 128 + lane % 4 * 32)], dtype=(gl.float32, gl.float32),
        is_pure=False, pack=1,
    )  # fmt: skip
