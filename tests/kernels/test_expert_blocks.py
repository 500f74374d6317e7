"""Experts with several rows each: how rows come to blocks, and the operator, against float64."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spqr_format import SpqrError
from spqr_kernels import expert_blocks, experts, joined, ops

FP16, BF16 = torch.float16, torch.bfloat16
BOUND = {FP16: 9e-4, BF16: 4e-3}  # as in test_batches: few numbers in a row


@given(data=st.data(), number=st.integers(1, 9), rows=st.integers(1, 40), width=st.sampled_from(list(expert_blocks.WIDTHS)))
def test_every_pair_has_a_place_in_a_block_of_its_expert(data, number, rows, width):
    chosen = data.draw(st.integers(1, number))
    ids = torch.tensor(data.draw(st.lists(st.integers(0, number - 1), min_size=rows * chosen, max_size=rows * chosen)))
    standing, table, places = expert_blocks.in_blocks(ids, rows, number, width)
    assert len(table) == expert_blocks.most_blocks(len(ids), number, width)
    assert len(standing) == len(table) * width
    assert len(set(places.tolist())) == len(ids), "each has a place of its own"
    for pair, place in enumerate(places.tolist()):
        expert, count = table[place // width].tolist()
        assert expert == ids[pair]
        assert place % width < count
        assert standing[place] == pair // chosen
    assert table[:, 1].sum() == len(ids)
    assert ((table[:, 0] >= 0) == (table[:, 1] > 0)).all()


def test_more_experts_than_16_bits_count():
    ids = torch.tensor([39999, 0, 32768, 39999])
    _, table, places = expert_blocks.in_blocks(ids, 4, 40000, 8)
    assert table[places // 8, 0].tolist() == ids.tolist()
    assert table[:, 1].sum() == 4


@pytest.mark.parametrize(("pairs", "number", "width"), [(15, 8, None), (16, 8, 8), (64, 8, 16), (1024, 8, 128), (9000, 8, 256)])
def test_the_width_of_blocks(pairs, number, width):
    assert expert_blocks.width_for(pairs, number) == width


def layer(random_matrix, kinds, parts, out, columns):
    """Dense matrices [experts][parts] in float64, and stored, tables, and the layout of each table."""
    found = [[random_matrix(out, columns, seed=10 * e + p, **kind) for p in range(parts)] for e, kind in enumerate(kinds)]
    layouts = [[matrix.layout for matrix in its] for its in found]
    begins, end = experts.arrange(layouts)
    stored = torch.zeros(end, dtype=torch.int32)
    for matrix, begin in zip(chain(*found), chain(*begins), strict=True):
        whole = joined.join({leaf: torch.from_numpy(part.copy()) for leaf, part in matrix.pack().items()}, matrix.layout)
        stored[begin : begin + len(whole)] = whole
    dense = [[torch.from_numpy(matrix.dequantize()).double() for matrix in its] for its in found]
    return dense, stored, experts.tables(layouts, begins)


def choices(rows, number, chosen, seed=1):
    """Experts of each row, of which the first has most and the last none: int64 [rows * chosen]."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.linspace(1, 0, number) ** 2
    return torch.multinomial(weights.expand(rows, -1), chosen, generator=generator).reshape(-1)


def check(y, x, ids, places, dense, dtype):
    """y [blocks * width, parts, out] at the places of all pairs."""
    for pair, place in enumerate(places.tolist()):
        row = x[pair // (len(ids) // len(x))].double()
        expected = torch.stack([weight @ row for weight in dense[ids[pair]]])
        error = (y[place].double() - expected).norm() / expected.norm()
        assert error < BOUND[dtype], (pair, error)


KINDS = {
    "outliers": [{"outliers": 0.01}, {"outliers": 0.03}, {"outliers": 0.0}, {"outliers": 0.002}],
    "kinds": [{}, {"weight_bits": 2}, {"weight_bits": 4, "outliers": 0.0},
              {"weight_bits": 4, "statistics": "direct", "group_size": 128}],
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("width", expert_blocks.WIDTHS)
@pytest.mark.parametrize("kinds", KINDS)
def test_blocks_of_rows_match_float64(random_matrix, device, kinds, width):
    for parts, out, columns, rows, chosen, dtype in (
        (2, 48, 256, 33, 2, FP16), (1, 40, 768, 50, 1, BF16), (2, 17, 512, 20, 3, FP16), (2, 33, 250, 9, 2, BF16),
    ):  # fmt: skip
        dense, stored, tables = layer(random_matrix, KINDS[kinds], parts, out, columns)
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
        ids = choices(rows, 4, chosen)
        blocks = expert_blocks.in_blocks(ids.to(device), rows, 4, width)
        numbers = [int(number) for table in tables for number in ops.geometry(table.layout)]
        begins = [table.begins.to(device) for table in tables]
        arguments = (x.to(device)[blocks.rows], blocks.table, stored.to(device), begins, numbers)
        y = torch.ops.spqr.experts_in_blocks(*arguments)
        again = torch.ops.spqr.experts_in_blocks(*arguments)
        assert torch.equal(y[blocks.places], again[blocks.places])
        check(y.cpu().view(-1, parts, out), x, ids, blocks.places.cpu(), dense, dtype)


def test_operands_that_do_not_fit_are_refused(random_matrix):
    _, stored, tables = layer(random_matrix, KINDS["outliers"], 2, 48, 256)
    numbers = [int(number) for table in tables for number in ops.geometry(table.layout)]
    begins = [table.begins for table in tables]
    x, blocks = torch.randn(16, 256), torch.tensor([[0, 8], [1, 3]], dtype=torch.int32)
    for wrong in (
        (x, blocks.long(), stored, begins, numbers),
        (x[:15], blocks, stored, begins, numbers),
        (x[:8], blocks, stored, begins, numbers),
        (x, blocks[:, :1], stored, begins, numbers),
        (x, blocks[:0], stored, begins, numbers),
        (x, blocks + 3, stored, begins, numbers),
        (x[:, :-1], blocks, stored, begins, numbers),
        (x, blocks, stored.long(), begins, numbers),
        (x, blocks, stored, begins[:1], numbers),
    ):
        with pytest.raises(SpqrError, match="E509"):
            torch.ops.spqr.experts_in_blocks(*wrong)
    torch.library.opcheck(torch.ops.spqr.experts_in_blocks, (x, blocks, stored, begins, numbers))
