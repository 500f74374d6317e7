"""bitsandbytes: NF4 and FP4 (double-quantized or not) and INT8, as transformers saves them.

Reference: bitsandbytes 0.50 functional.py. 4 bits: two codes a byte, the high one first; blocks of the flattened weight, which
may cross rows, share an absmax. 8 bits: one absmax (SCB) a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spqr_format.errors import SpqrError
from spqr_format.header import short, strict_json
from spqr_format.matrix import SpqrMatrix

from .base import read_config
from .stored import StoredSource, cannot_hold, finite, recognise, whole

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_STATES = (".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4")
_MAX_STATE = 4096  # bytes of JSON
_ONE_127TH = 7.874015718698502e-3  # as bitsandbytes writes it


@dataclass(frozen=True)
class _Shape:
    """block 0: INT8. nested: codes of the absmax that share a second absmax, 0 without double quantization."""

    out: int
    inn: int
    dtype: torch.dtype
    block: int = 0
    nested: int = 0
    offset: float = 0.0


class BitsAndBytesSource(StoredSource):
    """`load` rounds once, to the dtype that the file names (INT8: float32). Nothing can be carried over: `matrix` is E510."""

    name = "bitsandbytes"
    marks = (".weight.absmax", ".SCB")
    leaves = (
        ".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map", *_STATES,
        ".SCB", ".weight_format",
    )  # fmt: skip

    def __init__(self, folder: str | Path) -> None:
        self._open(folder, read_config(Path(folder)))

    @classmethod
    def recognises(cls, folder: Path, config: dict[str, Any]) -> bool:
        return recognise(folder, config, ("bitsandbytes",), *cls.marks)

    def notes(self) -> list[str]:
        return ["the error that NF4, FP4 or INT8 made before is in these weights and cannot be measured"]

    def _module(self, module: str) -> tuple[torch.dtype, tuple[int, int], _Shape]:
        shape = self._int8(module) if f"{module}.SCB" in self.stored.tensors else self._four_bits(module)
        return shape.dtype, (shape.out, shape.inn), shape

    def _int8(self, module: str) -> _Shape:
        out, inn = self.stored.expect(f"{module}.weight", torch.int8, (None, None)).shape
        scale = self.stored.tensors[f"{module}.SCB"]
        if scale.shape not in ((out,), (out, 1)) or scale.dtype not in _DTYPES.values() or 0 in (out, inn):
            raise SpqrError("E501", f"{module}.SCB", f"{scale.dtype} {scale.shape} for a weight of {(out, inn)}")
        if f"{module}.weight_format" in self.stored.tensors:
            info = self.stored.tensors[f"{module}.weight_format"]
            order = self.stored.read(f"{module}.weight_format").tolist() if info.numel == 1 else None
            if order not in (0, [0]):
                raise SpqrError("E501", f"{module}.weight_format", f"{short(order)}: only row-major codes (0) are read")
        return _Shape(out, inn, torch.float32)

    def _four_bits(self, module: str) -> _Shape:
        stored = self.stored
        state = next((leaf for leaf in _STATES if f"{module}{leaf}" in stored.tensors), _STATES[0])
        where = f"{module}{state}"
        info = stored.expect(where, torch.uint8, (None,))
        if info.numel > _MAX_STATE:
            raise SpqrError("E501", where, f"{info.numel} bytes, expected a short JSON object")
        try:
            values = strict_json(bytes(stored.read(where).tolist()))
        except ValueError as error:
            raise SpqrError("E501", where, f"not JSON: {short(str(error))}") from None
        sizes = values.get("shape") if isinstance(values, dict) else None
        if not isinstance(sizes, list) or len(sizes) != 2:
            raise SpqrError("E501", where, f"shape = {short(sizes)}, expected two integers")
        out, inn = (whole(size, where, "shape", 1, 2**31 - 1) for size in sizes)
        block = whole(values.get("blocksize"), where, "blocksize", 1, 2**20)
        dtype = _DTYPES.get(values["dtype"]) if isinstance(values.get("dtype"), str) else None
        if dtype is None:
            raise SpqrError("E501", where, f"dtype = {short(values.get('dtype'))}, expected one of {', '.join(_DTYPES)}")
        # bnb_4bit_quant_storage: the bytes may be stored as any dtype.
        weight = stored.tensors.get(f"{module}.weight")
        if weight is None or weight.end - weight.begin != -(-out * inn // 2):
            held = "no bytes" if weight is None else f"{weight.end - weight.begin} bytes"
            raise SpqrError("E501", f"{module}.weight", f"{held}, 4-bit codes of {(out, inn)} need {-(-out * inn // 2)}")
        stored.expect(f"{module}.weight.quant_map", torch.float32, (16,))
        count = -(-out * inn // block)
        if "nested_blocksize" not in values:
            stored.expect(f"{module}.weight.absmax", torch.float32, (count,))
            return _Shape(out, inn, dtype, block)
        nested = whole(values["nested_blocksize"], where, "nested_blocksize", 1, 2**20)
        offset = values.get("nested_offset")
        if not isinstance(offset, (int, float)) or isinstance(offset, bool) or not math.isfinite(offset):
            raise SpqrError("E501", where, f"nested_offset = {short(offset)}, expected a number")
        stored.expect(f"{module}.weight.absmax", torch.uint8, (count,))
        stored.expect(f"{module}.weight.nested_absmax", torch.float32, (-(-count // nested),))
        stored.expect(f"{module}.weight.nested_quant_map", torch.float32, (256,))
        return _Shape(out, inn, dtype, block, nested, float(offset))

    def _dequantize(self, module: str) -> torch.Tensor:
        shape: _Shape = self.modules[module]
        stored = self.stored
        if shape.block == 0:
            scale = finite(stored.read(f"{module}.SCB").float().reshape(-1, 1), f"{module}.SCB")
            return stored.read(f"{module}.weight").float().mul_(scale).mul_(_ONE_127TH)
        levels = finite(stored.read(f"{module}.weight.quant_map"), f"{module}.weight.quant_map")
        absmax = stored.read(f"{module}.weight.absmax")
        if shape.nested:
            second = finite(stored.read(f"{module}.weight.nested_absmax"), f"{module}.weight.nested_absmax")
            table = finite(stored.read(f"{module}.weight.nested_quant_map"), f"{module}.weight.nested_quant_map")
            absmax = table[absmax.long()] * second[torch.arange(absmax.numel()) // shape.nested] + shape.offset
        absmax = finite(absmax, f"{module}.weight.absmax")
        packed = stored.read(f"{module}.weight").reshape(-1).view(torch.uint8)
        count = shape.out * shape.inn
        weight = torch.empty(count, dtype=shape.dtype)
        step = 1 << 21  # bytes
        for first in range(0, packed.numel(), step):
            part = packed[first : first + step]
            codes = torch.stack((part >> 4, part & 15), 1).reshape(-1)[: count - 2 * first]
            block = torch.arange(2 * first, 2 * first + codes.numel()) // shape.block
            weight[2 * first : 2 * first + codes.numel()] = (levels[codes.long()] * absmax[block]).to(shape.dtype)
        return finite(weight.view(shape.out, shape.inn), f"{module}.weight")

    def matrix(self, name: str) -> SpqrMatrix | None:
        module = name.removesuffix(".weight")
        if module not in self.modules or name not in self.entries:
            return None
        kind = "4-bit codes of a table" if self.modules[module].block else "8-bit integers"
        raise cannot_hold(name, f"{kind}, the format has evenly spaced codes of 2, 3, 4 bits")
