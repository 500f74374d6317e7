"""The kernels of experts with several rows each as Triton compiles them, run by `ptx_machine`, against float64."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from spqr_kernels import expert_batches, expert_blocks, siblings

sys.path.insert(0, str(Path(__file__).parent))
from ptx_launch import CPU, bits, pretend_gpu, run  # beside this file, not part of a package
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
    pretend_gpu(monkeypatch, 1)
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
    (shape,), kept, entries = siblings.alike.__wrapped__((layout,))
    lost = int(blocks.places[ids.tolist().index(2)]) // width  # of an expert that is not there
    blocks.table[lost, 0] = 4
    number = len(blocks.table)
    _, launch = expert_batches._launches.__wrapped__(shape, kept, entries, 4, parts, number, width, dtype, CPU)
    assert launch.grid[0] == number
    made = x[blocks.rows]
    padded = torch.nn.functional.pad(made, (0, layout.blocks * 16 - columns))
    prepared = slots(made, layout.blocks, width) if width > 16 else padded
    scale = torch.rand(len(made), generator=torch.Generator().manual_seed(2)) + 0.5
    memory = Memory()
    left = bits(torch.tensor([7.0], dtype=dtype))[0]
    y = memory.add(np.full(len(made) * parts * out, left), writable=True)
    addresses = [
        memory.add(bits(prepared)), memory.add(scale.numpy()), memory.add(blocks.table.numpy()),
        memory.add(table.begins.numpy()), memory.add(stored.numpy()), y,
    ]  # fmt: skip
    run(launch, memory, addresses, modes=(True,))
    result = torch.from_numpy(memory.array(y).copy()).view(dtype).view(len(made), parts, out)
    done, written = np.zeros((2, len(made)), bool)
    raw = memory.array(y).reshape(len(made), -1)
    for pair, place in enumerate(blocks.places.tolist()):
        if place // width == lost:
            assert torch.isnan(result[place]).all()
            written[place] = True
        elif ids[pair] != 1:
            done[place] = written[place] = True
            expected = torch.stack([weight @ x[pair].double() for weight in dense[ids[pair]]])
            if dtype == BF16:
                expected = expected * scale[place].double()
            error = (result[place].double() - expected).norm() / expected.norm()
            assert error < BOUND[dtype], (pair, error)
    assert (raw[~written] == left).all(), "rows that no block of this kind has are left alone"
    assert done.any()


@pytest.mark.parametrize(
    ("pieces", "chunks", "count"), [(224, 16, 1), (12, 8, 2), (32, 3, 4), (7, 3, 1), (1, 1, 1), (3, 100, 1)]
)
def test_programs_of_few_chunks_have_several_pieces(pieces, chunks, count):
    assert expert_batches.pieces_of_a_program(pieces, chunks) == count
