"""One quantized matrix in plain integers and floats, and its stored tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import SpqrError
from .layout import TILE, Layout, ceil_div
from .packing import pack_codes, pack_outliers, pack_stat_codes, unpack_codes, unpack_outliers, unpack_stat_codes

Array = npt.NDArray[np.generic]


@dataclass(eq=False)
class SpqrMatrix:
    """W[out, in] = s * (q - z) + S, before it is packed (spec 2 and 3).

    codes uint8 [out, in]: q, below 2**weight_bits, in stored (possibly permuted) column order.
    bilevel: scale_codes, zero_codes uint8 [out, groups] below 8; tile_stats float16 [tile_rows, groups, 4] = (ss, sz, zs, zz).
    direct: group_scales float16 [out, groups]; group_zeros uint8 [out, groups].
    CSR, all three or none: crow_indices int64 [out + 1]; col_indices int64 [nnz], original columns that rise within a
    row; values float16 [nnz], which add to s * (q - z). Stored, they lie in cells (spec 5.3).
    perm int32 [in] or None: stored column j is original column perm[j].
    Raises SpqrError E110 where an array's shape does not fit the layout.
    """

    layout: Layout
    codes: npt.NDArray[np.uint8]
    scale_codes: npt.NDArray[np.uint8] | None = None
    zero_codes: npt.NDArray[np.uint8] | None = None
    tile_stats: npt.NDArray[np.float16] | None = None
    group_scales: npt.NDArray[np.float16] | None = None
    group_zeros: npt.NDArray[np.uint8] | None = None
    crow_indices: npt.NDArray[np.int64] | None = None
    col_indices: npt.NDArray[np.int64] | None = None
    values: npt.NDArray[np.float16] | None = None
    perm: npt.NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        nnz = 0 if self.values is None else int(self.values.size)
        if nnz != self.layout.outliers or (self.perm is not None) != self.layout.permuted:
            fields = {**self.layout.as_dict(), "outliers": nnz, "permuted": self.perm is not None}
            self.layout = Layout(**fields, where=self.layout.where)
        if nnz == 0:
            self.crow_indices = self.col_indices = self.values = None
        size = self.layout
        per_group = (size.out_features, size.groups)
        shapes: dict[str, tuple[int, ...]] = {"codes": (size.out_features, size.in_features)}
        if size.statistics == "bilevel":
            shapes |= {"scale_codes": per_group, "zero_codes": per_group, "tile_stats": (size.tile_rows, size.groups, 4)}
        else:
            shapes |= {"group_scales": per_group, "group_zeros": per_group}
        if nnz:
            shapes |= {"crow_indices": (size.out_features + 1,), "col_indices": (nnz,)}
        if size.permuted:
            shapes["perm"] = (size.in_features,)
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is None or array.shape != shape:
                found = None if array is None else array.shape
                raise SpqrError("E110", f"{size.where}.{name}", f"shape {found}, expected {shape}")

    def pack(self) -> dict[str, Array]:
        """Leaf name -> stored tensor, with the dtypes and shapes of `layout.tensors()`.

        Raises SpqrError E301 .. E305 where the outliers are no CSR.
        """
        tensors: dict[str, Array] = {"weight": pack_codes(self.codes, self.layout.weight_bits)}
        if self.layout.statistics == "bilevel":
            assert self.scale_codes is not None
            assert self.zero_codes is not None
            assert self.tile_stats is not None
            tensors["stat_codes"] = pack_stat_codes(self.scale_codes, self.zero_codes)
            stats = np.ascontiguousarray(self.tile_stats, np.float16)
            tensors["tile_stats"] = stats.reshape(self.layout.tile_rows, -1).view(np.int16)
        else:
            tensors["group_sc"] = np.ascontiguousarray(self.group_scales, np.float16).view(np.int16)
            tensors["group_zp"] = np.ascontiguousarray(self.group_zeros, np.uint8)
        if self.values is not None:
            assert self.crow_indices is not None
            assert self.col_indices is not None
            tensors["outlier_ptr"], tensors["outliers"] = pack_outliers(
                self.crow_indices, self.col_indices, self.values, self.layout.in_features, f"{self.layout.where}.outliers"
            )
        if self.perm is not None:
            tensors["perm"] = np.ascontiguousarray(self.perm, np.int32)
        return tensors

    @classmethod
    def unpack(cls, layout: Layout, tensors: Mapping[str, Array]) -> SpqrMatrix:
        """The inverse of `pack`. The tensors must have the dtypes and shapes of `layout.tensors()` (see validate)."""
        out, inn = layout.out_features, layout.in_features
        arrays: dict[str, Array | None] = {
            "codes": unpack_codes(tensors["weight"], layout.weight_bits)[:out, :inn]  # type: ignore[arg-type]
        }
        if layout.statistics == "bilevel":
            scale_codes, zero_codes = unpack_stat_codes(tensors["stat_codes"])  # type: ignore[arg-type]
            arrays |= {"scale_codes": scale_codes[:out], "zero_codes": zero_codes[:out]}
            stats = np.ascontiguousarray(tensors["tile_stats"]).view(np.float16)
            arrays["tile_stats"] = stats.reshape(layout.tile_rows, layout.groups, 4)
        else:
            arrays["group_scales"] = np.ascontiguousarray(tensors["group_sc"]).view(np.float16)
            arrays["group_zeros"] = tensors["group_zp"]
        if layout.outliers:
            csr = unpack_outliers(tensors["outlier_ptr"], tensors["outliers"], out, inn)  # type: ignore[arg-type]
            arrays |= zip(("crow_indices", "col_indices", "values"), csr, strict=True)
        if layout.permuted:
            arrays["perm"] = tensors["perm"]
        return cls(layout, **arrays)  # type: ignore[arg-type]

    def dequantize(self) -> npt.NDArray[np.float32]:
        """W float32 [out, in] in original column order, by the exact arithmetic of spec 3."""
        f32 = np.float32
        if self.layout.statistics == "bilevel":
            assert self.scale_codes is not None
            assert self.zero_codes is not None
            assert self.tile_stats is not None
            stats = self.tile_stats.astype(f32).repeat(TILE, axis=0)[: self.layout.out_features]
            scales = stats[..., 0] * (self.scale_codes.astype(f32) - stats[..., 1])
            zeros = stats[..., 2] * (self.zero_codes.astype(f32) - stats[..., 3])
        else:
            assert self.group_scales is not None
            assert self.group_zeros is not None
            scales, zeros = self.group_scales.astype(f32), self.group_zeros.astype(f32)
        inn, g = self.layout.in_features, self.layout.group_size
        per_column = [x.repeat(g, axis=1)[:, :inn] for x in (scales, zeros)]
        weight = per_column[0] * (self.codes.astype(f32) - per_column[1])
        if self.perm is not None:
            stored = np.empty(inn, np.intp)
            stored[self.perm] = np.arange(inn)
            weight = np.take(weight, stored, axis=1)
        if self.values is not None:
            assert self.crow_indices is not None
            assert self.col_indices is not None
            rows = np.repeat(np.arange(self.layout.out_features), np.diff(self.crow_indices))
            weight[rows, self.col_indices] += self.values.astype(f32)
        return weight


@dataclass(eq=False)
class PackedMatrix:
    """A quantized matrix in its stored form: `tensors` as `SpqrMatrix.pack` gives them, with the dtypes and shapes of
    `layout.tensors()`."""

    layout: Layout
    tensors: dict[str, Array]

    def pack(self) -> dict[str, Array]:
        """Leaf name -> stored tensor."""
        return self.tensors

    def rows(self, begin: int, end: int) -> SpqrMatrix:
        """Rows begin .. end, unpacked: direct statistics without outliers; begin is a multiple of 16."""
        if self.layout.statistics != "direct" or self.layout.outliers or begin % TILE:
            raise ValueError(f"rows {begin} .. {end} of {self.layout}")
        part = {**self.tensors, "weight": self.tensors["weight"][begin // TILE : ceil_div(end, TILE)]}
        for leaf in ("group_sc", "group_zp"):
            part[leaf] = self.tensors[leaf][begin:end]
        fields = {**self.layout.as_dict(), "out_features": end - begin}
        return SpqrMatrix.unpack(Layout(**fields, where=self.layout.where), part)
