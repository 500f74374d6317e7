"""The header of a GGUF file, every length in it checked against the file's size before it is used.

gguf-py's reader trusts what it reads (a file of 192 bytes can keep it busy until memory ends), so it never sees a file:
this reader finds metadata and byte ranges, and of gguf-py only the tables of types and the dequantization are used.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spqr_format.errors import SpqrError

MAX_HEADER_BYTES = 64 * 2**20  # a vocabulary of 500,000 tokens with merges takes about 20 MB
MAX_ENTRIES = 3_000_000  # strings in all arrays together
MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_ALIGNMENT = 65_536
MAX_NAME = 255  # bytes; llama.cpp allows 63
MAX_WEIGHTS = 2**48  # of one tensor
MAX_DIMS = 4
VERSIONS = (2, 3)

# Type -> (id, weights in a block, bytes of a block): all that gguf-py dequantizes. ggml's numbers, which never change;
# tests hold them equal to gguf-py's tables.
TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q2_K": (10, 256, 84), "Q3_K": (11, 256, 110), "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210), "IQ2_XXS": (16, 256, 66), "IQ2_XS": (17, 256, 74),
    "IQ3_XXS": (18, 256, 98), "IQ1_S": (19, 256, 50), "IQ4_NL": (20, 32, 18), "IQ3_S": (21, 256, 110),
    "IQ2_S": (22, 256, 82), "IQ4_XS": (23, 256, 136), "IQ1_M": (29, 256, 56), "TQ1_0": (34, 256, 54),
    "TQ2_0": (35, 256, 66), "MXFP4": (39, 32, 17), "NVFP4": (40, 64, 36),
}  # fmt: skip
_BY_ID = {number: (name, block, size) for name, (number, block, size) in TYPES.items()}
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY, _UINT32 = 7, 8, 9, 4


@dataclass(frozen=True)
class Strings:
    """An array of strings that was walked and not decoded: raw holds length and bytes of each."""

    raw: bytes
    count: int

    def __len__(self) -> int:
        return self.count

    def decode(self) -> list[str]:
        """The strings; bytes that are no UTF-8 become U+FFFD, as llama.cpp's own tools show them."""
        found, at = [], 0
        for _ in range(self.count):
            end = at + 8 + int.from_bytes(self.raw[at : at + 8], "little")
            found.append(self.raw[at + 8 : end].decode("utf-8", "replace"))
            at = end
        return found


@dataclass(frozen=True)
class GgufTensor:
    """type: a name of `TYPES`. shape: slowest dimension first, as in numpy. Its bytes are [begin, end) of the file."""

    type: str
    shape: tuple[int, ...]
    begin: int
    end: int


class GgufFile:
    """Metadata and tensors of a file. metadata: str, int, float, bool, numpy arrays, or `Strings`. E501 for all that is
    malformed, outside the file, overlapping, or of a type that is not read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size
            with open(path, "rb") as file:
                self._data = file.read(min(self.size, MAX_HEADER_BYTES))
        except OSError as error:
            raise SpqrError("E501", str(path), f"cannot be read: {error.strerror}") from None
        self._at = 0
        self._strings = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._read()
        finally:
            del self._data

    def _bad(self, what: str) -> SpqrError:
        return SpqrError("E501", self.path.name, what)

    # Pieces. Every one of them checks its length first.

    def _take(self, count: int, what: str) -> bytes:
        end = self._at + count
        if end > len(self._data):
            whole = len(self._data) == self.size
            limit = f"the file ends at byte {self.size}" if whole else f"the limit of a header is {MAX_HEADER_BYTES} bytes"
            raise self._bad(f"{what}: {count} bytes from byte {self._at} on, but {limit}")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def _u32(self, what: str) -> int:
        return int.from_bytes(self._take(4, what), "little")

    def _u64(self, what: str) -> int:
        return int.from_bytes(self._take(8, what), "little")

    def _name(self, what: str, limit: int) -> str:
        length = self._u64(f"length of {what}")
        if not 1 <= length <= limit:
            raise self._bad(f"{what} has {length} bytes, expected 1 to {limit}")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self._bad(f"{what} is not UTF-8") from None

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._take(self._u64(f"length of {key}"), key).decode("utf-8", "replace")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self._bad(f"{key} has value type {kind}, which does not exist")
        dtype = np.dtype(_SCALARS[kind])
        value = np.frombuffer(self._take(dtype.itemsize, key), dtype)[0].item()
        if kind == _BOOL:
            if value > 1:
                raise self._bad(f"{key} is a truth value of {value}")
            return bool(value)
        return value

    def _array(self, key: str) -> Any:
        kind, count = self._u32(f"type of {key}"), self._u64(f"length of {key}")
        if kind == _ARRAY:
            raise self._bad(f"{key} is an array of arrays")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            return np.frombuffer(self._take(count * dtype.itemsize, f"{key}, {count} elements"), dtype)
        if kind != _STRING:
            raise self._bad(f"{key} is an array of type {kind}, which does not exist")
        self._strings += count
        if self._strings > MAX_ENTRIES:
            raise self._bad(f"{key} has {count} strings, the limit for all arrays together is {MAX_ENTRIES}")
        if 8 * count > len(self._data) - self._at:
            raise self._bad(f"{key} has {count} strings, more than the rest of the file can hold")
        begin = at = self._at
        data, last, length = self._data, len(self._data) - 8, struct.Struct("<Q").unpack_from
        for index in range(count):
            if at > last:
                raise self._bad(f"{key} ends in string {index} of {count}")
            at += 8 + length(data, at)[0]
        self._at = begin
        return Strings(self._take(at - begin, key), count)

    # The file

    def _read(self) -> None:
        if self._take(4, "magic") != b"GGUF":
            raise self._bad("not a GGUF file")
        version = self._u32("version")
        if version & 0xFFFF == 0 and version:
            raise self._bad(f"version {version}: a big-endian file, which is not read")
        if version not in VERSIONS:
            raise self._bad(f"version {version}, read are {VERSIONS}")
        tensors, keys = self._u64("number of tensors"), self._u64("number of keys")
        if tensors > min(MAX_TENSORS, self.size // 32):
            raise self._bad(f"{tensors} tensors in a file of {self.size} bytes")
        if keys > min(MAX_KEYS, self.size // 13):
            raise self._bad(f"{keys} metadata keys in a file of {self.size} bytes")
        for index in range(keys):
            key = self._name(f"metadata key {index}", 65535)
            if key in self.metadata:
                raise self._bad(f"metadata key {_short(key)} stands there twice")
            kind = self._u32(f"type of {_short(key)}")
            if key == "general.alignment" and kind != _UINT32:
                raise self._bad(f"general.alignment has value type {kind}, expected {_UINT32}")
            self.metadata[key] = self._value(kind, _short(key))
        self._read_tensors(tensors)

    def _read_tensors(self, count: int) -> None:
        alignment = self.metadata.get("general.alignment", 32)
        if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._bad(f"alignment {alignment}, expected a power of two up to {MAX_ALIGNMENT}")
        rows: list[tuple[str, str, tuple[int, ...], int, int]] = []
        names: set[str] = set()
        for index in range(count):
            name = self._name(f"name of tensor {index}", MAX_NAME)
            if name in names:
                raise self._bad(f"tensor {name} stands there twice")
            names.add(name)
            rows.append((name, *self._tensor_info(name, alignment)))
        start = -(-self._at // alignment) * alignment
        end = start
        for name, _kind, _shape, offset, nbytes in sorted(rows, key=lambda row: row[3]):
            begin = start + offset
            if begin < end:
                raise self._bad(f"tensor {name} begins at byte {begin}, inside the one before it")
            end = begin + nbytes
            if end > self.size:
                raise self._bad(f"tensor {name} ends at byte {end}, the file at {self.size}")
        for name, kind, shape, offset, nbytes in rows:
            self.tensors[name] = GgufTensor(kind, shape, start + offset, start + offset + nbytes)

    def _tensor_info(self, name: str, alignment: int) -> tuple[str, tuple[int, ...], int, int]:
        dims = self._u32(f"rank of {name}")
        if not 1 <= dims <= MAX_DIMS:
            raise self._bad(f"tensor {name} has {dims} dimensions, expected 1 to {MAX_DIMS}")
        shape = struct.unpack(f"<{dims}Q", self._take(8 * dims, f"shape of {name}"))
        number, offset = self._u32(f"type of {name}"), self._u64(f"offset of {name}")
        if number not in _BY_ID:
            raise self._bad(f"tensor {name} has type {number}, which is not read")
        kind, block, size = _BY_ID[number]
        if not 1 <= math.prod(shape) <= MAX_WEIGHTS:
            raise self._bad(f"tensor {name} has shape {list(shape)}: no weights, or more than {MAX_WEIGHTS}")
        if shape[0] % block:
            raise self._bad(f"tensor {name} has rows of {shape[0]} weights, no multiple of a {kind} block's {block}")
        if offset % alignment:
            raise self._bad(f"tensor {name} has offset {offset}, no multiple of the alignment {alignment}")
        return kind, shape[::-1], offset, math.prod(shape) // block * size


def _short(key: str) -> str:
    return key if len(key) <= 80 else key[:77] + "..."
