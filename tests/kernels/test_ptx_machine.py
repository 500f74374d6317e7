"""The machine that runs PTX, against numpy and against programs that are wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from ptx_arithmetic import PtxError, arithmetic, read, write  # beside this file, not part of a package
from ptx_machine import Program, run_cluster
from ptx_memory import Memory
from ptx_text import Kernel

HEAD = """
.visible .entry f(
    .param .u64 f_param_0,
    .param .u64 f_param_1,
    .param .u32 f_param_2
)
.reqntid {threads}
{{
.reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<20>; .reg .b64 %rd<8>; .reg .f32 %f<20>;
ld.param.b64 %rd0, [f_param_0];
ld.param.b64 %rd1, [f_param_1];
mov.u32 %r0, %tid.x;
mad.wide.u32 %rd2, %r0, 4, %rd0;
mad.wide.u32 %rd3, %r0, 4, %rd1;
"""
SHARED = "{ .shared .align 16 .b8 room[512]; mov.u32 %r8, room; } shl.b32 %r9, %r0, 2; add.s32 %r9, %r9, %r8;\n"


def outcome(body, given=None, threads=64, late=True, dtype=np.uint32):
    """What threads wrote to [%rd3], their 4 bytes each; they find `given` at [%rd2]. Both end behind the last thread's."""
    memory = Memory()
    source = memory.add(np.arange(threads, dtype=np.uint32) if given is None else given)
    target = memory.add(np.zeros(threads, dtype), writable=True)
    kernel = Kernel(HEAD.format(threads=threads) + body + "\nret;\n}")
    Program(kernel, memory, [source, target, 7], late=late).run()
    return memory.array(target)


words = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))


def one(name, *operands):
    """Of an instruction of 32-bit operands on one thread."""
    made = arithmetic(name)
    assert made is not None, name
    compute, result, kinds = made
    raw = [np.array([operand], np.uint64) for operand in operands]
    with np.errstate(all="ignore"):
        return int(write(compute(*(read(r, kind) for r, kind in zip(raw, kinds, strict=True))), result)[0])


def signed(word, bits=32):
    return (word & (1 << bits) - 1) - ((word >> bits - 1 & 1) << bits)


@given(words, words, words)
@example(2**31, 2**32 - 1, 5)
def test_integers(a, b, c):
    most = 2**32
    assert one("add.s32", a, b) == one("add.u32", a, b) == (a + b) % most
    assert one("sub.s32", a, b) == (a - b) % most
    assert one("mad.lo.s32", a, b, c) == (a * b + c) % most
    assert one("mul.hi.s32", a, b) == (signed(a) * signed(b) >> 32) % most
    assert one("mul.hi.u32", a, b) == a * b >> 32
    assert one("mul.wide.s32", a, b) == signed(a) * signed(b) % 2**64
    assert one("mad.wide.u32", a, b, c) == (a * b + c) % 2**64
    assert one("mul.wide.s16", a, b) == signed(a, 16) * signed(b, 16) % most
    assert one("min.s32", a, b) == min(signed(a), signed(b)) % most
    assert one("max.u32", a, b) == max(a, b)
    assert one("setp.lt.s32", a, b) == (signed(a) < signed(b))
    assert one("setp.gt.u32", a, b) == (a > b)
    assert one("setp.lt.u16", a, b) == (a % 2**16 < b % 2**16)
    assert one("neg.s32", a) == -a % most
    assert one("cvt.s32.s8", a) == signed(a, 8) % most
    assert one("cvt.s64.s32", a) == signed(a) % 2**64
    assert one("cvt.u32.u16", a) == a % 2**16
    assert one("add.s16x2", a, b) == (a + b) % 2**16 + ((a >> 16) + (b >> 16)) % 2**16 * 2**16
    assert one("selp.b32", a, b, c) == (a if c & 1 else b)
    if b and (a, b) != (2**31, most - 1):
        assert one("div.s32", a, b) == int(abs(signed(a)) // abs(signed(b)) * (-1) ** (signed(a) * signed(b) < 0)) % most
        assert signed(one("rem.s32", a, b)) == signed(a) - signed(one("div.s32", a, b)) * signed(b)


@given(words, words, words, st.integers(0, 255))
@example(0x80000000, 0, 40, 0x80)
def test_bits(a, b, c, table):
    bits = [[word >> i & 1 for i in range(32)] for word in (a, b, c)]
    expected = sum((table >> (4 * x + 2 * y + z) & 1) << i for i, (x, y, z) in enumerate(zip(*bits, strict=True)))
    assert one("lop3.b32", a, b, c, table) == expected
    both, by = b << 32 | a, c % 32
    assert one("shf.r.wrap.b32", a, b, c) == (both >> by) % 2**32
    assert one("shf.l.wrap.b32", a, b, c) == (both << by >> 32) % 2**32
    few = c % 70
    assert one("shl.b32", a, few) == (a << few) % 2**32
    assert one("shr.u32", a, few) == a >> few
    assert one("shr.s32", a, few) == (signed(a) >> few) % 2**32
    assert one("shr.s16", a, few) == (signed(a, 16) >> few) % 2**16
    begin, length = c % 32, 1 + table % (32 - c % 32)
    assert one("bfe.u32", a, begin, length) == a >> begin & (1 << length) - 1
    assert one("bfe.s32", a, begin, length) == signed(a >> begin, length) % 2**32
    assert one("bfe.u64", both, begin + by, length) == both >> begin + by & (1 << length) - 1
    assert one("bfe.s64", both, begin + by, length) == signed(both >> begin + by, length) % 2**64
    chosen = b & 0x7777
    raw = (b << 32 | a).to_bytes(8, "little")
    assert one("prmt.b32", a, b, chosen) == int.from_bytes([raw[chosen >> 4 * i & 7] for i in range(4)], "little")
    assert one("prmt.b32", a, b, 0x8888) == 0xFFFFFFFF * (a >> 7 & 1)


halves = st.floats(width=16)
singles = st.floats(width=32)


def half(value):
    return int(np.float16(value).view(np.uint16))


def single(value):
    return int(np.float32(value).view(np.uint32))


def same(word, expected):
    """The word of a float, of which any NaN is one."""
    bits = np.asarray(expected).itemsize * 8
    value = np.array([word], f"u{bits // 8}").view(f"f{bits // 8}")
    np.testing.assert_array_equal(value, np.asarray([expected]))
    return True


@given(halves, halves, halves, singles, singles)
def test_floating_point(a, b, c, p, q):
    with np.errstate(all="ignore"):
        pair = half(a) | half(b) << 16
        for name, expected in (
            ("mul.rn.f16x2", (np.float16(a) * np.float16(c), np.float16(b) * np.float16(a))),
            ("add.rn.f16x2", (np.float16(a) + np.float16(c), np.float16(b) + np.float16(a))),
        ):
            word = one(name, pair, half(c) | half(a) << 16)
            assert same(word & 0xFFFF, expected[0])
            assert same(word >> 16, expected[1])
        word = one("abs.f16x2", pair)
        assert same(word & 0xFFFF, abs(np.float16(a)))
        assert same(word >> 16, abs(np.float16(b)))
        assert one("setp.gt.f16", half(a), half(b)) == (a > b)
        fused = one("fma.rn.f16x2", half(a), half(b), half(c))
        assert same(fused & 0xFFFF, np.float16(np.longdouble(a) * np.longdouble(b) + np.longdouble(c)))
        assert same(one("add.f32", single(p), single(q)), np.float32(p) + np.float32(q))
        assert same(one("mul.f32", single(p), single(q)), np.float32(p) * np.float32(q))
        assert same(one("sub.rn.f32", single(p), single(q)), np.float32(p) - np.float32(q))
        assert same(one("cvt.f32.f16", half(a)), np.float32(np.float16(a)))
        assert same(one("cvt.rn.f16.f32", single(p)), np.float32(p).astype(np.float16))
        word = one("cvt.rn.f16x2.f32", single(p), single(q))  # the first operand is the upper half
        assert same(word >> 16, np.float32(p).astype(np.float16))
        assert same(word & 0xFFFF, np.float32(q).astype(np.float16))
        assert one("set.eq.u32.f16x2", pair, half(a) | half(c) << 16) == 0xFFFF * (a == a) + 0xFFFF0000 * (b == c)
        assert one("setp.lt.f32", single(p), single(q)) == (p < q)


@given(singles)
def test_bfloat16(p):
    rounded = torch.tensor([p], dtype=torch.float32).to(torch.bfloat16)
    word = one("cvt.rn.bf16.f32", single(p))
    assert same(one("cvt.f32.bf16", word), rounded.float().numpy()[0])


def test_nan_of_one_side_and_signs():
    word = one("min.xorsign.abs.f16x2", half(-2.0) | half(float("nan")) << 16, half(3.0) | half(-4.0) << 16)
    assert same(word & 0xFFFF, np.float16(-2.0))
    assert abs(np.array([word >> 16], np.uint16).view(np.float16)[0]) == 4


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_product_of_fragments(kind):
    """Laid out as in the section "Matrix Fragments for mma.m16n8k16" of NVIDIA's PTX ISA."""
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(-8, 8, (16, 16)), rng.integers(-8, 8, (16, 8)), rng.integers(-8, 8, (16, 8)).astype(np.float32)

    def raw(value):
        return half(value) if kind == "f16" else single(value) >> 16

    given = np.zeros((10, 32), np.uint32)
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        for i in range(8):  # a_i of a lane
            row, column = group + 8 * (i // 2 % 2), thread * 2 + i % 2 + 8 * (i >= 4)
            given[i // 2, lane] |= raw(a[row, column]) << 16 * (i % 2)
        for i in range(4):
            given[4 + i // 2, lane] |= raw(b[thread * 2 + i % 2 + 8 * (i >= 2), group]) << 16 * (i % 2)
            given[6 + i, lane] = single(c[group + 8 * (i // 2), thread * 2 + i % 2])
    load = "".join(f"ld.global.b32 %r{2 + i}, [%rd2+{128 * i}];\n" for i in range(10))
    product = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
    product += "{%r12,%r13,%r14,%r15}, {%r2,%r3,%r4,%r5}, {%r6,%r7}, {%r8,%r9,%r10,%r11};\n"
    for i in range(4):
        y = outcome(load + product + f"st.global.b32 [%rd3], %r{12 + i};", given, 32, dtype=np.float32)
        expected = [(a @ b + c)[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] for lane in range(32)]
        np.testing.assert_array_equal(y, expected)


def test_threads_of_a_warp_that_part_meet_again():
    body = """
    mov.b32 %r1, 0;
    and.b32 %r2, %r0, 7;
    AGAIN:
    setp.eq.s32 %p0, %r2, 0;
    @%p0 bra OUT;
    add.s32 %r1, %r1, %r2;
    sub.s32 %r2, %r2, 1;
    { MORE: setp.gt.s32 %p1, %r2, 100; @!%p1 bra OUT; bra MORE; OUT: }
    bra.uni AGAIN;
    OUT:
    shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
    st.global.b32 [%rd3], %r3;
    """
    sums = np.array([n * (n + 1) // 2 for n in range(8)] * 8)
    np.testing.assert_array_equal(outcome(body), sums[np.arange(64) ^ 1])


def test_words_and_their_parts():
    body = """
    mov.b32 {%h0, %h1}, %r0;
    mov.b32 %r1, {%h1, %h0};
    ld.param.b32 %r2, [f_param_2];
    { .reg .b32 %r1; mov.b32 %r1, 5; add.s32 %r2, %r2, %r1; }
    add.s32 %r1, %r1, %r2;
    st.global.b32 [%rd3], %r1;
    """
    np.testing.assert_array_equal(outcome(body), (np.arange(64) << 16) + 12)


def test_a_stored_matrix():
    body = """
    { .shared .align 16 .b8 place[1024]; mov.u32 %r8, place; }
    xor.b32 %r9, %r0, 7; mad.lo.s32 %r9, %r9, 16, %r8;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r9], {%r0};
    bar.sync 0;
    mad.lo.s32 %r4, %r0, 4, %r8; shr.u32 %r5, %r0, 5; mad.lo.s32 %r4, %r5, 384, %r4;
    ld.shared.b32 %r3, [%r4]; st.global.b32 [%rd3], %r3;
    """  # rows of 16 bytes in reverse; a warp's are 512 bytes behind those of the one before
    rows = np.arange(64).reshape(2, 8, 4)[:, ::-1]
    np.testing.assert_array_equal(outcome(body), rows.reshape(-1))


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_loaded_and_turned_matrix(number):
    """Lane l has elements [2 (l % 4)] and [2 (l % 4) + 1] of column l / 4, of 8 x 8 of 16 bits (PTX ISA, `ldmatrix`)."""
    given = np.random.default_rng(0).integers(0, 2**32, (2, 64), dtype=np.uint32)  # what a thread puts there
    into = ", ".join(f"%r{10 + i}" for i in range(number))
    body = """
    { .shared .align 16 .b8 place[1024]; mov.u32 %r8, place; }
    mad.lo.s32 %r9, %r0, 16, %r8; ld.global.b32 %r1, [%rd2]; ld.global.b32 %r2, [%rd2+256];
    st.shared.b32 [%r9], %r1; st.shared.b32 [%r9+4], %r2; st.shared.b32 [%r9+8], %r2; st.shared.b32 [%r9+12], %r1; bar.sync 0;
    """
    body += f"ldmatrix.sync.aligned.m8n8.x{number}.trans.shared.b16 {{{into}}}, [%r9]; st.global.b32 [%rd3], %r{9 + number};"
    rows = np.stack([given[0], given[1], given[1], given[0]], 1).view(np.uint16).reshape(2, 4, 8, 8)[:, number - 1]
    expected = rows.transpose(0, 2, 1).copy().view(np.uint32).reshape(-1)
    np.testing.assert_array_equal(outcome(body, given), expected)


def test_largest_of_a_warp():
    given = np.random.default_rng(0).integers(0, 2**32, 64, dtype=np.uint32)
    body = "ld.global.b32 %r1, [%rd2]; redux.sync.{0} %r2, %r1, -1; st.global.b32 [%rd3], %r2;"
    for name, found in (("max.u32", given.reshape(2, 32).max(1)), ("min.s32", given.view(np.int32).reshape(2, 32).min(1))):
        np.testing.assert_array_equal(outcome(body.replace("{0}", name), given).view(found.dtype), np.repeat(found, 32))


def test_any_of_a_warp():
    body = """
    ld.global.b32 %r1, [%rd2]; setp.gt.u32 %p0, %r1, 9; vote.sync.any.pred %p1, %p0, -1; selp.b32 %r2, 1, 0, %p1;
    st.global.b32 [%rd3], %r2;
    """
    for large, expected in (((), (0, 0)), ((40,), (0, 1)), ((0, 31, 63), (1, 1))):
        given = np.full(64, 9, np.uint32)
        given[list(large)] = 10
        np.testing.assert_array_equal(outcome(body, given), np.repeat(expected, 32))


COPY = SHARED + "cp.async.ca.shared.global [%r9], [%rd2], 4{0}; cp.async.commit_group;\n"
READ = "ld.shared.b32 %r3, [%r9]; st.global.b32 [%rd3], %r3;"


@pytest.mark.parametrize("late", [True, False])
def test_copies_arrive(late):
    np.testing.assert_array_equal(outcome(COPY.replace("{0}", "") + "cp.async.wait_group 0;" + READ, late=late), np.arange(64))
    none = "setp.lt.u32 %p0, %r0, 9; selp.b32 %r5, 0, 4, %p0;" + COPY.replace("{0}", ", %r5") + "cp.async.wait_all;" + READ
    np.testing.assert_array_equal(outcome(none, late=late), np.arange(64) * (np.arange(64) >= 9))
    none = none.replace(", %r5;", ", %p0;")
    np.testing.assert_array_equal(outcome(none, late=late), np.arange(64) * (np.arange(64) >= 9))


def test_a_copy_for_which_nobody_waits_may_come_late():
    for wait in ("", "cp.async.wait_group 1;"):
        body = COPY.replace("{0}", "") + wait + READ
        assert (outcome(body, late=True) == 2**32 - 1).all()
        np.testing.assert_array_equal(outcome(body, late=False), np.arange(64))


NEIGHBOUR = (
    "xor.b32 %r4, %r0, {0}; shl.b32 %r4, %r4, 2; add.s32 %r4, %r4, %r8; ld.shared.b32 %r3, [%r4]; st.global.b32 [%rd3], %r3;"
)


@pytest.mark.parametrize(("distance", "barrier"), [(1, "bar.warp.sync -1;"), (1, "bar.sync 0;"), (32, "bar.sync 0;")])
def test_what_another_thread_wrote(distance, barrier):
    """Needs a barrier: of the warp within it, of all between warps; so does writing what another has read."""
    put, get = SHARED + "st.shared.b32 [%r9], %r0;", NEIGHBOUR.replace("{0}", str(distance))
    np.testing.assert_array_equal(outcome(put + barrier + get), np.arange(64) ^ distance)
    again = "st.shared.b32 [%r9], %r3;"
    outcome(put + barrier + get + barrier + again)
    weaker = "bar.warp.sync -1;" if distance == 32 else ""
    for wrong in (put + weaker + get, put + barrier + get + weaker + again):
        with pytest.raises(PtxError, match="no barrier"):
            outcome(wrong)


MEET = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
# The other program's rank in %r5; the place of the thread's word in its memory in %r6.
OTHER = SHARED + "mov.u32 %r4, %ctaid.x; xor.b32 %r5, %r4, 1; mapa.shared::cluster.u32 %r6, %r9, %r5;"
SEND = "mov.b32 %f0, %r0; st.shared::cluster.f32 [%r6], %f0;"
KEEP = "ld.shared.b32 %r3, [%r9]; st.global.b32 [%rd3], %r3;"


def outcome_of_two(body):
    """What the threads of the last program of a cluster of two wrote to [%rd3]."""
    memory = Memory()
    given, target = memory.add(np.arange(64, dtype=np.uint32)), memory.add(np.zeros(64, np.uint32), writable=True)
    kernel = Kernel(HEAD.format(threads=64) + body + "\nret;\n}")
    run_cluster([Program(kernel, memory, [given, target, 7], (rank, 0, 0), (2, 1, 1)) for rank in range(2)])
    return memory.array(target)


def test_programs_of_a_cluster_reach_each_others_memory():
    """Once all have met: behind what they do themselves, and before they look."""
    np.testing.assert_array_equal(outcome_of_two(OTHER + SEND + MEET + KEEP), np.arange(64))
    more = "ld.shared::cluster.f32 %f1, [%r6]; mov.b32 %r7, %f1; add.u32 %r7, %r7, 5; mov.b32 %f1, %r7;"
    more += "st.shared::cluster.f32 [%r6], %f1;"
    np.testing.assert_array_equal(outcome_of_two(OTHER + SEND + more + MEET + KEEP), np.arange(64) + 5)
    own = "st.shared.b32 [%r9], %r0;"
    np.testing.assert_array_equal(outcome_of_two(OTHER + own + MEET + SEND + MEET + KEEP), np.arange(64))
    for wrong in (SEND + KEEP, own + SEND + MEET, SEND + "bar.sync 0;" + KEEP, SEND + SEND.replace("%r6", "%r6+4") + MEET):
        with pytest.raises(PtxError, match="no meeting"):
            outcome_of_two(OTHER + wrong)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("setp.eq.u32 %p0, %r4, 1; @%p0 bra OUT; " + MEET + " OUT:", "has ended"),
        ("setp.lt.u32 %p0, %r0, 32; @%p0 bra OUT; " + MEET + " OUT:", "not all threads"),
        ("mov.u32 %r5, 2; mapa.shared::cluster.u32 %r6, %r9, %r5;", "no program 2"),
        ("st.shared::cluster.f32 [%r9], %f0;", "no program of the cluster"),
    ],
)
def test_what_is_wrong_in_a_cluster_is_an_error(body, why):
    with pytest.raises(PtxError, match=why):
        outcome_of_two(OTHER + body)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("ld.global.b32 %r1, [%rd2+4];", "outside"),
        ("ld.global.b32 %r1, [%rd2+-4];", "outside"),
        ("ld.global.v2.b32 {%r1, %r2}, [%rd2];", "aligned"),
        ("st.global.b32 [%rd2], %r0;", "only read"),
        ("ld.global.b32 %r1, [%rd5];", "aligned|outside"),
        (SHARED + "ld.shared.b32 %r1, [%r9+256]; ld.shared.b32 %r1, [%r9+512];", "outside"),
        (SHARED + "st.shared.b32 [%r8], %r0;", "not the same"),
        (COPY.replace("{0}", "").replace("], 4;", "], 8;"), "aligned"),
        ("sqrt.rn.f32 %f0, %f1;", "unknown instruction sqrt.rn.f32"),
        ("add.sat.s32 %r1, %r0, %r0;", "unknown instruction add.sat.s32"),
        ("ld.volatile.global.b32 %r1, [%rd2];", "unknown instruction ld.volatile.global.b32"),
        ("setp.lt.u32 %p0, %r0, 3; @%p0 bra OUT; bar.warp.sync -1; OUT:", "not all threads"),
        ("AGAIN: bra AGAIN;", "no end"),
        ("add.s32 %r1, %r0, %q;", "unknown name %q"),
        ("mul.rn.f32 %f0, %f0, 0.5;", "no number"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_an_error(body, why, monkeypatch):
    monkeypatch.setattr("ptx_machine.MOST_STEPS", 1000)
    with pytest.raises(PtxError, match=why):
        outcome(body)
