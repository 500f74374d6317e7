"""What PTX instructions without memory compute, on numpy arrays of one value a thread (for `ptx_machine`).

A register is a uint64; what it holds depends on the type that an instruction reads it as. Floating point is computed in
float64 and rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np


class PtxError(Exception):
    """What a program does and a GPU would not do, or what the machine does not know."""


def size_of(kind: str) -> int:
    """Bits of a PTX type."""
    if kind == "pred":
        return 1
    size, twice = re.findall(r"(\d+)(x2)?$", kind)[0]
    return int(size) * (2 if twice else 1)


def read(raw: np.ndarray, kind: str) -> np.ndarray:
    """uint64 [n] as values of a PTX type: integers of its width, bools, float64; [n, 2] for a pair."""
    if kind in ("pred", "b1"):
        return (raw & np.uint64(1)) > 0
    bits = raw.astype(f"u{size_of(kind) // 8}")
    if kind.endswith("x2"):
        return read(bits.view(np.uint16).astype(np.uint64), kind[:-2]).reshape(-1, 2)
    if kind[0] in "bus" and kind != "bf16":
        return bits.view(f"i{bits.itemsize}") if kind[0] == "s" else bits
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return bits.view(f"f{bits.itemsize}").astype(np.float64)


def write(values: np.ndarray, kind: str) -> np.ndarray:
    """The reverse of `read`: floating point is rounded to nearest even, integers keep their lowest bits."""
    with np.errstate(all="ignore"):
        if kind == "pred":
            return values.astype(np.uint64)
        if kind.endswith("x2"):
            low, high = write(values[:, 0], kind[:-2]), write(values[:, 1], kind[:-2])
            return low | high << np.uint64(16)
        if kind == "bf16":
            single = values.astype(np.float32)
            bits = single.view(np.uint32).astype(np.uint64)
            rounded = (bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
            return np.where(np.isnan(single), np.uint64(0x7FFF), rounded)
        size = size_of(kind) // 8
        if kind[0] == "f":
            return values.astype(f"f{size}").view(f"u{size}").astype(np.uint64)
        return values.astype(f"u{size}").astype(np.uint64)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if (b == 0).any():
        raise PtxError("integer division by 0")
    return a // b + ((a % b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)  # towards 0


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _divide(a, b) * b


def _selected(a: np.ndarray, b: np.ndarray, first: np.ndarray) -> np.ndarray:
    return np.where(first, a, b)


def _shifted(shift: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda a, by: shift(a, np.minimum(by, 64).astype(a.dtype))  # numpy shifts all bits out, as PTX does


def _logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    found = np.zeros_like(a)
    for i in range(8):
        found |= np.where(table >> i & 1, (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c), np.uint32(0))
    return found


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = (both >> (8 * (nibble & 7)).astype(np.uint64)).astype(np.uint8)
        byte = np.where(nibble & 8, (byte.view(np.int8) >> 7).view(np.uint8), byte)  # its sign, eight times
        found |= byte.astype(np.uint32) << np.uint32(8 * i)
    return found


def _field(a: np.ndarray, begin: np.ndarray, length: np.ndarray) -> np.ndarray:
    bits, begin, length = 8 * a.itemsize, begin & 255, length & 255
    if (length == 0).any() or (begin + length > bits).any():
        raise PtxError("bfe of no bits or beyond the word")  # PTX defines these too; no kernel has them
    up = (bits - begin - length).astype(a.dtype)
    return a << up >> (bits - length).astype(a.dtype)


def _funnel(left: bool) -> Callable[..., np.ndarray]:
    def shift(low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
        both, by = high.astype(np.uint64) << np.uint64(32) | low, (by & 31).astype(np.uint64)
        return (both << by) >> np.uint64(32) if left else both >> by

    return shift


def _least_of_magnitude(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    least = np.fmin(abs(a), abs(b))
    return np.where(np.isnan(least), least, np.where(np.signbit(a) ^ np.signbit(b), -least, least))


# By name without type and rounding: the function, and the types of its result and its operands. t: that of the instruction,
# b: as many bits of no type, w: twice as wide.
_OPERATIONS: dict[str, tuple[Callable[..., np.ndarray], str, str]] = {
    "add": (lambda a, b: a + b, "t", "t t"),
    "sub": (lambda a, b: a - b, "t", "t t"),
    "mul": (lambda a, b: a * b, "t", "t t"),
    "fma": (lambda a, b, c: a * b + c, "t", "t t t"),
    "mul.lo": (lambda a, b: a * b, "t", "t t"),
    "mad.lo": (lambda a, b, c: a * b + c, "t", "t t t"),
    "mul.hi": (lambda a, b: _wide(a) * _wide(b) >> 32, "t", "t t"),
    "mul.wide": (lambda a, b: _wide(a) * _wide(b), "w", "t t"),
    "mad.wide": (lambda a, b, c: _wide(a) * _wide(b) + c, "w", "t t w"),
    "div": (_divide, "t", "t t"),
    "rem": (_remainder, "t", "t t"),
    "neg": (lambda a: -a, "t", "t"),
    "abs": (abs, "t", "t"),
    "min": (np.fmin, "t", "t t"),  # what is not NaN
    "max": (np.fmax, "t", "t t"),
    "max.relu": (lambda a, b: np.maximum(np.maximum(a, b), 0), "t", "t t"),
    "min.relu": (lambda a, b: np.maximum(np.minimum(a, b), 0), "t", "t t"),
    "min.xorsign.abs": (_least_of_magnitude, "t", "t t"),
    "and": (lambda a, b: a & b, "t", "t t"),
    "or": (lambda a, b: a | b, "t", "t t"),
    "xor": (lambda a, b: a ^ b, "t", "t t"),
    "not": (lambda a: ~a, "t", "t"),
    "shl": (_shifted(np.left_shift), "t", "t u32"),
    "shr": (_shifted(np.right_shift), "t", "t u32"),
    "shf.l.wrap": (_funnel(True), "t", "t t u32"),
    "shf.r.wrap": (_funnel(False), "t", "t t u32"),
    "lop3": (_logic, "t", "t t t u32"),
    "prmt": (_permute, "t", "t t u32"),
    "bfe": (_field, "t", "t u32 u32"),
    "selp": (_selected, "b", "b b pred"),
    "setp.eq": (np.equal, "pred", "t t"),
    "setp.ne": (np.not_equal, "pred", "t t"),
    "setp.lt": (np.less, "pred", "t t"),
    "setp.le": (np.less_equal, "pred", "t t"),
    "setp.gt": (np.greater, "pred", "t t"),
    "setp.ge": (np.greater_equal, "pred", "t t"),
    "setp.lt.and": (lambda a, b, p: (a < b) & (p != 0), "pred", "t t pred"),
    "setp.ge.and": (lambda a, b, p: (a >= b) & (p != 0), "pred", "t t pred"),
}
_INTEGERS = ("mul.lo", "mad.lo", "mul.hi", "mul.wide", "mad.wide", "div", "rem", "setp.ne")
_OF_32_BITS = ("mul.hi", "shf.l.wrap", "shf.r.wrap", "lop3", "prmt")


def _wide(a: np.ndarray) -> np.ndarray:
    return a.astype(f"{a.dtype.kind}{2 * a.itemsize}")


def arithmetic(name: str) -> tuple[Callable[..., np.ndarray], str, tuple[str, ...]] | None:
    """What an instruction computes, and the types of its result and its operands; None for one that is not known."""
    conversion = re.fullmatch(r"cvt(\.rn)?\.([a-z]+\d+)\.([a-z]+\d+)", name)
    if conversion:
        _, to, source = conversion.groups()
        return None if to[0] in "us" and source[0] not in "us" else (np.asarray, to, (source,))
    if name in ("cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32"):
        return lambda high, low: np.stack([low, high], 1), name.split(".")[2], ("f32", "f32")
    if name == "set.eq.u32.f16x2":
        return lambda a, b: np.where(a == b, 0xFFFF, 0) @ [1, 1 << 16], "u32", ("f16x2", "f16x2")
    stem, _, kind = name.rpartition(".")
    floating = re.fullmatch(r"f32|f64|f16|bf16|f16x2", kind) is not None
    stem = stem.removesuffix(".rn") if floating else stem
    if stem not in _OPERATIONS or not (floating or re.fullmatch(r"[bus](8|16|32|64)|[us]16x2|pred", kind)):
        return None
    if (floating and stem in _INTEGERS) or (stem in _OF_32_BITS and size_of(kind) != 32):
        return None
    compute, result, operands = _OPERATIONS[stem]
    types = {"t": kind, "b": f"b{size_of(kind)}", "w": f"{kind[0]}{2 * size_of(kind)}"}
    return compute, types.get(result, result), tuple(types.get(each, each) for each in operands.split())


def matrix_product(a: Sequence[np.ndarray], b: Sequence[np.ndarray], c: Sequence[np.ndarray]) -> list[np.ndarray]:
    """D of `mma.m16n8k16` of whole warps, from the fragments: four and two pairs [n, 2], four values [n]."""
    lane = np.arange(len(c[0]))
    warp, row, column = lane // 32, lane % 32 // 4, lane % 4 * 2
    warps = len(lane) // 32
    left, right, sums = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
    for i, pair in enumerate(a):
        for j in range(2):
            left[warp, row + 8 * (i % 2), column + 8 * (i // 2) + j] = pair[:, j]
    for i, pair in enumerate(b):
        for j in range(2):
            right[warp, column + 8 * i + j, row] = pair[:, j]
    for i, value in enumerate(c):
        sums[warp, row + 8 * (i // 2), column + i % 2] = value
    with np.errstate(all="ignore"):
        sums += left @ right
    return [sums[warp, row + 8 * (i // 2), column + i % 2] for i in range(4)]


def group_product(a: Sequence[np.ndarray], b: np.ndarray, c: Sequence[np.ndarray]) -> list[np.ndarray]:
    """D of `wgmma.m64nNk16` of a warp group: from the fragments of A, four pairs [128, 2], B [N, 16] and N / 2 values [128]."""
    thread = np.arange(128)
    row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
    left = np.zeros((64, 16))
    for i, pair in enumerate(a):
        for j in range(2):
            left[row + 8 * (i % 2), column + 8 * (i // 2) + j] = pair[:, j]
    with np.errstate(all="ignore"):
        sums = left @ b.T
        return [c[i] + sums[row + 8 * (i % 4 // 2), column + (8 * (i // 4) + i % 2)] for i in range(len(c))]
