"""Which statistics each lane of the tensor-core kernels for batches takes, against the matrix before it was packed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from spqr_kernels import lanes, weights

sys.path.insert(0, str(Path(__file__).parent))
from gluon_on_torch import Pointer, plain  # beside this file, not part of a package

BITS = 3
LAST_LINE = 40  # rows: two whole tiles and half of one


def expected(matrix, tile, chunk, blocks):
    """Of 32 lanes: the 12 bits of spec 4.3 and the four fp16 statistics, in one int64, of the groups of these blocks [32]."""
    group = (chunk * 16 + blocks) // (matrix.layout.group_size // 16)
    rows = 16 * tile + np.arange(32) // 4

    def code(array, row):
        return np.where(row < LAST_LINE, array[np.minimum(row, LAST_LINE - 1), group], 0).astype(np.int32)

    codes = code(matrix.scale_codes, rows) | code(matrix.zero_codes, rows) << 3
    codes |= code(matrix.scale_codes, rows + 8) << 6 | code(matrix.zero_codes, rows + 8) << 9
    return codes, np.ascontiguousarray(matrix.tile_stats[tile, group]).view(np.int64)[:, 0]


class Program:
    """The copies of a program whose warps share the chunks of its tiles, as the kernels' loops have them."""

    def __init__(self, matrix, first_tile, warps, tiles):
        layout = matrix.layout
        packed = {leaf: torch.from_numpy(tensor.copy()).reshape(-1) for leaf, tensor in matrix.pack().items()}
        self.stat_codes = Pointer(packed["stat_codes"])
        self.chunks, self.groups, self.split = layout.blocks // 16, layout.groups, warps // tiles
        self.chunks_a_set = layout.group_size // 16
        thread = torch.arange(32 * warps, dtype=torch.int32)
        self.gid, self.tid, self.part = thread % 32 // 4, thread % 4, thread // 32 // tiles
        self.tile = torch.minimum(first_tile + thread // 32 % tiles, torch.tensor(layout.tile_rows - 1))
        self.room = plain(lanes.room_for_chunks)(BITS, True, self.chunks_a_set, warps)
        self.at = list(
            plain(lanes.chunks_at)(
                Pointer(packed["weight"]), self.stat_codes, Pointer(packed["tile_stats"]), first_tile, layout.tile_rows,
                self.chunks, 0, BITS, self.chunks_a_set, warps, tiles,
            )
        )  # fmt: skip

    def steps(self):
        """After each step's copies: the chunk of each lane, and the largest."""
        words_at, codes_at, tops_at, *numbers, codes_lane = self.at
        for begin in range(0, self.chunks, self.split):
            words, codes, tops = (begin + number for number in numbers)
            plain(lanes.copy_chunks)(
                self.room, words_at, codes_at, tops_at, codes_lane, words < self.chunks, codes < self.chunks,
                tops < self.chunks, codes, self.chunks, BITS, True, self.chunks_a_set,
            )  # fmt: skip
            words_at += self.split * 128 * BITS
            codes_at += lanes.codes_step(self.split, self.chunks_a_set)
            tops_at += self.split * (16 // self.chunks_a_set)
            yield begin + self.part, begin + self.split - 1

    def check(self, matrix, chunk, blocks, codes, tops):
        """Of every warp that has a chunk: the codes and statistics that its lanes take for these blocks [32]."""
        for warp in range(len(chunk) // 32):
            own = slice(32 * warp, 32 * warp + 32)
            if chunk[own][0] < self.chunks:
                right_codes, right_tops = expected(matrix, int(self.tile[own][0]), int(chunk[own][0]), blocks)
                np.testing.assert_array_equal(codes[own] & 0xFFF, right_codes)
                np.testing.assert_array_equal(tops[own], right_tops)


@pytest.mark.parametrize("chunks", [*range(1, 10), 11])
@pytest.mark.parametrize("group_size", [16, 32, 64])
class TestEachLaneTakesTheStatisticsOfItsBlocks:
    @pytest.mark.parametrize(("warps", "tiles"), [(1, 1), (4, 4), (8, 4)])
    def test_batches(self, random_matrix, group_size, chunks, warps, tiles):
        matrix = random_matrix(LAST_LINE, 256 * chunks, weight_bits=BITS, group_size=group_size)
        program = Program(matrix, 1, warps, tiles)
        for chunk, last in program.steps():
            _, codes, tops = plain(weights.lane_of_chunk)(
                program.room, program.stat_codes, program.tile, chunk, last, program.chunks, program.groups, program.gid,
                program.tid, None, BITS, True, program.chunks_a_set,
            )  # fmt: skip
            for k in range(4):
                program.check(matrix, chunk, 4 * k + np.arange(32) % 4, codes[k], tops[k])
