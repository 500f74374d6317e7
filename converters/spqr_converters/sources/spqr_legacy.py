"""SpQR's own dumps (`main.py --save DIR`): DIR/<layer>/<sublayer>, DIR/args.pt, DIR/not_quantized_weights.pt.

Reference: Vahe1994/SpQR, modelutils.layer_weight_dequantization. Every operation is rounded to the dump's float type; an
outlier that is not 0 REPLACES the dense value. The format adds, so what is carried over is the outlier minus that value.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spqr_format.errors import SpqrError
from spqr_format.header import short
from spqr_format.layout import TILE, WEIGHT_BITS, Layout
from spqr_format.matrix import SpqrMatrix

from .base import Entry, Source, read_config
from .pickled import load_pickled, plain, relative, tensors_of
from .spqr_hf import check_perm, to_csr
from .stored import DENSE, INDEX, SINGLE, cannot_hold, dense_config, weight_files, whole

_LISTS = (
    "quant_layer_scale", "quant_layer_scale_qq_scale", "quant_layer_scale_qq_zero",
    "quant_layer_zeros", "quant_layer_zero_qq_scale", "quant_layer_zero_qq_zero",
)  # fmt: skip


@dataclass
class _Layer:
    """One dumped matrix, checked. scales and zeros: for each group codes [out] with ss and sz [out], or floats [out]."""

    codes: torch.Tensor  # int8 [out, in], permuted columns
    width: int
    dtype: torch.dtype
    scales: list[tuple[torch.Tensor, ...]]
    zeros: list[tuple[torch.Tensor, ...]]
    rows: int  # that share second-order statistics
    outliers: torch.Tensor  # COO indices int64 [2, nnz], permuted columns
    values: torch.Tensor
    perm: np.ndarray


class SpqrLegacySource(Source):
    """A folder with config.json and the dump, which lies there or in one folder inside. bits, groups and second order as
    dumped; `load` gives the dump's float type."""

    name = "SpQR (legacy dump)"

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = dense_config(read_config(self.folder))
        dump = _dump(self.folder)
        if dump is None:
            raise SpqrError("E501", str(folder), "no folder with args.pt")
        arguments = load_pickled(dump / "args.pt", "args.pt")
        if not isinstance(arguments, dict) or "wbits" not in arguments:
            raise SpqrError("E501", "args.pt", "not the arguments of SpQR's main.py")
        self.bits = whole(arguments["wbits"], "args.pt", "wbits", 1, 8)
        self.files = [relative(dump / "args.pt", self.folder)]
        self.entries: dict[str, Entry] = {}
        self._layers: dict[str, Path] = {}
        dense = dump / "not_quantized_weights.pt"
        if not dense.is_file():
            raise SpqrError("E501", relative(dense, self.folder), "the file is missing")
        self._dense = dense
        for key, tensor in self._read_dense().items():
            if tensor.dtype not in DENSE:
                raise SpqrError("E501", f"not_quantized_weights.pt {key}", f"dtype {tensor.dtype}, expected floats")
            size = tensor.numel() * tensor.element_size()
            self.entries[key] = Entry(relative(dense, self.folder), tensor.dtype, tuple(tensor.shape), 0, size)
        self.files.append(relative(dense, self.folder))
        prefix = _prefix(self.entries)
        layers = sorted((f for f in dump.iterdir() if f.is_dir() and f.name.isdigit()), key=lambda f: int(f.name))
        for layer in layers:
            for file in sorted(layer.iterdir()):
                if not file.is_file() or file.name.startswith("."):
                    continue
                module = f"{prefix}.{int(layer.name)}.{file.name}"
                name = f"{module}.weight"
                if name in self.entries:
                    raise SpqrError("E501", relative(file, self.folder), f"{module} is in not_quantized_weights.pt too")
                self._layers[name] = file
                out, inn, dtype = self._shape(self._raw(file), file)
                self.entries[name] = Entry("", dtype, (out, inn), 0, file.stat().st_size)
                self.files.append(relative(file, self.folder))
        if not self._layers:
            raise SpqrError("E501", str(dump), "no quantized layers: no folders named 0, 1, ...")

    @classmethod
    def recognises(cls, folder: Path, config: dict[str, Any]) -> bool:
        beside = bool(weight_files(folder, INDEX, SINGLE)) and not (folder / "args.pt").is_file()
        return _dump(folder) is not None and not beside  # a dense model may have its dump in a folder inside

    def notes(self) -> list[str]:
        return [
            "outliers replace the dense value here; carried over, the fp16 difference is stored and added, which gives the "
            "outlier to fp16 precision of that difference",
            "the dump rounds each operation to its float type; carried-over codes are decoded in fp32",
        ]

    def load(self, name: str) -> torch.Tensor:
        if name not in self.entries:
            raise SpqrError("E501", str(self.folder), f"tensor {name} is missing")
        if name not in self._layers:
            tensors = self._read_dense()
            if name not in tensors or tuple(tensors[name].shape) != self.entries[name].shape:
                raise SpqrError("E501", "not_quantized_weights.pt", f"{name} changed while it was read")
            return tensors[name].clone()
        layer = self._layer(self._layers[name])
        weight = layer.codes.to(layer.dtype)
        for group in range(len(layer.scales)):
            part = slice(group * layer.width, (group + 1) * layer.width)
            scale, zero = _first_order(layer.scales[group]), _first_order(layer.zeros[group])
            weight[:, part] = (weight[:, part] - zero[:, None]) * scale[:, None]
        kept = layer.values != 0
        weight[layer.outliers[0, kept], layer.outliers[1, kept]] = layer.values[kept]
        original = torch.empty_like(weight)
        original[:, torch.from_numpy(layer.perm).long()] = weight
        return original

    def matrix(self, name: str) -> SpqrMatrix | None:
        if name not in self._layers:
            return None
        layer = self._layer(self._layers[name])
        out, inn = layer.codes.shape
        if self.bits not in WEIGHT_BITS:
            raise cannot_hold(name, f"{self.bits} bits, the format has {', '.join(map(str, WEIGHT_BITS))}")
        if layer.width % TILE and layer.width < inn:
            raise cannot_hold(name, f"groups of {layer.width} columns, the format has multiples of {TILE}")
        width = -(-layer.width // TILE) * TILE
        second = {len(part) == 3 for part in (*layer.scales, *layer.zeros)}
        perm = None if np.array_equal(layer.perm, np.arange(inn)) else layer.perm.astype(np.int32)
        statistics = "bilevel" if second == {True} else "direct"
        shape = Layout(out, inn, self.bits, width, statistics, where=name.removesuffix(".weight"))  # type: ignore[arg-type]
        if second == {True, False}:
            raise cannot_hold(name, "only scales or only zeros have second-order statistics")
        arrays = self._bilevel(layer, name) if second == {True} else self._direct(layer, name)
        matrix = SpqrMatrix(shape, layer.codes.numpy().astype(np.uint8), perm=perm, **arrays)
        kept = layer.values != 0
        rows, columns = (index.numpy() for index in layer.outliers[:, kept])
        if rows.size == 0:
            return matrix
        outliers = layer.values[kept].float().numpy()
        difference = outliers - _dense_at(matrix, rows, columns)
        with np.errstate(over="ignore"):
            values = difference.astype(np.float16)
        if not np.isfinite(values).all():
            raise cannot_hold(name, f"an outlier of {float(np.abs(outliers).max())}, the limit of fp16 is 65504")
        file = relative(self._layers[name], self.folder)
        crow, col, values = to_csr(rows, columns, values, out, inn, layer.perm.astype(np.int32), f"{file} outliers_matrix")
        return SpqrMatrix(shape, matrix.codes, perm=perm, crow_indices=crow, col_indices=col, values=values, **arrays)

    def _bilevel(self, layer: _Layer, name: str) -> dict[str, np.ndarray]:
        if layer.rows != TILE:
            raise cannot_hold(name, f"{layer.rows} rows share second-order statistics, the format has {TILE}")
        found: dict[str, np.ndarray] = {}
        quads = []
        for key, parts in (("scale_codes", layer.scales), ("zero_codes", layer.zeros)):
            codes = torch.stack([part[0] for part in parts], 1)
            if int(codes.max()) > 7:
                raise cannot_hold(name, f"a statistics code of {int(codes.max())}, the format has 0 .. 7")
            found[key] = codes.numpy().astype(np.uint8)
            for k in (1, 2):
                stats = torch.stack([part[k][::TILE] for part in parts], 1)
                quads.append(_fp16(stats, name).numpy())
        found["tile_stats"] = np.stack(quads, -1)
        return found

    def _direct(self, layer: _Layer, name: str) -> dict[str, np.ndarray]:
        zeros = torch.stack([part[0] for part in layer.zeros], 1).float()
        if bool((zeros != zeros.round()).any()) or bool((zeros < 0).any()) or bool((zeros > 255).any()):
            raise cannot_hold(name, "no second-order statistics and zeros that are not integers 0 .. 255")
        scales = _fp16(torch.stack([part[0] for part in layer.scales], 1), name)
        return {"group_scales": scales.numpy(), "group_zeros": zeros.numpy().astype(np.uint8)}

    def _read_dense(self) -> dict[str, torch.Tensor]:
        name = relative(self._dense, self.folder)
        return tensors_of(load_pickled(self._dense, name), self._dense.stat().st_size, name)

    def _raw(self, file: Path) -> dict[str, Any]:
        value = load_pickled(file, relative(file, self.folder))
        if not isinstance(value, dict) or "quant_weights" not in value:
            raise SpqrError("E501", relative(file, self.folder), "not a layer of SpQR's dump: no quant_weights")
        return value

    def _shape(self, value: dict[str, Any], file: Path) -> tuple[int, int, torch.dtype]:
        where = relative(file, self.folder)
        codes = plain(value["quant_weights"], file.stat().st_size, f"{where} quant_weights")
        dtype = value.get("save_float_dtype")
        if codes.dtype not in (torch.int8, torch.uint8) or codes.dim() != 2 or 0 in codes.shape:
            raise SpqrError("E501", f"{where} quant_weights", f"{tuple(codes.shape)} of {codes.dtype}, expected int8 [out, in]")
        if dtype not in DENSE:
            raise SpqrError("E501", f"{where} save_float_dtype", f"{short(dtype)}, expected a float type")
        return codes.shape[0], codes.shape[1], dtype

    def _layer(self, file: Path) -> _Layer:
        value, where, size = self._raw(file), relative(file, self.folder), file.stat().st_size
        out, inn, dtype = self._shape(value, file)
        codes = value["quant_weights"].detach().clone()
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= 2**self.bits:
            raise SpqrError("E501", f"{where} quant_weights", f"codes {low} .. {high} of {self.bits} bits")
        width = value.get("groupsize")
        width = inn if width is None else whole(width, where, "groupsize", 1, 2**31 - 1)
        groups = -(-inn // width)
        lists = {key: value.get(key) for key in _LISTS}
        for key, parts in lists.items():
            if not isinstance(parts, list) or len(parts) not in ((groups,) if key.count("_") == 2 else (0, groups)):
                length = len(parts) if isinstance(parts, list) else type(parts).__name__
                raise SpqrError("E501", f"{where} {key}", f"{length} groups, expected {groups}")
        scales, rows = _statistics(lists, "scale", "scale", out, dtype, size, where)
        zeros, rows_of_zeros = _statistics(lists, "zeros", "zero", out, dtype, size, where)
        if rows != rows_of_zeros and min(rows, rows_of_zeros) > 1:
            raise SpqrError("E501", f"{where} quant_layer_zeros", f"{rows_of_zeros} rows a tile, the scales have {rows}")
        perm = plain(value.get("perm"), size, f"{where} perm")
        if perm.dtype not in (torch.int32, torch.int64):
            raise SpqrError("E501", f"{where} perm", f"{perm.dtype}, expected int32")
        check_perm(perm.numpy().reshape(-1), inn, f"{where} perm")
        indices, values = _outliers(value.get("outliers_matrix"), out, inn, dtype, size, f"{where} outliers_matrix")
        return _Layer(codes, width, dtype, scales, zeros, max(rows, rows_of_zeros), indices, values, perm.numpy().reshape(-1))


def _dump(folder: Path) -> Path | None:
    """The folder with args.pt: this one, or the only one inside that has it."""
    if (folder / "args.pt").is_file():
        return folder
    inside = [child.parent for child in sorted(folder.glob("*/args.pt"))]
    return inside[0] if len(inside) == 1 else None


def _prefix(names: dict[str, Entry]) -> str:
    """Where the decoder blocks hang, as the names of their norms say."""
    found = Counter(match[1] for name in names if (match := re.match(r"(.+?)\.\d+\.", name)))
    return found.most_common(1)[0][0] if found else "model.layers"


def _statistics(
    lists: dict[str, Any], key: str, second: str, out: int, dtype: torch.dtype, size: int, where: str
) -> tuple[list[tuple[torch.Tensor, ...]], int]:
    """For each group (codes, scale, zero) repeated to [out], or (floats,); and the rows that share a second order (1: none)."""
    first = lists[f"quant_layer_{key}"]
    scales, zeros = lists[f"quant_layer_{second}_qq_scale"], lists[f"quant_layer_{second}_qq_zero"]
    if len(scales) != len(zeros):
        raise SpqrError("E501", f"{where} quant_layer_{second}_qq_zero", f"{len(zeros)} groups, expected {len(scales)}")
    result: list[tuple[torch.Tensor, ...]] = []
    shared: set[int] = set()
    for group, part in enumerate(first):
        here = f"{where} quant_layer_{key}[{group}]"
        part = plain(part, size, here)
        if part.numel() != out:
            raise SpqrError("E501", here, f"shape {tuple(part.shape)}, expected {out} values")
        if not scales:
            if part.dtype not in DENSE or not bool(torch.isfinite(part).all()):
                raise SpqrError("E501", here, f"{part.dtype}, expected finite floats")
            result.append((part.reshape(-1).to(dtype),))
            shared.add(1)
            continue
        if part.dtype not in (torch.int8, torch.uint8) or part.dim() != 2:
            raise SpqrError("E501", here, f"{tuple(part.shape)} of {part.dtype}, expected int8 codes by tiles")
        if int(part.min()) < 0:
            raise SpqrError("E501", here, f"the code {int(part.min())}, expected 0 .. 127")
        stats = []
        for what, others in (("scale", scales), ("zero", zeros)):
            there = f"{where} quant_layer_{second}_qq_{what}[{group}]"
            other = plain(others[group], size, there)
            if other.dtype not in DENSE or other.numel() != part.shape[0] or not bool(torch.isfinite(other).all()):
                expected = f"{part.shape[0]} finite floats"
                raise SpqrError("E501", there, f"{tuple(other.shape)} of {other.dtype}, expected {expected}")
            stats.append(other.reshape(-1).to(dtype).repeat_interleave(part.shape[1]))
        shared.add(part.shape[1])
        result.append((part.reshape(-1), *stats))
    if len(shared) != 1:
        raise SpqrError("E501", f"{where} quant_layer_{key}", f"tiles of {sorted(shared)} rows, expected one height")
    return result, shared.pop()


def _outliers(matrix: Any, out: int, inn: int, dtype: torch.dtype, size: int, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(matrix, torch.Tensor) or matrix.layout != torch.sparse_coo or tuple(matrix.shape) != (out, inn):
        found = f"{tuple(matrix.shape)} {matrix.layout}" if isinstance(matrix, torch.Tensor) else type(matrix).__name__
        raise SpqrError("E501", where, f"{found}, expected a sparse COO tensor {(out, inn)}")
    matrix = matrix.detach()
    indices = plain(matrix._indices(), size, f"{where} indices")
    values = plain(matrix._values(), size, f"{where} values")
    if values.dtype not in DENSE or values.dim() != 1 or tuple(indices.shape) != (2, values.numel()):
        raise SpqrError("E501", where, f"{tuple(values.shape)} values of {values.dtype}, {tuple(indices.shape)} indices")
    if not bool(torch.isfinite(values).all()):
        raise SpqrError("E501", where, "an outlier is not finite")
    if values.numel():
        for axis, limit in ((0, out), (1, inn)):
            low, high = int(indices[axis].min()), int(indices[axis].max())
            if low < 0 or high >= limit:
                raise SpqrError("E501", where, f"indices {low} .. {high}, expected 0 .. {limit - 1}")
        flat = indices[0] * inn + indices[1]
        if flat.unique().numel() != flat.numel():
            raise SpqrError("E501", where, "two outliers in one place")
    return indices.clone(), values.to(dtype)


def _dense_at(matrix: SpqrMatrix, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """What `matrix.dequantize()` has in these rows and stored columns, by the same float32 arithmetic."""
    groups = columns // matrix.layout.group_size
    codes = matrix.codes[rows, columns].astype(np.float32)
    if matrix.tile_stats is None:
        assert matrix.group_scales is not None
        assert matrix.group_zeros is not None
        scales, zeros = matrix.group_scales[rows, groups], matrix.group_zeros[rows, groups]
        return scales.astype(np.float32) * (codes - zeros.astype(np.float32))
    assert matrix.scale_codes is not None
    assert matrix.zero_codes is not None
    ss, sz, zs, zz = matrix.tile_stats[rows // TILE, groups].astype(np.float32).T
    scale = ss * (matrix.scale_codes[rows, groups].astype(np.float32) - sz)
    zero = zs * (matrix.zero_codes[rows, groups].astype(np.float32) - zz)
    return scale * (codes - zero)


def _first_order(part: tuple[torch.Tensor, ...]) -> torch.Tensor:
    if len(part) == 1:
        return part[0]
    codes, scale, zero = part
    return scale * (codes.to(scale.dtype) - zero)


def _fp16(values: torch.Tensor, name: str) -> torch.Tensor:
    half = values.half()
    if not torch.equal(half.to(values.dtype), values):
        raise cannot_hold(name, f"statistics of {str(values.dtype).removeprefix('torch.')} that fp16 does not hold exactly")
    return half
