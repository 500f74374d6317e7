"""The tensors as they lie in a folder's safetensors files, for sources that make dense weights from several of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spqr_format.errors import SpqrError
from spqr_format.header import read_header, short, strict_json

from .base import Entry, Source

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
DENSE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_INDEX = 100_000_000


def weight_files(folder: Path, index_name: str, single: str) -> list[str]:
    """File names of the index, or the single file; [] where neither is there. E501 where the index is malformed."""
    index = folder / index_name
    if not index.is_file():
        return [single] if (folder / single).is_file() else []
    try:
        if index.stat().st_size > _MAX_INDEX:
            raise ValueError(f"{index.stat().st_size} bytes")
        files = sorted(set(strict_json(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise SpqrError("E501", index_name, f"not a weight index: {short(str(error))}") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise SpqrError("E501", index_name, f"{short(file)} leaves the folder")
        if not (folder / file).is_file():
            raise SpqrError("E501", index_name, f"{short(file)} is missing")
    return files


class Stored:
    """Headers of a folder's safetensors files; `tensors` in file order, `read` brings one in. All errors are E501."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = weight_files(folder, INDEX, SINGLE)
        if not self.files:
            raise SpqrError("E501", str(folder), f"no {SINGLE} and no {INDEX}")
        self.tensors: dict[str, Entry] = {}
        for file in self.files:
            try:
                header = read_header(folder / file)
            except SpqrError as error:
                raise SpqrError("E501", error.where, error.what) from None
            except OSError as error:
                raise SpqrError("E501", file, f"cannot be read: {error.strerror}") from None
            for name, info in sorted(header.tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
                if name in self.tensors:
                    raise SpqrError("E501", file, f"{name} stands in {self.tensors[name].file} too")
                if info.dtype not in DTYPES:
                    raise SpqrError("E501", file, f"{name} has dtype {info.dtype}, which is not read")
                start = header.data_start
                self.tensors[name] = Entry(file, DTYPES[info.dtype], info.shape, start + info.begin, start + info.end)

    def read(self, name: str) -> torch.Tensor:
        """The tensor as it is stored."""
        info = self.tensors.get(name)
        if info is None:
            raise SpqrError("E501", str(self.folder), f"tensor {name} is missing")
        data = bytearray(info.end - info.begin)
        try:
            with open(self.folder / info.file, "rb") as file:
                file.seek(info.begin)
                if file.readinto(data) != len(data):
                    raise SpqrError("E501", info.file, f"{name} is cut short")
        except OSError as error:
            raise SpqrError("E501", info.file, f"cannot be read: {error.strerror}") from None
        if not data:
            return torch.empty(info.shape, dtype=info.dtype)
        return torch.frombuffer(data, dtype=info.dtype).view(info.shape)

    def expect(self, name: str, dtypes: torch.dtype | Iterable[torch.dtype], shape: tuple[int | None, ...]) -> Entry:
        """The entry of a tensor that must be there, of one of the dtypes and with this shape (None: any size)."""
        info = self.tensors.get(name)
        if info is None:
            raise SpqrError("E501", str(self.folder), f"tensor {name} is missing")
        allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
        if info.dtype not in allowed:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise SpqrError("E501", f"{info.file} {name}", f"dtype {str(info.dtype).removeprefix('torch.')}, expected {names}")
        if len(info.shape) != len(shape) or any(b is not None and a != b for a, b in zip(info.shape, shape, strict=True)):
            raise SpqrError("E501", f"{info.file} {name}", f"shape {info.shape}, expected {shape}")
        return info

    def has_leaf(self, *leaves: str) -> bool:
        """True where the name of some tensor ends with one of the leaves."""
        return any(name.endswith(leaves) for name in self.tensors)


def recognise(folder: Path, config: dict[str, Any], methods: tuple[str, ...], *leaves: str) -> bool:
    """True where a tensor's name ends with one of the leaves. Files that cannot be read are whatever config.json says."""
    try:
        return Stored(folder).has_leaf(*leaves)
    except SpqrError:
        section = config.get("quantization_config")
        named = isinstance(section, dict) and section.get("quant_method") in methods
        return named and bool(weight_files(folder, INDEX, SINGLE))


class StoredSource(Source):
    """A source on safetensors. A kind fills `modules` (name of the linear layer -> whatever it needs) in `_module`.

    `marks` are the leaf names by which a module is known; `leaves` all that belong to it and are no tensors of the model.
    """

    marks: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()

    def _open(self, folder: str | Path, config: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.section = quantization(config)
        self.config = dense_config(config)
        self.stored = Stored(self.folder)
        self.files = self.stored.files
        self.entries: dict[str, Entry] = {}
        self.modules: dict[str, Any] = {}
        for name, info in self.stored.tensors.items():
            module = self._owner(name)
            if module is None:
                if name in self.entries:
                    raise SpqrError("E501", f"{info.file} {name}", f"{name.removesuffix('.weight')} is quantized too")
                self.entries[name] = info
            elif module not in self.modules:
                self.modules[module] = None  # so that `_module` runs once
                dtype, shape, self.modules[module] = self._module(module)
                if f"{module}.weight" in self.entries:
                    raise SpqrError("E501", f"{info.file} {name}", f"{module} has a dense weight too")
                self.entries[f"{module}.weight"] = Entry("", dtype, shape, 0, 0)  # `_weigh` says how many bytes
        self._weigh()

    def _weigh(self) -> None:
        """Bytes of each module's parts, in one pass."""
        total: dict[str, int] = {}
        for name, info in self.stored.tensors.items():
            module = self._owner(name)
            if module is not None:
                total[module] = total.get(module, 0) + info.end - info.begin
        for module, size in total.items():
            entry = self.entries[f"{module}.weight"]
            self.entries[f"{module}.weight"] = Entry("", entry.dtype, entry.shape, 0, size)

    def _owner(self, name: str) -> str | None:
        """The module that a stored tensor is a part of, or None for a tensor of the model."""
        for leaf in self.leaves:
            if name.endswith(leaf) and any(name[: -len(leaf)] + mark in self.stored.tensors for mark in self.marks):
                return name[: -len(leaf)]
        return None

    def _module(self, module: str) -> tuple[torch.dtype, tuple[int, int], Any]:
        """dtype and shape of the dequantized weight, and what the kind keeps of it. Checks shapes and dtypes. E501."""
        raise NotImplementedError

    def _dequantize(self, module: str) -> torch.Tensor:
        raise NotImplementedError

    def load(self, name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if name in self.entries and module in self.modules and name != module:
            return self._dequantize(module)
        if name not in self.entries:
            raise SpqrError("E501", str(self.folder), f"tensor {name} is missing")
        return self.stored.read(name)


def quantization(config: dict[str, Any]) -> dict[str, Any]:
    """config.json's quantization_config, {} where there is none. E501 where it is no object."""
    section = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(section, dict):
        raise SpqrError("E501", "config.json", f"quantization_config = {short(section)}, expected an object")
    return section


def dense_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the same model, not quantized."""
    return {k: v for k, v in config.items() if k not in ("quantization_config", "compression_config")}


def whole(value: Any, where: str, what: str, low: int, high: int) -> int:
    """`value`, an integer in low .. high. E501."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SpqrError("E501", where, f"{what} = {short(value)}, expected an integer {low} .. {high}")
    return value


def finite(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """The tensor, where all of it is finite. E501 naming the first place where it is not."""
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        flat = int(bad.flatten().to(torch.uint8).argmax())
        raise SpqrError("E501", f"{where}[{flat}]", f"{tensor.flatten()[flat].item()}, expected a finite number")
    return tensor


def unpack_stream(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """uint8 [rows, count] from int32 [rows, words]: one plain stream of bits a row, lowest first; bits 1 .. 8."""
    rows, width = words.shape
    if width * 32 < count * bits:
        raise SpqrError("E501", "packed codes", f"{width} words a row cannot hold {count} codes of {bits} bits")
    raw = np.ascontiguousarray(words.numpy()).view(np.uint8)
    pieces = -(-count // 8)  # 8 codes are `bits` bytes
    wide = np.uint32 if bits <= 4 else np.uint64
    result = np.empty((rows, pieces, 8), np.uint8)
    step = max(1, (1 << 20) // max(pieces, 1))
    for first in range(0, rows, step):
        part = raw[first : first + step, : pieces * bits]
        part = np.pad(part, ((0, 0), (0, pieces * bits - part.shape[1]))).reshape(-1, pieces, bits)
        value = part[..., 0].astype(wide)
        for k in range(1, bits):
            value |= part[..., k].astype(wide) << wide(8 * k)
        _fields(value, bits, result[first : first + step])
    return torch.from_numpy(np.ascontiguousarray(result.reshape(rows, pieces * 8)[:, :count]))


def unpack_fields(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """uint8 [rows, count] from int32 [rows, words]: 32 // bits codes a word, lowest first, the top bits unused."""
    rows, width = words.shape
    value = np.ascontiguousarray(words.numpy()).view(np.uint32)
    result = np.empty((rows, width, 32 // bits), np.uint8)
    step = max(1, (1 << 20) // max(width, 1))
    for first in range(0, rows, step):
        _fields(value[first : first + step], bits, result[first : first + step])
    return torch.from_numpy(np.ascontiguousarray(result.reshape(rows, -1)[:, :count]))


def _fields(value: npt.NDArray[Any], bits: int, out: npt.NDArray[np.uint8]) -> None:
    """out[..., j] is field j of `bits` bits."""
    mask = value.dtype.type(2**bits - 1)
    for j in range(out.shape[-1]):
        out[..., j] = (value >> value.dtype.type(bits * j)) & mask


def cannot_hold(where: str, what: str) -> SpqrError:
    """E510, naming the mode that works."""
    return SpqrError("E510", where, f"{what}; convert without --lossless, which requantizes it")


def scaled(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, rows: torch.Tensor, columns: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """scales * (codes - zeros), each operation rounded to dtype. rows [out] and columns [in] name the scale of each code."""
    result = torch.empty(codes.shape, dtype=dtype)
    step = max(1, (1 << 22) // codes.shape[1])
    for first in range(0, codes.shape[0], step):
        part = slice(first, first + step)
        value = codes[part].to(dtype)
        if zeros is not None:
            value -= zeros[rows[part]][:, columns].to(dtype)
        result[part] = value * scales[rows[part]][:, columns].to(dtype)
    return result
