"""PTX of the decode kernel: what a thread does with its registers, one string an idea.

Triton's own operations leave the thread layout of a tensor-core fragment to the compiler. Here it must be exactly that of
`mma.m16n8k16`, because the stored words are already in that order (spec 4.1): lane group l of a warp holds rows l and l + 8.
"""

from __future__ import annotations

from spqr_format.packing import FIELDS, PAIRS, SPREAD


def _magic(bits: int, shift: int) -> tuple[int, int]:
    """Constants (a, b) of half2 fma that brings 1024 + 2**shift * q to q - 2**(bits-1): exact in fp16."""
    # (1024 + 2^shift q) * 2^-shift - (1024 * 2^-shift + middle)
    middle = 2 ** (bits - 1)
    return _half2(2.0**-shift), _half2(-(1024.0 * 2.0**-shift + middle))


def _half2(value: float) -> int:
    import struct

    (raw,) = struct.unpack("<H", struct.pack("<e", value))
    return raw << 16 | raw


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
            if bit == SPREAD:
                # bit k of the code is bit 15 of word k, in either half
                lines += ["shr.u32 e, $16, 15;", "and.b32 e, e, 0x00010001;"]
                lines += ["shr.u32 u, $17, 14;", "lop3.b32 e, u, 0x00020002, e, 0xEA;"]
                lines += ["shr.u32 u, $18, 13;", "lop3.b32 e, u, 0x00040004, e, 0xEA;"]
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


# Scale and offset of rows l and l + 8 from the packed statistics of spec 4.3 and the tile's (ss, sz), (zs, zz).
# Outputs $0..$3: scale l, offset l, scale l + 8, offset l + 8 (half2, equal halves).
# Inputs: $4 low word, $5 high word, $6 shift, $7 (ss, sz), $8 (zs, zz), $9 the half2 of middle.
BILEVEL_STATISTICS = """{
.reg .b32 t, u, sq, zq, ss, sz, zs, zz, s, o, c1, c2, c3;
shf.r.wrap.b32 t, $4, $5, $6;
shl.b32 u, t, 10;
and.b32 u, u, 0x003f0000;
lop3.b32 u, t, 0x0000003f, u, 0xEA;
lop3.b32 sq, u, 0x00070007, 0x64006400, 0xEA;
lop3.b32 zq, u, 0x00380038, 0x64006400, 0xEA;
mov.b32 c1, 0xE400E400;
add.rn.f16x2 sq, sq, c1;
mov.b32 c2, 0x30003000;
mov.b32 c3, 0xD800D800;
fma.rn.f16x2 zq, zq, c2, c3;
prmt.b32 ss, $7, $7, 0x1010;
prmt.b32 sz, $7, $7, 0x3232;
prmt.b32 zs, $8, $8, 0x1010;
prmt.b32 zz, $8, $8, 0x3232;
sub.rn.f16x2 sq, sq, sz;
mul.rn.f16x2 s, sq, ss;
sub.rn.f16x2 zq, zq, zz;
neg.f16x2 zs, zs;
fma.rn.f16x2 o, zq, zs, $9;
mul.rn.f16x2 o, o, s;
prmt.b32 $0, s, s, 0x1010;
prmt.b32 $1, o, o, 0x1010;
prmt.b32 $2, s, s, 0x3232;
prmt.b32 $3, o, o, 0x3232;
}"""
BILEVEL_STATISTICS_CONSTRAINTS = "=&r,=&r,=&r,=&r,r,r,r,r,r,r"

# D = A * B + C, fp32 accumulators. $0..$3 D; $4..$7 A; $8, $9 B; $10..$13 C.
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
MMA_CONSTRAINTS = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"

_LOAD = """{{
.reg .pred p;
setp.ne.b32 p, ${mask}, 0;
{zeros}
@p ld.global.nc{cache}.{vector} {outputs}, [${pointer}];
}}"""


def load(words: int, cache: str = "") -> str:
    """PTX: `words` (1, 2 or 4) 32-bit words at an aligned address, zeros where the mask is 0. Inputs: pointer, mask."""
    outputs = ",".join(f"${k}" for k in range(words))
    return _LOAD.format(
        mask=words + 1, pointer=words, cache=cache, vector="b32" if words == 1 else f"v{words}.b32",
        outputs=outputs if words == 1 else "{" + outputs + "}",
        zeros=" ".join(f"mov.b32 ${k}, 0;" for k in range(words)),
    )  # fmt: skip


def load_constraints(words: int) -> str:
    """Registers of `load`."""
    return ",".join(["=&r"] * words + ["l", "r"])


# Sum of $1 over the four lanes of a quad.
QUAD_SUM = """{
.reg .f32 t, u;
shfl.sync.bfly.b32 t, $1, 1, 31, -1;
add.f32 u, $1, t;
shfl.sync.bfly.b32 t, u, 2, 31, -1;
add.f32 $0, u, t;
}"""
