"""The kernels of experts with several rows each as Triton compiles them, run by `ptx_machine`, against float64."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from spqr_kernels import expert_batches, expert_blocks, outliers, overlap, small

sys.path.insert(0, str(Path(__file__).parent))
from ptx_launch import CPU, bits, empty, run  # beside this file, not part of a package
from ptx_memory import Memory
from test_batches import slots
from test_expert_blocks import BF16, BOUND, FP16, layer


@pytest.mark.parametrize(
    ("kind", "width", "parts", "out", "columns", "dtype"),
    [
        ({}, 8, 2, 88, 1280, FP16),
        ({}, 16, 1, 40, 768, BF16),
        ({"weight_bits": 4, "statistics": "direct", "group_size": 128}, 8, 2, 17, 500, FP16),
        ({}, 32, 2, 200, 512, FP16),
        ({"group_size": 32}, 64, 2, 44, 768, BF16),
        ({"outliers": 0.0}, 128, 1, 136, 512, FP16),
        ({}, 256, 1, 40, 256, FP16),
    ],
    ids=lambda k: str(k).replace(" ", ""),
)
def test_programs_of_blocks(random_matrix, monkeypatch, kind, width, parts, out, columns, dtype):
    """Of four experts one is of another kind and one has no rows; blocks that are full, not full and empty."""
    monkeypatch.setattr(overlap, "options", lambda *_: {"DEPENDENT": True, "launch_pdl": True})
    kinds = [{"outliers": 0.01} | kind, {"weight_bits": 2}, {"outliers": 0.02} | kind, {"outliers": 0.002} | kind]
    dense, stored, tables = layer(random_matrix, kinds, parts, out, columns)
    table = next(table for table in tables if table.begins[0, 0, 0] >= 0)
    assert table.begins[1, 0, 0] < 0
    counts = (width + 3, 2, 5, 0)
    ids = torch.cat([torch.full((count,), expert) for expert, count in enumerate(counts)])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    blocks = expert_blocks.in_blocks(ids, len(ids), 4, width)
    assert (blocks.table[:, 1] == width).any()
    x = torch.randn(len(ids), columns, generator=torch.Generator().manual_seed(1)).half()
    layout = table.layout
    shape, kept = layout.with_outliers(min(layout.outliers, 1)), small.outliers_of_a_chunk(layout)
    entries = outliers.without_outliers(layout)[1]
    number = len(blocks.table)
    _, launch = expert_batches._launches.__wrapped__(shape, kept, entries, 4, parts, number, width, dtype, CPU)
    assert launch.grid[0] == number
    made = x[blocks.rows]
    padded = torch.nn.functional.pad(made, (0, layout.blocks * 16 - columns))
    prepared = slots(made, layout.blocks, width) if width > 16 else padded
    scale = torch.rand(len(made), generator=torch.Generator().manual_seed(2)) + 0.5
    memory = Memory()
    y = memory.add(empty(len(made) * parts * out, dtype), writable=True)
    addresses = [
        memory.add(bits(prepared)), memory.add(scale.numpy()), memory.add(blocks.table.numpy()),
        memory.add(table.begins.numpy()), memory.add(stored.numpy()), y,
    ]  # fmt: skip
    run(launch, memory, addresses, modes=(True,))
    result = torch.from_numpy(memory.array(y).copy()).view(dtype).view(len(made), parts, out)
    done = np.zeros(len(made), bool)
    for pair, place in enumerate(blocks.places.tolist()):
        if ids[pair] != 1:
            done[place] = True
            expected = torch.stack([weight @ x[pair].double() for weight in dense[ids[pair]]])
            if dtype == BF16:
                expected = expected * scale[place].double()
            error = (result[place].double() - expected).norm() / expected.norm()
            assert error < BOUND[dtype], (pair, error)
    assert torch.isnan(result[~done]).all(), "rows that no block of this kind has are left alone"


@pytest.mark.parametrize(
    ("pieces", "chunks", "count"), [(224, 16, 1), (12, 8, 2), (32, 3, 4), (7, 3, 1), (1, 1, 1), (3, 100, 1)]
)
def test_programs_of_few_chunks_have_several_pieces(pieces, chunks, count):
    assert expert_batches.pieces_of_a_program(pieces, chunks) == count
