"""Dense safetensors (FP32, FP16, BF16), one file or sharded, read tensor by tensor with plain reads (no mmap)."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch

from spqr_format.errors import SpqrError

from .base import Entry, Source, read_config

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_MAX_HEADER = 100_000_000


class DenseSource(Source):
    """A Hugging Face folder with one safetensors file, or several and an index. `entries` is in file order. Errors: E501
    where something is missing, malformed, or of a kind that is not read."""

    name = "dense safetensors"
    quantized = False

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise SpqrError("E501", str(folder), "no such folder")
        self.config = read_config(self.folder)
        self.files = self._files()
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            for name, entry in _read_header(self.folder, file).items():
                if name in self.entries:
                    raise SpqrError("E501", file, f"{name} stands in {self.entries[name].file} too")
                self.entries[name] = entry

    def _files(self) -> list[str]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
                files = sorted(set(weight_map.values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise SpqrError("E501", str(index), f"not a weight index: {error}") from None
            for file in files:
                if not isinstance(file, str) or Path(file).name != file:
                    raise SpqrError("E501", str(index), f"{file!r} leaves the folder")
                if not (self.folder / file).is_file():
                    raise SpqrError("E501", str(index), f"{file} is missing")
            return files
        if (self.folder / "model.safetensors").is_file():
            return ["model.safetensors"]
        raise SpqrError("E501", str(self.folder), "no model.safetensors and no model.safetensors.index.json")

    def load(self, name: str) -> torch.Tensor:
        """The tensor in its own dtype, on the CPU. E501 when it is missing or cut short."""
        if name not in self.entries:
            raise SpqrError("E501", str(self.folder), f"tensor {name} is missing")
        entry = self.entries[name]
        data = bytearray(entry.end - entry.begin)
        with open(self.folder / entry.file, "rb") as file:
            file.seek(entry.begin)
            if file.readinto(data) != len(data):
                raise SpqrError("E501", entry.file, f"{name} is cut short")
        if not data:
            return torch.empty(entry.shape, dtype=entry.dtype)
        return torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)

    def split(self, name: str, parts: list[list[str]]) -> None:
        """Offer a stack of matrices [len(parts), rows, columns] as tensors of their own: parts[i] names equal shares of the
        rows of matrix i, in order."""
        found: dict[str, Entry] = {}
        for other, entry in self.entries.items():
            if other != name:
                found[other] = entry
                continue
            rows, columns = entry.shape[1] // len(parts[0]), entry.shape[2]
            size = rows * columns * entry.dtype.itemsize
            for i, part in enumerate(part for row in parts for part in row):
                begin = entry.begin + i * size
                if part in self.entries:
                    raise SpqrError("E501", entry.file, f"{part} stands beside {name}")
                found[part] = Entry(entry.file, entry.dtype, (rows, columns), begin, begin + size)
        self.entries = found

    @classmethod
    def recognises(cls, folder: Path, config: dict[str, Any]) -> bool:
        return not config.get("quantization_config") and (
            (folder / "model.safetensors").is_file() or (folder / "model.safetensors.index.json").is_file()
        )


def _read_header(folder: Path, file: str) -> dict[str, Entry]:
    path = folder / file
    size = path.stat().st_size
    with open(path, "rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise SpqrError("E501", file, "not a safetensors file")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            rows = [(name, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SpqrError("E501", file, f"its header is not that of a safetensors file: {error}") from None
    entries = {}
    for name, dtype, shape, begin, end in sorted(rows, key=lambda row: row[3]):
        if dtype not in DTYPES:
            raise SpqrError("E501", file, f"{name} has dtype {dtype}, which is not read")
        if not 0 <= begin <= end <= size - 8 - length or math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
            raise SpqrError("E501", file, f"{name}: bytes {begin}..{end} do not hold shape {shape} of {dtype}")
        entries[name] = Entry(file, DTYPES[dtype], shape, 8 + length + begin, 8 + length + end)
    return entries
