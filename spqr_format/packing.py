"""Packing: integer codes to stored words and back (spec 4).

A column block of 16 rows and 16 columns is 8 lanes of 2 rows. Lane l keeps the codes of rows l and l + 8 in `weight_bits`
32-bit words. A field holds two neighbouring columns: the even one in the low half of the word, the odd one in the high half.
So one mask on a word yields a pair of codes that is ready for packed 16-bit arithmetic.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .layout import LANES, TILE, ceil_div

PAIRS = TILE // 2  # column pairs of a block
PACKED_TILES = 8  # tiles that are packed at once

# FIELDS[bits][half][pair] = (word, bit) of the low column's code. Half 0 is row l of lane l, half 1 is row l + 8.
# Spec table 4.2. For 3 bits, five fields fill bits 0..14 of a half word; the sixteenth field lies in bit 15 of all three.
SPREAD = 15
FIELDS: dict[int, tuple[tuple[tuple[int, int], ...], ...]] = {
    2: tuple(tuple((i // 4, 8 * h + 2 * (i % 4)) for i in range(PAIRS)) for h in range(2)),
    3: (
        ((0, 0), (2, 0), (0, 3), (2, 3), (1, 9), (0, 6), (2, 6), (1, 12)),
        ((1, 0), (0, SPREAD), (1, 3), (0, 9), (2, 9), (1, 6), (0, 12), (2, 12)),
    ),
    4: tuple(tuple((i // 2, 8 * h + 4 * (i % 2)) for i in range(PAIRS)) for h in range(2)),
}


def _padded(codes: npt.NDArray[np.uint8], rows: int, columns: int) -> npt.NDArray[np.uint32]:
    out = np.zeros((rows, columns), np.uint32)
    out[: codes.shape[0], : codes.shape[1]] = codes
    return out


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    """Codes uint8 [out, in], each below 2**bits, to words int32 [tile_rows * 8 * bits, blocks] (spec 4.2)."""
    tiles, blocks = ceil_div(codes.shape[0], TILE), ceil_div(codes.shape[1], TILE)
    words = np.empty((tiles * LANES * bits, blocks), np.int32)
    for tile in range(0, tiles, PACKED_TILES):  # a few at a time, in the processor's cache
        last = min(tile + PACKED_TILES, tiles)
        words[tile * LANES * bits : last * LANES * bits] = _pack_tiles(codes[tile * TILE : last * TILE], bits)
    return words


def _pack_tiles(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int32]:
    tiles, blocks = ceil_div(codes.shape[0], TILE), ceil_div(codes.shape[1], TILE)
    # tile, half, lane, block, pair, column parity
    q = _padded(codes, tiles * TILE, blocks * TILE).reshape(tiles, 2, LANES, blocks, PAIRS, 2)
    pairs = q[..., 0] | (q[..., 1] << 16)
    words = np.zeros((tiles, bits, LANES, blocks), np.uint32)
    for half, table in enumerate(FIELDS[bits]):
        for pair, (word, bit) in enumerate(table):
            value = pairs[:, half, :, :, pair]
            if bit == SPREAD:
                for k in range(3):
                    words[:, k] |= ((value >> k) & 0x00010001) << 15
            else:
                words[:, word] |= value << bit
    return words.reshape(tiles * bits * LANES, blocks).view(np.int32)


def unpack_codes(words: npt.NDArray[np.int32], bits: int) -> npt.NDArray[np.uint8]:
    """Words int32 [tile_rows * 8 * bits, blocks] to codes uint8 [tile_rows * 16, blocks * 16], padding included (spec 4.2)."""
    blocks = words.shape[1]
    tiles = words.shape[0] // (bits * LANES)
    w = np.ascontiguousarray(words).view(np.uint32).reshape(tiles, bits, LANES, blocks)
    mask = np.uint32((2**bits - 1) * 0x00010001)
    q = np.empty((tiles, 2, LANES, blocks, PAIRS, 2), np.uint8)
    for half, table in enumerate(FIELDS[bits]):
        for pair, (word, bit) in enumerate(table):
            value = (w[:, word] >> bit) & mask
            if bit == SPREAD:
                value = sum(((w[:, k] >> 15) & 0x00010001) << k for k in range(3))
            q[:, half, :, :, pair, 0] = value & 0xFF
            q[:, half, :, :, pair, 1] = value >> 16
    return q.reshape(tiles * TILE, blocks * TILE)


def pack_stat_codes(scale_codes: npt.NDArray[np.uint8], zero_codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """3-bit codes uint8 [out, groups] of scales and zeros to words int32 [tile_rows * 3, groups] (spec 4.3).

    A tile's 96 bits hold 12 bits a lane: scale and zero code of row l, then of row l + 8.
    """
    groups = scale_codes.shape[1]
    tiles = ceil_div(scale_codes.shape[0], TILE)
    sq = _padded(scale_codes, tiles * TILE, groups).reshape(tiles, 2, LANES, groups)
    zq = _padded(zero_codes, tiles * TILE, groups).reshape(tiles, 2, LANES, groups)
    lanes = (sq[:, 0] | zq[:, 0] << 3 | sq[:, 1] << 6 | zq[:, 1] << 9).astype(np.uint64)
    words = np.zeros((tiles, 3, groups), np.uint64)
    for lane in range(LANES):
        word, bit = divmod(12 * lane, 32)
        value = lanes[:, lane] << np.uint64(bit)
        words[:, word] |= value & np.uint64(0xFFFFFFFF)
        if bit > 20:
            words[:, word + 1] |= value >> np.uint64(32)
    return words.astype(np.uint32).reshape(tiles * 3, groups).view(np.int32)


def unpack_stat_codes(words: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Words int32 [tile_rows * 3, groups] to scale and zero codes, each uint8 [tile_rows * 16, groups] (spec 4.3)."""
    groups = words.shape[1]
    w = np.ascontiguousarray(words).view(np.uint32).reshape(-1, 3, groups).astype(np.uint64)
    tiles = w.shape[0]
    codes = np.empty((2, tiles, 2, LANES, groups), np.uint8)  # scale or zero, tile, half, lane, group
    for lane in range(LANES):
        word, bit = divmod(12 * lane, 32)
        value = w[:, word] >> np.uint64(bit)
        if bit > 20:
            value |= w[:, word + 1] << np.uint64(32 - bit)
        for half in range(2):
            codes[0, :, half, lane] = (value >> np.uint64(6 * half)) & np.uint64(7)
            codes[1, :, half, lane] = (value >> np.uint64(6 * half + 3)) & np.uint64(7)
    scale_codes, zero_codes = codes.reshape(2, tiles * TILE, groups)
    return scale_codes, zero_codes
