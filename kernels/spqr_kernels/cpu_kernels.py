"""The CPU's kernels, compiled by numba: `products` for a few rows of x, `decode` for rows of W itself.

Each is a function of the address of an `ARGUMENTS` record and may run on any number of threads at once: a thread takes row
tiles from a common counter until none is left. Every row of W is summed in one fixed order, so that the result has the same
bits for any number of threads.

The words of neighbouring column blocks are brought side by side. So the loops of `products` that LLVM turns into vector
code run along blocks: one shift and one mask take the code of one place out of 8 or 16 blocks at a time. They do so for CHUNK
blocks, 8 chunks of the format (spec 4.1), so that what is between the steps stays in the nearest cache.

All that the kernels compute with comes from the record, the places of the codes too: numba keeps compiled code on disk until
this file changes, and looks at no other. The caller has checked addresses and sizes; stored indices are checked here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, float32, int64, njit, types, uint8, uint16, uint32
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

CHUNK = 128  # column blocks at a time
CHUNK2, CHUNK4 = 2 * CHUNK, 4 * CHUNK
CHUNK_SETS = CHUNK + 32  # groups of a chunk in whole sets: up to 15 stand before the first, and behind the last

# All int64; most are addresses, 0 for a tensor that is not there.
FIELDS = (
    # stored tensors (spec 5.1)
    "weight", "stat_codes", "tile_stats", "group_sc", "group_zp", "outlier_ptr", "outlier_words", "perm",
    # int64 [2 halves, 8 pairs, (word, bit)] of the codes in the words of `_lane_words`
    "places",
    # float32 x [batch, in], and scratch [threads, scratch_size]
    "x", "scratch", "scratch_size",
    # float32 y [batch, out], or W [rows, in] in float32 or bf16
    "result", "bf16",
    # int64 counters that start at 0: row tiles taken, threads begun, indices out of range
    "taken", "threads", "faults",
    # row tiles first .. last - 1 are asked for
    "first", "last", "out", "inn", "blocks", "groups", "group_blocks", "bits", "bilevel", "outliers", "batch",
)  # fmt: skip
ARGUMENTS = np.dtype([(name, np.int64) for name in FIELDS])
SIGNATURE = types.void(types.CPointer(from_dtype(ARGUMENTS)))

# A product may be summed in any order and with fused operations, W may not (spec 3); NaN and infinity count in both.
SUM: dict[str, Any] = {"fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}
EXACT: dict[str, Any] = {"error_model": "numpy"}
INLINE: dict[str, Any] = {"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inline_sum = njit(**INLINE, **SUM)
inline = njit(**INLINE, **EXACT)


@intrinsic
def _pointer(typing, address, dtype):
    """The address as a pointer to dtype. Pointers take an index without a test of its sign, which would cost the vectors."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.instance_type)(types.int64, dtype), generate


@intrinsic
def _at(typing, pointer, index):
    """&pointer[index]"""

    def generate(context, builder, signature, arguments):
        return builder.gep(arguments[0], [arguments[1]], source_etype=context.get_data_type(pointer.dtype))

    return pointer(pointer, types.int64), generate


@intrinsic(prefer_literal=True)
def _room(typing, dtype, count):
    """A pointer to `count` numbers on the stack, of which LLVM knows that no other pointer leads there."""

    def generate(context, builder, signature, arguments):
        size = context.get_constant(types.intp, count.literal_value)
        return cgutils.alloca_once(builder, context.get_data_type(dtype.instance_type), size=size)

    return types.CPointer(dtype.instance_type)(dtype, count), generate


@intrinsic
def _take(typing, counter):
    """The number at this address; adds one to it in the same step, whatever other threads do."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], context.get_value_type(types.CPointer(types.int64)))
        return builder.atomic_rmw("add", pointer, context.get_constant(types.int64, 1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def _ask_for(typing, pointer, index):
    """Asks for the cache line of pointer[index] without waiting for it."""

    def generate(context, builder, signature, arguments):
        address = builder.gep(arguments[0], [arguments[1]], source_etype=context.get_data_type(pointer.dtype))
        address = builder.bitcast(address, cgutils.voidptr_t)
        number = ir.IntType(32)
        signature = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
        builder.call(function, [address, number(0), number(3), number(1)])  # to read, into the nearest cache, data
        return context.get_dummy_value()

    return types.void(pointer, types.int64), generate


@intrinsic
def _in_order(typing, target, source):
    """The 16 words of a lane's word k in a chunk, with block b at target[b] (spec 4.2). LLVM finds no shuffle by itself."""

    def generate(context, builder, signature, arguments):
        words = ir.VectorType(ir.IntType(32), 16)
        places = ir.Constant(words, [4 * (b % 4) + b // 4 for b in range(16)])
        stored = builder.load(arguments[1], align=4, typ=words)
        ordered = builder.shuffle_vector(stored, ir.Constant(words, ir.Undefined), places)
        builder.store(ordered, builder.bitcast(arguments[0], words.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(target, source), generate


# numba's integers become 64 bits wide in every operation, and with them the numbers in a vector: uint32() brings one back.


@intrinsic
def _shifted(typing, word, bit):
    """word >> bit in 32 bits, for bit < 32."""

    def generate(context, builder, signature, arguments):
        operands = zip(arguments, signature.args, strict=True)
        return builder.lshr(*(context.cast(builder, value, kind, types.uint32) for value, kind in operands))

    return types.uint32(word, bit), generate


@intrinsic
def _code(typing, word, bit, mask):
    """The code at this bit of the word, as float32."""

    def generate(context, builder, signature, arguments):
        operands = zip(arguments, signature.args, strict=True)
        word, bit, mask = (context.cast(builder, value, kind, types.uint32) for value, kind in operands)
        return builder.sitofp(builder.and_(builder.lshr(word, bit), mask), ir.FloatType())

    return types.float32(word, bit, mask), generate


@inline
def _half(raw):
    """fp16 bits as float32, exactly; no denormal on the way, as threads differ in whether they flush those."""
    magnitude = np.uint32(raw) & np.uint32(0x7FFF)
    normal = np.uint32(np.uint32(magnitude << np.uint32(13)) + np.uint32(112 << 23)).view(np.float32)
    value = normal if magnitude >= 1024 else np.float32(np.int32(magnitude)) * np.float32(2.0**-24)
    return -value if raw & 0x8000 else value


@inline
def _power(exponent):
    """2**(exponent - 127) for 1 .. 254"""
    return np.uint32(np.uint32(exponent) << np.uint32(23)).view(np.float32)


@inline
def _cell(a, cell):
    """First and last + 1 of the cell's outliers (spec 5.3)."""
    pointers = _pointer(a.outlier_ptr, uint32)
    first, last = np.int64(pointers[cell]), np.int64(pointers[cell + 1])
    if first > last or last > a.outliers:
        _take(a.faults)
        first = last = 0
    return first, last


@inline
def _place(a, word, start, height, width):
    """Row and column of an outlier in its cell, which begins at column `start` and is so high and so wide (spec 5.3)."""
    row, column = np.int64(word & 0xFFFF) >> 12, np.int64(word & 4095) - (start & 4095)
    if row >= height or column < 0 or column >= width:
        _take(a.faults)
        row = column = 0
    return row, column


@inline
def _original_column(a, j):
    """The column of x and of W that stored column j is (spec 2.6)."""
    if a.perm == 0:
        return j
    column = np.int64(_pointer(a.perm, uint32)[j])
    if column >= a.inn:
        _take(a.faults)
        column = 0
    return column


@inline
def _groups(a, start, count):
    """First group of the `count` blocks from `start` on, and how many of them."""
    group = start // a.group_blocks
    return group, (start + count - 1) // a.group_blocks + 1 - group


@inline
def _tile_statistics(a, tile, start, count, stats):
    """ss, sz, zs, zz of the groups of these blocks, each CHUNK numbers after the one before (spec 2.3)."""
    if a.bilevel:
        group, groups = _groups(a, start, count)
        stored = _at(_pointer(a.tile_stats, uint16), 4 * (tile * a.groups + group))
        for g in range(groups):
            for i in range(4):
                stats[i * CHUNK + g] = _half(stored[4 * g + i])


@inline
def _lane_words(a, tile, lane, start, count, words):
    """The lane's words of `count` blocks from `start`, a multiple of CHUNK, on: word k of block b is words[k * CHUNK + b].

    With 3 bits a fourth word has the pair of codes that is spread over bits 0 and 16 of the three (spec 4.2).
    """
    stored = _at(_pointer(a.weight, uint32), tile * 8 * a.bits * a.blocks)
    whole = count // 16
    rest = count - 16 * whole
    for k in range(a.bits):
        for c in range(whole):
            source = _at(stored, (start // 16 + c) * 128 * a.bits + k * 128 + lane * 16)
            target = _at(words, k * CHUNK + 16 * c)
            _in_order(target, source)
        source = _at(stored, a.blocks // 16 * 128 * a.bits + (8 * k + lane) * rest)
        target = _at(words, k * CHUNK + 16 * whole)
        for b in range(rest):
            target[b] = source[b]
    if a.bits == 3:
        for b in range(count):
            low, middle, high = words[b], words[CHUNK + b], words[2 * CHUNK + b]
            words[3 * CHUNK + b] = (
                (np.uint32(low) & np.uint32(0x00010001))
                | np.uint32((np.uint32(middle) & np.uint32(0x00010001)) << np.uint32(1))
                | np.uint32((np.uint32(high) & np.uint32(0x00010001)) << np.uint32(2))
            )


@inline
def _lane_codes(a, tile, lane, group, groups, codes):
    """The lane's 12 bits of each of these groups (spec 4.3), with others above them; codes[0] is the first of a set."""
    stored = _at(_pointer(a.stat_codes, uint32), tile * 3 * a.groups)
    sets = a.groups // 16
    first = group // 16
    for s in range(first, min((group + groups + 15) // 16, sets)):
        words, found = _at(stored, 48 * s), _at(codes, 16 * (s - first))
        for p in range(4):
            i = 4 * lane + p
            word, half = words[i], _shifted(words[32 + i // 2], 16 * (i % 2))
            found[2 * p] = word
            found[2 * p + 1] = _shifted(word, 12)
            found[8 + 2 * p] = _shifted(word, 24) | np.uint32(np.uint32(half) << np.uint32(8))
            found[9 + 2 * p] = _shifted(half, 4)
    rest = a.groups - 16 * sets
    if group + groups > 16 * sets:
        low, shift = 12 * lane // 32, np.uint64(12 * lane % 32)
        words0 = _at(stored, 48 * sets + low * rest)
        words1 = _at(stored, 48 * sets + min(low + 1, 2) * rest)
        found = _at(codes, 16 * (sets - first))
        for r in range(rest):
            found[r] = np.uint32((np.uint64(words1[r]) << np.uint64(32) | np.uint64(words0[r])) >> shift)


@inline
def _lane_statistics(a, tile, lane, start, count, stats, sz):
    """s and z of row l, then of row l + 8, each CHUNK numbers after the one before (spec 3)."""
    group, groups = _groups(a, start, count)
    if a.bilevel:
        room = _room(uint32, CHUNK_SETS)
        _lane_codes(a, tile, lane, group, groups, room)
        twelve = _at(room, group % 16)
        for g in range(groups):
            codes = twelve[g]
            scale, middle = stats[g], stats[CHUNK + g]
            zero_scale, zero_middle = stats[2 * CHUNK + g], stats[3 * CHUNK + g]
            sz[g] = scale * (_code(codes, 0, 7) - middle)
            sz[CHUNK + g] = zero_scale * (_code(codes, 3, 7) - zero_middle)
            sz[2 * CHUNK + g] = scale * (_code(codes, 6, 7) - middle)
            sz[3 * CHUNK + g] = zero_scale * (_code(codes, 9, 7) - zero_middle)
    else:
        for half in range(2):
            row = min(16 * tile + 8 * half + lane, a.out - 1)
            scales = _at(_pointer(a.group_sc, uint16), row * a.groups + group)
            zeros = _at(_pointer(a.group_zp, uint8), row * a.groups + group)
            for g in range(groups):
                sz[2 * half * CHUNK + g] = _half(scales[g])
                sz[(2 * half + 1) * CHUNK + g] = np.float32(zeros[g])


@inline
def _prepare(a, x, sums, up, down):
    """x as [batch, chunks, 16, CHUNK], with `down`, the power of two that makes its largest number 1 .. 4, and its inverse
    `up`; and the sums over groups, [batch, groups]. So no sum of codes times x overflows that W x does not."""
    source, raw = _pointer(a.x, float32), _pointer(a.x, uint32)
    chunks = (a.blocks + CHUNK - 1) // CHUNK
    for n in range(a.batch):
        largest = np.uint32(0)
        for i in range(n * a.inn, (n + 1) * a.inn):
            largest = max(largest, raw[i] & np.uint32(0x7FFFFFFF))
        exponent = min(max(np.int64(largest) >> 23, 1), 253)
        up[n] = _power(exponent)
        down[n] = _power(254 - exponent)
        for g in range(a.groups):
            sums[n * a.groups + g] = 0
        for b in range(a.blocks):
            place = (n * chunks + b // CHUNK) * 16 * CHUNK + b % CHUNK
            total = np.float32(0)
            for c in range(16):
                value = np.float32(0)
                if 16 * b + c < a.inn:
                    value = source[n * a.inn + _original_column(a, 16 * b + c)] * down[n]
                x[place + c * CHUNK] = value
                total += value
            sums[n * a.groups + b // a.group_blocks] += total


@inline_sum
def _add_products(word0, bit0, word1, bit1, mask, x, count, dots):
    """Adds codes times x, of two columns and two rows in each of `count` blocks, to these rows' dot products in the block."""
    for b in range(count):
        v, w = _shifted(word0[b], bit0), _shifted(word1[b], bit1)
        even, odd = x[b], x[CHUNK + b]
        dots[b] += _code(v, 0, mask) * even + _code(v, 16, mask) * odd
        dots[CHUNK + b] += _code(w, 0, mask) * even + _code(w, 16, mask) * odd


@inline_sum
def _add_groups(a, start, count, dots, sz, sums, y):
    """Adds s (dot - z sum) of all groups of these blocks to y of rows l and l + 8."""
    y0 = y1 = np.float32(0)
    if a.group_blocks == 1:
        for b in range(count):
            y0 += sz[b] * (dots[b] - sz[CHUNK + b] * sums[b])
            y1 += sz[2 * CHUNK + b] * (dots[CHUNK + b] - sz[3 * CHUNK + b] * sums[b])
    else:
        group, groups = _groups(a, start, count)
        for g in range(groups):
            first, last = (group + g) * a.group_blocks - start, (group + g + 1) * a.group_blocks - start
            dot0 = dot1 = np.float32(0)
            for b in range(max(first, 0), min(last, count)):
                dot0 += dots[b]
                dot1 += dots[CHUNK + b]
            total = sums[g] if first >= 0 else np.float32(0)  # a group that began in the chunk before was counted there
            y0 += sz[g] * (dot0 - sz[CHUNK + g] * total)
            y1 += sz[2 * CHUNK + g] * (dot1 - sz[3 * CHUNK + g] * total)
    y[0] += y0
    y[8] += y1


@inline_sum
def _add_outliers(a, tile, n, down, y):
    """Adds outliers times row n of x, cell by cell, to y of the tile's rows."""
    sums = _room(float32, 16)  # of which LLVM knows that writing to it changes no field of a
    for i in range(16):
        sums[i] = 0
    cells = (a.inn + 127) // 128
    for cell in range(cells):
        first, last = _cell(a, tile * cells + cell)
        start = 128 * cell
        height, width = min(a.out - 16 * tile, 16), min(a.inn - start, 128)
        x = _at(_pointer(a.x, float32), n * a.inn + start)
        words = _pointer(a.outlier_words, uint32)
        for k in range(first, last):
            row, column = _place(a, words[k], start, height, width)
            sums[row] += _half(_shifted(words[k], 16)) * (x[column] * down)
    for i in range(16):
        y[i] += sums[i]


def products(address):
    """y = W x for every row of x."""
    a = carray(address, 1)[0]
    places = _pointer(a.places, int64)
    chunks = (a.blocks + CHUNK - 1) // CHUNK
    x = _pointer(a.scratch + 4 * a.scratch_size * _take(a.threads), float32)
    sums = _at(x, a.batch * chunks * 16 * CHUNK)
    up = _at(sums, a.batch * a.groups)
    down = _at(up, a.batch)
    y = _at(down, a.batch)
    _prepare(a, x, sums, up, down)
    stats, sz = _room(float32, CHUNK4), _room(float32, CHUNK4)
    dots, words = _room(float32, CHUNK2), _room(uint32, CHUNK4)
    mask = np.uint32((1 << a.bits) - 1)
    tile = a.first + _take(a.taken)
    while tile < a.last:
        following = a.first + _take(a.taken)
        for i in range(16 * a.batch):
            y[i] = 0
        for chunk in range(chunks):
            start = chunk * CHUNK
            count = min(CHUNK, a.blocks - start)
            group, groups = _groups(a, start, count)
            _tile_statistics(a, tile, start, count, stats)
            if a.bilevel and following < a.last:
                for g in range(group, group + groups, 16):
                    for k in range(0, 48, 16):
                        _ask_for(_pointer(a.stat_codes, uint32), 3 * (following * a.groups + g) + k)
                    for k in range(0, 64, 32):
                        _ask_for(_pointer(a.tile_stats, uint16), 4 * (following * a.groups + g) + k)
            for lane in range(8):
                _lane_statistics(a, tile, lane, start, count, stats, sz)
                _lane_words(a, tile, lane, start, count, words)
                if following < a.last:  # in an order that no processor guesses: it would wait for each lane's words
                    ahead = 8 * a.bits * (following * a.blocks + start) + lane * 16
                    for b in range(0, count, 16):
                        for k in range(a.bits):
                            _ask_for(_pointer(a.weight, uint32), ahead + (b * a.bits + 16 * k) * 8)
                for n in range(a.batch):
                    for i in range(2 * CHUNK):
                        dots[i] = 0
                    for pair in range(8):
                        place0, place1 = places[2 * pair], places[16 + 2 * pair]
                        word0, word1 = _at(words, CHUNK * place0), _at(words, CHUNK * place1)
                        bit0, bit1 = places[2 * pair + 1], places[17 + 2 * pair]
                        columns = _at(x, (16 * (n * chunks + chunk) + 2 * pair) * CHUNK)
                        _add_products(word0, bit0, word1, bit1, mask, columns, count, dots)
                    _add_groups(a, start, count, dots, sz, _at(sums, n * a.groups + group), _at(y, 16 * n + lane))
        if a.outliers:
            for n in range(a.batch):
                _add_outliers(a, tile, n, down[n], _at(y, 16 * n))
        for i in range(min(16, a.out - 16 * tile)):
            for n in range(a.batch):
                _pointer(a.result, float32)[n * a.out + 16 * tile + i] = y[16 * n + i] * up[n]
        tile = following


@intrinsic
def _decode_row(typing, words, places, mask, sz, count, row):
    """s (q - z) of one row of `count` blocks, each operation on its own (spec 3): row[256 * ceil(count / 16)] in float32.

    Word k of block b is words[k * CHUNK + b]; s and z of block b are sz[b] and sz[CHUNK + b]. Written as the vector code that
    it is: codes are taken out of 16 blocks at a time, and lie along a row only after a transposition, while they are still
    pairs. Behind the last block numbers follow that nobody needs.
    """

    def generate(context, builder, signature, arguments):
        words, places, mask, sz, count, row = arguments
        index, integer, single = ir.IntType(64), ir.IntType(32), ir.FloatType()
        integers, shorts, singles = ir.VectorType(integer, 16), ir.VectorType(ir.IntType(16), 32), ir.VectorType(single, 16)

        def load(pointer, place, kind):
            return builder.load(builder.gep(pointer, [place], source_etype=kind), align=4, typ=kind)

        def shuffled(one, other, order):
            return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(integer, len(order)), order))

        def everywhere(value, kind):
            first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, integer(0))
            return shuffled(first, first, [0] * 16)

        pairs = []  # first word and shift of each
        for pair in range(8):
            word = builder.mul(load(places, index(2 * pair), index), index(CHUNK))
            bit = builder.trunc(load(places, index(2 * pair + 1), index), integer)
            pairs.append((builder.gep(words, [word], source_etype=integer), everywhere(bit, integers)))
        masks = everywhere(builder.mul(mask, integer(0x00010001)), integers)
        low, high = ([n for i in range(first, first + 8) for n in (i, 16 + i)] for first in (0, 8))
        with cgutils.for_range(builder, builder.udiv(builder.add(count, index(15)), index(16))) as loop:
            vectors = [builder.and_(builder.lshr(load(first, loop.index, integers), bit), masks) for first, bit in pairs]
            for _ in range(3):  # pair p of block b goes from vector p, place b to vector b // 2, place 8 (b % 2) + p
                vectors = [shuffled(vectors[i // 2], vectors[i // 2 + 4], high if i % 2 else low) for i in range(8)]
            for i in range(16):
                half = builder.bitcast(vectors[i // 2], shorts)
                codes = builder.zext(shuffled(half, half, list(range(16 * (i % 2), 16 * (i % 2) + 16))), integers)
                block = builder.add(builder.mul(loop.index, index(16)), index(i))
                scale = everywhere(load(sz, block, single), singles)
                zero = everywhere(load(sz, builder.add(block, index(CHUNK)), single), singles)
                value = builder.fmul(scale, builder.fsub(builder.sitofp(codes, singles), zero))
                target = builder.gep(row, [block], source_etype=singles)
                builder.store(value, builder.bitcast(target, singles.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(words, places, types.uint32, sz, types.int64, row), generate


@inline
def _for_blocks(a, start, count, sz, out):
    """Statistics of groups, four of each, as those of their blocks."""
    group, groups = _groups(a, start, count)
    for i in range(4):
        for g in range(groups):
            first, last = (group + g) * a.group_blocks - start, (group + g + 1) * a.group_blocks - start
            for b in range(max(first, 0), min(last, count)):
                out[i * CHUNK + b] = sz[i * CHUNK + g]


@inline
def _bf16(value):
    """Bits of a finite float32 rounded to bf16, to nearest, ties to even."""
    raw = np.float32(value).view(np.uint32)
    half = np.uint32(np.uint32(0x7FFF) + (_shifted(raw, 16) & np.uint32(1)))
    return np.uint16(_shifted(np.uint32(raw + half), 16))


@inline
def _outlier_starts(a, tile, starts):
    """Where the outliers of row r in cell i of the tile begin, starts[16 * i + r]; behind them all, where they end."""
    cells = (a.inn + 127) // 128
    known = 0  # starts that are written
    end, _ = _cell(a, tile * cells)
    height = min(a.out - 16 * tile, 16)
    words = _pointer(a.outlier_words, uint32)
    for cell in range(cells):
        first, last = _cell(a, tile * cells + cell)
        if first != end:  # behind a cell whose pointers are at fault
            continue
        for k in range(first, last):
            row, _ = _place(a, words[k], 128 * cell, height, 128)
            if 16 * cell + row < known - 1:  # it would count for a row below
                _take(a.faults)
            while known <= 16 * cell + row:
                starts[known] = np.uint32(k)
                known += 1
        end = last
    while known <= 16 * cells:
        starts[known] = np.uint32(end)
        known += 1


@inline
def _finish(a, i, row, ordered, starts):
    """Writes row i of W: columns into original order, outliers added, rounded if bf16 is asked for."""
    if a.perm:
        for j in range(a.inn):
            ordered[_original_column(a, j)] = row[j]
    decoded = ordered if a.perm else row
    if a.outliers:
        words = _pointer(a.outlier_words, uint32)
        for start in range(0, a.inn, 128):
            place, width = start // 8 + i % 16, min(a.inn - start, 128)
            for k in range(np.int64(starts[place]), np.int64(starts[place + 1])):
                _, column = _place(a, words[k], start, 16, width)
                decoded[start + column] += _half(_shifted(words[k], 16))
    own = (i - 16 * a.first) * a.inn
    if a.bf16:
        rounded = _at(_pointer(a.result, uint16), own)
        for j in range(a.inn):
            rounded[j] = _bf16(decoded[j])
    else:
        exact = _at(_pointer(a.result, float32), own)
        for j in range(a.inn):
            exact[j] = decoded[j]


def decode(address):
    """Rows of W in original column order, equal to the spec's decode bit for bit (spec 3), in bf16 its rounded values."""
    a = carray(address, 1)[0]
    scratch = a.scratch + 4 * a.scratch_size * _take(a.threads)
    rows = _pointer(scratch, float32)
    width = (a.blocks + 15) // 16 * 256
    ordered = _at(rows, 2 * width)
    stats = _at(rows, 3 * width)
    starts = _pointer(scratch + 4 * (3 * width + (a.blocks + CHUNK - 1) // CHUNK * CHUNK4), uint32)
    places, mask = _pointer(a.places, int64), np.uint32((1 << a.bits) - 1)
    of_groups, of_blocks, words = _room(float32, CHUNK4), _room(float32, CHUNK4), _room(uint32, CHUNK4)
    sz = of_groups if a.group_blocks == 1 else of_blocks
    tile = a.first + _take(a.taken)
    while tile < a.last:
        for start in range(0, a.blocks, CHUNK):
            _tile_statistics(a, tile, start, min(CHUNK, a.blocks - start), _at(stats, 4 * start))
        if a.outliers:
            _outlier_starts(a, tile, starts)
        for lane in range(8):
            for start in range(0, a.blocks, CHUNK):
                count = min(CHUNK, a.blocks - start)
                _lane_statistics(a, tile, lane, start, count, _at(stats, 4 * start), of_groups)
                if a.group_blocks > 1:
                    _for_blocks(a, start, count, of_groups, of_blocks)
                _lane_words(a, tile, lane, start, count, words)
                for half in range(2):
                    row = _at(rows, half * width + 16 * start)
                    _decode_row(words, _at(places, 16 * half), mask, _at(sz, 2 * half * CHUNK), count, row)
            for half in range(2):
                i = 16 * tile + 8 * half + lane
                if i < a.out:
                    _finish(a, i, _at(rows, half * width), ordered, starts)
        tile = a.first + _take(a.taken)


KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {"products": (products, SUM), "decode": (decode, EXACT)}
