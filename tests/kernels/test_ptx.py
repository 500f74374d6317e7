"""What a lane of the tensor-core kernels does with its words, computed with `ptx_arithmetic`.

No GPU is needed: the strings are the ones that the kernels compile, and the oracle is numpy's decode of the same matrix.
"""

from __future__ import annotations

import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from spqr_format.packing import SET, to_grid
from spqr_kernels import ptx

sys.path.insert(0, str(Path(__file__).parent))
from ptx_arithmetic import arithmetic, read, write  # beside this file, not part of a package


def as_float(word: np.ndarray) -> np.ndarray:
    return word.astype(np.uint32).view(np.float32)


def halves(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    raw = word.astype(np.uint32)
    return (raw & 0xFFFF).astype(np.uint16).view(np.float16), (raw >> 16).astype(np.uint16).view(np.float16)


def bfloat(value: np.ndarray) -> np.ndarray:
    """fp32 to the 16 bits of bf16, to nearest even."""
    raw = np.asarray(value, np.float32).view(np.uint32).astype(np.uint64)
    return (raw + np.uint64(0x7FFF) + ((raw >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)


def run(program: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Registers after a straight-line program; registers are uint64 arrays of one shape, fp32 ones hold their pattern."""
    shape = np.broadcast_shapes(*(np.shape(value) for value in inputs.values()))
    registers = {name: np.broadcast_to(value, shape).reshape(-1) for name, value in inputs.items()}

    def get(name: str) -> np.ndarray:
        if name not in registers:
            value = int(name[2:], 16) if name.startswith("0f") else int(name, 0) & 0xFFFFFFFF
            return np.full(int(np.prod(shape)), value, np.uint64)
        return registers[name]

    text = re.sub(r"\{\s*(\w+)\s*,\s*(\w+)\s*\}", r"<\1:\2>", program)
    for line in re.split(r"[;{}\n]", text):
        words = line.strip().replace(",", " ").split()
        if not words or words[0].startswith(".reg"):
            continue
        op, target, *names = words
        if op == "mov.b32" and target.startswith("<"):
            low, high = target[1:-1].split(":")
            registers[low], registers[high] = get(names[0]) & np.uint64(0xFFFF), get(names[0]) >> np.uint64(16)
        elif op in ("mov.b32", "mov.f32"):
            registers[target] = get(names[0])
        else:
            made = arithmetic(op)
            assert made is not None, f"no arithmetic for {op}"
            compute, result, kinds = made
            registers[target] = write(compute(*(read(get(n), kind) for n, kind in zip(names, kinds, strict=True))), result)
    return {name: value.reshape(shape) for name, value in registers.items()}


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
