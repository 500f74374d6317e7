"""Plans of the batched kernel: whatever the shape, each product is made once, and what a plan counts on has room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spqr_kernels.gemm_plan import CHOICES, plan_for, room_bytes
from spqr_kernels.outliers import ENTRIES


@given(
    batch=st.integers(17, 3000), tile_rows=st.integers(1, 2000), chunks=st.integers(1, 120),
    multiprocessors=st.integers(1, 160), sparse=st.booleans(),
)  # fmt: skip
def test_every_row_and_chunk_is_covered_once(batch, tile_rows, chunks, multiprocessors, sparse):
    plan = plan_for(batch, tile_rows, chunks, multiprocessors, sparse)
    choice = CHOICES[plan.width]
    assert plan.width * plan.parts >= batch > plan.width * (plan.parts - 1)
    assert plan.pieces % plan.parts == 0
    assert choice.warps * plan.pieces // plan.parts >= tile_rows > choice.warps * (plan.pieces // plan.parts - 1)
    assert plan.programs <= choice.resident * multiprocessors or plan.pieces >= plan.programs
    # as `shares.last_position` has it
    ends = [(program + 1) * plan.base + min(program + 1, plan.extra) for program in range(plan.programs)]
    assert ends[-1] == plan.pieces * chunks
    assert all(begin < end for begin, end in zip([0, *ends], ends, strict=False)), "a program without work"
    shared = any(end % chunks for end in ends)
    assert plan.partial >= (plan.programs * (16 * choice.warps * plan.width + 2) if shared else 0)


def test_pieces_that_do_not_fill_the_gpu_are_shared():
    few = plan_for(32, 16, 64, 132, True)  # 4 pieces
    assert few.programs > 100
    many = plan_for(512, 1792, 32, 132, True)  # 3.4 pieces a multiprocessor
    assert many.programs == 132
    assert many.extra
    assert plan_for(32, 16, 4, 132, True).programs == 8  # two chunks at least


def test_pieces_that_nearly_fill_the_gpu_are_whole():
    plan = plan_for(512, 512, 32, 132, True)  # 128 pieces
    assert (plan.width, plan.programs, plan.base, plan.extra, plan.partial) == (256, 128, 32, 0, 0)


@pytest.mark.parametrize("width", CHOICES)
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("entries", [0, *ENTRIES])
def test_as_many_programs_fit_on_a_multiprocessor_as_a_plan_counts_on(width, bits, entries):
    """Of an H100 or H200: 228 KB, of which the system has one for each program, and 65536 registers."""
    choice = CHOICES[width]
    assert choice.resident * (room_bytes(bits, entries, width, choice.warps) + 2048) <= 228 << 10
    assert choice.resident * 32 * choice.warps * (choice.registers or 255) <= 65536
