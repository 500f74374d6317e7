"""Plans of the batched kernel: whatever the shape, each product is made once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from spqr_kernels.gemm_plan import CHOICES, plan_for


@given(
    batch=st.integers(1, 3000), tile_rows=st.integers(1, 2000), chunks=st.integers(1, 120), multiprocessors=st.integers(1, 160)
)
def test_every_row_and_chunk_is_covered_once(batch, tile_rows, chunks, multiprocessors):
    plan = plan_for(batch, tile_rows, chunks, multiprocessors)
    tiles = CHOICES[plan.width].warps
    assert plan.width * plan.parts >= batch > plan.width * (plan.parts - 1)
    assert plan.pieces % plan.parts == 0
    assert tiles * plan.pieces // plan.parts >= tile_rows > tiles * (plan.pieces // plan.parts - 1)
    seen: dict[int, list[range]] = {}
    for program in range(plan.programs):  # as `gemm_kernel` counts
        behind = program - plan.whole
        if behind < 0:
            seen.setdefault(program, []).append(range(chunks))
        else:
            begin = behind % plan.splits * plan.a_split
            seen.setdefault(plan.whole + behind // plan.splits, []).append(range(begin, min(begin + plan.a_split, chunks)))
    assert sorted(seen) == list(range(plan.pieces))
    for parts in seen.values():
        assert all(parts), "a program without work"
        assert [chunk for part in parts for chunk in part] == list(range(chunks))


def test_pieces_that_do_not_fill_the_gpu_are_split():
    few = plan_for(32, 16, 64, 132)  # 4 pieces
    assert few.programs > 40
    many = plan_for(512, 1792, 32, 132)  # 3.4 pieces a multiprocessor: the last 0.4 are split
    assert many.whole == 3 * 132
    assert many.splits > 1
    assert plan_for(32, 16, 1, 132).programs == 4
