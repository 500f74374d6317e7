"""Hugging Face `quant_method: spqr` checkpoints, as SpQR's own convert_to_hf.py writes them: CSR and PTCSR.

Reference: Vahe1994/SpQR, inference/spqr_quant; transformers' integrations/spqr.py. One int64 word of `dense_weights` is a
row of a 16 x 16 tile: bits 0-2 its scale code, 3-5 its zero code, 6-53 sixteen 3-bit codes, 54-61 a byte of the tile's four
fp16 second-order statistics (rows 2b and 2b + 1 both carry byte b). Outliers are ADDED to the dense value.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spqr_format.errors import SpqrError
from spqr_format.layout import TILE, Layout
from spqr_format.matrix import SpqrMatrix

from .base import read_config
from .stored import StoredSource, recognise, whole

_BITS = 3


@dataclass(frozen=True)
class _Shape:
    """out x in of a module, and whether its outliers lie by tiles (PTCSR) or by rows (CSR)."""

    out: int
    inn: int
    tiled: bool
    permuted: bool
    outliers: int


class SpqrHfSource(StoredSource):
    """3 bits, groups of 16 columns, tiles of 16 rows; fp16. `load` rounds every operation to fp16, as the reference does."""

    name = "SpQR (Hugging Face)"
    marks = (".dense_weights",)
    leaves = (".dense_weights", ".row_offsets", ".col_vals", ".in_perm")

    def __init__(self, folder: str | Path) -> None:
        config = read_config(Path(folder))
        self._sizes = _numbers(config)
        self._open(folder, config)
        for key, expected in (("bits", _BITS), ("beta1", TILE), ("beta2", TILE)):
            if key in self.section:
                whole(self.section[key], "config.json", f"quantization_config.{key}", expected, expected)
        # convert_to_hf.py writes these two empty.
        if not self.config.get("architectures"):
            self.config.pop("architectures", None)
        if self.config.get("torch_dtype", ...) is None:
            self.config["torch_dtype"] = "float16"

    @classmethod
    def recognises(cls, folder: Path, config: dict[str, Any]) -> bool:
        return recognise(folder, config, ("spqr",), *cls.marks)

    def notes(self) -> list[str]:
        return [
            "outliers add to the dense value, as this checkpoint's own kernels do; the legacy dump that it was made from "
            "replaces the value, which was calibrated: prefer converting that dump",
            "the reference rounds each operation to fp16; carried-over codes are decoded in fp32",
        ]

    def _module(self, module: str) -> tuple[torch.dtype, tuple[int, int], _Shape]:
        stored = self.stored
        words = stored.expect(f"{module}.dense_weights", torch.int64, (None,)).shape[0]
        rows = stored.expect(f"{module}.row_offsets", torch.int32, (None,)).shape[0] - 1
        # Without outliers the reference writes a float32 tensor of no elements.
        columns = stored.expect(f"{module}.col_vals", (torch.int32, torch.float32), (None,))
        if columns.dtype == torch.float32 and columns.shape != (0,):
            raise SpqrError("E501", f"{columns.file} {module}.col_vals", f"{columns.shape} of float32, expected int32")
        pairs = stored.expect(f"{module}.in_perm", torch.int32, (None,)).shape[0]
        permuted = pairs > 0
        found = []
        for tiled, out in ((False, rows), (True, rows * TILE)):
            if out < TILE or out % TILE or words == 0 or words % out:
                continue
            blocks = words // out
            if permuted:
                if -(-2 * pairs // TILE) == blocks:
                    found.append(_Shape(out, 2 * pairs, tiled, True, columns.shape[0]))
                continue
            wide = [n for n in self._sizes if -(-n // TILE) == blocks]
            found += [_Shape(out, n, tiled, False, columns.shape[0]) for n in wide or [blocks * TILE]]
        sure = [shape for shape in found if {shape.out, shape.inn} <= self._sizes]
        found = sure if len(found) > 1 else found
        if len(found) != 1:
            what = f"{words} words, {rows} row offsets and a permutation of {2 * pairs} columns fit {len(found)} shapes"
            raise SpqrError("E501", f"{module}.dense_weights", what)
        return torch.float16, (found[0].out, found[0].inn), found[0]

    def _dequantize(self, module: str) -> torch.Tensor:
        matrix = self._read(module)
        shape: _Shape = self.modules[module]
        assert matrix.tile_stats is not None
        stats = torch.from_numpy(matrix.tile_stats).repeat_interleave(TILE, 0)
        weight = fp16_dequantize(matrix, stats)
        if matrix.values is not None:
            assert matrix.crow_indices is not None
            assert matrix.col_indices is not None
            rows = torch.from_numpy(np.repeat(np.arange(shape.out), np.diff(matrix.crow_indices)))
            columns = torch.from_numpy(matrix.col_indices)
            weight[rows, columns] = (weight[rows, columns].float() + torch.from_numpy(matrix.values).float()).half()
        return weight

    def matrix(self, name: str) -> SpqrMatrix | None:
        module = name.removesuffix(".weight")
        return self._read(module) if module in self.modules and name in self.entries else None

    def layout(self, name: str) -> Layout | None:
        module = name.removesuffix(".weight")
        if module not in self.modules or name not in self.entries:
            return None
        shape: _Shape = self.modules[module]
        permuted = shape.permuted and not np.array_equal(self._perm(module, shape), np.arange(shape.inn))
        count = int((self.stored.read(f"{module}.col_vals") != 0).sum()) if shape.tiled else shape.outliers
        return Layout(shape.out, shape.inn, _BITS, TILE, "bilevel", count, permuted, where=module)

    def _read(self, module: str) -> SpqrMatrix:
        shape: _Shape = self.modules[module]
        blocks = -(-shape.inn // TILE)
        words = self.stored.read(f"{module}.dense_weights").numpy().reshape(shape.out // TILE, blocks, TILE)
        if (words < 0).any() or (words >> 62).any():
            place = int(((words >> 62) != 0).argmax())
            raise SpqrError("E501", f"{module}.dense_weights[{place}]", "bits 62 and 63 are set, expected 0")
        codes = np.empty((shape.out // TILE, TILE, blocks, TILE), np.uint8)
        for column in range(TILE):
            codes[..., column] = ((words >> (6 + _BITS * column)) & 7).astype(np.uint8).transpose(0, 2, 1)
        flat = codes.reshape(shape.out, blocks * TILE)
        if flat[:, shape.inn :].any():
            raise SpqrError("E501", f"{module}.dense_weights", "codes in padded columns are not 0")
        second = np.ascontiguousarray((words >> 54).astype(np.uint8))
        if (second[..., 0::2] != second[..., 1::2]).any():
            raise SpqrError("E501", f"{module}.dense_weights", "rows of a pair carry different statistics bytes")
        stats = np.ascontiguousarray(second[..., 0::2]).view(np.float16)  # ss, zs, sz, zz
        if not np.isfinite(stats).all():
            raise SpqrError("E501", f"{module}.dense_weights", "a second-order statistic is not finite")
        rows_of = words.transpose(0, 2, 1).reshape(shape.out, blocks)
        perm = self._perm(module, shape) if shape.permuted else None
        crow, columns, values = self._outliers(module, shape, perm)
        if perm is not None and np.array_equal(perm, np.arange(shape.inn)):
            perm = None
        return SpqrMatrix(
            Layout(shape.out, shape.inn, _BITS, TILE, "bilevel", where=module),
            codes=np.ascontiguousarray(flat[:, : shape.inn]),
            scale_codes=(rows_of & 7).astype(np.uint8),
            zero_codes=((rows_of >> 3) & 7).astype(np.uint8),
            tile_stats=np.ascontiguousarray(stats[..., [0, 2, 1, 3]]),
            crow_indices=crow, col_indices=columns, values=values, perm=perm,
        )  # fmt: skip

    def _perm(self, module: str, shape: _Shape) -> npt.NDArray[np.int32]:
        pairs = np.ascontiguousarray(self.stored.read(f"{module}.in_perm").numpy())
        perm = pairs.view(np.uint16).astype(np.int32)
        check_perm(perm, shape.inn, f"{module}.in_perm")
        return perm

    def _outliers(
        self, module: str, shape: _Shape, perm: npt.NDArray[np.int32] | None
    ) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.int64] | None, npt.NDArray[np.float16] | None]:
        offsets = self.stored.read(f"{module}.row_offsets").numpy().astype(np.int64)
        check_offsets(offsets, shape.outliers, f"{module}.row_offsets")
        if shape.outliers == 0:
            return None, None, None
        words = self.stored.read(f"{module}.col_vals").numpy()
        owner = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
        if shape.tiled:
            # Entry e of a tile row belongs to row e % 16 of it; words of zeros pad the shorter rows.
            owner = owner * TILE + (np.arange(words.size) - offsets[owner]) % TILE
            owner, words = owner[words != 0], words[words != 0]
        columns = (words & 0xFFFF).astype(np.int64)
        values = np.ascontiguousarray((words >> 16).astype(np.int16)).view(np.float16)
        return to_csr(owner, columns, values, shape.out, shape.inn, perm, f"{module}.col_vals")


def fp16_dequantize(matrix: SpqrMatrix, stats: torch.Tensor) -> torch.Tensor:
    """The dense part [out, in] in original column order, every operation rounded to the dtype of stats [out, groups, 4]."""
    dtype, width = stats.dtype, matrix.layout.group_size
    assert matrix.scale_codes is not None
    assert matrix.zero_codes is not None
    ss, sz, zs, zz = stats[: matrix.layout.out_features].unbind(-1)
    scales = (torch.from_numpy(matrix.scale_codes).to(dtype) - sz) * ss
    zeros = (torch.from_numpy(matrix.zero_codes).to(dtype) - zz) * zs
    inn = matrix.layout.in_features
    weight = torch.from_numpy(matrix.codes).to(dtype)
    for group in range(matrix.layout.groups):
        part = slice(group * width, min((group + 1) * width, inn))
        weight[:, part] = (weight[:, part] - zeros[:, group, None]) * scales[:, group, None]
    if matrix.perm is not None:
        original = torch.empty_like(weight)
        original[:, torch.from_numpy(matrix.perm).long()] = weight
        weight = original
    return weight


def check_perm(perm: npt.NDArray[Any], size: int, where: str) -> None:
    """E501 where perm is no permutation of 0 .. size - 1."""
    if perm.shape != (size,):
        raise SpqrError("E501", where, f"shape {perm.shape}, expected {(size,)}")
    outside = (perm < 0) | (perm >= size)
    if outside.any():
        place = int(outside.argmax())
        raise SpqrError("E501", f"{where}[{place}]", f"{int(perm[place])}, expected 0 .. {size - 1}")
    counts = np.bincount(perm, minlength=size)
    if (counts != 1).any():
        raise SpqrError("E501", where, f"column {int((counts > 1).argmax())} stands twice")


def check_offsets(offsets: npt.NDArray[np.int64], count: int, where: str) -> None:
    """E501 where row offsets do not start at 0, fall, or do not end at `count`."""
    if offsets[0] != 0 or offsets[-1] != count:
        raise SpqrError("E501", where, f"{int(offsets[0])} .. {int(offsets[-1])}, expected 0 .. {count}")
    if (np.diff(offsets) < 0).any():
        place = int((np.diff(offsets) < 0).argmax()) + 1
        raise SpqrError("E501", f"{where}[{place}]", f"{int(offsets[place])} after {int(offsets[place - 1])}")


def to_csr(
    rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], values: npt.NDArray[np.float16], out: int, inn: int,
    perm: npt.NDArray[np.int32] | None, where: str,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float16]]:  # fmt: skip
    """CSR in original columns that rise within a row, from entries in stored columns and any order. E501."""
    for what, index, size in (("row", rows, out), ("column", columns, inn)):
        outside = (index < 0) | (index >= size)
        if outside.any():
            place = int(outside.argmax())
            raise SpqrError("E501", f"{where}[{place}]", f"{what} {int(index[place])}, expected 0 .. {size - 1}")
    if not np.isfinite(values).all():
        place = int((~np.isfinite(values)).argmax())
        raise SpqrError("E501", f"{where}[{place}]", f"value {values[place]}, expected a finite number")
    if perm is not None:
        columns = perm[columns].astype(np.int64)
    order = np.lexsort((columns, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    double = (np.diff(rows) == 0) & (np.diff(columns) == 0)
    if double.any():
        place = int(double.argmax())
        raise SpqrError("E501", where, f"row {int(rows[place])} has two outliers in column {int(columns[place])}")
    crow = np.concatenate([[0], np.bincount(rows, minlength=out).cumsum()]).astype(np.int64)
    return crow, columns, np.ascontiguousarray(values)


def _numbers(config: dict[str, Any]) -> set[int]:
    """Widths that layers of this model may have, from its config."""
    holders = [config, *(value for value in config.values() if isinstance(value, dict))]
    sizes = {v for holder in holders for v in holder.values() if isinstance(v, int) and not isinstance(v, bool) and v >= TILE}
    for holder in holders:
        hidden, heads = holder.get("hidden_size"), holder.get("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            dim = holder.get("head_dim") or hidden // heads
            for count in (heads, holder.get("num_key_value_heads")):
                if isinstance(count, int) and isinstance(dim, int):
                    sizes.add(count * dim)
    return sizes
