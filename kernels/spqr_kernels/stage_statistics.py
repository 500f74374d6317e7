"""Statistics of a chunk's groups for `small_kernel`, which copies them to shared memory by its address.

The first 320 of a warp's STATS_BYTES of a stage are the 48 words of statistics codes of a set (spec 4.3) and the tile
statistics of the chunk's groups. 16 groups are a set and 16 blocks a chunk, so with bilevel groups of 32 and 64 columns a set
covers CHUNKS_A_SET = 2 or 4 chunks and goes along with each of them. Direct statistics are read from global memory, a chunk
ahead.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from spqr_format.layout import ceil_div

from . import ptx
from .ptx import half2
from .ring import SET_BYTES, TOPS_BYTES

# So many that the words behind them begin where 128 bytes do: copies to elsewhere take twice as long in shared memory.
STATS_BYTES = ceil_div(SET_BYTES + TOPS_BYTES, 128) * 128

# Codes $0 .. $3 of groups tid, 4 + tid, 8 + tid, 12 + tid of a set (spec 4.3), by a rotation $6 of 2, or 22 where tid is odd:
# of each sq of row l at bit 2 and zq at bit 5 of the low half, those of row l + 8 at bits 0 and 3 of the high half. The
# lane's words are at $4, 16 gid + 4 (tid / 2) from the set on, its half words at $5, 128 + 8 gid + 2 (tid / 2).
_CODES = gl.constexpr(
    "{ .reg .b32 a, b, c, d; .reg .b16 h, i;\n"
    "ld.shared.b32 a, [$4]; ld.shared.b32 b, [$4+8]; ld.shared.b16 h, [$5]; ld.shared.b16 i, [$5+4];\n"
    "cvt.u32.u16 c, h; cvt.u32.u16 d, i;\n"
    "prmt.b32 c, a, c, 0x6543; prmt.b32 d, b, d, 0x6543;\n"
    + "\n".join(f"shf.l.wrap.b32 {r}, {r}, {r}, $6; prmt.b32 ${k}, {r}, {r}, 0x2110;" for k, r in enumerate("abcd"))
    + "\n}"
)


def _wide_codes(chunks_a_set: int) -> str:
    """PTX: codes $0 .. $3, as `_CODES` has them, of the groups of blocks tid, 4 + tid, 8 + tid, 12 + tid.

    From words at $4 and half words at $5: of the lower eight groups of a set (prmt $6: the word) or of the upper ones (its high
    byte and the half word), two groups in each, the second where the rotation $7 is 22 and no 2. Where $8 is not 0, from a set
    that is not full: the first group's word at $9, the next one $10 further, and bit $11 is the first of its code."""
    step = 16 // chunks_a_set
    pairs = tuple(zip("abcd", "efgh", strict=True))
    if chunks_a_set == 2:
        full = ["ld.shared.v4.b32 {a, b, c, d}, [$4]; ld.shared.v4.b16 {w, x, y, z}, [$5];"]
        for (low, high), half in zip(pairs, "wxyz", strict=True):
            full += [f"cvt.u32.u16 {high}, {half}; prmt.b32 {low}, {low}, {high}, $6; shf.l.wrap.b32 {low}, {low}, {low}, $7;"]
    else:
        full = [
            "ld.shared.v2.b32 {a, c}, [$4]; ld.shared.v2.b16 {w, x}, [$5];",
            "cvt.u32.u16 e, w; prmt.b32 a, a, e, $6; shf.l.wrap.b32 b, a, a, 22; shf.l.wrap.b32 a, a, a, $7;",
            "cvt.u32.u16 g, x; prmt.b32 c, c, g, $6; shf.l.wrap.b32 d, c, c, 22; shf.l.wrap.b32 c, c, c, $7;",
        ]
    apart = ["add.u32 t, $9, $10;"]
    apart += [
        f"ld.shared.b32 {low}, [$9+{step * n}]; ld.shared.b32 {high}, [t+{step * n}];" for n, (low, high) in enumerate(pairs)
    ]
    apart += [f"shf.r.wrap.b32 {low}, {low}, {high}, $11; shf.l.wrap.b32 {low}, {low}, {low}, 2;" for low, high in pairs]
    lines = [
        ".reg .pred p; .reg .b32 a, b, c, d, e, f, g, h, t; .reg .b16 w, x, y, z;",
        "setp.ne.s32 p, $8, 0;", "@p bra APART;", *full, "bra DONE;", "APART:", *apart, "DONE:",
        *(f"prmt.b32 ${n}, {low}, {low}, 0x2110;" for n, low in enumerate("abcd")),
    ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"


def _statistics(bits: int) -> str:
    """PTX: $0 .. $3 as `ptx.half_statistics` has them, from codes $4 as `_CODES` places them and tile statistics at $5: two
    rows at once in fp16, where scales are rounded twice and middle - zero twice, from exact codes."""
    return f"""{{
.reg .b32 t, u, ss, sz, zs, zz, q, z, s, o; .reg .b16 l, h;
ld.shared.v2.b32 {{t, u}}, [$5];
mov.b32 {{l, h}}, t; mov.b32 ss, {{l, l}}; mov.b32 sz, {{h, h}};
mov.b32 {{l, h}}, u; mov.b32 zs, {{l, l}}; mov.b32 zz, {{h, h}};
lop3.b32 q, $4, {7 << 2 | 7 << 16:#x}, 0x64006400, 0xEA;
lop3.b32 z, $4, {7 << 5 | 7 << 19:#x}, 0x64006400, 0xEA;
{{ .reg .b32 a, b; mov.b32 a, {half2(0.25, 1):#x}; mov.b32 b, {half2(-256, -1024):#x}; fma.rn.f16x2 q, q, a, b; }}
{{ .reg .b32 a, b; mov.b32 a, {half2(-1 / 32, -1 / 8):#x}; mov.b32 b, {half2(32, 128):#x}; fma.rn.f16x2 z, z, a, b; }}
sub.rn.f16x2 q, q, sz;
mul.rn.f16x2 s, q, ss;
{{ .reg .b32 m; mov.b32 m, {half2(2 ** (bits - 1), 2 ** (bits - 1)):#x}; fma.rn.f16x2 o, zs, zz, m; }}
fma.rn.f16x2 o, z, zs, o;
mul.rn.f16x2 o, o, s;
mov.b32 {{l, h}}, s; mov.b32 $0, {{l, l}}; mov.b32 $2, {{h, h}};
mov.b32 {{l, h}}, o; mov.b32 $1, {{l, l}}; mov.b32 $3, {{h, h}};
}}"""


_WIDE_CODES = gl.constexpr({chunks: _wide_codes(chunks) for chunks in (2, 4)})
_BILEVEL = {bits: ptx.constants_in_registers(_statistics(bits), 6) for bits in (2, 3, 4)}
_STATISTICS = gl.constexpr({bits: stats[0] for bits, stats in _BILEVEL.items()})
_CONSTANTS = gl.constexpr({bits: stats[1] for bits, stats in _BILEVEL.items()})
_REGISTERS = gl.constexpr({bits: "=&r,=&r,=&r,=&r,r,r" + ",r" * len(stats[1]) for bits, stats in _BILEVEL.items()})


@gluon.jit
def statistics_begin(StatCodes, TileStats, lane):
    """From where a lane copies its 16 bytes of the statistics of a chunk: codes in the first 12 lanes, then tile statistics."""
    return gl.where(lane < 12, StatCodes + lane * 4, TileStats.to(gl.pointer_type(gl.int32)) + (lane * 4 - 48))


@gluon.jit
def statistics_step(lane, CHUNKS_A_SET: gl.constexpr):
    """How many bytes a chunk has of them."""
    return gl.where(lane < 12, 192 // CHUNKS_A_SET, 128 // CHUNKS_A_SET)


@gluon.jit
def statistics_number(asked, chunk, chunks, lane, CHUNKS_A_SET: gl.constexpr):
    """How many such steps further those of a chunk are, `asked` chunks from the first: a set of codes begins where its first
    chunk's would. And whether the lane has any to copy: the last set of a tile has as many words as groups behind the full
    ones."""
    there = lane < 12 + 8 // CHUNKS_A_SET
    number = asked
    if CHUNKS_A_SET > 1:
        behind = chunks % CHUNKS_A_SET
        words = gl.where(chunk < chunks - behind, 48, behind * (48 // CHUNKS_A_SET))
        there = there & ((lane >= 12) | (lane * 4 < words))
        number = gl.where(lane < 12, asked - chunk % CHUNKS_A_SET, asked)
    return number, there


@gluon.jit
def codes_of_chunk(at, lane, chunk, chunks, FIRST: gl.constexpr, CHUNKS_A_SET: gl.constexpr):
    """The lane's four codes of a chunk as `_CODES` has them, and where in shared memory its first tile statistics are. The
    statistics stand FIRST bytes behind the first of `at`, which is the lane's 16 bytes of a stage."""
    gid = lane // 4
    tid = lane % 4
    tops = at + (FIRST + 192 + tid // CHUNKS_A_SET * 8 - lane * 16)
    words = at + (FIRST + gid * 16 - lane * 16)
    halves = at + (FIRST + 128 + gid * 8 - lane * 16)
    if CHUNKS_A_SET == 1:
        codes = gl.inline_asm_elementwise(
            _CODES, "=&r,=&r,=&r,=&r,r,r,r", [words + tid // 2 * 4, halves + tid // 2 * 2, 2 + tid % 2 * 20],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        GROUPS: gl.constexpr = 16 // CHUNKS_A_SET
        part = chunk % CHUNKS_A_SET
        groups = chunks % CHUNKS_A_SET * GROUPS  # behind the last full set
        apart = gl.where(chunk - part == chunks - chunks % CHUNKS_A_SET, 1, 0)
        upper = gl.where(part >= CHUNKS_A_SET // 2, 0x6543, 0x3210)
        rotation = lane * 0 + 2
        group = lane * 0 + part * GROUPS
        if CHUNKS_A_SET == 2:
            rotation = 2 + tid // 2 * 20
            group += tid // 2
        else:
            words += part % 2 * 8
            halves += part % 2 * 4
        word = gid * 12 // 32
        codes = gl.inline_asm_elementwise(
            _WIDE_CODES[CHUNKS_A_SET], "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r",
            [words, halves, lane * 0 + upper, rotation, lane * 0 + apart,
             at + (FIRST - lane * 16) + (word * groups + group) * 4, gl.where(word < 2, groups * 4, 0), gid * 12 % 32],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    return codes, tops


@gluon.jit
def bilevel_constants(zero, BITS: gl.constexpr):
    """Those of `bilevel_statistics` plus zero, of which the compiler does not know that it is 0."""
    found = ()
    for i in gl.static_range(len(_CONSTANTS[BITS])):
        found = found + (zero + _CONSTANTS[BITS][i],)
    return found


@gluon.jit
def bilevel_statistics(codes, tops, slot: gl.constexpr, constants, BITS: gl.constexpr, CHUNKS_A_SET: gl.constexpr):
    """Scale and offset, as half2, of rows l and l + 8 in the group of the lane's block 4 slot + tid."""
    return gl.inline_asm_elementwise(
        _STATISTICS[BITS], _REGISTERS[BITS], (codes, tops + 32 // CHUNKS_A_SET * slot) + constants,
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def group_rows(tile, gid, out_features, groups):
    """Where rows gid and gid + 8 of a tile begin in GroupSc and GroupZp [out, groups]; behind the last row, where it does."""
    row = tile * 16 + gid
    row0 = gl.minimum(row, out_features - 1).to(gl.int64) * groups
    row1 = gl.minimum(row + 8, out_features - 1).to(gl.int64) * groups
    return row0, row1


@gluon.jit
def direct_of_chunk(GroupSc, GroupZp, row0, row1, chunk, groups, tid, BLOCKS_A_GROUP: gl.constexpr):
    """What GroupSc and GroupZp have of a lane's groups of a chunk: scale and zero of row l, of row l + 8, int32. One group for
    all of its blocks, one for two of them or one for each. row0, row1: as `group_rows` has them."""
    PARTS: gl.constexpr = 1 if BLOCKS_A_GROUP % 16 == 0 else 2 if BLOCKS_A_GROUP % 8 == 0 else 4
    found = ()
    for n in gl.static_range(PARTS):
        group = gl.minimum((chunk * 16 + n * (16 // PARTS) + tid) // BLOCKS_A_GROUP, groups - 1)
        found = found + (
            (
                gl.load(GroupSc + (row0 + group)).to(gl.int32), gl.load(GroupZp + (row0 + group)).to(gl.int32),
                gl.load(GroupSc + (row1 + group)).to(gl.int32), gl.load(GroupZp + (row1 + group)).to(gl.int32),
            ),
        )  # fmt: skip
    return found
