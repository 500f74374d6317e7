"""What becomes of the sums that `gemm_kernel` has of a piece of Y: a part for another program to add up, or Y.

A piece is BATCH rows of x and 16 * WARPS rows of W. Its sums are what `wgmma` leaves in registers: a thread has those of rows
gid and gid + 8 of its warp's tile, and of 2 tid and 2 tid + 1 of each eight rows of x. Addresses are computed here and not
before the loop over chunks, where registers lack: `opaque_zero` sees to that."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .lanes import barrier
from .shares import last_position

# Of two 8 x 8 matrices side by side and those 8 rows below, $8 .. $15 as a lane has them of a product, columns to rows of
# shared memory: each lane names, in $16, where one of them goes, from the beginning of all shared memory on.
_STORE_MATRICES = gl.constexpr({
    bfloat: "{ .reg .b32 a, b, c, d, at; mov.u32 at, global_smem; add.u32 at, at, $16;\n"
    + "\n".join(f"cvt.rn.{'bf16x2' if bfloat else 'f16x2'}.f32 {'abcd'[i]}, ${9 + 2 * i}, ${8 + 2 * i};" for i in range(4))
    + "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [at], {a, b, c, d};\n"
    + "\n".join(f"mov.b32 ${i}, a;" for i in range(8)) + " }"
    for bfloat in (False, True)
})  # fmt: skip
_STORE_REGISTERS = gl.constexpr(",".join(["=r"] * 8 + ["f"] * 8 + ["r"] * 8))
# 16 bytes, and 2 bytes, from $1 to $2 if $3 is more than $4.
_WRITE = gl.constexpr(
    "{ .reg .pred p; .reg .b32 a, b, c, d; setp.gt.s32 p, $3, $4; ld.shared.v4.b32 {a, b, c, d}, [$1];"
    " @p st.global.v4.b32 [$2], {a, b, c, d}; mov.b32 $0, $3; }"
)
_WRITE_ONE = gl.constexpr(
    "{ .reg .pred p; .reg .b16 a; setp.gt.s32 p, $3, $4; ld.shared.b16 a, [$1]; @p st.global.b16 [$2], a; mov.b32 $0, $3; }"
)
# Four numbers of a lane, $12 .. $15, to number $8 of those at $4.
_STORE_PART = gl.constexpr(
    "{ .reg .b64 a; mad.wide.u32 a, $8, 4, $4; st.global.v4.f32 [a], {$12, $13, $14, $15};"
    " mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; }"
)
_STORE_PART_REGISTERS = gl.constexpr(",".join(["=r"] * 4 + ["l"] * 4 + ["r"] * 4 + ["f"] * 4))


def _add_parts(parts: int, numbers: int, piece: int) -> str:
    """PTX: so many numbers of a thread plus those of other programs, as many as there are, at most `parts`, each `piece`
    numbers before the last. All loads begin before the first sum.

    Outputs: the sums. Inputs, of each number: the last part; its place there; how many parts there are; what they add to."""
    fours = [(k, i) for k in range(parts) for i in range(0, numbers, 4)]
    lines = ["{ .reg .pred " + ", ".join(f"p{k}" for k in range(parts)) + "; .reg .b64 a;"]
    lines += [".reg .f32 " + ", ".join(f"t{k}x{i}" for k in range(parts) for i in range(numbers)) + ";"]
    lines += [f"setp.gt.s32 p{k}, ${3 * numbers}, {k};" for k in range(parts)]
    lines += [f"mov.f32 t{k}x{i}, 0f00000000;" for k in range(parts) for i in range(numbers)]
    for k, i in fours:
        into = ", ".join(f"t{k}x{i + j}" for j in range(4))
        lines.append(
            f"mad.wide.u32 a, ${2 * numbers + i}, 4, ${numbers}; @p{k} ld.global.cg.v4.f32 {{{into}}}, [a+{-4 * piece * k}];"
        )
    lines += [f"add.f32 ${i}, ${4 * numbers + i}, t0x{i};" for i in range(numbers)]
    lines += [f"add.f32 ${i}, ${i}, t{k}x{i};" for k in range(1, parts) for i in range(numbers)]
    return "\n".join([*lines, "}"])


# Of a piece of so many numbers a thread: parts that are added together, and numbers.
_TOGETHER = {16: (4, 8), 32: (4, 8), 64: (2, 16), 128: (1, 32)}
_PARTS = gl.constexpr({numbers: parts for numbers, (parts, _) in _TOGETHER.items()})
_NUMBERS = gl.constexpr({numbers: together for numbers, (_, together) in _TOGETHER.items()})
_ADD_PARTS = gl.constexpr({
    (numbers, warps): _add_parts(parts, together, 32 * numbers * warps)
    for numbers, (parts, together) in _TOGETHER.items() for warps in (4, 8)
})  # fmt: skip
_ADD_PARTS_REGISTERS = gl.constexpr({
    n: ",".join(["=&f"] * n + ["l"] * n + ["r"] * 2 * n + ["f"] * n) for n in (8, 16, 32)
})  # fmt: skip
# 0, of which the compiler does not know that it is: else it would compute addresses before the loop, and registers lack.
_ZERO = gl.constexpr("and.b32 $0, $1, 0;")


@gluon.jit
def opaque_zero(number):
    """0, of which the compiler does not know that it is."""
    return gl.inline_asm_elementwise(_ZERO, "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def place(row, n, zero, WARPS: gl.constexpr):
    """Where a number of a piece stands among those of all threads, of which each has four that follow each other."""
    thread = row // 16 * 32 + row % 8 * 4 + n % 8 // 2 + zero
    return thread * 4 + (n // 8 * (128 * WARPS) + row % 16 // 8 * 2 + n % 2)


@gluon.jit
def store_part(acc, Part, row, n, zero):
    """The sums acc [rows of W, rows of x] to Part, in the order of registers. row, n: number of each in the piece, [.., 1] and
    [1, ..] in the layout of acc."""
    to = place(row, n, zero, acc.shape[0] // 16)
    base = (row * 0 + zero).to(gl.int64) + Part.to(gl.int64)
    gl.inline_asm_elementwise(_STORE_PART, _STORE_PART_REGISTERS, [base, to, acc], dtype=gl.int32, is_pure=False, pack=4)


@gluon.jit
def add_parts(acc, Partial, program, piece_begin, base, extra, row, n, zero):
    """acc plus the parts in Partial of all programs before this one that have a position from piece_begin on, the nearest
    first."""
    WARPS: gl.constexpr = acc.shape[0] // 16
    NUMBERS: gl.constexpr = acc.shape[1] // 2
    PARTS: gl.constexpr = _PARTS[NUMBERS]
    TOGETHER: gl.constexpr = _NUMBERS[NUMBERS]
    at = place(row, n, zero, WARPS)
    nothing = row * 0 + zero
    other = program - 1
    while last_position(other, base, extra) > piece_begin:
        there = 1
        for k in gl.static_range(1, PARTS):
            there += (last_position(other - k, base, extra) > piece_begin).to(gl.int32)
        theirs = (Partial + other.to(gl.int64) * (32 * WARPS * NUMBERS)).to(gl.int64)
        acc = gl.inline_asm_elementwise(
            _ADD_PARTS[(NUMBERS, WARPS)], _ADD_PARTS_REGISTERS[TOGETHER],
            [nothing.to(gl.int64) + theirs, at, nothing + there, acc], dtype=gl.float32, is_pure=False, pack=TOGETHER,
        )  # fmt: skip
        other -= PARTS
    return acc


@gluon.jit
def write(
    acc, room, Y, row, n, first_row, row0, batch, out_features, thread, zero, TILE_AT: gl.constexpr, BESIDE: gl.constexpr
):  # fmt: skip
    """acc to Y [.., BESIDE * out_features], from row first_row and column row0 on, 16 bytes at once where its rows begin at
    such: by way of shared memory [BATCH, 16 * WARPS], TILE_AT bytes from the `room` that is all, in which 16 bytes stand at
    their number xor n % 8."""
    BATCH: gl.constexpr = acc.shape[1]
    WARPS: gl.constexpr = thread.shape[0] // 32
    lane = row % 8 * 4 + n % 8 // 2
    named = lane // 16 * 8 + lane % 8 + zero  # the row of an 8 x 8 matrix that the lane names, of two
    place = TILE_AT + named * (32 * WARPS) + ((row // 16 * 2 + lane // 8 % 2) ^ (lane % 8)) * 16 + n // 16 * (512 * WARPS)
    gl.inline_asm_elementwise(
        _STORE_MATRICES[Y.dtype.element_ty == gl.bfloat16],
        _STORE_REGISTERS,
        [acc, place],
        dtype=gl.int32,
        is_pure=False,
        pack=8,
    )
    barrier()
    if out_features % 8 == 0:
        near = thread // (2 * WARPS)
        unit = thread % (2 * WARPS)
        source = room + TILE_AT + near * (32 * WARPS) + (unit ^ (near % 8)) * 16
        column = row0 + unit * 8
        to = Y + (first_row + near).to(gl.int64) * (BESIDE * out_features) + column
        left = gl.where(column < out_features, batch - first_row - near, 0)
        for i in gl.static_range(BATCH // 16):
            gl.inline_asm_elementwise(
                _WRITE, "=r,r,l,r,r", [source + i * (512 * WARPS), to, left, left * 0 + i * 16], dtype=gl.int32, is_pure=False,
                pack=1,
            )  # fmt: skip
            to += 16 * BESIDE * out_features
    else:
        thread += zero
        for first in range(0, BATCH, 2):
            near = first + thread // (16 * WARPS)
            unit = thread % (16 * WARPS)
            source = room + TILE_AT + near * (32 * WARPS) + ((unit // 8) ^ (near % 8)) * 16 + unit % 8 * 2
            to = Y + (first_row + near).to(gl.int64) * (BESIDE * out_features) + (row0 + unit)
            left = gl.where(row0 + unit < out_features, batch - first_row, 0)
            gl.inline_asm_elementwise(_WRITE_ONE, "=r,r,l,r,r", [source, to, left, near], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def finish(
    acc, room, Scale, Bias, Y, row, n, first_row, row0, batch, out_features, thread, zero, SCALED: gl.constexpr,
    HAS_BIAS: gl.constexpr, TILE_AT: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """Scales acc and adds the bias, and writes it as `write` does, once all threads of the program have come here."""
    if SCALED:
        acc *= gl.load(Scale + first_row + n, mask=first_row + n < batch, other=0)
    if HAS_BIAS:
        acc += gl.load(Bias + row0 + row, mask=row0 + row < out_features, other=0).to(gl.float32)
    barrier()  # the second half of the ring is free now
    write(acc, room, Y, row, n, first_row, row0, batch, out_features, thread, zero, TILE_AT, BESIDE)


@gluon.jit
def rest_of(
    X, Pointers, Outliers, tile, begin, end, first_row, batch, tile_rows, chunks, BATCH: gl.constexpr, WARPS: gl.constexpr,
    FETCHED: gl.constexpr,
):  # fmt: skip
    """x times those outliers of chunks begin .. end - 1 of a tile that were not copied: fp32 [16, BATCH], and numbers of its
    rows, [16, 1], and of rows of x, [1, BATCH], from first_row on."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    near = gl.arange(0, BATCH, layout=gl.SliceLayout(0, layout))
    n = first_row + near
    slots = X + first_row.to(gl.int64) * (chunks * 256)  # each [BATCH, 64]
    total = gl.zeros([16, BATCH], gl.float32, layout)
    if tile < tile_rows:
        own = Pointers + tile.to(gl.int64) * (2 * chunks)
        for cell in range(2 * begin, 2 * end):
            for at in range(gl.load(own + cell) + FETCHED, gl.load(own + cell + 1)):
                word = gl.load(Outliers + at)
                column = word & 127
                place = column % 16 // 4 * 16 + column % 4 // 2 * 8 + column % 64 // 16 * 2 + column % 2
                slot = slots + (cell * 2 + column // 64).to(gl.int64) * (BATCH * 64)
                x = gl.load(slot + (near * 64 + ((place // 8) ^ (near % 8)) * 8 + place % 8), mask=n < batch, other=0)
                value = (word >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
                total += gl.where(row == ((word >> 12) & 15), value, 0.0)[:, None] * x.to(gl.float32)[None, :]
    return total, row[:, None], near[None, :]


@gluon.jit
def add_rest(
    Y, Part, X, Scale, Pointers, Outliers, first_tile, each, begin, end, first_row, batch, out_features, tile_rows, chunks,
    SCALED: gl.constexpr, BATCH: gl.constexpr, WARPS: gl.constexpr, FETCHED: gl.constexpr, BESIDE: gl.constexpr,
):  # fmt: skip
    """Adds `rest_of` tile number `each` of a piece to Y, or where the piece ends in another program to its part."""
    tile = first_tile + each
    total, row, near = rest_of(
        X, Pointers, Outliers, tile, begin, end, first_row, batch, tile_rows, chunks, BATCH, WARPS, FETCHED
    )
    if tile < tile_rows:
        if end < chunks:
            at = Part + place(each * 16 + row, near, 0, WARPS)
            gl.store(at, gl.load(at) + total)
        else:
            n = first_row + near
            if SCALED:
                total *= gl.load(Scale + n, mask=n < batch, other=0)
            to = Y + n.to(gl.int64) * (BESIDE * out_features) + (tile * 16 + row)
            inside = (tile * 16 + row < out_features) & (n < batch)
            gl.store(to, (gl.load(to, mask=inside, other=0).to(gl.float32) + total).to(Y.dtype.element_ty), mask=inside)
