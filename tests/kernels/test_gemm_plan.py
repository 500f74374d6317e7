"""Plans of the batched kernel: whatever the shape, each product is made once, and what a plan counts on has room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spqr_kernels.gemm_plan import CHOICES, plan_for, room_bytes
from spqr_kernels.outliers import ENTRIES
from spqr_kernels.shares import Share, share_out


def last_positions(share):
    """Of each program, as `shares.last_position` has it."""
    return [(program + 1) * share.base + min(program + 1, share.extra) for program in range(share.programs)]


@given(
    batch=st.integers(17, 3000), tiles=st.lists(st.integers(1, 2000), min_size=1, max_size=3), chunks=st.integers(1, 120),
    multiprocessors=st.integers(1, 160), sparse=st.booleans(),
)  # fmt: skip
def test_every_row_and_chunk_is_covered_once(batch, tiles, chunks, multiprocessors, sparse):
    plan = plan_for(batch, tiles, chunks, multiprocessors, sparse)
    choice = CHOICES[plan.width]
    assert plan.width * plan.parts >= batch > plan.width * (plan.parts - 1)
    assert plan.programs <= choice.resident * multiprocessors + len(tiles) or plan.pieces >= plan.programs
    assert plan.programs == sum(share.programs for share in plan.shares)
    shared, pieces = False, 0
    for tile_rows, share in zip(tiles, plan.shares, strict=True):
        if plan.cluster > 1:  # each has a piece
            assert plan.cluster <= chunks
            assert plan.programs <= multiprocessors
            rows_of_pieces, left = divmod(share.programs, plan.cluster * plan.parts)
            assert not left
            assert choice.warps * rows_of_pieces >= tile_rows > choice.warps * (rows_of_pieces - 1)
            pieces += rows_of_pieces * plan.parts
            continue
        ends = last_positions(share)
        assert ends[-1] % (plan.parts * chunks) == 0
        rows_of_pieces = ends[-1] // (plan.parts * chunks)
        assert choice.warps * rows_of_pieces >= tile_rows > choice.warps * (rows_of_pieces - 1)
        assert all(begin < end for begin, end in zip([0, *ends], ends, strict=False)), "a program without work"
        shared |= any(end % chunks for end in ends)
        pieces += rows_of_pieces * plan.parts
    assert plan.pieces == pieces
    assert plan.partial >= (plan.programs * (16 * choice.warps * plan.width + 2) if shared else 0)


def test_pieces_that_do_not_fill_the_gpu_are_shared():
    few = plan_for(32, [16], 64, 132, True)  # 4 pieces
    assert few.programs > 100
    many = plan_for(512, [1792], 32, 132, True)  # 3.4 pieces a multiprocessor
    assert many.programs == 132
    assert many.shares[0].extra
    assert plan_for(32, [16], 4, 132, True).programs == 8  # two chunks at least


def test_pieces_that_nearly_fill_the_gpu_are_whole():
    plan = plan_for(512, [512], 32, 132, True)  # 128 pieces
    assert (plan.width, plan.programs, plan.shares, plan.partial) == (256, 128, (Share(128, 32, 0),), 0)


def test_pieces_for_half_of_the_gpu_are_those_of_clusters():
    """4096 x 4096 and 4096 x 11008 at 512 rows, 8192 x 8192 at 64: 64 pieces of two programs each."""
    for batch, rows, columns in ((512, 4096, 4096), (512, 4096, 11008), (64, 8192, 8192)):
        plan = plan_for(batch, [rows // 16], columns // 256, 132, True)
        assert (plan.cluster, plan.pieces, plan.programs, plan.partial) == (2, 64, 128, 0)
    assert plan_for(64, [192], 16, 132, True).cluster == 4  # 24 pieces
    assert plan_for(64, [256], 16, 132, True).cluster == 1  # 32 clusters of four find no room at once, two are too few


@given(positions=st.lists(st.integers(1, 100_000), min_size=1, max_size=3), least=st.integers(2, 4), most=st.integers(1, 600))
def test_matrices_have_programs_by_their_size(positions, least, most):
    """And all programs of all matrices about as much."""
    programs = max(1, min(most, sum(positions) // least))
    shares = share_out(positions, programs)
    for count, share in zip(positions, shares, strict=True):
        assert share.programs * share.base + share.extra == count
        assert share.extra < share.programs
        assert share.base
        assert abs(share.programs - programs * count / sum(positions)) <= len(positions)  # rounded, and one for each at least


@pytest.mark.parametrize("width", CHOICES)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("entries", [0, *ENTRIES])
def test_as_many_programs_fit_on_a_multiprocessor_as_a_plan_counts_on(width, bits, entries):
    """Of an H100 or H200: 228 KB, of which the system has one for each program, and 65536 registers."""
    choice = CHOICES[width]
    assert choice.resident * (room_bytes(bits, entries, width, choice.warps) + 2048) <= 228 << 10
    assert choice.resident * 32 * choice.warps * (choice.registers or 255) <= 65536
