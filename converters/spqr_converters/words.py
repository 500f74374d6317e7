"""4-bit codes from the words of GPTQ and AWQ into ours, eight at a time: no single code is ever looked at.

Our word w = 2 g + v of lane l in a block of 16 columns (spec 4.2) has 8 fields of 4 bits, from the lowest on: columns c and
c + 4 of row l, where c = 8 g + 2 v, the same of row l + 8, then columns c + 1 and c + 5 of both rows. So it is a permutation of
fields that two or eight words of the source have, and whole arrays of words are permuted at once with masks and shifts.
Shapes: `words` uint32 [tiles, 4, 8, blocks], the grid of `packing`, where W has 16 * tiles rows and 16 * blocks columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from spqr_format.layout import LANES, TILE
from spqr_format.packing import to_stored

Words = npt.NDArray[np.uint32]
_TILES = 16  # tiles at a time: what stays in a core's cache
_ROWS = 64  # rows whose columns are permuted at once, likewise
_EVEN, _ODD = np.uint32(0x00FF00FF), np.uint32(0xFF00FF00)  # bytes
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)  # field p of a gemm word is row _AWQ[p] of its eight
# The fields of our word, as (row's half, a, b) of the eight words that hold them: column 8 g + 4 a + 2 v + b.
_FIELDS = ((0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1))


def _swap(x: Words, shift: int, mask: int, work: Words) -> None:
    """Exchanges the bits of `mask` with those `shift` above them, in place."""
    np.right_shift(x, np.uint32(shift), out=work)
    work ^= x
    work &= np.uint32(mask)
    x ^= work
    work <<= np.uint32(shift)
    x ^= work


def _pieces(tiles: int) -> list[slice]:
    return [slice(begin, min(begin + _TILES, tiles)) for begin in range(0, tiles, _TILES)]


def from_gptq(qweight: Words) -> Words:
    """Our words from GPTQ's uint32 [in / 8, out]: 8 columns of one row in a word, lowest first. 16 divides in and out."""
    blocks, tiles = qweight.shape[0] // 2, qweight.shape[1] // TILE
    theirs = qweight.reshape(blocks, 2, tiles, 2, LANES)
    ours = np.empty((tiles, 4, LANES, blocks), np.uint32)
    for part in _pieces(tiles):
        for side in range(2):
            upper, lower = theirs[:, side, part, 0], theirs[:, side, part, 1]  # rows l and l + 8: 8 columns each
            x = (lower & _EVEN) << np.uint32(8)
            x |= upper & _EVEN
            y = upper >> np.uint32(8)
            y &= _EVEN
            y |= lower & _ODD
            work = np.empty_like(x)
            for word, value in enumerate((x, y)):  # columns 0 1 of row l, of row l + 8, then columns 4 5; or 2 3 and 6 7
                _swap(value, 12, 0x0000F0F0, work)
                ours[part, 2 * side + word] = value.transpose(1, 2, 0)
    return ours


def permuted(qweight: Words, perm: npt.NDArray[np.integer]) -> Words:
    """GPTQ's words [in / 8, out] with column perm[j] of theirs as column j."""
    row, shift = perm >> 3, (4 * (perm & 7)).astype(np.uint32)[:, None]
    place = np.tile(np.arange(0, 32, 4, dtype=np.uint32), len(perm) // 8)[:, None]
    result = np.empty_like(qweight)
    for begin in range(0, qweight.shape[1], _ROWS):
        rows = slice(begin, begin + _ROWS)
        codes = np.take(qweight[:, rows], row, axis=0)
        codes >>= shift
        codes &= np.uint32(15)
        codes <<= place
        np.bitwise_or.reduce(codes.reshape(len(qweight), 8, -1), axis=1, out=result[:, rows])
    return result


def is_gptq(ours: Words, qweight: Words) -> bool:
    """True where our words hold exactly the codes of GPTQ's: turned back, and compared bit by bit."""
    tiles, _, _, blocks = ours.shape
    theirs = qweight.reshape(blocks, 2, tiles, 2, LANES)
    for part in _pieces(tiles):
        for side in range(2):
            x, y = (np.ascontiguousarray(ours[part, 2 * side + word].transpose(2, 0, 1)) for word in range(2))
            work = np.empty_like(x)
            for value in (x, y):
                _swap(value, 12, 0x0000F0F0, work)
            np.left_shift(y & _EVEN, np.uint32(8), out=work)
            work |= x & _EVEN
            if not np.array_equal(work, theirs[:, side, part, 0]):
                return False
            np.right_shift(x, np.uint32(8), out=work)
            work &= _EVEN
            work |= y & _ODD
            if not np.array_equal(work, theirs[:, side, part, 1]):
                return False
    return True


def _transpose(words: list[Words]) -> None:
    """Field i of word j becomes field j of word i, in place; eight arrays of words."""
    work = np.empty_like(words[0])
    for distance, mask in ((4, 0x0000FFFF), (2, 0x00FF00FF), (1, 0x0F0F0F0F)):
        shift = np.uint32(4 * distance)
        for first in range(8):
            if first & distance:
                continue
            a, b = words[first], words[first + distance]
            np.right_shift(a, shift, out=work)
            work ^= b
            work &= np.uint32(mask)
            b ^= work
            work <<= shift
            a ^= work


def from_awq(qweight: Words) -> Words:
    """Our words from AWQ's (gemm) uint32 [in, out / 8]: 8 rows of one column in a word. 16 divides in and out."""
    blocks, tiles = qweight.shape[0] // TILE, qweight.shape[1] // 2
    theirs = qweight.reshape(blocks, 2, 2, 2, 2, tiles, 2)  # block, g, a, v, b, tile, half
    ours = np.empty((tiles, 4, LANES, blocks), np.uint32)
    for part in _pieces(tiles):
        fields = []
        for half, a, b in _FIELDS:
            field = np.empty((blocks, 4, part.stop - part.start), np.uint32)
            for word in range(4):  # faster than all at once
                field[:, word] = theirs[:, word // 2, a, word % 2, b, part, half]
            fields.append(field)
        _transpose(fields)
        for position, row in enumerate(_AWQ):
            ours[part, :, row] = fields[position].transpose(2, 1, 0)
    return ours


def is_awq(ours: Words, qweight: Words) -> bool:
    """True where our words hold exactly the codes of AWQ's: turned back, and compared bit by bit."""
    tiles, _, _, blocks = ours.shape
    theirs = qweight.reshape(blocks, 2, 2, 2, 2, tiles, 2)
    for part in _pieces(tiles):
        fields = [np.ascontiguousarray(ours[part, :, row].transpose(2, 1, 0)) for row in _AWQ]
        _transpose(fields)
        for value, (half, a, b) in zip(fields, _FIELDS, strict=True):
            if not np.array_equal(value.reshape(blocks, 2, 2, -1), theirs[:, :, a, :, b, part, half]):
                return False
    return True


def stored(ours: Words) -> npt.NDArray[np.int32]:
    """As the format stores them: int32 [tiles, 32 * blocks] (spec 4.2)."""
    return to_stored(ours)
