"""The bytes of a module's tensors: every rule E2xx and E3xx, in blocks of bounded memory (spec 4 to 6).

Outliers have pointers and positions: whoever hands them to a kernel has called `check_payload` on exactly those bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .errors import SpqrError
from .layout import CELL_COLUMNS, CHUNK, PANEL_COLUMNS, TILE, Layout
from .packing import SET, first_of_panel, pack_codes, pack_stat_codes

Array = npt.NDArray[np.generic]
BLOCK = 2**18  # elements that are looked at at a time
PERM_WINDOW = 2**24  # values whose uniqueness is checked at a time
POSITIONS = TILE * PANEL_COLUMNS  # of outliers (spec 5.3)

ITEM = {"I32": 4, "I16": 2, "U8": 1}


class Tensor(Protocol):
    """A stored tensor that is read piece by piece; a numpy array will do where its bytes are in memory anyway."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""

    def flat(self, begin: int, end: int) -> Array:
        """Elements [begin, end) in row-major order."""


class InMemory:
    """A numpy array as a `Tensor`."""

    def __init__(self, array: Array) -> None:
        self.shape = array.shape
        self.itemsize = array.dtype.itemsize
        self._flat = np.ascontiguousarray(array).reshape(-1)

    def flat(self, begin: int, end: int) -> Array:
        """Elements [begin, end) in row-major order."""
        return self._flat[begin:end]


def check_payload(layout: Layout, tensors: Mapping[str, Array], where: str) -> None:
    """Raises the first broken rule E201 .. E203 or E301 .. E306 of one module, named by tensor, index and value.

    `tensors` holds what `layout.tensors()` lists; a missing one is E107, another dtype E109, another shape E110.
    """
    views: dict[str, InMemory] = {}
    for leaf, spec in layout.tensors().items():
        if leaf not in tensors:
            raise SpqrError("E107", f"{where}.{leaf}", "the tensor is missing")
        view = views[leaf] = InMemory(np.asarray(tensors[leaf]))
        if view.itemsize != ITEM[spec.dtype]:
            raise SpqrError("E109", f"{where}.{leaf}", f"{tensors[leaf].dtype}, expected {spec.dtype}")
        if view.shape != spec.shape:
            raise SpqrError("E110", f"{where}.{leaf}", f"shape {view.shape}, expected {spec.shape}")
    for error in broken_rules(layout, views, where):
        raise error


def broken_rules(layout: Layout, tensors: Mapping[str, Tensor], where: str) -> Iterator[SpqrError]:
    """The broken payload rules of one module with right dtypes and shapes: the first place of each rule and tensor."""
    statistics = "tile_stats" if layout.statistics == "bilevel" else "group_sc"
    yield from _not_finite(tensors[statistics], "F16", "E201", f"{where}.{statistics}")
    yield from _padding(layout, tensors, where)
    if layout.permuted:
        yield from _perm(tensors["perm"], layout.in_features, f"{where}.perm")
    if layout.outliers:
        pointers = list(_pointers(tensors["outlier_ptr"], layout, f"{where}.outlier_ptr"))
        yield from pointers
        if not pointers:  # which say in which cell a position is
            yield from _positions(tensors["outlier_ptr"], tensors["outliers"], layout, f"{where}.outliers")
        yield from _not_finite(tensors["outliers"], OUTLIER, "E306", f"{where}.outliers")


OUTLIER = "outlier"  # a word with an fp16 value in its high half

# dtype -> (unsigned type of its bits, test for "not finite" on those bits)
_Bits = npt.NDArray[np.unsignedinteger]
NOT_FINITE: dict[str, tuple[type[np.unsignedinteger], Callable[[_Bits], npt.NDArray[np.bool_]]]] = {
    "F16": (np.uint16, lambda x: (x & 0x7C00) == 0x7C00),
    "BF16": (np.uint16, lambda x: (x & 0x7F80) == 0x7F80),
    OUTLIER: (np.uint32, lambda x: (x & 0x7C000000) == 0x7C000000),
    "F32": (np.uint32, lambda x: (x & 0x7F800000) == 0x7F800000),
    "C64": (np.uint32, lambda x: (x & 0x7F800000) == 0x7F800000),
    "F64": (np.uint64, lambda x: (x & 0x7FF0000000000000) == 0x7FF0000000000000),
    "F8_E4M3": (np.uint8, lambda x: (x & 0x7F) == 0x7F),
    "F8_E5M2": (np.uint8, lambda x: (x & 0x7C) == 0x7C),
    "F8_E4M3FNUZ": (np.uint8, lambda x: x == 0x80),
    "F8_E5M2FNUZ": (np.uint8, lambda x: x == 0x80),
    "F8_E8M0": (np.uint8, lambda x: x == 0xFF),
}


def not_finite_dense(tensor: Tensor, dtype: str, where: str) -> Iterator[SpqrError]:
    """E204 for the first NaN or infinity of a bias or another dense tensor; integers are always finite."""
    if dtype in NOT_FINITE:
        yield from _not_finite(tensor, dtype, "E204", where)


def _blocks(tensor: Tensor, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, Array]]:
    if end is None:
        end = int(np.prod(tensor.shape, dtype=object))
    for start in range(begin, end, BLOCK):
        yield start, tensor.flat(start, min(start + BLOCK, end))


def _at(where: str, shape: tuple[int, ...], flat: int) -> str:
    index = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        index.append(str(rest))
    return f"{where}[{', '.join(reversed(index))}]"


def _not_finite(tensor: Tensor, dtype: str, code: str, where: str) -> Iterator[SpqrError]:
    unsigned, test = NOT_FINITE[dtype]
    for start, block in _blocks(tensor):
        bits = np.ascontiguousarray(block).view(unsigned)
        bad = test(bits)
        if bad.any():
            place = int(bad.argmax())
            parts = bits.size // block.size  # 2 for complex
            what = f"{dtype} bits {int(bits[place]):#x}, expected a finite number"
            yield SpqrError(code, _at(where, tensor.shape, start + place // parts), what)
            return


def _padding(layout: Layout, tensors: Mapping[str, Tensor], where: str) -> Iterator[SpqrError]:
    rows, columns = layout.out_features % TILE, layout.in_features % TILE
    padded_row = np.broadcast_to(np.arange(TILE)[:, None] >= (rows or TILE), (TILE, TILE))
    padded_column = np.broadcast_to(np.arange(TILE)[None, :] >= (columns or TILE), (TILE, TILE))
    most = np.uint8(2**layout.weight_bits - 1)
    weight, name = tensors["weight"], f"{where}.weight"
    found: list[SpqrError] = []
    if rows:
        # one chunk, which the full ones repeat, and the tail
        full, tail = (
            pack_codes(np.tile(padded_row * most, blocks), layout.weight_bits) for blocks in (CHUNK, layout.blocks % CHUNK)
        )
        found += _masked_last_row(weight, full, tail, name)
    if columns and not found:
        mask = pack_codes(padded_column * most, layout.weight_bits)[0].view(np.uint32)
        found += _masked_last_block(weight, mask, layout, name)
    yield from found
    if rows and layout.statistics == "bilevel":
        codes = padded_row * np.uint8(7)
        full, tail = (pack_stat_codes(part, part) for part in (codes, codes[:, : layout.groups % SET]))
        yield from _masked_last_row(tensors["stat_codes"], full, tail, f"{where}.stat_codes")


def _masked_last_row(
    tensor: Tensor, full: npt.NDArray[np.int32], tail: npt.NDArray[np.int32], where: str
) -> Iterator[SpqrError]:
    """The last row of the tensor, under the mask `full` again and again and `tail` at its end: padded rows of the last tile."""
    height, width = tensor.shape
    start, cut, end = (height - 1) * width, height * width - tail.size, height * width
    masks = np.tile(full.reshape(-1), max(1, min(BLOCK, width) // full.size)).view(np.uint32)
    pieces = [(begin, min(begin + masks.size, cut), masks) for begin in range(start, cut, masks.size)]
    for begin, last, mask in (*pieces, (cut, end, tail.reshape(-1).view(np.uint32))):
        words = np.ascontiguousarray(tensor.flat(begin, last)).view(np.uint32)
        bad = words & mask[: words.size]
        if bad.any():
            place = int((bad != 0).argmax())
            yield _dirty(where, tensor, begin + place, words[place], mask[place], "rows")
            return


def _masked_last_block(tensor: Tensor, mask: npt.NDArray[np.uint32], layout: Layout, where: str) -> Iterator[SpqrError]:
    """The words of every tile's last column block, word k of lane l under mask[8 k + l]: padded columns."""
    height, width = tensor.shape
    blocks = layout.blocks % CHUNK or CHUNK  # of the last chunk; its last block stands last of each lane's, full or not
    size = blocks * len(mask)
    step = max(1, BLOCK // width)
    for first in range(0, height, step):
        last = min(first + step, height)
        if step > 1:
            ends = tensor.flat(first * width, last * width).reshape(-1, width)[:, width - size :]
        else:  # one read of a few words, whatever the width
            ends = tensor.flat(last * width - size, last * width)[None]
        words = np.ascontiguousarray(ends[:, blocks - 1 :: blocks]).view(np.uint32)
        bad = words & mask
        if bad.any():
            tile, place = divmod(int((bad != 0).reshape(-1).argmax()), len(mask))
            flat = (first + tile + 1) * width - size + (place + 1) * blocks - 1
            yield _dirty(where, tensor, flat, words[tile, place], mask[place], "columns")
            return


def _dirty(where: str, tensor: Tensor, flat: int, word: np.generic, mask: np.generic, kind: str) -> SpqrError:
    what = f"{int(word) & 0xFFFFFFFF:#010x} has bits under {int(mask):#010x}, which are padded {kind} and must be 0"
    return SpqrError("E202", _at(where, tensor.shape, flat), what)


def _perm(tensor: Tensor, size: int, where: str) -> Iterator[SpqrError]:
    for low in range(0, size, PERM_WINDOW):
        seen = np.zeros(min(PERM_WINDOW, size - low), bool)
        for start, block in _blocks(tensor):
            values = block.astype(np.int64)
            outside = (values < 0) | (values >= size)
            if outside.any():
                place = int(outside.argmax())
                yield SpqrError("E203", f"{where}[{start + place}]", f"{values[place]}, expected 0 .. {size - 1}")
                return
            inside = (values >= low) & (values < low + seen.size)
            found, firsts = np.unique(values[inside], return_index=True)
            doubled = seen[found - low]
            if doubled.any() or found.size < int(inside.sum()):
                again = np.ones(int(inside.sum()), bool)
                again[firsts[~doubled]] = False
                place = int(np.flatnonzero(inside)[again.argmax()])
                yield SpqrError("E203", f"{where}[{start + place}]", f"{values[place]} stands twice")
                return
            seen[found - low] = True


def _pointers(tensor: Tensor, layout: Layout, where: str) -> Iterator[SpqrError]:
    before = 0
    for start, block in _blocks(tensor):
        values = block.astype(np.int64)
        if start == 0 and values[0] != 0:
            yield SpqrError("E301", f"{where}[0]", f"{values[0]}, expected 0")
            return
        falls = np.diff(values, prepend=before) < 0
        if falls.any():
            place = int(falls.argmax())
            last = before if place == 0 else int(values[place - 1])
            yield SpqrError("E302", f"{where}[{start + place}]", f"{values[place]}, which is below {last} before it")
            return
        before = int(values[-1])
    if before != layout.outliers:
        yield SpqrError("E303", f"{where}[{layout.cells}]", f"{before}, the module has {layout.outliers} outliers")


def _positions(pointers: Tensor, words: Tensor, layout: Layout, where: str) -> Iterator[SpqrError]:
    """E304, or E305 where no position is out of range. Needs pointers that were checked."""
    unordered, last = None, -1  # the first place out of order, and what stands there
    for start, cells, block in _words_of_cells(pointers, words, layout):
        position = (np.ascontiguousarray(block).view(np.uint32) & 0xFFFF).astype(np.int64)
        tiles, in_tile = cells // layout.cells_a_tile, cells % layout.cells_a_tile
        rows, columns = TILE * tiles + position // PANEL_COLUMNS, first_of_panel(in_tile) + position % PANEL_COLUMNS
        outside = (columns // CELL_COLUMNS != in_tile) | (rows >= layout.out_features) | (columns >= layout.in_features)
        if outside.any():
            place = int(outside.argmax())
            at = f"row {rows[place]} and column {columns[place]}"
            cell = f"cell {cells[place]}, which begins at column {CELL_COLUMNS * in_tile[place]}"
            what = f"position {position[place]}, {at} of {layout.out_features} x {layout.in_features}, in {cell}"
            yield SpqrError("E304", f"{where}[{start + place}]", what)
            return
        order = cells * POSITIONS + position  # rises from cell to cell, whatever the positions
        falls = np.diff(order, prepend=last) <= 0
        if unordered is None and falls.any():
            place = int(falls.argmax())
            before = (last if place == 0 else int(order[place - 1])) % POSITIONS
            unordered = start + place, f"position {position[place]} after {before} in cell {cells[place]}"
        last = int(order[-1])
    if unordered is not None:
        yield SpqrError("E305", f"{where}[{unordered[0]}]", unordered[1])


def _words_of_cells(pointers: Tensor, words: Tensor, layout: Layout) -> Iterator[tuple[int, npt.NDArray[np.int64], Array]]:
    """First index, cells and words of outliers, block by block."""
    for first in range(0, layout.cells, BLOCK):
        starts = pointers.flat(first, min(first + BLOCK, layout.cells) + 1).astype(np.int64)
        numbers = np.arange(first, first + len(starts) - 1)
        for begin in range(int(starts[0]), int(starts[-1]), BLOCK):
            end = min(begin + BLOCK, int(starts[-1]))
            yield begin, np.repeat(numbers, np.diff(starts.clip(begin, end))), words.flat(begin, end)
