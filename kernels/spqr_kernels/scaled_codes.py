"""A lane's weights in fp16 by one multiply-add each, for `small_kernel`: codes are numbers as they stand under a mask.

A code at bit p of a half word is the fp16 subnormal q 2**(p - 24), exactly. Times scale 2**(24 - p), plus offset, it is a
weight; `weights.py` needs another multiply-add before, which makes a normal number of it. The scale times that power must stay
below 65504. So weights are in a UNIT, a power of two that a warp has for all that goes into its sums: 4 with 3 bits, which
reaches to scales of 0.03, and 4 or 2 with 4 or 2 bits, which reach to 0.12. Where a chunk has larger ones the unit grows, as
the largest number of an online softmax does, and the sums so far shrink by as much.

A weight is rounded by its scale, twice, by its offset, and as the sum of both; below 2**-14 units to multiples of 2**-24 units.
"""

from __future__ import annotations

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.packing import FIELDS, PAIRS, is_spread

from .ptx import constants_in_registers, half2

# By bits of a code: by how much a word is shifted to the right, or not at all, so that each of its fields comes to a place, and
# these places. Low ones save shifts, but ask for large units, of which small weights are few.
_SHIFTS = {2: (0, 6, -4), 3: (0, 6), 4: (-3, 5)}
_PLACES = {2: (4, 6, 8), 3: (1, 4, 7), 4: (3, 7)}
_MOST = 0.96875 * 2.0**16  # that a scale times a power of two may be: below 65504, with room for how it was rounded
# 2**`_top` counted in units, as half2, is what is called units below: large where the unit is small.
_FIRST = 2.0**15  # units at first: the largest power of two in fp16
_STEP = 2.0**-2  # by which units change
_LEAST = 2.0**-7  # units: their reach is beyond fp16, for all bits, and 1 in them, 2**-24 or more, is not 0 yet


def _top(bits: int) -> int:
    """The power of two that goes with the highest place."""
    return 24 - _PLACES[bits][-1]


def place_of(bits: int, bit: int) -> tuple[int, int]:
    """By how much a word is shifted to the right so that its field at `bit` comes to a place, and to which."""
    return next((shift, bit - shift) for shift in _SHIFTS[bits] if bit - shift in _PLACES[bits])


def _times(to: str, source: str, factor: float) -> str:
    """PTX: to = source * factor, half2, the factor where `constants_in_registers` finds it."""
    return f"{{ .reg .b32 a; mov.b32 a, {half2(factor, factor):#x}; mul.rn.f16x2 {to}, {source}, a; }}"


def _weights(bits: int) -> list[str]:
    """PTX: $0 .. $15, packed half2 of pair i of row l ($i) and of row l + 8 ($8 + i), in units, from the words $16 .. and two
    half2 of row l and row l + 8: s, the scale times 2**_top, and o, the offset, both in units."""
    words = [f"${16 + k}" for k in range(bits)]
    places = _PLACES[bits]
    mask = (2**bits - 1) * 0x00010001
    lines = [".reg .b32 t, u, o0, o1;"]
    for k, word in enumerate(words):
        for shift in filter(None, _SHIFTS[bits]):
            shifted = f"shr.u32 v{k}_{shift}" if shift > 0 else f"shl.b32 v{k}_{-shift}"
            lines += [f".reg .b32 v{k}_{abs(shift)};", f"{shifted}, {word}, {abs(shift)};"]
    for place in places:
        lines.append(f".reg .b32 s_{place}, s0_{place}, s1_{place};")
        lines.append(_times(f"s_{place}", "s", 2.0 ** (places[-1] - place)) if place < places[-1] else f"mov.b32 s_{place}, s;")
        lines.append(f"mov.b32 {{l, h}}, s_{place}; mov.b32 s0_{place}, {{l, l}}; mov.b32 s1_{place}, {{h, h}};")
    lines.append("mov.b32 {l, h}, o; mov.b32 o0, {l, l}; mov.b32 o1, {h, h};")
    for half in range(2):
        for pair in range(PAIRS):
            word, bit = FIELDS[bits][half][pair]
            if is_spread(bits, bit):
                place = places[0]
                lines += [f"and.b32 t, {words[0]}, 0x00010001;", f"mul.lo.u32 t, t, {1 << place};"]
                for k in (1, 2):
                    lines += [f"and.b32 u, {words[k]}, 0x00010001;", f"mad.lo.u32 t, u, {1 << place + k}, t;"]
            else:
                shift, place = place_of(bits, bit)
                source = f"v{word}_{abs(shift)}" if shift else words[word]
                lines.append(f"and.b32 t, {source}, {mask << place:#x};")
            lines.append(f"fma.rn.f16x2 ${8 * half + pair}, t, s{half}_{place}, o{half};")
    return lines


def _bilevel(bits: int) -> str:
    """PTX: `_weights` from, behind the words, codes as `stage_statistics` places them, where tile statistics are, and units."""
    code, tops, units = (f"${16 + bits + i}" for i in range(3))
    middle = 2.0 ** (bits - 1)
    lines = [
        ".reg .b32 p, q, ss, sz, zs, zz, s, z, o; .reg .b16 l, h;",
        f"ld.shared.v2.b32 {{p, q}}, [{tops}];",
        "mov.b32 {l, h}, p; mov.b32 ss, {l, l}; mov.b32 sz, {h, h};",
        "mov.b32 {l, h}, q; mov.b32 zs, {l, l}; mov.b32 zz, {h, h};",
        # both codes under the exponent of 1024, then cs and -cz
        f"lop3.b32 s, {code}, {7 << 2 | 7 << 16:#x}, 0x64006400, 0xEA;",
        f"lop3.b32 z, {code}, {7 << 5 | 7 << 19:#x}, 0x64006400, 0xEA;",
        f"{{ .reg .b32 a, b; mov.b32 a, {half2(0.25, 1):#x}; mov.b32 b, {half2(-256, -1024):#x};",
        "fma.rn.f16x2 s, s, a, b; }",
        f"{{ .reg .b32 a, b; mov.b32 a, {half2(-1 / 32, -1 / 8):#x}; mov.b32 b, {half2(32, 128):#x};",
        "fma.rn.f16x2 z, z, a, b; }",
        "sub.rn.f16x2 s, s, sz;", f"mul.rn.f16x2 ss, ss, {units};", "mul.rn.f16x2 s, s, ss;",
        f"{{ .reg .b32 a; mov.b32 a, {half2(middle, middle):#x}; fma.rn.f16x2 o, zs, zz, a; }}", "fma.rn.f16x2 z, z, zs, o;",
        # o = (middle - z) s - middle s: rounded once where it is large, and not three times, as - z s would be
        _times("o", "s", -middle * 2.0 ** -_top(bits)), _times("p", "s", 2.0 ** -_top(bits)), "fma.rn.f16x2 o, z, p, o;",
    ]  # fmt: skip
    return "{\n" + "\n".join(lines + _weights(bits)) + "\n}"


def _direct(bits: int) -> str:
    """PTX: `_weights` from scale (raw fp16) and zero point (integer) of row l, those of row l + 8, and units."""
    scale0, zero0, scale1, zero1, units = (f"${16 + bits + i}" for i in range(5))
    lines = [
        ".reg .b32 s, z, o; .reg .b16 l, h;",
        f"prmt.b32 s, {scale0}, {scale1}, 0x5410; mul.rn.f16x2 s, s, {units};",
        f"cvt.rn.f16.u32 l, {zero0}; cvt.rn.f16.u32 h, {zero1}; mov.b32 z, {{l, h}};",
        _times("o", "s", -(2.0 ** -_top(bits))), "mul.rn.f16x2 o, z, o;",
    ]  # fmt: skip
    return "{\n" + "\n".join(lines + _weights(bits)) + "\n}"


def _grow(bits: int, sums: int) -> str:
    """PTX: sums $0 .. and units, from the same behind them and the largest scale that the lane looks after (raw fp16). Units
    change until those of all lanes of the warp are within reach, and sums with them."""
    units, most = f"${2 * sums + 1}", f"${2 * sums + 2}"
    limit = _MOST * 2.0 ** (_PLACES[bits][0] - _PLACES[bits][-1])
    limit, step, least = (f"{half2(value, 0):#x}" for value in (limit, _STEP, _LEAST))
    return "\n".join([
        f"{{ .reg .pred p, q; .reg .b16 m, n, u, k; .reg .f32 s<{sums}>;",
        *(f"mov.f32 s{i}, ${sums + 1 + i};" for i in range(sums)),
        f"cvt.u16.u32 m, {most}; mov.b32 {{u, n}}, {units};",
        "AGAIN:", f"mul.rn.f16 n, m, u; mov.b16 k, {limit}; setp.gt.f16 p, n, k; vote.sync.any.pred q, p, -1;",
        "@!q bra.uni DONE;", f"mov.b16 k, {least}; setp.le.f16 q, u, k;", "@q bra.uni DONE;",
        f"mov.b16 k, {step}; mul.rn.f16 u, u, k;",
        *(f"mul.rn.f32 s{i}, s{i}, 0f{struct.pack('>f', _STEP).hex()};" for i in range(sums)), "bra.uni AGAIN;",
        "DONE:", *(f"mov.f32 ${i}, s{i};" for i in range(sums)), f"mov.b32 ${sums}, {{u, u}}; }}",
    ])  # fmt: skip


# $0: |ss| (|sz| + 7), raw fp16, of the tile statistics at $1. No scale of their group is larger.
_REACH = gl.constexpr(
    "{ .reg .b32 t, u, k; .reg .b16 a, b, c, d; ld.shared.b32 t, [$1]; abs.f16x2 t, t;"
    f" mov.b32 k, {half2(7, 7):#x}; add.rn.f16x2 u, t, k;"
    " mov.b32 {a, b}, t; mov.b32 {c, d}, u; mul.rn.f16 a, a, d; cvt.u32.u16 $0, a; }"
)
BILEVEL = 8  # kind of a program: bits, and this where statistics are bilevel
_INPUTS = {0: 5, BILEVEL: 3}  # of a program behind the words
_PROGRAMS = {
    bits + kind: constants_in_registers(program(bits), 16 + bits + _INPUTS[kind])
    for bits in _PLACES for kind, program in ((0, _direct), (BILEVEL, _bilevel))
}  # fmt: skip
_PROGRAM = gl.constexpr({kind: program for kind, (program, _) in _PROGRAMS.items()})
_CONSTANTS = gl.constexpr({kind: found for kind, (_, found) in _PROGRAMS.items()})
_REGISTERS = gl.constexpr({  # outputs are written before all inputs are read, hence the early clobbers
    bits + kind: ",".join(["=&r"] * 16 + ["r"] * (bits + _INPUTS[kind] + len(_PROGRAMS[bits + kind][1])))
    for bits in _PLACES for kind in _INPUTS
})  # fmt: skip
_BILEVEL = gl.constexpr(BILEVEL)
_FIRST_UNITS = gl.constexpr(half2(_FIRST, _FIRST))
_ONE = gl.constexpr({bits: half2(2.0 ** -_top(bits), 2.0 ** -_top(bits)) for bits in _PLACES})
_TOP = gl.constexpr({bits: _top(bits) for bits in _PLACES})
_SUMS = (8, 16)  # of a lane, of all of its warp's tiles
_GROW = gl.constexpr({100 * bits + sums: _grow(bits, sums) for bits in _PLACES for sums in _SUMS})
_GROW_REGISTERS = gl.constexpr({n: ",".join(["=&f"] * n + ["=&r"] + ["f"] * n + ["r", "r"]) for n in _SUMS})
_GROWN = gl.constexpr({n: (gl.float32,) * n + (gl.int32,) for n in _SUMS})


@gluon.jit
def first_units(zero):
    """Units of sums that are 0 yet, plus zero."""
    return zero + _FIRST_UNITS


@gluon.jit
def constants(zero, BITS: gl.constexpr, BILEVEL: gl.constexpr):
    """Those of the weights plus zero, of which the compiler does not know that it is 0."""
    KIND: gl.constexpr = BITS + (_BILEVEL if BILEVEL else 0)
    found = ()
    for i in gl.static_range(len(_CONSTANTS[KIND])):
        found = found + (zero + _CONSTANTS[KIND][i],)
    return found


@gluon.jit
def reach(tops):
    """What no scale of the group is larger than whose tile statistics are at `tops` in shared memory: raw fp16."""
    return gl.inline_asm_elementwise(_REACH, "=r,r", [tops], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def reach_of_direct(direct):
    """The same of all groups that `stage_statistics.direct_of_chunk` has of each tile."""
    most = direct[0][0][0] & 0x7FFF
    for t in gl.static_range(len(direct)):
        for n in gl.static_range(len(direct[0])):
            most = gl.maximum(most, gl.maximum(direct[t][n][0] & 0x7FFF, direct[t][n][2] & 0x7FFF))
    return most


@gluon.jit
def grow(sums, units, most, BITS: gl.constexpr):
    """A warp's sums, fp32 of each tile, and units, once these have changed so that scales up to `most`, of each of its lanes,
    are within reach."""
    TILES: gl.constexpr = len(sums)
    EACH: gl.constexpr = len(sums[0])
    every = ()
    for t in gl.static_range(TILES):
        every = every + sums[t]
    grown = gl.inline_asm_elementwise(
        _GROW[100 * BITS + TILES * EACH], _GROW_REGISTERS[TILES * EACH], every + (units, most), dtype=_GROWN[TILES * EACH],
        is_pure=False, pack=1,
    )  # fmt: skip
    after = ()
    for t in gl.static_range(TILES):
        after = after + (grown[t * EACH : (t + 1) * EACH],)
    return after, grown[TILES * EACH]


@gluon.jit
def one_in_units(units, BITS: gl.constexpr):
    """How many units 1 is, half2."""
    return gl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [units, units * 0 + _ONE[BITS]], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def unit_of(units, BITS: gl.constexpr):
    """The unit, fp32."""
    exponent = (units >> 10 & 31) - 15
    return ((127 + _TOP[BITS] - exponent) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _weights_of(inputs, KIND: gl.constexpr):
    return gl.inline_asm_elementwise(
        _PROGRAM[KIND], _REGISTERS[KIND], inputs,
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32,
               gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def bilevel_weights(words, code, tops, units, by, BITS: gl.constexpr):
    """A lane's BITS words of a block to 16 words of two fp16 weights in units: pairs 0 .. 7 of row l, then of row l + 8.

    code: as `stage_statistics.codes_of_chunk` has it. tops: where the group's tile statistics are. by: `constants`."""
    return _weights_of(words + (code, tops, units) + by, BITS + _BILEVEL)


@gluon.jit
def direct_weights(words, statistics, units, by, BITS: gl.constexpr):
    """The same with one group's of `stage_statistics.direct_of_chunk`."""
    return _weights_of(words + statistics + (units,) + by, BITS)
