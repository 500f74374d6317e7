"""PTX that multiplies x with a chunk's outliers, for `small_kernel`: products of their own, 16 outliers at a time.

A has the value of outlier k in its row and zeros in the others, B has x of its column. x is turned in shared memory (`turn`,
sm_90), once a chunk and by all warps of a program, to 16 bytes for 8 rows of a column. `ldmatrix` reads these 8 rows at
once, in fewer wavefronts of shared memory than 2 bytes at a time. An infinite x is made finite when it is turned, and not for
every outlier.
"""

from __future__ import annotations

from spqr_format.layout import ceil_div

# Bytes of a row of x of a chunk. Of its units of 16 bytes, unit u of row n lies at u xor n % 8: copies of a row take as few
# wavefronts as can be, and the same unit of 8 rows lies in different banks.
X_PITCH = 512
PLANE = 4096  # bytes of 8 rows of x of a chunk, turned: 16 of each column
KEPT = (0, 32, 64, 128)  # words of outliers of a chunk and tile that are copied; more are read when their turn comes


def at_once(kept: int) -> int:
    """How many outliers of a chunk are multiplied without asking whether there are so many, a multiple of 16: most chunks of a
    matrix with so many `kept` have more."""
    return 16 * ceil_div(3 * kept, 64)


def _sixteen(tiles: int) -> list[str]:
    """PTX: the sums s times 16 outliers, of which a lane has four, w0 .. w3; its row in r. The plane of its rows of x at g, the
    lane's column in c."""
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
            "mul.rn.f16x2 v, v, one;",
            f"and.b32 a{2 * pair}, v, u;",
            f"and.b32 a{2 * pair + 1}, v, t;",
        ]
    x = [f"b{i}" for i in range(2 * tiles)]
    lines.append("mad.lo.u32 c, c, 16, g;")
    for first in range(0, tiles, 2):
        some = x[2 * first : 2 * first + 4]
        lines.append(f"ldmatrix.sync.aligned.m8n8.x{len(some)}.trans.shared.b16 {{{', '.join(some)}}}, [c+{PLANE * first}];")
    for tile in range(tiles):
        sums = "{" + ", ".join(f"s{4 * tile + i}" for i in range(4)) + "}"
        b = "{" + ", ".join(x[2 * tile : 2 * tile + 2]) + "}"
        lines.append(f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {sums}, {{a0, a1, a2, a3}}, {b}, {sums};")
    return lines


def turn(tiles: int, warps: int) -> str:
    """PTX: turns a warp's columns of x of a chunk and makes them finite: from the lane's row of the first eight, of which the
    lane's unit of the first four is at $1, to its columns' places at $2."""
    parts = [(tile, columns) for tile in range(tiles) for columns in range(0, 256 // warps, 32)]
    lines = [".reg .b32 b<16>, t, o;", "xor.b32 o, $1, 64;"]  # where its unit of the second four is
    for begin in range(0, len(parts), 4):  # the compiler moves no load before a store, so that each would be waited for
        some = list(enumerate(parts[begin : begin + 4]))
        four = [f"{{b{4 * i}, b{4 * i + 1}, b{4 * i + 2}, b{4 * i + 3}}}" for i, _ in some]
        lines += [
            f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {four[i]},"
            f" [{'o' if columns % 64 else '$1'}+{8 * X_PITCH * tile + columns // 64 * 128}];"
            for i, (tile, columns) in some
        ]
        # 65504 for an infinite x, which times the zeros of A would be NaN; it is infinite in the product of the codes
        lines += ["mov.b32 t, 0x7BFF7BFF;", *(f"min.xorsign.abs.f16x2 b{i}, b{i}, t;" for i in range(4 * len(some)))]
        lines += [
            f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [$2+{PLANE * tile + 16 * columns}], {four[i]};"
            for i, (tile, columns) in some
        ]
    return "{\n" + "\n".join([*lines, "mov.b32 $0, $1;"]) + "\n}"


_REGISTERS = ".reg .pred p, q; .reg .b32 w<4>, a<4>, b<8>, c, t, u, v, g, one, r, at, mine, end, left, i; .reg .b64 f, e;"


def multiply_first(kept: int, tiles: int) -> str:
    """PTX: adds the products of the first `at_once` outliers of a chunk to a lane's sums, 4 for each 8 rows of x. There may be
    fewer, with zeros behind them.

    Inputs behind the sums: where in shared memory the lane's four of the first 16 words are; where the one whose column it is
    asked for; the plane of the lane's rows of x; gid << 12 in both halves; and 1 in the units of the sums, as half2."""
    n = 4 * tiles
    at, mine, plane, rows, one = (f"${2 * n + i}" for i in range(5))
    lines = [
        _REGISTERS, f".reg .f32 s<{n}>;",
        *(f"mov.f32 s{i}, ${n + i};" for i in range(n)),
        f"mov.b32 g, {plane}; or.b32 r, {rows}, 0x04000400; mov.b32 one, {one};",
    ]  # fmt: skip
    for i in range(at_once(kept) // 16):
        lines += [f"ld.shared.v4.b32 {{w0, w1, w2, w3}}, [{at}+{64 * i}]; ld.shared.u8 c, [{mine}+{64 * i}];", *_sixteen(tiles)]
    lines += [f"mov.f32 ${i}, s{i};" for i in range(n)]
    return "{\n" + "\n".join(lines) + "\n}"


def multiply_more(kept: int, tiles: int) -> str:
    """PTX: the same of those behind the first `at_once`: one 16 after the other, those in shared memory and the rest.

    Inputs further: how many outliers the chunk has, where Outliers and Pointers are, and the number of the chunk."""
    n = 4 * tiles
    at, mine, plane, rows, one, count, outliers, pointers, chunk = (f"${2 * n + i}" for i in range(9))
    begun = at_once(kept)
    near = [
        f"add.u32 at, {at}, {4 * begun}; min.s32 left, {count}, {kept}; mad.lo.s32 end, left, 4, {at};",
        f"add.u32 mine, {mine}, {4 * begun};",
        "NEXT:", "ld.shared.v4.b32 {w0, w1, w2, w3}, [at]; ld.shared.u8 c, [mine]; add.u32 mine, mine, 64;",
        *_sixteen(tiles),
        "add.u32 at, at, 64;", "setp.lt.s32 p, at, end;", "@p bra NEXT;",
        f"setp.le.s32 p, {count}, {kept};", "@p bra DONE;",
    ]  # fmt: skip
    lines = [
        _REGISTERS, f".reg .f32 s<{n}>;",
        *(f"mov.f32 s{i}, ${n + i};" for i in range(n)),
        f"setp.le.s32 p, {count}, {begun};", "@p bra DONE;",
        f"mov.b32 g, {plane}; or.b32 r, {rows}, 0x04000400; mov.b32 one, {one};",
        *(near if begun < kept else ()),
        f"mad.wide.u32 f, {chunk}, 8, {pointers}; ld.global.nc.b32 i, [f];",
        f"mov.u32 t, %tid.x; and.b32 t, t, 3; mad.lo.u32 t, t, 4, {kept};",  # the lane's first
        f"add.s32 i, i, t; mad.wide.s32 f, i, 4, {outliers}; sub.s32 left, {count}, t; sub.s32 i, {count}, {kept};",
        f"sub.u32 t, {mine}, {at}; cvt.s64.s32 e, t; add.s64 e, f, e; shr.s32 t, t, 2; sub.s32 mine, left, t;",
        "FAR:",
        *(f"mov.b32 w{i}, 0; setp.gt.s32 q, left, {i}; @q ld.global.nc.b32 w{i}, [f+{4 * i}];" for i in range(4)),
        "mov.b32 c, 0; setp.gt.s32 q, mine, 0; @q ld.global.nc.u8 c, [e];",
        *_sixteen(tiles),
        "add.s32 i, i, -16; add.s32 left, left, -16; add.u64 f, f, 64; add.s32 mine, mine, -16; add.u64 e, e, 64;",
        "setp.gt.s32 p, i, 0;", "@p bra FAR;",
        "DONE:", *(f"mov.f32 ${i}, s{i};" for i in range(n)),
    ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"
