"""compressed-tensors: pack-quantized integers, and int8 or FP8 codes stored plainly (int-, float- and naive-quantized).

Reference: vllm-project/compressed-tensors 0.20. W = scale * (q - zero) in the scale's dtype; packed codes are q + 2**(bits-1),
along the input columns, lowest first. Since 0.18 odd widths are one stream of bits, before they were 32 // bits codes a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spqr_format.errors import SpqrError
from spqr_format.header import short
from spqr_format.layout import TILE, WEIGHT_BITS, Layout
from spqr_format.matrix import SpqrMatrix

from .base import read_config
from .stored import StoredSource, cannot_hold, finite, quantization, recognise, scaled, unpack_fields, unpack_stream, whole

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (torch.float32, torch.float16, torch.bfloat16)
_DENSE_STREAM = (0, 18)  # the first version that packs odd widths as one stream of bits


@dataclass(frozen=True)
class _Weights:
    """What one config group says about its weights. block: rows and columns that share a scale; None: all of them."""

    bits: int
    kind: str  # int or float
    block: tuple[int | None, int | None]


@dataclass(frozen=True)
class _Shape:
    out: int
    inn: int
    weights: _Weights
    packed: bool
    stream: bool
    block: tuple[int, int]
    zeros: str | None  # packed, plain, or None
    order: bool  # has weight_g_idx


class CompressedTensorsSource(StoredSource):
    """The config's groups are told apart by the sizes of what is stored, not by their patterns. `load` gives the scale's
    dtype, rounded as the tool does it. Integers of 2, 3 and 4 bits are carried over."""

    name = "compressed-tensors"
    marks = (".weight_packed", ".weight_scale")
    leaves = (
        ".weight", ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx",
        ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".weight_global_scale",
        ".input_global_scale",
    )  # fmt: skip

    def __init__(self, folder: str | Path) -> None:
        config = read_config(Path(folder))
        section = quantization(config)
        self._groups = _groups(section)
        self._version = _version(section.get("version"))
        for key in ("transform_config", "sparsity_config"):
            value = section.get(key)
            if value and not (isinstance(value, dict) and value.get("format") == "dense"):
                raise SpqrError("E501", "config.json", f"{key} = {short(value)}: transformed or sparse weights are not read")
        self._open(folder, config)
        self._unused = [n for n in self.entries if n.rpartition(".")[2] in ("k_scale", "v_scale", "q_scale")]
        for name in self._unused:
            del self.entries[name]

    @classmethod
    def recognises(cls, folder: Path, config: dict[str, Any]) -> bool:
        method = quantization(config).get("quant_method", "compressed-tensors" if "compression_config" in config else None)
        if method == "compressed-tensors":
            return recognise(folder, {"quantization_config": {"quant_method": method}}, (method,), *cls.marks)
        return recognise(folder, config, (), ".weight_packed")

    def notes(self) -> list[str]:
        found = ["compressed-tensors rounds scale * (q - zero) to the scale's dtype; carried-over codes are decoded in fp32"]
        shapes = [shape for shape in self.modules.values() if shape.packed and 32 % shape.weights.bits]
        if shapes:
            how = "one stream of bits (0.18 and later)" if shapes[0].stream else "whole codes a word (before 0.18)"
            found.append(f"codes of {shapes[0].weights.bits} bits are packed as {how}, as their width tells")
        if any(leaf.endswith((".input_scale", ".input_zero_point")) for leaf in self.stored.tensors) or self._unused:
            found.append("quantization of activations and of the KV cache is left out: weights only")
        return found

    def _module(self, module: str) -> tuple[torch.dtype, tuple[int, int], _Shape]:
        stored = self.stored
        packed = f"{module}.weight_packed" in stored.tensors
        order = f"{module}.weight_g_idx" in stored.tensors
        if packed:
            if f"{module}.weight" in stored.tensors:
                raise SpqrError("E501", f"{module}.weight", "a dense weight beside weight_packed")
            out, width = stored.expect(f"{module}.weight_packed", torch.int32, (None, None)).shape
            stored.expect(f"{module}.weight_shape", (torch.int64, torch.int32), (2,))
            stated = stored.read(f"{module}.weight_shape").tolist()
            if stated[0] != out or not 1 <= stated[1] <= 32 * width:
                raise SpqrError("E501", f"{module}.weight_shape", f"{stated}, weight_packed is {(out, width)}")
            inn = int(stated[1])
            fits = [g for g in self._groups if g.kind == "int" and g.bits <= 8 and width in _widths(inn, g.bits)]
            where, found = f"{module}.weight_packed", f"{(out, width)} words for {inn} columns"
        else:
            info = stored.expect(f"{module}.weight", (torch.int8, *_FLOAT8), (None, None))
            (out, inn), kind = info.shape, "float" if info.dtype in _FLOAT8 else "int"
            fits = [g for g in self._groups if g.kind == kind and g.bits <= 8]
            where, found, width = f"{module}.weight", f"{info.dtype}", 0
        if 0 in (out, inn):
            raise SpqrError("E501", where, f"shape {(out, inn)}")
        scale = stored.tensors.get(f"{module}.weight_scale")
        if scale is None or scale.dtype not in _SCALES or len(scale.shape) not in (1, 2):
            got = "missing" if scale is None else f"{scale.dtype} {scale.shape}, expected floats by row and group"
            raise SpqrError("E501", f"{module}.weight_scale", got)
        shapes = set()
        for group in fits:
            rows, columns = group.block
            block = (rows or out, columns or inn)
            grid = (-(-out // block[0]), -(-inn // block[1]))
            if scale.shape in (grid, (grid[0] * grid[1],)) and (len(scale.shape) == 2 or grid == (1, 1)):
                shapes.add((group.bits, block, group))
        if len({(bits, block) for bits, block, _ in shapes}) != 1:
            what = f"{found} and scales {scale.shape} fit {len(shapes)} of the config's groups, expected 1"
            raise SpqrError("E501", where, what)
        bits, block, group = shapes.pop()
        stream = packed and self._stream(width, inn, bits)
        if order:
            stored.expect(f"{module}.weight_g_idx", torch.int32, (inn,))
        zeros = self._zeros(module, out, inn, bits, block)
        return scale.dtype, (out, inn), _Shape(out, inn, group, packed, stream, block, zeros, order)

    def _stream(self, width: int, inn: int, bits: int) -> bool:
        stream, fields = _widths(inn, bits)
        if stream != fields:
            return width == stream
        return self._version is not None and self._version >= _DENSE_STREAM  # only tiny matrices get here

    def _zeros(self, module: str, out: int, inn: int, bits: int, block: tuple[int, int]) -> str | None:
        info = self.stored.tensors.get(f"{module}.weight_zero_point")
        if info is None:
            return None
        grid = (-(-out // block[0]), -(-inn // block[1]))
        if info.dtype == torch.int32 and bits <= 8 and info.shape in {(rows, grid[1]) for rows in _widths(out, bits)}:
            return "packed"
        if info.dtype in (torch.int8, *_FLOAT8, *_SCALES) and info.shape in (grid, (grid[0] * grid[1],)):
            return "plain"
        raise SpqrError("E501", f"{module}.weight_zero_point", f"{info.dtype} {info.shape}, the scales are {grid}")

    def _codes(self, module: str) -> torch.Tensor:
        """Signed codes, int8 or float8 [out, in]."""
        shape: _Shape = self.modules[module]
        bits = shape.weights.bits
        if shape.packed:
            unpack = unpack_stream if shape.stream else unpack_fields
            return unpack(self.stored.read(f"{module}.weight_packed"), bits, shape.inn).view(torch.int8).sub_(2 ** (bits - 1))
        codes = self.stored.read(f"{module}.weight")
        if codes.dtype == torch.int8 and not -(2 ** (bits - 1)) <= int(codes.min()) <= int(codes.max()) < 2 ** (bits - 1):
            raise SpqrError("E501", f"{module}.weight", f"{int(codes.min())} .. {int(codes.max())} of {bits} bits")
        return codes

    def _statistics(self, module: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Scales [rows, groups]; zeros int32 alike or None; group of each column."""
        shape: _Shape = self.modules[module]
        bits = shape.weights.bits
        grid = (-(-shape.out // shape.block[0]), -(-shape.inn // shape.block[1]))
        scales = finite(self.stored.read(f"{module}.weight_scale"), f"{module}.weight_scale").reshape(grid)
        zeros = None
        if shape.zeros == "plain":
            plain = self.stored.read(f"{module}.weight_zero_point").float().reshape(grid)
            if bool((plain != plain.round()).any()) or bool((plain.abs() > 128).any()):
                raise SpqrError("E501", f"{module}.weight_zero_point", "a zero point that is no integer -128 .. 128")
            zeros = plain.int()
        elif shape.zeros == "packed":
            words = self.stored.read(f"{module}.weight_zero_point").t().contiguous()
            stream = words.shape[1] == _widths(shape.out, bits)[0] and (
                shape.stream or words.shape[1] != _widths(shape.out, bits)[1]
            )
            raw = (unpack_stream if stream else unpack_fields)(words, bits, shape.out)
            zeros = raw.t().to(torch.int32) - 2 ** (bits - 1)
        groups = torch.arange(shape.inn) // shape.block[1]
        if shape.order:
            given = self.stored.read(f"{module}.weight_g_idx").long()
            if not bool((given == -1).all()):  # all -1: never set
                outside = (given < 0) | (given >= grid[1])
                if bool(outside.any()):
                    place = int(outside.to(torch.uint8).argmax())
                    what = f"{int(given[place])}, expected 0 .. {grid[1] - 1}"
                    raise SpqrError("E501", f"{module}.weight_g_idx[{place}]", what)
                groups = given
        return scales, zeros, groups

    def _dequantize(self, module: str) -> torch.Tensor:
        codes = self._codes(module)
        scales, zeros, groups = self._statistics(module)
        rows = torch.arange(codes.shape[0]) // self.modules[module].block[0]
        return finite(scaled(codes, scales, zeros, rows, groups, scales.dtype), f"{module}.weight")

    def layout(self, name: str) -> Layout | None:
        module = name.removesuffix(".weight")
        if module not in self.modules or name not in self.entries:
            return None
        shape: _Shape = self.modules[module]
        bits = shape.weights.bits
        if shape.weights.kind != "int" or bits not in WEIGHT_BITS:
            kind = "integers" if shape.weights.kind == "int" else "floats"
            raise cannot_hold(name, f"{kind} of {bits} bits, the format has integers of {', '.join(map(str, WEIGHT_BITS))}")
        width = shape.block[1]
        if width % TILE and width < shape.inn:
            raise cannot_hold(name, f"groups of {width} columns, the format has multiples of {TILE}")
        scales, zeros, groups = self._statistics(module)
        if not torch.equal(scales.half().to(scales.dtype), scales):
            raise cannot_hold(name, f"scales of {scales.dtype} that fp16 does not hold exactly")
        natural = torch.arange(shape.inn) // width
        permuted = not torch.equal(groups, natural)
        if permuted and not torch.equal(groups.sort()[0], natural):
            raise cannot_hold(name, f"weight_g_idx makes groups of other sizes than {width} columns")
        if zeros is not None and not -(2 ** (bits - 1)) <= int(zeros.min()) <= int(zeros.max()) <= 255 - 2 ** (bits - 1):
            raise cannot_hold(name, f"zero points {int(zeros.min())} .. {int(zeros.max())} of {bits} bits")
        return Layout(shape.out, shape.inn, bits, -(-width // TILE) * TILE, "direct", permuted=permuted, where=module)

    def matrix(self, name: str) -> SpqrMatrix | None:
        layout = self.layout(name)
        if layout is None:
            return None
        module, offset = layout.where, 2 ** (layout.weight_bits - 1)
        codes = self._codes(module)
        scales, zeros, groups = self._statistics(module)
        perm = None
        if layout.permuted:
            order = torch.argsort(groups, stable=True)
            perm, codes = order.numpy().astype(np.int32), codes[:, order]
        rows = torch.arange(layout.out_features) // self.modules[module].block[0]
        points = torch.full(scales.shape, offset) if zeros is None else zeros + offset
        return SpqrMatrix(
            layout, (codes + offset).view(torch.uint8).numpy(), group_scales=scales.half()[rows].numpy(),
            group_zeros=points[rows].to(torch.uint8).numpy(), perm=perm,
        )  # fmt: skip


def _widths(count: int, bits: int) -> tuple[int, int]:
    """Words for `count` codes: as one stream of bits, and as 32 // bits codes a word."""
    return -(-count * bits // 32), -(-count // (32 // bits))


def _version(text: Any) -> tuple[int, int] | None:
    parts = text.split(".") if isinstance(text, str) else []
    if len(parts) >= 2 and all(len(part) <= 6 and part.isascii() and part.isdigit() for part in parts[:2]):
        return int(parts[0]), int(parts[1])
    return None


def _groups(section: dict[str, Any]) -> set[_Weights]:
    """The different kinds of weights that the config names. E501."""
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise SpqrError("E501", "config.json", f"config_groups = {short(groups)}, expected an object")
    found = set()
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        where = f"config.json config_groups.{short(name)}.weights"
        if not isinstance(weights, dict):
            raise SpqrError("E501", where, f"{short(weights)}, expected an object")
        bits = whole(weights.get("num_bits"), where, "num_bits", 1, 16)
        kind, strategy, size = weights.get("type", "int"), weights.get("strategy"), weights.get("group_size")
        if kind not in ("int", "float") or (kind == "float" and bits != 8):
            raise SpqrError("E501", where, f"{short(kind)} of {bits} bits, which is not read")
        if strategy is None:
            strategy = "tensor" if size is None else "channel" if size == -1 else "group"
        if strategy == "tensor":
            block: tuple[int | None, int | None] = (None, None)
        elif strategy == "channel" or (strategy == "group" and size == -1):
            block = (1, None)
        elif strategy == "group":
            block = (1, whole(size, where, "group_size", 1, 2**31 - 1))
        elif strategy == "block" and isinstance(weights.get("block_structure"), list) and len(weights["block_structure"]) == 2:
            high, wide = (whole(value, where, "block_structure", 1, 2**31 - 1) for value in weights["block_structure"])
            block = (high, wide)
        else:
            raise SpqrError("E501", where, f"strategy {short(strategy)}, which is not read")
        found.add(_Weights(bits, kind, block))
    return found
