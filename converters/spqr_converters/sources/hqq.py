"""HQQ checkpoints in safetensors: `W_q` and its meta tensors, as HQQLinear.state_dict writes them.

Reference: mobiusml/hqq 0.2.8, core/bitpack.py and core/quantize.py. W = ((q - zero) * scale).reshape(shape), each operation in
the scale's dtype; zeros are floats. Packing is by stripes: the first part of the rows lies in the highest bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spqr_format.errors import SpqrError
from spqr_format.header import short
from spqr_format.matrix import SpqrMatrix

from .base import read_config
from .stored import StoredSource, cannot_hold, finite, recognise, whole

_STRIPES = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Shape:
    """rows x columns: the matrix that was quantized, of whose columns (axis 1) or rows (axis 0) groups are made."""

    out: int
    inn: int
    bits: int
    rows: int
    columns: int
    stored: torch.dtype


class HqqSource(StoredSource):
    """`load` gives the scale's dtype, rounded as HQQ does it. Zeros are no integers, so `matrix` is E510."""

    name = "HQQ"
    marks = (".W_q",)
    leaves = (
        ".W_q", ".scale", ".zero", ".shape", ".nbits", ".group_size", ".axis", ".packing", ".view_as_float",
        ".unpack_view_dtype", ".compute_dtype", ".quant_scale", ".quant_zero", ".channel_wise", ".optimize", ".round_zero",
        ".stores_quant_config", ".encoded_state_dict", ".offload_meta",
    )  # fmt: skip

    def __init__(self, folder: str | Path) -> None:
        self._open(folder, read_config(Path(folder)))

    @classmethod
    def recognises(cls, folder: Path, config: dict[str, Any]) -> bool:
        return recognise(folder, config, ("hqq",), *cls.marks)

    def notes(self) -> list[str]:
        return ["the error that HQQ made before is in these weights and cannot be measured"]

    def _module(self, module: str) -> tuple[torch.dtype, tuple[int, int], _Shape]:
        stored = self.stored
        for leaf in ("quant_scale", "quant_zero"):
            if self._number(module, leaf, 0) != 0:
                raise SpqrError("E501", f"{module}.{leaf}", "quantized scales or zeros are not read")
        bits = whole(self._number(module, "nbits"), f"{module}.nbits", "bits", 1, 8)
        axis = whole(self._number(module, "axis", 1), f"{module}.axis", "axis", 0, 1)
        stored.expect(f"{module}.shape", (torch.int64, torch.int32), (2,))
        out, inn = (whole(size, f"{module}.shape", "size", 1, 2**31 - 1) for size in stored.read(f"{module}.shape").tolist())
        if bits not in _STRIPES:
            raise SpqrError("E501", f"{module}.nbits", f"{bits} bits, expected one of {', '.join(map(str, _STRIPES))}")
        packing = stored.tensors.get(f"{module}.packing")
        expected = "3bit_32" if bits == 3 else f"{bits}bit_u8"
        if packing is not None:
            text = bytes(stored.read(f"{module}.packing").view(torch.uint8).flatten().tolist()) if packing.numel <= 32 else b"?"
            if text != expected.encode():
                raise SpqrError("E501", f"{module}.packing", f"{short(text)}, expected {expected}")
        scale = stored.expect(f"{module}.scale", _FLOATS, (None, None))
        stored.expect(f"{module}.zero", scale.dtype, scale.shape)
        # axis 1: [groups, size] with a scale a row; axis 0: [size, groups] with a scale a column.
        groups = max(scale.shape)
        if groups == 0 or scale.shape != ((groups, 1) if axis == 1 else (1, groups)) or out * inn % groups:
            raise SpqrError("E501", f"{module}.scale", f"shape {scale.shape} for a weight of {(out, inn)} and axis {axis}")
        size = out * inn // groups
        rows, columns = (groups, size) if axis == 1 else (size, groups)
        info = stored.tensors[f"{module}.W_q"]
        kind = torch.int32 if bits == 3 else torch.uint8
        need = -(-rows // _STRIPES[bits]) * columns * kind.itemsize
        # view_as_float: the same bytes under the compute dtype.
        if info.dtype not in (kind, *_FLOATS) or info.end - info.begin != need or len(info.shape) != 2:
            what = f"{info.dtype} {info.shape}, codes of {bits} bits for {(out, inn)} need {need} bytes"
            raise SpqrError("E501", f"{module}.W_q", what)
        return scale.dtype, (out, inn), _Shape(out, inn, bits, rows, columns, kind)

    def _number(self, module: str, leaf: str, default: int | None = None) -> Any:
        """The one integer of a meta tensor."""
        name = f"{module}.{leaf}"
        info = self.stored.tensors.get(name)
        if info is None:
            if default is None:
                raise SpqrError("E501", name, "the tensor is missing")
            return default
        if info.numel != 1 or info.dtype.is_floating_point:
            raise SpqrError("E501", name, f"{info.dtype} {info.shape}, expected one integer")
        return int(self.stored.read(name).reshape(()).item())

    def _dequantize(self, module: str) -> torch.Tensor:
        shape: _Shape = self.modules[module]
        stripes = _STRIPES[shape.bits]
        high = -(-shape.rows // stripes)
        packed = self.stored.read(f"{module}.W_q").contiguous().view(shape.stored).reshape(high, shape.columns)
        scale = finite(self.stored.read(f"{module}.scale"), f"{module}.scale")
        zero = finite(self.stored.read(f"{module}.zero"), f"{module}.zero")
        weight = torch.empty(shape.rows, shape.columns, dtype=scale.dtype)
        for stripe in range(stripes):
            first = stripe * high
            part = slice(first, min(first + high, shape.rows))
            if part.start >= shape.rows:
                break
            codes = (packed >> (shape.bits * (stripes - 1 - stripe))) & (2**shape.bits - 1)
            weight[part] = codes[: part.stop - first].to(scale.dtype)
        weight -= zero
        weight *= scale
        return finite(weight.reshape(shape.out, shape.inn), f"{module}.weight")

    def matrix(self, name: str) -> SpqrMatrix | None:
        if name.removesuffix(".weight") not in self.modules or name not in self.entries:
            return None
        raise cannot_hold(name, "zero points that are no integers")
