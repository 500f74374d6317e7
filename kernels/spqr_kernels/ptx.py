"""PTX of the decode kernel: what a thread does with its registers, one string an idea.

Triton's own operations leave the thread layout of a tensor-core fragment to the compiler. Here it must be exactly that
of `mma.m16n8k16`, because the stored words are already in that order (spec 4.1): lane group l of a warp holds rows l and
l + 8.
"""

from __future__ import annotations

import re
import struct

from spqr_format.packing import FIELDS, PAIRS, SPREAD, is_spread


def _magic(bits: int, shift: int) -> tuple[int, int]:
    """Constants (a, b) of half2 fma that brings 1024 + 2**shift * q to q - 2**(bits-1): exact in fp16."""
    # (1024 + 2^shift q) * 2^-shift - (1024 * 2^-shift + middle)
    middle = 2 ** (bits - 1)
    return _half2(2.0**-shift), _half2(-(1024.0 * 2.0**-shift + middle))


def half2(low: float, high: float) -> int:
    """Two fp16 numbers in a word."""
    a, b = struct.unpack("<HH", struct.pack("<ee", low, high))
    return b << 16 | a


def _half2(value: float) -> int:
    return half2(value, value)


# e: a pair of codes of which bit k is bit 0 of word k, in either half. A multiply-add is one instruction, a shift and
# an or are two.
assert SPREAD == 0
_SPREAD_CODE = [
    "and.b32 e, $16, 0x00010001;",
    "and.b32 u, $17, 0x00010001;",
    "mad.lo.u32 e, u, 2, e;",
    "and.b32 u, $18, 0x00010001;",
    "mad.lo.u32 e, u, 4, e;",
]


def dequantize_lane(bits: int) -> str:
    """PTX: a lane's words of one column block to its fp16 weights.

    Outputs $0..$15: packed half2 of pair i of row l ($i) and of row l + 8 ($8+i).
    Inputs: $16.. the `bits` words; then scale and offset of row l, scale and offset of row l + 8, as half2 with equal halves:
    weight = (q - middle) * scale + offset, where offset = (middle - z) * scale and middle = 2**(bits-1).
    """
    words = [f"${16 + k}" for k in range(bits)]
    scale = [f"${16 + bits}", f"${18 + bits}"]
    offset = [f"${17 + bits}", f"${19 + bits}"]
    mask = (2**bits - 1) * 0x00010001
    drop = {2: 8, 3: 6, 4: 8}[bits]  # one shift of a word brings its upper fields into the ten bits of a mantissa
    lines = [".reg .b32 " + ", ".join([f"v{k}" for k in range(bits)] + ["t", "u", "e"]) + ";"]
    lines += [f"shr.u32 v{k}, {words[k]}, {drop};" for k in range(bits)]
    for half in range(2):
        for pair in range(PAIRS):
            word, bit = FIELDS[bits][half][pair]
            if is_spread(bits, bit):
                lines += _SPREAD_CODE
                source, at = "e", 0
            elif bit + bits <= 10:
                source, at = words[word], bit
            else:
                source, at = f"v{word}", bit - drop
            a, b = _magic(bits, at)
            lines.append(f"lop3.b32 t, {source}, {mask << at:#010x}, 0x64006400, 0xEA;")  # (x & mask) | 1024.0
            lines.append(f"{{ .reg .b32 a, b; mov.b32 a, {a:#010x}; mov.b32 b, {b:#010x}; fma.rn.f16x2 t, t, a, b; }}")
            lines.append(f"fma.rn.f16x2 ${8 * half + pair}, t, {scale[half]}, {offset[half]};")
    return "{\n" + "\n".join(lines) + "\n}"


def dequantize_lane_constraints(bits: int) -> str:
    """Registers of `dequantize_lane`. Outputs are written before all inputs are read, hence the early clobbers."""
    return ",".join(["=&r"] * 16 + ["r"] * (bits + 4))


# D = A * B + C, fp32 accumulators. $0..$3 D; $4..$7 A; $8, $9 B; $10..$13 C.
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
MMA_BF16 = MMA.replace(".f16.f16", ".bf16.bf16")
MMA_CONSTRAINTS = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"


def load(words: int, how: str = "") -> str:
    """PTX: `words` (1, 2 or 4) 32-bit words at an aligned address. Input: the pointer. how: ".nc" for memory that nobody writes
    while the kernel runs, and where to keep it."""
    if words == 1:
        return f"ld.global{how}.b32 $0, [$1];"
    outputs = ",".join(f"${k}" for k in range(words))
    return f"ld.global{how}.v{words}.b32 {{{outputs}}}, [${words}];"


def load_constraints(words: int) -> str:
    """Registers of `load`."""
    return ",".join(["=r"] * words + ["l"])


# Sum of $1 over the four lanes of a quad.
QUAD_SUM = """{
.reg .f32 t, u;
shfl.sync.bfly.b32 t, $1, 1, 31, -1;
add.f32 u, $1, t;
shfl.sync.bfly.b32 t, u, 2, 31, -1;
add.f32 $0, u, t;
}"""


def decode_lane(bits: int, bfloat: bool) -> str:
    """PTX: a lane's words of one column block to weights, exact in fp32 (spec 3), each rounded once to fp16 or bf16.

    Outputs $0..$15: pair i of row l ($i) and of row l + 8 ($8 + i). Inputs: $16.. the words; then as fp32 scale and zero of row
    l, scale and zero of row l + 8.
    """
    words = [f"${16 + k}" for k in range(bits)]
    scale = [f"${16 + bits}", f"${18 + bits}"]
    zero = [f"${17 + bits}", f"${19 + bits}"]
    mask = 2**bits - 1
    lines = [".reg .b32 t, e, f, u, " + ", ".join(f"v{k}" for k in range(bits)) + ";", ".reg .f32 a, b;"]
    lines += [f"shr.u32 v{k}, {words[k]}, 16;" for k in range(bits)]
    for half in range(2):
        for pair in range(PAIRS):
            word, bit = FIELDS[bits][half][pair]
            if is_spread(bits, bit):
                lines += [*_SPREAD_CODE, "shr.u32 f, e, 16;"]
                sources, bit = ("e", "f"), 0
            else:
                sources = (words[word], f"v{word}")
            for source, value in zip(sources, "ab", strict=True):
                # the code under the exponent of 2**23: 2**23 + q * 2**bit, then q, exactly
                lines.append(f"lop3.b32 t, {source}, {mask << bit:#010x}, 0x4B000000, 0xEA;")
                lines.append(f"mov.b32 {value}, t;")
                lines.append(f"fma.rn.f32 {value}, {value}, {_float(2.0**-bit)}, {_float(-(2.0 ** (23 - bit)))};")
                lines.append(f"sub.rn.f32 {value}, {value}, {zero[half]};")
                lines.append(f"mul.rn.f32 {value}, {value}, {scale[half]};")
            lines.append(f"cvt.rn.{'bf16x2' if bfloat else 'f16x2'}.f32 ${8 * half + pair}, b, a;")
    return "{\n" + "\n".join(lines) + "\n}"


def decode_lane_constraints(bits: int) -> str:
    """Registers of `decode_lane`."""
    return ",".join(["=&r"] * 16 + ["r"] * bits + ["f"] * 4)


def _float(value: float) -> str:
    (raw,) = struct.unpack("<I", struct.pack("<f", value))
    return f"0f{raw:08X}"


_EXACT_STATISTICS = """
.reg .b32 t, c;
.reg .b16 lo, hi;
.reg .f32 ss, sz, zs, zz, q, s0, z0, s1, z1;
shf.r.wrap.b32 t, $4, $5, $6;
mov.b32 {lo, hi}, $7;
cvt.f32.f16 ss, lo;
cvt.f32.f16 sz, hi;
mov.b32 {lo, hi}, $8;
cvt.f32.f16 zs, lo;
cvt.f32.f16 zz, hi;
""" + "\n".join(
    f"lop3.b32 c, t, {7 << bit:#x}, 0x4B000000, 0xEA;\nmov.b32 q, c;\n"
    f"fma.rn.f32 q, q, {_float(2.0**-bit)}, {_float(-(2.0 ** (23 - bit)))};\n"
    f"sub.rn.f32 q, q, {second};\nmul.rn.f32 {out}, {first}, q;"
    for bit, first, second, out in ((0, "ss", "sz", "s0"), (3, "zs", "zz", "z0"), (6, "ss", "sz", "s1"), (9, "zs", "zz", "z1"))
)

# Scale and zero of rows l and l + 8, exact in fp32 (spec 3), from the words of spec 4.3 and the tile's statistics.
# Outputs $0..$3: scale l, zero l, scale l + 8, zero l + 8.
# Inputs: $4 low word, $5 high word, $6 shift, $7 (ss, sz), $8 (zs, zz).
EXACT_STATISTICS = "{" + _EXACT_STATISTICS + "\nmov.f32 $0, s0;\nmov.f32 $1, z0;\nmov.f32 $2, s1;\nmov.f32 $3, z1;\n}"
EXACT_STATISTICS_CONSTRAINTS = "=&f,=&f,=&f,=&f,r,r,r,r,r"


def half_statistics(bits: int) -> str:
    """PTX: what `dequantize_lane` takes, each rounded once to fp16 from its exact value in fp32.

    Outputs $0..$3: scale l, offset l, scale l + 8, offset l + 8 (half2, equal halves); offset = (middle - z) * scale.
    Inputs as of EXACT_STATISTICS.
    """
    middle = _float(float(2 ** (bits - 1)))
    lines = []
    for scale, zero, first in (("s0", "z0", 0), ("s1", "z1", 2)):
        lines.append(f"sub.rn.f32 {zero}, {middle}, {zero};")
        lines.append(f"mul.rn.f32 {zero}, {zero}, {scale};")
        lines.append(f"cvt.rn.f16x2.f32 ${first}, {scale}, {scale};")
        lines.append(f"cvt.rn.f16x2.f32 ${first + 1}, {zero}, {zero};")
    return "{" + _EXACT_STATISTICS + "\n" + "\n".join(lines) + "\n}"


HALF_STATISTICS_CONSTRAINTS = "=&r,=&r,=&r,=&r,r,r,r,r,r"


# Places of the four 3-bit codes of spec 4.3 in a word once the lowest is at bit 11: scale and zero of row l, of row l + 8.
STATISTICS_PLACES = (11, 14, 17, 20)


def code_under_exponent(place: int) -> str:
    """PTX: the code at bit `place` of $1 as the float 2**(23 - place) + code. $2: the bits of 2**(23 - place)."""
    return f"lop3.b32 $0, $1, {7 << place:#x}, $2, 0xEA;"


# Four fp16 of 8 bytes $4 in fp32.
FOUR_HALVES = """{
.reg .b16 a, b, c, d;
mov.b64 {a, b, c, d}, $4;
cvt.f32.f16 $0, a;
cvt.f32.f16 $1, b;
cvt.f32.f16 $2, c;
cvt.f32.f16 $3, d;
}"""


def constants_in_registers(program: str, first: int) -> tuple[str, tuple[int, ...]]:
    """PTX with its constants of `lop3` and first ones of `fma` in registers from number `first` on, two to a register of the
    latter; and these constants. The assembler would make them anew within the loop, again and again."""
    names: dict[str, str] = {"0x64006400": f"${first}"}
    values = [0x64006400]
    found = list(dict.fromkeys(re.findall(r"mov.b32 a, (0x[0-9a-f]+);", program)))
    lines = []
    for i in range(0, len(found), 2):
        pair = [int(value, 16) & 0xFFFF for value in (found[i], found[min(i + 1, len(found) - 1)])]
        whole = all(int(value, 16) >> 16 == int(value, 16) & 0xFFFF for value in found[i : i + 2])
        if whole:
            lines.append(f".reg .b16 l{i}, h{i}; mov.b32 {{l{i}, h{i}}}, ${first + len(values)};")
            names |= {value: f"{{{half}{i}, {half}{i}}}" for value, half in zip(found[i : i + 2], "lh", strict=False)}
            values.append(pair[0] | pair[1] << 16)
        else:
            for value in found[i : i + 2]:
                names[value] = f"${first + len(values)}"
                values.append(int(value, 16))
    program = re.sub(r"mov.b32 a, (0x[0-9a-f]+);", lambda m: f"mov.b32 a, {names[m[1]]};", program)
    program = program.replace("0x64006400", names["0x64006400"])
    return "{\n" + "\n".join(lines) + program[1:], tuple(value - (value >> 31 << 32) for value in values)
