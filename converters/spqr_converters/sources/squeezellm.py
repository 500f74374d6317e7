"""SqueezeLLM: a lookup table for each output row, 3 or 4 bits, dense or dense-and-sparse; one torch.save file.

Reference: SqueezeLLM pack.py and quant_cuda_kernel.cu. W[o, i] = table[o, code[i, o]]; CSR values and full rows are ADDED.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spqr_format.errors import SpqrError
from spqr_format.header import short, strict_json
from spqr_format.matrix import SpqrMatrix

from .base import Entry, Source, read_config
from .pickled import PickledFiles, names_leaf
from .spqr_hf import check_offsets
from .stored import INDEX, SINGLE, cannot_hold, dense_config, finite, unpack_stream, weight_files

_LEAVES = (
    ".qweight", ".lookup_table", ".rows", ".cols", ".vals", ".startrows", ".full_rows", ".full_row_indices", ".num_sparse"
)  # fmt: skip
_PACKED = 32  # columns of one packed piece


@dataclass(frozen=True)
class _Shape:
    out: int
    inn: int
    bits: int
    sparse: int
    full: int


class SqueezeLlmSource(Source):
    """The lookup tables are arbitrary numbers, so nothing can be carried over: `matrix` is E510. `load` gives float32."""

    name = "SqueezeLLM"

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = dense_config(read_config(self.folder))
        file = _file(self.folder)
        if file is None:
            raise SpqrError("E501", str(folder), "no torch.save file with a lookup_table")
        self.files = [file]
        self._pickled = PickledFiles(self.folder, self.files)
        self._tensors = self._pickled.tensors
        self._bits = _stated_bits(self.folder)
        self.entries: dict[str, Entry] = {}
        self._modules: dict[str, _Shape] = {}
        marks = {name.removesuffix(".lookup_table") for name in self._tensors if name.endswith(".lookup_table")}
        bytes_of = dict.fromkeys(marks, 0)
        for name, info in self._tensors.items():
            module, _, leaf = name.rpartition(".")
            if module not in marks or f".{leaf}" not in _LEAVES:
                self.entries[name] = info
                continue
            bytes_of[module] += info.end
            if module not in self._modules:
                shape = self._modules[module] = self._module(module)
                self.entries[f"{module}.weight"] = Entry("", torch.float32, (shape.out, shape.inn), 0, 0)
        for module, size in bytes_of.items():
            shape = self._modules[module]
            if f"{module}.weight" in self._tensors:
                raise SpqrError("E501", file, f"{module} has a dense weight too")
            self.entries[f"{module}.weight"] = Entry("", torch.float32, (shape.out, shape.inn), 0, size)

    @classmethod
    def recognises(cls, folder: Path, config: dict[str, Any]) -> bool:
        return not weight_files(folder, INDEX, SINGLE) and _file(folder) is not None

    def notes(self) -> list[str]:
        return ["sparse values are added to the table's in float32, which may differ from the original in its last bit"]

    def load(self, name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        if name not in self.entries:
            raise SpqrError("E501", str(self.folder), f"tensor {name} is missing")
        if module not in self._modules or name == module:
            return self._pickled.read(name)
        shape = self._modules[module]
        words = self._pickled.read(f"{module}.qweight").t().contiguous()
        table = finite(self._pickled.read(f"{module}.lookup_table").float(), f"{module}.lookup_table")
        weight = torch.empty(shape.out, shape.inn)
        step = max(1, (1 << 22) // shape.inn)  # the gather wants int64 indices
        for first in range(0, shape.out, step):
            part = slice(first, first + step)
            codes = unpack_stream(words[part], shape.bits, shape.inn).long()
            torch.gather(table[part], 1, codes, out=weight[part])
        if shape.sparse:
            rows, columns, values = self._sparse(module, shape)
            weight.index_put_((rows, columns), values, accumulate=True)
        if shape.full:
            index = self._pickled.read(f"{module}.full_row_indices").long()
            _inside(index, shape.out, f"{module}.full_row_indices")
            full = finite(self._pickled.read(f"{module}.full_rows").float(), f"{module}.full_rows")
            weight.index_add_(0, index, full.t().contiguous())
        return weight

    def matrix(self, name: str) -> SpqrMatrix | None:
        if name.removesuffix(".weight") not in self._modules or name not in self.entries:
            return None
        raise cannot_hold(name, "a lookup table of arbitrary values for every row")

    def _sparse(self, module: str, shape: _Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        offsets = self._pickled.read(f"{module}.rows").numpy().astype(np.int64)
        check_offsets(offsets, shape.sparse, f"{module}.rows")
        columns = self._pickled.read(f"{module}.cols").long()
        _inside(columns, shape.inn, f"{module}.cols")
        values = finite(self._pickled.read(f"{module}.vals").float(), f"{module}.vals")
        return torch.from_numpy(np.repeat(np.arange(shape.out), np.diff(offsets))), columns, values

    def _module(self, module: str) -> _Shape:
        table = self._expect(f"{module}.lookup_table", (torch.float32, torch.float16), (None, None))
        bits = {8: 3, 16: 4}.get(table[1])
        if bits is None or (self._bits is not None and bits != self._bits):
            expected = "8 or 16" if self._bits is None else str(2**self._bits)
            raise SpqrError(
                "E501", f"{self.files[0]} {module}.lookup_table", f"shape {table}, expected {expected} values a row"
            )
        out = table[0]
        rows = self._expect(f"{module}.qweight", (torch.int32,), (None, out))[0]
        if rows == 0 or out == 0 or rows % bits:
            raise SpqrError("E501", f"{self.files[0]} {module}.qweight", f"{rows} x {out} words of {bits}-bit codes")
        sparse = full = 0
        if f"{module}.rows" in self._tensors:
            self._expect(f"{module}.rows", (torch.int32,), (out + 1,))
            sparse = self._expect(f"{module}.cols", (torch.int32,), (None,))[0]
            self._expect(f"{module}.vals", (torch.float32, torch.float16), (sparse,))
        inn = rows // bits * _PACKED
        if f"{module}.full_rows" in self._tensors:
            full = self._expect(f"{module}.full_row_indices", (torch.int32,), (None,))[0]
            self._expect(f"{module}.full_rows", (torch.float32, torch.float16), (inn, full))
        return _Shape(out, inn, bits, sparse, full)

    def _expect(self, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> tuple[int, ...]:
        info = self._tensors.get(name)
        if info is None:
            raise SpqrError("E501", self.files[0], f"tensor {name} is missing")
        if info.dtype not in dtypes:
            raise SpqrError("E501", f"{self.files[0]} {name}", f"{info.dtype}, expected {' or '.join(map(str, dtypes))}")
        if len(info.shape) != len(shape) or any(b is not None and a != b for a, b in zip(info.shape, shape, strict=True)):
            raise SpqrError("E501", f"{self.files[0]} {name}", f"shape {info.shape}, expected {shape}")
        return info.shape


def _file(folder: Path) -> str | None:
    """The only file that holds lookup tables. E501 where there are several."""
    candidates = [p for p in sorted(folder.iterdir()) if p.suffix in (".pt", ".pth", ".bin") and p.is_file()]
    found = [path.name for path in candidates if names_leaf(path, ".lookup_table")]
    if len(found) > 1:
        raise SpqrError("E501", str(folder), f"several SqueezeLLM files: {', '.join(short(name) for name in found[:4])}")
    return found[0] if found else None


def _stated_bits(folder: Path) -> int | None:
    path = folder / "quant_config.json"
    if not path.is_file():
        return None
    try:
        bits = strict_json(path.read_bytes()[: 1 << 20])["wbits"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise SpqrError("E501", path.name, f"not SqueezeLLM's quant_config: {short(str(error))}") from None
    if bits not in (3, 4):
        raise SpqrError("E501", path.name, f"wbits = {short(bits)}, expected 3 or 4")
    return int(bits)


def _inside(index: torch.Tensor, size: int, where: str) -> None:
    bad = (index < 0) | (index >= size)
    if bool(bad.any()):
        place = int(bad.to(torch.uint8).argmax())
        raise SpqrError("E501", f"{where}[{place}]", f"{int(index[place])}, expected 0 .. {size - 1}")
