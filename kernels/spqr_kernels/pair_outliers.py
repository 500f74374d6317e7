"""Outliers at batch 1: of a tile and a pair of chunks, 512 columns, multiplied by the warp that has the pair.

They come to shared memory with the pair (`ring`), as what the cells of a pair own follows each other (spec 5.3). Where they
begin and end each lane reads for one step of its warp, 32 at a time, so nothing waits for that on the way. Each lane has a sum
of its own for each of the 16 rows, so that no two lanes meet, and the order of every sum is fixed.
"""

from __future__ import annotations

from functools import cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import CHUNK, TILE, Layout

from .ring import ENTRIES


def _hold_bounds(warps: int) -> str:
    """PTX: bounds $0 and $1 of the outliers that the warp multiplies in step $4 plus the lane, where $4 is a multiple of 32;
    else those that are held, $2 and $3. $5 lane, $6 warp; of the tile's $8 cells the pointers begin at $7. In a step a warp has
    four cells, and where two are enough for all that is left, two."""
    return "\n".join([
        "{ .reg .pred p, q; .reg .b32 c, e, n; .reg .b64 a, b;", "mov.b32 $0, $2; mov.b32 $1, $3;",
        "and.b32 c, $4, 31; setp.ne.s32 p, c, 0;", "@p bra HELD;",
        f"add.s32 c, $4, $5; mul.lo.s32 c, c, {4 * warps};", "sub.s32 n, $8, c;",
        f"setp.gt.s32 p, n, {2 * warps}; selp.b32 n, 4, 2, p;", "mad.lo.s32 c, n, $6, c; add.s32 e, c, n; min.s32 e, e, $8;",
        "setp.lt.s32 q, c, $8; mad.wide.s32 a, c, 4, $7; mad.wide.s32 b, e, 4, $7;", "mov.b32 $0, 0; mov.b32 $1, 0;",
        "@q ld.global.nc.b32 $0, [a]; @q ld.global.nc.b32 $1, [b];", "HELD: }",
    ])  # fmt: skip


# What lane $4 % 32 holds in $2 and $3.
_BOUNDS = gl.constexpr(
    "{ .reg .b32 c; and.b32 c, $4, 31; shfl.sync.idx.b32 $0, $2, c, 31, -1; shfl.sync.idx.b32 $1, $3, c, 31, -1; }"
)


def _copy(entries: int) -> str:
    """PTX: begins to copy outliers from the last multiple of four up to $2 on, 16 bytes a lane, to the lane's place $1. Whole
    ones, of four outliers below $3, a multiple of four, as far as any of them is below $4; at most `entries` of 128 bytes. $5
    lane, $6 all outliers. $0 is $1."""
    lines = [
        "{ .reg .pred p; .reg .b32 i, n; .reg .b64 a;", "and.b32 i, $2, -4; mad.lo.s32 i, $5, 4, i; mad.wide.s32 a, i, 4, $6;",
        "min.s32 n, $3, $4;",
    ]  # fmt: skip
    for first in range(0, entries, 4):
        lines.append("setp.lt.s32 p, i, n;")
        if entries - first < 4:
            lines.append(f"setp.lt.and.s32 p, $5, {8 * (entries - first)}, p;")
        lines.append(f"@p cp.async.cg.shared.global [$1+{128 * first}], [a+{128 * first}], 16; add.s32 i, i, 128;")
    return "\n".join([*lines, "mov.b32 $0, $1; }"])


def _product(bfloat: bool, n: int, columns: int) -> tuple[list[str], list[str]]:
    """PTX: the outlier of word w{n} times x, added to the thread's sum of its row if p{n}: what asks for x, and what waits for
    it. x of the chunk or pair, of 256 or 512 `columns`, is at $2, the thread's sums at $1, 128 bytes from row to row. The word
    (spec 5.3): from bit 0 on the column, from 12 on the row, then the value."""
    return [
        f"and.b32 a{n}, w{n}, {columns - 1}; mad.lo.u32 a{n}, a{n}, 2, $2; ld.shared.b16 x{n}, [a{n}];"
    ], [
        f"and.b32 a{n}, w{n}, 0xF000; shr.u32 a{n}, a{n}, 5; add.u32 a{n}, a{n}, $1; ld.shared.f32 s{n}, [a{n}];",
        f"mov.b32 {{l, h}}, w{n}; cvt.f32.f16 v{n}, h; cvt.f32.{'bf16' if bfloat else 'f16'} f{n}, x{n};",
        f"@p{n} fma.rn.f32 s{n}, v{n}, f{n}, s{n}; st.shared.f32 [a{n}], s{n};",
    ]  # fmt: skip


def _products(bfloat: bool, entries: int, columns: int) -> str:
    """PTX: the outliers $4 .. $5 - 1 of a pair times x, added to the thread's sums (`_product`). Those that `_copy` copied, of
    which there are no more below $6, are at $3, 128 bytes further each time; the others are read one a lane after the other. $7
    lane, $8 all outliers. $0 is $1."""
    each = range(entries)
    lines = ["{ .reg .pred q; .reg .b16 l, h; .reg .b32 f, i, n; .reg .b64 g;"]
    lines += [f".reg .pred p{n}; .reg .b32 w{n}, a{n}; .reg .b16 x{n}; .reg .f32 v{n}, f{n}, s{n};" for n in each]
    lines += [f"ld.shared.b32 w{n}, [$3+{128 * n}];" for n in each]
    # f before the first one, n behind the last
    lines += ["and.b32 f, $4, 3; sub.s32 i, $4, f; min.s32 n, $5, $6; sub.s32 n, n, i; sub.s32 n, n, $7;"]
    lines += [f"setp.gt.s32 p{n}, n, {32 * n};" for n in each] + ["setp.ge.and.s32 p0, $7, f, p0;"]
    products = [_product(bfloat, n, columns) for n in each]
    lines += [line for ask, _ in products for line in ask] + [line for _, wait in products for line in wait]
    ask, wait = products[0]
    lines += [
        f"add.s32 i, i, {32 * entries}; min.s32 i, i, $6; max.s32 i, i, $4;", "setp.ge.s32 q, i, $5;", "@q bra DONE;",
        "add.s32 i, i, $7; setp.eq.s32 p0, i, i;", "MORE:", "setp.ge.s32 q, i, $5;", "@q bra DONE;",
        "mad.wide.s32 g, i, 4, $8; ld.global.nc.b32 w0, [g];", *ask, *wait, "add.s32 i, i, 32;", "bra MORE;",
        "DONE:", "mov.b32 $0, $1; }",
    ]  # fmt: skip
    return "\n".join(lines)


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
_HOLD_BOUNDS = gl.constexpr({warps: _hold_bounds(warps) for warps in (1, 2, 4, 8)})
_COPY = gl.constexpr({n: _copy(n) for n in ENTRIES})
_COLUMNS = (CHUNK * TILE, 2 * CHUNK * TILE)  # of a chunk, of a pair
_PRODUCTS = gl.constexpr({(bf, n, c): _products(bool(bf), n, c) for bf in (0, 8) for n in ENTRIES for c in _COLUMNS})


@gluon.jit
def clear_sums(room, lane):
    """Address of a lane's sums, one for each of the 16 rows, all zeros, in the warp's room of SUMS_BYTES."""
    return gl.inline_asm_elementwise(_ZERO_SUMS, "=r,r", [room + lane * 16], dtype=gl.int32, is_pure=False, pack=1) - lane * 12


@gluon.jit
def hold_bounds(held, step, lane, warp, pointers, cells, WARPS: gl.constexpr):
    """Each lane holds the `bounds` of one of its warp's steps; before step `step`, every 32nd, those of the next 32 are read.

    held: as this returns it. pointers: of the tile's cells."""
    none = lane * 0
    return gl.inline_asm_elementwise(
        _HOLD_BOUNDS[WARPS], "=&r,=&r,r,r,r,r,r,l,r",
        [held[0], held[1], none + step, lane, warp, pointers + none, none + cells],
        dtype=(gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def bounds(held, step):
    """Where the outliers of the warp's step begin and end; 0 and 0 behind the tile's last ones."""
    return gl.inline_asm_elementwise(
        _BOUNDS, "=&r,=&r,r,r,r", [held[0], held[1], held[0] * 0 + step], dtype=(gl.int32, gl.int32), is_pure=False, pack=1
    )


@gluon.jit
def copy(place, Outliers, begin, end, fours, lane, ENTRIES: gl.constexpr):
    """Begins to copy the outliers of a step, those that fit, to `place` of each lane's warp, for `add_products`. fours: how
    many outliers the matrix has, down to a multiple of four."""
    gl.inline_asm_elementwise(
        _COPY[ENTRIES], "=r,r,r,r,r,r,l", [place + lane * 16, begin, lane * 0 + fours, end, lane, Outliers + lane * 0],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def add_products(
    sums, x, place, Outliers, begin, end, fours, lane, COLUMNS: gl.constexpr, ENTRIES: gl.constexpr, BF: gl.constexpr
):  # fmt: skip
    """The outliers begin .. end - 1 of a pair or of a chunk, which have so many COLUMNS, times x, added to the lane's sums. x:
    its first one, place: where they were copied to, both of the lane's warp in shared memory."""
    gl.inline_asm_elementwise(
        _PRODUCTS[(BF, ENTRIES, COLUMNS)], "=r,r,r,r,r,r,r,r,l",
        [sums, x, place + lane * 4, begin, end, lane * 0 + fours, lane, Outliers + lane * 0],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def sums_of_rows(sums, lane):
    """A lane's share of the warp's sums of rows gid and gid + 8, to be added over the quad."""
    return gl.inline_asm_elementwise(
        _GATHER, "=&f,=&f,r", [sums - lane * 4 + (lane // 4 * 128 + lane % 4 * 32)], dtype=(gl.float32, gl.float32),
        is_pure=False, pack=1,
    )  # fmt: skip


@cache
def entries(layout: Layout) -> int:
    """Which of ENTRIES is enough for most pairs of a matrix whose outliers lie anywhere; 0 where there are none."""
    if not layout.outliers:
        return 0
    mean = TILE * 2 * CHUNK * TILE * layout.outliers / (layout.out_features * layout.in_features)
    return next((n for n in ENTRIES if mean + 1.5 * mean**0.5 <= 32 * n), ENTRIES[-1])
