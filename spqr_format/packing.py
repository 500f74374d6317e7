"""Packing: integer codes to stored words and back (spec 4).

A column block of 16 rows and 16 columns is 8 lanes of 2 rows. Lane l keeps the codes of rows l and l + 8 in `weight_bits`
32-bit words. A field holds two neighbouring columns: the even one in the low half of the word, the odd one in the high half.
So one mask on a word yields a pair of codes that is ready for packed 16-bit arithmetic.

Words have two forms. The GRID, [tile, word, lane, block], is the one to compute with. STORED, they lie in the order in which
a GPU reads them, [tile, column]. `to_stored` and `to_grid` lead from one to the other, and a run of tiles is a run of rows in
both.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .errors import SpqrError
from .layout import CELL_COLUMNS, CHUNK, LANES, PANEL_COLUMNS, TILE, ceil_div

PAIRS = TILE // 2  # column pairs of a block
PACKED_TILES = 8  # tiles that are packed at once
SET = 16  # groups whose statistics codes share 48 words (spec 4.3)
SET_WORDS = 3 * SET

# FIELDS[bits][half][pair] = (word, bit) of the low column's code. Half 0 is row l of lane l, half 1 is row l + 8.
# Spec table 4.2. For 3 bits, five fields fill bits 1..15 of a half word; the sixteenth field lies in bit 0 of all three.
SPREAD = 0
FIELDS: dict[int, tuple[tuple[tuple[int, int], ...], ...]] = {
    2: tuple(tuple((i % 2, 8 * h + 2 * (i // 2)) for i in range(PAIRS)) for h in range(2)),
    3: (
        ((0, 1), (1, 1), (0, 4), (1, 4), (0, 7), (1, 7), (0, 10), (1, 10)),
        ((2, 1), (0, SPREAD), (2, 4), (2, 10), (2, 7), (2, 13), (0, 13), (1, 13)),
    ),
    4: tuple(tuple((2 * (i // 4) + i % 2, 8 * h + 4 * (i // 2 % 2)) for i in range(PAIRS)) for h in range(2)),
}


def is_spread(bits: int, bit: int) -> bool:
    """True for the one field of 3 bits that lies in bit SPREAD of three words: of the others none is at that bit."""
    return bits == 3 and bit == SPREAD


def to_stored(grid: npt.NDArray[np.generic]) -> npt.NDArray[np.int32]:
    """Words of 32 bits [tiles, bits, 8, blocks] to int32 [tiles, 8 * bits * blocks], as M.weight has them (spec 4.2)."""
    tiles, bits, lanes, blocks = grid.shape
    stored = np.empty((tiles, bits * lanes * blocks), np.int32)
    for tile in range(0, tiles, PACKED_TILES):
        part = slice(tile, tile + PACKED_TILES)
        _place(grid[part].view(np.int32), stored[part])
    return stored


def _place(grid: npt.NDArray[np.int32], stored: npt.NDArray[np.int32]) -> None:
    tiles, bits, lanes, blocks = grid.shape
    whole = blocks // CHUNK * CHUNK
    cut = whole * bits * lanes
    # tile, word, lane, chunk, b // 4, b % 4
    chunks = grid[..., :whole].reshape(tiles, bits, lanes, whole // CHUNK, 4, 4)
    stored[:, :cut] = chunks.transpose(0, 3, 1, 2, 5, 4).reshape(tiles, cut)
    stored[:, cut:] = grid[..., whole:].reshape(tiles, -1)


def to_grid(stored: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.int32]:
    """The inverse of `to_stored`: int32 [tiles, 8 * bits * blocks] to int32 [tiles, bits, 8, blocks] (spec 4.2)."""
    tiles, blocks = stored.shape[0], stored.shape[1] // (bits * LANES)
    whole = blocks // CHUNK * CHUNK
    cut = whole * bits * LANES
    grid = np.empty((tiles, bits, LANES, blocks), np.int32)
    # tile, chunk, word, lane, b % 4, b // 4
    chunks = stored[:, :cut].reshape(tiles, whole // CHUNK, bits, LANES, 4, 4)
    grid[..., :whole] = chunks.transpose(0, 2, 3, 1, 5, 4).reshape(tiles, bits, LANES, whole)
    grid[..., whole:] = stored[:, cut:].reshape(tiles, bits, LANES, blocks - whole)
    return grid


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Codes uint8 [out, in], each below 2**bits, to words int32 [tile_rows, 8 * bits * blocks] (spec 4.2)."""
    tiles, blocks = ceil_div(codes.shape[0], TILE), ceil_div(codes.shape[1], TILE)
    words = np.empty((tiles, LANES * bits * blocks), np.int32)
    for tile in range(0, tiles, PACKED_TILES):  # a few at a time, in the processor's cache
        part = slice(tile, min(tile + PACKED_TILES, tiles))
        _place(_pack_tiles(codes[part.start * TILE : part.stop * TILE], bits).view(np.int32), words[part])
    return words


def _pack_tiles(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint32]:
    """Codes of a few tiles to their grid."""
    tiles, blocks = ceil_div(codes.shape[0], TILE), ceil_div(codes.shape[1], TILE)
    padded = np.zeros((tiles * TILE, blocks * TILE), np.uint8)
    padded[: codes.shape[0], : codes.shape[1]] = codes
    # tile, half, lane, block, pair: the even column in the low byte
    couples = padded.view("<u2").reshape(tiles, 2, LANES, blocks, PAIRS)
    # half and pair outermost, so that all that follows runs along whole lanes
    pairs = couples.transpose(1, 4, 0, 2, 3).astype(np.uint32, order="C")
    pairs |= pairs << np.uint32(8)
    pairs &= np.uint32(0x00FF00FF)
    words = np.zeros((tiles, bits, LANES, blocks), np.uint32)
    for half, table in enumerate(FIELDS[bits]):
        for pair, (word, bit) in enumerate(table):
            value = pairs[half, pair]
            if is_spread(bits, bit):
                for k in range(3):
                    words[:, k] |= ((value >> np.uint32(k)) & np.uint32(0x00010001)) << np.uint32(SPREAD)
            else:
                words[:, word] |= value << np.uint32(bit)
    return words


def unpack_codes(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.uint8]:
    """Words int32 [tile_rows, 8 * bits * blocks] to codes uint8 [tile_rows * 16, blocks * 16], padding included
    (spec 4.2)."""
    tiles, blocks = words.shape[0], words.shape[1] // (bits * LANES)
    codes = np.empty((tiles * TILE, blocks * TILE), np.uint8)
    for tile in range(0, tiles, PACKED_TILES):
        part = slice(tile, min(tile + PACKED_TILES, tiles))
        _unpack_tiles(to_grid(words[part], bits), codes[part.start * TILE : part.stop * TILE])
    return codes


def _unpack_tiles(grid: npt.NDArray[np.int32], codes: npt.NDArray[np.uint8]) -> None:
    """The grid of a few tiles to their codes, all of them."""
    tiles, bits, _, blocks = grid.shape
    w = grid.view(np.uint32)
    mask = np.uint32((2**bits - 1) * 0x00010001)
    couples = codes.view("<u2").reshape(tiles, 2, LANES, blocks, PAIRS)  # tile, half, lane, block, pair
    for half, table in enumerate(FIELDS[bits]):
        for pair, (word, bit) in enumerate(table):
            if is_spread(bits, bit):
                value = sum(((w[:, k] >> np.uint32(SPREAD)) & np.uint32(0x00010001)) << np.uint32(k) for k in range(3))
            else:
                value = (w[:, word] >> np.uint32(bit)) & mask
            couples[:, half, :, :, pair] = value | value >> np.uint32(8)  # cut to 16 bits: one code a byte


def pack_stat_codes(scale_codes: npt.NDArray[np.uint8], zero_codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """3-bit codes uint8 [out, groups] of scales and zeros to words int32 [tile_rows, 3 * groups] (spec 4.3)."""
    groups = scale_codes.shape[1]
    tiles = ceil_div(scale_codes.shape[0], TILE)
    sq, zq = np.zeros((2, tiles * TILE, groups), np.uint16)
    sq[: len(scale_codes)], zq[: len(zero_codes)] = scale_codes, zero_codes
    sq, zq = (x.reshape(tiles, 2, LANES, groups) for x in (sq, zq))
    # v[tile, lane, group]: the 12 bits of two rows
    v = (sq[:, 0] | zq[:, 0] << 3 | sq[:, 1] << 6 | zq[:, 1] << 9).astype(np.uint32)

    sets = groups // SET
    words = np.empty((tiles, 3 * groups), np.uint32)
    # tile, set, lane, quarter p, (half of the set, group of the pair)
    q = v[..., : SET * sets].reshape(tiles, LANES, sets, 2, 4, 2).transpose(0, 2, 1, 4, 3, 5)
    found = np.empty((tiles, sets, SET_WORDS), np.uint32)
    full = q[..., 0, 0] | q[..., 0, 1] << 12 | q[..., 1, 0] << 24  # of the last, the low 8 bits stay
    found[..., :32] = full.reshape(tiles, sets, 32)
    rest = (q[..., 1, 0] >> 8 | q[..., 1, 1] << 4).reshape(tiles, sets, 16, 2)
    found[..., 32:] = rest[..., 0] | rest[..., 1] << 16
    words[:, : SET_WORDS * sets] = found.reshape(tiles, -1)

    tail = np.zeros((tiles, 3, groups - SET * sets), np.uint32)
    for lane in range(LANES):
        word, bit = divmod(12 * lane, 32)
        value = v[:, lane, SET * sets :]
        tail[:, word] |= value << np.uint32(bit)
        if bit > 20:
            tail[:, word + 1] |= value >> np.uint32(32 - bit)
    words[:, SET_WORDS * sets :] = tail.reshape(tiles, -1)
    return words.view(np.int32)


def unpack_stat_codes(words: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Words int32 [tile_rows, 3 * groups] to scale and zero codes, each uint8 [tile_rows * 16, groups] (spec 4.3)."""
    tiles, groups = words.shape[0], words.shape[1] // 3
    sets = groups // SET
    w = np.ascontiguousarray(words).view(np.uint32)
    v = np.empty((tiles, LANES, groups), np.uint16)  # of what is written, 12 bits count

    full = w[:, : SET_WORDS * sets].reshape(tiles, sets, SET_WORDS)
    first = full[..., :32].reshape(tiles, sets, LANES, 4)
    rest = np.empty((tiles, sets, 16, 2), np.uint32)
    rest[..., 0], rest[..., 1] = full[..., 32:] & 0xFFFF, full[..., 32:] >> 16
    rest = rest.reshape(tiles, sets, LANES, 4)
    parts = np.empty((tiles, LANES, sets, 2, 4, 2), np.uint16)
    for half, last, value in (
        (0, 0, first),
        (0, 1, first >> 12),
        (1, 0, first >> 24 | rest << 8),
        (1, 1, rest >> 4),
    ):
        parts[:, :, :, half, :, last] = value.transpose(0, 2, 1, 3)
    v[..., : SET * sets] = parts.reshape(tiles, LANES, -1)

    tail = w[:, SET_WORDS * sets :].reshape(tiles, 3, -1)
    for lane in range(LANES):
        word, bit = divmod(12 * lane, 32)
        value = tail[:, word] >> np.uint32(bit)
        if bit > 20:
            value |= tail[:, word + 1] << np.uint32(32 - bit)
        v[:, lane, SET * sets :] = value

    codes = np.empty((2, tiles, 2, LANES, groups), np.uint8)  # scale or zero, tile, half, lane, group
    for kind in range(2):
        for half in range(2):
            codes[kind, :, half] = (v >> np.uint16(6 * half + 3 * kind)) & np.uint16(7)
    scale_codes, zero_codes = codes.reshape(2, tiles * TILE, groups)
    return scale_codes, zero_codes


def pack_outliers(
    crow: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int64],
    values: npt.NDArray[np.float16],
    in_features: int,
    where: str = "outliers",
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """A CSR (crow [out + 1]; columns and values [outliers]) to outlier_ptr [cells + 1] and outliers [outliers] (spec 5.3).

    Raises SpqrError E301 .. E305 where the indices are no CSR: packed, they would be another one.
    """
    _check_csr(crow, columns, in_features, where)
    out = len(crow) - 1
    shape = ceil_div(out, TILE), TILE, ceil_div(in_features, CELL_COLUMNS)
    rows = np.repeat(np.arange(out), np.diff(crow))
    places, starts = _regrouped(rows * shape[2] + columns // CELL_COLUMNS, shape)
    pointers = np.append(starts[..., 0], len(columns)).astype(np.int32)
    position = rows % TILE * PANEL_COLUMNS + columns % PANEL_COLUMNS
    bits = np.ascontiguousarray(values, np.float16).view(np.uint16)
    words = np.empty(len(columns), np.uint32)
    words[places] = position.astype(np.uint32) | bits.astype(np.uint32) << np.uint32(16)
    return pointers, words.view(np.int32)


def unpack_outliers(
    pointers: npt.NDArray[np.int32], words: npt.NDArray[np.int32], out_features: int, in_features: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float16]]:
    """The inverse of `pack_outliers`: crow int64 [out + 1], columns int64 and values float16 [outliers]. The cells must have
    been checked (spec 5.3)."""
    shape = ceil_div(out_features, TILE), ceil_div(in_features, CELL_COLUMNS), TILE
    w = np.ascontiguousarray(words).view(np.uint32)
    position = (w & np.uint32(0xFFFF)).astype(np.int64)
    cells = np.repeat(np.arange(len(pointers) - 1), np.diff(pointers))
    places, starts = _regrouped(cells * TILE + position // PANEL_COLUMNS, shape)
    crow = np.append(starts[..., 0].reshape(-1)[:out_features], len(w))
    columns = np.empty(len(w), np.int64)
    columns[places] = first_of_panel(cells % shape[1]) + position % PANEL_COLUMNS
    values = np.empty(len(w), np.uint16)
    values[places] = w >> np.uint32(16)
    return crow, columns, values.view(np.float16)


def first_of_panel(cells: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """First column of the panel of 4096 columns in which these cells of a tile lie (spec 5.3)."""
    return cells * CELL_COLUMNS // PANEL_COLUMNS * PANEL_COLUMNS


def _regrouped(runs: npt.NDArray[np.int64], shape: tuple[int, int, int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where elements go whose runs change from the order [tiles, m, n] to [tiles, n, m]; they keep their order within a run.

    runs: the run of every element, rising. Returns places, as many, and the first place of every run [tiles, n, m].
    """
    counts = np.bincount(runs, minlength=shape[0] * shape[1] * shape[2]).reshape(shape)
    before = counts.cumsum().reshape(shape) - counts
    turned = counts.transpose(0, 2, 1)
    starts = turned.cumsum().reshape(turned.shape) - turned
    moved = np.repeat((starts.transpose(0, 2, 1) - before).reshape(-1), counts.reshape(-1))
    return np.arange(len(runs)) + moved, starts


def _check_csr(crow: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], in_features: int, where: str) -> None:
    if crow[0] != 0:
        raise SpqrError("E301", where, f"crow_indices starts at {crow[0]}, expected 0")
    if (np.diff(crow) < 0).any():
        raise SpqrError("E302", where, "crow_indices falls")
    if crow[-1] != len(columns):
        raise SpqrError("E303", where, f"crow_indices ends at {crow[-1]}, there are {len(columns)} outliers")
    if len(columns) and not 0 <= columns.min() <= columns.max() < in_features:
        raise SpqrError("E304", where, f"columns {columns.min()} .. {columns.max()}, the weight has {in_features}")
    rises = np.diff(columns, prepend=-1) > 0
    rises[crow[:-1][crow[:-1] < len(columns)]] = True  # the first of a row
    if not rises.all():
        raise SpqrError("E305", where, f"columns do not rise within a row, at outlier {int(rises.argmin())}")
