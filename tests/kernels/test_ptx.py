"""What a lane of the tensor-core kernels does with its words, run by a small interpreter of the PTX that they use.

No GPU is needed: the strings are the ones that the kernels compile, and the oracle is numpy's decode of the same matrix.
"""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest

from spqr_format.packing import SET, to_grid
from spqr_kernels import ptx

U32 = np.uint64(0xFFFFFFFF)


def as_float(word: np.ndarray) -> np.ndarray:
    return word.astype(np.uint32).view(np.float32)


def as_word(value: np.ndarray) -> np.ndarray:
    return np.asarray(value, np.float32).view(np.uint32).astype(np.uint64)


def halves(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    raw = word.astype(np.uint32)
    return (raw & 0xFFFF).astype(np.uint16).view(np.float16), (raw >> 16).astype(np.uint16).view(np.float16)


def paired(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    raw = [np.asarray(x, np.float16).view(np.uint16).astype(np.uint64) for x in (low, high)]
    return raw[0] | raw[1] << np.uint64(16)


def bfloat(value: np.ndarray) -> np.ndarray:
    """fp32 to the 16 bits of bf16, to nearest even."""
    raw = np.asarray(value, np.float32).view(np.uint32).astype(np.uint64)
    return (raw + np.uint64(0x7FFF) + ((raw >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)


def run(program: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Registers after a straight-line program; registers are uint64 arrays that hold 32 bits (fp32 ones their pattern)."""
    registers = dict(inputs)

    def get(name: str) -> np.ndarray:
        if name.startswith("0f"):
            return np.uint64(int(name[2:], 16))
        if re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", name) and name not in registers:
            return np.uint64(int(name, 0) & 0xFFFFFFFF)
        return registers[name]

    def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, dtype: type) -> np.ndarray:
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(dtype)

    text = re.sub(r"\{\s*(\w+)\s*,\s*(\w+)\s*\}", r"<\1:\2>", program)
    for line in re.split(r"[;{}\n]", text):
        words = line.strip().replace(",", " ").split()
        if not words or words[0].startswith(".reg"):
            continue
        op, target, *names = words
        if op == "mov.b32" and target.startswith("<"):
            low, high = target[1:-1].split(":")
            value = get(names[0])
            registers[low], registers[high] = value & np.uint64(0xFFFF), value >> np.uint64(16)
            continue
        a, *rest = [get(name) for name in names]
        b = rest[0] if rest else a
        c = rest[1] if len(rest) > 1 else a
        if op in ("mov.b32", "mov.f32"):
            result = a
        elif op == "and.b32":
            result = a & b
        elif op == "shr.u32":
            result = a >> b
        elif op == "mad.lo.u32":
            result = (a * b + c) & U32
        elif op == "lop3.b32":
            assert names[3] == "0xEA"
            result = (a & b) | c
        elif op == "shf.r.wrap.b32":
            result = ((a | b << np.uint64(32)) >> (c & np.uint64(31))) & U32
        elif op == "cvt.f32.f16":
            result = as_word(a.astype(np.uint16).view(np.float16).astype(np.float32))
        elif op == "cvt.rn.f16x2.f32":
            result = paired(as_float(b).astype(np.float16), as_float(a).astype(np.float16))
        elif op == "cvt.rn.bf16x2.f32":
            result = bfloat(as_float(b)) | bfloat(as_float(a)) << np.uint64(16)
        elif op == "fma.rn.f32":
            result = as_word(fma(as_float(a), as_float(b), as_float(c), np.float32))
        elif op == "sub.rn.f32":
            result = as_word(as_float(a) - as_float(b))
        elif op == "mul.rn.f32":
            result = as_word(as_float(a) * as_float(b))
        elif op == "fma.rn.f16x2":
            parts = [halves(np.broadcast_to(x, np.shape(a))) for x in (a, b, c)]
            result = paired(*(fma(*(part[h] for part in parts), np.float16) for h in range(2)))
        else:
            raise AssertionError(f"the interpreter does not know {op}")
        registers[target] = np.asarray(result, np.uint64)
    return registers


def lanes_of(matrix):
    """Words [tile, word, lane, block] of a packed matrix, as uint64."""
    return to_grid(matrix.pack()["weight"], matrix.layout.weight_bits).view(np.uint32).astype(np.uint64)


def statistics_of(matrix, program: str, lane: int) -> list[np.ndarray]:
    """With fewer groups than a set has, so that a group's three words hold 12 bits a lane one after the other (spec 4.3)."""
    layout, tensors = matrix.layout, matrix.pack()
    assert layout.groups < SET
    codes = tensors["stat_codes"].view(np.uint32).astype(np.uint64).reshape(layout.tile_rows, 3, layout.groups)
    stats = tensors["tile_stats"].view(np.uint16).astype(np.uint64).reshape(layout.tile_rows, layout.groups, 4)
    first, second = stats[..., 0] | stats[..., 1] << np.uint64(16), stats[..., 2] | stats[..., 3] << np.uint64(16)
    word, shift = divmod(12 * lane, 32)
    inputs = {"$4": codes[:, word], "$5": codes[:, min(word + 1, 2)], "$6": np.uint64(shift), "$7": first, "$8": second}
    registers = run(program, inputs)
    return [registers[f"${k}"] for k in range(4)]


@pytest.mark.parametrize("lane", range(8))
def test_exact_statistics_are_those_of_the_spec(random_matrix, lane):
    matrix = random_matrix(48, 160, outliers=0)
    found = statistics_of(matrix, ptx.EXACT_STATISTICS, lane)
    stats = matrix.tile_stats.astype(np.float32)
    for half in range(2):
        rows = slice(lane + 8 * half, None, 16)
        scale = stats[..., 0] * (matrix.scale_codes[rows].astype(np.float32) - stats[..., 1])
        zero = stats[..., 2] * (matrix.zero_codes[rows].astype(np.float32) - stats[..., 3])
        np.testing.assert_array_equal(as_float(found[2 * half]), scale)
        np.testing.assert_array_equal(as_float(found[2 * half + 1]), zero)


def blocks_of(dense: np.ndarray, layout, lane: int, half: int, pair: int, parity: int) -> np.ndarray:
    """Values [tile, block] of one element of every column block."""
    return dense[lane + 8 * half :: 16, 2 * pair + parity :: 16]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp16", "bf16"])
def test_decode_lane_rounds_the_exact_weight_once(random_matrix, bits, bf16):
    matrix = random_matrix(32, 96, weight_bits=bits, outliers=0)
    words = lanes_of(matrix)
    dense = matrix.dequantize()
    for lane in range(8):
        inputs = {f"${16 + k}": words[:, k, lane] for k in range(bits)}
        inputs |= {f"${16 + bits + k}": value for k, value in enumerate(statistics_of(matrix, ptx.EXACT_STATISTICS, lane))}
        registers = run(ptx.decode_lane(bits, bf16), inputs)
        for half in range(2):
            for pair in range(8):
                for parity in range(2):
                    exact = blocks_of(dense, matrix.layout, lane, half, pair, parity)
                    expected = bfloat(exact) if bf16 else exact.astype(np.float16).view(np.uint16)
                    found = (registers[f"${8 * half + pair}"] >> np.uint64(16 * parity)) & np.uint64(0xFFFF)
                    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dequantize_lane_errs_by_fp16_rounding_only(random_matrix, bits):
    matrix = random_matrix(64, 240, weight_bits=bits, outliers=0)
    words = lanes_of(matrix)
    dense = matrix.dequantize()
    error = total = 0.0
    for lane in range(8):
        inputs = {f"${16 + k}": words[:, k, lane] for k in range(bits)}
        statistics = statistics_of(matrix, ptx.half_statistics(bits), lane)
        inputs |= {f"${16 + bits + k}": value for k, value in enumerate(statistics)}
        registers = run(ptx.dequantize_lane(bits), inputs)
        for half in range(2):
            for pair in range(8):
                for parity, found in enumerate(halves(registers[f"${8 * half + pair}"])):
                    exact = blocks_of(dense, matrix.layout, lane, half, pair, parity)
                    error += float(((found.astype(np.float64) - exact) ** 2).sum())
                    total += float((exact.astype(np.float64) ** 2).sum())
    assert (error / total) ** 0.5 < 4e-4


def test_the_interpreter_can_fail(random_matrix):
    """A wrong constant in the program is seen."""
    matrix = random_matrix(16, 16, outliers=0)
    good = statistics_of(matrix, ptx.EXACT_STATISTICS, 3)
    broken = ptx.EXACT_STATISTICS.replace(f"0f{struct.unpack('<I', struct.pack('<f', 0.125))[0]:08X}", "0f3F800000")
    assert broken != ptx.EXACT_STATISTICS
    assert any((a != b).any() for a, b in zip(good, statistics_of(matrix, broken, 3), strict=True))
