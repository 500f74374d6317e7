"""Sizes: every count, shape and byte number of one quantized matrix, derived once, in Python ints."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .errors import SpqrError
from .header import DTYPE_BYTES

TILE = 16  # rows of a tile, and columns of a column block (spec 2.2)
LANES = 8  # a lane holds rows l and l + 8 of a tile (spec 4.1)
CHUNK = 16  # column blocks of a chunk, whose words lie together (spec 4.2)
CELL_COLUMNS = 128  # a cell, which owns a run of outliers, is a tile and so many columns (spec 5.3)
PANEL_COLUMNS = 4096  # an outlier's word has its column modulo this
WEIGHT_BITS = (2, 3, 4)
MAX_DIMENSION = 2**31 - 1  # what a kernel takes as int32 (rule E006)
MAX_ELEMENTS = 2**40
MAX_OUTLIERS = 2**31 - 1

Statistics = Literal["bilevel", "direct"]


def ceil_div(a: int, b: int) -> int:
    """Smallest integer that is at least a / b, for a >= 0 and b > 0."""
    return -(-a // b)


@dataclass(frozen=True)
class TensorSpec:
    """dtype (a safetensors name) and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Geometry of one quantized matrix W[out_features, in_features] (spec 2 and 5).

    outliers is the number of stored outliers. permuted says that groups are taken along permuted columns.
    Raises SpqrError E104 for a value that the format does not have and E006 for a size above its limits.
    """

    out_features: int
    in_features: int
    weight_bits: int = 3
    group_size: int = 16
    statistics: Statistics = "bilevel"
    outliers: int = 0
    permuted: bool = False
    where: str = field(default="layout", compare=False, repr=False)  # names the module in errors

    def __post_init__(self) -> None:
        for name in ("out_features", "in_features", "weight_bits", "group_size", "outliers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise SpqrError("E104", self.where, f"{name} = {value!r} is not an integer")
        for name in ("out_features", "in_features"):
            value = getattr(self, name)
            if value < 1:
                raise SpqrError("E104", self.where, f"{name} = {value}, expected at least 1")
            if value > MAX_DIMENSION:
                raise SpqrError("E006", self.where, f"{name} = {value}, the limit is {MAX_DIMENSION}")
        if self.out_features * self.in_features > MAX_ELEMENTS:
            raise SpqrError("E006", self.where, f"{self.out_features} x {self.in_features} weights, limit 2**40")
        if self.weight_bits not in WEIGHT_BITS:
            raise SpqrError("E104", self.where, f"weight_bits = {self.weight_bits}, expected one of {WEIGHT_BITS}")
        if self.group_size < TILE or self.group_size % TILE or self.group_size > MAX_DIMENSION:
            raise SpqrError("E104", self.where, f"group_size = {self.group_size}, expected a multiple of {TILE}")
        if self.statistics not in ("bilevel", "direct"):
            raise SpqrError("E104", self.where, f"statistics = {self.statistics!r}, expected bilevel or direct")
        if not 0 <= self.outliers <= min(self.out_features * self.in_features, MAX_OUTLIERS):
            raise SpqrError("E006", self.where, f"{self.outliers} outliers")
        # Layouts are looked up at every product. Of numbers alone: a string's hash differs in another process.
        key = (self.out_features, self.in_features, self.weight_bits, self.group_size, self.statistics == "bilevel")
        object.__setattr__(self, "_hash", hash((*key, self.outliers, self.permuted)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    @property
    def tile_rows(self) -> int:
        """Tiles of 16 rows, the last one padded."""
        return ceil_div(self.out_features, TILE)

    @property
    def blocks(self) -> int:
        """Column blocks of 16 columns, the last one padded."""
        return ceil_div(self.in_features, TILE)

    @property
    def groups(self) -> int:
        """Groups of group_size columns, the last one possibly shorter."""
        return ceil_div(self.in_features, self.group_size)

    @property
    def cells_a_tile(self) -> int:
        """Cells of 128 columns, the last one possibly narrower."""
        return ceil_div(self.in_features, CELL_COLUMNS)

    @property
    def cells(self) -> int:
        """Cells of all tiles; that of a column is tile * cells_a_tile + column // 128 (spec 5.3)."""
        return self.tile_rows * self.cells_a_tile

    def tensors(self) -> dict[str, TensorSpec]:
        """Leaf name -> dtype and shape of every tensor that this matrix stores, without its bias (spec 5)."""
        specs = {"weight": TensorSpec("I32", (self.tile_rows, LANES * self.weight_bits * self.blocks))}
        if self.statistics == "bilevel":
            specs["stat_codes"] = TensorSpec("I32", (self.tile_rows, 3 * self.groups))
            specs["tile_stats"] = TensorSpec("I16", (self.tile_rows, self.groups * 4))
        else:
            specs["group_sc"] = TensorSpec("I16", (self.out_features, self.groups))
            specs["group_zp"] = TensorSpec("U8", (self.out_features, self.groups))
        if self.outliers:
            specs["outlier_ptr"] = TensorSpec("I32", (self.cells + 1,))
            specs["outliers"] = TensorSpec("I32", (self.outliers,))
        if self.permuted:
            specs["perm"] = TensorSpec("I32", (self.in_features,))
        return specs

    def stored_bytes(self, outliers: int | None = None) -> int:
        """Bytes of all stored tensors, optionally with another number of outliers."""
        layout = self if outliers is None else self.with_outliers(outliers)
        return sum(spec.nbytes for spec in layout.tensors().values())

    def bits_per_weight(self, outliers: int | None = None) -> float:
        """Stored bits for each of the out_features x in_features weights."""
        return 8 * self.stored_bytes(outliers) / (self.out_features * self.in_features)

    def with_outliers(self, outliers: int) -> Layout:
        """The same geometry with another number of outliers."""
        return Layout(**{**self.as_dict(), "outliers": outliers, "where": self.where})

    def as_dict(self) -> dict[str, Any]:
        """The fields as they stand in a shard's metadata (spec 7.2)."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "where"}
