"""FP8 safetensors with scales (DeepSeek, Qwen-FP8: `quant_method: fp8`): by blocks, by row, or one for the whole tensor.

`weight_scale_inv` is multiplied, whatever its name says. Edge blocks are partial: the block size is the config's, never the
shape divided by the grid.
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
from .stored import StoredSource, cannot_hold, finite, quantization, recognise, scaled, whole

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)


@dataclass(frozen=True)
class _Shape:
    out: int
    inn: int
    scale: str
    block: tuple[int, int]


class Fp8Source(StoredSource):
    """`load` multiplies in float32 and does not round; nothing can be carried over, so `matrix` is E510."""

    name = "FP8"
    marks = (".weight_scale_inv", ".weight_scale")
    leaves = (".weight", ".weight_scale_inv", ".weight_scale", ".input_scale", ".activation_scale", ".input_scale_ub")

    def __init__(self, folder: str | Path) -> None:
        config = read_config(Path(folder))
        sizes = quantization(config).get("weight_block_size")
        self._block: tuple[int, int] | None = None
        if sizes is not None:
            if not isinstance(sizes, list) or len(sizes) != 2:
                raise SpqrError("E501", "config.json", f"weight_block_size = {short(sizes)}, expected two integers")
            high, wide = (whole(size, "config.json", "weight_block_size", 1, 2**31 - 1) for size in sizes)
            self._block = (high, wide)
        self._open(folder, config)

    @classmethod
    def recognises(cls, folder: Path, config: dict[str, Any]) -> bool:
        method = quantization(config).get("quant_method")
        if method in ("fp8", "fbgemm_fp8"):
            return recognise(folder, config, (method,), *cls.marks)
        return method is None and recognise(folder, config, (), ".weight_scale_inv")

    def notes(self) -> list[str]:
        return ["weights are the float32 product of code and scale; other tools round it to the model's dtype"]

    def _module(self, module: str) -> tuple[torch.dtype, tuple[int, int], _Shape]:
        out, inn = self.stored.expect(f"{module}.weight", _FLOAT8, (None, None)).shape
        found = [leaf for leaf in self.marks if f"{module}{leaf}" in self.stored.tensors]
        if len(found) != 1 or 0 in (out, inn):
            raise SpqrError("E501", f"{module}.weight", f"shape {(out, inn)} and {len(found)} scale tensors")
        scale = f"{module}{found[0]}"
        info = self.stored.tensors[scale]
        if info.dtype not in _SCALES:
            raise SpqrError("E501", scale, f"dtype {info.dtype}, expected a float or an exponent")
        options = [(out, inn), (1, inn)] if self._block is None else [self._block, (out, inn)]
        for high, wide in options:
            grid = (-(-out // high), -(-inn // wide))
            if (
                info.shape == grid
                or (grid == (1, 1) and info.shape in ((), (1,)))
                or (wide == inn and info.shape == (grid[0],))
            ):
                return torch.float32, (out, inn), _Shape(out, inn, scale, (high, wide))
        size = "no weight_block_size" if self._block is None else f"blocks of {self._block}"
        raise SpqrError("E501", scale, f"shape {info.shape} for a weight of {(out, inn)} and {size}")

    def _dequantize(self, module: str) -> torch.Tensor:
        shape: _Shape = self.modules[module]
        scales = self.stored.read(shape.scale)
        if scales.dtype == torch.uint8:  # E8M0 without its name
            scales = scales.view(torch.float8_e8m0fnu)
        high, wide = shape.block
        grid = (-(-shape.out // high), -(-shape.inn // wide))
        scales = finite(scales.float(), shape.scale).reshape(grid)
        rows, columns = torch.arange(shape.out) // high, torch.arange(shape.inn) // wide
        weight = scaled(self.stored.read(f"{module}.weight"), scales, None, rows, columns, torch.float32)
        return finite(weight, f"{module}.weight")

    def matrix(self, name: str) -> SpqrMatrix | None:
        if name.removesuffix(".weight") not in self.modules or name not in self.entries:
            return None
        raise cannot_hold(name, "8-bit floats, the format has integers of 2, 3, 4 bits")
