"""Carrying a quantized source's codes over: what becomes of each tensor, and a measurement that nothing was lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from spqr_format.errors import SpqrError
from spqr_format.layout import TILE, Layout, ceil_div
from spqr_format.matrix import PackedMatrix, SpqrMatrix

from .blocks import Plan
from .coverage import STORED
from .sources import Source

_CHUNK = 1 << 17  # weights that are compared at once: what a core keeps near
_SAMPLE = 1 << 19  # weights of a large matrix that are compared as numbers
_TOLERANCE = 1e-3  # relative norm; a tool that rounds every operation to fp16 stays below
_MAY_BE_QUANTISED = ("lm_head", "outside the decoder blocks")


def lossless_plan(todo: Plan, source: Source) -> tuple[Plan, dict[str, Layout]]:
    """The plan of a conversion that only carries codes over, and the geometry of what it carries.

    What the source stores dense stays dense, and so does an output embedding whose codes the format cannot hold.
    Raises E510 for any other module of that kind, and where the source stores no codes at all.
    """
    layouts: dict[str, Layout] = {}
    dense = dict(todo.dense)
    matrices: dict[str, str] = {}
    tied = bool(source.config.get("tie_word_embeddings"))
    for tensor in source.entries:
        reason = todo.dense.get(tensor)
        linear = tensor.endswith(".weight") and reason in _MAY_BE_QUANTISED
        if tensor not in todo.matrices and not (linear and not (tied and reason == "lm_head")):
            continue
        try:
            layout = source.layout(tensor)
        except SpqrError as error:
            if error.code != "E510" or reason != "lm_head":
                raise
            dense[tensor] = f"lm_head, dequantized: {error.what.split(';')[0]}"
            continue
        if layout is not None:
            layouts[tensor] = layout
            matrices[tensor] = tensor.removesuffix(".weight")
            dense.pop(tensor, None)
        elif tensor in todo.matrices:
            dense[tensor] = STORED
    if not layouts:
        what = f"{source.name} stores no codes that could be carried over; convert without --lossless"
        raise SpqrError("E510", str(source.folder), what)
    return replace(todo, matrices=matrices, dense=dense, fused=todo.fused & matrices.keys()), layouts


def most_common(layouts: dict[str, Layout]) -> Layout:
    """The layout whose bits, group size and statistics hold most weights."""
    weights: dict[tuple[int, int, str], int] = {}
    first: dict[tuple[int, int, str], Layout] = {}
    for layout in layouts.values():
        key = (layout.weight_bits, layout.group_size, layout.statistics)
        weights[key] = weights.get(key, 0) + layout.out_features * layout.in_features
        first.setdefault(key, layout)
    return first[max(weights, key=lambda key: weights[key])]


def carry_over(source: Source, tensor: str) -> tuple[SpqrMatrix | PackedMatrix, dict[str, float]]:
    """A weight's codes as they are, and how far they are from the source's own weights (see `compare`; "compared" counts
    the weights where not all were compared as numbers)."""
    carried = source.carried(tensor)
    if carried is None:
        matrix = source.matrix(tensor)
        if matrix is None:
            raise SpqrError("E501", tensor, "the source changed while it was read")
        return matrix, compare(matrix, source.load(tensor), tensor)
    # All codes were compared as bits. Of a large matrix, tiles from the first row to the last are compared as numbers too.
    rows, columns = carried.matrix.layout.out_features, carried.matrix.layout.in_features
    tiles = ceil_div(rows, TILE)
    most = max(2, _SAMPLE // (TILE * columns))
    chosen = range(tiles) if tiles <= most else [i * (tiles - 1) // (most - 1) for i in range(most)]
    difference = _Difference()
    for tile in chosen:
        begin, end = tile * TILE, min((tile + 1) * TILE, rows)
        difference.add(torch.from_numpy(carried.matrix.rows(begin, end).dequantize()), carried.weights(begin, end))
    figures = difference.figures(tensor)
    return carried.matrix, figures if tiles <= most else {**figures, "compared": difference.compared}


def compare(matrix: SpqrMatrix, source: torch.Tensor, name: str) -> dict[str, float]:
    """Measure a carried matrix against the weights that the source's own tool gives (`source`, in the tool's dtype).

    weight_error: relative norm of the difference after the matrix's weights are rounded to that dtype, 0 where every one is
    the same. rounded: weights that are the same only after that rounding. different: weights that are not.
    rounding_error: relative norm of the difference before the rounding. Raises E510 above 1e-3, or above the dtype's own
    precision where that is coarser (bf16: 8e-3).
    """
    rows, columns = matrix.codes.shape
    if tuple(source.shape) != (rows, columns):
        raise SpqrError("E501", name, f"codes of shape {(rows, columns)}, weights of shape {tuple(source.shape)}")
    step = max(TILE, _CHUNK // columns // TILE * TILE)
    difference = _Difference()
    for begin in range(0, rows, step):
        ours = torch.from_numpy(rows_of(matrix, begin, min(begin + step, rows)).dequantize())
        difference.add(ours, source[begin : begin + step])
    return difference.figures(name)


class _Difference:
    """What `compare` measures, piece by piece."""

    def __init__(self) -> None:
        self.rounded = self.different = self.compared = 0
        self.after = self.before = self.norm = 0.0
        self.dtype = torch.float32

    def add(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """float32 weights of ours and the tool's, of one shape."""
        wanted = theirs.float()
        self.dtype = theirs.dtype
        self.compared += wanted.numel()
        self.norm += _square(wanted)
        unequal = _unequal(ours, wanted)
        if not unequal:
            return
        self.before += _square(ours - wanted)
        as_theirs = ours.to(theirs.dtype).float()
        wrong = _unequal(as_theirs, wanted)
        self.rounded += unequal - wrong
        if wrong:
            self.different += wrong
            self.after += _square(as_theirs - wanted)

    def figures(self, name: str) -> dict[str, float]:
        """As `compare` returns them. E510."""
        error = (self.after / self.norm) ** 0.5 if self.norm else float(self.different > 0)
        tolerance = max(_TOLERANCE, torch.finfo(self.dtype).eps)
        if not error <= tolerance:
            raise SpqrError("E510", name, f"the carried codes differ from the source's weights by {error:.3g}, relative norm")
        return {
            "weight_error": error, "rounded": self.rounded, "different": self.different,
            "rounding_error": (self.before / self.norm) ** 0.5 if self.norm else 0.0,
        }  # fmt: skip


def _unequal(a: torch.Tensor, b: torch.Tensor) -> int:
    return int(np.count_nonzero(a.numpy() != b.numpy()))


def _square(values: torch.Tensor) -> float:
    # Not torch.dot: the order of a BLAS's sum, and so its last bit, depends on where the memory lies.
    return float(values.square().sum(dtype=torch.float64))


def rows_of(matrix: SpqrMatrix, begin: int, end: int) -> SpqrMatrix:
    """Rows begin .. end of a matrix; begin is a multiple of 16."""
    layout, rows = matrix.layout, slice(begin, end)
    tiles = slice(begin // TILE, -(-end // TILE))
    crow = columns = values = None
    if matrix.values is not None and matrix.crow_indices is not None and matrix.col_indices is not None:
        part = slice(int(matrix.crow_indices[begin]), int(matrix.crow_indices[end]))
        crow = np.ascontiguousarray(matrix.crow_indices[begin : end + 1] - matrix.crow_indices[begin])
        columns, values = matrix.col_indices[part], matrix.values[part]
    fields = {**layout.as_dict(), "out_features": end - begin, "outliers": 0 if values is None else int(values.size)}
    return SpqrMatrix(
        Layout(**fields, where=layout.where),
        matrix.codes[rows],
        None if matrix.scale_codes is None else matrix.scale_codes[rows],
        None if matrix.zero_codes is None else matrix.zero_codes[rows],
        None if matrix.tile_stats is None else matrix.tile_stats[tiles],
        None if matrix.group_scales is None else matrix.group_scales[rows],
        None if matrix.group_zeros is None else matrix.group_zeros[rows],
        crow,
        columns,
        values,
        matrix.perm,
    )
