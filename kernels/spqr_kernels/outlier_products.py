"""PTX that multiplies x with a chunk's outliers, for `small_kernel`: products of their own, 16 outliers at a time.

A is [16 rows][16 outliers], with the value of an outlier in its row and zeros in the others. A lane puts the one or two of a
round that are its own into zeros in shared memory, and `ldmatrix` reads A; the zeros take the place of the chunk's words, which
lanes have in registers by then. B has x of the outliers' columns. x is turned in shared memory (`turn`, sm_90), once a chunk
and by all warps of a program, to 16 bytes for 8 rows of a column; a lane tells `ldmatrix` where those of its outlier's column
are. An infinite x is made finite when it is turned, and not for every outlier.
"""

from __future__ import annotations

X_PITCH = 528  # bytes of a row of x of a chunk: 512 and 16, so that 8 rows lie in different banks
PLANE = 4096  # bytes of 8 rows of x of a chunk, turned: 16 of each column
KEPT = (0, 32, 64, 128)  # words of outliers of a chunk and tile that are copied; more are read when their turn comes
_A_BYTES = 512  # of 16 outliers: for each half of them, 16 bytes a row


def round_of(kept: int, bits: int) -> int:
    """How many outliers of a chunk are multiplied at once: as many as have room where the chunk's words were."""
    return min(kept, 512 * bits // _A_BYTES * 16)


def turn(tiles: int, warps: int) -> str:
    """PTX: turns a warp's columns of x of a chunk and makes them finite: from the lane's row of the first eight at $1 to its
    columns' places at $2."""
    parts = [(tile, columns) for tile in range(tiles) for columns in range(0, 256 // warps, 32)]
    lines = [".reg .b32 b<16>, t;"]
    for begin in range(0, len(parts), 4):  # the compiler moves no load before a store, so that each would be waited for
        some = list(enumerate(parts[begin : begin + 4]))
        four = [f"{{b{4 * i}, b{4 * i + 1}, b{4 * i + 2}, b{4 * i + 3}}}" for i, _ in some]
        lines += [
            f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {four[i]}, [$1+{8 * X_PITCH * tile + 2 * columns}];"
            for i, (tile, columns) in some
        ]
        # 65504 for an infinite x, which times the zeros of A would be NaN; it is infinite in the product of the codes
        lines += ["mov.b32 t, 0x7BFF7BFF;", *(f"min.xorsign.abs.f16x2 b{i}, b{i}, t;" for i in range(4 * len(some)))]
        lines += [
            f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [$2+{PLANE * tile + 16 * columns}], {four[i]};"
            for i, (tile, columns) in some
        ]
    return "{\n" + "\n".join([*lines, "mov.b32 $0, $1;"]) + "\n}"


def _clear(at: str, count: int) -> list[str]:
    """PTX: zeros for A of so many outliers, where the lane's first 16 bytes are `at`."""
    zeros = [f"st.shared.v4.b32 [{at}+{_A_BYTES * p}], {{z, z, z, z}};" for p in range(count // 16)]
    return [".reg .b32 z; mov.b32 z, 0;", *zeros]


def _put(place: str, planes: str, count: int) -> list[str]:
    """PTX: the lane's words w0 and w1, numbers lane and 32 + lane of so many, into A, from the lane's `place` in row 0 on; to
    c0 and c1 where x of their columns is, from `planes` on. p: the lane has a second word."""
    lines = []
    for i in range(0, count, 32):
        w, c = f"w{i // 32}", f"c{i // 32}"
        there = "" if count - i >= 32 else "@p "
        lines += [
            f"shr.u32 t, {w}, 8; and.b32 t, t, 0xF0; add.u32 t, t, {place}; mov.b32 {{l, h}}, {w};",
            f"{there}st.shared.b16 [t+{2 * _A_BYTES * (i // 32)}], h;",
            f"and.b32 {c}, {w}, 0xFF; mad.lo.u32 {c}, {c}, 16, {planes};",
        ]
    return lines


def _multiply(at: str, tiles: int, count: int) -> list[str]:
    """PTX: the sums s and the products of so many outliers, whose A and columns are as `_put` left them. For all lanes to
    see, they wait for each other."""
    lines = [".reg .b32 a<4>, b<8>;", "bar.warp.sync -1;"]
    for i in range(0, count, 32):
        for tile in range(tiles):
            x = ", ".join(f"b{4 * tile + k}" for k in range(4))
            lines.append(f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{{x}}}, [c{i // 32}+{PLANE * tile}];")
        for p in range(i, min(i + 32, count), 16):
            lines.append(f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{a0, a1, a2, a3}}, [{at}+{_A_BYTES * p // 16}];")
            for tile in range(tiles):
                sums = "{" + ", ".join(f"s{4 * tile + k}" for k in range(4)) + "}"
                b = 4 * tile + (p - i) // 8
                lines.append(
                    f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {sums}, {{a0, a1, a2, a3}}, {{b{b}, b{b + 1}}}, {sums};"
                )
    return lines


def clear(count: int) -> str:
    """PTX: `_clear` at $1."""
    return "{\n" + "\n".join([*_clear("$1", count), "mov.b32 $0, $1;"]) + "\n}"


def put(count: int) -> str:
    """PTX: `_put` of a chunk's first outliers, which are at $2 for the lane's first, to $0 and $1. $3: the lane's place in A, $4:
    x, of its plane, $5: the lane. There may be fewer, with zeros behind them."""
    lines = [".reg .pred p; .reg .b32 t, w0, w1, c0, c1; .reg .b16 l, h;", "setp.lt.s32 p, $5, 16; mov.b32 c1, 0;"]
    lines += [f"ld.shared.b32 w{i // 32}, [$2+{4 * i}];" for i in range(0, count, 32)]
    return "{\n" + "\n".join([*lines, *_put("$3", "$4", count), "mov.b32 $0, c0; mov.b32 $1, c1;"]) + "\n}"


def multiply_first(count: int, tiles: int) -> str:
    """PTX: adds the products of so many outliers to a lane's sums, 4 for each 8 rows of x, which `put` has put into A.

    Inputs behind the sums: the lane's first 16 bytes of A; what `put` gave."""
    n = 4 * tiles
    lines = [f".reg .f32 s<{n}>; .reg .b32 c<2>;", *(f"mov.f32 s{i}, ${n + i};" for i in range(n))]
    lines += [f"mov.b32 c0, ${2 * n + 1}; mov.b32 c1, ${2 * n + 2};", *_multiply(f"${2 * n}", tiles, count)]
    lines += [f"mov.f32 ${i}, s{i};" for i in range(n)]
    return "{\n" + "\n".join(lines) + "\n}"


def multiply_more(kept: int, count: int, tiles: int) -> str:
    """PTX: the same of those behind the first `count`, so many at once: those of `kept` in shared memory and the rest.

    Inputs behind the sums: the lane's first 16 bytes of A, and its place; x, of its plane; where its first outlier is; the lane;
    how many outliers the chunk has, where Outliers and Pointers are, and the number of the chunk."""
    n = 4 * tiles
    at, place, planes, mine, lane, every, outliers, pointers, chunk = (f"${2 * n + i}" for i in range(9))
    lines = [
        f".reg .pred p, q, r, f; .reg .f32 s<{n}>; .reg .b32 c<2>, w<2>, t, i, j; .reg .b16 l, h; .reg .b64 a;",
        *(f"mov.f32 s{i}, ${n + i};" for i in range(n)),
        f"mov.b32 i, {count}; setp.ge.s32 q, i, {every};", "@q bra DONE;",
        f"setp.lt.s32 p, {lane}, 16;",
        "NEXT: bar.warp.sync -1;", *_clear(at, count), "bar.warp.sync -1;",
    ]  # fmt: skip
    for k in range(0, count, 32):
        lines += [
            f"add.s32 j, i, {lane}; {f'add.s32 j, j, {k};' if k else ''} mov.b32 w{k // 32}, 0; mad.lo.u32 t, i, 4, {mine};",
            f"setp.lt.s32 r, j, {kept}; @r ld.shared.b32 w{k // 32}, [t+{4 * k}];",
            f"setp.ge.s32 f, j, {kept}; setp.lt.and.s32 f, j, {every}, f; mad.wide.u32 a, {chunk}, 8, {pointers}; @f ld.global.nc.b32 t, [a];",
            f"@f add.s32 t, t, j; mad.wide.s32 a, t, 4, {outliers}; @f ld.global.nc.b32 w{k // 32}, [a];",
        ]
    lines += [
        *_put(place, planes, count), *_multiply(at, tiles, count),
        f"add.s32 i, i, {count}; setp.lt.s32 q, i, {every};", "@q bra NEXT;",
        "DONE:", *(f"mov.f32 ${i}, s{i};" for i in range(n)),
    ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"
