"""The header of one safetensors file: read, checked and bounded before a byte of its tensors is touched (spec 6)."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import SpqrError

# Limits of the format (spec 11). Every one is a number, so that a reader can reserve memory from the header alone.
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
MAX_NAME_BYTES = 512
MAX_RANK = 8
MAX_TENSOR_ELEMENTS = 2**40
MAX_SHARDS = 99_999
MAX_JSON_BYTES = 100_000_000  # config.json and the index

# Bytes of one element of every dtype that a file of this format may hold (spec 6.2).
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive (torch.save)", b"\x80\x02": "a pickle", b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle", b"\x80\x05": "a pickle", b"GGUF": "a GGUF file", b"\x89HDF": "an HDF5 file",
    b"PAR1": "a Parquet file",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its safetensors dtype, its shape and its bytes [begin, end) in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A safetensors header that passed every rule E001 .. E007, in file order."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    file_size: int
    raw: bytes = field(default=b"", repr=False, compare=False)  # the N bytes of JSON, padding included


def read_header(path: str | os.PathLike[str]) -> Header:
    """The checked header of the file at `path`; reads 8 + N bytes of it and no more."""
    path = Path(path)
    with open(path, "rb", buffering=0) as file:
        return read_header_of(file.fileno(), path)


def read_header_of(descriptor: int, path: Path) -> Header:
    """The checked header of an open file. `path` is only a name for errors."""
    where, size = path.name, os.fstat(descriptor).st_size
    head = os.pread(descriptor, 8, 0)
    if len(head) < 8:
        raise SpqrError("E001", where, f"{len(head)} bytes, expected at least the 8 bytes of the header length")
    length = int.from_bytes(head, "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        for magic, kind in OTHER_KINDS.items():
            if head.startswith(magic):
                raise SpqrError("E007", where, f"this is {kind}")
        raise SpqrError("E002", where, f"header length {length}, expected 2 .. {MAX_HEADER_BYTES}")
    if 8 + length > size:
        raise SpqrError("E001", where, f"{size} bytes, the header alone needs {8 + length}")
    raw = pread_exactly(descriptor, length, 8, where)
    tensors, metadata = _parse(raw, where)
    _check_ranges(tensors, size - 8 - length, where)
    return Header(path, tensors, metadata, 8 + length, size, raw)


def pread_exactly(descriptor: int, count: int, offset: int, where: str) -> bytes:
    """`count` bytes at `offset`. A file that became shorter after its size was checked raises E001, never a signal."""
    parts: list[bytes] = []
    while count:
        part = os.pread(descriptor, min(count, 2**30), offset)
        if not part:
            raise SpqrError("E001", where, f"the file ends at {offset}, {count} bytes early: it was cut while it was read")
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def strict_json(text: str | bytes) -> Any:
    """JSON without duplicate keys, NaN, Infinity, lone surrogates and numbers of absurd length. Raises ValueError."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_short_int)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate cannot be encoded
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {short(key)} stands twice")
            seen.add(key)
    return result


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _short_int(text: str) -> int:
    if len(text) > 20 or text == "-0":
        raise ValueError(f"the number {short(text)}")
    return int(text)


def short(value: object, limit: int = 80) -> str:
    """repr, cut to `limit` characters: a hostile file decides how long its values are, an error message must not."""
    text = repr(value[: limit + 1] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _parse(raw: bytes, where: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if not raw.startswith(b"{"):
        raise SpqrError("E003", where, f"the header starts with {raw[:1]!r}, expected {{")
    if raw.count(b"[") > 4 * MAX_TENSORS:  # a legal header has two a tensor; bounds what the parser allocates
        raise SpqrError("E006", where, f"{raw.count(b'[')} lists in the header, the limit is {4 * MAX_TENSORS}")
    try:
        entries = strict_json(raw)
    except (ValueError, RecursionError) as error:
        raise SpqrError("E003", where, f"the header is not JSON: {short(str(error), 200)}") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SpqrError("E003", where, "__metadata__ is not a map of strings to strings")
    if len(entries) > MAX_TENSORS:
        raise SpqrError("E006", where, f"{len(entries)} tensors, the limit is {MAX_TENSORS}")
    return {name: _tensor(name, entry, f"{where} {short(name)}") for name, entry in entries.items()}, metadata


def _tensor(name: str, entry: Any, where: str) -> TensorInfo:
    if len(name.encode()) > MAX_NAME_BYTES:
        raise SpqrError("E006", where, f"a name of {len(name.encode())} bytes, the limit is {MAX_NAME_BYTES}")
    if not name:
        raise SpqrError("E003", where, "a tensor without a name")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise SpqrError("E003", where, "the entry is not {dtype, shape, data_offsets}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise SpqrError("E003", where, f"dtype {short(dtype)}, expected one of {', '.join(DTYPE_BYTES)}")
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise SpqrError("E003", where, f"{key} = {short(numbers)}, expected a list of integers >= 0")
    if len(offsets) != 2:
        raise SpqrError("E003", where, f"data_offsets = {short(offsets)}, expected two integers")
    if len(shape) > MAX_RANK:
        raise SpqrError("E006", where, f"rank {len(shape)}, the limit is {MAX_RANK}")
    elements = 1
    for dimension in shape:
        elements *= dimension
        if max(elements, dimension) > MAX_TENSOR_ELEMENTS:
            raise SpqrError("E006", where, f"shape {short(shape)}, the limit is 2**40 elements")
    begin, end = offsets
    if end - begin != elements * DTYPE_BYTES[dtype]:
        expected = elements * DTYPE_BYTES[dtype]
        raise SpqrError("E004", where, f"bytes {begin} .. {end} for {dtype} {short(shape)}, which needs {expected}")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _check_ranges(tensors: dict[str, TensorInfo], data_bytes: int, where: str) -> None:
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            kind = "overlaps the one before it" if info.begin < position else "leaves a hole"
            what = f"bytes start at {info.begin}, expected {position}: the tensor {kind}"
            raise SpqrError("E005", f"{where} {short(name)}", what)
        position = info.end
    if position > data_bytes:
        raise SpqrError("E001", where, f"{data_bytes} bytes of tensors, the header says {position}")
    if position < data_bytes:
        raise SpqrError("E005", where, f"{data_bytes - position} bytes after the last tensor")
